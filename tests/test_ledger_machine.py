"""The ledger in a small serving world, at random: every invariant after every step.

10^5 steps in all: a hypothesis state machine, which shrinks a failure to a short script, and seeded
runs over every group set, policy and protection for the rest. ``PMKVQ_LEDGER_STEPS=1000000`` runs as
many steps on demand.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from sglang_pmkvq.ledger import PolicyConfig
from tests.ledger_driver import GROUPS, OPS, WEIGHTS, P, World

STEPS = int(os.environ.get("PMKVQ_LEDGER_STEPS", "100000"))
# Shrinking machinery makes hypothesis ten times slower than the seeded runs: a twentieth of the steps is its.
HYPOTHESIS_STEPS = STEPS // 20
STEPS_PER_EXAMPLE = 50
SEEDED = [
    (groups, policy, protect)
    for groups in sorted(GROUPS)
    for policy in ("age", "uniform", "static")
    for protect in ("soft", "hard")
]
NUMBERS = st.integers(0, (1 << 16) - 1)


class LedgerMachine(RuleBasedStateMachine):
    """One rule per operation of the world; the world checks itself."""

    steps = 0

    @initialize(
        groups=st.sampled_from(sorted(GROUPS)),
        policy=st.sampled_from(["age", "uniform", "static"]),
        window=st.sampled_from([0, P, 2 * P, 40]),
        sinks=st.sampled_from([0, 1, P + 1]),
        hard=st.booleans(),
        floor=st.sampled_from([16, 8, 4, 2]),
        pages=st.integers(16, 48),
        with_evict=st.booleans(),
        first=st.sampled_from([0, 6 * P, 1 << 20]),
    )
    def start(
        self,
        groups: str,
        policy: str,
        window: int,
        sinks: int,
        hard: bool,
        floor: int,
        pages: int,
        with_evict: bool,
        first: int,
    ) -> None:
        config = PolicyConfig(
            policy=policy,  # type: ignore[arg-type]
            window_tokens=window,
            sink_tokens=sinks,
            protect="hard" if hard else "soft",
            min_active_bits=floor,
            first_shrink_tokens=first,
        )
        self.world = World(groups, config, num_pages=pages, max_requests=3, with_evict=with_evict)

    def do(self, op: str, a: int, b: int, c: int) -> None:
        type(self).steps += 1
        self.world.step(op, a, b, c)

    @rule(n=st.integers(1, 2 * P), a=NUMBERS, b=NUMBERS)
    def decode(self, n: int, a: int, b: int) -> None:
        for i in range(n):
            self.do("decode", a + i, b, 0)

    @rule(a=NUMBERS, b=NUMBERS, c=NUMBERS)
    def extend(self, a: int, b: int, c: int) -> None:
        self.do("extend", a, b, c)

    @rule(a=NUMBERS, b=NUMBERS, c=NUMBERS)
    def mixed(self, a: int, b: int, c: int) -> None:
        self.do("mixed", a, b, c)

    @rule(a=NUMBERS)
    def finish(self, a: int) -> None:
        self.do("finish", a, 0, 0)

    @rule(a=NUMBERS, b=NUMBERS)
    def unfinished(self, a: int, b: int) -> None:
        self.do("unfinished", a, b, 0)

    @rule(a=NUMBERS)
    def abort(self, a: int) -> None:
        self.do("abort", a, 0, 0)

    @rule(a=NUMBERS)
    def evict(self, a: int) -> None:
        self.do("evict", a, 0, 0)

    @rule(a=NUMBERS)
    def alloc(self, a: int) -> None:
        self.do("alloc", a, 0, 0)

    @rule()
    def free_loose(self) -> None:
        self.do("free_loose", 0, 0, 0)

    @rule()
    def flush(self) -> None:
        self.do("flush", 0, 0, 0)


def test_state_machine() -> None:
    """Hypothesis chooses configuration and events; examples are derandomized, so CI repeats itself."""
    LedgerMachine.steps = 0
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=HYPOTHESIS_STEPS // STEPS_PER_EXAMPLE,
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert LedgerMachine.steps > HYPOTHESIS_STEPS


@pytest.mark.parametrize(("groups", "policy", "protect"), SEEDED)
def test_seeded_runs(groups: str, policy: str, protect: str) -> None:
    """The same world and checks, driven by a seeded generator over longer lives than hypothesis has."""
    steps = max(1, (STEPS - HYPOTHESIS_STEPS) // len(SEEDED))
    rng = np.random.default_rng([SEEDED.index((groups, policy, protect)), 1])
    config = PolicyConfig(
        policy=policy,  # type: ignore[arg-type]
        window_tokens=int(rng.choice([P, 2 * P, 40])) if protect == "soft" else P,
        sink_tokens=1,
        protect=protect,  # type: ignore[arg-type]
        min_active_bits=int(rng.choice([8, 8, 4])),
    )
    world = World(groups, config, num_pages=36 if protect == "soft" else 56, max_requests=4 if protect == "soft" else 3)
    ops = rng.choice(len(OPS), steps, p=np.array(WEIGHTS) / sum(WEIGHTS))
    for op, (a, b, c) in zip(ops.tolist(), rng.integers(0, 1 << 16, (steps, 3)).tolist(), strict=True):
        world.step(OPS[op], a, b, c)
    assert world.steps_run == steps
    stats = world.ledger.stats()
    if steps > 1000 and groups != "16":
        # The run was worth something: pages were under pressure.
        assert sum(stats.shrinks.values()) > 0
