"""Tests of InfoNCE's benchmark: reference, implementations, wrong results, rows, targets."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import results
import test_info_nce as bench  # the benchmark's own file
from harness import Unavailable
from test_info_nce import PEERS, ROWS, TEMPERATURE, errors, make_problem, reference

CPU = torch.device("cpu")
BY_NAME = {row.name: row for row in ROWS}


def small(name):
    return make_problem(replace(BY_NAME[name], batch=64, queue=BY_NAME[name].queue and 200), CPU)


def outputs_of(problem, loss):
    return bench.call_of(problem, loss, "forward_backward")()


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
    expected = [loss], list(torch.autograd.grad(loss, (q,) if problem.row.queue else (q, k)))
    torch.testing.assert_close(reference(problem, chunk=25), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("peer", ["ours", "attention", "info-nce-pytorch", "open_clip style"])
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


def test_wrong_implementation_is_not_timed(monkeypatch):
    row = small("dcvae").row
    monkeypatch.setitem(PEERS, "eager", lambda problem: lambda: 1.01 * bench.ours(problem)())
    with pytest.raises(Unavailable, match=r"its loss is wrong by 1\.0"):
        bench.measure({}, None, row, "eager", "forward")


def test_bytes_and_flops_of_rows():
    dcvae, large, clip = (BY_NAME[name] for name in ("dcvae", "large", "clip"))
    assert dcvae.floor("forward_backward")["flops"] == 132_644_864
    # q, k and the queue; backward also dq and a second product.
    assert large.floor("forward") == {"bytes": (2 * 4096 + 65536) * 128 * 2, "flops": 2 * 4096 * 65536 * 128}
    assert large.floor("forward_backward") == {
        "bytes": (3 * 4096 + 65536) * 128 * 2,
        "flops": 2 * 2 * 4096 * 65536 * 128,
    }
    # Without a queue dk too, and a third product.
    assert clip.floor("forward_backward") == {"bytes": 4 * 32768 * 512 * 2, "flops": 3 * 2 * 32768**2 * 512}


def verdicts(document):
    entries = results.target_entries(document, {row.name: row.targets for row in ROWS})
    return {(t["row"], t["what"].split(",")[0]): (t["measured"], t["against"], t["met"]) for t in entries}


def test_targets_compare_with_the_best_of_the_others(make_document):
    times = {
        ("dcvae", "ours"): (20.0, 4.0),
        ("dcvae", "eager"): (200.0, 60.0),
        ("dcvae", "lightly"): (19.0, None),  # cannot be captured, so it competes with its time from Python
        ("large", "ours"): (500.0, 400.0),
        ("large", "attention"): (640.0, 600.0),
        ("clip", "ours"): (10.0, 10.0),
        ("clip", "torch.compile"): (9.0, None),
    }
    document = make_document(bench.BENCHMARK, times, {"bfloat16": 600.0})
    large = results.cells_of(document["rows"][2])
    large["ours"]["peak_bytes"], large["eager"]["peak_bytes"] = 1000, 99_000
    entries = verdicts(document)
    assert entries["dcvae", "times faster than the fastest other"] == (4.75, "lightly", False)
    assert entries["dcvae", "times faster than eager"] == (10.0, "eager", True)
    assert entries["large", "times faster than the fastest other"] == (1.5, "attention", True)
    # 2 · 2 · 4096 · 65536 · 128 FLOP in 400 µs
    assert entries["large", "share of the measured bfloat16 matrix rate"] == (0.573, None, True)
    assert entries["large", "times less extra memory than eager"] == (99.0, "eager", False)
    assert entries["clip", "times faster than the fastest other"] == (0.9, "torch.compile", False)
    assert entries["moco-fp32", "times faster than the fastest other"] == (None, None, None)
    assert len(entries) == 12


@pytest.mark.parametrize("key", ["reason", "graph_reason"])
@pytest.mark.parametrize("reason", ["no time left", "not run"])
def test_a_target_needs_all_competitors_measured(make_document, key, reason):
    partial = make_document(bench.BENCHMARK, {("dcvae", "ours"): (20.0, 4.0), ("dcvae", "lightly"): (99.0, None)})
    results.cells_of(partial["rows"][0])["inf_cl"][key] = reason
    assert verdicts(partial)["dcvae", "times faster than the fastest other"] == (None, None, None)
