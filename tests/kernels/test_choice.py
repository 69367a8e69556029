"""Which implementation is chosen where Triton cannot build the C code that launches its kernels."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dcvae_kernels import choice

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    choice._obstacle_to_building.cache_clear()
    yield
    choice._obstacle_to_building.cache_clear()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_compiler_and_headers_are_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", "exit 0")))
    assert choice.obstacle_to_triton(CUDA) is None


@pytest.mark.filterwarnings("error")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match="PyTorch's operations are used instead: it needs a C compiler: install gcc"):
        assert choice.obstacle_to_triton(CUDA) == "it needs a C compiler: install gcc, or set CC to the path of one"
    assert choice.obstacle_to_triton(CUDA) is not None  # without a second warning, which would be an error


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.warns(UserWarning, match=r"cc cannot be run \(No such file or directory\)"):
        assert choice.obstacle_to_triton(CUDA) is not None


def test_without_the_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", "exit 1")))
    with pytest.warns(UserWarning, match=r"cannot compile against .*/Python\.h; install Python's headers"):
        assert choice.obstacle_to_triton(CUDA) is not None
