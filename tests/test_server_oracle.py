"""Log-probabilities of the server equal those of transformers over a fake-quantized cache."""

from __future__ import annotations

import pytest

from benchmarks.oracle import CASES, load, run_case
from benchmarks.pressure import problem_set, prompt_ids
from benchmarks.serving import REASONER

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def noise() -> float:
    """Mean difference of a 16-bit server and the 16-bit oracle: bf16 against fp32."""
    problems = problem_set(1, 80, 80, first=300)
    ids, _ = prompt_ids(REASONER, problems)
    return run_case(REASONER, load(REASONER), CASES[0], ids, 800)["mean_difference"]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("static 4, window 0", "progressive 4, window 64")], ids=lambda c: c.name
)
def test_low_bit_pages_read_as_the_reference_says(case: object, noise: float) -> None:
    problems = problem_set(1, 80, 80, first=300)
    ids, _ = prompt_ids(REASONER, problems)
    got = run_case(REASONER, load(REASONER), case, ids, 800)  # type: ignore[arg-type]
    assert sum(got["shrinks"].values()) > 0
    assert got["mean_bits_at_end"] < 8
    assert got["mean_difference"] <= max(3 * noise, 2e-3), (got, noise)
