"""The judge itself: whole-tensor fake quantization against the definition, attention against torch."""

from __future__ import annotations

import pytest
import torch

from sglang_pmkvq.formats import SIDES, LayerGroup, PageShape
from sglang_pmkvq.kernels.reference import codes as ref
from sglang_pmkvq.kernels.reference.attention import attention, read_page
from sglang_pmkvq.kernels.reference.inputs import make_inputs


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_fake_quantize_equals_the_definition(bits, scaled, clipped):
    gen = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 2, 64, generator=gen) * 4 + 1
    x[0, 0, 3] = 1e6
    x[0, 1] = 2.5
    scale = torch.rand(2, 64, generator=gen) + 0.5 if scaled else None
    clip = torch.tensor([0.6, 0.9]) if clipped else None
    got = ref.fake_quantize(x, bits, 32, scale, clip)
    for a in range(3):
        for b in range(2):
            for i in (slice(0, 32), slice(32, 64)):
                s = torch.ones(32) if scale is None else scale[b, i]
                codes, zero, span = ref.quantize_group(x[a, b, i] / s)
                share = 1.0 if clip is None or bits != 2 else clip[b]
                codes_b = torch.tensor([ref.chain(c, bits, float(share)) for c in codes])
                zero, span = ref.clipped_range(zero, span, share)
                assert torch.equal(got[a, b, i], ref.dequantize(codes_b, zero, span, bits) * s)


def test_fake_quantize_at_16_bits_is_the_identity_and_bad_arguments_are_refused():
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(ref.fake_quantize(x, 16, 64), x)
    with pytest.raises(ValueError, match="bits must be one of"):
        ref.fake_quantize(x, 3, 64)
    with pytest.raises(ValueError, match="group_size must divide 64, got 48"):
        ref.fake_quantize(x, 4, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_scale,key_clip", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("group", [LayerGroup((0, 1), *f) for f in ((2, 2), (8, 4), (2, 4))], ids=lambda g: g.name())
def test_fake_quantize_equals_what_a_pool_reads_back(group, key_scale, key_clip, dtype):
    """The end-to-end oracle: the same values, whether from a pool after its shrinks or faked at once."""
    shape = PageShape(16, 2, 64, 32)
    inputs = make_inputs(5, shape, group, [64], key_scale=key_scale, key_clip=key_clip, dtype=dtype)
    storage = inputs.storage
    for page in inputs.pages(0):
        k_tier, v_tier = group.steps[inputs.steps[page]]
        for side, tier in zip(SIDES, (k_tier, v_tier), strict=True):
            for layer in range(2):
                x = inputs.written[side][layer, page * 16 : (page + 1) * 16]
                scale = None if side or storage.key_scale is None else storage.key_scale[layer]
                share = None if side or storage.key_clip is None else storage.key_clip[layer]
                got = read_page(storage, side, layer, page)
                assert torch.equal(ref.fake_quantize(x.float(), tier, 32, scale, share), got), (side, tier)


def test_reference_attention_is_torch_attention():
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, h, 64, generator=gen) for h in (4, 2, 2))
    out, lse = attention(q, k, v, 0.125, prefix_len=0)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
        is_causal=True, scale=0.125, enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(out, want[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
    scores = torch.einsum("qd,kd->qk", q[:, 3], k[:, 1]) * 0.125
    torch.testing.assert_close(lse[4, 3], torch.logsumexp(scores[4], 0))
    capped, _ = attention(q, k, v, 0.125, logit_cap=0.5)
    weights = torch.softmax(0.5 * torch.tanh(scores / 0.5), -1)
    torch.testing.assert_close(capped[:, 3], weights @ v[:, 1])
