"""Whether a file can be written where a flag says: for commands, before the work that it is to hold."""

import tempfile
from pathlib import Path

from mnist_flax.runtime.cli import UserError


def check(flag: str, path: Path, suffix: str = "") -> None:
    """Raises UserError unless a file can be written at `path`, which `--flag` named, and its name ends as it must."""
    if suffix not in ("", path.suffix):
        raise UserError(f"--{flag}={path} must be a {suffix} file")
    if path.is_dir():
        raise UserError(f"--{flag}={path} cannot be written: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written ({error.strerror}): choose another place") from error
