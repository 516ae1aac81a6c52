"""Keys in ascending order, fast where they mostly arrive that way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heapify

_SLACK = 1024


class AgeQueue:
    """Priority queue of ints that keeps in-order arrivals in a plain list and the rest in a heap.

    Pages ripen nearly in order of age, so most keys never see a heap, whose deep levels miss the
    caches once a pool has many pages. Keys may be stale or doubled: the owner checks what it pops,
    and sweeps when there are more than ``limit``. The owner's inner loops push and pop for
    themselves: append to ``line`` if the key is not below its last, else push on ``heap``; take the
    lower of the two heads.
    """

    __slots__ = ("heap", "limit", "line")

    def __init__(self) -> None:
        self.line: deque[int] = deque()
        self.heap: list[int] = []
        self.limit = _SLACK

    def __len__(self) -> int:
        return len(self.line) + len(self.heap)

    def sweep(self, live: Callable[[int], bool]) -> None:
        """Keep live keys, once each; the next sweep waits until the queue has doubled."""
        kept = dict.fromkeys(key for key in self.line if live(key))
        self.heap[:] = dict.fromkeys(key for key in self.heap if live(key) and key not in kept)
        heapify(self.heap)
        self.line.clear()
        self.line.extend(kept)
        self.limit = 2 * len(self) + _SLACK

    def keys(self) -> Iterable[int]:
        yield from self.line
        yield from self.heap

    def clear(self) -> None:
        self.line.clear()
        self.heap.clear()
