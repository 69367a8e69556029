"""Targets, and the times in a result file that they are about. Imports no torch."""

from typing import Any

MODE = "forward_backward"
# Reasons of cells without a time that another run may measure.
UNMEASURED = ("no time left", "not run")


def target(
    document: dict[str, Any], row: str, what: str, required: float, measured: float | None, against: str | None
) -> dict[str, Any]:
    """A result file's entry for a target: row, what, required, measured, against, met.

    `met` and `measured` are None where a measurement is missing, and in a rehearsal, whose shapes are not the rows'.
    """
    if document["rehearsal"]:
        measured = against = None
    met = None if measured is None else measured >= required
    measured = measured and float(f"{measured:.3g}")
    return {"row": row, "what": what, "required": required, "measured": measured, "against": against, "met": met}


def cells_of(document: dict[str, Any], mode: str = MODE) -> dict[tuple[str, str], dict[str, Any]]:
    """A mode's cells by row and implementation."""
    return {(row["name"], c["peer"]): c for row in document["rows"] for c in row["cells"] if c["mode"] == mode}


def floors_of(document: dict[str, Any], row: str, mode: str = MODE) -> dict[str, int]:
    return next(r["floors"][mode] for r in document["rows"] if r["name"] == row)


def measured(cell: dict[str, Any]) -> bool:
    """Return whether the cell has both times, or final reasons for missing ones."""
    return cell["reason"] not in UNMEASURED and cell["graph_reason"] not in UNMEASURED


def median(cell: dict[str, Any], how: str) -> float | None:
    """A cell's median in µs; `how` is "wall", called from Python, or "graph", replayed."""
    return cell[how] and cell[how]["median_us"]


def fastest_us(cell: dict[str, Any]) -> float | None:
    """Replayed or called from Python, whichever is faster."""
    return min((time for how in ("graph", "wall") if (time := median(cell, how))), default=None)


def ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def floor_us(document: dict[str, Any], floors: dict[str, int], rate: str) -> float | None:
    """The least time in µs at a rate that was measured on the device: of "copy" for the bytes, of a dtype's matrix
    products for the FLOPs. None where no rate was."""
    measured = (document["device_rates"] or {}).get(rate)
    if not measured:
        return None
    return floors["bytes"] / measured / 1e3 if rate == "copy" else floors["flops"] / measured / 1e6
