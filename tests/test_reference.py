"""The judge itself: whole-tensor fake quantization against the definition, attention against torch."""

from __future__ import annotations

import pytest
import torch

from sglang_pmkvq.formats import HEAD_DIMS, SIDES, LayerGroup, PageShape
from sglang_pmkvq.kernels import transforms
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference import codes as ref
from sglang_pmkvq.kernels.reference.attention import attention, read_page
from sglang_pmkvq.kernels.reference.inputs import make_inputs
from sglang_pmkvq.kernels.transforms import Hadamard, Scaled, Transform
from tests.kernel_checks import TRANSFORMS


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_fake_quantize_equals_the_definition(bits, scaled, clipped):
    gen = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 2, 64, generator=gen) * 4 + 1  # tokens, heads, channels
    x[0, 0, 3] = 1e6
    x[0, 1] = 2.5
    scale = torch.rand(2, 64, generator=gen) + 0.5 if scaled else None
    clip = torch.tensor([0.6, 0.9]) if clipped else None
    made = Coding(Transform() if scale is None else Scaled(scale), clip)
    got = ref.fake_quantize(x.transpose(0, 1), bits, 32, made).transpose(0, 1)
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
    assert torch.equal(ref.fake_quantize(x, 16, 64, Coding(Hadamard(64))), x)
    with pytest.raises(ValueError, match="bits must be one of"):
        ref.fake_quantize(x, 3, 64)
    with pytest.raises(ValueError, match="group_size must divide 64, got 48"):
        ref.fake_quantize(x, 4, 48)
    with pytest.raises(ValueError, match="a Hadamard rotation needs a power of two of channels, got 96"):
        ref.fake_quantize(torch.randn(2, 96), 4, 32, Coding(Hadamard(96)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform,clip", TRANSFORMS)
@pytest.mark.parametrize("group", [LayerGroup((0, 1), *f) for f in ((2, 2), (8, 4), (2, 4))], ids=lambda g: g.name())
def test_fake_quantize_equals_what_a_pool_reads_back(group, transform, clip, dtype):
    """The end-to-end oracle: the same values, whether from a pool after its shrinks or faked at once."""
    shape = PageShape(16, 2, 64, 32)
    inputs = make_inputs(5, shape, group, [64], dtype=dtype, transform=transform, clip=clip)
    storage = inputs.storage
    for page in inputs.pages(0):
        k_tier, v_tier = group.steps[inputs.steps[page]]
        for side, tier in zip(SIDES, (k_tier, v_tier), strict=True):
            for layer in range(2):
                x = inputs.written[side][layer, page * 16 : (page + 1) * 16].float().transpose(0, 1)
                made = None if side else storage.coding.pick(layer)
                got = read_page(storage, side, layer, page).transpose(0, 1)
                assert torch.equal(ref.fake_quantize(x, tier, 32, made), got), (side, tier)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_rotation_is_sylvesters_matrix(dim):
    """Entries by the parity of the bits that row and column share; orthonormal; the same bits from both codes."""
    w = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)])
    assert torch.equal(ref.walsh_hadamard(torch.eye(dim)), w)
    assert torch.equal(w @ w, dim * torch.eye(dim))
    gen = torch.Generator().manual_seed(dim)
    x, q = torch.randn(5, 3, dim, generator=gen), torch.randn(7, dim, generator=gen)
    assert torch.equal(transforms.rotate_keys(x), ref.rotated_keys(x)), "codes must not depend on who rotates"
    norms = transforms.rotate_keys(x).norm(dim=-1) / x.norm(dim=-1)
    a, b = transforms.exponents(dim)
    torch.testing.assert_close(norms, torch.full_like(norms, dim**0.5 / 2**a))
    assert 2 ** (a + b) == dim and 0 <= a - b <= 1
    torch.testing.assert_close(ref.unrotated_keys(ref.rotated_keys(x)), x, rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        turned = q @ transforms.query_rotation(dim, dtype, x.device).float()
        torch.testing.assert_close(turned, ref.unrotated_keys(q), rtol=1e-5, atol=1e-5)
    scores = ref.unrotated_keys(q) @ transforms.rotate_keys(x).flatten(0, 1).T
    torch.testing.assert_close(scores, q @ x.flatten(0, 1).T, rtol=1e-4, atol=1e-4)


def test_a_rotation_spreads_an_outlier():
    """What it is for: one large channel no longer sets the range of all."""
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    x[:, 7] += 40
    errors = [float((ref.fake_quantize(x, 2, 128, Coding(t)) - x).norm()) for t in (Transform(), Hadamard(128))]
    assert errors[1] < errors[0] / 2


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
