"""The token pool on the device: arenas of mixed-precision pages behind SGLang's KV cache contract."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from sglang.srt.mem_cache.memory_pool import GB, KVCache, unwrap_write_loc

from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.config import Limits
from sglang_pmkvq.formats import LayerGroup, PoolGeometry, V
from sglang_pmkvq.kernels import page_ops
from sglang_pmkvq.kernels.launch import Backend, uses_triton
from sglang_pmkvq.kernels.storage import GroupStorage, allocate_pool
from sglang_pmkvq.ledger import PolicyConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceCounts:
    """What kernels counted since the start, over all layer groups.

    Attributes:
        overflow_groups: groups of channels with finite values beyond fp16, clamped at their first shrink.
        dropped_rows: new rows (one token in one layer) that were not stored, for their page was unmapped or shrunk.
        unmapped_reads: pages without a block that a plan of attention met.
    """

    overflow_groups: int
    dropped_rows: int
    unmapped_reads: int

    @property
    def lost(self) -> bool:
        """Whether a row or a page was lost, which ledger and kernels must never let happen."""
        return bool(self.dropped_rows or self.unmapped_reads)


@dataclass(frozen=True)
class PoolSetup:
    """What start-up decided about the pool.

    Attributes:
        geometry: sizes of arenas, tables and side arrays.
        policy: order and depth of shrinking.
        limits: running requests and chunk that the 16-bit reserve covers.
        budget_bytes: bytes the pool may use, everything included.
        stock_tokens: tokens that SGLang's own pool would hold in the same bytes.
        timeline: file to write the timeline to, or None.
        key_scales: per layer group, fp32 [L, H, D] or None; None: no group has any.
        key_clips: per layer group, clip factors fp32 [L, H] or None; None: no group has any.
        hadamard: keys are rotated before they are quantized.
        calibration: what the calibration file says of itself, or None.
    """

    geometry: PoolGeometry
    policy: PolicyConfig
    limits: Limits
    budget_bytes: int
    stock_tokens: int
    timeline: str | None = None
    key_scales: tuple[torch.Tensor | None, ...] | None = None
    key_clips: tuple[torch.Tensor | None, ...] | None = None
    hadamard: bool = False
    calibration: dict[str, object] | None = None

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return self.geometry.groups

    @property
    def key_transform(self) -> str:
        """What is done to keys before they are quantized: ``none``, ``scale`` or ``hadamard``."""
        scaled = any(scale is not None for scale in self.key_scales or ())
        return "hadamard" if self.hadamard else "scale" if scaled else "none"

    @property
    def tokens(self) -> int:
        return self.geometry.num_pages * self.geometry.shape.page_size

    def summary(self) -> dict[str, object]:
        """What the flags resolved to, for the log and for ``/server_info``."""
        return {
            "pool_bytes": self.geometry.total_bytes,
            "budget_bytes": self.budget_bytes,
            "logical_tokens": self.tokens,
            "stock_tokens": self.stock_tokens,
            "groups": [
                {"layers": list(g.layers), "k_final": g.k_final, "v_final": g.v_final} for g in self.groups
            ],
            "page_size": self.geometry.shape.page_size,
            "group_size": self.geometry.shape.group_size,
            "policy": self.policy.policy,
            "protect": self.policy.protect,
            "window": self.policy.window_tokens,
            "sink_tokens": self.policy.sink_tokens,
            "min_active_bits": self.policy.min_active_bits,
            "max_running_requests": self.limits.running,
            "chunked_prefill_size": self.limits.chunk,
            "hard_pages": self.limits.hard_pages,
            "key_transform": self.key_transform,
            "calibration": self.calibration,
        }


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"--kv-quant pmkvq: {what} needs 16-bit KV buffers, which this pool does not keep"
    )


class MixedPrecisionTokenPool(KVCache):
    """SGLang's KV cache contract over mixed-precision pages.

    ``size`` is logical: tokens that SGLang may hand out. Physical bytes belong to the ledger; this class holds
    the tensors, writes new rows to 16-bit pages and executes the ledger's commands. ``backend`` says who runs the
    kernels: by device, Triton on CUDA and torch on the CPU.

    Raises:
        ValueError: the tensors would exceed the byte budget, or dtype or head dims are not supported.
    """

    backend: Backend = "auto"

    def __init__(
        self,
        setup: PoolSetup,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        layer_num: int,
        device: str,
        enable_memory_saver: bool,
        v_head_dim: int | None = None,
        start_layer: int | None = None,
        end_layer: int | None = None,
        **unused: object,
    ) -> None:
        super().__init__(
            size, page_size, dtype, layer_num, device, enable_memory_saver, start_layer, end_layer
        )
        shape = setup.geometry.shape
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"--kv-quant pmkvq needs a bf16 or fp16 model, got {dtype}; pass --dtype bfloat16"
            )
        if (head_num, head_dim, page_size) != (shape.num_kv_heads, shape.head_dim, shape.page_size):
            raise ValueError(f"pool built for {shape}, SGLang asks for {head_num=} {head_dim=} {page_size=}")
        self.setup = setup
        self.head_num = head_num
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim or head_dim
        self.storages = allocate_pool(
            setup.geometry, dtype, device, setup.key_scales, setup.key_clips, setup.hadamard
        )
        self._place = {
            layer: (g, index)
            for g, group in enumerate(setup.groups)
            for index, layer in enumerate(group.layers)
        }
        self._rows: list[torch.Tensor] = []
        self._rows_loc: torch.Tensor | None = None
        self._counts = DeviceCounts(0, 0, 0)
        used = self.storage_bytes()
        if used > setup.budget_bytes:
            raise ValueError(f"KV pool tensors take {used} bytes, the budget is {setup.budget_bytes}")
        self._finalize_allocation_log(size)

    def storage_bytes(self) -> int:
        """Bytes of every tensor that holds KV, (zero, range) or page tables."""
        return sum(storage.nbytes for storage in self.storages)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of K and of V; the page tables count as K."""
        value = sum(_side_bytes(storage, V) for storage in self.storages)
        return self.storage_bytes() - value, value

    def place(self, layer_id: int) -> tuple[int, int]:
        """(layer group, index of the layer in it)."""
        return self._place[layer_id - self.start_layer]

    def execute(self, batch: CommandBatch) -> None:
        """Run the ledger's commands: waves in order, then the page table. Call on the forward stream."""
        page_ops.execute_batch(self.storages, batch, self.backend)
        self._rows_loc = None

    def device_counts(self) -> DeviceCounts:
        """What the kernels counted since the start; waits for the device, once for all.

        Warns at the first value beyond fp16, and at CRITICAL at the first row that was not stored or page that was
        read without a block: then answers are wrong.
        """
        each = [(s.clipped_groups, s.dropped_rows, s.unmapped_reads) for s in self.storages]
        counts = DeviceCounts(*torch.stack([torch.stack(row) for row in each]).sum(dim=0).tolist())
        if counts.overflow_groups and not self._counts.overflow_groups:
            logger.warning(
                "pmkvq: KV values beyond the fp16 range were clamped while shrinking; see %s",
                "sglang:pmkvq_overflow_groups_total",
            )
        if counts.lost and not self._counts.lost:
            logger.critical(
                "pmkvq: %d new KV rows were not stored and %d pages without a block were read: answers are wrong, "
                "restart the server and report this; see %s",
                counts.dropped_rows,
                counts.unmapped_reads,
                "sglang:pmkvq_dropped_rows_total",
            )
        self._counts = counts
        return counts

    def plan_writes(self, loc: torch.Tensor) -> None:
        """Resolve the slots of a forward to arena rows once, for all layers."""
        self._rows = [page_ops.resolve_slots(storage, loc) for storage in self.storages]
        self._rows_loc = loc

    def set_kv_buffer(
        self,
        layer: object,
        loc_info: object,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        k_scale: float | None = None,
        v_scale: float | None = None,
        layer_id_override: int | None = None,
        dcp_kv_mask: torch.Tensor | None = None,
    ) -> None:
        """Write new rows into 16-bit pages. ``cache_k``/``cache_v``: [T, H, D]; slots int64 [T].

        In Triton the slots are resolved by the writing kernel, so a CUDA graph may hold it: what it captured is the
        addresses of SGLang's slot buffer and of the page table.
        """
        loc = unwrap_write_loc(loc_info)[0]
        layer_id: int = layer.layer_id if layer_id_override is None else layer_id_override  # type: ignore[attr-defined]
        group, index = self.place(layer_id)
        storage = self.storages[group]
        k = cache_k.view(-1, self.head_num, self.head_dim)
        v = cache_v.view(-1, self.head_num, self.v_head_dim)
        if uses_triton(storage, self.backend):
            page_ops.store(storage, index, loc, k, v, self.backend)
            return
        if loc is not self._rows_loc:
            self.plan_writes(loc)
        page_ops.store_rows(storage, index, self._rows[group], k, v)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        raise _unsupported("get_key_buffer")

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        raise _unsupported("get_value_buffer")

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise _unsupported("get_kv_buffer")

    def get_v_head_dim(self) -> int:
        return self.v_head_dim

    def register_layer_transfer_counter(self, layer_transfer_counter: object) -> None:
        raise _unsupported("HiCache")

    def get_cpu_copy(self, indices: torch.Tensor, mamba_indices: torch.Tensor | None = None) -> object:
        raise _unsupported("offloading")

    def load_cpu_copy(
        self, kv_cache_cpu: object, indices: torch.Tensor, mamba_indices: object = None
    ) -> None:
        raise _unsupported("offloading")

    def get_contiguous_buf_infos(self) -> object:
        raise _unsupported("prefill/decode disaggregation")

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        raise _unsupported("speculative decoding")

    def set_kv_buffer_prefix_valid(self, *args: object, **kwargs: object) -> None:
        raise _unsupported("speculative decoding")

    def log_line(self) -> str:
        """The start-up line: bytes, logical tokens, what stock would have had, groups, limits."""
        s = self.setup
        groups = "; ".join(f"layers {_ranges(g.layers)} K{g.k_final}/V{g.v_final}" for g in s.groups)
        reserve = s.limits.hard_pages * self.page_size
        return (
            f"pmkvq pool: {self.storage_bytes() / GB:.3f} GiB of {s.budget_bytes / GB:.3f} GiB, "
            f"{s.tokens} logical tokens ({s.stock_tokens} at 16 bits in the same bytes), final widths: {groups}, "
            f"policy {s.policy.policy}, window {s.policy.window_tokens} and sink {s.policy.sink_tokens} tokens "
            f"({s.policy.protect}), 16-bit reserve R={s.limits.hard_pages} pages ({reserve} tokens: "
            f"{s.limits.running} requests, chunks of {s.limits.chunk})" + self._calibration_part()
        )

    def _calibration_part(self) -> str:
        c = self.setup.calibration
        if c is None:
            return ", key transform hadamard" if self.setup.hadamard else ""
        return f", calibrated for {c['model']}: mean final width {c['mean_bits']:.2f}, transform {c['transform']}"


def _side_bytes(storage: GroupStorage, side: int) -> int:
    meta = storage.meta[side]
    return storage.arenas[side].nbytes + (0 if meta is None else meta.nbytes)


def _ranges(layers: tuple[int, ...]) -> str:
    """``0-3,6`` for (0, 1, 2, 3, 6)."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
