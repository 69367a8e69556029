"""What InfoNCE is meant to reach on an H100, and whether a result file shows it. Imports no torch."""

from typing import Any

MODE = "forward_backward"
# Row: how many times faster than whoever else is fastest in it.
FASTER_THAN_BEST = {
    "dcvae": 5,
    "large": 1.5,
    "moco-fp32": 1.5,
    "moco-bf16": 1.5,
    "simclr-fp32": 1.5,
    "simclr-bf16": 1.5,
}


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each target: row, what, required, measured, against, met; all for forward and backward together.

    Times are those of a graph's replay; an implementation that cannot be captured competes with its time in eager mode.
    `met` and `measured` are None where a measurement is missing, and in a rehearsal, whose shapes are not the rows'.
    """
    cells = {(row["name"], c["peer"]): c for row in document["rows"] for c in row["cells"] if c["mode"] == MODE}
    flops = {row["name"]: row["floors"][MODE]["flops"] for row in document["rows"]}
    found = []

    def target(row: str, what: str, required: float, measured: float | None, against: str | None) -> None:
        if document["rehearsal"]:
            measured = against = None
        met = None if measured is None else measured >= required
        measured = measured and float(f"{measured:.3g}")
        entry = {"row": row, "what": what, "required": required, "measured": measured, "against": against, "met": met}
        found.append(entry)

    for row, required in FASTER_THAN_BEST.items():
        peers = [peer for name, peer in cells if name == row and peer != "ours"]
        timed = [(time, peer) for peer in peers if (time := fastest_us(cells[row, peer]))]
        time, peer = min(timed, default=(None, None))
        ratio = _ratio(time, median(cells[row, "ours"], "graph"))
        target(row, "times faster than the fastest other, replayed", required, ratio, peer)
    target(
        "dcvae",
        "times faster than eager, called from Python",
        10,
        _ratio(median(cells["dcvae", "eager"], "wall"), median(cells["dcvae", "ours"], "wall")),
        "eager",
    )
    rate = (document["device_rates"] or {}).get("bfloat16")
    seconds = (median(cells["large", "ours"], "graph") or 0) / 1e6
    share = flops["large"] / seconds / 1e12 / rate if rate and seconds else None
    target("large", "share of the measured bfloat16 matrix rate", 0.5, share, None)
    target(
        "large",
        "times less extra memory than eager",
        100,
        _ratio(cells["large", "eager"]["peak_bytes"], cells["large", "ours"]["peak_bytes"]),
        "eager",
    )
    target(
        "clip",
        "times faster than inf_cl, replayed",
        3,
        _ratio(fastest_us(cells["clip", "inf_cl"]), median(cells["clip", "ours"], "graph")),
        "inf_cl",
    )
    return found


def median(cell: dict[str, Any], how: str) -> float | None:
    """A cell's median in µs; `how` is "wall", called from Python, or "graph", replayed."""
    return cell[how] and cell[how]["median_us"]


def fastest_us(cell: dict[str, Any]) -> float | None:
    """Replayed or called from Python, whichever is faster."""
    return min((time for how in ("graph", "wall") if (time := median(cell, how))), default=None)


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None
