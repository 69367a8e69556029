"""Triton kernels of spectral norm: launches, shapes and layouts, determinism, out-of-bounds accesses, and compiled
resources on several GPU architectures."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checks import Implementation, compiled_ahead, device_kernels, leaves, poison_allocations, record_launches
from dcvae_kernels import reference, spectral_norm, spectral_norm_autograd

kernels = pytest.importorskip("dcvae_kernels.triton.spectral_norm")

UPDATE, GRADIENT = ["iterate_kernel", "divide_kernel"], ["inner_kernel", "gradient_kernel"]


class Weights(nn.Module):
    """Module whose forward pass returns the weights of its layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Any]:
        return [layer.weight for layer in self.layers]


@pytest.mark.parametrize(("layers", "n_power_iterations"), [(1, 1), (1, 3), (100, 1)])
def test_launches_do_not_depend_on_the_number_of_layers(
    triton_on: Implementation, layers: int, n_power_iterations: int
):
    layers = min(layers, 20) if triton_on.interpreted else layers
    net = Weights([nn.Linear(2 + i % 3, 1 + i % 5) if i % 2 else nn.Conv2d(1, 2, i % 3 + 1) for i in range(layers)])
    spectral_norm(net, n_power_iterations, impl="triton")
    launches = []
    with record_launches(kernels, launches):
        torch.autograd.backward([weight.square().sum() for weight in net()])
    assert launches == UPDATE[:1] * n_power_iterations + UPDATE[1:] + GRADIENT


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_only_our_kernels_are_launched():
    net = spectral_norm(Weights([nn.Conv2d(8, 8, 3) for _ in range(10)]), impl="triton")
    grad_output = [torch.randn(8, 8, 3, 3) for _ in range(10)]
    parameters = [p for p in net.parameters() if p.ndim == 4]

    def step() -> None:
        torch.autograd.grad(net(), parameters, grad_output)

    step()
    assert [name for name in device_kernels(step) if "memset" not in name.lower()] == UPDATE + GRADIENT


# One and several blocks of rows and of columns, with and without a partial block.
SHAPES: list[tuple[tuple[int, ...], int]] = [
    ((1, 9), 0),
    ((9, 1), 0),
    ((1, 1), 0),
    ((33, 257), 0),
    ((7, 3, 3, 3), 0),
    ((5, 8, 1, 7), 0),
    ((9, 70, 1, 1), 0),
    ((6, 4, 2, 2), 1),
    ((18, 9, 4, 4), 1),
    ((1, 5, 3, 3), 1),
]
LARGER = [((65, 259), 0), ((33, 70, 1, 1), 0), ((70, 33, 4, 4), 1), ((512, 512, 3, 3), 0), ((512, 256, 4, 4), 1)]


def problem(on: Implementation, dtype: torch.dtype, channels_last: bool) -> Any:
    shapes = SHAPES if on.interpreted else [*SHAPES, *LARGER]
    weights = [on.randn(*shape, seed=i, dtype=dtype) for i, (shape, _) in enumerate(shapes)]
    if channels_last:
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    matrices = [reference.as_matrix(w, dim) for w, (_, dim) in zip(weights, shapes, strict=True)]
    us, vs = (
        [torch.nn.functional.normalize(on.randn(m.shape[i], seed=9, dtype=dtype), dim=0) for m in matrices]
        for i in (0, 1)
    )
    return [dim for _, dim in shapes], weights, us, vs


def run(on: Implementation, iterations: int, dims: Any, weights: Any, us: Any, vs: Any) -> list[Tensor]:
    """Return W/σ, the gradients, u and v; every third W/σ receives no gradient."""
    weights, us, vs = leaves(*weights), [u.clone() for u in us], [v.clone() for v in vs]
    normalized = spectral_norm_autograd.normalized_weights(
        reference.Layers(weights, us, vs, dims), iterations, 1e-12, on.impl
    )
    used = [i for i in range(len(weights)) if i % 3]
    grad_output = [on.randn(*normalized[i].shape, seed=20 + i, dtype=weights[i].dtype) for i in used]
    gradients = torch.autograd.grad([normalized[i] for i in used], weights, grad_output, allow_unused=True)
    assert all(gradient is None for i, gradient in enumerate(gradients) if i % 3 == 0)
    return [*(x.detach() for x in normalized), *(x for x in gradients if x is not None), *us, *vs]


@pytest.mark.parametrize(
    ("dtype", "iterations"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 2)], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_shape_and_layout(on: Implementation, dtype: torch.dtype, channels_last: bool, iterations: int):
    dims, weights, us, vs = problem(on, dtype, channels_last)
    ours = run(on, iterations, dims, weights, us, vs)
    in_fp64 = [[x.double() for x in tensors] for tensors in (weights, us, vs)]
    exact = run(Implementation("torch", on.device), iterations, dims, *in_fp64)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == dtype
        # The gradient of a 1×1 weight is 0, computed as the difference of two numbers near 1.
        assert (x.double() - y).norm() <= tolerance * y.norm().clamp_min(1)
    for x, w in zip(ours, weights, strict=False):
        assert x.stride() == w.stride()


@pytest.mark.parametrize(("layers", "supported"), [(256, True), (257, False)])
def test_number_of_layers_that_the_kernels_support(layers: int, supported: bool):
    weights, vectors = [torch.ones(1, 1)] * layers, [torch.ones(1)] * layers
    layers_of_ones = reference.Layers(weights, vectors, vectors, [0] * layers)
    assert spectral_norm_autograd.supported(layers_of_ones) is supported


def test_bitwise_reproducible(on: Implementation):
    arguments = problem(on, torch.float32, True)
    first = run(on, 1, *arguments)
    for _ in range(1 if on.interpreted else 20):
        assert all(map(torch.equal, first, run(on, 1, *arguments)))


def test_no_out_of_bounds_accesses(triton_on: Implementation):
    dims, weights, us, vs = problem(triton_on, torch.float32, False)
    expected = run(triton_on, 2, dims, weights, us, vs)
    with poison_allocations() as intact:
        weights, us, vs = ([x.new_empty(x.shape).copy_(x) for x in tensors] for tensors in (weights, us, vs))
        actual = run(triton_on, 2, dims, weights, us, vs)
    assert all(map(torch.equal, actual, expected))
    assert intact()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_cuda_graph():
    layers = [nn.Conv2d(8, 8, 3), nn.Linear(8, 3)]
    net = spectral_norm(Weights(layers), impl="triton")
    parameters = [p for p in net.parameters() if p.ndim > 1]

    def step() -> list[Tensor]:
        weights = net()
        return [*weights, *torch.autograd.grad([w.square().sum() for w in weights], parameters)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    state = {name: x.clone() for name, x in net.state_dict().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    net.load_state_dict(state)
    expected = [x.detach().clone() for x in step()]
    net.load_state_dict(state)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


# Limits per program: registers per thread, bytes of shared memory. A multiprocessor then fits four of 128 threads.
REGISTERS, SHARED = 128, 4096


@pytest.mark.parametrize("options", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=["some", "all"])
def test_compiled_resources(options: tuple[str, ...]):
    programs = compiled_ahead("spectral_norm", *options)
    assert {(x["kernel"], x["capability"]) for x in programs} == {
        (k, c) for k in UPDATE + GRADIENT for c in (80, 90, 100)
    }
    for program in programs:
        assert program["registers"] <= REGISTERS and program["shared"] <= SHARED, program
        assert program["spilled"] == 0, program
