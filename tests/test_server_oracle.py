"""Log-probabilities of the server equal those of transformers over a fake-quantized cache, within bf16 noise."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness.servers import REASONER
from benchmarks.harness.tasks import problem_set, prompt_ids
from tests.support.oracle import CASES, Case, load, noisy, run_case

pytestmark = pytest.mark.server

# How far one chain's statistics may exceed those of the control, which is the same replay with activations rounded to
# bf16: two samples of one noise, whose mean, 99th percentile and maximum differ by chance. 20 chains: docs/results.md.
CHANCE = 4
TESTED = ("progressive 4, window 64",)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """The fp32 model, and the same with activations rounded to bf16."""
    model = load(REASONER)
    return model, noisy(model)


# Not with all keys at 2 bits: there a chain amplifies noise until even its mean is one of chance.
CHECKED = [c for c in CASES if "2" not in c.final or c.hadamard]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in TESTED else pytest.mark.full) for c in CHECKED]
)
def test_pages_read_as_the_reference_says(case: Case, models: tuple[Any, Any]) -> None:
    problems = problem_set(1, 60, 60, first=300)
    ids, _ = prompt_ids(REASONER, problems)
    got = run_case(REASONER, models[0], case, ids, 600, models[1])
    if case.name != "16 bits":
        assert sum(got["shrinks"].values()) > 0
        assert got["mean_bits_at_end"] < 9
    for what in ("mean", "p99", "max"):
        assert got[f"{what}_difference"] <= CHANCE * got[f"control_{what}"], (what, got)
