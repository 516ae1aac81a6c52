"""Variants that ``benchmarks/calibration.py`` measures, and its rows as tables; neither models nor servers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.accuracy import bootstrap
from benchmarks.result import markdown, wilson


@dataclass(frozen=True)
class Variant:
    """One way to choose final widths and what is done to keys.

    Attributes:
        name: of the row.
        target: mean final width that allocation gets; "" for a fixed width.
        final: fixed final width, as ``--pmkvq-final-bits`` takes it.
        transform: ``none``, ``scale`` or ``hadamard``.
        clip: whether ranges of keys are clipped at 2 bits.
        sensitivity: what allocation minimizes.
    """

    name: str
    target: str = ""
    final: str = ""
    transform: str = "none"
    clip: bool = False
    sensitivity: str = "kl"


def _four(target: str, uniform: str) -> tuple[Variant, ...]:
    return (
        Variant(f"uniform {uniform}", final=uniform),
        Variant(f"allocation alone, {target}", target=target),
        Variant(f"reparameterization alone, {uniform}", final=uniform, transform="scale"),
        Variant(f"both, {target}", target=target, transform="scale"),
    )


def _clipped(target: str, uniform: str) -> tuple[Variant, ...]:
    return (
        Variant(f"reparameterization and clipping, {uniform}", final=uniform, transform="scale", clip=True),
        Variant(f"both and clipping, {target}", target=target, transform="scale", clip=True),
    )


def _rotated(target: str, uniform: str) -> tuple[Variant, ...]:
    return (
        Variant(f"hadamard and clipping, {uniform}", final=uniform, transform="hadamard", clip=True),
        Variant(f"both, hadamard and clipping, {target}", target=target, transform="hadamard", clip=True),
    )


SIXTEEN = Variant("16 bits", final="16")
FORCED = (
    SIXTEEN,
    *_four("4", "4"),
    Variant("K4 V2", final="k4v2"),
    Variant("K2 V4", final="k2v4"),
    Variant("both, 3", target="3", transform="scale"),
    *_four("2.5", "2"),
    *_clipped("2.5", "2"),
    Variant("allocation by Taylor, 2.5", target="2.5", sensitivity="taylor"),
    Variant("both by Taylor, 2.5", target="2.5", transform="scale", sensitivity="taylor"),
    *_rotated("2.5", "2"),
)
# Per group of rows with the same pool: bytes as a share of what the running problems need at 16 bits. A full pool
# of the widest row (4 or 2.5 bits, scales, zeros, the 16-bit reserve) just fits.
SERVED: tuple[tuple[float | None, tuple[Variant, ...]], ...] = (
    (None, (SIXTEEN,)),
    (0.33, _four("4", "4")),
    (0.22, (*_four("2.5", "2"), *_clipped("2.5", "2"), *_rotated("2.5", "2"))),
)


def table(result: dict[str, Any]) -> str:
    """Rows as Markdown, seeds pooled; differences are paired by problem, in points, with bootstrap intervals."""
    parts = (served(result), forced(result))
    return "\n".join(part for part in parts if part)


Rows = Sequence[dict[str, Any]]


def _rows(result: dict[str, Any], part: str) -> dict[str, Rows]:
    """Rows of a part by name, in the order of the variants, each in the order of its seeds."""
    order = [v.name for v in (FORCED if part == "forced" else [v for _, some in SERVED for v in some])]
    rows = sorted((r for r in result["rows"] if r["part"] == part), key=lambda r: (order.index(r["row"]), r["seed"]))
    return {name: [r for r in rows if r["row"] == name] for name in dict.fromkeys(r["row"] for r in rows)}


def outcomes(rows: Rows) -> dict[tuple[int, int], bool]:
    """Whether the answer was right, by seed and problem."""
    return {(r["seed"], i): i not in r["wrong"] for r in rows for i in range(r["problems"])}


def against(rows: Rows, other: Rows) -> str:
    """Points by which ``rows`` are better than ``other`` on the problems that both answered."""
    a, b = outcomes(rows), outcomes(other)
    difference = np.array([100.0 * (a[k] - b[k]) for k in sorted(a.keys() & b.keys())])
    low, high = bootstrap(difference)
    return f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def _right(name: str, rows: Rows, count: str) -> list[str]:
    n, right = sum(r["problems"] for r in rows), sum(r[count] for r in rows)
    low, high = wilson(right, n)
    size = f"{len(rows)} x {rows[0]['problems']}"
    return [name, size, f"{right} ({100 * right / n:.1f} %)", f"{100 * low:.1f} to {100 * high:.1f}"]


def served(result: dict[str, Any]) -> str:
    """The rows of real servers; docs/calibration.md has them too."""
    by = _rows(result, "served")
    names = ["served", "seeds x problems", "right", "95 %", "points against uniform", "against 16 bits"]
    lines = []
    for name, rows in by.items():
        same = [k for k in by if by[k][0]["share"] == rows[0]["share"] and k.startswith("uniform")]
        cells = _right(name, rows, "right")
        for other in (*(same or [""]), SIXTEEN.name):
            cells.append(against(rows, by[other]) if other in by and other != name else "-")
        pools = [r["pool_bytes"] / 2**20 for r in rows]
        bits = sum(r["pool"]["effective_bits_avg"] for r in rows) / len(rows)
        lines.append([*cells, f"{min(pools):.1f} to {max(pools):.1f}", f"{bits:.2f}"])
    return _table([*names, "pool MiB", "bits, mean"], lines)


def forced(result: dict[str, Any]) -> str:
    """The rows along gold chains; docs/calibration.md has them too."""
    lines = []
    for name, rows in _rows(result, "forced").items():
        kl = sum(r["kl_mean"] * r["steps"] for r in rows) / sum(r["steps"] for r in rows)
        # Chains are the independent units; the seeds' errors add in squares.
        chains = sum(r["chains"] for r in rows)
        error = math.sqrt(sum((r["kl_mean_standard_error"] * r["chains"] / chains) ** 2 for r in rows))
        lines.append([*_right(name, rows, "chains_right"), f"{kl:.2e} ± {error:.1e}"])
    return _table(["forced", "seeds x chains", "whole chains right", "95 %", "KL ± s.e., nats per step"], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return markdown(head, lines) + "\n" if lines else ""
