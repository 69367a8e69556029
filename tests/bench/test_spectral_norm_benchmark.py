"""Tests of spectral norm's benchmark: reference, implementations, wrong results, rows, targets."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import harness
import results
import tables
import test_spectral_norm as bench  # the benchmark's own file
from dcvae_fast.models.autogan import Discriminator, Encoder
from harness import MODES, Unavailable
from test_spectral_norm import PEERS, ROWS, make_problem, reference, weights_of

BY_NAME = {row.name: row for row in ROWS}
UNCOMPILED = ("ours", "eager", "older hook")


def prepared(name, peer, mode="forward_backward"):
    return bench.prepared(BY_NAME[name].shrunk(), peer, mode)


@pytest.mark.parametrize("peer", ["eager", "older hook"])
def test_reference_is_torch_in_float64(peer):
    torch.set_default_dtype(torch.float64)
    try:
        layers, gradients = make_problem(BY_NAME["dcvae"].shrunk(), harness.DEVICE)
        network = PEERS[peer](layers)
    finally:
        torch.set_default_dtype(torch.float32)
    weights, us, vs = network.tensors()
    expected = reference(weights, us, vs, gradients, network.u_first)
    outputs = harness.make_call("forward_backward", network, weights, gradients)()
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("peer", UNCOMPILED)
@pytest.mark.parametrize("mode", MODES)
def test_implementations_are_right(name, peer, mode):
    call, check = prepared(name, peer, mode)
    errors = check(call)
    assert list(errors) == (["weight_error"] if mode == "forward" else ["weight_error", "gradient_error"])
    assert 0 < max(errors.values()) < 1e-5


@pytest.mark.parametrize("peer", ["ours compiled", "torch.compile", "older compiled"])
def test_nothing_is_compiled_on_a_cpu(peer):
    with pytest.raises(Unavailable, match="left out on a CPU"):
        prepared("dcvae", peer)


@pytest.mark.parametrize("peer", UNCOMPILED)
def test_replays_must_update_u_and_v(peer, monkeypatch):
    """Also after many updates, when u and v hardly change."""
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", lambda call, rep, quantiles: [0.5, 0.25, 1.0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    call, check = prepared("sngan", peer)
    for _ in range(100):
        outputs = call()
    monkeypatch.setattr(harness, "captured", lambda call: call)
    assert harness.graph(call, check) == {"median_us": 500, "q1_us": 250, "q3_us": 1000}
    monkeypatch.setattr(harness, "captured", lambda call: lambda: outputs)
    with pytest.raises(Unavailable, match="its weight is wrong"):
        harness.graph(call, check)


@pytest.mark.parametrize("peer", UNCOMPILED)
def test_updating_twice_in_a_call_is_wrong(peer):
    call, check = prepared("sngan", peer)
    with pytest.raises(Unavailable, match="its weight is wrong by"):
        check(lambda: (call(), call())[1])


def with_one_wrong(tensors, factor):
    return [factor * x if i == 7 else x for i, x in enumerate(tensors)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda weights, gradients: (with_one_wrong(weights, 1.001), gradients), r"its weight is wrong by 0\.100%"),
        (lambda weights, gradients: (with_one_wrong(weights, torch.nan), gradients), "its weight is wrong by nan%"),
        (lambda weights, gradients: (weights[1:], gradients), "its weight has a wrong shape"),
        (lambda weights, gradients: (weights, with_one_wrong(gradients, 1.02)), r"its gradient is wrong by 2\.000%"),
    ],
)
def test_wrong_results_are_recognised(wrong, message):
    call, check = prepared("dcvae", "eager")
    with pytest.raises(Unavailable, match=message):
        check(lambda: wrong(*call()))


def test_wrong_implementation_is_not_timed(monkeypatch):
    """An implementation that never updates u and v."""
    monkeypatch.setitem(PEERS, "eager", lambda layers: bench.eager(layers).eval())
    row = replace(BY_NAME["dcvae"].shrunk(), name="never updated")
    with pytest.raises(Unavailable, match="its weight is wrong"):
        bench.measure({}, None, row, "eager", "forward")


def test_dcvae_is_the_real_networks():
    parameters = nn.ModuleList([Encoder(), Discriminator()]).named_parameters()
    shapes = [x.shape for name, x in parameters if name.endswith(".parametrizations.weight.original")]
    assert [weight.shape for weight in weights_of(BY_NAME["dcvae"].layers())] == shapes
    assert len(shapes) == 23


def test_sizes_of_rows():
    described = {name: row.description() for name, row in BY_NAME.items()}
    assert [(row["layers"], row["elements"], row["largest"]) for row in described.values()] == [
        (23, 2_139_664, [128, 1152]),
        (18, 29_010_816, [1024, 9216]),
        (22, 28_857_728, [512, 8192]),
    ]
    assert described["dcvae"]["floors"] == {
        "forward": {"bytes": 3 * 4 * 2_139_664},
        "forward_backward": {"bytes": 7 * 4 * 2_139_664},
    }


@pytest.mark.multiprocess
def test_rows_need_no_optional_package():
    absent = ["yaml", "safetensors", "numpy", "PIL", "jsonargparse", "huggingface_hub", "torchvision"]
    paths = [str(results.ROOT / folder) for folder in (".", "kernels", "bench")]
    code = f"import sys; sys.path[:0] = {paths}; sys.modules |= dict.fromkeys({absent}); import test_spectral_norm"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_targets(make_document):
    both = "forward_backward"
    times = {
        ("dcvae", "ours", both): (200.0, 40.0),
        ("dcvae", "eager", both): (3000.0, 500.0),
        ("dcvae", "torch.compile", both): (590.0, 60.0),
        ("dcvae", "ours compiled", both): (300.0, 30.0),
        ("dcvae", "ours", "forward"): (90.0, 16.0),
        ("sngan", "ours", "forward"): (1.0, 1.0),
    }
    targets = {row.name: row.targets for row in ROWS}
    # 3 · 4 · 2,139,664 bytes at 2500 GB/s take 10.27 µs.
    entries = results.target_entries(make_document(bench.BENCHMARK, times, {"copy": 2500.0}), targets)
    assert [(x["row"], x["what"], x["required"], x["measured"], x["against"], x["met"]) for x in entries] == [
        ("dcvae", "times faster than eager, called from Python", 10, 15.0, "eager", True),
        ("dcvae", "times faster than torch.compile, called from Python", 3, 2.95, "torch.compile", False),
        ("dcvae", "times faster than torch.compile, compiled too, replayed", 1.3, 2.0, "torch.compile", True),
        ("dcvae", "share of the measured copy rate, forward, replayed", 0.5, 0.642, None, True),
    ]
    entries = results.target_entries(make_document(bench.BENCHMARK, {}), targets)
    assert all(entry["measured"] is entry["met"] is None for entry in entries)


def test_table(make_document):
    times = {"ours": (210, 40), "eager": (2900, 500), "older hook": (2500, 450), "torch.compile": (900, None)}
    times["ours compiled"] = (190, 35)  # not among the others
    times = {("dcvae", peer, "forward_backward"): medians for peer, medians in times.items()}
    document = make_document(bench.BENCHMARK, times, {"copy": 2500.0})
    cells = results.cells_of(document["rows"][0])
    cells["ours"].update(peak_bytes=2e7, launches=5)
    cells["eager"].update(peak_bytes=4e7, launches=391)
    # 7 · 4 · 2,139,664 bytes at 2500 GB/s take 23.96 µs, 59.9% of 40.
    assert tables.tables({**document, "targets": []}).splitlines()[2::2] == [
        "|  | ours | eager | `torch.compile` | fastest other | memory, ours / eager | launches, ours / eager | floor "
        "| copy rate |",
        "| dcvae: 23 layers, 2.14 M weights, the largest 128×1152, float32 | 210 / 40 | 2,900 / 500 | 900 / – "
        "| 2,500 / 450 (older hook) | 20 MB / 40 MB | 5 / 391 | 24 | 60% |",
    ]
