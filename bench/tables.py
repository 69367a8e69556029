"""Writes the committed results into the READMEs, between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
from info_nce_targets import MODE, fastest_us, median

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
    return "\n".join(TABLES[name](document) for document in measured) or NOTHING


def info_nce(document: dict[str, Any]) -> str:
    lines = [
        head(document),
        "",
        "Forward and backward in µs, median: called from Python / replayed from a CUDA graph. Memory is what one call",
        "needs beyond its inputs. The last column is the share of the matrix rate that this device reaches with torch.",
        "",
        "| | ours | eager | `torch.compile` | fastest other | memory, ours / eager | matrix rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cells = {cell["peer"]: cell for cell in row["cells"] if cell["mode"] == MODE}
        other = fastest_other(cells)
        columns = [
            shape(row),
            *(times(cells[peer]) for peer in ("ours", "eager", "torch.compile")),
            f"{times(cells[other])} ({other})" if other else "–",
            f"{memory(cells['ours'])} / {memory(cells['eager'])}",
            matrix_share(document, row, cells["ours"]),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    lines += ["", "| target | required | measured | |", "|---|---|---|---|"]
    for target in document["targets"]:
        lines.append(f"| {' | '.join(target_columns(target))} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"info_nce": info_nce}


def head(document: dict[str, Any]) -> str:
    """What measured, with what, when."""
    versions = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "Triton": "triton", "Python": "python"}
    commit = (document["commit"] or "unknown")[:12] + (" with uncommitted changes" if document["dirty"] else "")
    known = ", ".join(f"{name} {document[key]}" for name, key in versions.items() if document[key])
    return f"**{document['device']}**: {known}; {document['date'][:10]}, commit {commit}."


def shape(row: dict[str, Any]) -> str:
    parts = [f"S {row['scales']}"] if row["scales"] > 1 else []
    parts += [f"B {row['batch']}", f"K {row['queue']}" if row["queue"] else "in-batch", f"D {row['dim']}"]
    return f"{row['name']}: {', '.join(parts)}, {'symmetric, ' if row['symmetric'] else ''}{row['dtype']}"


def fastest_other(cells: dict[str, dict[str, Any]]) -> str | None:
    """Of a row's cells by implementation, the fastest besides ours, eager and compiled PyTorch."""
    others = [peer for peer in cells if peer not in ("ours", "eager", "torch.compile")]
    return min(((time, peer) for peer in others if (time := fastest_us(cells[peer]))), default=(0, None))[1]


def times(cell: dict[str, Any]) -> str:
    wall, graph = (number(time) if (time := median(cell, how)) else "–" for how in ("wall", "graph"))
    return "–" if wall == graph == "–" else f"{wall} / {graph}"


def memory(cell: dict[str, Any]) -> str:
    return "–" if cell["peak_bytes"] is None else f"{number(cell['peak_bytes'] / 1e6)} MB"


def matrix_share(document: dict[str, Any], row: dict[str, Any], cell: dict[str, Any]) -> str:
    time, rate = fastest_us(cell), (document["device_rates"] or {}).get(row["dtype"])
    return f"{row['floors'][MODE]['flops'] / time / 1e6 / rate:.0%}" if time and rate else "–"


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
