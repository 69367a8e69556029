"""Tests of `python bench/tables.py`: the text between the markers comes from the result files alone."""

import pytest

import results
import tables

HEAD = {
    "benchmark": "info_nce",
    "device": "Some GPU",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.11.7",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "rehearsal": False,
    "device_rates": {"float32": 50.0},
}


def cell(peer, wall=None, graph=None, **fields):
    times = {"wall": wall and {"median_us": wall}, "graph": graph and {"median_us": graph}}
    return {"peer": peer, "mode": "forward_backward", "peak_bytes": None, **times, **fields}


ROW = {
    **{"name": "dcvae", "scales": 2, "batch": 128, "queue": 8096, "dim": 16, "dtype": "float32", "symmetric": False},
    "floors": {"forward_backward": {"flops": 132644864}},
    "cells": [
        cell("ours", 21.04, 5.306, peak_bytes=16e6),
        cell("eager", 1234.5, 99.94, peak_bytes=25e6),
        cell("torch.compile"),
        cell("lightly", 700.0),
        cell("attention", 650.0, 70.0),
    ],
}
EMPTY_ROW = {**ROW, "name": "large", "cells": [cell(c["peer"]) for c in ROW["cells"]]}
TARGETS = [
    {"row": "dcvae", "what": "times faster", "required": 5, "measured": 13.2, "against": "attention", "met": True},
    {"row": "large", "what": "share", "required": 0.5, "measured": 0.41, "against": None, "met": False},
    {"row": "clip", "what": "times faster", "required": 3, "measured": None, "against": "inf_cl", "met": None},
]
# 132644864 FLOP in 5.306 µs are 25.0 TFLOP/s, half of 50. What was not measured is left out.
TABLE = """\
**Some GPU**: driver 580.1, CUDA 13.0, torch 2.11.0, Triton 3.6.0, Python 3.11.7; 2026-01-02, commit 0123456789ab.

|  | ours | eager | fastest other | memory, ours / eager | matrix rate |
| --- | --- | --- | --- | --- | --- |
| dcvae: S 2, B 128, K 8096, D 16, float32 | 21 / 5.31 | 1,234 / 99.9 | 650 / 70 (attention) | 16 MB / 25 MB | 50% |

| target | required | measured | result |
| --- | --- | --- | --- |
| dcvae: times faster | ≥ 5 | 13.2 (attention) | met |
| large: share | ≥ 0.5 | 0.41 | missed |
"""


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Title\n\n<!-- bench:info_nce -->\nold\n<!-- /bench:info_nce -->\n\nEnd.\n", encoding="utf-8")
    return path


def test_table_is_exactly_the_files(readme, tmp_path):
    document = {**HEAD, "rows": [ROW, EMPTY_ROW], "targets": TARGETS}
    results.write(tmp_path / "results" / "some-gpu" / "info_nce.json", document)
    arguments = [str(readme), "--results", str(tmp_path / "results")]
    assert tables.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert tables.main(arguments) == 0
    block = f"{tables.TABLES['info_nce'].text}\n\n{TABLE}"
    expected = f"# Title\n\n<!-- bench:info_nce -->\n{block}<!-- /bench:info_nce -->\n\nEnd.\n"
    assert readme.read_text(encoding="utf-8") == expected
    assert tables.main([*arguments, "--check"]) == 0


def test_without_a_measurement_it_says_so(readme, tmp_path):
    results.write(tmp_path / "results" / "cpu" / "info_nce.json", {**HEAD, "rehearsal": True})
    assert tables.main([str(readme), "--results", str(tmp_path / "results")]) == 0
    assert readme.read_text(encoding="utf-8").split("\n")[3] == tables.NOTHING.strip()


@pytest.mark.multiprocess
def test_the_readmes_are_up_to_date(script):
    result = script("tables", "--check")
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(("x", "text"), [(0.01234, "0.0123"), (5.306, "5.31"), (99.94, "99.9"), (1234.5, "1,234")])
def test_number(x, text):
    assert tables.number(x) == text
