"""Tests of InfoNCE's benchmark: reference, implementations, wrong results, rows, targets."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import results
import test_info_nce as bench  # the benchmark's own file
from harness import MODES, Unavailable
from test_info_nce import PEERS, ROWS, TEMPERATURE, errors, make_problem, reference

CPU = torch.device("cpu")
BY_NAME = {row.name: row for row in ROWS}


def small(name):
    return make_problem(replace(BY_NAME[name], batch=64, queue=BY_NAME[name].queue and 200), CPU)


def outputs_of(problem, loss):
    return bench.make_call(problem, loss, "forward_backward")()


@pytest.mark.parametrize("name", BY_NAME)
def test_reference_in_chunks_is_the_definition(name):
    problem = small(name)
    q, k = (x.detach().double().requires_grad_() for x in (problem.q, problem.k))
    queue = None if problem.queue is None else problem.queue.double()
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if queue is None:
        probabilities = (unit_q @ unit_k.mT / TEMPERATURE).softmax(-1).diagonal()
    else:
        scores = torch.cat([(unit_q * unit_k).sum(-1, keepdim=True), unit_q @ queue.mT], -1)
        probabilities = (scores / TEMPERATURE).softmax(-1)[..., 0]
    loss = -probabilities.log().mean()
    if problem.row.symmetric:
        columns = (unit_k @ unit_q.mT / TEMPERATURE).softmax(-1).diagonal()
        loss = (loss - columns.log().mean()) / 2
    expected = loss, *torch.autograd.grad(loss, (q,) if problem.row.queue else (q, k))
    for output, exact in zip(reference(problem, chunk=25), expected, strict=True):
        torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("peer", ["ours", "eager", "attention", "info-nce-pytorch", "open_clip style"])
def test_implementations_are_right_or_say_why_not(name, peer):
    problem = small(name)
    try:
        outputs = outputs_of(problem, PEERS[peer](problem))
    except Unavailable as reason:
        assert str(reason) in (
            "it has no queue",
            "it compares in one direction only",
            "info-nce-pytorch is not installed",
            "attention's output gives the gradient in q only, and this row asks for k's too",
        )
        return
    errors(problem.row, outputs, reference(problem))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("formulation", bench.FORMULATIONS)
def test_both_formulations_in_plain_pytorch_are_right(name, formulation):
    problem = small(name)
    arguments = problem.q, problem.k, problem.queue, problem.row.symmetric
    errors(problem.row, outputs_of(problem, lambda: formulation(*arguments)), reference(problem))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda loss: 1.01 * loss, "its loss is 3.66633, which should be 3.63003"),
        (lambda loss: loss * torch.nan, "its loss is nan, which should be"),
        (lambda loss: loss.detach() + 1.02 * (loss - loss.detach()), r"its gradient is wrong by 2\.0%"),
        (lambda loss: loss[None], r"its loss is of shape \[1\], not a number"),
    ],
)
def test_wrong_results_are_recognised(wrong, message):
    problem = small("dcvae")
    loss = wrong(PEERS["eager"](problem)())
    outputs = loss, *torch.autograd.grad(loss.sum(), problem.inputs)
    with pytest.raises(Unavailable, match=message):
        errors(problem.row, outputs, reference(problem))


def test_wrong_implementation_is_not_timed(monkeypatch):
    row = small("dcvae").row
    monkeypatch.setitem(PEERS, "eager", lambda problem: lambda: 1.01 * bench.ours(problem)())
    with pytest.raises(Unavailable, match="its loss is"):
        bench.measure({}, None, row, "eager", "forward")


def test_bytes_and_flops_of_rows():
    assert BY_NAME["dcvae"].floor("forward_backward")["flops"] == 132_644_864
    assert BY_NAME["large"].floor("forward") == {
        "bytes": (2 * 4096 + 65536) * 128 * 2,
        "flops": 2 * 4096 * 65536 * 128,
    }
    assert BY_NAME["clip"].floor("forward_backward")["flops"] == 3 * 2 * 32768**2 * 512


def document(times, peak=None):
    """A document in which `times` gives wall and graph medians in µs by row and implementation."""
    rows = []
    for row in ROWS:
        cells = []
        for peer in PEERS:
            medians = [x and {"median_us": x} for x in times.get((row.name, peer), (None, None))]
            cell = {"peer": peer, "wall": medians[0], "graph": medians[1], "reason": None, "graph_reason": None}
            cell["peak_bytes"] = (peak or {}).get((row.name, peer))
            cells += [{**cell, "mode": mode} for mode in MODES]
        rows.append({**row.description(), "cells": cells})
    return {"rehearsal": False, "device_rates": {"bfloat16": 600.0}, "rows": rows}


def verdicts(document):
    entries = results.target_entries(document, {row.name: row.targets for row in ROWS})
    return {(t["row"], t["what"].split(",")[0]): (t["measured"], t["against"], t["met"]) for t in entries}


def test_targets_compare_with_the_best_of_the_others():
    times = {
        ("dcvae", "ours"): (20.0, 4.0),
        ("dcvae", "eager"): (200.0, 60.0),
        ("dcvae", "lightly"): (19.0, None),  # cannot be captured, so it competes with its time from Python
        ("large", "ours"): (500.0, 400.0),
        ("large", "attention"): (640.0, 600.0),
        ("clip", "ours"): (10.0, 10.0),
        ("clip", "inf_cl"): (29.0, None),
    }
    entries = verdicts(document(times, {("large", "ours"): 1000, ("large", "eager"): 99_000}))
    assert entries["dcvae", "times faster than the fastest other"] == (4.75, "lightly", False)
    assert entries["dcvae", "times faster than eager"] == (10.0, "eager", True)
    assert entries["large", "times faster than the fastest other"] == (1.5, "attention", True)
    # 2 · 2 · 4096 · 65536 · 128 FLOP in 400 µs
    assert entries["large", "share of the measured bfloat16 matrix rate"] == (0.573, None, True)
    assert entries["large", "times less extra memory than eager"] == (99.0, "eager", False)
    assert entries["clip", "times faster than inf_cl"] == (2.9, "inf_cl", False)
    assert entries["moco-fp32", "times faster than the fastest other"] == (None, None, None)
    assert len(entries) == 10


@pytest.mark.parametrize("key", ["reason", "graph_reason"])
@pytest.mark.parametrize("reason", ["no time left", "not run"])
def test_a_target_needs_all_competitors_measured(key, reason):
    partial = document({("dcvae", "ours"): (20.0, 4.0), ("dcvae", "lightly"): (99.0, None)})
    next(cell for cell in partial["rows"][0]["cells"][::-1] if cell["peer"] == "inf_cl")[key] = reason
    assert verdicts(partial)["dcvae", "times faster than the fastest other"] == (None, None, None)
