"""Tests of the benchmark of training iterations: wrong losses, memory, recipes, targets, tables."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import results
import tables
import test_step as bench  # the benchmark's own files
import test_switches as switches
from dcvae_fast.recipes import recipe_config
from dcvae_fast.training.plan import iteration_flops
from dcvae_fast.training.step import TrainStep
from harness import Absent, Unavailable
from test_step import NARROW, ROWS_ON_CPU, ROWS_ON_GPU, errors, expected_loss, flops

SMALL = [row.shrunk() for row in ROWS_ON_CPU]


def test_rows_are_the_recipes_but_for_resolution_batch_and_precision():
    for row in ROWS_ON_GPU:
        recipe, ours = recipe_config(row.recipe), row.config
        assert ours.model == replace(recipe.model, resolution=row.resolution)
        for section in ("data", "loss", "contrast", "optim", "log"):
            assert getattr(ours, section) == getattr(recipe, section), (row, section)
        sampled = None if recipe.model.grows else 2 * row.batch
        changed = {"batch": row.batch, "sampled_batch": sampled, "precision": "float32"}  # on a CPU
        assert ours.train == replace(recipe.train, **changed)
        if recipe.model.grows:
            assert ours.growth == recipe.growth


def test_iterations_are_fully_faded_in_and_have_the_planned_flops():
    faces = SMALL[1]
    assert faces.config.model.max_channels == NARROW["max_channels"]
    bench.ours(faces)  # at its resolution, or its images would not fit
    cifar = ROWS_ON_GPU[0]
    step = TrainStep(cifar.config, "meta")
    counts = flops(cifar)
    assert counts["ours"] == iteration_flops(step, bench.images(cifar, "meta"))
    assert counts["baseline"] / 1e12 == pytest.approx(2.0, abs=0.01)  # the authors'


def test_wrong_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    cifar, faces = SMALL
    good = {"loss/discriminator": torch.tensor(expected_loss(faces))}
    assert errors(faces, good) == {"loss_error": 0.0}
    with pytest.raises(Unavailable, match="its first loss is"):
        errors(faces, {"loss/discriminator": good["loss/discriminator"] + 0.1})
    assert errors(cifar, good) == {}
    monkeypatch.setattr(bench, "expected_loss", lambda row: float("nan"))
    with pytest.raises(Unavailable, match="its first loss is"):
        errors(faces, good)
    with pytest.raises(Unavailable, match="its loss is nan"):
        errors(cifar, {"loss/discriminator": torch.tensor(float("nan"))})


def test_memory_is_counted_after_the_expected_loss(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(bench, "expected_loss", lambda row: calls.append("expected_loss"))
    monkeypatch.setattr(bench.harness, "free_memory", lambda: calls.append("free_memory"))
    monkeypatch.setattr(bench, "PEERS", {"ours": lambda row: calls.append("ours")})
    monkeypatch.setattr(bench, "time_iterations", lambda cell, benchmark, row, iterate: lambda: None)
    bench.measure({}, None, SMALL[1], "ours", "iteration")
    assert calls == ["expected_loss", "free_memory", "ours"]


@pytest.mark.parametrize(("switch", "last"), [("none", False), ("channels last", True)])
def test_a_switch_changes_no_arithmetic(switch: str, last: bool, monkeypatch: pytest.MonkeyPatch):
    row, made = SMALL[1], []
    begin = switches.iterations
    monkeypatch.setattr(switches, "iterations", lambda step, row: (made.append(step), begin(step, row))[1])
    assert errors(row, switches.switched(row, switch)())["loss_error"] < 1e-5
    (step,) = made
    weight = step.networks.decoder.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is last
    assert weight.is_contiguous() is not last


def test_switches_for_gpus_are_absent_from_a_cpu():
    for name, settings in switches.SWITCHES.items():
        if settings["graphs"]:
            with pytest.raises(Absent, match="CUDA graphs need a GPU"):
                switches.switched(SMALL[0], name)


@pytest.fixture
def step_document(make_document, monkeypatch: pytest.MonkeyPatch):
    def make(rows: Any, ours: float, baseline: float) -> dict[str, Any]:
        monkeypatch.setattr(bench, "flops", lambda row: {"ours": 3e12, "baseline": 4e12})
        times = {(row.name, peer): (t, None) for row in rows for peer, t in (("ours", ours), ("baseline", baseline))}
        return make_document(replace(bench.BENCHMARK, rows=rows), times, {"bfloat16": 750.0})

    return make


def test_table_of_switches(make_document, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "flops", lambda row: {})
    times = dict(zip(switches.SWITCHES, (8e3, 4e3, 5e3, 6.4e3, None, 1e3), strict=True))
    benchmark = replace(switches.BENCHMARK, rows=ROWS_ON_GPU[:1])
    document = make_document(benchmark, {("cifar10-64", name): (time, None) for name, time in times.items()})
    lines = tables.tables({**document, "targets": []}).splitlines()
    assert lines[2] == "|  | none | channels last | bfloat16 | compile | all |"
    assert "| 8,000 | 16,000 (2×) | 12,800 (1.6×) | 10,000 (1.25×) | 64,000 (8×) |" in lines[4]


def test_table_of_steps(step_document):
    text = tables.tables({**step_document(ROWS_ON_GPU[:1], 1e4, 5e4), "targets": []})
    assert "| cifar10-64: cifar10 at 32×32, batch 64, float32 | 6,400 (5×) | 1,280 | 300 / 80 | 40% |" in text


def test_targets(step_document):
    def entries(rows: Any, ours: float, baseline: float) -> dict[tuple[str, float], tuple[float, bool]]:
        document = step_document(rows, ours, baseline)
        targets = results.target_entries(document, {row.name: row.targets for row in rows})
        return {(t["row"], t["required"]): (t["measured"], t["met"]) for t in targets}

    assert entries(ROWS_ON_CPU, 2e6, 3e6) == {("cifar10-8", 1.35): (1.5, True)}
    assert entries(ROWS_ON_GPU, 1e4, 5e4) == {
        ("cifar10-64", 6): (5.0, False),
        ("cifar10-256", 0.4): (0.4, True),  # 3 TFLOP in 10 ms are 300 TFLOP/s, 40 % of 750
        ("faces512", 3): (5.0, True),
        ("faces512", 0.3): (0.4, True),
    }
