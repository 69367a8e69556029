"""Helpers of the op tests: implementations, inputs, eager and fp64 InfoNCE, launch and memory checks, subprocesses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcvae_kernels


@dataclass(frozen=True)
class Implementation:
    """An implementation on a device. On a CPU, "triton" runs in Triton's interpreter."""

    impl: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.impl == "triton" and self.device == "cpu"

    @property
    def widest(self) -> torch.dtype:
        """Widest supported dtype."""
        return torch.float32 if self.impl == "triton" else torch.float64

    def info_nce(self, *args: Any, **options: Any) -> Any:
        return dcvae_kernels.info_nce(*args, **{"impl": self.impl} | options)

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return randn(*shape, seed=seed, dtype=dtype).to(self.device)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the same numbers on every device and, up to rounding, in every dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


class Weights(nn.Module):
    """Module whose forward pass returns the weights of its layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Any]:
        return [layer.weight for layer in self.layers]


def vectors(net: nn.Module) -> list[Tensor]:
    """Return copies of u and v of all layers that spectral_norm normalises."""
    return [b.clone() for name, b in net.named_buffers() if name.endswith(("._u", "._v"))]


def reset_vectors(net: nn.Module) -> None:
    """Set all elements of each u and v to the same value, so that an update changes them."""
    for name, buffer in net.named_buffers():
        if name.endswith(("._u", "._v")):
            buffer.fill_(len(buffer) ** -0.5)


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def cross_entropy(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Eager InfoNCE by F.cross_entropy, in the dtype of the inputs; [B, D], [B, D], [K, D] -> [B]."""
    q, k, queue = (F.normalize(t, dim=-1) for t in (q, k, queue))
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")


def info_nce_fp64(q: Tensor, k: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    """Eq. 6 in fp64, one query at a time; negatives[i], [K_i, D], belong to query i."""
    losses = []
    for query, key, others in zip(q.double(), k.double(), negatives, strict=True):
        positive = torch.cosine_similarity(query, key, dim=0) / temperature
        scores = torch.cosine_similarity(query[None], others.double(), dim=1) / temperature
        losses.append(torch.cat([positive[None], scores]).logsumexp(0) - positive)
    return torch.stack(losses)


# Plans, which contain kernels, by module.
CACHES = {"dcvae_kernels.info_nce": ["_PLANS"], "dcvae_kernels.triton.spectral_norm": ["_PLANS", "_LAYOUTS"]}


@contextmanager
def record_launches(module: ModuleType, launches: list[str]) -> Iterator[None]:
    """Append the names of the module's kernels to `launches` as they are launched."""

    class Recorder:
        def __init__(self, name: str, kernel: Any):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    with pytest.MonkeyPatch.context() as patch:
        for name, caches in CACHES.items():
            for cache_name in caches:
                patch.setattr(sys.modules[name], cache_name, {})
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, Recorder(name, getattr(module, name)))
        yield


@contextmanager
def poison_allocations() -> Iterator[Callable[[], bool]]:
    """Fill tensors from `Tensor.new_empty`, and guard regions around them, with NaN or the least integer.

    Yields a function that returns whether tensors were allocated and all guard regions are unchanged.
    """
    buffers: list[tuple[Tensor, int, float]] = []
    new_empty = Tensor.new_empty

    def allocate(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        size = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or self.dtype
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        buffer = new_empty(self, (size.numel() + 64,), dtype=dtype, **options).fill_(poison)
        buffers.append((buffer, size.numel(), poison))
        return buffer[32 : 32 + size.numel()].view(size)

    def intact() -> bool:
        for buffer, size, poison in buffers:
            guards = torch.cat([buffer[:32], buffer[32 + size :]])
            if not (guards.isnan() if poison != poison else guards == poison).all():
                return False
        return bool(buffers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", allocate)
        yield intact


def device_kernels(call: Callable[[], Any]) -> list[str]:
    """Return the names of the kernels, copies and fills that a call runs on the GPU, in order."""
    from harness import device_events  # in bench/, which is not on the path of scripts that import this file

    events = device_events(call)
    if events is None:
        pytest.skip("the profiler does not work here")
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def run_ranks(script: Path, count: int, folder: Path) -> None:
    """Run `script RANK FILE` as `count` ranks on the CPU, with a rendezvous file in `folder`; all must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    commands = [[sys.executable, script, str(rank), str(folder / "rendezvous")] for rank in range(count)]
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


@cache
def compiled_ahead(operation: str, *options: str) -> list[dict[str, Any]]:
    """Return the report of `compile_ahead.py`, run in another process because this one can be interpreting kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parent / "compile_ahead.py", operation, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
