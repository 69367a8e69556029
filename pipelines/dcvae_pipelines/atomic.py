"""Write files that are whole or absent, even after a power cut."""

import os
from pathlib import Path


def atomic_write(path: Path, content: str) -> None:
    """Write a text file (UTF-8) in one step: readers see the old content or the new, and nothing between."""
    unfinished(path).write_text(content, encoding="utf-8")
    publish(path)


def unfinished(path: Path) -> Path:
    """Return where a file is written until `publish` moves it to `path`: beside it, hidden."""
    return path.with_name(f".{path.name}.unfinished")


def find_unfinished(folder: Path) -> list[Path]:
    """Return the files in a folder that interrupted writers left behind."""
    return list(folder.glob(".*.unfinished"))


def publish(path: Path) -> None:
    """Move the complete file at `unfinished(path)` to `path`.

    The content reaches the disk before the name does, and the name before this function returns.
    """
    _sync(unfinished(path))
    os.replace(unfinished(path), path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
