"""Spectral norm's benchmark judges right: the reference, the implementations, wrong ones, the rows, the targets."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import harness
import records
import spectral_norm_peers as peers
import suite
import test_spectral_norm  # the benchmark's own file
from dcvae_fast.models.autogan import Discriminator, Encoder
from harness import MODES, Unavailable
from spectral_norm_cases import ROWS, errors, make_problem, reference, weights_of
from spectral_norm_targets import targets

CPU = torch.device("cpu")
BY_NAME = {row.name: row for row in ROWS}
UNCOMPILED = ("ours", "eager", "older hook")


def prepared(name, peer, dtype=torch.float32):
    problem = make_problem(BY_NAME[name].shrunk(), CPU)
    layers = [layer.to(dtype) for layer in problem.layers]
    return peers.PEERS[peer](layers), [gradient.to(dtype) for gradient in problem.gradients]


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("peer", ["eager", "older hook"])
def test_reference_is_what_torch_computes_in_float64(peer, updates):
    network, gradients = prepared("dcvae", peer, torch.float64)
    weights, us, vs = network.tensors()
    before = [u.clone() for u in us], [v.clone() for v in vs]
    normalized = [network() for _ in range(updates)][-1]
    found = normalized, torch.autograd.grad(normalized, weights, gradients)
    expected = reference(weights, *before, gradients, updates, network.u_first)
    torch.testing.assert_close([list(x) for x in found], [list(x) for x in expected], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("peer", UNCOMPILED)
@pytest.mark.parametrize("mode", MODES)
def test_implementations_are_right(name, peer, mode):
    network, gradients = prepared(name, peer)
    found = test_spectral_norm.checked(network, gradients, test_spectral_norm.caller(network, gradients, mode), 1)
    assert list(found) == (["weight_error"] if mode == "forward" else ["weight_error", "gradient_error"])
    assert 0 < max(found.values()) < 1e-5


@pytest.mark.parametrize("peer", ["torch.compile", "older compiled"])
def test_nothing_is_compiled_on_a_cpu(peer):
    with pytest.raises(Unavailable, match="left out on a CPU"):
        prepared("dcvae", peer)


@pytest.mark.parametrize("peer", UNCOMPILED)
def test_replays_are_checked_as_the_updates_they_hold(peer, monkeypatch):
    """A stand-in for CUDA graphs: what it replays is as many calls."""

    def captured(call):
        result = ([], [])

        def replay():
            for _ in range(harness.CALLS_PER_GRAPH):
                outputs = call()
            for kept, some in zip(result, outputs, strict=True):
                kept[:] = some

        return replay, result

    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(harness, "measure", lambda benchmark, call, calls: calls)
    row = BY_NAME["sngan"].shrunk()
    assert test_spectral_norm.measure(row, peer, "forward_backward", "graph", None) == {"graph": 10}


@pytest.mark.parametrize("peer", UNCOMPILED)
def test_updating_twice_in_a_call_is_wrong(peer):
    network, gradients = prepared("sngan", peer)
    call = test_spectral_norm.caller(network, gradients, "forward")
    with pytest.raises(Unavailable, match="its weights are wrong by"):
        test_spectral_norm.checked(network, gradients, lambda: (call(), call())[1], 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda weights, gradients: ([1.001 * w for w in weights], gradients), r"its weights are wrong by 0\.100%"),
        (lambda weights, gradients: ([torch.nan * w for w in weights], gradients), "its weights are wrong by nan%"),
        (lambda weights, gradients: (weights[1:], gradients), "its weights are not of the layers' shapes"),
        (lambda weights, gradients: (weights, [1.02 * g for g in gradients]), r"its gradients are wrong by 2\.000%"),
    ],
)
def test_wrong_implementation_is_told_from_right(wrong, message):
    network, gradients = prepared("dcvae", "eager")
    call = test_spectral_norm.caller(network, gradients, "forward_backward")
    with pytest.raises(Unavailable, match=message):
        test_spectral_norm.checked(network, gradients, lambda: wrong(*call()), 1)


def test_one_wrong_layer_is_enough():
    network, gradients = prepared("dcvae", "eager")
    expected = reference(*network.tensors(), gradients, 1, True)
    errors((expected[0], []), expected)
    expected[1][7] *= 1.001
    with pytest.raises(Unavailable, match=r"its gradients are wrong by 0\.1"):
        errors((expected[0], [x if i != 7 else x / 1.001 for i, x in enumerate(expected[1])]), expected)


def test_wrong_implementation_is_not_timed(monkeypatch):
    """One that never updates u and v."""
    monkeypatch.setitem(peers.PEERS, "eager", lambda layers: peers.eager(layers).eval())
    row = replace(BY_NAME["dcvae"].shrunk(), name="never updated")
    with pytest.raises(Unavailable, match="its weights are wrong"):
        test_spectral_norm.measure(row, "eager", "forward", "wall", benchmark=None)


def test_dcvae_is_the_real_networks():
    wrapped = nn.ModuleList([Encoder(), Discriminator()])
    parameters = wrapped.named_parameters()
    shapes = [x.shape for name, x in parameters if name.endswith(".parametrizations.weight.original")]
    assert [weight.shape for weight in weights_of(BY_NAME["dcvae"].layers())] == shapes
    assert len(shapes) == 23


def test_rows_are_those_announced():
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
def test_a_bare_machine_has_what_the_rows_need():
    absent = ["yaml", "safetensors", "numpy", "PIL", "jsonargparse", "huggingface_hub", "torchvision"]
    paths = [str(records.ROOT / folder) for folder in (".", "kernels", "bench")]
    code = f"import sys; sys.path[:0] = {paths}; sys.modules |= dict.fromkeys({absent}); import spectral_norm_cases"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_what_the_targets_need_comes_first():
    cases = list(test_spectral_norm.CASES)
    assert len(cases) == len(set(cases)) == len(ROWS) * len(peers.PEERS) * len(MODES) * len(suite.TIMINGS)
    assert [peer for _, peer, _, _ in cases][: len(cases) // 5] == ["ours"] * (len(cases) // 5)
    compiled = next(case for case in cases if case[1] == "torch.compile")
    assert (compiled[0].name, compiled[2]) == ("dcvae", "forward_backward")


def measured(times):
    """A document in which `times` gives wall and graph medians in µs by row, implementation and mode."""
    rows = []
    for row in ROWS:
        cells = []
        for peer in peers.PEERS:
            for mode in MODES:
                wall, graph = times.get((row.name, peer, mode), (None, None))
                medians = {"wall": wall and {"median_us": wall}, "graph": graph and {"median_us": graph}}
                cells.append({"peer": peer, "mode": mode, **medians})
        rows.append({**row.description(), "cells": cells})
    return {"rehearsal": False, "device_rates": {"copy": 2500.0}, "rows": rows}


def test_targets():
    both = "forward_backward"
    times = {
        ("dcvae", "ours", both): (200.0, 40.0),
        ("dcvae", "eager", both): (3000.0, 500.0),
        ("dcvae", "torch.compile", both): (590.0, 60.0),
        ("dcvae", "ours", "forward"): (90.0, 16.0),
        ("sngan", "ours", "forward"): (1.0, 1.0),
    }
    # 3 · 4 · 2,139,664 bytes at 2500 GB/s take 10.27 µs.
    assert targets(measured(times)) == [
        entry("times faster than eager, called from Python", 10, 15.0, "eager", True),
        entry("times faster than torch.compile, called from Python", 3, 2.95, "torch.compile", False),
        entry("share of the measured copy rate, forward, replayed", 0.5, 0.642, None, True),
    ]
    document = {**measured({}), "device_rates": None}
    assert all(target["measured"] is target["met"] is None for target in targets(document))


def entry(what, required, value, against, met):
    return {"row": "dcvae", "what": what, "required": required, "measured": value, "against": against, "met": met}
