"""A call that fails in the middle of making room leaves books that agree; the same call made again succeeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.horizon import Traffic
from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.ledger import Ledger, LedgerError, PolicyConfig, Replay
from sglang_pmkvq.ledger.arena import Arena
from sglang_pmkvq.ledger.group import Group
from sglang_pmkvq.ledger.pages import FREE, PageBook
from sglang_pmkvq.ledger.policy import Shrinker
from tests.ledger_driver import P, make_geometry

PLACES: dict[str, tuple[type, str]] = {
    "before making room": (Shrinker, "make_room"),
    "a shrink": (Group, "shrink"),
    "a move": (Arena, "make_superblocks"),
    "an eviction": (Shrinker, "_evict"),
    "a birth": (PageBook, "birth"),
}


class Injected(Exception):
    pass


@pytest.mark.parametrize("place", PLACES)
def test_injected_failure(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In random traffic every third call may fail at ``place``; after each the books and the device agree."""
    traffic = Traffic(5, groups=((8, 8), (4, 2)), pages=128)
    ledger = traffic.ledger
    replay = Replay(ledger.geometry)
    rng = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    armed = [False]
    born: list[int] = []

    owner, name = PLACES[place]
    real = getattr(owner, name)

    def failing(self: Any, *args: Any) -> Any:
        if armed[0]:
            armed[0] = False
            raise Injected(place)
        return real(self, *args)

    monkeypatch.setattr(owner, name, failing)

    def flaky(call: Callable[..., np.ndarray | None]) -> Callable[..., np.ndarray | None]:
        def wrapper(*args: Any) -> np.ndarray | None:
            armed[0] = rng.random() < 0.3
            try:
                pages = call(*args)
            except Injected:
                seen[call.__name__] += 1
                ledger.check_integrity()
                pages = call(*args)
            armed[0] = False
            born.extend([] if pages is None else pages.tolist())
            return pages

        return wrapper

    drain = ledger.drain

    def checked() -> CommandBatch:
        batch = drain()
        replay.run(batch, born)
        born.clear()
        replay.check(ledger.book.cls_np != FREE)
        return batch

    for method in ("extend", "append", "alloc"):
        monkeypatch.setattr(ledger, method, flaky(getattr(ledger, method)))
    monkeypatch.setattr(ledger, "drain", checked)
    monkeypatch.setattr(Traffic, "_flush", lambda self, a, b: None)
    checked()
    traffic.run(1500)
    ledger.check_integrity()
    assert seen["extend"] > 0, seen
    assert seen["append"] > 0, seen


def test_more_hard_pages_than_the_reserve_is_a_clear_error() -> None:
    """The one way to run out of bytes: a caller that breaks R. Nothing changed; without it, serving goes on."""
    ledger = Ledger(make_geometry("4", 64, 4), PolicyConfig(), 8)
    empty = np.empty(0, np.int64)
    with pytest.raises(LedgerError, match=r"free units needed.*hard-protected pages: \d+"):
        ledger.extend([0], [empty], [0], [60 * P])
    ledger.check_integrity()
    pages = ledger.extend([1], [empty], [0], [2 * P])
    assert pages is not None
    ledger.check_integrity()


def test_an_eviction_that_frees_nothing_ends() -> None:
    """Pages the tree does not give back shrink further instead; no endless loop of asking."""
    asked = []
    ledger = Ledger(make_geometry("2", 64, 12), PolicyConfig(min_active_bits=16), 4, lambda n: asked.append(n) or 0)
    held = empty = np.empty(0, np.int64)
    for start in range(0, 60 * P, 4 * P):
        new = ledger.extend([0], [held], [start], [start + 4 * P])
        assert new is not None
        held = np.concatenate((held, new))
        ledger.drain()
    ledger.finish(0)
    assert ledger.extend([1], [empty], [0], [4 * P]) is not None
    ledger.check_integrity()
    assert len(asked) < 64
