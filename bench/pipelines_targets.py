"""What sources of data are meant to reach, and whether a result file shows it. Imports no torch."""

from typing import Any

from targets import cells_of, median, ratio, target

MODE = "batches"
# On a CPU, and beside an H100: cores, and how many times faster than the DataLoader encoded images arrive on them.
ENCODED = {"cpu": (2, 1.5), "gpu": (16, 5)}
RESIDENT = 20
WAITING = 0.02


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each target of this kind of device; what is asked of a number of cores is judged on that many."""
    cells = cells_of(document, MODE)
    on_cpu = document["device"] == "cpu"
    cores, required = ENCODED["cpu" if on_cpu else "gpu"]
    found = []
    for row in document["rows"]:
        name, resident = row["name"], row["images"] == "cifar10"
        ours, theirs = (median(cells[name, peer], "wall") for peer in ("ours", "dataloader"))
        faster = ratio(theirs, ours)
        if resident:
            found.append(target(document, name, "times faster than the DataLoader", RESIDENT, faster, "dataloader"))
        else:
            what = f"times faster than the DataLoader, on {cores} cores"
            measured = faster if row["cores"] == cores else None
            found.append(target(document, name, what, required, measured, "dataloader"))
        if not on_cpu:
            waiting = cells[name, "ours"].get("waiting_share")
            what = "share of an iteration that is not waiting for data"
            what += ", simulated" if row["iteration"].startswith("simulated") else ""
            found.append(target(document, name, what, 1 - WAITING, None if waiting is None else 1 - waiting, None))
    return found
