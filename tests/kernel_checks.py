"""Checks of the kernels against the reference, used by the tests and by their mutations."""

from __future__ import annotations

import torch

from sglang_pmkvq.formats import KEY_TRANSFORMS, SIDES, STEP_BITS, STEP_MASK, K, tier_units
from sglang_pmkvq.kernels.reference import attention as ref_attention
from sglang_pmkvq.kernels.reference import codes as ref_codes
from sglang_pmkvq.kernels.reference.inputs import Inputs
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.transforms import Hadamard, Scaled

# fp32 against fp32 on the same dequantized values: only the order of operations differs, see ``rounding``.
# Plus one rounding of the output to its dtype (half a unit in the last place, doubled).
OUTPUT_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8 + 1e-5, torch.float16: 2.0**-11 + 1e-5}

# Key transform, and whether 2-bit codes of keys span a clipped range.
TRANSFORMS = [(name, clip) for name in KEY_TRANSFORMS for clip in (False, True)]


def reference_of(inputs: Inputs, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantized K and V of a request, fp32 ``[T, H, D]``."""
    pages, length = inputs.pages(request), inputs.kv_lens[request]
    k, v = (ref_attention.read_sequence(inputs.storage, s, layer, pages, length) for s in SIDES)
    return k, v


def rounding(
    inputs: Inputs, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[float, float]:
    """Absolute error of output and of LSE that reordering fp32 sums explains.

    On codes a score is Σ q̃·(code·scale) + zero·Σ q̃ with q̃ = q·s, two sums whose terms are as large as the largest
    K/s of a group; reordering changes it by a few eps · Σ|q̃| · max|K/s|, a weight by that share, and the output by
    that times the values. For ordinary inputs both are near 1e-5; badly conditioned key scales make them larger. Where
    keys are rotated the rotated q and K stand in place of q·s and K/s.
    """
    per_head = q.shape[1] // k.shape[1]
    transform = inputs.storage.coding.key_transform
    s = transform.scale[layer] if isinstance(transform, Scaled) else torch.ones(k.shape[1:])
    q = q.float()
    if isinstance(transform, Hadamard):
        k, q = ref_codes.rotated_keys(k), ref_codes.unrotated_keys(q)
    keys = (k / s).abs().amax(dim=(0, 2)).repeat_interleave(per_head)
    queries = (q * s.repeat_interleave(per_head, dim=0)).abs().sum(-1)
    score = 2 * torch.finfo(torch.float32).eps * max(1.0, (queries * keys).max().item() * scale)
    return score * max(1.0, v.abs().max().item()), score


def check_decode(
    inputs: Inputs, logit_cap: float = 0.0, dtype: torch.dtype = torch.float32, use_stock: bool = False
) -> None:
    """Decode of all requests and layers, output and LSE, against the reference."""
    scale = inputs.storage.shape.head_dim**-0.5
    wrapper = TorchKernels().decode(use_stock=use_stock)
    wrapper.plan(inputs.storage, inputs.req_pages, inputs.kv_lens)
    q = inputs.q.to(dtype)
    for layer in range(inputs.storage.num_layers):
        result = wrapper.run(q, layer, scale, logit_cap, return_lse=True)
        out, lse = result
        assert out.dtype == dtype and out.shape == q.shape and lse.dtype == torch.float32
        for r in range(len(inputs.kv_lens)):
            k, v = reference_of(inputs, layer, r)
            want, want_lse = ref_attention.attention(q[r : r + 1], k, v, scale, logit_cap)
            error, lse_error = rounding(inputs, layer, q[r : r + 1], k, v, scale)
            torch.testing.assert_close(out[r].float(), want[0], rtol=OUTPUT_RTOL[dtype], atol=error)
            torch.testing.assert_close(lse[r], want_lse[0], rtol=1e-6, atol=lse_error)


def check_extend(inputs: Inputs, prefix_lens: list[int], logit_cap: float = 0.0, use_stock: bool = False) -> None:
    """Extend of all requests and layers in fp32, output and LSE, against the reference."""
    scale = inputs.storage.shape.head_dim**-0.5
    wrapper = TorchKernels().extend(use_stock=use_stock)
    wrapper.plan(inputs.storage, inputs.req_pages, torch.tensor(prefix_lens), torch.tensor(inputs.kv_lens))
    lengths = [n - p for n, p in zip(inputs.kv_lens, prefix_lens, strict=True)]
    q = torch.randn(sum(lengths), *inputs.q.shape[1:], generator=torch.Generator().manual_seed(1))
    before = q.clone()
    for layer in range(inputs.storage.num_layers):
        out, lse = wrapper.run(q, layer, scale, logit_cap, return_lse=True)
        assert torch.equal(q, before), "run changed its queries"
        at = 0
        for r, n in enumerate(lengths):
            k, v = reference_of(inputs, layer, r)
            want, want_lse = ref_attention.attention(q[at : at + n], k, v, scale, logit_cap, prefix_lens[r])
            error, lse_error = rounding(inputs, layer, q[at : at + n], k, v, scale)
            torch.testing.assert_close(out[at : at + n], want, rtol=1e-5, atol=error)
            torch.testing.assert_close(lse[at : at + n], want_lse, rtol=1e-6, atol=lse_error)
            at += n


def page_bytes_of(storage: GroupStorage, side: int, layer: int, page: int) -> tuple[int, torch.Tensor]:
    """Tier and raw bytes of a page, addressed from its table entry."""
    entry = int(storage.table[storage.arena_of(side), page])
    tier = storage.group.steps[entry & STEP_MASK][side]
    start = (entry >> STEP_BITS) * storage.shape.unit_bytes
    return tier, storage.arenas[side][layer, start : start + tier_units(tier) * storage.shape.unit_bytes]


def check_page_layout(inputs: Inputs, page: int) -> None:
    """A page's bytes and (zero, range) in every layer are what the definition makes of its 16-bit values."""
    storage = inputs.storage
    p, g = storage.shape.page_size, storage.shape.group_size
    for side in SIDES:
        for layer in range(storage.num_layers):
            x = inputs.written[side][layer, page * p : (page + 1) * p].float().transpose(0, 1)  # [H, P, D]
            tier, raw = page_bytes_of(storage, side, layer, page)
            if tier == 16:
                want16 = inputs.written[side][layer, page * p : (page + 1) * p].contiguous()
                assert torch.equal(raw, want16.view(torch.uint8).flatten())
                continue
            coding, key_clip = storage.coding.pick(layer), storage.coding.key_clip
            if side == K and storage.page_columns is not None:
                start = int(storage.page_columns[page]) * p
                term = ref_codes.center_term(coding, torch.arange(start, start + p))
                x = x if term is None else x - term
            x = ref_codes.transformed_keys(x, coding.transform_of(side))
            codes = torch.zeros(x.shape, dtype=torch.int64)
            meta = torch.zeros(x.shape[0], x.shape[2] // g, p, 2, dtype=torch.float16)
            for h in range(x.shape[0]):
                clip = 1.0 if side != K or key_clip is None else float(key_clip[layer, h])
                for t in range(p):
                    for i in range(x.shape[2] // g):
                        got, zero, span = ref_codes.quantize_group(x[h, t, i * g : (i + 1) * g])
                        codes[h, t, i * g : (i + 1) * g] = torch.tensor([ref_codes.chain(c, tier, clip) for c in got])
                        meta[h, i, t, 0], meta[h, i, t, 1] = zero, span
            assert torch.equal(raw, ref_codes.pack_page(codes, tier).flatten()), "codes differ"
            side_array = storage.meta[side]
            assert side_array is not None
            assert torch.equal(side_array[layer, page], meta), "(zero, range) differ"
