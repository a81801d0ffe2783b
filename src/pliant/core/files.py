"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Generator[Path]:
    """A temporary name beside ``path``, which it replaces on success; on an error it goes and ``path`` stays as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(Path(folder) / "a.txt") as part:
    ...         _ = part.write_text("whole")
    ...     [f.read_text() for f in Path(folder).iterdir()]
    ['whole']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    try:
        yield part
        flush(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def beside(path: Path) -> Path:
    """A hidden name in the same folder that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk. Windows flushes no folders and needs files open for writing."""
    if path.is_dir():
        if not hasattr(os, "O_DIRECTORY"):
            return
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
