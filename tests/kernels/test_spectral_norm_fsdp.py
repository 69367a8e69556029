"""Spectral norm under FSDP2, against torch's parametrization in a single process."""

from pathlib import Path

import pytest

from checks import run_ranks


@pytest.mark.multiprocess
def test_fully_shard(tmp_path: Path):
    run_ranks(Path(__file__).parent / "fsdp.py", 2, tmp_path)
