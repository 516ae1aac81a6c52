"""``pmkvq report``: a timeline file as a picture and a few figures.

Three panels over one time axis: bytes of each tier, stacked, against the pool; effective bits per
element; events. matplotlib without a display.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_pmkvq.timeline import TIER_KEYS, Timeline, read_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dark to light as precision falls; told apart in grey print and by colour-blind readers too.
TIER_COLOURS = {"16": "#1d3557", "8": "#3f7cac", "4": "#86c5a4", "2": "#f2d479"}
POOL_COLOUR = "#c1121f"
BITS_COLOUR = "#1d3557"
EVENT_COLOURS = {"retract": "#c1121f", "evict": "#e07a1f", "flush": "#6a4c93"}
OTHER_EVENT_COLOUR = "#2a7f62"
GREY = "#666666"

# More points than pixels only make a thick line.
MAX_POINTS = 4000


@dataclass(frozen=True)
class Summary:
    """Figures of a timeline. Bytes are of mapped pages' blocks and of the arenas that hold them, bits per
    KV element.

    ``effective_bits_avg`` is weighted by time over rows with pages, not by tokens as the metric
    ``sglang:pmkvq_effective_bits_avg`` is.
    """

    seconds: float
    rows: int
    arena_bytes: int
    peak_block_bytes: int
    effective_bits_min: float | None
    effective_bits_avg: float | None
    shrinks: int
    peak_running: int
    events: dict[str, int]

    def text(self) -> str:
        def bits(value: float | None) -> str:
            return "n/a" if value is None else f"{value:.2f}"

        share = 100 * self.peak_block_bytes / self.arena_bytes if self.arena_bytes else 0.0
        lines = [
            f"time            {self.seconds:.1f} s, {self.rows} rows",
            f"arenas          {format_bytes(self.arena_bytes)}",
            f"peak blocks     {format_bytes(self.peak_block_bytes)} ({share:.0f} %)",
            f"effective bits  {bits(self.effective_bits_avg)} on average over time, "
            f"{bits(self.effective_bits_min)} at the lowest",
            f"shrinks         {self.shrinks}",
            f"peak running    {self.peak_running} requests",
        ]
        events = ", ".join(f"{count} {name}" for name, count in self.events.items())
        return "\n".join([*lines, f"events          {events or 'none'}"])


def format_bytes(count: float) -> str:
    """``1.5 GiB``: bytes in the largest binary unit that leaves at least 1."""
    scale, unit = byte_scale(count)
    return f"{count / scale:.0f} {unit}" if unit == "B" else f"{count / scale:.2f} {unit}"


def byte_scale(largest: float) -> tuple[int, str]:
    """(bytes per unit, unit) for an axis that reaches ``largest`` bytes."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return 1024**power, unit
    return 1, "B"


def summarize(timeline: Timeline) -> Summary:
    """The figures of a timeline with at least one row."""
    rows = timeline.rows
    t = np.array([row["t"] for row in rows], dtype=float)
    bits = _bits(rows)
    # A row holds until the next one; the last has no width.
    widths = np.append(np.diff(t), 0.0)
    known = ~np.isnan(bits)
    weight = widths[known].sum()
    average = None
    if known.any():
        average = float((bits[known] * widths[known]).sum() / weight) if weight else float(bits[known].mean())
    events: dict[str, int] = {}
    for event in timeline.events:
        events[event["event"]] = events.get(event["event"], 0) + int(event.get("count", 1))
    return Summary(
        seconds=float(t[-1] - t[0]),
        rows=len(rows),
        arena_bytes=int(max(row["arena_bytes"] for row in rows)),
        peak_block_bytes=int(max(sum(row["bytes"].values()) for row in rows)),
        effective_bits_min=float(bits[known].min()) if known.any() else None,
        effective_bits_avg=average,
        shrinks=int(max(row.get("shrinks", 0) for row in rows)),
        peak_running=int(max(row.get("running", 0) for row in rows)),
        events=events,
    )


def _bits(rows: list[dict[str, Any]]) -> np.ndarray:
    """float64 [rows], effective bits, NaN where no page is mapped."""
    values = [row.get("effective_bits") if sum(row["bytes"].values()) else None for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ``MAX_POINTS`` rows, evenly picked, the last one always among them."""
    if len(rows) <= MAX_POINTS:
        return rows
    picked = np.unique(np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int))
    return [rows[i] for i in picked]


def draw(timeline: Timeline, title: str = "") -> Figure:
    """The picture of a timeline: stacked bytes per tier, effective bits, and events if there are any."""
    from matplotlib.figure import Figure

    rows = _thin(timeline.rows)
    t = np.array([row["t"] for row in rows], dtype=float)
    names = list(dict.fromkeys(event["event"] for event in timeline.events))
    heights = [3.4, 1.5] + ([0.34 + 0.24 * len(names)] if names else [])
    figure = Figure(figsize=(10.5, 1.5 + sum(heights)), dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e3e3e3", linewidth=0.8)
        axis.set_axisbelow(True)
    _draw_bytes(axes[0], t, rows)
    _draw_bits(axes[1], t, rows)
    if names:
        _draw_events(axes[2], timeline.events, names)
    end = max([t[-1]] + [event["t"] for event in timeline.events])
    axes[0].set_xlim(t[0], end if end > t[0] else t[0] + 1.0)
    axes[-1].set_xlabel("time since start (s)")
    axes[0].set_title(title or "PM-KVQ pool over time", loc="left", fontsize=12, fontweight="bold", pad=26)
    subtitle = _subtitle(timeline.header)
    if subtitle:
        axes[0].text(0, 1.025, subtitle, transform=axes[0].transAxes, color=GREY, fontsize=9, va="bottom")
    figure.align_ylabels(axes)
    return figure


def _subtitle(header: dict[str, Any]) -> str:
    known = (
        ("model", "{}"),
        ("final_bits", "final bits {}"),
        ("policy", "policy {}"),
        ("window", "window {} tokens"),
        ("logical_tokens", "{:,} logical tokens"),
    )
    groups = header.get("groups")
    if "final_bits" not in header and isinstance(groups, list):
        names = [f"k{group['k_final']}v{group['v_final']}" for group in groups]
        header = {**header, "final_bits": "+".join(names)}
    parts = []
    for key, form in known:
        value = header.get(key)
        if value is not None:
            if key == "model":
                value = "/".join(str(value).rstrip("/").split("/")[-2:])
            elif key == "logical_tokens":
                value = int(value)
            parts.append(form.format(value))
    return "  ·  ".join(parts)


def _draw_bytes(axis: Axes, t: np.ndarray, rows: list[dict[str, Any]]) -> None:
    pool = np.array([row["arena_bytes"] for row in rows], dtype=float)
    tiers = np.array([[row["bytes"][key] for row in rows] for key in TIER_KEYS], dtype=float)
    scale, unit = byte_scale(max(pool.max(), tiers.sum(0).max(), 1.0))
    # Lowest precision at the bottom: what stays longest is the base that the rest stands on.
    order = TIER_KEYS[::-1]
    areas = axis.stackplot(
        t,
        tiers[::-1] / scale,
        colors=[TIER_COLOURS[key] for key in order],
        labels=[f"{key} bits" for key in order],
        linewidth=0,
    )
    (line,) = axis.plot(t, pool / scale, color=POOL_COLOUR, linewidth=1.6, linestyle=(0, (5, 2)), label="pool")
    axis.set_ylabel(f"KV blocks ({unit})")
    axis.set_ylim(0, max(pool.max(), tiers.sum(0).max()) / scale * 1.06 or 1.0)
    present = [area for area, seen in zip(areas, tiers[::-1].sum(axis=1), strict=True) if seen]
    handles = [*reversed(present), line]
    axis.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _draw_bits(axis: Axes, t: np.ndarray, rows: list[dict[str, Any]]) -> None:
    axis.plot(t, _bits(rows), color=BITS_COLOUR, linewidth=1.7)
    axis.set_ylabel("effective bits")
    # log2: halving the width is the same step everywhere, and 2 and 4 bits stay apart.
    axis.set_yscale("log", base=2)
    axis.set_ylim(1.8, 18)
    axis.set_yticks([2, 4, 8, 16], labels=["2", "4", "8", "16"])
    axis.minorticks_off()


def _draw_events(axis: Axes, events: list[dict[str, Any]], names: list[str]) -> None:
    for row, name in enumerate(names):
        chosen = [event for event in events if event["event"] == name]
        count = sum(int(event.get("count", 1)) for event in chosen)
        axis.plot(
            [event["t"] for event in chosen],
            [row] * len(chosen),
            linestyle="none",
            marker="|",
            markersize=10,
            markeredgewidth=1.4,
            color=EVENT_COLOURS.get(name, OTHER_EVENT_COLOUR),
        )
        axis.annotate(
            f"{count:,}×",
            (1.0, row),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=GREY,
        )
    axis.set_yticks(range(len(names)), labels=names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False)
    axis.set_ylabel("events")


def write_report(path: str, out: str | None = None) -> tuple[str, Summary]:
    """Draw the timeline at ``path`` into ``out`` (default: beside it, ``.png``).

    Returns:
        The path written, and the figures.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: ``path`` is not a timeline, or ``out`` is no picture format.
    """
    timeline = read_timeline(path)
    target = out if out is not None else os.path.splitext(path)[0] + ".png"
    if os.path.abspath(target) == os.path.abspath(path):
        raise ValueError(f"the picture would overwrite the timeline {path}; give another --out")
    draw(timeline, title=f"KV pool over time: {os.path.basename(path)}").savefig(target)
    return target, summarize(timeline)
