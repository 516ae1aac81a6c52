"""A small serving world around a ledger: requests, a radix-like tree of pages, and a symbolic device.

``World.step`` takes an operation and three numbers, so that hypothesis and a seeded generator drive
the same rules. After every operation all invariants are checked that can be seen from outside: the
books, the replayed commands, the order of shrinking, precision that only falls, what is mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.formats import PageShape, PoolGeometry, geometry_for_pages, groups_from_finals
from sglang_pmkvq.ledger import Ledger, PolicyConfig, Replay
from sglang_pmkvq.ledger.pages import CACHED, FREE, HARD, RUN, SOFT
from sglang_pmkvq.ledger.policy import active_step

SHAPE = PageShape(page_size=16, num_kv_heads=1, head_dim=64, group_size=64)
P = SHAPE.page_size
GROUPS: dict[str, list[tuple[int, int]]] = {
    "8": [(8, 8)] * 2,
    "4": [(4, 4)] * 2,
    "2": [(2, 2)] * 2,
    "k4v2": [(4, 2)] * 2,
    "8+k4v2": [(8, 8), (4, 2), (4, 2)],
    "16+2": [(16, 16), (2, 2)],
    "16": [(16, 16)] * 2,
}
OPS = ("decode", "extend", "mixed", "finish", "unfinished", "abort", "evict", "alloc", "free_loose", "flush")
# Decoding is what servers mostly do; flushes are rare, or pressure never builds up.
WEIGHTS = (46, 16, 8, 10, 6, 4, 4, 2, 2, 0.4)
LOOSE = 2


@dataclass(eq=False)
class Node:
    """One page in the tree; pages with equal label chains are the same content."""

    page: int
    label: tuple[int, ...]
    parent: Node | None
    access: int = 0
    lock: int = 0
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


@dataclass(eq=False)
class Request:
    slot: int
    labels: list[tuple[int, ...]]
    prompt: int
    length: int
    pages: list[int]
    node: Node
    in_tree: int


def hard_bound(policy: PolicyConfig, max_requests: int, chunk: int) -> int:
    """R: tails, one chunk, ownerless pages; with hard protection sinks and windows too."""
    pages = max_requests + chunk // P + 2 * LOOSE
    if policy.protect == "hard":
        pages += max_requests * (-(-policy.sink_tokens // P) + policy.window_tokens // P + 1)
    return pages


def make_geometry(groups: str, num_pages: int, hard_pages: int) -> PoolGeometry:
    return geometry_for_pages(SHAPE, groups_from_finals(GROUPS[groups]), num_pages, hard_pages)


class World:
    """A server on paper. ``run_batch`` is called with each batch (tests plant faults through it)."""

    def __init__(
        self,
        groups: str,
        policy: PolicyConfig,
        num_pages: int = 40,
        max_requests: int = 4,
        chunk: int = 3 * P,
        with_evict: bool = True,
        checks: bool = True,
    ) -> None:
        self.policy = policy
        self.chunk = chunk
        self.max_requests = max_requests
        self.bound = hard_bound(policy, max_requests, chunk)
        self.geometry = make_geometry(groups, num_pages, self.bound)
        self.ledger = Ledger(self.geometry, policy, max_requests)
        if with_evict:
            self.ledger.evict = self._evict_from_ledger
        self.replay = Replay(self.geometry)
        self.change_batch: Callable[[CommandBatch], CommandBatch] = lambda batch: batch
        self.batches: list[CommandBatch] = []
        self.keep_batches = False
        self.checks = checks
        self.root = Node(0, (), None)
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.history: list[list[tuple[int, ...]]] = []
        self.loose: list[int] = []
        self.loose_forward = -1
        self.forwards = 0
        self.born: list[int] = []
        self.clock = 0
        self.serial = 0
        self.steps_run = 0
        self.retractions = 0
        self.evicting = False
        self._forward()

    # ------------------------------------------------------------ the tree

    def _nodes(self) -> list[Node]:
        nodes, stack = [], [self.root]
        while stack:
            for child in stack.pop().children.values():
                nodes.append(child)
                stack.append(child)
        return nodes

    def _evictable(self) -> int:
        return sum(not node.lock for node in self._nodes())

    def _lock(self, node: Node | None, by: int) -> None:
        while node is not None and node.parent is not None:
            node.lock += by
            assert node.lock >= 0
            node = node.parent

    def _evict(self, n: int) -> int:
        """Free up to n least recently used unlocked leaves, one by one."""
        freed = 0
        while freed < n:
            leaves = [x for x in self._nodes() if not x.children and not x.lock]
            if not leaves:
                break
            leaf = min(leaves, key=lambda x: (x.access, x.page))
            assert leaf.parent is not None
            del leaf.parent.children[leaf.label]
            self.ledger.free(np.array([leaf.page]))
            freed += 1
        return freed

    def _evict_from_ledger(self, n: int) -> int:
        assert n >= 1
        return self._evict(n)

    def _match(self, labels: list[tuple[int, ...]]) -> list[Node]:
        path, node = [], self.root
        for label in labels:
            child = node.children.get(label)
            if child is None:
                break
            child.access = self.clock
            path.append(child)
            node = child
        return path

    def _insert(self, request: Request) -> list[int]:
        """Give the request's full pages to the tree and unlock; returns its pages, duplicates replaced."""
        node = self.root
        pages = list(request.pages)
        for i in range(request.length // P):
            label = request.labels[i]
            child = node.children.get(label)
            if child is None:
                child = node.children[label] = Node(pages[i], label, node)
            elif child.page != pages[i]:
                self.ledger.free(np.array([pages[i]]))
                pages[i] = child.page
            child.access = self.clock
            node = child
        self._lock(request.node, -1)
        request.node = node
        request.in_tree = request.length // P
        return pages

    # ------------------------------------------------------------ operations

    def step(self, op: str, a: int, b: int, c: int) -> None:
        """One event, then all checks."""
        self.clock += 1
        self.steps_run += 1
        before = self._snapshot()
        getattr(self, "_op_" + op)(a, b, c)
        if self.checks:
            self._check(before, op)

    def _label(self, request: Request, index: int) -> tuple[int, ...]:
        while len(request.labels) <= index:
            self.serial += 1
            request.labels.append((self.serial,))
        return request.labels[index]

    def _new_request(self, a: int, b: int) -> Request | None:
        slots = set(range(self.max_requests)) - {r.slot for r in self.running}
        if not slots:
            return None
        prompt = 1 + b % (7 * P)
        if a % 4 == 0:
            prompt = max(P, prompt // P * P)
        labels: list[tuple[int, ...]] = []
        if self.history and a % 3:
            source = self.history[a % len(self.history)]
            labels = list(source[: 1 + b % 9])
        elif a % 3 == 0:
            labels = [(-1 - a % 2, i) for i in range(b % 5)]
        path = self._match(labels[: (prompt - 1) // P])
        node = path[-1] if path else self.root
        request = Request(min(slots), labels, prompt, len(path) * P, [x.page for x in path], node, len(path))
        for i in range(prompt // P):
            self._label(request, i)
        self._lock(node, 1)
        return request

    def _op_extend(self, a: int, b: int, c: int, mixed: bool = False) -> None:
        budget = self.chunk
        rows: list[tuple[Request, int]] = []
        fresh: list[Request] = []
        if mixed:
            rows.extend((r, r.length + 1) for r in self.running if r is not self.chunked)
        if self.chunked is not None:
            budget = self._take(self.chunked, budget, rows)
        for i in range(1 + c % 3):
            if budget <= 0 or self.chunked is not None:
                break
            request = self._new_request(a + 7 * i, b + 31 * i)
            if request is None:
                break
            left = self._take(request, budget, rows)
            if left == budget:
                self._lock(request.node, -1)
                break
            budget = left
            self.running.append(request)
            fresh.append(request)
        if rows:
            self._extend(rows, fresh)

    def _op_mixed(self, a: int, b: int, c: int) -> None:
        self._op_extend(a, b, c, mixed=True)

    def _take(self, request: Request, budget: int, rows: list[tuple[Request, int]]) -> int:
        """Enter as much of the prompt as the chunk allows; whole pages unless it is all of the rest."""
        rest = request.prompt - request.length
        self.chunked = None
        if rest > budget:
            rest = budget // P * P
            if not rest:
                return budget
            self.chunked = request
        rows.append((request, request.length + rest))
        return budget - rest

    def _extend(self, rows: list[tuple[Request, int]], fresh: list[Request]) -> None:
        need = sum(-(-after // P) - len(r.pages) for r, after in rows)
        if need > self.ledger.free_page_count:
            self._evict(need - self.ledger.free_page_count)
        new = self.ledger.extend(
            [r.slot for r, _ in rows],
            [np.array(r.pages, np.int64) for r, _ in rows],
            [r.length for r, _ in rows],
            [after for _, after in rows],
        )
        if new is None:
            # SGLang would not have admitted them; the newcomers go, whoever ran stays as it was.
            assert need > self.ledger.free_page_count
            for request in fresh:
                self._drop(request)
            if self.chunked in fresh:
                self.chunked = None
            return
        assert new.dtype == np.int64
        assert len(new) == need
        start = 0
        for request, after in rows:
            count = -(-after // P) - len(request.pages)
            request.pages.extend(new[start : start + count].tolist())
            start += count
            request.length = after
            self._label(request, after // P)
        self.born.extend(new.tolist())
        self._forward()

    def _op_decode(self, a: int, b: int, c: int) -> None:
        rows = [r for r in self.running if r is not self.chunked]
        if a % 5 == 0:
            rows = rows[: 1 + b % max(1, len(rows))]
        while rows:
            need = sum(r.length % P == 0 for r in rows)
            if need > self.ledger.free_page_count:
                self._evict(need - self.ledger.free_page_count)
            if need <= self.ledger.free_page_count:
                break
            slots = np.array([r.slot for r in rows])
            assert self.ledger.append(slots, np.array([r.length + 1 for r in rows])) is None
            self.retractions += 1
            self._drop(rows.pop())
        if not rows:
            return
        slots = np.array([r.slot for r in rows], np.int64)
        new = self.ledger.append(slots, np.array([r.length + 1 for r in rows], np.int64))
        assert new is not None
        fresh = iter(new.tolist())
        for request in rows:
            if request.length % P == 0:
                request.pages.append(next(fresh))
            request.length += 1
            self._label(request, request.length // P)
        assert next(fresh, None) is None
        self.born.extend(new.tolist())
        self._forward()

    def _pick(self, a: int) -> Request | None:
        rows = [r for r in self.running if r is not self.chunked]
        return rows[a % len(rows)] if rows else None

    def _op_finish(self, a: int, b: int, c: int) -> None:
        request = self._pick(a)
        if request is None:
            return
        self._insert(request)
        tail = request.pages[request.length // P :]
        self.ledger.free(np.array(tail, np.int64))
        self.ledger.finish(request.slot)
        self.ledger.finish(request.slot)
        self.running.remove(request)
        self.history = [*self.history[-5:], request.labels[: request.length // P]]

    def _op_unfinished(self, a: int, b: int, c: int) -> None:
        request = self._pick(a)
        if request is None:
            return
        request.pages = self._insert(request)
        self._lock(request.node, 1)
        pages = np.array(request.pages, np.int64)
        self.ledger.rebind(request.slot, pages if b % 2 else pages[: request.length // P])

    def _drop(self, request: Request) -> None:
        """Abort or retract: its own pages are freed, what the tree has stays there."""
        self.ledger.free(np.array(request.pages[request.in_tree :], np.int64))
        self._lock(request.node, -1)
        self.ledger.finish(request.slot)
        self.running.remove(request)

    def _op_abort(self, a: int, b: int, c: int) -> None:
        if not self.running:
            return
        request = self.running[a % len(self.running)]
        if request is self.chunked:
            self.chunked = None
        self._drop(request)

    def _op_evict(self, a: int, b: int, c: int) -> None:
        self._evict(1 + a % 8)

    def _op_alloc(self, a: int, b: int, c: int) -> None:
        if self.loose_forward == self.forwards:
            return
        count = 1 + a % LOOSE
        pages = self.ledger.alloc(count)
        assert (pages is None) == (count > self.ledger.free_page_count + (0 if pages is None else count))
        if pages is not None:
            self.loose_forward = self.forwards
            self.loose.extend(pages.tolist())
            self.born.extend(pages.tolist())

    def _op_free_loose(self, a: int, b: int, c: int) -> None:
        if self.loose:
            self.ledger.free(np.array(self.loose, np.int64))
            self.loose.clear()

    def _op_flush(self, a: int, b: int, c: int) -> None:
        for request in list(self.running):
            self._drop(request)
        self.chunked = None
        self.ledger.clear()
        self.root = Node(0, (), None)
        self.loose.clear()
        self.born.clear()

    def _forward(self) -> None:
        self.forwards += 1
        batch = self.change_batch(self.ledger.drain())
        if self.keep_batches:
            self.batches.append(batch)
        if not self.checks:
            self.born.clear()
            return
        self.replay.run(batch, self.born)
        self.born.clear()
        self.replay.check(self.ledger.book.cls_np != FREE)

    # ------------------------------------------------------------ checks

    def _snapshot(self) -> tuple[list[np.ndarray], np.ndarray]:
        return [group.step_np.copy() for group in self.ledger.groups], self.ledger.book.gen_np.copy()

    def _check(self, before: tuple[list[np.ndarray], np.ndarray], op: str) -> None:
        ledger = self.ledger
        ledger.check_integrity()
        book = ledger.book
        assert book.hard_pages <= self.bound
        live = {0, *self.loose} | {node.page for node in self._nodes()}
        for request in self.running:
            live.update(request.pages)
            assert ledger.pages_of(request.slot).tolist() == request.pages
            assert ledger.requests.tokens[request.slot] == request.length
        assert live == set(np.flatnonzero(book.cls_np != FREE).tolist())
        assert ledger.free_page_count == ledger.num_pages + 1 - len(live)
        steps, gens = before
        cls = book.cls_np
        ages = np.frombuffer(book.age, np.int64)
        for index, group in enumerate(ledger.groups):
            same = (gens == book.gen_np) & (steps[index] >= 0) & (group.step_np >= 0)
            was, now = steps[index], group.step_np
            assert (now[same] >= was[same]).all(), "a page gained precision"
            shrunk = same & (now > was)
            assert not (shrunk & (cls == HARD)).any(), "a hard-protected page shrank"
            self._check_order(index, shrunk, was, now, cls, ages)

    def _check_order(
        self, index: int, shrunk: np.ndarray, was: np.ndarray, now: np.ndarray, cls: np.ndarray, ages: np.ndarray
    ) -> None:
        """What shrank in this operation allows only certain pages to be left above their final step."""
        group = self.ledger.groups[index]
        above = now < group.final
        active = active_step(group.spec.steps, self.policy.min_active_bits)
        if (shrunk & (cls == SOFT)).any():
            assert not (above & ((cls == RUN) | (cls == CACHED))).any(), "a protected page shrank too early"
        if self.policy.policy == "static":
            assert not (above & ((cls == RUN) | (cls == CACHED)) & shrunk).any()
            return
        deep = (shrunk & (cls == RUN) & (now > active)).any() or (shrunk & (cls == SOFT)).any()
        if deep:
            assert not (above & (cls == CACHED)).any(), "running pages fell below the floor before cached ones"
            if self.ledger.evict is not None:
                assert not self._evictable(), "running pages fell below the floor before cached were evicted"
        if self.policy.policy != "age":
            return
        if (shrunk & (cls == RUN)).any():
            assert not (above & (cls == CACHED)).any(), "a running page shrank before a cached one"
        for c in (SOFT, RUN, CACHED):
            for step in range(group.final):
                passed = shrunk & (cls == c) & (was <= step) & (now > step)
                left = (cls == c) & (now == step)
                if passed.any():
                    # Lowest step first: once this step was left by anyone, lower ones are empty.
                    assert not ((cls == c) & (now >= 0) & (now < step)).any() or c == RUN
                    if left.any():
                        assert ages[passed].max() <= ages[left].min(), "a younger page shrank first"
