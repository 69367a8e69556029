"""Tests of the choice of implementation when Triton cannot build the C code that launches its kernels."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dcvae_kernels import dispatch, info_nce, spectral_norm

info_nce_module = sys.modules["dcvae_kernels.info_nce"]
spectral_norm_module = sys.modules["dcvae_kernels.spectral_norm"]

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def simulated_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    dispatch._obstacle_to_building.cache_clear()
    yield
    dispatch._obstacle_to_building.cache_clear()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_no_obstacle_with_a_compiler_and_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", "exit 0")))
    assert dispatch.obstacle_to_triton(CUDA) is None


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    for _ in range(2):
        obstacle = "it needs a C compiler: install gcc, or set CC to the path of one"
        assert dispatch.obstacle_to_triton(CUDA) == obstacle
    # logged only once
    assert caplog.messages == [f"Triton kernels cannot be launched: {obstacle}. PyTorch is used instead."]


def test_nonexistent_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    obstacle = dispatch.obstacle_to_triton(CUDA)
    assert obstacle == f"the C compiler {tmp_path / 'cc'} cannot be run (No such file or directory)"


def test_missing_python_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", "exit 1")))
    obstacle = dispatch.obstacle_to_triton(CUDA)
    assert obstacle is not None and obstacle.endswith("Python.h; install Python's headers (python3-dev)")


def test_auto_falls_back_to_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    q = torch.randn(3, 4)
    with FakeTensorMode():
        on_gpu = torch.empty(3, 4, device="cuda")
    monkeypatch.setattr(info_nce_module, "needs_reference", lambda *_: False)  # because fake tensors are a subclass
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", "exit 0")))
    assert info_nce_module._choose("auto", on_gpu, on_gpu) == "triton"
    dispatch._obstacle_to_building.cache_clear()
    monkeypatch.setenv("CC", "/absent")
    assert info_nce_module._choose("torch", on_gpu, on_gpu) == "torch" and not caplog.messages
    assert info_nce_module._choose("auto", on_gpu, on_gpu) == "torch" and caplog.messages
    for module in (info_nce_module, spectral_norm_module):
        monkeypatch.setattr(module, "obstacle_to_triton", lambda device: dispatch.obstacle_to_triton(CUDA))
    with pytest.raises(ValueError, match=r'impl="triton" cannot be used: the C compiler /absent cannot be run'):
        info_nce(q, q, impl="triton")
    with pytest.raises(ValueError, match=r'impl="triton" cannot be used for layer .* the C compiler /absent cannot'):
        spectral_norm(nn.Sequential(nn.Linear(2, 2)), impl="triton")
