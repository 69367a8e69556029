"""What training iterations are meant to reach, and whether a result file shows it. Imports no torch."""

from typing import Any

from targets import cells_of, median, ratio, target

MODE = "iteration"
# Times faster than the baseline, on a CPU and beside an H100; and the share of its matrix rate.
ON_CPU = {"cifar10-8": 1.35}
FASTER = {"cifar10-64": 6, "faces512": 3}
MATRIX_RATE = {"cifar10-256": 0.4, "faces512": 0.3}


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each target of this kind of device."""
    cells, on_cpu = cells_of(document, MODE), document["device"] == "cpu"
    found = []
    for name, required in (ON_CPU if on_cpu else FASTER).items():
        ours, plain = (median(cells[name, peer], "wall") for peer in ("ours", "baseline"))
        found.append(target(document, name, "times faster than the baseline", required, ratio(plain, ours), "baseline"))
    for name, required in ({} if on_cpu else MATRIX_RATE).items():
        found.append(target(document, name, "share of the matrix rate", required, matrix_share(document, name), None))
    return found


def matrix_share(document: dict[str, Any], name: str, peer: str = "ours") -> float | None:
    """FLOPs a second over what the device reaches in bfloat16 matrix products; None where either is unknown."""
    (row,) = (row for row in document["rows"] if row["name"] == name)
    time, rates = median(cells_of(document, MODE)[name, peer], "wall"), document["device_rates"]
    return row["flops"][peer] / time / 1e6 / rates["bfloat16"] if time and rates else None
