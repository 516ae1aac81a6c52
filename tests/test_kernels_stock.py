"""Requests without shrunk pages against SGLang's own ``torch_native`` backend: bit for bit."""

from __future__ import annotations

import pytest
import torch

from sglang_pmkvq.formats import SIDES, LayerGroup, PageShape
from sglang_pmkvq.kernels.host_attention import HostDecode, HostExtend
from sglang_pmkvq.kernels.reference.inputs import Inputs, make_inputs
from sglang_pmkvq.kernels.torch_kernels import TorchKernels

SHAPES = [(16, 1, 128, 2), (16, 2, 64, 1), (32, 2, 128, 4), (64, 1, 256, 8), (16, 3, 64, 2)]


@pytest.fixture(scope="module")
def backend():
    """The real backend; its attention methods use nothing that its constructor sets."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)


def token_cache(inputs: Inputs, side: int, layer: int) -> torch.Tensor:
    """The same K or V as stock keeps it: one row per logical token slot."""
    return inputs.written[side][layer].contiguous()


def req_to_token(inputs: Inputs) -> torch.Tensor:
    p = inputs.storage.shape.page_size
    table = torch.zeros(len(inputs.kv_lens), max(inputs.kv_lens), dtype=torch.int32)
    for r, n in enumerate(inputs.kv_lens):
        pages = torch.tensor(inputs.pages(r))
        table[r, :n] = (pages[:, None] * p + torch.arange(p)).flatten()[:n].int()
    return table


def requests(shape: tuple[int, int, int, int], dtype: torch.dtype, lens: list[int], steps: int | list[int]) -> Inputs:
    p, h, d, per_head = shape
    group = LayerGroup((0, 1), 4, 2)
    return make_inputs(
        1, PageShape(p, h, d, min(d, 128)), group, lens, steps=steps, query_heads=h * per_head, dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_stocks_bit_for_bit(backend, shape, dtype):
    inputs = requests(shape, dtype, [1, 15, 16, 17, 300, 65], steps=0)
    q = inputs.q.to(dtype)
    wrapper = TorchKernels().decode()
    wrapper.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
    for layer in range(2):
        want = backend._run_sdpa_forward_decode(
            q,
            torch.empty_like(q),
            *(token_cache(inputs, side, layer) for side in SIDES),
            req_to_token(inputs),
            torch.arange(len(inputs.kv_lens)),
            torch.tensor(inputs.kv_lens),
            scaling=0.09,
            enable_gqa=shape[3] != 1,
            causal=False,
        )
        assert torch.equal(wrapper.run(q, layer, 0.09), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_extend_is_stocks_bit_for_bit(backend, shape, dtype):
    lens, prefix = [1, 17, 40, 300, 65, 33], [0, 0, 16, 211, 64, 0]
    inputs = requests(shape, dtype, lens, steps=0)
    extend = torch.tensor(lens) - torch.tensor(prefix)
    q = torch.randn(int(extend.sum()), *inputs.q.shape[1:], generator=torch.Generator().manual_seed(2)).to(dtype)
    wrapper = TorchKernels().extend()
    wrapper.plan(inputs.storage, inputs.req_pages, torch.tensor(prefix), torch.tensor(lens))
    for layer in range(2):
        want = backend._run_sdpa_forward_extend(
            q,
            torch.empty_like(q),
            *(token_cache(inputs, side, layer) for side in SIDES),
            req_to_token(inputs),
            torch.arange(len(lens)),
            torch.tensor(lens),
            torch.tensor(prefix),
            extend,
            scaling=0.09,
            enable_gqa=shape[3] != 1,
            causal=True,
        )
        assert torch.equal(wrapper.run(q, layer, 0.09), want)


@pytest.mark.parametrize("extend", [False, True])
def test_a_shrunk_neighbour_does_not_change_them(backend, extend):
    """Batch rows of requests with shrunk pages take the other path; the rest stays stock's."""
    lens = [40, 40, 20, 33]
    steps = [0, 0, 0] + [0, 3, 1] + [0, 0] + [1, 0, 0]
    inputs = requests(SHAPES[0], torch.bfloat16, lens, steps)
    wrapper: HostDecode | HostExtend
    if extend:
        prefix = [n - 1 for n in lens]
        wrapper = TorchKernels().extend()
        wrapper.plan(inputs.storage, inputs.req_pages, prefix, lens)
    else:
        wrapper = TorchKernels().decode()
        wrapper.plan(inputs.storage, inputs.req_pages, lens)
    q = inputs.q.bfloat16()
    out = wrapper.run(q, 1, 0.09)
    caches = [token_cache(inputs, side, 1) for side in SIDES]
    for r in (0, 2):
        arguments = (q[r : r + 1], torch.empty_like(q[:1]), *caches, req_to_token(inputs), torch.tensor([r]))
        lengths = torch.tensor(lens[r : r + 1])
        if extend:
            want = backend._run_sdpa_forward_extend(
                *arguments, lengths, lengths - 1, torch.tensor([1]), scaling=0.09, enable_gqa=True, causal=True
            )
        else:
            want = backend._run_sdpa_forward_decode(*arguments, lengths, scaling=0.09, enable_gqa=True)
        assert torch.equal(out[r : r + 1], want)


def steps_planned_anew(wrapper: HostDecode, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each plan made from the page table, not from the step before."""
    made: list[int] = []
    original = wrapper._set_plan
    monkeypatch.setattr(wrapper, "_set_plan", lambda *args: (made.append(1), original(*args))[1])
    return made


def same_as_a_new_wrapper(wrapper: HostDecode, inputs: Inputs, lens: list[int]) -> None:
    fresh = TorchKernels().decode()
    for w in (wrapper, fresh):
        w.plan(inputs.storage, inputs.req_pages, lens)
    q = inputs.q.to(torch.bfloat16)
    for layer in range(2):
        for got, want in zip(*(w.run(q, layer, 0.09, return_lse=True) for w in (wrapper, fresh)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(
            wrapper.run(q, layer, 0.09), fresh.run(q, layer, 0.09), rtol=0, atol=0, equal_nan=True
        )


def test_a_decode_step_builds_on_the_one_before_until_a_page_starts(monkeypatch):
    inputs = requests((16, 2, 64, 2), torch.bfloat16, [60, 45], steps=0)
    wrapper = TorchKernels().decode()
    made = steps_planned_anew(wrapper, monkeypatch)
    for step in range(40):
        same_as_a_new_wrapper(wrapper, inputs, [20 + step, 5 + step])
    # The first, and the starts of pages: tokens 33 and 49 of the first request, 17 and 33 of the second.
    assert len(made) == 1 + 4


def test_a_plan_keeps_its_lengths_when_the_callers_tensor_moves_on() -> None:
    """SGLang adds one to its lengths in place, and a mixed batch may come between two decode plans."""
    inputs = make_inputs(3, PageShape(16, 2, 64, 64), LayerGroup((0,), 4, 4), [20], steps=0)
    q, lens = inputs.q.bfloat16(), torch.tensor([20])
    wrapper = TorchKernels().decode()
    wrapper.plan(inputs.storage, inputs.req_pages, lens)
    lens.add_(1)
    wrapper.plan(inputs.storage, inputs.req_pages, lens.clone().add_(1))
    fresh = TorchKernels().decode()
    fresh.plan(inputs.storage, inputs.req_pages, [22])
    assert torch.equal(wrapper.run(q, 0, 0.1), fresh.run(q, 0, 0.1))


@pytest.mark.parametrize("change", ["another_page", "another_block", "shrunk", "two_tokens", "other_pool"])
def test_a_decode_step_does_not_build_on_what_has_changed(change, monkeypatch):
    inputs = requests((16, 2, 64, 2), torch.bfloat16, [60, 45], steps=0)
    wrapper = TorchKernels().decode()
    same_as_a_new_wrapper(wrapper, inputs, [20, 5])
    made = steps_planned_anew(wrapper, monkeypatch)
    lens, table = [21, 6], inputs.storage.table
    first, last = inputs.pages(0)[0], inputs.pages(0)[2]
    if change == "another_page":
        inputs.req_pages[0, 0] = last
    elif change == "another_block":
        table[:, [first, last]] = table[:, [last, first]]
    elif change == "shrunk":
        table[:, first] |= 1
    elif change == "two_tokens":
        lens = [22, 6]
    else:
        inputs = requests((16, 2, 64, 2), torch.bfloat16, [60, 45], steps=0)
    same_as_a_new_wrapper(wrapper, inputs, lens)
    assert len(made) == 1
