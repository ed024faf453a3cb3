"""What commands say of files: whether one can be written where a flag says, before any work, and commands to paste."""

import os
import shlex
import tempfile
from pathlib import Path

from mnist_flax.runtime.cli import UserError


def check_output(flag: str, path: Path) -> None:
    """Raises UserError unless a file can be written at `path`, which `--flag` named."""
    if path.is_dir():
        raise UserError(f"--{flag}={path} cannot be written: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise UserError(f"--{flag}={path} cannot be written ({error.strerror}): choose another place") from error


def check_directory(flag: str, directory: Path, *names: str) -> list[Path]:
    """The paths of files in a directory, which is made; raises UserError unless they can be written there."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--{flag}={directory} is a file: name a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={directory} cannot be made ({error.strerror}): choose another place") from error
    paths = [directory / name for name in names]
    for path in paths:
        check_output(flag, path)
    return paths


def command(*words: str) -> str:
    """Words on one line as bash and zsh read them back, whatever characters names of files have."""
    return " ".join(shlex.quote(word) if word.isprintable() else _escaped(word) for word in words)


def _escaped(word: str) -> str:
    plain = (c if c.isprintable() and c not in "'\\" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in word)
    return f"$'{''.join(plain)}'"
