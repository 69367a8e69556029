"""Writes the committed results into the READMEs, between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import records
from targets import MODE, fastest_us, floor_us, median, ratio

READMES = (records.ROOT / "README.md", records.ROOT / "kernels" / "README.md")
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
    documents = [records.read(path) for path in sorted(folder.glob(f"*/{name}.json"))]
    measured = [document for document in documents if not document["rehearsal"]]
    return "\n".join(table(document) for document in measured) or NOTHING


class Kind(NamedTuple):
    """What one benchmark's tables have that others' do not.

    explanation: what follows "Memory is what one call".
    shape: of a row, after its name.
    columns: the last ones by heading, each from a document, its row and that row's cells by implementation.
    """

    explanation: str
    shape: Callable[[dict[str, Any]], str]
    columns: dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], str]]


def table(document: dict[str, Any]) -> str:
    kind = KINDS[document["benchmark"]]
    headings = ["", "ours", "eager", "`torch.compile`", "fastest other", "memory, ours / eager", *kind.columns]
    lines = [
        head(document),
        "",
        "Forward and backward in µs, median: called from Python / replayed from a CUDA graph. Memory is what one call",
        kind.explanation,
        "",
        f"|{' |'.join(f' {heading}' if heading else '' for heading in headings)} |",
        "|" + "---|" * len(headings),
    ]
    for row in document["rows"]:
        cells = {cell["peer"]: cell for cell in row["cells"] if cell["mode"] == MODE}
        other = fastest_other(cells)
        columns = [
            f"{row['name']}: {kind.shape(row)}",
            *(times(cells[peer]) for peer in ("ours", "eager", "torch.compile")),
            f"{times(cells[other])} ({other})" if other else "–",
            f"{memory(cells['ours'])} / {memory(cells['eager'])}",
            *(column(document, row, cells) for column in kind.columns.values()),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    lines += ["", "| target | required | measured | |", "|---|---|---|---|"]
    for target in document["targets"]:
        lines.append(f"| {' | '.join(target_columns(target))} |")
    return "\n".join(lines) + "\n"


def head(document: dict[str, Any]) -> str:
    """What measured, with what, when."""
    versions = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "Triton": "triton", "Python": "python"}
    commit = (document["commit"] or "unknown")[:12] + (" with uncommitted changes" if document["dirty"] else "")
    known = ", ".join(f"{name} {document[key]}" for name, key in versions.items() if document[key])
    return f"**{document['device']}**: {known}; {document['date'][:10]}, commit {commit}."


def info_nce_shape(row: dict[str, Any]) -> str:
    parts = [f"S {row['scales']}"] if row["scales"] > 1 else []
    parts += [f"B {row['batch']}", f"K {row['queue']}" if row["queue"] else "in-batch", f"D {row['dim']}"]
    return f"{', '.join(parts)}, {'symmetric, ' if row['symmetric'] else ''}{row['dtype']}"


def spectral_norm_shape(row: dict[str, Any]) -> str:
    largest = "×".join(map(str, row["largest"]))
    return f"{row['layers']} layers, {number(row['elements'] / 1e6)} M weights, the largest {largest}, {row['dtype']}"


def fastest_other(cells: dict[str, dict[str, Any]]) -> str | None:
    """Of a row's cells by implementation, the fastest besides ours, eager and compiled PyTorch."""
    others = [peer for peer in cells if peer not in ("ours", "eager", "torch.compile")]
    return min(((time, peer) for peer in others if (time := fastest_us(cells[peer]))), default=(0, None))[1]


def times(cell: dict[str, Any]) -> str:
    wall, graph = (number(time) if (time := median(cell, how)) else "–" for how in ("wall", "graph"))
    return "–" if wall == graph == "–" else f"{wall} / {graph}"


def memory(cell: dict[str, Any]) -> str:
    return "–" if cell["peak_bytes"] is None else f"{number(cell['peak_bytes'] / 1e6)} MB"


def launches(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    return " / ".join(str(cells[peer]["launches"] or "–") for peer in ("ours", "eager"))


def byte_floor(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any]) -> str:
    floor = floor_us(document, row["floors"][MODE], "copy")
    return number(floor) if floor else "–"


def share(document: dict[str, Any], row: dict[str, Any], cells: dict[str, Any], rate: str) -> str:
    """How much of a rate of the device ours reaches, backward too."""
    found = ratio(floor_us(document, row["floors"][MODE], rate), fastest_us(cells["ours"]))
    return f"{found:.0%}" if found else "–"


ABOUT_INFO_NCE = """\
needs beyond its inputs. The last column is the share of the matrix rate that this device reaches with torch."""

ABOUT_SPECTRAL_NORM = """\
needs beyond its inputs. Eager is torch's parametrization, the others are its older hook. The floor is what moving the
weights takes at the rate at which this device copies; the last column is the share of that rate that ours reaches, and
what stays in the cache may exceed it."""

KINDS = {
    "info_nce": Kind(
        ABOUT_INFO_NCE,
        info_nce_shape,
        {"matrix rate": lambda document, row, cells: share(document, row, cells, row["dtype"])},
    ),
    "spectral_norm": Kind(
        ABOUT_SPECTRAL_NORM,
        spectral_norm_shape,
        {
            "launches, ours / eager": launches,
            "floor": byte_floor,
            "copy rate": lambda document, row, cells: share(document, row, cells, "copy"),
        },
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
