"""Files that survive a power cut: content is on the disk before the name that promises it, and both before a report.

A rename alone is atomic for a process that dies, not for a machine that does: the new name may be on the disk and the
content not. So content is flushed (`fsync`) before the rename, and the directory after it.
"""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's names, are on the disk.

    Raises:
      OSError: they cannot be written there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until a directory with all that is in it, and its own name, are on the disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
    sync(directory.parent)


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and never through a link that was there before."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)
