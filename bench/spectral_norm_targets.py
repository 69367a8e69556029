"""What spectral norm is meant to reach on an H100, and whether a result file shows it. Imports no torch."""

from typing import Any

from targets import MODE, cells_of, floor_us, floors_of, median, ratio, target

# Implementation: how many times faster than it, called from Python, forward and backward.
FASTER_THAN = {"eager": 10, "torch.compile": 3}


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each target, all for the networks of DC-VAE."""
    cells = {mode: cells_of(document, mode) for mode in ("forward", MODE)}
    ours = median(cells[MODE]["dcvae", "ours"], "wall")
    found = []
    for peer, required in FASTER_THAN.items():
        faster = ratio(median(cells[MODE]["dcvae", peer], "wall"), ours)
        found.append(target(document, "dcvae", f"times faster than {peer}, called from Python", required, faster, peer))
    # Half of the rate is twice the least time.
    floor = floor_us(document, floors_of(document, "dcvae", "forward"), "copy")
    share = ratio(floor, median(cells["forward"]["dcvae", "ours"], "graph"))
    found.append(target(document, "dcvae", "share of the measured copy rate, forward, replayed", 0.5, share, None))
    return found
