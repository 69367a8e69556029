"""Result files: where they are, what they hold, and the numbers derived from them. Imports no torch.

A file holds the device, versions, date and commit, and for each row (one problem) a cell for each implementation and
mode: `wall` is the time of a call from Python and `graph` that of a replay from a CUDA graph, as median and quartiles
in µs. `reason` and `graph_reason` say why a time is missing. Files without the field `timer` were measured by CUDA
events on a GPU and by `time.perf_counter` on a CPU, with a warm cache.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

Document = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "bench" / "results"
DESCRIBE = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
COMMIT_VARIABLE = "DCVAE_COMMIT"  # the commit, with "-dirty" if files changed, on a machine without the repository
REHEARSAL_VARIABLE = "DCVAE_REHEARSAL"  # set in runs on a CPU that only show that everything works: small shapes
# Reasons of cells that another run may measure.
UNMEASURED = NO_TIME, NOT_RUN = "no time left", "not run"
# Modes that tables and targets are about; each benchmark has one of them.
MAIN_MODES = ("forward_backward", "iteration", "batches")


def path_of(folder: Path, document: Document) -> Path:
    """Return FOLDER/<device>/<benchmark>.json."""
    device = re.sub(r"[^a-z0-9]+", "-", document["device"].lower()).strip("-")
    return folder / device / f"{document['benchmark']}.json"


def write(path: Path, document: Document) -> None:
    from dcvae_pipelines.atomic import atomic_write  # its package imports torch

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read(path: Path) -> Document:
    return json.loads(path.read_text(encoding="utf-8"))


def environment(packages: Iterable[str] = ()) -> Document:
    """Return device, versions (None for packages that are not installed), date and commit."""
    import torch

    on_gpu = torch.cuda.is_available()
    commit = os.environ.get(COMMIT_VARIABLE) or first_line(*DESCRIBE)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpu": cpu_model(),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit and commit.removesuffix("-dirty"),
        "dirty": commit and commit.endswith("-dirty"),
    }


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def first_line(*command: str) -> str | None:
    """Return the first line that the command prints, or None if it fails or prints nothing."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip().partition("\n")[0] or None if result.returncode == 0 else None


# --- derived numbers ---


def cells_of(row: Document, mode: str | None = None) -> dict[str, Document]:
    """Return a row's cells by implementation; the default mode is the benchmark's main one."""
    return {c["peer"]: c for c in row["cells"] if (c["mode"] == mode if mode else c["mode"] in MAIN_MODES)}


def median(cell: Document, timing: str) -> float | None:
    """Return the median in µs of `timing`: "wall", "graph", or "fastest", the smaller of them."""
    if timing == "fastest":
        return min(filter(None, (median(cell, "wall"), median(cell, "graph"))), default=None)
    return cell[timing]["median_us"] if cell.get(timing) else None


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def floor_us(document: Document, row: Document, rate: str, mode: str = "forward_backward") -> float | None:
    """Return the least time in µs at a rate measured on the device: "copy", or the matrix products of a dtype."""
    speed = (document["device_rates"] or {}).get(rate)
    if not speed:
        return None
    if rate == "copy":
        return row["floors"][mode]["bytes"] / speed / 1e3
    return (row["flops"]["ours"] if "flops" in row else row["floors"][mode]["flops"]) / speed / 1e6


# --- targets ---


OURS = ("ours", "ours compiled")  # our implementations; all others are rivals


class Target(NamedTuple):
    """A number that our implementation must reach in a row.

    Attributes:
        what: describes the quantity, after the row's name
        required: smallest allowed value
        quantity: "speed" or "memory", as a multiple of an implementation's; "rate", as a share of the device's; "busy",
            the share of an iteration that is not waiting for data
        against: implementation, "others" for the fastest one, or rate
        ours: which of our implementations
        timing: of ours; implementations without a time from a graph compete with their time from Python
    """

    what: str
    required: float
    quantity: str = "speed"
    against: str = "eager"
    timing: str = "wall"
    mode: str | None = None
    ours: str = "ours"


def measured(target: Target, document: Document, row: Document) -> tuple[float | None, str | None]:
    """Return a target's quantity, None if it was not measured, and the implementation that ours is compared with."""
    cells = cells_of(row, target.mode)
    ours, peer = cells.get(target.ours), target.against
    if ours is None:  # older results do not have it
        return None, None
    cells = {name: cell for name, cell in cells.items() if name not in OURS}
    if target.quantity == "busy":
        share = ours.get("waiting_share")
        return None if share is None else 1 - share, None
    if target.quantity == "rate":
        floor = floor_us(document, row, peer, target.mode or "forward_backward")
        return ratio(floor, median(ours, target.timing)), None
    if target.quantity == "memory":
        return ratio(cells[peer]["peak_bytes"], ours["peak_bytes"]), peer
    rivals = cells if peer == "others" else {peer: cells[peer]}
    # Another run may measure a rival that is faster than those measured so far.
    final = all({cell["reason"], cell["graph_reason"]}.isdisjoint(UNMEASURED) for cell in rivals.values())
    timing = "fastest" if target.timing == "graph" else "wall"
    times = [(time, name) for name, cell in rivals.items() if (time := median(cell, timing))]
    time, peer = min(times) if times and final else (None, None if peer == "others" else peer)
    return ratio(time, median(ours, target.timing)), peer


def target_entries(document: Document, targets: Mapping[str, Sequence[Target]]) -> list[Document]:
    """Return a result file's entries for targets by row. In a rehearsal nothing counts as measured."""
    entries = []
    for row in document["rows"]:
        for target in targets[row["name"]]:
            value, peer = measured(target, document, row)
            value = None if value is None or document["rehearsal"] else float(f"{value:.3g}")
            entry = {"row": row["name"], "what": target.what, "required": target.required, "measured": value}
            entries.append({**entry, "against": peer, "met": None if value is None else value >= target.required})
    return entries
