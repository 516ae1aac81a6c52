"""Bit allocation: optimal against brute force, within its budget, and clear where it cannot be met."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from sglang_pmkvq.calib.allocate import Allocation, Pair, allocate, allocate_both, pair_bytes, parse_target

WIDTHS = (2, 4, 8)
COSTS = {(k, v): pair_bytes(2, 128, 128, (k, v)) for k in WIDTHS for v in WIDTHS}


def brute_force(
    sensitivity: np.ndarray, widths: tuple[int, ...], costs: dict[Pair, int], budget: int, max_groups: int
) -> float:
    """Least objective over all choices, by looking at all of them."""
    best = np.inf
    pairs = list(product(range(len(widths)), repeat=2))
    for choice in product(pairs, repeat=len(sensitivity)):
        if len(set(choice)) > max_groups:
            continue
        if sum(costs[widths[k], widths[v]] for k, v in choice) > budget:
            continue
        best = min(best, sum(sensitivity[i, 0, k] + sensitivity[i, 1, v] for i, (k, v) in enumerate(choice)))
    return best


def random_sensitivity(seed: int, layers: int, magnitude: float) -> np.ndarray:
    """Falling with the width most of the time; magnitudes as far apart as in real models."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(0, 3, (layers, 2, len(WIDTHS))))
    return magnitude * (np.sort(values, -1)[..., ::-1] if seed % 3 else values)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("magnitude", [1e-9, 1.0, 1e6])
def test_optimal_against_brute_force(seed: int, magnitude: float) -> None:
    sensitivity = random_sensitivity(seed, 3, magnitude)
    budget = int(np.random.default_rng(100 + seed).integers(3 * COSTS[2, 2], 3 * COSTS[8, 8] + 1))
    for max_groups in (1, 2, 9):
        got = allocate(sensitivity, WIDTHS, COSTS, budget, max_groups)
        assert got.bytes_per_token == sum(COSTS[pair] for pair in got.finals) <= budget
        assert got.groups <= max_groups
        place = {bits: i for i, bits in enumerate(WIDTHS)}
        own = sum(sensitivity[i, 0, place[k]] + sensitivity[i, 1, place[v]] for i, (k, v) in enumerate(got.finals))
        assert got.objective == pytest.approx(own, rel=1e-12)
        assert got.objective == pytest.approx(brute_force(sensitivity, WIDTHS, COSTS, budget, max_groups), rel=1e-6)


def test_costs_count_scales_and_zeros() -> None:
    """2 heads of 128: 64 bytes of codes per 2 bits and side, 8 bytes of (zero, range) below 16 bits."""
    assert COSTS[2, 2] == 2 * (64 + 8)
    assert COSTS[8, 4] == 256 + 8 + 128 + 8
    assert pair_bytes(2, 128, 128, (16, 2)) == 512 + 64 + 8
    assert pair_bytes(2, 128, 32, (4, 4)) == 2 * (128 + 4 * 8)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("4", 3 * COSTS[4, 4]),
        ("2", 3 * COSTS[2, 2]),
        ("8", 3 * COSTS[8, 8]),
        ("3", 3 * COSTS[4, 2]),
        ("2.5", 3 * (COSTS[2, 2] + 32)),
        ("16", 3 * 1024),
        ("1000B", 1000),
        ("1000 b", 1000),
    ],
)
def test_targets(text: str, budget: int) -> None:
    assert parse_target(text, 3, 2, 128, 128) == budget


@pytest.mark.parametrize("text", ["", "0", "17", "-2", "four", "0B", "0.5B", "4KB"])
def test_bad_targets(text: str) -> None:
    with pytest.raises(ValueError, match="--target-bits"):
        parse_target(text, 3, 2, 128, 128)


def test_target_of_the_narrowest_width_is_uniform() -> None:
    got = allocate(random_sensitivity(1, 5, 1.0), WIDTHS, COSTS, parse_target("2", 5, 2, 128, 128))
    assert got.finals == ((2, 2),) * 5


def test_ties_go_to_the_wider() -> None:
    """What the measure calls equal uses the budget, not the narrowest width."""
    flat = allocate(np.zeros((4, 2, 3)), WIDTHS, COSTS, 4 * COSTS[8, 8], 4)
    assert flat.finals == ((8, 8),) * 4
    some = np.zeros((4, 2, 3))
    some[:, :, 0] = 1.0  # only 2 bits hurt
    got = allocate(some, WIDTHS, COSTS, 4 * COSTS[8, 4], 4)
    assert got.objective == 0
    assert got.bytes_per_token == 4 * COSTS[8, 4]


def test_infeasible_budget_names_the_smallest() -> None:
    least = 4 * COSTS[2, 2]
    with pytest.raises(ValueError, match=f"{least - 1} bytes per token are infeasible; .* is {least}B"):
        allocate(np.ones((4, 2, 3)), WIDTHS, COSTS, least - 1)
    assert allocate(np.ones((4, 2, 3)), WIDTHS, COSTS, least).bytes_per_token == least


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_sensitivities(bad: float) -> None:
    sensitivity = np.ones((2, 2, 3))
    sensitivity[1, 0, 2] = bad
    with pytest.raises(ValueError, match="finite and not negative"):
        allocate(sensitivity, WIDTHS, COSTS, 10**6)


def test_the_loss_of_bounding_groups_is_shown() -> None:
    sensitivity = random_sensitivity(2, 10, 1.0)
    budget = 10 * COSTS[4, 4]
    bounded, free = allocate_both(sensitivity, WIDTHS, COSTS, budget, 2)
    assert isinstance(free, Allocation)
    assert bounded.groups <= 2 < free.groups
    assert bounded.objective > free.objective
    same, free = allocate_both(sensitivity, WIDTHS, COSTS, budget, 9)
    assert same == free
    with pytest.raises(ValueError, match="--max-groups 0"):
        allocate_both(sensitivity, WIDTHS, COSTS, budget, 0)


def test_a_large_model_is_fast() -> None:
    """80 layers, four widths, four groups."""
    widths = (2, 4, 8, 16)
    rng = np.random.default_rng(0)
    sensitivity = np.sort(np.exp(rng.normal(0, 2, (80, 2, 4))), -1)[..., ::-1]
    sensitivity[..., 3] = 0
    costs = {(k, v): pair_bytes(8, 128, 128, (k, v)) for k in widths for v in widths}
    bounded, free = allocate_both(sensitivity, widths, costs, parse_target("4", 80, 8, 128, 128), 4)
    assert bounded.groups <= 4
    assert bounded.objective >= free.objective
