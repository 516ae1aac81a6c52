"""The Triton backend: what serves on CUDA; on CPU tensors in Triton's interpreter, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch

from sglang_pmkvq.commands import ArenaCopies, TableUpdate
from sglang_pmkvq.kernels.backend import Kernels
from sglang_pmkvq.kernels.device_attention import DeviceDecode, DeviceExtend
from sglang_pmkvq.kernels.device_pages import copy_launch, store_launch, table_launch
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.warm_up import warm_up


class TritonKernels(Kernels):
    """One launch per store, per arena of a wave, and per arena of a table update."""

    name: ClassVar[str] = "triton"
    compiles: ClassVar[bool] = True

    def decode(self, use_stock: bool = True) -> DeviceDecode:
        return DeviceDecode()

    def extend(self, use_stock: bool = True) -> DeviceExtend:
        return DeviceExtend()

    def warm_up(
        self,
        storage: GroupStorage,
        query_heads: int,
        logit_caps: Iterable[float] = (0.0,),
        slot_dtype: torch.dtype = torch.int32,
    ) -> None:
        warm_up(self, storage, query_heads, logit_caps, slot_dtype)

    def _store(self, storage: GroupStorage, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        store_launch(storage, layer, slots.contiguous(), k, v).run()

    def _copy(self, storage: GroupStorage, copies: ArenaCopies) -> None:
        copy_launch(storage, copies).run()

    def _update_table(self, storage: GroupStorage, update: TableUpdate) -> None:
        table_launch(storage, update).run()
