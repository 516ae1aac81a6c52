"""The token pool on the device: arenas of mixed-precision pages behind SGLang's KV cache contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_pmkvq.commands import CommandBatch
from sglang_pmkvq.formats import V
from sglang_pmkvq.kernels.choose import BackendName, kernels_for
from sglang_pmkvq.kernels.storage import GroupStorage, allocate_pool, shared_bytes
from sglang_pmkvq.serving.counters import DeviceCounters
from sglang_pmkvq.serving.engine import KVCache, unwrap_write_loc
from sglang_pmkvq.serving.first_shrink import FirstShrink
from sglang_pmkvq.serving.pool_setup import PoolSetup

if TYPE_CHECKING:
    from sglang_pmkvq.ledger import Ledger


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"--kv-quant pmkvq: {what} needs 16-bit KV buffers, which this pool does not keep"
    )


class MixedPrecisionTokenPool(KVCache):
    """SGLang's KV cache contract over mixed-precision pages.

    ``size`` is logical: tokens that SGLang may hand out. Physical bytes belong to the ledger; this class holds
    the tensors, writes new rows to 16-bit pages and executes the ledger's commands.

    Attributes:
        backend: who is to run the kernels: by device, Triton on CUDA and torch on the CPU.
        kernels: who does.
        counters: what they counted.
        first_shrink: what was found before the first pages shrank; None until ``watch``.
        probe: who wants to see queries before attention runs; None but for the forward or so after a first shrink.

    Raises:
        ValueError: the tensors would exceed the byte budget, or dtype or head dims are not supported.
    """

    backend: BackendName = "auto"

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
        self.kernels = kernels_for(device, self.backend)
        self.storages = allocate_pool(setup.geometry, dtype, device, setup.configuration.codings)
        self.counters = DeviceCounters(self.storages)
        self.first_shrink: FirstShrink | None = None
        self.probe: FirstShrink | None = None
        self._watcher: FirstShrink | None = None
        self._place = {
            layer: (g, index)
            for g, group in enumerate(setup.groups)
            for index, layer in enumerate(group.layers)
        }
        used = self.storage_bytes()
        if used > setup.budget_bytes:
            raise ValueError(f"KV pool tensors take {used} bytes, the budget is {setup.budget_bytes}")
        self._finalize_allocation_log(size)

    def storage_bytes(self) -> int:
        """Bytes of every tensor that holds KV, (zero, range), page tables, or centres and their rotary table."""
        return sum(storage.nbytes for storage in self.storages) + shared_bytes(self.storages)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of K and of V; page tables and centres count as K."""
        value = sum(_side_bytes(storage, V) for storage in self.storages)
        return self.storage_bytes() - value, value

    def place(self, layer_id: int) -> tuple[int, int]:
        """(layer group, index of the layer in it)."""
        return self._place[layer_id - self.start_layer]

    def execute(self, batch: CommandBatch) -> None:
        """Run the ledger's commands: waves in order, then the page table. Call on the forward stream."""
        watcher = self._watcher
        if watcher is not None and batch.waves:
            watcher.before(batch)
            self.probe = watcher if watcher.waiting else None
            self._watcher = watcher if watcher.watching else None
        self.kernels.execute(self.storages, batch)

    def watch(self, ledger: Ledger) -> None:
        """From now on look at commands of ``ledger`` for the first that codes keys, see ``FirstShrink``."""
        self.first_shrink = FirstShrink(self.storages, ledger)
        self._watcher = self.first_shrink if self.first_shrink.watching else None

    def show_queries(self, group: int, index: int, q: torch.Tensor) -> None:
        """Show queries ``[n, Hq, D]`` to the ``probe``, which goes once it has seen enough."""
        if self.probe is not None:
            self.probe.queries(group, index, q)
            if not self.probe.waiting:
                self.probe = None

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
        k = cache_k.view(-1, self.head_num, self.head_dim)
        v = cache_v.view(-1, self.head_num, self.v_head_dim)
        self.kernels.store(self.storages[group], index, loc, k, v)

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


def _side_bytes(storage: GroupStorage, side: int) -> int:
    meta = storage.meta[side]
    return storage.arenas[side].nbytes + (0 if meta is None else meta.nbytes)
