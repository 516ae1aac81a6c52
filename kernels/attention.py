"""Attention over mixed-precision pages: the interface, FlashInfer-style.

``plan`` once per forward and layer group, ``run`` once per layer. On the CPU (``host_attention``) a request none of
whose pages has shrunk runs stock SGLang's own call (``kernels/cpu/stock.py``) and the others share a batched path on
codes; on CUDA (``device_attention``) one Triton launch reads all tiers and nothing waits for the device.

Example, ten requests with one new token each, in a pool made by ``allocate_pool``::

    kernels = kernels_for(storage.device)
    decode = kernels.decode()
    decode.plan(storage, req_pages, kv_lens)  # once per forward and layer group
    for layer in range(storage.num_layers):
        kernels.store(storage, layer, slots, k[layer], v[layer])
        out = decode.run(q[layer], layer, scale=head_dim**-0.5)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang_pmkvq.kernels.storage import GroupStorage

Lengths = torch.Tensor | np.ndarray | Sequence[int]


@dataclass
class PageSource:
    """Where the logical pages of requests stand.

    Attributes:
        values: integer ``[rows, n]``; ``values[row, column * column_stride] // divisor`` is the page.
        rows: integer ``[R]`` row of each request, or None: request r has row r.
        column_stride, divisor: 1 and 1 for page ids; P and P for SGLang's token slots per position.
    """

    values: torch.Tensor
    rows: torch.Tensor | None = None
    column_stride: int = 1
    divisor: int = 1
    _read: tuple[int, torch.Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def max_pages(self) -> int:
        return -(-self.values.shape[1] // self.column_stride)

    def page_ids(self, pages: int) -> torch.Tensor:
        """Integer ``[R, >= pages]``, the first pages of every request; read once, whichever layer group asks."""
        if self.rows is None and self.column_stride == self.divisor == 1:
            return self.values
        if self._read is None or self._read[0] < pages:
            columns = slice(0, max(pages, 1) * self.column_stride, self.column_stride)
            if self.values.device.type == "cpu":
                # numpy: at small batches the cost of calling torch is what a decode step would notice.
                values = self.values.numpy()
                read = values[:, columns] if self.rows is None else values[self.rows.numpy(), columns]
                self._read = (pages, torch.from_numpy(read // self.divisor))
            else:
                chosen = self.values[:, columns] if self.rows is None else self.values[self.rows, columns]
                self._read = (pages, chosen.to(torch.int64) // self.divisor)
        return self._read[1]


def host_lengths(lens: Lengths) -> np.ndarray:
    """Lengths as int64 on the host, a copy: SGLang counts its tensor up in place. A device tensor is waited for."""
    if isinstance(lens, torch.Tensor):
        lens = lens.cpu().numpy()
    return np.array(lens, dtype=np.int64).reshape(-1)


class Attention(ABC):
    """What decode and extend share. Nothing is allocated before the first plan."""

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
                model has it: what reads quantized keys is made of it here.
            layer: index of the layer *within the group*.
            scale: softmax scale.
            logit_cap: cap·tanh(score/cap) if positive.
            return_lse: also return the log-sum-exp of the scores.

        Returns:
            out ``[num_queries, Hq, D]`` in q's dtype; with ``return_lse`` also fp32
            ``[num_queries, Hq]``, natural log. A request without KV gives 0 and −inf.

        Raises:
            ValueError: not planned yet, or a shape or layer that does not fit the plan.
        """
        planned = self._planned()
        if planned is None:
            raise ValueError("run needs a plan: call plan(...) first")
        _check_run(*planned, q, layer)
        out, lse = self._attend(q, layer, scale, logit_cap, return_lse)
        return out if lse is None else (out, lse)

    @abstractmethod
    def _planned(self) -> tuple[GroupStorage, int] | None:
        """Storage and number of queries of the last plan, None before the first."""

    @abstractmethod
    def _attend(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``run`` of arguments that fit."""


class DecodeAttention(Attention):
    """One query per request."""

    def plan(
        self, storage: GroupStorage, req_pages: torch.Tensor, kv_lens: Lengths, max_pages: int | None = None
    ) -> None:
        """Plans a decode step of R requests.

        On CUDA nothing is read back: a bad length or page id cannot raise there. Pages without a block
        read block 0 and are counted in the storage's ``unmapped_reads``.

        Args:
            req_pages: integer ``[R, max_pages]`` logical pages, anything beyond a request's own.
            kv_lens: ``[R]`` tokens of KV, the new one included (its K and V must be stored before
                ``run``).
            max_pages: on CUDA, a bound on the pages of any request that spares empty programs.

        Raises:
            ValueError: see ``page_lists.read_page_lists``; reserved buffers that are too small.
        """
        self.plan_source(storage, PageSource(req_pages), kv_lens, max_pages)

    @abstractmethod
    def plan_source(
        self, storage: GroupStorage, source: PageSource, kv_lens: Lengths, max_pages: int | None = None
    ) -> None:
        """``plan`` with the pages wherever ``source`` says."""

    def reserve(self, storage: GroupStorage, requests: int, max_pages: int, query_heads: int) -> None:
        """Allocates all buffers once, so that plan and run keep their addresses.

        A CUDA graph that captured ``run`` is then valid after every later ``plan``. Larger plans are refused.

        Raises:
            NotImplementedError: these kernels cannot be captured.
        """
        raise NotImplementedError("CUDA graphs need the Triton kernels")


class ExtendAttention(Attention):
    """The last ``seq_len − prefix_len`` tokens of each request, causal.

    K and V of the chunk are already stored in 16-bit pages, as stock ``torch_native`` does it.
    Requests with one query (decode rows of a mixed batch) share the batched decode path.
    """

    def plan(self, storage: GroupStorage, req_pages: torch.Tensor, prefix_lens: Lengths, seq_lens: Lengths) -> None:
        """Plans an extend of R requests; q will hold their queries one request after the other.

        Lengths are needed on the host: a device tensor is waited for.

        Args:
            req_pages: integer ``[R, max_pages]`` logical pages, anything beyond a request's own.
            prefix_lens: ``[R]`` tokens before the chunk.
            seq_lens: ``[R]`` tokens with the chunk.

        Raises:
            ValueError: see ``page_lists.read_page_lists``; a prefix longer than its sequence.
        """
        self.plan_source(storage, PageSource(req_pages), prefix_lens, seq_lens)

    def plan_source(self, storage: GroupStorage, source: PageSource, prefix_lens: Lengths, seq_lens: Lengths) -> None:
        """``plan`` with the pages wherever ``source`` says."""
        prefix, lens = host_lengths(prefix_lens), host_lengths(seq_lens)
        if prefix.shape != lens.shape or (prefix < 0).any() or (prefix > lens).any():
            raise ValueError(f"expected 0 <= prefix_lens <= seq_lens, got {prefix} and {lens}")
        self._plan_lengths(storage, source, prefix, lens)

    @abstractmethod
    def _plan_lengths(self, storage: GroupStorage, source: PageSource, prefix: np.ndarray, lens: np.ndarray) -> None:
        """``plan_source`` with int64 lengths ``[R]`` that fit each other."""


def _check_run(storage: GroupStorage, num_queries: int, q: torch.Tensor, layer: int) -> None:
    """Raise ``ValueError`` for a q or a layer that the plan is not for."""
    s = storage.shape
    if q.dim() != 3 or q.shape[0] != num_queries or q.shape[2] != s.head_dim:
        raise ValueError(f"q must be [{num_queries}, Hq, {s.head_dim}], got {tuple(q.shape)}")
    if q.shape[1] % s.num_kv_heads:
        raise ValueError(f"query heads must be a multiple of {s.num_kv_heads} KV heads, got {q.shape[1]}")
    if not 0 <= layer < storage.num_layers:
        raise ValueError(f"layer must be in [0, {storage.num_layers}) of its group, got {layer}")
