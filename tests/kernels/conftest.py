"""Fixtures: the implementations that the tests run with."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import dcvae_kernels
from checks import Implementation


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch"),
        pytest.param(("triton", "cpu"), id="interpreter"),
        pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    ]
)
def on(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """An implementation, with its device as the default device."""
    implementation = Implementation(*request.param)
    has_gpu = torch.cuda.is_available()
    if implementation.device == "cuda" and not has_gpu:
        pytest.skip("needs a CUDA device")
    if implementation.interpreted and has_gpu:
        pytest.skip("with a GPU the kernels are compiled, so they cannot be interpreted in the same process")
    if implementation.device == "cpu":
        yield implementation
    else:
        # The tests compare float32 products, not tf32 products.
        no_tf32 = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.device(implementation.device), no_tf32:
            yield implementation


@pytest.fixture
def triton_on(on: Implementation) -> Implementation:
    if on.impl != "triton":
        pytest.skip("for the Triton kernels only")
    return on


@pytest.fixture
def on_gpu(triton_on: Implementation) -> Implementation:
    if triton_on.interpreted:
        pytest.skip("needs a CUDA device")
    return triton_on


@pytest.fixture
def use_implementation(on: Implementation, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make `spectral_norm` of the test's module use the implementation."""
    impl: Any = on.impl
    monkeypatch.setattr(request.module, "spectral_norm", partial(dcvae_kernels.spectral_norm, impl=impl))
