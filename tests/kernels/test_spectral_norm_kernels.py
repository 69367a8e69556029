"""Triton kernels of spectral norm: launches, shapes and layouts, magnitudes, determinism, out-of-bounds accesses, and
compiled resources on several GPU architectures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import (
    Implementation,
    Weights,
    compiled_ahead,
    device_kernels,
    leaves,
    poison_allocations,
    record_launches,
)
from dcvae_kernels import reference, spectral_norm, spectral_norm_autograd

kernels = pytest.importorskip("dcvae_kernels.triton.spectral_norm")

UPDATE, GRADIENT = ["iterate_kernel", "divide_kernel"], ["inner_kernel", "gradient_kernel"]


@pytest.mark.parametrize(("layers", "n_power_iterations"), [(1, 1), (1, 3), (100, 1)])
def test_launches_do_not_depend_on_the_number_of_layers(
    triton_on: Implementation, layers: int, n_power_iterations: int
):
    layers = min(layers, 20) if triton_on.interpreted else layers
    net = Weights(*(nn.Linear(2 + i % 3, 1 + i % 5) if i % 2 else nn.Conv2d(1, 2, i % 3 + 1) for i in range(layers)))
    spectral_norm(net, n_power_iterations, impl="triton")
    launches = []
    with record_launches(kernels, launches):
        torch.autograd.backward([weight.square().sum() for weight in net()])
    assert launches == UPDATE[:1] * n_power_iterations + UPDATE[1:] + GRADIENT


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_only_our_kernels_are_launched():
    net = spectral_norm(Weights(*(nn.Conv2d(8, 8, 3) for _ in range(10))), impl="triton")
    grad_output = [torch.randn(8, 8, 3, 3) for _ in range(10)]
    parameters = [p for p in net.parameters() if p.ndim == 4]

    def step() -> None:
        torch.autograd.grad(net(), parameters, grad_output)

    step()
    assert [name for name in device_kernels(step) if "memset" not in name.lower()] == UPDATE + GRADIENT


# One and several blocks of rows and of columns, with and without a partial block.
Shapes = list[tuple[tuple[int, ...], int]]
SHAPES: Shapes = [
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
# Shapes for one dtype; `run` computes no gradient for every third.
FURTHER: Shapes = [
    ((3, 4, 5), 2),
    ((137, 5), 0),  # more than a group of blocks
    ((15, 273), 0),  # one element less than a block
    ((2, 3, 4, 5), 2),
    ((16, 256), 0),
    ((17, 241), 0),
    ((4, 2, 1, 1, 1), 0),
    ((2, 3, 4, 5), 3),
    ((9, 3, 2, 1, 2), 0),
    ((3, 4, 5), 1),
    ((4, 5, 3), 2),
    ((6, 9, 2, 3, 2), 1),
]
MEMORY_FORMATS: Any = {4: torch.channels_last, 5: torch.channels_last_3d}
LARGER: Shapes = [
    ((65, 259), 0),
    ((33, 70, 1, 1), 0),
    ((70, 33, 4, 4), 1),
    ((512, 512, 3, 3), 0),
    ((512, 256, 4, 4), 1),
]


def problem(on: Implementation, dtype: torch.dtype, channels_last: bool, shapes: Shapes | None = None) -> Any:
    """Return dims, weights, u and v."""
    if shapes is None:
        shapes = SHAPES if on.interpreted else [*SHAPES, *LARGER]
    weights = [on.randn(*shape, seed=i, dtype=dtype) for i, (shape, _) in enumerate(shapes)]
    dims = [dim for _, dim in shapes]
    if channels_last:
        weights = [
            w.contiguous(memory_format=MEMORY_FORMATS[w.ndim]) if w.ndim in MEMORY_FORMATS and dim < 2 else w
            for w, dim in zip(weights, dims, strict=True)
        ]
    return dims, weights, *vectors(on, weights, dims)


def vectors(on: Implementation, weights: list[Tensor], dims: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return random u and v."""
    matrices = [reference.as_matrix(w, dim) for w, dim in zip(weights, dims, strict=True)]
    us, vs = ([F.normalize(on.randn(m.shape[i], seed=9, dtype=m.dtype), dim=0) for m in matrices] for i in (0, 1))
    return us, vs


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Return ‖x − exact‖/‖exact‖ in float64."""
    x, exact = (y / exact.abs().max() for y in (x.double(), exact.double()))  # squares of small numbers underflow
    return ((x - exact).norm() / exact.norm()).item()


def run(
    on: Implementation, iterations: int, dims: Any, weights: Any, us: Any, vs: Any, *, eps: float = 1e-12
) -> list[Tensor]:
    """Return W/σ, the gradients, u and v; every third W/σ receives no gradient."""
    weights, us, vs = leaves(*weights), [u.clone() for u in us], [v.clone() for v in vs]
    normalized = spectral_norm_autograd.normalized_weights(
        reference.Layers(weights, us, vs, dims), iterations, eps, on.impl
    )
    used = [i for i in range(len(weights)) if i % 3]
    grad_output = [on.randn(*normalized[i].shape, seed=20 + i, dtype=weights[i].dtype) for i in used]
    gradients = torch.autograd.grad([normalized[i] for i in used], weights, grad_output, allow_unused=True)
    assert all(gradient is None for i, gradient in enumerate(gradients) if i % 3 == 0)
    return [*(x.detach() for x in normalized), *(x for x in gradients if x is not None), *us, *vs]


@pytest.mark.parametrize(
    ("dtype", "channels_last", "iterations"),
    [
        (torch.float32, False, 2),
        (torch.float32, True, 1),
        (torch.bfloat16, False, 1),
        (torch.bfloat16, True, 2),
        (torch.float16, True, 1),
    ],
    ids=str,
)
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


@pytest.fixture
def groups_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the number of blocks that a group has, and of groups that are added at once, to 2."""
    monkeypatch.setattr(kernels, "GROUP", 2)
    for cache in ("_PLANS", "_LAYOUTS"):
        monkeypatch.setattr(kernels, cache, {})


def assert_accurate(
    on: Implementation, iterations: int, dims: Any, weights: Any, us: Any, vs: Any, *, eps: float = 1e-12
) -> list[Tensor]:
    """Compare with the PyTorch implementation in float64. Return the results of `run`."""
    ours = run(on, iterations, dims, weights, us, vs, eps=eps)
    in_fp64 = [[x.double() for x in tensors] for tensors in (weights, us, vs)]
    exact = run(Implementation("torch", on.device), iterations, dims, *in_fp64, eps=eps)
    errors = [relative_error(x, y) for x, y in zip(ours, exact, strict=True)]
    assert all(error <= 1e-5 for error in errors), errors  # False if an error is NaN
    return ours


@pytest.mark.parametrize("channels_last", [False, True])
def test_further_shapes(on: Implementation, channels_last: bool):
    arguments = problem(on, torch.float32, channels_last, FURTHER)
    ours = assert_accurate(on, 1, *arguments)
    for x, w in zip(ours, arguments[1], strict=False):
        assert x.stride() == w.stride()


@pytest.mark.usefixtures("groups_of_two")
def test_more_groups_than_are_added_at_once(triton_on: Implementation):
    shapes: Shapes = [((3, 2), 0), ((35, 2), 0), ((8, 3), 0), ((33, 1), 0), ((17, 7), 0)]
    assert_accurate(triton_on, 2, *problem(triton_on, torch.float32, False, shapes))


def first_rows_small(weight: Tensor) -> Tensor:
    return torch.cat([1e-25 * weight[:12], weight[12:]])


def last_columns_large(weight: Tensor) -> Tensor:
    return torch.cat([weight[:, :-2], 1e18 * weight[:, -2:]], 1)


@pytest.mark.parametrize(
    ("change", "eps"),
    [
        (lambda weight: 1e-14 * weight, 1e-12),  # below eps
        (lambda weight: 1e-19 * weight, 1e-38),
        (lambda weight: 1e-30 * weight, 1e-38),
        (lambda weight: 1e18 * weight, 1e-12),
        (lambda weight: 1e36 * weight, 1e-12),
        (first_rows_small, 1e-38),
        (last_columns_large, 1e-12),
    ],
    ids=["1e-14", "1e-19", "1e-30", "1e18", "1e36", "rows", "columns"],
)
@pytest.mark.usefixtures("groups_of_two")
def test_magnitudes(triton_on: Implementation, change: Callable[[Tensor], Tensor], eps: float):
    """Squares of the weights, or products with small weights, are not representable in float32."""
    dims, weights, us, vs = problem(triton_on, torch.float32, False, [((3, 4), 0), ((13, 7), 0), ((35, 5), 0)])
    assert_accurate(triton_on, 2, dims, [change(weight) for weight in weights], us, vs, eps=eps)


@pytest.mark.usefixtures("groups_of_two")
@pytest.mark.parametrize("zero_rows", [slice(None), slice(8, 16), slice(16, 32)], ids=["all", "block", "group"])
def test_weight_times_v_is_zero(on: Implementation, zero_rows: slice):
    """v is in the null space of some rows or of all; in the latter case u remains."""
    dims, weights, us, _ = problem(on, torch.float32, False, [((3, 4), 0), ((19, 300), 0), ((35, 5), 0)])
    vs = [F.one_hot(torch.tensor(1), weight.shape[1]).to(weight) for weight in weights]
    for weight in weights:
        weight[zero_rows, 1] = 0
    *_, u0, u1, u2, v0, v1, v2 = assert_accurate(on, 1, dims, weights, us, vs)
    if zero_rows == slice(None):
        assert all(map(torch.equal, (u0, u1, u2), us))
        expected = tuple(F.normalize(w.T @ u, dim=0) for w, u in zip(weights, us, strict=True))
        torch.testing.assert_close((v0, v1, v2), expected)


@pytest.mark.usefixtures("groups_of_two")
@pytest.mark.parametrize(
    ("value", "shape"), [(torch.nan, (1, 3)), (torch.nan, (35, 5)), (torch.inf, (35, 5)), (-torch.inf, (1, 3))], ids=str
)
def test_nan_and_infinite_weights(triton_on: Implementation, value: float, shape: tuple[int, int]):
    """W/σ of the layer is NaN; its u and v, and the other layers, do not change."""
    arguments = problem(triton_on, torch.float32, False, [((3, 4), 0), (shape, 0), ((9, 5), 0)])
    _, weights, us, vs = arguments
    expected = run(triton_on, 2, *arguments)
    weights[1][-1, 2] = value
    actual = run(triton_on, 2, *arguments)
    # 3 normalised weights, the gradients of the last two, 3 u and 3 v.
    expected[6], expected[9] = us[1], vs[1]
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.isnan().any() if i in (1, 3) else torch.equal(x, y), i


FEW: Shapes = [((9, 5), 0), ((7, 3, 3, 3), 0), ((6, 4, 2, 2), 1), ((5, 8, 1, 7), 0)]


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_addresses_of_weights(triton_on: Implementation, offset: int):
    """The addresses of the weights are not multiples of 16 unless the offset is one of 4."""
    dims, weights, us, vs = problem(triton_on, torch.float32, True, FEW)
    views = [x.new_empty(x.numel() + offset)[offset:].as_strided(x.shape, x.stride()) for x in weights]
    torch._foreach_copy_(views, weights)
    results = []
    for tensors in (weights, views):
        layers = reference.Layers(tensors, [x.clone() for x in us], [x.clone() for x in vs], dims)
        plan = kernels.find_plan(layers)
        assert plan is not None and plan.aligned is (tensors is weights or offset % 4 == 0)
        normalized = spectral_norm_autograd.normalized_weights(layers, 1, 1e-12, triton_on.impl)
        results.append([*normalized, *layers.us, *layers.vs])
    assert all(map(torch.equal, *results))


def unaligned(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded(x: Tensor) -> Tensor:
    return x[:1, :1].expand_as(x)


def negative(x: Tensor) -> Tensor:
    return x.contiguous()._neg_view()


@pytest.mark.parametrize("change", [unaligned, transposed, expanded, negative])
def test_layouts_of_gradients(triton_on: Implementation, change: Callable[[Tensor], Tensor]):
    dims, weights, us, vs = problem(triton_on, torch.float32, True, FEW)
    weights = leaves(*weights)
    layers = reference.Layers(weights, us, vs, dims)
    normalized = spectral_norm_autograd.normalized_weights(layers, 1, 1e-12, triton_on.impl)
    grad_output = [change(triton_on.randn(*weight.shape)) for weight in weights]
    same_layout = [torch.empty_like(w).copy_(x) for w, x in zip(weights, grad_output, strict=True)]
    actual, expected = (
        torch.autograd.grad(normalized, weights, x, retain_graph=True) for x in (grad_output, same_layout)
    )
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(("layers", "supported"), [(256, True), (257, False)])
def test_number_of_layers_that_the_kernels_support(layers: int, supported: bool):
    weights, vectors = [torch.ones(1, 1)] * layers, [torch.ones(1)] * layers
    layers_of_ones = reference.Layers(weights, vectors, vectors, [0] * layers)
    assert spectral_norm_autograd.supported(layers_of_ones) is supported


def test_bitwise_reproducible(on: Implementation):
    arguments = problem(on, torch.float32, True)
    first = run(on, 1, *arguments)
    for _ in range(20 if on.device == "cuda" else 1):
        assert all(map(torch.equal, first, run(on, 1, *arguments)))


@pytest.mark.parametrize("shapes", [None, FURTHER[1:6]], ids=["blocks of rows", "blocks of elements"])
def test_no_out_of_bounds_accesses(triton_on: Implementation, shapes: Shapes | None):
    dims, weights, us, vs = problem(triton_on, torch.float32, False, shapes)
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
    net = spectral_norm(Weights(*layers), impl="triton")
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
