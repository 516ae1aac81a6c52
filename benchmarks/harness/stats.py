"""Intervals and medians."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson score); (0, 1) for no trials."""
    from scipy.stats import binomtest

    if not trials:
        return 0.0, 1.0
    found = binomtest(hits, trials).proportion_ci(method="wilson")
    return round(float(found.low), 4), round(float(found.high), 4)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` [n], drawn anew 9,999 times."""
    from scipy.stats import bootstrap as resample

    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    found = resample((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def points(difference: np.ndarray) -> str:
    """Mean of paired differences [n] of accuracies, in percentage points, with its 95 % interval."""
    low, high = (100 * bound for bound in bootstrap(difference))
    return f"{100 * difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def percent(interval: tuple[float, float], form: str = ".1f") -> str:
    """An interval of proportions in percent."""
    low, high = interval
    return f"{100 * low:{form}} to {100 * high:{form}}"


def mean_error(means: np.ndarray) -> float | None:
    """Standard error of the mean of independent values [n]; None for a single one."""
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None


def mean(values: Sequence[float]) -> float | None:
    """Rounded to 2 digits; None of nothing."""
    return round(statistics.fmean(values), 2) if values else None


def median(values: Sequence[float]) -> float | None:
    """Rounded to 2 digits; None of nothing."""
    return round(statistics.median(values), 2) if values else None
