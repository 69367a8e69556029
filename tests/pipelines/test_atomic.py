import errno
import os
from pathlib import Path

import pytest

from dcvae_pipelines.atomic import atomic_write


def test_atomic_write_replaces_the_file(tmp_path: Path):
    for content in ("first, longer\n", "größer\n"):
        atomic_write(tmp_path / "a.json", content)
        assert (tmp_path / "a.json").read_bytes() == content.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic_write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
