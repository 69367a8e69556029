"""Write the committed results into the documentation, between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`.

Rows and columns in which nothing was measured, and targets that were not measured, are left out.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import results
from results import OURS, Document, cells_of, floor_us, median, ratio

FILES = tuple(results.ROOT / name for name in ("kernels/README.md", "docs/data.md", "docs/speed.md"))
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
NOTHING = "No measurement is committed yet; `make gpu` on a machine with a GPU takes one.\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=FILES, help="default: this project's")
    parser.add_argument("--results", type=Path, default=results.COMMITTED, help="folder with <device>/NAME.json")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    options = parser.parse_args(arguments)
    outdated = False
    for file in options.files:
        text = file.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda match: match[1] + contents(match[2], options.results) + match[3], text)
        if new == text:
            continue
        outdated = True
        if not options.check:
            file.write_text(new, encoding="utf-8")
        print(f"{file}: out of date; `make readme-tables` writes it" if options.check else f"{file}: written")
    return int(options.check and outdated)


# Takes a document, one of its rows, and the row's cells by implementation. Returns "" if nothing was measured.
Column = Callable[[Document, Document, dict[str, Document]], str]


def column(value: Callable[[Document, Document], str | None], *peers: str) -> Column:
    """Values of a row and the cells of some implementations, separated by " / "."""
    return lambda document, row, cells: joined(value(row, cells[peer]) for peer in peers)


def joined(values: Iterable[str | None]) -> str:
    texts = [value or "–" for value in values]
    return " / ".join(texts) if {*texts} != {"–"} else ""


def number(x: float) -> str:
    """Format with three significant digits, or more before the decimal point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def times(row: Document, cell: Document) -> str:
    return joined(number(time) if (time := median(cell, timing)) else None for timing in ("wall", "graph"))


def images(row: Document, cell: Document) -> str | None:
    return number(row["batch"] / time * 1e6) if (time := median(cell, "wall")) else None


def tflops(row: Document, cell: Document) -> str | None:
    return number(row["flops"][cell["peer"]] / time / 1e6) if (time := median(cell, "wall")) else None


def memory(row: Document, cell: Document) -> str | None:
    return f"{number(peak / 1e6)} MB" if (peak := cell.get("peak_bytes")) else None


def launches(row: Document, cell: Document) -> str | None:
    return str(cell["launches"]) if cell.get("launches") else None


def waiting(row: Document, cell: Document) -> str | None:
    return None if cell.get("waiting_share") is None else f"{cell['waiting_share']:.1%}"


def gain(peer: str, over: str) -> Column:
    """Images per second, and how many times as many as another implementation's."""

    def text(document: Document, row: Document, cells: dict[str, Document]) -> str:
        factor = ratio(median(cells[over], "wall"), median(cells[peer], "wall"))
        return (images(row, cells[peer]) or "") + (f" ({number(factor)}×)" if factor else "")

    return text


def fastest_other(document: Document, row: Document, cells: dict[str, Document]) -> str:
    """Times of the fastest implementation besides ours, eager and compiled PyTorch."""
    others = [cell for peer, cell in cells.items() if peer not in (*OURS, "eager", "torch.compile")]
    best = min(others, key=lambda cell: median(cell, "fastest") or math.inf)
    return f"{times(row, best)} ({best['peer']})" if median(best, "fastest") else ""


def share(rate: str | None = None) -> Column:
    """Share of a rate of the device that ours reaches; the default is that of matrix products of the row's dtype."""

    def text(document: Document, row: Document, cells: dict[str, Document]) -> str:
        reached = ratio(floor_us(document, row, rate or row["dtype"]), median(cells["ours"], "fastest"))
        return f"{reached:.0%}" if reached else ""

    return text


def copy_floor(document: Document, row: Document, cells: dict[str, Document]) -> str:
    time = floor_us(document, row, "copy")
    return number(time) if time else ""


def info_nce_shape(row: Document) -> str:
    scales = f"S {row['scales']}, " if row["scales"] > 1 else ""
    keys = f"K {row['queue']}" if row["queue"] else "in-batch"
    return f"{scales}B {row['batch']}, {keys}, D {row['dim']}, {'symmetric, ' * row['symmetric']}{row['dtype']}"


def spectral_norm_shape(row: Document) -> str:
    largest = "×".join(map(str, row["largest"]))
    return f"{row['layers']} layers, {number(row['elements'] / 1e6)} M weights, the largest {largest}, {row['dtype']}"


class Table(NamedTuple):
    """Layout of a benchmark's tables.

    Attributes:
        text: explanation above the tables
        shape: describes a row after its name, as a format string of its fields or a function
        columns: by heading
    """

    text: str
    shape: str | Callable[[Document], str]
    columns: dict[str, Column]


OPS: dict[str, Column] = {
    "ours": column(times, "ours"),
    "eager": column(times, "eager"),
    "`torch.compile`": column(times, "torch.compile"),
    "fastest other": fastest_other,
    "memory, ours / eager": column(memory, "ours", "eager"),
}
OPS_TEXT = """\
Median time of forward and backward in µs: called from Python / replayed from a CUDA graph. Memory is what a call
allocates beyond its inputs."""

TABLES = {
    "info_nce": Table(
        f"{OPS_TEXT} Matrix rate: share of the rate of matrix products measured on this device.",
        info_nce_shape,
        {**OPS, "matrix rate": share()},
    ),
    "spectral_norm": Table(
        f"""{OPS_TEXT} Eager is torch's parametrization; older is its hook. The floor is the time to move the weights
at the measured copy rate; data in the cache can be faster.""",
        spectral_norm_shape,
        {
            **OPS,
            "launches, ours / eager": column(launches, "ours", "eager"),
            "floor": copy_floor,
            "copy rate": share("copy"),
        },
    ),
    "pipelines": Table(
        """\
Median images per second that arrive on the device as training batches, with the same cores for all. Files come from the
page cache. Waiting is the share of a training iteration spent on getting its images.""",
        "{images} at {resolution}×{resolution}, batch {batch}, {cores} cores",
        {
            "ours": column(images, "ours"),
            "`DataLoader`, Pillow": column(images, "dataloader"),
            "`torchvision.io`": column(images, "torchvision.io"),
            "`torchvision.io`, GPU": column(images, "torchvision gpu"),
            "waiting, ours / `DataLoader`": column(waiting, "ours", "dataloader"),
        },
    ),
    "step": Table(
        """\
Median images per second in training. The baseline is the authors' iteration in plain PyTorch: eager, float32. Memory is
the peak that torch reserved. Idle is a lower bound of the share of time in which the GPU does nothing.""",
        "{recipe} at {resolution}×{resolution}, batch {batch}, {precision}",
        {
            "ours": gain("ours", "baseline"),
            "baseline": column(images, "baseline"),
            "TFLOP/s, ours / baseline": column(tflops, "ours", "baseline"),
            "matrix rate": share("bfloat16"),
            "memory, ours / baseline": column(memory, "ours", "baseline"),
            "launches, ours / baseline": column(launches, "ours", "baseline"),
            "idle, ours / baseline": column(waiting, "ours", "baseline"),
        },
    ),
    "switches": Table(
        """\
Median images per second in training, and how many times as many as with none of the settings: eager, float32, channels
first. Each setting alone, then all together.""",
        "{recipe} at {resolution}×{resolution}, batch {batch}",
        {
            "none": column(images, "none"),
            **{name: gain(name, "none") for name in ("channels last", "bfloat16", "compile", "graphs")},
            "all": gain("ours", "none"),
        },
    ),
}


def contents(name: str, folder: Path) -> str:
    """Return the contents of a block: an explanation, then the tables of each device, GPUs first."""
    paths = sorted(folder.glob(f"*/{name}.json"), key=lambda path: (path.parent.name == "cpu", path))
    documents = [document for path in paths if not (document := results.read(path))["rehearsal"]]
    return "\n".join([TABLES[name].text + "\n", *map(tables, documents)]) if documents else NOTHING


def tables(document: Document) -> str:
    """Return device and versions, the table, and the targets that were measured."""
    _, shape, columns = TABLES[document["benchmark"]]
    rows, targets = [], []
    for row in document["rows"]:
        cells = cells_of(row)
        if any(median(cell, "fastest") for cell in cells.values()):
            label = shape.format(**row) if isinstance(shape, str) else shape(row)
            rows.append([f"{row['name']}: {label}", *(text(document, row, cells) for text in columns.values())])
    for target in (target for target in document["targets"] if target["measured"] is not None):
        measured = number(target["measured"]) + (f" ({target['against']})" if target["against"] else "")
        label, verdict = f"{target['row']}: {target['what']}", "met" if target["met"] else "missed"
        targets.append([label, f"≥ {number(target['required'])}", measured, verdict])
    parts = [head(document), *([markdown(["", *columns], rows)] if rows else [])]
    parts += [markdown(["target", "required", "measured", "result"], targets)] if targets else []
    return "\n\n".join(parts) + "\n"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table without the columns that are empty in all rows."""
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    lines = [[headings[i] for i in kept], ["---"] * len(kept), *([row[i] or "–" for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def head(document: Document) -> str:
    """Return device, versions, date and commit."""
    versions = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "Triton": "triton", "Python": "python"}
    known = ", ".join(f"{name} {document[key]}" for name, key in versions.items() if document[key])
    device = document["cpu"] if document["device"] == "cpu" else document["device"]
    commit = (document["commit"] or "unknown")[:12] + (" with uncommitted changes" if document["dirty"] else "")
    return f"**{device}**: {known}; {document['date'][:10]}, commit {commit}."


if __name__ == "__main__":
    sys.exit(main())
