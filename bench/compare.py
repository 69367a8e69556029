"""Measures anew and compares with the committed file of this device: fails if ours has become slower.

Only our own medians count. Other implementations are not run: their speed is not ours to keep.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu
import records

ALLOWED = 1.10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--committed", type=Path, default=records.COMMITTED, help="folder to compare with")
    parser.add_argument("--fresh", type=Path, help="folder of a run that has been done already")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="on the CPU, with small shapes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.fresh is None:
            options.fresh = Path(folder)
            for name in gpu.BENCHMARKS:
                gpu.run_benchmark(name, options.fresh, options.cpu_rehearsal, only="ours")
        paths = sorted(path for name in gpu.BENCHMARKS for path in options.fresh.glob(f"*/{name}.json"))
        found = [line for path in paths for line in regressions_of_file(path, options.committed)]
    if not paths:
        found = ["there is no fresh result to compare"]
    print("\n".join(found) or f"nothing is over {ALLOWED - 1:.0%} slower than committed")
    return 1 if found else 0


def regressions_of_file(fresh: Path, folder: Path) -> list[str]:
    committed = folder / fresh.parent.name / fresh.name
    if not committed.exists():
        return [f"{committed} is not there to compare with"]
    return regressions(records.read(committed), records.read(fresh))


def regressions(committed: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """A line for each of our medians that is too much over the committed one, or can no longer be compared with it."""
    now = {row["name"]: row for row in fresh["rows"]}
    lines = []
    for row in committed["rows"]:
        if row["name"] not in now or _without_cells(row) != _without_cells(now[row["name"]]):
            lines.append(f"{row['name']}: another problem than in the committed file, which has to be measured anew")
            continue
        cells = {(cell["peer"], cell["mode"]): cell for cell in now[row["name"]]["cells"]}
        for old in (cell for cell in row["cells"] if cell["peer"] == "ours"):
            new = cells["ours", old["mode"]]
            for how, reason in (("wall", new["reason"]), ("graph", new["graph_reason"])):
                lines += _slower(f"{row['name']} {old['mode']} {how}", old[how], new[how], reason)
    return lines


def _slower(name: str, old: dict[str, float] | None, new: dict[str, float] | None, reason: str | None) -> list[str]:
    if old is None:
        return []
    if new is None:
        return [f"{name}: not measured ({reason})"]
    ratio = new["median_us"] / old["median_us"]
    if ratio <= ALLOWED:
        return []
    return [f"{name}: {new['median_us']:.1f} µs, {ratio - 1:.0%} over the committed {old['median_us']:.1f} µs"]


def _without_cells(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "cells"}


if __name__ == "__main__":
    sys.exit(main())
