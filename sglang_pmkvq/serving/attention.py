"""SGLang's attention backend over the mixed-precision wrappers: plan once per forward, run per layer.

On CUDA every kernel is compiled when the backend is built, so that no forward waits for the compiler, and the
plan is made on the device, outside any graph, in ``init_forward_metadata_out_graph``: it reads
SGLang's request table and our page table, which later steps overwrite. A captured decode graph holds only the
buffers that the plan fills.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch

from sglang_pmkvq.kernels.attention import DecodeAttention, ExtendAttention, PageSource
from sglang_pmkvq.serving import engine
from sglang_pmkvq.serving.config import PmkvqConfigError
from sglang_pmkvq.serving.engine import AttentionBackend, RadixAttention
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.refusals import LAYER_REFUSALS, check_model_facts

if TYPE_CHECKING:
    from sglang_pmkvq.serving.engine import ForwardBatch, ModelRunner

logger = logging.getLogger(__name__)


class PmkvqAttnBackend(AttentionBackend):
    """One decode and one extend wrapper per layer group; no state outlives a forward but their buffers."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        pool = runner.token_to_kv_pool
        if not isinstance(pool, MixedPrecisionTokenPool):
            raise RuntimeError(
                f"attention backend pmkvq needs its own pool, SGLang built {type(pool).__name__}"
            )
        architectures = engine.architectures(runner)
        layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
        for layer in layers:
            check_model_facts(layer, LAYER_REFUSALS, architectures)
        self.token_to_kv_pool = pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.device = runner.device
        self._page_size = pool.page_size
        self._query_heads = engine.query_heads(runner)
        self._decode = self._decode_wrappers()
        self._extend = [pool.kernels.extend() for _ in pool.storages]
        # The wrappers of decode graphs, with buffers of their own that never move; None without graphs.
        self._graph_decode: list[DecodeAttention] | None = None
        self._active_decode = self._decode
        if pool.kernels.compiles:
            self._compile_kernels(layers)

    def _compile_kernels(self, layers: list[RadixAttention]) -> None:
        """Compile what serving will launch, or load it from Triton's cache: a forward must not wait for it."""
        start = time.monotonic()
        caps = {float(layer.logit_cap) for layer in layers}
        pool = self.token_to_kv_pool
        for storage in pool.storages:
            pool.kernels.warm_up(storage, self._query_heads, caps or {0.0}, self.req_to_token_pool.req_to_token.dtype)
        logger.info("pmkvq: kernels ready in %.1f s", time.monotonic() - start)

    def _decode_wrappers(self) -> list[DecodeAttention]:
        pool = self.token_to_kv_pool
        return [pool.kernels.decode() for _ in pool.storages]

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured graphs will read, for ``max_bs`` requests of any length."""
        max_pages = self._page_source(self.req_to_token_pool.req_to_token[:1, 0]).max_pages
        self._graph_decode = self._decode_wrappers()
        for storage, decode in zip(self.token_to_kv_pool.storages, self._graph_decode, strict=True):
            decode.reserve(storage, max_bs, max_pages, self._query_heads)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Plan the decode of a captured graph: before its capture and before every replay.

        At replay ``forward_batch`` is SGLang's padded view; padded rows are one token of page 0.
        """
        assert self._graph_decode is not None, "init_cuda_graph_state comes first"
        assert forward_batch.forward_mode.is_decode(), "only decode graphs have a plan that can be replayed"
        self._active_decode = self._graph_decode
        self._plan_decode(forward_batch)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan an eager decode or extend for every layer group from request rows and lengths."""
        self._active_decode = self._decode
        self.token_to_kv_pool.kernels.begin_forward()
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if mode.is_decode():
            self._plan_decode(forward_batch)
            return
        lens = _host(forward_batch.seq_lens_cpu, forward_batch.seq_lens)
        prefix = _host(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens)
        source = self._page_source(forward_batch.req_pool_indices)
        for storage, extend in zip(self.token_to_kv_pool.storages, self._extend, strict=True):
            extend.plan_source(storage, source, prefix, lens)

    def _page_source(self, rows: torch.Tensor) -> PageSource:
        """Where the kernels find logical pages: every P-th token slot of a request's row, over P."""
        return PageSource(self.req_to_token_pool.req_to_token, rows, self._page_size, self._page_size)

    def _plan_decode(self, forward_batch: ForwardBatch) -> None:
        """Plan of the active decode wrappers; on CUDA nothing waits for the device."""
        source = self._page_source(forward_batch.req_pool_indices)
        longest = None
        # Without a sum SGLang's host mirror of the lengths is stale, and the grid covers the longest possible.
        if forward_batch.seq_lens_sum is not None and forward_batch.seq_lens_cpu is not None:
            longest = -(-max(int(forward_batch.seq_lens_cpu.max()), 1) // self._page_size)
        for storage, decode in zip(self.token_to_kv_pool.storages, self._active_decode, strict=True):
            decode.plan_source(storage, source, forward_batch.seq_lens, longest)

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
        return self._forward(self._active_decode, q, k, v, layer, forward_batch, save_kv_cache, kwargs)

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
        return self._forward(self._extend, q, k, v, layer, forward_batch, save_kv_cache, kwargs)

    @torch.compiler.disable
    def _forward(
        self,
        wrappers: list[DecodeAttention] | list[ExtendAttention],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        extra: dict[str, object],
    ) -> torch.Tensor:
        _check_call(layer, k, extra)
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        group, index = pool.place(layer.layer_id)
        q3 = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if pool.probe is not None:
            pool.show_queries(group, index, q3)
        out = wrappers[group].run(q3, index, layer.scaling, logit_cap=layer.logit_cap)
        assert isinstance(out, torch.Tensor)
        return out.reshape(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padded rows have one token, at request slot 0, which is page 0."""
        return 1

    def support_triton(self) -> bool:
        return self.device != "cpu"


def _check_call(layer: RadixAttention, k: torch.Tensor | None, extra: dict[str, object]) -> None:
    """Refuse what only a call shows: layers that read another layer's KV, and arguments that the kernels ignore."""
    if k is not None and not extra:
        return
    unknown = [name for name, value in extra.items() if value is not None]
    if k is None or unknown:
        what = f"attention with {', '.join(unknown)}" if unknown else "KV that is another layer's"
        raise PmkvqConfigError(
            f"--kv-quant pmkvq cannot serve layer {layer.layer_id}: the kernels know no {what}; use --kv-quant none."
        )


def _host(cpu: torch.Tensor | list[int] | None, device: torch.Tensor) -> list[int]:
    """Lengths as Python ints, from SGLang's host mirror where it has one."""
    source = device if cpu is None else cpu
    return source if isinstance(source, list) else source.tolist()
