"""Bit allocation: one width per layer for K and one for V (paper sec. 3.2, eq. 6–8), as an integer program."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from sglang_pmkvq.formats import K, LayerGroup, PageShape, V, page_bytes

Pair = tuple[int, int]
PAGE = 16  # bytes per token do not depend on it


@dataclass(frozen=True)
class Allocation:
    """A choice of widths.

    Attributes:
        finals: (K bits, V bits) per layer.
        objective: summed sensitivity.
        bytes_per_token: over all layers, scales and zeros included.
        groups: distinct pairs.
    """

    finals: tuple[Pair, ...]
    objective: float
    bytes_per_token: int

    @property
    def groups(self) -> int:
        return len(set(self.finals))


def pair_bytes(kv_heads: int, head_dim: int, group_size: int, pair: Pair) -> int:
    """Bytes of one token's K and V in one layer at ``pair``, as ``formats.page_bytes`` counts them."""
    shape = PageShape(PAGE, kv_heads, head_dim, group_size)
    group = LayerGroup((0,), *pair)
    return page_bytes(shape, group, group.final_step) // PAGE


def parse_target(text: str, layers: int, kv_heads: int, head_dim: int, group_size: int) -> int:
    """Bytes per token over all layers of ``4``, ``2.5`` (bits) or ``1632B`` (bytes).

    ``b`` bits stand for codes of b bits per element *plus* a (zero, range) pair per group on both sides, so
    a uniform 4-bit cache meets a target of 4 exactly.

    Raises:
        ValueError: neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B?)\s*", text, re.IGNORECASE)
    number = float(match[1]) if match else 0.0
    if match and match[2] and number >= 1:
        return int(number)
    if not match or match[2] or not 0 < number <= 16:
        raise ValueError(
            f"--target-bits {text}: expected bits per element in 2 .. 16 such as 4 or 2.5, or bytes per token "
            "such as 1632B"
        )
    sixteen = pair_bytes(kv_heads, head_dim, group_size, (16, 16))
    if number == 16:
        return layers * sixteen
    meta = pair_bytes(kv_heads, head_dim, group_size, (8, 8)) - sixteen // 2
    return int(layers * (sixteen * number / 16 + meta) + 1e-6)


def allocate(
    sensitivity: np.ndarray,
    widths: Sequence[int],
    costs: dict[Pair, int],
    budget: int,
    max_groups: int | None = None,
) -> Allocation:
    """Widths of least summed sensitivity within ``budget`` bytes per token.

    Minimize Σ_l (s[l, K, k_l] + s[l, V, v_l]) subject to Σ_l bytes(k_l, v_l) ≤ budget (paper eq. 6–8, with
    K and V apart and scales and zeros counted), and at most ``max_groups`` distinct pairs. Exact: HiGHS
    with a gap of 0. Of equally good choices the one with most bytes: where the measure sees no difference,
    wider is safer.

    Args:
        sensitivity: float64 [L, 2, widths], finite and not negative.
        costs: bytes per token and layer of each pair.

    Raises:
        ValueError: the budget is below the smallest feasible one, which is named; bad numbers.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    sensitivity = np.asarray(sensitivity, dtype=np.float64)
    if not np.isfinite(sensitivity).all() or (sensitivity < 0).any():
        raise ValueError("sensitivities must be finite and not negative; the model's output may not be finite")
    if max_groups is not None and max_groups < 1:
        raise ValueError(f"--max-groups {max_groups}: expected 1 or more")
    layers = len(sensitivity)
    pairs = list(product(widths, widths))
    place = {bits: i for i, bits in enumerate(widths)}
    objective = np.array(
        [[s[K, place[k]] + s[V, place[v]] for k, v in pairs] for s in sensitivity], dtype=np.float64
    )  # [L, pairs]
    byte_row = np.array([costs[pair] for pair in pairs], dtype=np.float64)
    least = int(layers * byte_row.min())
    if budget < least:
        raise ValueError(
            f"--target-bits: {budget} bytes per token are infeasible; the smallest budget for widths "
            f"{', '.join(map(str, sorted(widths)))} is {least}B"
        )
    n, m = objective.size, len(pairs)
    # Variables: x[l, p] chooses pair p for layer l; z[p] says that p is used at all.
    total = n + m
    one = coo_array((np.ones(n), (np.repeat(np.arange(layers), m), np.arange(n))), shape=(layers, total))
    spent = coo_array((np.tile(byte_row, layers), (np.zeros(n, int), np.arange(n))), shape=(1, total))
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(spent, -np.inf, budget)]
    if max_groups is not None and max_groups < m:
        rows = np.arange(n)
        used = coo_array(
            (
                np.concatenate([np.ones(n), -np.ones(n)]),
                (np.concatenate([rows, rows]), np.concatenate([rows, n + rows % m])),
            ),
            shape=(n, total),
        )
        count = coo_array((np.ones(m), (np.zeros(m, int), n + np.arange(m))), shape=(1, total))
        constraints += [LinearConstraint(used, -np.inf, 0), LinearConstraint(count, 0, max_groups)]
    # HiGHS stops at an absolute gap of 1e-6: scale so that this is far below any difference that counts.
    largest = objective.max()
    cost_scale = 1e4 / largest if largest > 0 else 1.0
    cost = np.concatenate([objective.ravel() * cost_scale, np.zeros(m)])

    def solve(coefficients: np.ndarray, rows: list[LinearConstraint]) -> Allocation | None:
        exact = {"mip_rel_gap": 0}
        ones = np.ones(total)
        solved = milp(coefficients, constraints=rows, integrality=ones, bounds=Bounds(0, 1), options=exact)
        if solved.x is None:
            return None
        choice = solved.x[:n].reshape(layers, m).argmax(1)
        finals = tuple(pairs[p] for p in choice)
        value = float(objective[np.arange(layers), choice].sum())
        return Allocation(finals, value, sum(costs[pair] for pair in finals))

    best = solve(cost, constraints)
    if best is None:
        raise ValueError("the integer program has no solution")
    # The bound holds up to HiGHS' tolerance, so what comes back is compared before it is taken.
    bound = LinearConstraint(coo_array(cost[None]), -np.inf, best.objective * cost_scale)
    wider = solve(np.concatenate([-np.tile(byte_row, layers), np.zeros(m)]), [*constraints, bound])
    if wider is not None and wider.objective <= best.objective * (1 + 1e-9) and wider.bytes_per_token <= budget:
        return wider
    return best


def allocate_both(
    sensitivity: np.ndarray, widths: Sequence[int], costs: dict[Pair, int], budget: int, max_groups: int | None
) -> tuple[Allocation, Allocation]:
    """(allocation with at most ``max_groups`` groups, the same without the bound): the loss of the bound."""
    free = allocate(sensitivity, widths, costs, budget)
    if max_groups is None or free.groups <= max_groups:
        if max_groups is not None and max_groups < 1:
            raise ValueError(f"--max-groups {max_groups}: expected 1 or more")
        return free, free
    return allocate(sensitivity, widths, costs, budget, max_groups), free
