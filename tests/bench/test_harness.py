"""Tests of how a benchmark fills the cells of its result file."""

import types

import pytest
import torch

import harness
from harness import Absent, Unavailable, one_sentence

TIME = {"median_us": 3.0}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (AssertionError(), "AssertionError: no message"),
        (RuntimeError("in a subprocess:\n\nTraceback:\n  f()\nx.SomeError: 1\nHint"), "RuntimeError: x.SomeError: 1"),
    ],
)
def test_one_sentence(error, text):
    assert one_sentence(error) == text


@pytest.fixture
def fill():
    """Fill the cell of an implementation in a document with one row; return the cell."""

    def run(measure, peer="eager", out_of_time=False):
        cell = {"peer": peer, "mode": "forward", "wall": None, "graph": None, "reason": "not run", "graph_reason": None}
        document = {"rehearsal": False, "rows": [{"name": "row", "cells": [cell]}]}
        row, benchmark = types.SimpleNamespace(name="row"), types.SimpleNamespace()
        try:
            harness.fill(document, benchmark, out_of_time, row, peer, "forward", measure)
        except pytest.fail.Exception as failure:
            cell["failure"] = str(failure)
        return cell

    return run


def raising(error, **measured):
    def measure(cell, *arguments):
        cell.update(measured)
        raise error

    return measure


def test_times_are_kept(fill):
    cell = fill(lambda cell, *arguments: cell.update(wall=TIME))
    assert (cell["wall"], cell["reason"], cell["graph_reason"]) == (TIME, None, None)


def test_reasons_are_noted_and_are_failures_only_if_ours(fill):
    for error, reason in ((Unavailable("it has no queue"), "it has no queue"), (ValueError("x"), "ValueError: x")):
        cell = fill(raising(error))
        assert cell["reason"] == reason and "failure" not in cell
        assert fill(raising(error), peer="ours")["failure"] == reason
    assert "failure" not in fill(raising(Absent("x is not installed")), peer="ours")


def test_a_failed_graph_leaves_the_time_from_python(fill):
    cell = fill(raising(RuntimeError("capture"), wall=TIME), peer="ours")
    assert (cell["wall"], cell["reason"], cell["graph_reason"]) == (TIME, None, "RuntimeError: capture")
    assert cell["failure"] == "RuntimeError: capture"


def test_nothing_is_measured_after_the_deadline(fill):
    cell = fill(raising(AssertionError("measured")), peer="ours", out_of_time=True)
    assert cell["reason"] == "no time left" and "failure" not in cell


def test_fastest_leaves_out_what_raises():
    def fail():
        raise ValueError("no kernel")

    a, b = torch.ones(2000, 200), torch.ones(2)
    assert harness.fastest([fail, lambda: a @ a.mT, lambda: b + b]) == 2
    with pytest.raises(ValueError, match="no kernel"):
        harness.fastest([fail, fail])
