"""Checks of the device-side plan against what the page table says; in the interpreter and on a GPU alike."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from sglang_pmkvq.formats import STEP_BITS, STEP_MASK
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.device_plan import PlanBuffers, plan_launches, step_costs, token_tile
from sglang_pmkvq.kernels.reference.inputs import Inputs
from sglang_pmkvq.kernels.storage import GroupStorage
from tests.triton_checks import check_columns, forget_columns, on_device

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
    of_plan, of_storage = [f.name for f in dataclasses.fields(buffers)], ["unmapped_reads", "page_columns"]
    for owner, names in ((buffers, of_plan), (storage, of_storage)):
        for name in names:
            old = getattr(owner, name)
            if not isinstance(old, torch.Tensor):
                continue
            if old.data_ptr() not in moved:
                whole.append(torch.full((old.numel() + 2 * MARGIN,), SENTINEL, dtype=old.dtype, device=old.device))
                moved[old.data_ptr()] = whole[-1][MARGIN:-MARGIN].view(old.shape).copy_(old)
            object.__setattr__(owner, name, moved[old.data_ptr()])
    return whole


def check_fence(whole: list[torch.Tensor]) -> None:
    assert len(whole) >= 10
    for tensor in whole:
        assert (tensor[:MARGIN] == SENTINEL).all() and (tensor[-MARGIN:] == SENTINEL).all()


def check_plan(
    inputs: Inputs, lens: list[int], target: int, extra: int = 2, q_len: list[int] | None = None,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Plans through token slots, as SGLang keeps them, into buffers that are too large.

    SGLang may rewrite the slots on another stream at any moment; here it does after the first launch.
    """
    storage = on_device(inputs.storage, device)
    p, steps = storage.shape.page_size, len(storage.group.steps)
    requests, max_pages = len(lens), max(-(-n // p) for n in lens) + extra
    order = np.random.default_rng(0).permutation(requests + 1)[:requests]  # rows of the request pool
    slots = torch.full((requests + 1, max_pages * p), -(10**6), dtype=torch.int32)
    for r, n in enumerate(lens):
        own = torch.tensor(inputs.pages(r), dtype=torch.int32)
        slots[order[r], :n] = (own[:, None] * p + torch.arange(p)).flatten()[:n].int()
    buffers = PlanBuffers.allocate(storage, requests + 3, max_pages, columns=True, target=target)
    guarded(buffers)
    slots = slots.to(device)
    source = PageSource(slots, torch.from_numpy(order).to(device), p, p)
    q = None if q_len is None else torch.tensor(q_len, dtype=torch.int32, device=device)
    forget_columns(storage)
    guards = fence(buffers, storage)
    for launch in plan_launches(buffers, source, torch.tensor(lens, device=device), q):
        launch.run()
        slots.fill_(inputs.pages(len(lens) - 1)[0] * p)
    check_fence(guards)

    assert int(storage.unmapped_reads) == 0
    check_columns(inputs, storage)
    for r, n in enumerate(lens):
        pages = np.array(inputs.pages(r), dtype=np.int64)
        entries = inputs.storage.table[:, torch.from_numpy(pages)].numpy()
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
