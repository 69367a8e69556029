"""Tests of the benchmark of training iterations: wrong losses, memory, recipes, targets, tables."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import harness
import step_cases
import tables
import test_step
from dcvae_fast.recipes import recipe_config
from dcvae_fast.training.plan import iteration_flops
from dcvae_fast.training.step import TrainStep
from harness import Absent, Unavailable
from step_cases import NARROW, ROWS_ON_CPU, ROWS_ON_GPU, errors, expected_loss, flops
from step_targets import MODE, targets

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


def test_iterations_are_fully_faded_in_and_cost_what_the_plan_says():
    faces = SMALL[1]
    assert faces.config.model.max_channels == NARROW["max_channels"]
    step_cases.ours(faces)  # at its resolution, or its images would not fit
    cifar = ROWS_ON_GPU[0]
    step = TrainStep(cifar.config, "meta")
    found = flops(cifar)
    assert found["ours"] == iteration_flops(step, step_cases.images(cifar, "meta"))
    assert found["baseline"] / 1e12 == pytest.approx(2.0, abs=0.01)  # the authors'


def test_wrong_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    cifar, faces = SMALL
    good = {"loss/discriminator": torch.tensor(expected_loss(faces))}
    assert errors(faces, good) == {"loss_error": 0.0}
    with pytest.raises(Unavailable, match="its first loss is"):
        errors(faces, {"loss/discriminator": good["loss/discriminator"] + 0.1})
    assert errors(cifar, good) == {}
    monkeypatch.setattr(step_cases, "expected_loss", lambda row: float("nan"))
    with pytest.raises(Unavailable, match="its first loss is"):
        errors(faces, good)
    with pytest.raises(Unavailable, match="its loss is nan"):
        errors(cifar, {"loss/discriminator": torch.tensor(float("nan"))})


def test_memory_of_ours_is_counted_without_the_baseline(monkeypatch: pytest.MonkeyPatch):
    """The baseline's iteration that computes the expected loss must end before memory is counted."""
    used = peak = 0

    def take(amount: int) -> None:
        nonlocal used, peak
        used += amount
        peak = max(peak, used)

    def reset() -> None:
        nonlocal peak
        peak = used

    def maker(amount: int) -> Any:
        def make(row: Any) -> Any:
            def iterate() -> dict[str, torch.Tensor]:
                return {"loss/discriminator": torch.tensor(1.0)}

            take(amount)
            weakref.finalize(iterate, take, -amount)
            return iterate

        return make

    monkeypatch.setattr(test_step, "MAKERS", {"ours": maker(10)})
    monkeypatch.setattr(step_cases, "baseline", maker(100))
    monkeypatch.setattr(harness, "reset_peak", reset)
    monkeypatch.setattr(harness, "peak_since_reset", lambda: peak)
    monkeypatch.setattr(harness, "measure", lambda *_, **__: {"median_us": 1.0})
    expected_loss.cache_clear()
    assert test_step.measure(SMALL[1], "ours", MODE, "wall", None)["peak_bytes"] == 10
    expected_loss.cache_clear()


@pytest.mark.parametrize(("switch", "last"), [("none", False), ("channels last", True)])
def test_a_switch_changes_no_arithmetic(switch: str, last: bool, monkeypatch: pytest.MonkeyPatch):
    row, made = SMALL[1], []
    begin = step_cases.iterations
    monkeypatch.setattr(step_cases, "iterations", lambda step, row: (made.append(step), begin(step, row))[1])
    assert errors(row, step_cases.switched(row, switch)())["loss_error"] < 1e-5
    (step,) = made
    weight = step.networks.decoder.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is last
    assert weight.is_contiguous() is not last


def test_switches_for_gpus_are_absent_from_a_cpu():
    for name, settings in step_cases.SWITCHES.items():
        if settings["graphs"]:
            with pytest.raises(Absent, match="no CUDA graphs on a CPU"):
                step_cases.switched(SMALL[0], name)
    assert set(step_cases.SWITCHES) >= set(suite_peers())


def suite_peers() -> list[str]:
    """Those that the table of switches names."""
    return ["none", "channels last", "bfloat16", "compile", "graphs", "ours"]


def test_table_of_switches():
    times = dict(zip(suite_peers(), (8e3, 4e3, 5e3, 6.4e3, None, 1e3), strict=True))
    cells = [{"peer": p, "mode": MODE, "wall": t and {"median_us": t}} for p, t in times.items()]
    row = {"name": "cifar10-64", "recipe": "cifar10", "resolution": 32, "batch": 64, "cells": cells}
    known = dict.fromkeys(("driver", "cuda", "torch", "triton", "python"))
    text = tables.table(
        {**known, "device": "H100", "date": "2026-01-01", "commit": "c", "dirty": False, "benchmark": "switches"}
        | {"rows": [row], "targets": []}
    )
    assert "| 8,000 | 16,000 (2×) | 12,800 (1.6×) | 10,000 (1.25×) | – | 64,000 (8×) |" in text
    assert "target" not in text


def document(device: str, names: list[str], ours: float, baseline: float) -> dict[str, Any]:
    times = {"ours": ours, "baseline": baseline}
    cells = [
        {"peer": peer, "mode": MODE, "wall": {"median_us": time}, "waiting_share": 0.02} for peer, time in times.items()
    ]
    rows = [{"name": name, "flops": {"ours": 3e12, "baseline": 4e12}, "cells": cells} for name in names]
    return {"device": device, "rehearsal": False, "device_rates": {"bfloat16": 750.0}, "rows": rows}


def test_targets():
    (on_cpu,) = targets(document("cpu", [row.name for row in ROWS_ON_CPU], 2e6, 3e6))
    assert (on_cpu["row"], on_cpu["measured"], on_cpu["met"]) == ("cifar10-8", 1.5, True)
    # 3 TFLOP in 10 ms are 300 TFLOP/s, 40 % of 750.
    found = {(t["row"], t["required"]): t for t in targets(document("H100", [r.name for r in ROWS_ON_GPU], 1e4, 5e4))}
    assert found["cifar10-64", 6]["measured"] == 5 and found["cifar10-64", 6]["met"] is False
    assert found["faces512", 3]["met"] is True
    assert found["cifar10-256", 0.4]["measured"] == 0.4 and found["faces512", 0.3]["met"] is True
