"""Write the committed results into the READMEs, between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`.

Rows and columns in which nothing was measured, and targets that were not measured, are left out.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import results
from results import Document, cells_of, floor_us, median, ratio

READMES = tuple(results.ROOT / name for name in ("README.md", "kernels/README.md", "docs/speed.md"))
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
NOTHING = "No measurement is committed yet; `make gpu` on a machine with a GPU takes one.\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=READMES, help="default: this project's")
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


def joined(values: list[str | None]) -> str:
    """Join with " / "; "–" stands for a missing value."""
    return " / ".join(value or "–" for value in values) if any(values) else ""


def number(x: float) -> str:
    """Format with three significant digits, or more before the decimal point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def times(peer: str) -> Column:
    """Times from Python and replayed."""
    return lambda document, row, cells: _times(cells[peer])


def _times(cell: Document) -> str:
    return joined([(time := median(cell, timing)) and number(time) for timing in ("wall", "graph")])


def fastest_other(document: Document, row: Document, cells: dict[str, Document]) -> str:
    """Times of the fastest implementation besides ours, eager and compiled PyTorch."""
    others = [peer for peer in cells if peer not in ("ours", "eager", "torch.compile")]
    timed = [(time, peer) for peer in others if (time := median(cells[peer], "fastest"))]
    return f"{_times(cells[min(timed)[1]])} ({min(timed)[1]})" if timed else ""


def images(peer: str, over: str | None = None) -> Column:
    """Images per second and, in brackets, how many times as many as `over`."""

    def column(document: Document, row: Document, cells: dict[str, Document]) -> str:
        time = median(cells[peer], "wall")
        gain = over and ratio(median(cells[over], "wall"), time)
        return (number(row["batch"] / time * 1e6) if time else "") + (f" ({number(gain)}×)" if gain else "")

    return column


def values(key: str, form: Callable[[float], str], *peers: str) -> Column:
    """A field of the cells of some implementations."""

    def column(document: Document, row: Document, cells: dict[str, Document]) -> str:
        return joined([None if (x := cells[peer].get(key)) is None else form(x) for peer in peers])

    return column


def memory(*peers: str) -> Column:
    return values("peak_bytes", lambda x: f"{number(x / 1e6)} MB", *peers)


def share(rate: str | None = None) -> Column:
    """Share of a rate of the device that ours reaches; the default is that of matrix products of the row's dtype."""

    def column(document: Document, row: Document, cells: dict[str, Document]) -> str:
        reached = ratio(floor_us(document, row, rate or row["dtype"]), median(cells["ours"], "fastest"))
        return f"{reached:.0%}" if reached else ""

    return column


def floor(document: Document, row: Document, cells: dict[str, Document]) -> str:
    time = floor_us(document, row, "copy")
    return number(time) if time else ""


def arithmetic(document: Document, row: Document, cells: dict[str, Document]) -> str:
    times = [(row["flops"][peer], median(cells[peer], "wall")) for peer in ("ours", "baseline")]
    return joined([time and number(flops / time / 1e6) for flops, time in times])


def info_nce_shape(row: Document) -> str:
    scales = f"S {row['scales']}, " if row["scales"] > 1 else ""
    keys = f"K {row['queue']}" if row["queue"] else "in-batch"
    return f"{scales}B {row['batch']}, {keys}, D {row['dim']}, {'symmetric, ' * row['symmetric']}{row['dtype']}"


def spectral_norm_shape(row: Document) -> str:
    largest = "×".join(map(str, row["largest"]))
    return f"{row['layers']} layers, {number(row['elements'] / 1e6)} M weights, the largest {largest}, {row['dtype']}"


class Table(NamedTuple):
    """How a benchmark is shown.

    Attributes:
        text: explanation above the tables
        shape: describes a row after its name, as a format string of its fields or a function
        columns: by heading
    """

    text: str
    shape: str | Callable[[Document], str]
    columns: dict[str, Column]


OPS: dict[str, Column] = {
    "ours": times("ours"),
    "eager": times("eager"),
    "`torch.compile`": times("torch.compile"),
    "fastest other": fastest_other,
    "memory, ours / eager": memory("ours", "eager"),
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
            "launches, ours / eager": values("launches", str, "ours", "eager"),
            "floor": floor,
            "copy rate": share("copy"),
        },
    ),
    "pipelines": Table(
        """\
Median images per second that arrive on the device as training batches, with the same cores for all. Files come from the
page cache. Waiting is the share of a training iteration spent on getting its images.""",
        "{images} at {resolution}×{resolution}, batch {batch}, {cores} cores",
        {
            "ours": images("ours"),
            "`DataLoader`, Pillow": images("dataloader"),
            "`torchvision.io`": images("torchvision.io"),
            "`torchvision.io`, GPU": images("torchvision gpu"),
            "waiting, ours / `DataLoader`": values("waiting_share", "{:.1%}".format, "ours", "dataloader"),
        },
    ),
    "step": Table(
        """\
Median images per second in training. The baseline is the authors' iteration in plain PyTorch: eager, float32. Memory is
the peak that torch reserved. Idle is a lower bound of the share of time in which the GPU does nothing.""",
        "{recipe} at {resolution}×{resolution}, batch {batch}, {precision}",
        {
            "ours": images("ours", over="baseline"),
            "baseline": images("baseline"),
            "TFLOP/s, ours / baseline": arithmetic,
            "matrix rate": share("bfloat16"),
            "memory, ours / baseline": memory("ours", "baseline"),
            "launches, ours / baseline": values("launches", str, "ours", "baseline"),
            "idle, ours / baseline": values("waiting_share", "{:.1%}".format, "ours", "baseline"),
        },
    ),
    "switches": Table(
        """\
Median images per second in training, and how many times as many as with none of the settings: eager, float32, channels
first. Each setting alone, then all together.""",
        "{recipe} at {resolution}×{resolution}, batch {batch}",
        {
            "none": images("none"),
            **{name: images(name, "none") for name in ("channels last", "bfloat16", "compile", "graphs")},
            "all": images("ours", "none"),
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
    lines = []
    for row in document["rows"]:
        cells = [column(document, row, cells_of(row)) for column in columns.values()]
        if any(median(cell, "fastest") for cell in cells_of(row).values()):
            lines.append([f"{row['name']}: {shape.format(**row) if isinstance(shape, str) else shape(row)}", *cells])
    parts = [head(document), markdown(["", *columns], lines)]
    targets = [
        [f"{t['row']}: {t['what']}", f"≥ {number(t['required'])}", f"{number(t['measured'])}{against(t)}", verdict(t)]
        for t in document["targets"]
        if t["measured"] is not None
    ]
    return (
        "\n\n".join([*parts, markdown(["target", "required", "measured", "result"], targets)] if targets else parts)
        + "\n"
    )


def against(target: Document) -> str:
    return f" ({target['against']})" if target["against"] else ""


def verdict(target: Document) -> str:
    return "met" if target["met"] else "missed"


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table without the columns that are empty in all lines."""
    kept = [i for i in range(len(headings)) if any(line[i] for line in lines)]
    rows = [[line[i] or "–" for i in kept] for line in [headings, ["---"] * len(headings), *lines]]
    rows[0] = [headings[i] for i in kept]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def head(document: Document) -> str:
    """Return device, versions, date and commit."""
    versions = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "Triton": "triton", "Python": "python"}
    known = ", ".join(f"{name} {document[key]}" for name, key in versions.items() if document[key])
    device = document["cpu"] if document["device"] == "cpu" else document["device"]
    commit = (document["commit"] or "unknown")[:12] + (" with uncommitted changes" if document["dirty"] else "")
    return f"**{device}**: {known}; {document['date'][:10]}, commit {commit}."


if __name__ == "__main__":
    sys.exit(main())
