"""Checks of the Triton kernels against the reference; they run in the interpreter and on a GPU alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sglang_pmkvq.formats import SIDES, K, LayerGroup, PageShape
from sglang_pmkvq.kernels import device_attention
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.device_attention import DeviceDecode, DeviceExtend
from sglang_pmkvq.kernels.reference import attention as reference
from sglang_pmkvq.kernels.reference.inputs import Inputs, make_inputs
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.torch_kernels import TorchKernels
from sglang_pmkvq.kernels.transforms import Scaled
from sglang_pmkvq.kernels.triton_kernels import TritonKernels
from tests.kernel_checks import reference_of

FINALS = [(8, 8), (4, 4), (2, 2), (4, 2), (2, 8), (16, 4), (8, 16), (16, 16)]
# page size, KV heads, head dim, channels per group, query heads per KV head
SHAPES = [
    (16, 2, 128, 128, 4),
    (16, 2, 64, 32, 3),
    (32, 1, 256, 128, 8),
    (64, 1, 128, 64, 1),
    (32, 3, 64, 64, 2),
    (16, 1, 256, 64, 16),
    (64, 1, 64, 64, 4),
    (16, 1, 128, 32, 5),
    (32, 1, 128, 128, 16),
    (64, 1, 256, 32, 2),
]
DTYPES = [torch.float16, torch.bfloat16]
WINDOW = 128
# One case per pair of finals, every shape and both dtypes somewhere.
SAMPLE = [(f, SHAPES[i % len(SHAPES)], DTYPES[i % 2]) for i, f in enumerate(FINALS + [(4, 2), (2, 2)])]

# ‖out − ref‖ / ‖ref‖ per request, against the fp32 reference on the same dequantized values.
RELATIVE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Rounding q̃ to the dot dtype moves a score by its error times the range of the keys.
LSE_ABSOLUTE = {torch.float16: 1e-2, torch.bfloat16: 1e-1}
SENTINEL = 12288.0
# Bytes on either side of a fenced tensor, a multiple of every alignment.
FENCE = 4096


def boundary_lens(p: int) -> list[int]:
    return [1, p - 1, p, p + 1, 3 * p + 5]


def inputs_of(
    seed: int, finals: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype, lens: list[int], **more: Any
) -> Inputs:
    """``make_inputs`` of one layer from a row of the matrix; even seeds have a key scale."""
    p, h, d, g, per_head = shape
    more = {"query_heads": h * per_head, "transform": "none" if seed % 2 else "scale", **more}
    return make_inputs(seed, PageShape(p, h, d, g), LayerGroup((0,), *finals), lens, dtype=dtype, **more)


def on_device(storage: GroupStorage, device: str) -> GroupStorage:
    """The same storage on a device."""
    arenas, meta = (tuple(None if t is None else t.to(device) for t in x) for x in (storage.arenas, storage.meta))
    counters = ("overflow_groups", "dropped_rows", "unmapped_reads")
    others = {name: getattr(storage, name).to(device) for name in ("table", *counters)}
    columns = storage.page_columns
    others["page_columns"] = None if columns is None else columns.to(device)
    return dataclasses.replace(storage, arenas=arenas, meta=meta, coding=storage.coding.on(device), **others)


def fenced(storage: GroupStorage) -> tuple[GroupStorage, list[torch.Tensor]]:
    """The same storage with arenas, side arrays, table and constants between sentinel bytes; the fenced bytes."""
    whole: list[torch.Tensor] = []

    def inner(old: torch.Tensor | None) -> torch.Tensor | None:
        if old is None:
            return None
        whole.append(torch.full((old.nbytes + 2 * FENCE,), 0xA5, dtype=torch.uint8, device=old.device))
        return whole[-1][FENCE:-FENCE].view(old.dtype).view(old.shape).copy_(old)

    old = storage.coding
    transform, clip = old.key_transform, inner(old.key_clip)
    keys = Scaled(inner(transform.scale)) if isinstance(transform, Scaled) else transform
    coding = Coding(keys, clip, old.value_transform, old.center)
    if old.center is not None:
        # What is written of a centre is its page columns alone; of what is read a copy shows what is read beyond it.
        rotary = dataclasses.replace(old.center.rotary, values=inner(old.center.rotary.values))
        coding = dataclasses.replace(coding, center=dataclasses.replace(old.center, rotary=rotary))
    if clip is not None:
        # What ``edges`` keeps once it was asked.
        vars(coding)["_key_edges"] = inner(old.edges(K))
        assert coding.edges(K).data_ptr() == whole[-1][FENCE:].data_ptr()
    fields = {name: tuple(inner(t) for t in getattr(storage, name)) for name in ("arenas", "meta")}
    fields["page_columns"] = inner(storage.page_columns)
    return dataclasses.replace(storage, table=inner(storage.table), coding=coding, **fields), whole


def check_fenced(whole: list[torch.Tensor]) -> None:
    for memory in whole:
        assert (memory[:FENCE] == 0xA5).all() and (memory[-FENCE:] == 0xA5).all(), "written outside a tensor"


def adversarial(tokens: int, heads: int, dim: int, seed: int) -> torch.Tensor:
    """Rows with constants, tiny and huge ranges, offsets, NaN, infinities, values beyond fp16, and such whose rotation
    depends on the order of its sums."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, dim, generator=gen)
    x *= torch.exp2(torch.randint(-26, 16, (tokens, heads, 1), generator=gen).float())
    x += torch.randn(tokens, heads, 1, generator=gen) * 100
    x[::7] = x[::7, :, :1]
    x[1::16, :, 3] = torch.nan
    x[2::16, :, -1] = torch.inf
    x[3::16, :, 0] = -torch.inf
    x[4::16, :, 9] = 1e6
    x[5::16] = -3e30
    x[6::16, :, 0], x[6::16, :, 1] = -3e38, 3e38
    x[8::16] = 0.0
    x[9::16] = (torch.arange(dim).float() % 511) / 2  # ties of the first rounding
    x[10::16] = torch.randn(x[10::16].shape, generator=gen)
    x[10::16, :, ::2] = 2.0**15  # cancel but for two rotated channels, and round the others before or after
    return x


def fill_adversarial(storage: GroupStorage, pages: list[int], seed: int) -> None:
    """Every row of some pages, by the torch path."""
    p, h, d = storage.shape.page_size, storage.shape.num_kv_heads, storage.shape.head_dim
    slots = (torch.tensor(pages)[:, None] * p + torch.arange(p)).flatten()
    for layer in range(storage.num_layers):
        kv = [adversarial(len(slots), h, d, seed + 2 * layer + side) for side in (0, 1)]
        TorchKernels().store(storage, layer, slots, kv[0], kv[1])


def snapshot(storage: GroupStorage) -> list[torch.Tensor]:
    """Every tensor of a storage on the CPU; side arrays as bits, for stale ones hold NaN."""
    meta = [m.view(torch.int16) for m in storage.meta if m is not None]
    every = [*storage.arenas, *meta, storage.table, storage.overflow_groups, storage.unmapped_reads]
    every += [] if storage.page_columns is None else [storage.page_columns]
    return [t.to("cpu", copy=True) for t in every]


def same(a: GroupStorage, b: GroupStorage) -> bool:
    return all(torch.equal(x, y) for x, y in zip(snapshot(a), snapshot(b), strict=True))


def relative_error(out: torch.Tensor, want: torch.Tensor) -> float:
    return float((out.float() - want.float()).norm() / want.float().norm())


def run_guarded(
    wrapper: DeviceDecode | DeviceExtend, q: torch.Tensor, layer: int, scale: float, logit_cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of a run whose buffers stand between sentinels, which are checked afterwards."""
    plan = wrapper.device_plan
    assert plan.buffers is not None
    n = q.shape[0]
    out = torch.full((n + 2, *q.shape[1:]), SENTINEL, dtype=q.dtype, device=q.device)
    lse = torch.full((n + 2, q.shape[1]), SENTINEL, device=q.device)
    before = q.clone()
    if plan.singles:
        partials = plan.partials_for(q.shape[1])
        partials.out.fill_(SENTINEL)
        partials.lse.fill_(SENTINEL)
    for launch in device_attention.run_launches(plan, q, layer, scale, logit_cap, out[1:-1], lse[1:-1]):
        launch.run()
    assert torch.equal(q, before), "run changed its queries"
    for guarded in (out, lse):
        assert (guarded[[0, -1]] == SENTINEL).all(), "written outside the output"
        assert not (guarded[1:-1] == SENTINEL).any(), "output not written"
    if plan.singles:
        items = int(plan.buffers.split_indptr[plan.requests])
        assert (partials.lse[items:] == SENTINEL).all() and (partials.out[items:] == SENTINEL).all()
    return out[1:-1], lse[1:-1]


def forget_columns(storage: GroupStorage) -> None:
    """Page columns that are wrong, for a plan to write; the reference goes by those of ``inputs``."""
    if storage.page_columns is not None:
        object.__setattr__(storage, "page_columns", torch.full_like(storage.page_columns, 1))


def check_columns(inputs: Inputs, storage: GroupStorage) -> None:
    """A plan has written the columns of its requests' pages, of these alone, or of none where no keys are centred."""
    assert (storage.page_columns is None) == (inputs.storage.page_columns is None)
    if storage.page_columns is not None:
        want = torch.full_like(inputs.storage.page_columns, 1)
        for r in range(len(inputs.kv_lens)):
            own = inputs.pages(r)
            want[own] = torch.arange(len(own), dtype=torch.int32)
        assert torch.equal(storage.page_columns.cpu(), want), "page columns"


def check_decode(inputs: Inputs, logit_cap: float = 0.0, device: str = "cpu") -> DeviceDecode:
    """Decode of all requests and layers on a device against the reference; ``inputs`` live on the CPU."""
    dtype = inputs.storage.dtype
    scale = inputs.storage.shape.head_dim**-0.5
    wrapper = TritonKernels().decode()
    storage = on_device(inputs.storage, device)
    forget_columns(storage)
    wrapper.plan(storage, inputs.req_pages.to(device), torch.tensor(inputs.kv_lens, device=device))
    plan = wrapper.device_plan
    assert plan.buffers is not None and int(storage.unmapped_reads) == 0
    check_columns(inputs, storage)
    q = inputs.q.to(device, dtype)
    for layer in range(inputs.storage.num_layers):
        out, lse = run_guarded(wrapper, q, layer, scale, logit_cap)
        for r in range(len(inputs.kv_lens)):
            k, v = reference_of(inputs, layer, r)
            want, want_lse = reference.attention(q[r : r + 1].cpu(), k, v, scale, logit_cap)
            assert relative_error(out[r].cpu(), want[0]) < RELATIVE[dtype]
            torch.testing.assert_close(lse[r].cpu(), want_lse[0], rtol=0, atol=LSE_ABSOLUTE[dtype])
    return wrapper


def check_extend(inputs: Inputs, prefix_lens: list[int], logit_cap: float = 0.0, device: str = "cpu") -> None:
    """Extend of all requests and layers on a device against the reference; ``inputs`` live on the CPU."""
    dtype = inputs.storage.dtype
    scale = inputs.storage.shape.head_dim**-0.5
    wrapper = TritonKernels().extend()
    storage = on_device(inputs.storage, device)
    forget_columns(storage)
    wrapper.plan(storage, inputs.req_pages.to(device), prefix_lens, inputs.kv_lens)
    check_columns(inputs, storage)
    lengths = [n - p for n, p in zip(inputs.kv_lens, prefix_lens, strict=True)]
    q = torch.randn(sum(lengths), *inputs.q.shape[1:], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for layer in range(inputs.storage.num_layers):
        out, lse = run_guarded(wrapper, q, layer, scale, logit_cap)
        at = 0
        for r, n in enumerate(lengths):
            k, v = reference_of(inputs, layer, r)
            want, want_lse = reference.attention(q[at : at + n].cpu(), k, v, scale, logit_cap, prefix_lens[r])
            if n:
                assert relative_error(out[at : at + n].cpu(), want) < RELATIVE[dtype]
            torch.testing.assert_close(lse[at : at + n].cpu(), want_lse, rtol=0, atol=LSE_ABSOLUTE[dtype])
            at += n


def unquantized(inputs: Inputs, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a request as they were stored, fp32 ``[T, H, D]``: no quantization at all."""
    p, length = inputs.storage.shape.page_size, inputs.kv_lens[request]
    slots = (torch.tensor(inputs.pages(request))[:, None] * p + torch.arange(p)).flatten()[:length]
    k, v = (inputs.written[side][layer, slots].float() for side in SIDES)
    return k, v
