"""Plan/run attention over mixed-precision pages: the interface that backends use.

``plan`` once per forward and layer group, ``run`` once per layer. A request none of whose pages has
shrunk runs stock SGLang's own call (``kernels/cpu/stock.py``); the others share the batched path on
codes. Which implementation runs is decided here, by the device of the storage: torch on the CPU,
Triton on CUDA, where one decode launch reads all tiers and nothing waits for the device.

Example, ten requests with one new token each, in a pool made by ``allocate_pool``::

    decode = MixedKVDecodeWrapper()
    decode.plan(storage, req_pages, kv_lens)  # once per forward and layer group
    for layer in range(storage.num_layers):
        page_ops.store(storage, layer, slots, k[layer], v[layer])
        out = decode.run(q[layer], layer, scale=head_dim**-0.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_pmkvq.kernels import host_attention
from sglang_pmkvq.kernels.cpu import stock
from sglang_pmkvq.kernels.host_attention import HostPlan
from sglang_pmkvq.kernels.launch import Backend, uses_triton
from sglang_pmkvq.kernels.plan import (
    PageLists,
    host_lengths,
    read_page_lists,
)
from sglang_pmkvq.kernels.storage import GroupStorage

if TYPE_CHECKING:
    from sglang_pmkvq.kernels.device_attention import DevicePlan
    from sglang_pmkvq.kernels.device_plan import PageSource

Lengths = torch.Tensor | np.ndarray | Sequence[int]


class _Wrapper:
    """What decode and extend share. Subclasses plan; ``run`` serves both."""

    _stock_call = staticmethod(stock.decode)

    def __init__(self, use_stock: bool = True, backend: Backend = "auto") -> None:
        """Nothing is allocated before the first plan.

        Args:
            use_stock: on the CPU, requests with no shrunk page run stock's own call; False sends them
                through the batched path too. Triton has one path.
            backend: "auto" (by device), "torch" or "triton"; Triton on CPU tensors needs its
                interpreter.
        """
        self._use_stock = use_stock
        self._backend: Backend = backend
        self._device: DevicePlan | None = None
        self._plan: HostPlan | None = None
        self._inputs: tuple[GroupStorage, PageLists, np.ndarray, np.ndarray] | None = None
        self._batched_plan: HostPlan | None = None

    def _set_plan(self, storage: GroupStorage, lists: PageLists, starts: np.ndarray, lengths: np.ndarray) -> HostPlan:
        self._inputs = (storage, lists, starts, lengths)
        self._batched_plan = None
        self._plan = HostPlan.build(*self._inputs, use_stock=self._use_stock)
        return self._plan

    def _all_batched(self) -> HostPlan:
        """The plan without stock's call, for what stock cannot do: logit caps and LSE."""
        assert self._inputs is not None
        if self._batched_plan is None:
            self._batched_plan = HostPlan.build(*self._inputs, use_stock=False)
        return self._batched_plan

    def reserve(self, storage: GroupStorage, requests: int, max_pages: int, query_heads: int) -> None:
        """Triton only: allocates all buffers once, so that plan and run keep their addresses.

        A CUDA graph that captured ``run`` is then valid after every later ``plan``. Larger plans are
        refused.
        """
        self._device_plan().reserve(storage, requests, max_pages, query_heads)

    def _device_plan(self) -> DevicePlan:
        from sglang_pmkvq.kernels.device_attention import DevicePlan

        if self._device is None:
            self._device = DevicePlan()
        return self._device

    def run(
        self,
        q: torch.Tensor,
        layer: int,
        scale: float,
        logit_cap: float = 0.0,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        Args:
            q: ``[num_queries, Hq, D]``, any float dtype; Hq a multiple of the group's KV heads. As the
                model has it: where quantized keys are scaled or rotated, that is undone here.
            layer: index of the layer *within the group*.
            scale: softmax scale.
            logit_cap: cap·tanh(score/cap) if positive. Stock's call knows no cap, so then every
                request takes the batched path.
            return_lse: also return the log-sum-exp of the scores.

        Returns:
            out ``[num_queries, Hq, D]`` in q's dtype; with ``return_lse`` also fp32
            ``[num_queries, Hq]``, natural log. A request without KV gives 0 and −inf.

        Raises:
            ValueError: not planned yet, or a shape or layer that does not fit the plan.
        """
        if self._device is not None and self._device.buffers is not None:
            from sglang_pmkvq.kernels import device_attention

            _check_run(self._device.buffers.storage, self._device.num_queries, q, layer)
            result, result_lse = device_attention.run(self._device, q, layer, scale, logit_cap, return_lse)
            return result if result_lse is None else (result, result_lse)
        if self._plan is None:
            raise ValueError("run needs a plan: call plan(...) first")
        plan = self._all_batched() if logit_cap > 0.0 else self._plan
        _check_run(plan.storage, plan.num_queries, q, layer)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32) if return_lse else None
        host_attention.run_batched(plan, q, layer, scale, logit_cap, out, lse)
        for request in plan.extends:
            host_attention.run_extend(plan.storage, request, q, layer, scale, logit_cap, out, lse)
        if plan.stock_requests:
            if lse is not None:
                # SDPA returns no LSE, so it is computed apart; the output stays stock's.
                full = self._all_batched()
                host_attention.run_batched(full, q, layer, scale, logit_cap, torch.empty_like(out), lse)
                for request in full.extends:
                    host_attention.run_extend(
                        full.storage, request, q, layer, scale, logit_cap, torch.empty_like(out), lse
                    )
            self._stock_call(plan.storage, layer, plan.stock_requests, q, out, scale)
        return out if lse is None else (out, lse)


class MixedKVDecodeWrapper(_Wrapper):
    """One query per request."""

    def plan(
        self, storage: GroupStorage, req_pages: torch.Tensor, kv_lens: Lengths, max_pages: int | None = None
    ) -> None:
        """Plans a decode step of R requests.

        On CUDA nothing is read back: a bad length or page id cannot raise there. Pages without a block
        read block 0 and are counted in the plan's ``unmapped``.

        Args:
            req_pages: integer ``[R, max_pages]`` logical pages, anything beyond a request's own.
            kv_lens: ``[R]`` tokens of KV, the new one included (its K and V must be stored before
                ``run``).
            max_pages: on CUDA, a bound on the pages of any request that spares empty programs.

        Raises:
            ValueError: see ``read_page_lists``; reserved buffers that are too small.
        """
        if uses_triton(storage, self._backend):
            from sglang_pmkvq.kernels.device_plan import PageSource

            self.plan_source(storage, PageSource(req_pages), _device_lengths(storage, kv_lens), max_pages)
            return
        lens = host_lengths(kv_lens)
        if self._grow(storage, req_pages, lens):
            return
        lists = read_page_lists(storage, req_pages, lens)
        self._set_plan(storage, lists, np.arange(lens.size), np.ones(lens.size, dtype=np.int64))

    def _grow(self, storage: GroupStorage, req_pages: torch.Tensor, lens: np.ndarray) -> bool:
        """Makes the last plan that of the next step, where stock's call serves all and only lengths changed.

        With nothing shrunk these are P - 1 of P steps, and at small batches planning is what they would notice.
        """
        if self._plan is None or self._inputs is None or not self._plan.all_stock:
            return False
        planned, lists, starts, lengths = self._inputs
        grown = lists.grown(storage, req_pages, lens) if planned is storage else None
        if grown is None:
            return False
        self._inputs = (storage, grown, starts, lengths)
        self._batched_plan = None
        self._plan = self._plan.grown()
        return True

    def plan_source(
        self, storage: GroupStorage, source: PageSource, kv_lens: torch.Tensor, max_pages: int | None = None
    ) -> None:
        """``plan`` in Triton, with the pages wherever ``source`` says and lengths ``[R]`` on the device."""
        self._device_plan().plan_decode(storage, source, kv_lens, max_pages)


class MixedKVExtendWrapper(_Wrapper):
    """The last ``seq_len − prefix_len`` tokens of each request, causal.

    K and V of the chunk are already stored in 16-bit pages, as stock ``torch_native`` does it.
    Requests with one query (decode rows of a mixed batch) share the batched decode path.
    """

    _stock_call = staticmethod(stock.extend)

    def plan(self, storage: GroupStorage, req_pages: torch.Tensor, prefix_lens: Lengths, seq_lens: Lengths) -> None:
        """Plans an extend of R requests; q will hold their queries one request after the other.

        Lengths are needed on the host: a device tensor is waited for.

        Args:
            req_pages: integer ``[R, max_pages]`` logical pages, anything beyond a request's own.
            prefix_lens: ``[R]`` tokens before the chunk.
            seq_lens: ``[R]`` tokens with the chunk.

        Raises:
            ValueError: see ``read_page_lists``; a prefix longer than its sequence.
        """
        prefix, lens = host_lengths(prefix_lens), host_lengths(seq_lens)
        if prefix.shape != lens.shape or (prefix < 0).any() or (prefix > lens).any():
            raise ValueError(f"expected 0 <= prefix_lens <= seq_lens, got {prefix} and {lens}")
        if uses_triton(storage, self._backend):
            from sglang_pmkvq.kernels.device_plan import PageSource

            self._device_plan().plan_extend(storage, PageSource(req_pages), prefix, lens)
            return
        lists = read_page_lists(storage, req_pages, lens)
        lengths = lens - prefix
        self._set_plan(storage, lists, np.cumsum(lengths) - lengths, lengths)

    def plan_source(self, storage: GroupStorage, source: PageSource, prefix_lens: Lengths, seq_lens: Lengths) -> None:
        """``plan`` in Triton, with the pages wherever ``source`` says."""
        self._device_plan().plan_extend(storage, source, host_lengths(prefix_lens), host_lengths(seq_lens))


def _device_lengths(storage: GroupStorage, lens: Lengths) -> torch.Tensor:
    if isinstance(lens, torch.Tensor) and lens.device == storage.device:
        return lens
    return torch.as_tensor(host_lengths(lens)).to(storage.device)


def _check_run(storage: GroupStorage, num_queries: int, q: torch.Tensor, layer: int) -> None:
    s = storage.shape
    if q.dim() != 3 or q.shape[0] != num_queries or q.shape[2] != s.head_dim:
        raise ValueError(f"q must be [{num_queries}, Hq, {s.head_dim}], got {tuple(q.shape)}")
    if q.shape[1] % s.num_kv_heads:
        raise ValueError(f"query heads must be a multiple of {s.num_kv_heads} KV heads, got {q.shape[1]}")
    if not 0 <= layer < storage.num_layers:
        raise ValueError(f"layer must be in [0, {storage.num_layers}) of its group, got {layer}")
