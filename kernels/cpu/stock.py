"""SGLang's own ``torch_native`` attention call on gathered 16-bit pages, bit for bit.

Shapes, strides, dtypes, flags and the padded "redundant" queries of extend follow SGLang 0.5.15
``torch_native_backend.py`` (``_run_sdpa_forward_decode`` and ``_run_sdpa_forward_extend``): what the
CPU kernel behind ``scaled_dot_product_attention`` sees is the same, so its bits are too. Only the
gather differs: whole pages, not single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_pmkvq.formats import SIDES
from sglang_pmkvq.kernels.storage import GroupStorage


@dataclass(frozen=True)
class StockRequest:
    """A request none of whose pages has shrunk.

    Attributes:
        start, end: its rows of q.
        prefix_len: tokens before its first query.
        kv_len: tokens of KV.
        superblocks: per side, int64 ``[pages]``.
    """

    start: int
    end: int
    prefix_len: int
    kv_len: int
    superblocks: tuple[torch.Tensor, torch.Tensor]


def gather_tokens(storage: GroupStorage, side: int, layer: int, request: StockRequest) -> torch.Tensor:
    """16-bit rows of a request: model dtype ``[kv_len, H, D]``, contiguous."""
    s = storage.shape
    rows = storage.page_rows16[side][layer].index_select(0, request.superblocks[side])
    return rows.view(-1, s.num_kv_heads, s.head_dim)[: request.kv_len]


def decode(
    storage: GroupStorage,
    layer: int,
    requests: list[StockRequest],
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """One query per request: q and out ``[R, Hq, D]``."""
    query = q.movedim(0, q.dim() - 2)
    enable_gqa = q.shape[1] != storage.shape.num_kv_heads
    for r in requests:
        k, v = (gather_tokens(storage, side, layer, r).movedim(0, 1) for side in SIDES)
        got = scaled_dot_product_attention(
            query[:, r.start : r.end, :].unsqueeze(0),
            k.to(q.dtype).unsqueeze(0),
            v.to(q.dtype).unsqueeze(0),
            attn_mask=None,
            enable_gqa=enable_gqa,
            scale=scale,
            is_causal=False,
        )
        out[r.start : r.end] = got.squeeze(0).movedim(1, 0)


def extend(
    storage: GroupStorage,
    layer: int,
    requests: list[StockRequest],
    q: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """The last ``end - start`` tokens of each request, causal: q and out ``[ΣLq, Hq, D]``."""
    query = q.movedim(0, q.dim() - 2)
    enable_gqa = q.shape[1] != storage.shape.num_kv_heads
    for r in requests:
        padded = torch.empty((query.shape[0], r.kv_len, query.shape[2]), dtype=q.dtype, device=q.device)
        padded[:, r.prefix_len :, :] = query[:, r.start : r.end, :]
        k, v = (gather_tokens(storage, side, layer, r).movedim(0, 1) for side in SIDES)
        got = scaled_dot_product_attention(
            padded.unsqueeze(0),
            k.to(q.dtype).unsqueeze(0),
            v.to(q.dtype).unsqueeze(0),
            attn_mask=None,
            enable_gqa=enable_gqa,
            scale=scale,
            is_causal=True,
        )
        out[r.start : r.end] = got.squeeze(0).movedim(1, 0)[r.prefix_len :]
