"""Write files that are whole or absent, even after a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` if the block succeeds: a reader, or a crash at any time, sees the old
    content or the new one, never a part. Until then it is beside `path`, hidden."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        aside.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a whole file as `replacing` does; text as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def find_unfinished(folder: Path) -> list[Path]:
    """Return the files in a folder that killed writers left behind."""
    return list(folder.glob(".*.unfinished"))
