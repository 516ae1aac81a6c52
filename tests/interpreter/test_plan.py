"""The device-side plan in the interpreter against what the page table says, list by list."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pmkvq.formats import UNMAPPED, LayerGroup, PageShape
from sglang_pmkvq.kernels import device_plan
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.device_plan import PlanBuffers, plan_launches
from sglang_pmkvq.kernels.reference.inputs import make_inputs
from tests.plan_checks import check_fence, check_plan, fence
from tests.triton_checks import forget_columns

CASES = [((4, 2), (16, 2, 64, 32)), ((4, 4), (32, 1, 64, 64)), ((2, 8), (64, 1, 64, 64)), ((16, 16), (16, 1, 128, 128))]


@pytest.mark.parametrize("finals,shape", CASES)
def test_lists_and_schedule(finals, shape):
    p = shape[0]
    lens = [1, p - 1, p, p + 1, 40 * p + 3, 7 * p]
    inputs = make_inputs(1, PageShape(*shape), LayerGroup((0,), *finals), lens, center="neox")
    check_plan(inputs, lens, target=9)


def test_requests_longer_than_a_chunk(monkeypatch):
    """The scatter pass joins chunks: positions stay in order within a step."""
    monkeypatch.setattr(device_plan, "CHUNK_PAGES", 8)
    monkeypatch.setattr(device_plan, "MIN_SPLIT_TOKENS", 32)
    lens = [700, 8 * 16, 8 * 16 + 1, 3]
    inputs = make_inputs(2, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 2), lens, center="neox")
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


def test_columns_of_shared_foreign_and_padded_pages():
    """A page of two requests stands at the same place in both; what is no page is written nowhere."""
    inputs = make_inputs(7, PageShape(16, 1, 64, 64), LayerGroup((0,), 4, 4), [64, 20], center="neox")
    storage = inputs.storage
    forget_columns(storage)
    first, second = inputs.pages(0), inputs.pages(1)
    pages = torch.tensor([[*first], [*first[:2], second[0], -5], [0, 10**6, second[1], 7]])
    buffers = PlanBuffers.allocate(storage, 3, 4, columns=False)
    guards = fence(buffers, storage)
    for launch in plan_launches(buffers, PageSource(pages), torch.tensor([64, 64, 33])):
        launch.run()
    check_fence(guards)
    columns = storage.page_columns
    assert columns is not None and columns[first].tolist() == [0, 1, 2, 3]
    assert columns[[second[0], second[1], 0]].tolist() == [2, 2, 0]
    assert columns.sum() == 0 + 1 + 2 + 3 + 2 + 2
