"""SGLang's attention backend over the mixed-precision wrappers: plan once per forward, run per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType

from sglang_pmkvq.config import PmkvqConfigError
from sglang_pmkvq.kernels.attention import MixedKVDecodeWrapper, MixedKVExtendWrapper
from sglang_pmkvq.pool import MixedPrecisionTokenPool

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class PmkvqAttnBackend(AttentionBackend):
    """One decode and one extend wrapper per layer group; no state outlives a forward but their buffers."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        pool = runner.token_to_kv_pool
        if not isinstance(pool, MixedPrecisionTokenPool):
            raise RuntimeError(
                f"attention backend pmkvq needs its own pool, SGLang built {type(pool).__name__}"
            )
        self.token_to_kv_pool = pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.device = runner.device
        self._page_size = pool.page_size
        self._decode = [MixedKVDecodeWrapper() for _ in pool.storages]
        self._extend = [MixedKVExtendWrapper() for _ in pool.storages]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan a decode or an extend for every layer group from request rows and lengths."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        pool = self.token_to_kv_pool
        if forward_batch.out_cache_loc is not None:
            pool.plan_writes(forward_batch.out_cache_loc)
        lens = _host(forward_batch.seq_lens_cpu, forward_batch.seq_lens)
        rows = self.req_to_token_pool.req_to_token[
            forward_batch.req_pool_indices, : max(lens, default=1) : self._page_size
        ]
        pages = rows.to(torch.int64) // self._page_size
        if mode.is_decode():
            for storage, decode in zip(pool.storages, self._decode, strict=True):
                decode.plan(storage, pages, lens)
        else:
            prefix = _host(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens)
            for storage, extend in zip(pool.storages, self._extend, strict=True):
                extend.plan(storage, pages, prefix, lens)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: object,
    ) -> torch.Tensor:
        """q: [B, Hq·D]; k, v: [B, H·D] or [B, H, D]. Returns [B, Hq·D]."""
        return self._forward(self._decode, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: object,
    ) -> torch.Tensor:
        """q: [ΣLq, Hq·D]; the chunk's K and V are stored first, then prefix and chunk are read."""
        return self._forward(self._extend, q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self,
        wrappers: list[MixedKVDecodeWrapper] | list[MixedKVExtendWrapper],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        _check_layer(layer, k)
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        group, index = pool.place(layer.layer_id)
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = wrappers[group].run(q3, index, layer.scaling, logit_cap=layer.logit_cap)
        assert isinstance(out, torch.Tensor)
        return out.reshape(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def support_triton(self) -> bool:
        return self.device != "cpu"


def _check_layer(layer: RadixAttention, k: torch.Tensor | None) -> None:
    """Refuse layers that the kernels cannot serve; the first one is seen at start-up, in SGLang's warm-up."""
    window = layer.sliding_window_size
    if (
        k is None
        or layer.is_cross_attention
        or layer.attn_type == AttentionType.ENCODER_ONLY
        or (window is not None and window > -1)
        or layer.qk_head_dim != layer.v_head_dim
    ):
        raise PmkvqConfigError(
            f"--kv-quant pmkvq cannot serve layer {layer.layer_id}: shared KV, cross attention, sliding windows and "
            "unequal K and V head dims are not supported; use --kv-quant none"
        )


def _host(cpu: torch.Tensor | list[int] | None, device: torch.Tensor) -> list[int]:
    """Lengths as Python ints, from SGLang's host mirror where it has one."""
    source = device if cpu is None else cpu
    return source if isinstance(source, list) else source.tolist()
