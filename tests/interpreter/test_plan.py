"""The device-side plan in the interpreter against what the page table says, list by list."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pmkvq.formats import STEP_BITS, STEP_MASK, UNMAPPED, LayerGroup, PageShape
from sglang_pmkvq.kernels import device_plan
from sglang_pmkvq.kernels.device_plan import PageSource, PlanBuffers, plan_launches, step_costs, token_tile
from sglang_pmkvq.kernels.reference.inputs import Inputs, make_inputs
from sglang_pmkvq.kernels.storage import GroupStorage

SENTINEL = -77
MARGIN = 16


def guarded(buffers: PlanBuffers) -> None:
    for field in dataclasses.fields(buffers):
        tensor = getattr(buffers, field.name)
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(SENTINEL)


def fence(buffers: PlanBuffers, storage: GroupStorage) -> list[torch.Tensor]:
    """Moves every buffer and counter of a plan between sentinels; the tensors that hold them."""
    whole: list[torch.Tensor] = []
    moved: dict[int, torch.Tensor] = {}  # lists may be shared
    for owner, names in ((buffers, [f.name for f in dataclasses.fields(buffers)]), (storage, ["unmapped_reads"])):
        for name in names:
            old = getattr(owner, name)
            if not isinstance(old, torch.Tensor):
                continue
            if old.data_ptr() not in moved:
                whole.append(torch.full((old.numel() + 2 * MARGIN,), SENTINEL, dtype=old.dtype))
                moved[old.data_ptr()] = whole[-1][MARGIN:-MARGIN].view(old.shape).copy_(old)
            object.__setattr__(owner, name, moved[old.data_ptr()])
    return whole


def check_fence(whole: list[torch.Tensor]) -> None:
    assert len(whole) >= 10
    for tensor in whole:
        assert (tensor[:MARGIN] == SENTINEL).all() and (tensor[-MARGIN:] == SENTINEL).all()


def check_plan(inputs: Inputs, lens: list[int], target: int, extra: int = 2, q_len: list[int] | None = None) -> None:
    """Plans through token slots, as SGLang keeps them, into buffers that are too large.

    SGLang may rewrite the slots on another stream at any moment; here it does after the first launch.
    """
    storage = inputs.storage
    p, steps = storage.shape.page_size, len(storage.group.steps)
    requests, max_pages = len(lens), max(-(-n // p) for n in lens) + extra
    order = np.random.default_rng(0).permutation(requests + 1)[:requests]  # rows of the request pool
    slots = torch.full((requests + 1, max_pages * p), -(10**6), dtype=torch.int32)
    for r, n in enumerate(lens):
        own = torch.tensor(inputs.pages(r), dtype=torch.int32)
        slots[order[r], :n] = (own[:, None] * p + torch.arange(p)).flatten()[:n].int()
    buffers = PlanBuffers.allocate(storage, requests + 3, max_pages, columns=True, target=target)
    guarded(buffers)
    source = PageSource(slots, torch.from_numpy(order), p, p)
    q = None if q_len is None else torch.tensor(q_len, dtype=torch.int32)
    guards = fence(buffers, storage)
    for launch in plan_launches(buffers, source, torch.tensor(lens), q):
        launch.run()
        slots.fill_(inputs.pages(len(lens) - 1)[0] * p)
    check_fence(guards)

    assert int(storage.unmapped_reads) == 0
    for r, n in enumerate(lens):
        pages = np.array(inputs.pages(r), dtype=np.int64)
        entries = storage.table[:, torch.from_numpy(pages)].numpy()
        step = entries[0] & STEP_MASK
        columns = np.concatenate([np.flatnonzero(step == s) for s in range(steps)]).astype(int)
        count = np.bincount(step, minlength=steps)
        assert buffers.tier_indptr[r].tolist() == [0, *np.cumsum(count).tolist()]
        tokens = np.minimum(p, n - np.arange(pages.size) * p)
        assert buffers.tier_tokens[r].tolist() == [int(tokens[step == s].sum()) for s in range(steps)]
        assert buffers.cols is not None
        assert buffers.cols[r, : pages.size].tolist() == columns.tolist()
        assert buffers.pages[r, : pages.size].tolist() == pages[columns].tolist()
        for units, entry in ((buffers.k_units, entries[0]), (buffers.v_units, entries[-1])):
            assert units[r, : pages.size].tolist() == (entry[columns] >> STEP_BITS).tolist()
            assert (units[r, pages.size :] == SENTINEL).all()
        assert (buffers.pages[r, pages.size :] == SENTINEL).all()
    for rest in (buffers.counts, buffers.page_ids, buffers.pages, buffers.tier_indptr, buffers.tier_tokens):
        assert (rest[requests:] == SENTINEL).all()
    check_schedule(buffers, lens, target, q_len)


def check_schedule(buffers: PlanBuffers, lens: list[int], target: int, q_len: list[int] | None) -> None:
    """Items cover every page of every step exactly once, and there are not too many of them."""
    storage, requests = buffers.storage, len(lens)
    p, costs = storage.shape.page_size, np.array(step_costs(storage))
    indptr = buffers.split_indptr[: requests + 1].tolist()
    active = [q_len is None or q_len[r] == 1 for r in range(requests)]
    assert indptr[0] == 0 and indptr[-1] <= sum(active) + target
    assert (buffers.split_indptr[requests + 1 :] == SENTINEL).all()
    for rest in (buffers.item_request, buffers.item_first, buffers.item_tokens):
        rest = rest[indptr[-1] :]
        assert (rest == SENTINEL).all()
    align = max(1, token_tile(storage) // p) * p
    for r in range(requests):
        items = range(indptr[r], indptr[r + 1])
        assert len(items) >= 1 if active[r] else len(items) == 0
        assert all(int(buffers.item_request[i]) == r for i in items)
        work = []
        for s in range(len(costs)):
            at = int(buffers.tier_indptr[r, s])
            for i in items:
                tokens = max(0, int(buffers.item_tokens[i, s]))
                if tokens:
                    assert int(buffers.item_first[i, s]) == at
                    at += -(-tokens // p)
                    assert tokens % align == 0 or at == int(buffers.tier_indptr[r, s + 1])
            if active[r]:
                assert at == int(buffers.tier_indptr[r, s + 1])
        for i in items:
            pages = [-(-max(0, int(t)) // p) for t in buffers.item_tokens[i]]
            work.append(int((np.array(pages) * costs).sum()))
        if len(work) > 1:  # balanced by cost, up to one tile per step
            assert max(work) - sum(work) / len(work) <= costs.sum() * align // p + 1


CASES = [((4, 2), (16, 2, 64, 32)), ((4, 4), (32, 1, 64, 64)), ((2, 8), (64, 1, 64, 64)), ((16, 16), (16, 1, 128, 128))]


@pytest.mark.parametrize("finals,shape", CASES)
def test_lists_and_schedule(finals, shape):
    p = shape[0]
    lens = [1, p - 1, p, p + 1, 40 * p + 3, 7 * p]
    inputs = make_inputs(1, PageShape(*shape), LayerGroup((0,), *finals), lens)
    check_plan(inputs, lens, target=9)


def test_requests_longer_than_a_chunk(monkeypatch):
    """The scatter pass joins chunks: positions stay in order within a step."""
    monkeypatch.setattr(device_plan, "CHUNK_PAGES", 8)
    monkeypatch.setattr(device_plan, "MIN_SPLIT_TOKENS", 32)
    lens = [700, 8 * 16, 8 * 16 + 1, 3]
    inputs = make_inputs(2, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 2), lens)
    check_plan(inputs, lens, target=20)
    check_plan(inputs, lens, target=1, q_len=[1, 5, 1, 0])


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    finals=st.sampled_from([(8, 8), (4, 4), (2, 2), (4, 2), (16, 4), (8, 16)]),
    lens=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    target=st.integers(1, 40),
)
def test_any_batch(seed, finals, lens, target):
    inputs = make_inputs(seed, PageShape(16, 1, 64, 64), LayerGroup((0,), *finals), lens)
    check_plan(inputs, lens, target)


def test_many_requests(monkeypatch):
    """More requests and chunks than one scan takes."""
    monkeypatch.setattr(device_plan, "REQUEST_BLOCK", 2)
    monkeypatch.setattr(device_plan, "CHUNK_BLOCK", 2)
    monkeypatch.setattr(device_plan, "CHUNK_PAGES", 2)
    lens = [100, 1, 17, 33, 40]
    inputs = make_inputs(5, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 2), lens)
    check_plan(inputs, lens, target=4, extra=0, q_len=[1, 1, 4, 0, 1])


def test_a_length_beyond_the_lists_stays_in_its_row():
    """Lengths are not read by the host, so a wrong one cannot raise; it must not write elsewhere."""
    inputs = make_inputs(6, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 2), [16 * 16, 20])
    buffers = PlanBuffers.allocate(inputs.storage, 2, 16, columns=True)
    guards = fence(buffers, inputs.storage)
    pages = torch.zeros(2, 40, dtype=torch.int64)
    pages[:, :17] = inputs.req_pages[:, :17]
    launches = plan_launches(buffers, PageSource(pages), torch.tensor([40 * 16, 20]), None, 40)
    for launch in launches:
        launch.run()
    assert buffers.tier_indptr[:, -1].tolist() == [16, 2]
    assert sorted(buffers.pages[1, :2].tolist()) == sorted(inputs.pages(1))
    assert not buffers.pages[1, 2:].any()
    check_fence(guards)


def test_unmapped_and_foreign_pages_are_counted_and_harmless():
    inputs = make_inputs(4, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 2), [64, 20])
    storage = inputs.storage
    storage.table[:, inputs.pages(0)[1]] = UNMAPPED
    pages = inputs.req_pages.clone()
    pages[1, 0] = 10**6
    pages[1, 1] = -5
    buffers = PlanBuffers.allocate(storage, 2, pages.shape[1], columns=False)
    for launch in plan_launches(buffers, PageSource(pages), torch.tensor([64, 20])):
        launch.run()
    assert int(storage.unmapped_reads) == 3
    assert (buffers.k_units[0, :4] >= 0).all() and buffers.k_units[1, :2].tolist() == [0, 0]
    assert buffers.pages[1, :2].tolist() == [0, 0]
