"""Writes the committed results into the READMEs, between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pipelines_targets
import records
import step_targets
from targets import MODE, fastest_us, floor_us, median, ratio

READMES = tuple(records.ROOT / name for name in ("README.md", "kernels/README.md", "docs/speed.md"))
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
NOTHING = "No GPU measurement is committed yet; `make gpu` on a machine with a GPU takes one.\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=READMES, help="default: this project's")
    parser.add_argument("--results", type=Path, default=records.COMMITTED, help="holds <device>/NAME.json")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    options = parser.parse_args(arguments)
    outdated = []
    for file in options.files:
        text = file.read_text(encoding="utf-8")
        new = regenerated(text, options.results)
        if new != text:
            outdated.append(file)
            if not options.check:
                file.write_text(new, encoding="utf-8")
    for file in outdated:
        print(f"{file}: out of date; `make readme-tables` writes it" if options.check else f"{file}: written")
    return 1 if options.check and outdated else 0


def regenerated(text: str, folder: Path) -> str:
    """The text with every marked block made anew from the files in `folder`."""

    def block(match: re.Match[str]) -> str:
        return match[1] + contents(match[2], folder) + match[3]

    return BLOCK.sub(block, text)


def contents(name: str, folder: Path) -> str:
    paths = sorted(folder.glob(f"*/{name}.json"), key=lambda path: (path.parent.name == "cpu", path))  # GPUs first
    documents = [records.read(path) for path in paths]
    measured = [document for document in documents if not document["rehearsal"]]
    return "\n".join(table(document) for document in measured) or NOTHING


# From a document, its row and that row's cells by implementation.
Column = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], str]


class Kind(NamedTuple):
    """What one benchmark's tables have that others' do not.

    unit: of the speeds.
    explanation: of the table.
    shape: of a row, after its name.
    mode: of the cells that are shown.
    speeds: the first columns by heading, which say how fast everybody is.
    columns: the last ones.
    """

    unit: str
    explanation: str
    shape: Callable[[dict[str, Any]], str]
    mode: str
    speeds: dict[str, Column]
    columns: dict[str, Column]


def table(document: dict[str, Any]) -> str:
    kind = KINDS[document["benchmark"]]
    headings = ["", *kind.speeds, *kind.columns]
    lines = [
        head(document),
        "",
        f"{kind.unit} {kind.explanation}",
        "",
        f"|{' |'.join(f' {heading}' if heading else '' for heading in headings)} |",
        "|" + "---|" * len(headings),
    ]
    for row in document["rows"]:
        columns = [f"{row['name']}: {kind.shape(row)}", *filled(document, row, kind.speeds | kind.columns)]
        lines.append(f"| {' | '.join(columns)} |")
    if document["targets"]:
        lines += ["", "| target | required | measured | |", "|---|---|---|---|"]
    for target in document["targets"]:
        lines.append(f"| {' | '.join(target_columns(target))} |")
    return "\n".join(lines) + "\n"


def filled(document: dict[str, Any], row: dict[str, Any], columns: dict[str, Column]) -> list[str]:
    mode = KINDS[document["benchmark"]].mode
    cells = {cell["peer"]: cell for cell in row["cells"] if cell["mode"] == mode}
    return [column(document, row, cells) for column in columns.values()]


def head(document: dict[str, Any]) -> str:
    """What measured, with what, when."""
    versions = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "Triton": "triton", "Python": "python"}
    commit = (document["commit"] or "unknown")[:12] + (" with uncommitted changes" if document["dirty"] else "")
    known = ", ".join(f"{name} {document[key]}" for name, key in versions.items() if document[key])
    device = document["cpu"] if document["device"] == "cpu" else document["device"]
    return f"**{device}**: {known}; {document['date'][:10]}, commit {commit}."


def info_nce_shape(row: dict[str, Any]) -> str:
    parts = [f"S {row['scales']}"] if row["scales"] > 1 else []
    parts += [f"B {row['batch']}", f"K {row['queue']}" if row["queue"] else "in-batch", f"D {row['dim']}"]
    return f"{', '.join(parts)}, {'symmetric, ' if row['symmetric'] else ''}{row['dtype']}"


def spectral_norm_shape(row: dict[str, Any]) -> str:
    largest = "×".join(map(str, row["largest"]))
    return f"{row['layers']} layers, {number(row['elements'] / 1e6)} M weights, the largest {largest}, {row['dtype']}"


def pipelines_shape(row: dict[str, Any]) -> str:
    size = row["resolution"]
    return f"{row['images']} at {size}×{size}, batch {row['batch']}, {row['cores']} cores"


def fastest_other(document: dict[str, Any], row: dict[str, Any], cells: dict[str, dict[str, Any]]) -> str:
    """The fastest implementation besides ours, eager and compiled PyTorch."""
    others = [peer for peer in cells if peer not in ("ours", "eager", "torch.compile")]
    _, other = min(((time, peer) for peer in others if (time := fastest_us(cells[peer]))), default=(0, None))
    return f"{times(cells[other])} ({other})" if other else "–"


def times(cell: dict[str, Any]) -> str:
    wall, graph = (number(time) if (time := median(cell, how)) else "–" for how in ("wall", "graph"))
    return "–" if wall == graph == "–" else f"{wall} / {graph}"


def images_per_second(row: dict[str, Any], cell: dict[str, Any]) -> str:
    time = median(cell, "wall")
    return number(row["batch"] / time * 1e6) if time else "–"


def waiting(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    shares = [cells[peer].get("waiting_share") for peer in ("ours", "dataloader")]
    return " / ".join("–" if share is None else f"{share:.1%}" for share in shares)


def memory(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    peaks = [cells[peer]["peak_bytes"] for peer in ("ours", "eager")]
    return " / ".join("–" if peak is None else f"{number(peak / 1e6)} MB" for peak in peaks)


def launches(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    return " / ".join(str(cells[peer]["launches"] or "–") for peer in ("ours", "eager"))


def byte_floor(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    floor = floor_us(document, row["floors"][MODE], "copy")
    return number(floor) if floor else "–"


def share(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any], rate: str) -> str:
    """How much of a rate of the device ours reaches, backward too."""
    found = ratio(floor_us(document, row["floors"][MODE], rate), fastest_us(cells["ours"]))
    return f"{found:.0%}" if found else "–"


def step_shape(row: dict[str, Any]) -> str:
    size = row["resolution"]
    gflop = number(row["flops"]["ours"] / 1e9)
    return f"{row['recipe']} at {size}×{size}, batch {row['batch']}, {row['precision']}, {gflop} GFLOP"


def per_iteration(row: dict[str, Any], cell: dict[str, Any]) -> str:
    time = median(cell, "wall")
    return (
        "–"
        if not time
        else f"{number(row['batch'] / time * 1e6)} ({number(row['flops'][cell['peer']] / time / 1e3)} GFLOP/s)"
    )


def faster(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    found = ratio(median(cells["baseline"], "wall"), median(cells["ours"], "wall"))
    return f"{number(found)}×" if found else "–"


def matrix_rate(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    found = step_targets.matrix_share(document, row["name"])
    return f"{found:.0%}" if found else "–"


def step_waiting(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    shares = [cells[peer].get("waiting_share") for peer in ("ours", "baseline")]
    return " / ".join("–" if share is None else f"{share:.1%}" for share in shares)


def gain(name: str) -> Column:
    """Images per second with a switch alone, and how many times as many that is."""

    def column(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
        found = ratio(median(cells["none"], "wall"), median(cells[name], "wall"))
        return f"{images_per_second(row, cells[name])} ({number(found)}×)" if found else "–"

    return column


def switches_shape(row: dict[str, Any]) -> str:
    return f"{row['recipe']} at {row['resolution']}×{row['resolution']}, batch {row['batch']}"


def step_memory(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    peaks = [cells[peer]["peak_bytes"] for peer in ("ours", "baseline")]
    return " / ".join("–" if peak is None else f"{number(peak / 1e6)} MB" for peak in peaks)


def step_launches(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    return " / ".join(str(cells[peer]["launches"] or "–") for peer in ("ours", "baseline"))


OP_UNIT = "Forward and backward in µs, median: called from Python / replayed from a CUDA graph."

ABOUT_INFO_NCE = """\
Memory is what one call
needs beyond its inputs. The last column is the share of the matrix rate that this device reaches with torch."""

ABOUT_SPECTRAL_NORM = """\
Memory is what one call
needs beyond its inputs. Eager is torch's parametrization, the others are its older hook. The floor is what moving the
weights takes at the rate at which this device copies; the last column is the share of that rate that ours reaches, and
what stays in the cache may exceed it."""

ABOUT_PIPELINES = """\
All use the same cores, and
files come from the page cache. Waiting is the share of a training iteration on the GPU that goes into getting its
images; at 128×128 and above, the iteration is a stand-in, matrix products of as many FLOPs."""

ABOUT_STEP = """\
The baseline is the
authors' iteration in plain PyTorch: eager, float32, each step with passes of its own. An iteration's GFLOP are ours;
memory is the peak that torch reserved. "Waiting" is a lower bound of the share of time in which the GPU is idle,
because the profiler makes kernels slower."""

ABOUT_SWITCHES = """\
All of them do the same arithmetic. None is eager, float32, channels
first; then each switch alone, and all of them together, with how many times as many images."""

OP_SPEEDS: dict[str, Column] = {
    "ours": lambda document, row, cells: times(cells["ours"]),
    "eager": lambda document, row, cells: times(cells["eager"]),
    "`torch.compile`": lambda document, row, cells: times(cells["torch.compile"]),
    "fastest other": fastest_other,
}

KINDS = {
    "info_nce": Kind(
        OP_UNIT,
        ABOUT_INFO_NCE,
        info_nce_shape,
        MODE,
        OP_SPEEDS,
        {
            "memory, ours / eager": memory,
            "matrix rate": lambda document, row, cells: share(document, row, cells, row["dtype"]),
        },
    ),
    "spectral_norm": Kind(
        OP_UNIT,
        ABOUT_SPECTRAL_NORM,
        spectral_norm_shape,
        MODE,
        OP_SPEEDS,
        {
            "memory, ours / eager": memory,
            "launches, ours / eager": launches,
            "floor": byte_floor,
            "copy rate": lambda document, row, cells: share(document, row, cells, "copy"),
        },
    ),
    "pipelines": Kind(
        "Images per second that arrive on the device as training batches, median.",
        ABOUT_PIPELINES,
        pipelines_shape,
        pipelines_targets.MODE,
        {
            "ours": lambda document, row, cells: images_per_second(row, cells["ours"]),
            "`DataLoader`, Pillow": lambda document, row, cells: images_per_second(row, cells["dataloader"]),
            "`torchvision.io`": lambda document, row, cells: images_per_second(row, cells["torchvision.io"]),
            "`torchvision.io`, GPU": lambda document, row, cells: images_per_second(row, cells["torchvision gpu"]),
        },
        {"waiting, ours / `DataLoader`": waiting},
    ),
    "step": Kind(
        "Images per second that training takes, median, and what arithmetic it achieves.",
        ABOUT_STEP,
        step_shape,
        step_targets.MODE,
        {
            "ours": lambda document, row, cells: per_iteration(row, cells["ours"]),
            "baseline": lambda document, row, cells: per_iteration(row, cells["baseline"]),
            "faster": faster,
        },
        {
            "matrix rate": matrix_rate,
            "memory, ours / baseline": step_memory,
            "launches an iteration, ours / baseline": step_launches,
            "waiting at least, ours / baseline": step_waiting,
        },
    ),
    "switches": Kind(
        "Images per second that training takes, median.",
        ABOUT_SWITCHES,
        switches_shape,
        step_targets.MODE,
        {
            "none": lambda document, row, cells: images_per_second(row, cells["none"]),
            **{name: gain(name) for name in ("channels last", "bfloat16", "compile", "graphs")},
            "all": gain("ours"),
        },
        {},
    ),
}


def target_columns(target: dict[str, Any]) -> list[str]:
    measured = "–" if target["measured"] is None else number(target["measured"])
    against = f" ({target['against']})" if target["against"] else ""
    verdict = {True: "met", False: "missed", None: "not measured"}[target["met"]]
    return [f"{target['row']}: {target['what']}", f"≥ {number(target['required'])}", measured + against, verdict]


def number(x: float) -> str:
    """Three digits, or all before the point if they are more."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


if __name__ == "__main__":
    sys.exit(main())
