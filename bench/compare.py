"""Measure our implementations and compare with the committed results of this device: fail if one has become slower."""

import argparse
import sys
import tempfile
from pathlib import Path

import gpu
import results
from results import Document

ALLOWED = 1.10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--committed", type=Path, default=results.COMMITTED, help="folder to compare with")
    parser.add_argument("--fresh", type=Path, help="folder with results that were measured before")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="on the CPU, with small shapes")
    options = parser.parse_args(arguments)
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.fresh or Path(temporary)
        if options.fresh is None:
            for name in gpu.BENCHMARKS:
                gpu.run_benchmark(name, folder, options.cpu_rehearsal, "-k", "ours")
                if not list(folder.glob(f"*/{name}.json")):
                    lines.append(f"{name}: no result file")
        paths = sorted(path for name in gpu.BENCHMARKS for path in folder.glob(f"*/{name}.json"))
        if not paths and not lines:
            lines.append(f"{folder} has no results to compare")
        for path in paths:
            committed = options.committed / path.parent.name / path.name
            if committed.exists():
                lines += regressions(results.read(committed), results.read(path))
            else:
                lines.append(f"{committed} does not exist")
    print("\n".join(lines) or f"nothing is over {ALLOWED - 1:.0%} slower than committed")
    return int(bool(lines))


def regressions(committed: Document, fresh: Document) -> list[str]:
    """Return a line for each of our medians that is too slow, missing, or of a different problem.

    Times of different timers cannot be compared: then the only line says so.
    """
    if committed.get("timer") != fresh.get("timer"):
        return [f"{fresh['benchmark']}: the committed result is of another timer; measure and commit it again"]
    rows, lines = {row["name"]: row for row in fresh["rows"]}, []
    for row in committed["rows"]:
        new_row = rows.get(row["name"], {})
        if {**row, "cells": None} != {**new_row, "cells": None}:
            lines.append(f"{row['name']}: differs from the committed row; measure and commit it again")
            continue
        cells = {cell["mode"]: cell for cell in new_row["cells"] if cell["peer"] == "ours"}
        for old in (cell for cell in row["cells"] if cell["peer"] == "ours"):
            new = cells[old["mode"]]
            for timing in (timing for timing in ("wall", "graph") if old[timing]):
                name, before = f"{row['name']} {old['mode']} {timing}", old[timing]["median_us"]
                if new[timing] is None:
                    reason = (timing == "graph" and new["graph_reason"]) or new["reason"]
                    lines.append(f"{name}: not measured ({reason})")
                elif (now := new[timing]["median_us"]) > ALLOWED * before:
                    lines.append(f"{name}: {now:.1f} µs, {now / before - 1:.0%} over the committed {before:.1f} µs")
    return lines


if __name__ == "__main__":
    sys.exit(main())
