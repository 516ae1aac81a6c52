"""Rows of the benchmark of rotations and clipping, and its result file as a table; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.result import wilson

RESAMPLES = 2_000


@dataclass(frozen=True)
class Row:
    """Final widths by name, the map of K and of V, and where ranges are clipped for 2 bits ("" nowhere).

    ``keys``: only ranges of keys are clipped, as the product does.
    ``read_bits``: width that is read, where it is not the final one: what clipping for 2 bits costs before.
    """

    plan: str
    k: str
    v: str
    clip: str = ""
    read_bits: int = 0
    keys: bool = False

    @property
    def clipped(self) -> str:
        """Where and what is clipped, for people."""
        return f"{self.clip or 'none'}{' of K' if self.keys else ''}"

    @property
    def name(self) -> str:
        read = f", read at {self.read_bits} bits" if self.read_bits else ""
        return f"{self.plan}: K {self.k}, V {self.v}, clip {self.clipped}{read}"

    def finals(self, layers: int) -> tuple[tuple[int, int], ...]:
        """Widths that α and clip factors are searched for."""
        # Where 2-bit keys break lookups, by an order of magnitude more than anywhere else (docs/calibration.md).
        fragile = {0, 2}
        return {
            "k2": ((2, 16),) * layers,
            "v2": ((16, 2),) * layers,
            "k2v2": ((2, 2),) * layers,
            "k4v4": ((4, 4),) * layers,
            "mixed": tuple((4 if layer in fragile else 2, 2) for layer in range(layers)),
        }[self.plan]


K_MAPS = (
    "none", "scale", "hadamard", "scale, hadamard", "eigen", "eigen, scale", "eigen, hadamard",
    "eigen, scale, hadamard", "eigen of queries, hadamard", "balanced, hadamard",
)  # fmt: skip
V_MAPS = ("none", "hadamard", "eigen", "eigen, hadamard")
JOINT = (
    ("none", "none"), ("scale", "none"), ("hadamard", "none"), ("scale", "hadamard"), ("hadamard", "hadamard"),
    ("balanced, hadamard", "none"),
)  # fmt: skip


def rows() -> Iterator[Row]:
    """Every row, the same ones for every seed."""
    for clip in ("", "last"):
        for k in K_MAPS:
            yield Row("k2", k, "none", clip)
        for v in V_MAPS:
            yield Row("v2", "none", v, clip)
        for plan in ("k2v2", "mixed"):
            for k, v in JOINT:
                yield Row(plan, k, v, clip)
    for plan in ("k2v2", "mixed"):
        yield Row(plan, "scale", "none", "last", keys=True)
    for k, v in JOINT:
        yield Row("k4v4", k, v)
    yield Row("k4v4", "scale", "none", "first")
    for k in ("none", "scale", "hadamard"):
        yield Row("k2", k, "none", "first")
    yield Row("v2", "none", "none", "first")
    # What a page at 8 or 4 bits loses because it will be clipped for 2.
    for clip in ("", "first"):
        for read in (4, 8):
            yield Row("k2", "scale", "none", clip, read)
            yield Row("v2", "none", "none", clip, read)


def table(result: dict[str, Any]) -> str:
    """Rows as Markdown, seeds pooled, each beside its plan's key scales with the same clipping, and itself unclipped.

    Layer error: geometric mean over layers and seeds. KL: mean over chains. The ratios are of mean and of geometric
    mean over chains: a few broken lookups decide the first, the usual step the second.
    """
    known = {row.name: row for row in rows()}
    pooled: dict[Row, dict[int, dict[str, Any]]] = {}
    for measured in result["rows"]:
        if measured["row"] in known:
            pooled.setdefault(known[measured["row"]], {})[measured["seed"]] = measured
    head = ("widths", "K", "V", "clip", "layer error", "KL", "chains right")
    head += ("KL / key scales", "usual", "KL / unclipped", "usual")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, got in pooled.items():
        scales = pooled.get(replace(row, k="none" if row.plan == "v2" else "scale", v="none"))
        whole = pooled.get(replace(row, clip="", keys=False))
        error = math.exp(np.log(np.maximum(_pool(got, "error"), 1e-12)).mean())
        n, right = len(_pool(got, "right")), int(_pool(got, "right").sum())
        low, high = (round(100 * x) for x in wilson(right, n))
        plan = row.plan + (f" read at {row.read_bits}" if row.read_bits else "")
        cells = [plan, row.k, row.v, row.clipped if row.clip else "-", f"{error:.2e}", f"{_pool(got, 'kl').mean():.1e}"]
        cells += [f"{right} of {n} ({low}-{high} %)", *_ratios(got, scales), *_ratios(got, whole if row.clip else None)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pool(seeds: dict[int, dict[str, Any]], name: str, only: Sequence[int] | None = None) -> np.ndarray:
    """One figure of a row over its seeds in order."""
    return np.concatenate([seeds[s][name] for s in sorted(seeds if only is None else only)])


def _ratios(row: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]] | None) -> tuple[str, str]:
    """Ratio of the mean KL and of its geometric mean over the chains that both rows have, with 95 % intervals."""
    common = [] if base is None or base is row else sorted(set(row) & set(base))
    if base is None or not common:
        return "-", "-"
    a, b = _pool(row, "kl", common), _pool(base, "kl", common)
    step = np.log(np.maximum(a, 1e-12)) - np.log(np.maximum(b, 1e-12))
    mean = _bootstrap(lambda pick: a[pick].mean(-1) / b[pick].mean(-1), len(a))
    usual = np.exp(_bootstrap(lambda pick: step[pick].mean(-1), len(a)))
    return (
        f"{a.mean() / b.mean():.2f} ({mean[0]:.2f}-{mean[1]:.2f})",
        f"{math.exp(step.mean()):.2f} ({usual[0]:.2f}-{usual[1]:.2f})",
    )


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> tuple[float, float]:
    """95 % percentile interval over ``RESAMPLES`` draws of ``count`` chains."""
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.quantile(statistic(picks), [0.025, 0.975])
    return float(low), float(high)
