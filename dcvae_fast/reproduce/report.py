"""Pages of a table: Markdown, JSON, and the plot of Figure 7."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dcvae_fast.evaluation.measurement import Measurement
from dcvae_fast.reproduce.paper import Key, Table
from dcvae_pipelines.atomic import atomic_write, replacing

MISSING = "–"


class Curve(NamedTuple):
    """Reconstruction error on held-out images during the training of a run.

    Attributes:
        label: name in the plot
        epochs, errors: coordinates of the points; errors are MSE on [-1, 1]
        images: number of images measured for each point
    """

    label: str
    epochs: Sequence[float]
    errors: Sequence[float]
    images: int


@dataclass(frozen=True)
class Result:
    """Measurements of a run so far.

    Attributes:
        remarks: differences from the paper's run
        measured: measurements
        missing: reasons for missing measurements
        model: description of the measured model, from `describe`
        curve: curve for Figure 7
    """

    remarks: tuple[str, ...] = ()
    measured: Mapping[Key, Measurement] = field(default_factory=dict)
    missing: Mapping[Key, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    curve: Curve | None = None


def write_pages(table: Table, results: Mapping[str, Result], out: Path) -> None:
    """Write OUT/TABLE.md and OUT/TABLE.json, and OUT/TABLE.png if the results have curves."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / f"{table.name}.md", markdown(table, results))
    content = json.dumps(as_json(table, results), indent=2, ensure_ascii=False) + "\n"
    atomic_write(out / f"{table.name}.json", content)
    if curves := [result.curve for result in results.values() if result.curve is not None]:
        title = "Figure 7: pixel error on CIFAR-10 test images, by number of negatives K"
        plot_curves(out / f"{table.name}.png", curves, title="\n".join([title, *all_remarks(results.values())]))


def plot_curves(path: Path, curves: Sequence[Curve], *, title: str) -> None:
    """Plot curves to a PNG file, in colours from dark to light, with a dot at the end of each."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        colour = colormaps["viridis"](0.9 * number / max(1, len(curves) - 1))
        end = [-1] if len(curve.errors) else None
        axes.plot(curve.epochs, curve.errors, label=curve.label, color=colour, linewidth=2, marker="o", markevery=end)
    axes.set_title(title, wrap=True)
    axes.set_xlabel("training epochs")
    axes.set_ylabel(f"pixel MSE on [-1, 1], {curves[-1].images:,} images")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def markdown(table: Table, results: Mapping[str, Result]) -> str:
    """Return a page: heading, table, notes, and reasons for missing numbers. Each reproduced row ends in its remarks.

    Args:
        results: by run; a missing run has not been trained yet.
    """
    notes = table.column_notes
    headings = [
        column.heading + (f" [{notes.index(column.note) + 1}]" if column.note else "") for column in table.columns
    ]
    lines = [["method", "from", *headings, "remarks"]]
    missing: dict[str, list[str]] = {}
    for row in table.rows:
        if any(row.paper):
            printed = (number.replace("±", " ± ") for number in row.paper)
            lines.append([row.method, "paper" if row.runs else "quoted", *printed, ""])
        if not row.runs:
            continue
        cells = []
        for number, run in enumerate(row.runs):
            if not run:
                cells.append("")
                continue
            measurement = _measurement(table.key(row, number), results.get(run))
            if isinstance(measurement, str):
                missing.setdefault(measurement, []).append(f"{row.method}, {table.columns[number].heading}")
            cells.append(MISSING if isinstance(measurement, str) else _value(measurement))
        lines.append([row.method, "ours", *cells, "; ".join(_remarks(row.runs, results))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    page = [_title(table, results), ""]
    for line in (lines[0], rule, *lines[1:]):
        page.append("| " + " | ".join(map(str.ljust, line, widths)) + " |")
    footer = [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    footer += [table.note] if table.note else []
    footer += [f"{MISSING} {'; '.join(cells)}: {reason}" for reason, cells in missing.items()]
    return "\n".join([*page, *(line for paragraph in footer for line in ("", paragraph))]) + "\n"


def as_json(table: Table, results: Mapping[str, Result]) -> dict[str, Any]:
    """Return the table as plain values: each reproduced number with its measurement, run and remarks."""
    rows = []
    for row in table.rows:
        cells = []
        for number, (column, printed) in enumerate(zip(table.columns, row.paper, strict=True)):
            cell: dict[str, Any] = {"column": column.heading, "paper": printed or None}
            if row.runs and (run := row.runs[number]):
                measurement = _measurement(table.key(row, number), results.get(run))
                ours = {"missing": measurement} if isinstance(measurement, str) else {"ours": asdict(measurement)}
                cell |= {"run": run, "remarks": _remarks([run], results), **ours}
            cells.append(cell)
        rows.append({"method": row.method, "quoted": not row.runs, "cells": cells})
    return {
        "table": table.name,
        "title": _title(table, results).removeprefix("# "),
        "rows": rows,
        "notes": [*table.column_notes, *filter(None, [table.note])],
        "runs": {run: {"remarks": list(result.remarks), **result.model} for run, result in results.items()},
    }


def all_remarks(results: Iterable[Result]) -> list[str]:
    """Return the remarks of all results, without duplicates."""
    return list(dict.fromkeys(remark for result in results for remark in result.remarks))


def _remarks(runs: Iterable[str], results: Mapping[str, Result]) -> list[str]:
    return all_remarks(results[run] for run in runs if run in results)


def _title(table: Table, results: Mapping[str, Result]) -> str:
    remarks = _remarks(table.needed(), results)
    return f"# {table.title}" + (f" ({'; '.join(remarks)})" if remarks else "")


def _measurement(key: Key, result: Result | None) -> Measurement | str:
    """Return the measurement, or the reason why it is missing."""
    if result is None:
        return "not trained yet"
    return result.measured.get(key) or result.missing.get(key, "not measured yet")


def _value(measurement: Measurement) -> str:
    """Format a value with four digits; for linear probes with the spread, as in the paper."""
    spread = measurement.spread if measurement.metric == "probe_error" else None
    return f"{measurement.value:.4g}" + (f" ± {spread:.2g}" if spread else "")
