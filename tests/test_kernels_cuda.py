"""The Triton kernels on a GPU: the matrix of the interpreter with real bf16, and what only a GPU can do."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from sglang_pmkvq.formats import LayerGroup, PageShape
from sglang_pmkvq.kernels import page_ops
from sglang_pmkvq.kernels.attention import MixedKVDecodeWrapper
from sglang_pmkvq.kernels.reference.inputs import copies, make_inputs
from tests.triton_checks import (
    DTYPES,
    FINALS,
    SHAPES,
    WINDOW,
    boundary_lens,
    check_decode,
    check_extend,
    inputs_of,
    on_device,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("finals,shape,dtype", list(product(FINALS, SHAPES, DTYPES)))
def test_decode_and_extend(finals, shape, dtype):
    p = shape[0]
    lens = [*boundary_lens(p), WINDOW - 1, WINDOW + 1, 700]
    inputs = inputs_of(shape[1] + finals[1], finals, shape, dtype, lens)
    check_decode(inputs, device="cuda")
    check_decode(inputs, logit_cap=3.0, device="cuda")
    check_extend(inputs, [0, 0, p - 1, 1, p + 2, WINDOW - 40, WINDOW, 690], device="cuda")


@pytest.mark.parametrize("src,dst", [(16, 16), (8, 8), (16, 8), (16, 4), (16, 2), (8, 4), (8, 2), (4, 2)])
def test_copies_leave_the_bytes_of_the_torch_path(src, dst):
    inputs = make_inputs(3, PageShape(16, 3, 128, 64), LayerGroup((0, 1), 2, 2), [16 * 9], steps=0, key_scale=True)
    storages = [inputs.storage, on_device(inputs.storage, "cuda")]
    pages, units = np.array(inputs.pages(0)), np.arange(9) * 8
    for storage in storages:
        page_ops.execute(storage, [copies(0, pages, units, (10 + np.arange(9)) * 8, src, dst)])
    for side in (0, 1):
        assert torch.equal(storages[0].arenas[side], storages[1].arenas[side].cpu())
        metas = [s.meta[side] for s in storages]
        assert metas[0] is not None and metas[1] is not None
        assert torch.equal(metas[0].view(torch.int16), metas[1].cpu().view(torch.int16))


def test_a_captured_decode_replays_later_plans():
    """Capture once with padded rows, then plan other lengths and pages: replay equals an eager run."""
    inputs = inputs_of(9, (4, 2), SHAPES[0], torch.bfloat16, [40, 170, 5, 33])
    storage = on_device(inputs.storage, "cuda")
    pages = torch.cat([inputs.req_pages, torch.zeros_like(inputs.req_pages[:2])]).cuda()
    wrapper, eager = MixedKVDecodeWrapper(), MixedKVDecodeWrapper()
    wrapper.reserve(storage, 6, pages.shape[1], 8)
    q = torch.randn(6, 8, 128, device="cuda").bfloat16()
    lens = torch.tensor([*inputs.kv_lens, 1, 1], device="cuda")
    wrapper.plan(storage, pages, lens)
    wrapper.run(q, 0, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wrapper.run(q, 0, 0.1)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 0, 2]):
        wrapper.plan(storage, pages[order], lens[order])
        graph.replay()
        eager.plan(storage, pages[order], lens[order])
        torch.testing.assert_close(out, eager.run(q, 0, 0.1), rtol=0, atol=0, equal_nan=True)
