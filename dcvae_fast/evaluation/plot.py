"""Curves, as a PNG file (the only file that imports matplotlib)."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_curves(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, across: str, up: str
) -> None:
    """Draw curves over the same axis, a dot at the end of each, dark to light as they come.

    Args:
        path: the file.
        curves: x and y by name.
        title, across, up: above the drawing, and along its axes, with units.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(curves.items()):
        colour = colormaps["viridis"](0.9 * number / max(1, len(curves) - 1))
        axes.plot(x, y, label=name, color=colour, linewidth=2, marker="o", markevery=[-1] if len(y) else None)
    axes.set_title(title, wrap=True)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend()
    aside = path.with_name(path.name + ".tmp")
    figure.savefig(aside, format="png", dpi=150)
    aside.replace(path)
