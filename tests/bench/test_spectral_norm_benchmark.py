"""Tests of spectral norm's benchmark: reference, implementations, wrong results, rows, targets."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import harness
import results
import test_spectral_norm as bench  # the benchmark's own file
from dcvae_fast.models.autogan import Discriminator, Encoder
from harness import MODES, Unavailable
from test_spectral_norm import PEERS, ROWS, checked, errors, make_call, reference, weights_of

BY_NAME = {row.name: row for row in ROWS}
UNCOMPILED = ("ours", "eager", "older hook")


def prepared(name, peer):
    return bench.prepared(BY_NAME[name].shrunk(), peer)


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("peer", ["eager", "older hook"])
def test_reference_is_torch_in_float64(peer, updates):
    torch.set_default_dtype(torch.float64)
    try:
        network, gradients = prepared("dcvae", peer)
    finally:
        torch.set_default_dtype(torch.float32)
    weights, us, vs = network.tensors()
    before = [u.clone() for u in us], [v.clone() for v in vs]
    normalized = [network() for _ in range(updates)][-1]
    outputs = normalized, torch.autograd.grad(normalized, weights, gradients)
    expected = reference(weights, *before, gradients, updates, network.u_first)
    torch.testing.assert_close([list(x) for x in outputs], [list(x) for x in expected], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("peer", UNCOMPILED)
@pytest.mark.parametrize("mode", MODES)
def test_implementations_are_right(name, peer, mode):
    network, gradients = prepared(name, peer)
    result = checked(network, gradients, make_call(network, gradients, mode), 1)
    assert list(result) == (["weight_error"] if mode == "forward" else ["weight_error", "gradient_error"])
    assert 0 < max(result.values()) < 1e-5


@pytest.mark.parametrize("peer", ["torch.compile", "older compiled"])
def test_nothing_is_compiled_on_a_cpu(peer):
    with pytest.raises(Unavailable, match="left out on a CPU"):
        prepared("dcvae", peer)


@pytest.mark.parametrize("peer", UNCOMPILED)
def test_replays_are_compared_with_the_u_and_v_they_leave(peer, monkeypatch):
    """A function with do_bench_cudagraph's arguments makes many updates, and does not say how many."""

    def replay(call, rep, quantiles):
        for _ in range(17):
            call()
        return [0.5, 0.25, 1.0]

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", replay)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    network, gradients = prepared("sngan", peer)
    call = make_call(network, gradients, "forward_backward")

    def check(run, updates):
        return checked(network, gradients, run, updates)

    assert harness.graph(call, check) == {"median_us": 500, "q1_us": 250, "q3_us": 1000}
    with pytest.raises(Unavailable, match="its weights are wrong"):
        harness.graph(lambda: ([1.001 * x for x in call()[0]], []), check)


@pytest.mark.parametrize("peer", UNCOMPILED)
def test_updating_twice_in_a_call_is_wrong(peer):
    network, gradients = prepared("sngan", peer)
    call = make_call(network, gradients, "forward")
    with pytest.raises(Unavailable, match="its weights are wrong by"):
        checked(network, gradients, lambda: (call(), call())[1], 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda weights, gradients: ([1.001 * w for w in weights], gradients), r"its weights are wrong by 0\.100%"),
        (lambda weights, gradients: ([torch.nan * w for w in weights], gradients), "its weights are wrong by nan%"),
        (lambda weights, gradients: (weights[1:], gradients), "its weights are not of the layers' shapes"),
        (lambda weights, gradients: (weights, [1.02 * g for g in gradients]), r"its gradients are wrong by 2\.000%"),
    ],
)
def test_wrong_results_are_recognised(wrong, message):
    network, gradients = prepared("dcvae", "eager")
    call = make_call(network, gradients, "forward_backward")
    with pytest.raises(Unavailable, match=message):
        checked(network, gradients, lambda: wrong(*call()), 1)


def test_one_wrong_layer_is_enough():
    network, gradients = prepared("dcvae", "eager")
    expected = reference(*network.tensors(), gradients, 1, True)
    errors((expected[0], []), expected)
    wrong = [1.001 * x if i == 7 else x for i, x in enumerate(expected[1])]
    with pytest.raises(Unavailable, match=r"its gradients are wrong by 0\.1"):
        errors((expected[0], wrong), expected)


def test_wrong_implementation_is_not_timed(monkeypatch):
    """An implementation that never updates u and v."""
    monkeypatch.setitem(PEERS, "eager", lambda layers: bench.eager(layers).eval())
    row = replace(BY_NAME["dcvae"].shrunk(), name="never updated")
    with pytest.raises(Unavailable, match="its weights are wrong"):
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


def document(times, rates):
    """A document in which `times` gives wall and graph medians in µs by row, implementation and mode."""
    rows = []
    for row in ROWS:
        cells = []
        for peer, mode in ((peer, mode) for peer in PEERS for mode in MODES):
            wall, graph = (x and {"median_us": x} for x in times.get((row.name, peer, mode), (None, None)))
            cells.append(
                {"peer": peer, "mode": mode, "wall": wall, "graph": graph, "reason": None, "graph_reason": None}
            )
        rows.append({**row.description(), "cells": cells})
    return {"rehearsal": False, "device_rates": rates, "rows": rows}


def test_targets():
    both = "forward_backward"
    times = {
        ("dcvae", "ours", both): (200.0, 40.0),
        ("dcvae", "eager", both): (3000.0, 500.0),
        ("dcvae", "torch.compile", both): (590.0, 60.0),
        ("dcvae", "ours", "forward"): (90.0, 16.0),
        ("sngan", "ours", "forward"): (1.0, 1.0),
    }
    targets = {row.name: row.targets for row in ROWS}
    # 3 · 4 · 2,139,664 bytes at 2500 GB/s take 10.27 µs.
    entries = results.target_entries(document(times, {"copy": 2500.0}), targets)
    assert [(x["row"], x["what"], x["required"], x["measured"], x["against"], x["met"]) for x in entries] == [
        ("dcvae", "times faster than eager, called from Python", 10, 15.0, "eager", True),
        ("dcvae", "times faster than torch.compile, called from Python", 3, 2.95, "torch.compile", False),
        ("dcvae", "share of the measured copy rate, forward, replayed", 0.5, 0.642, None, True),
    ]
    entries = results.target_entries(document({}, None), targets)
    assert all(entry["measured"] is entry["met"] is None for entry in entries)
