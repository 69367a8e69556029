"""The implementations that the tests run with."""

from collections.abc import Iterator

import pytest
import torch

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
    """An implementation, with its device as the default."""
    implementation = Implementation(*request.param)
    has_gpu = torch.cuda.is_available()
    if implementation.device == "cuda" and not has_gpu:
        pytest.skip("needs a CUDA device")
    if implementation.interpreted and has_gpu:
        pytest.skip("the kernels are compiled here, for the GPU, and cannot be interpreted too")
    if implementation.device == "cpu":
        yield implementation
    else:
        # The tests compare results of products of float32, not of tf32.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.device(implementation.device), exact:
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
