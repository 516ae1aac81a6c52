"""Pictures, readable at page width.

Colours are those of Okabe and Ito, "Color Universal Design" (2008), told apart by colour-blind readers, without yellow,
which is too light for lines; every line and point has a marker of its own too.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float = 8.0, height: float = 4.2, columns: int = 1, **axes: Any) -> tuple[Figure, list[Any]]:
    """A figure with one row of ``columns`` axes."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    made = list(figure.subplots(1, columns, squeeze=False, **axes)[0])
    for axis in made:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e3e3e3", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, made


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the series number ``index``."""
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def line(index: int) -> dict[str, Any]:
    """The same with the width of a line."""
    return {**style(index), "linewidth": 1.6, "markersize": 5}


def log2_axis(axis: Any, ticks: list[int]) -> None:
    """A logarithmic x axis with these ticks only."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, labels=list(map(str, ticks)))
    axis.minorticks_off()
