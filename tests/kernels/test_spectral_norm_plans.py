"""Plans and counters of the Triton kernels of spectral norm: reuse, streams, CUDA graphs, changed weights."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import Implementation, Weights, poison_allocations
from dcvae_kernels import reference, spectral_norm, spectral_norm_autograd

kernels = pytest.importorskip("dcvae_kernels.triton.spectral_norm")


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    plans: dict[Any, Any] = {}
    monkeypatch.setattr(kernels, "_PLANS", plans)
    return plans


def layers_of(*weights: Tensor) -> reference.Layers:
    us, vs = ([F.normalize(torch.ones(w.flatten(1).shape[i]), dim=0) for w in weights] for i in (0, 1))
    return reference.Layers(weights, us, vs, [0] * len(weights))


# Counters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_power_iterations", [1, 3])
def test_counters_are_zero_after_updates(
    triton_on: Implementation, plans: dict[Any, Any], n_power_iterations: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "GROUP", 2)
    monkeypatch.setattr(kernels, "_LAYOUTS", {})
    layers = layers_of(triton_on.randn(35, 3), triton_on.randn(3, 2))
    for _ in range(3):
        spectral_norm_autograd.normalized_weights(layers, n_power_iterations, 1e-12, "triton")
        ((_, plan),) = plans.items()
        (counters,) = plan.counters.values()
        assert counters.numel() >= 2 + 3 + 1  # layers, and groups of each layer
        assert not counters.any()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """State of a CUDA device as `_counters` reads it: the current stream, and whether it is captured."""
    state = SimpleNamespace(stream=0, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def on_cuda(plan: Any) -> Any:
    """Return a copy of the plan whose addresses report a CUDA device."""
    addresses: Any = SimpleNamespace(device=torch.device("cuda", 0), new_zeros=plan.addresses.new_zeros)
    return replace(plan, addresses=addresses)


def test_counters_of_streams(cuda: SimpleNamespace):
    plan = on_cuda(kernels.find_plan(layers_of(torch.ones(3, 2))))
    counters = {}
    for cuda.stream in (7, 8, 7, 0, 8):
        expected = counters.setdefault(cuda.stream, kernels._counters(plan))
        assert kernels._counters(plan) is expected and not expected.any()
    assert len({x.data_ptr() for x in counters.values()}) == 3


def test_counters_of_captured_launches(cuda: SimpleNamespace):
    plan = on_cuda(kernels.find_plan(layers_of(torch.ones(3, 2))))
    counters = [kernels._counters(plan)]
    cuda.capturing = True
    counters += [kernels._counters(plan) for _ in range(kernels.SPARE_COUNTERS + 3)]
    cuda.capturing = False
    assert kernels._counters(plan) is counters[0]
    assert len({x.data_ptr() for x in counters}) == len(counters)
    for i, x in enumerate(counters):
        assert x.dtype == torch.int32 and x.shape == counters[0].shape and x.data_ptr() % 16 == 0
        assert not x.any()
        x.fill_(i + 1)
    assert all((x == i + 1).all() for i, x in enumerate(counters))  # they do not overlap


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supported", [True, False])
def test_number_of_plans_is_bounded(plans: dict[Any, Any], supported: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MAX_PLANS", 3)
    dtype = torch.float32 if supported else torch.float64
    layers = [layers_of(torch.ones(3, 2, dtype=dtype)) for _ in range(8)]
    for x in layers:
        assert (kernels.find_plan(x) is not None) is supported
        assert len(plans) <= 3
    assert kernels.find_plan(layers[-1]) is [*plans.values()][-1]


def test_plans_of_captured_graphs_are_not_forgotten(
    plans: dict[Any, Any], cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "MAX_PLANS", 3)
    layers = [layers_of(torch.ones(3, 2)) for _ in range(12)]
    captured = []
    for i, x in enumerate(layers[:6]):
        plan = kernels.find_plan(x)
        cuda.capturing = i % 2 == 1
        kernels._counters(on_cuda(plan))
        if cuda.capturing:
            captured.append(plan)
    for x in layers[6:]:
        kernels.find_plan(x)
    assert all(any(plan is x for x in plans.values()) for plan in captured)
    assert len(plans) <= len(captured) + 1


BASE = (6, 4, 2, 2)
CHANNELS_LAST = (16, 1, 8, 4)


def same_addresses(**options: Any) -> Callable[[list[Tensor]], tuple[Any, ...]]:
    """Return a function that makes W, u, v and dim at the beginning of three buffers."""
    shape, stride, dim, dtype = ({"shape": BASE, "stride": None, "dim": 0, "dtype": torch.float32} | options).values()

    def make(buffers: list[Tensor]) -> tuple[Any, ...]:
        size = torch.Size(shape).numel()
        w, u, v = (x.view(dtype) for x in buffers)
        w = w[:size].view(shape) if stride is None else w[:size].as_strided(shape, stride)
        return w, u[: shape[dim]], v[: size // shape[dim]], dim

    return make


def moved(index: int) -> Callable[[list[Tensor]], tuple[Any, ...]]:
    def make(buffers: list[Tensor]) -> tuple[Any, ...]:
        return same_addresses()([x.clone() if i == index else x for i, x in enumerate(buffers)])

    return make


CHANGES = {
    "W moved": moved(0),
    "u moved": moved(1),
    "v moved": moved(2),
    "strides": same_addresses(stride=CHANNELS_LAST),
    "dim": same_addresses(dim=1),
    "fewer rows": same_addresses(shape=(5, 4, 2, 2)),
    "shape": same_addresses(shape=(4, 6, 2, 2)),
    "dtype": same_addresses(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors(triton_on: Implementation, plans: dict[Any, Any], change: str):
    buffers = [triton_on.randn(128), triton_on.randn(32), triton_on.randn(32)]
    for i, make in enumerate((same_addresses(), CHANGES[change], same_addresses(), CHANGES[change])):
        *tensors, dim = make(buffers)
        for j, x in enumerate(tensors):
            x.copy_(triton_on.randn(*x.shape, seed=3 * i + j))
        layers, exact = (reference.Layers([w], [u], [v], [dim]) for w, u, v in (tensors, [x.double() for x in tensors]))
        actual = spectral_norm_autograd.normalized_weights(layers, 1, 1e-12, "triton")
        expected = reference.spectral_norm_update(exact, 1, 1e-12)
        rtol, atol = (1e-5, 1e-6) if tensors[0].dtype == torch.float32 else (2e-2, 2e-2)
        for x, y in ((actual[0], expected[0]), (tensors[1], exact.us[0]), (tensors[2], exact.vs[0])):
            torch.testing.assert_close(x.double(), y, rtol=rtol, atol=atol)
    assert len(plans) >= 2


def test_rows_of_a_parameter(triton_on: Implementation):
    """`p.data = p.data[:rows]` keeps the address."""
    net: Any = spectral_norm(nn.Linear(5, 9, bias=False), impl="triton")
    norm, p = net.parametrizations.weight[0], net.parametrizations.weight.original
    x = triton_on.randn(2, 5)
    net(x)
    p.data, norm._u = p.data[:4], norm._u[:4]
    output = net(x)
    torch.testing.assert_close(output, x @ (p / (norm._u @ p @ norm._v)).T)
    assert output.shape == (2, 4)


# Streams and CUDA graphs ----------------------------------------------------------------------------------------------


def converged(rows: int = 1024, columns: int = 256) -> Any:
    """Return a module whose u and v do not change in updates, so that concurrent updates give the same result.

    Every weight is 1. One layer has several groups of blocks.
    """
    net = Weights(nn.Linear(columns, rows), nn.Linear(64, 32))
    for p in net.parameters():
        nn.init.ones_(p)
    return spectral_norm(net, impl="triton")


def assert_converged(outputs: list[list[Tensor]]) -> None:
    for weights in outputs:
        for w in weights:
            torch.testing.assert_close(w, torch.full_like(w, w.numel() ** -0.5), rtol=1e-4, atol=0)


def test_converged(triton_on: Implementation):
    """Updates of the module that the next tests use do not change its weights."""
    net = converged(16, 8) if triton_on.interpreted else converged()
    assert_converged([[w.detach() for w in net()] for _ in range(3)])


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("copies", [1, 2])
def test_two_streams(plans: dict[Any, Any], copies: int):
    nets = [converged() for _ in range(copies)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for net in nets:
        net()
    torch.cuda.synchronize()
    outputs = []
    with poison_allocations(), torch.no_grad():  # results of earlier updates are not in memory
        for _ in range(50):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    outputs.append(nets[i % copies]())
        torch.cuda.synchronize()
    assert_converged(outputs)
    for plan in plans.values():
        assert not any(counters.any() for counters in plan.counters.values())


def captured(net: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        weights = net()
    return graph, weights


def warm_up(net: Any) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        net()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_graphs_replayed_in_turn():
    net = spectral_norm(Weights(nn.Linear(8, 300), nn.Conv2d(8, 8, 3)), impl="triton")
    warm_up(net)
    graphs = [captured(net) for _ in range(2)]
    state = {name: x.clone() for name, x in net.state_dict().items()}
    expected = [[w.detach().clone() for w in net()] for _ in range(6)]
    net.load_state_dict(state)
    for i, weights in enumerate(expected):
        graph, outputs = graphs[i % 2]
        graph.replay()
        assert all(map(torch.equal, outputs, weights))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("copies", [1, 2])
def test_graphs_replayed_on_two_streams(copies: int):
    nets = [converged() for _ in range(copies)]
    for net in nets:
        warm_up(net)
    with poison_allocations():  # also at each replay
        graphs = [captured(nets[i % copies]) for i in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert_converged([outputs for _, outputs in graphs])
