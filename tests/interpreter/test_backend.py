"""SGLang's attention backend and pool on the Triton path, with stand-ins for its runner and batches.

What a GPU would capture is not captured here; what is checked is that plans go through fixed buffers, that
padded rows are harmless, and that the pool's writes resolve slots in the kernel.
"""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from benchmarks import kernels_aot
from sglang_pmkvq.commands import ArenaCopies, CommandBatch, TableUpdate
from sglang_pmkvq.formats import (
    STEP_BITS,
    UNITS_PER_SUPERBLOCK,
    UNMAPPED,
    LayerGroup,
    PageShape,
    geometry_for_pages,
    groups_from_finals,
)
from sglang_pmkvq.kernels.attention import PageSource
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.launch import Launch
from sglang_pmkvq.kernels.reference import attention as reference
from sglang_pmkvq.kernels.reference.inputs import copies, random_center
from sglang_pmkvq.kernels.rotary import Center, on_one_table
from sglang_pmkvq.kernels.storage import GroupStorage
from sglang_pmkvq.kernels.transforms import Hadamard, PerLayer, Scaled, Transform
from sglang_pmkvq.kernels.triton_kernels import TritonKernels
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.serving.allocator import PmkvqAllocator
from sglang_pmkvq.serving.attention import PmkvqAttnBackend
from sglang_pmkvq.serving.configuration import Configuration
from sglang_pmkvq.serving.metrics import MetricsReporter
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.pool_setup import PoolSetup
from sglang_pmkvq.serving.sizing import Limits
from tests.triton_checks import relative_error

P, H, D, HQ = 16, 1, 64, 4
SCALE = D**-0.5
LAYERS = 3  # layers 0 and 2 end at (4, 4), layer 1 at (8, 8)


Key = tuple[str, tuple[tuple[str, object], ...]]


def make_backend(
    monkeypatch: pytest.MonkeyPatch, finals: list[tuple[int, int]], codings: tuple[Coding, ...] | None = None
) -> PmkvqAttnBackend:
    """A backend over a pool of 12 mapped 16-bit pages; the last superblocks are free. ``codings``: per group."""
    monkeypatch.setattr(MixedPrecisionTokenPool, "backend", "triton")
    groups = groups_from_finals(finals)
    geometry = geometry_for_pages(PageShape(P, H, D, D), groups, 12, 12)
    configuration = Configuration(geometry.shape, groups, codings or (Coding(),) * len(groups), PolicyConfig())
    setup = PoolSetup(configuration, geometry, Limits(4, 64, 12), geometry.total_bytes, 100)
    pool = MixedPrecisionTokenPool(setup, 12 * P, P, torch.bfloat16, H, D, len(finals), "cpu", False)
    pages = np.arange(13, dtype=np.int32)
    table = tuple(
        TableUpdate(g, arena, pages, pages * UNITS_PER_SUPERBLOCK << STEP_BITS)
        for g, group in enumerate(groups)
        for arena in range(len(group.arena_sides))
    )
    pool.execute(CommandBatch(table=table))
    req_to_token = torch.zeros(5, 8 * P, dtype=torch.int32)
    layers = [RadixAttention(HQ, D, SCALE, H, layer) for layer in range(len(finals))]
    runner = SimpleNamespace(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
        device="cpu",
        model=torch.nn.ModuleList(layers),
        model_config=SimpleNamespace(
            num_attention_heads=2 * HQ, hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"])
        ),
        tp_size=2,
    )
    return PmkvqAttnBackend(runner)  # type: ignore[arg-type]


@pytest.fixture
def backend(monkeypatch) -> PmkvqAttnBackend:
    return make_backend(monkeypatch, [(4, 4), (8, 8), (4, 4)])


def layer_of(index: int) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=index, sliding_window_size=None, is_cross_attention=False, attn_type=AttentionType.DECODER,
        qk_head_dim=D, v_head_dim=D, tp_q_head_num=HQ, scaling=SCALE, logit_cap=0.0,
    )  # fmt: skip


def slots_of(pages: list[int], tokens: int) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * P + torch.arange(P)).flatten()[:tokens]


def assign(backend: PmkvqAttnBackend, row: int, pages: list[int], tokens: int) -> None:
    backend.req_to_token_pool.req_to_token[row, :tokens] = slots_of(pages, tokens).int()


def batch_of(mode: ForwardMode, rows: list[int], lens: list[int], loc: torch.Tensor, prefix=None) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=mode, batch_size=len(rows), req_pool_indices=torch.tensor(rows), seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens), seq_lens_sum=sum(lens), out_cache_loc=loc,
        extend_prefix_lens_cpu=prefix, extend_prefix_lens=None,
    )  # fmt: skip


def want(backend: PmkvqAttnBackend, layer: int, q: torch.Tensor, pages: list[int], tokens: int, prefix=None):
    group, index = backend.token_to_kv_pool.place(layer)
    storage = backend.token_to_kv_pool.storages[group]
    k, v = (reference.read_sequence(storage, side, index, pages, tokens) for side in (0, 1))
    return reference.attention(q.view(-1, HQ, D), k, v, SCALE, prefix_len=prefix)[0].flatten(1)


def shrink(backend: PmkvqAttnBackend, group: int, page: int, step: int, unit: int) -> None:
    storage = backend.token_to_kv_pool.storages[group]
    old = int(storage.table[0, page])
    src, dst = (storage.group.arena_tier(0, s) for s in (old & 3, step))
    command = copies(0, [page], [old >> STEP_BITS], [unit], src, dst)
    command = type(command)(group, *(getattr(command, f) for f in list(command.__dataclass_fields__)[1:]))
    update = TableUpdate(group, 0, np.array([page], np.int32), np.array([unit << STEP_BITS | step], np.int32))
    backend.token_to_kv_pool.execute(CommandBatch(((command,),), (update,)))


def test_extend_then_decode_through_graph_buffers(backend):
    """Chunks of two requests, shrinks between steps, then padded decode steps that reuse every buffer."""
    gen = torch.Generator().manual_seed(0)
    pages = {1: [3, 7, 5], 3: [2, 9]}
    lens = {1: 40, 3: 17}
    for row in pages:
        assign(backend, row, pages[row], 48 if row == 1 else 32)

    # A mixed batch: row 1 a chunk from nothing, row 3 too.
    loc = torch.cat([slots_of(pages[r], lens[r]) for r in pages])
    batch = batch_of(ForwardMode.EXTEND, [1, 3], [40, 17], loc, prefix=[0, 0])
    backend.init_forward_metadata(batch)
    for layer in range(LAYERS):
        q = torch.randn(57, HQ * D, generator=gen).bfloat16()
        k, v = torch.randn(2, 57, H * D, generator=gen).bfloat16()
        out = backend.forward_extend(q, k, v, layer_of(layer), batch)
        expected = torch.cat(
            [want(backend, layer, q[:40], pages[1], 40, 0), want(backend, layer, q[40:], pages[3], 17, 0)]
        )
        assert out.shape == (57, HQ * D) and relative_error(out, expected) < 1e-2

    backend.init_cuda_graph_state(4, 4)
    assert backend._graph_decode is not None
    buffers = [w.device_plan.buffers.pages.data_ptr() for w in backend._graph_decode]
    free = [s.superblocks[0] * UNITS_PER_SUPERBLOCK for s in backend.token_to_kv_pool.storages]
    for step in range(3):
        if step < 2:  # page 3 shrinks by a step in the first group, and once in the second
            shrink(backend, 0, 3, step + 1, free[0] - 8 * (step + 1))
        if step == 0:
            shrink(backend, 1, 3, 1, free[1] - 8)
        lens = {r: n + 1 for r, n in lens.items()}
        new = torch.tensor([slots_of(pages[r], lens[r])[-1] for r in (1, 3)])
        # SGLang's padded view: rows of request slot 0, one token each, and slots of page 0.
        view = batch_of(ForwardMode.DECODE, [1, 3, 0, 0], [lens[1], lens[3], 1, 1], new)
        backend.init_forward_metadata_out_graph(view, in_capture=step == 0)
        backend.init_forward_metadata_in_graph(view)
        captured = batch_of(ForwardMode.DECODE, [], [], torch.cat([new, torch.zeros(2, dtype=torch.int64)]))
        for layer in range(LAYERS):
            q = torch.randn(4, HQ * D, generator=gen).bfloat16()
            k, v = torch.randn(2, 4, H * D, generator=gen).bfloat16()
            out = backend.forward_decode(q, k, v, layer_of(layer), captured)
            for i, row in enumerate((1, 3)):
                expected = want(backend, layer, q[i : i + 1], pages[row], lens[row])
                assert relative_error(out[i], expected[0]) < 1e-2
            assert out.isfinite().all()
    assert [w.device_plan.buffers.pages.data_ptr() for w in backend._graph_decode] == buffers
    assert all(int(storage.unmapped_reads) == 0 for storage in backend.token_to_kv_pool.storages)


def test_eager_decode_does_not_touch_graph_buffers(backend):
    backend.init_cuda_graph_state(2, 2)
    assert backend._graph_decode is not None
    before = [w.device_plan.buffers.pages.clone() for w in backend._graph_decode]
    assign(backend, 2, [4, 6], 20)
    loc = slots_of([4, 6], 20)
    k = v = torch.randn(20, H * D).bfloat16()
    for layer in range(LAYERS):
        backend.token_to_kv_pool.set_kv_buffer(layer_of(layer), loc, k.view(20, H, D), v.view(20, H, D))
    batch = batch_of(ForwardMode.DECODE, [2], [20], loc[-1:])
    backend.init_forward_metadata(batch)
    q = torch.randn(1, HQ * D).bfloat16()
    out = backend.forward_decode(q, k[-1:], v[-1:], layer_of(1), batch)
    assert relative_error(out, want(backend, 1, q, [4, 6], 20)) < 1e-2
    assert all(torch.equal(w.device_plan.buffers.pages, b) for w, b in zip(backend._graph_decode, before, strict=True))
    assert backend.get_cuda_graph_seq_len_fill_value() == 1


def test_lost_rows_and_pages_are_counted_and_loud_once(backend, caplog):
    """A store to a page that has shrunk, a plan over a page without a block: counters, metrics, one CRITICAL line."""
    pool = backend.token_to_kv_pool
    assert dataclasses.asdict(pool.counters.read()) == {"overflow_groups": 0, "dropped_rows": 0, "unmapped_reads": 0}
    assert not caplog.records
    allocator = PmkvqAllocator(pool.setup.tokens, P, torch.bfloat16, "cpu", pool, False, max_requests=4)
    metrics = MetricsReporter(pool.setup, allocator.ledger, pool)
    free = pool.storages[0].superblocks[0] * UNITS_PER_SUPERBLOCK
    shrink(backend, 0, 3, 1, free - 8)
    rows = torch.ones(2, H, D).bfloat16()
    for layer in range(LAYERS):  # page 3 has shrunk for layers 0 and 2
        pool.set_kv_buffer(layer_of(layer), torch.tensor([3 * P, 4 * P]), rows, rows)
    pool.storages[1].table[0, 5] = UNMAPPED
    assign(backend, 1, [4, 5], 20)
    backend.init_forward_metadata(batch_of(ForwardMode.DECODE, [1], [20], slots_of([5], 4)[-1:]))
    for _ in range(2):
        state = metrics.state()
        assert (state["dropped_rows"], state["unmapped_reads"]) == (2, 1)
    critical = [r for r in caplog.records if r.levelname == "CRITICAL"]
    assert len(critical) == 1
    assert "2 new KV rows were not stored and 1 pages" in critical[0].getMessage()
    metrics.attach({"model_name": "m"})
    assert REGISTRY.get_sample_value("sglang:pmkvq_dropped_rows_total", {"model_name": "m"}) == 2
    assert REGISTRY.get_sample_value("sglang:pmkvq_unmapped_reads_total", {"model_name": "m"}) == 1


class Launches:
    """Keeps what each launch would be compiled for; runs it as long as ``really``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: set[Key] = set()
        self.really = True
        original = Launch.run

        def run(launch: Launch) -> None:
            if min(launch.grid) > 0:
                options = tuple(launch.options.items())
                self.keys.add((launch.kernel.__name__, (*kernels_aot.specialization(launch), *options)))
            if self.really:
                original(launch)

        monkeypatch.setattr(Launch, "run", run)

    def take(self) -> set[Key]:
        keys, self.keys = self.keys, set()
        return keys


@pytest.mark.parametrize("transform", ["scale", "hadamard"])
def test_start_up_compiles_all_that_serving_launches(monkeypatch, transform):
    """Over batches, lengths, chunks and command counts: a kernel has one key per group, and start-up has seen it.

    Keys are Triton's own. What SGLang hands over is as it does: slices at any offset, K and V inside a QKV row.
    """
    launches = Launches(monkeypatch)
    finals = [(4, 4), (4, 2), (2, 8), (16, 4), (16, 16), (2, 8)]
    everywhere = Hadamard(D) if transform == "hadamard" else Transform()
    second = everywhere if transform == "hadamard" else Scaled(torch.ones(1, H, D))
    clips = (None, None, torch.full((2, H), 0.6), None, None)
    codings = tuple(Coding(second if g == 1 else everywhere, clip) for g, clip in enumerate(clips))
    backend = make_backend(monkeypatch, finals, codings)
    warm = launches.take()
    launches.really = False  # from here on only the arguments matter
    pool, longest = backend.token_to_kv_pool, 1100 * P
    backend.req_to_token_pool.req_to_token = torch.zeros(32, longest, dtype=torch.int32)
    backend.init_cuda_graph_state(17, 17)

    def forward(call, wrapped_batch, tokens: int) -> None:
        for layer in range(len(finals)):
            q, k, v = torch.zeros(tokens, (HQ + 2 * H) * D).bfloat16().split([HQ * D, H * D, H * D], dim=-1)
            call(q, k, v, layer_of(layer), wrapped_batch)

    for n in range(1, 18):
        rows, lens = list(range(1, n + 1)), [min(1 + 61 * n * i + n, longest) for i in range(n)]
        start = n % 3  # a slice of a longer tensor starts anywhere
        decode = batch_of(ForwardMode.DECODE, rows, lens, torch.zeros(n + start, dtype=torch.int64)[start:])
        decode.req_pool_indices = torch.tensor([0] * start + rows)[start:]
        decode.seq_lens = torch.tensor([0] * start + lens)[start:]
        backend.init_forward_metadata(decode)
        forward(backend.forward_decode, decode, n)
        if n % 4 == 0:
            backend.init_forward_metadata_out_graph(decode)
            forward(backend.forward_decode, decode, n)
        for mode, chunk in ((ForwardMode.EXTEND, 2 + 7 * n), (ForwardMode.MIXED, 3)):
            # In a mixed batch all requests but the first are of one query.
            many = n if mode == ForwardMode.EXTEND else 1
            queries = [min(length, chunk) if i < many else 1 for i, length in enumerate(lens)]
            prefix = [a - b for a, b in zip(lens, queries, strict=True)]
            extend = batch_of(mode, rows, lens, torch.zeros(sum(queries), dtype=torch.int64), prefix=prefix)
            backend.init_forward_metadata(extend)
            forward(backend.forward_extend, extend, sum(queries))
        some = np.arange(n) % 12 + 1
        for g, group in enumerate(pool.setup.groups):
            for arena in range(len(group.arena_sides)):
                tier = np.full(n, group.final_of(group.arena_sides[arena][0]), dtype=np.uint8)
                source = (some * UNITS_PER_SUPERBLOCK).astype(np.int32)
                copy = ArenaCopies(g, arena, some.astype(np.int32), source, source, np.full_like(tier, 16), tier)
                pool.execute(CommandBatch(((copy,),), (TableUpdate(g, arena, some, source),)))
    served = launches.take()
    assert served <= warm, {name for name, _ in served - warm}
    count = Counter(name for name, _ in served)
    # The five groups differ in tiers, which decode and extend are compiled for. The plan knows steps and arenas, and
    # tells decode's int64 lengths from extend's; copies know the lowest tier of an arena, and whether it has scales
    # and clip factors, or is of keys that are rotated.
    expected = {"decode_kernel": 5, "extend_kernel": 5, "merge_kernel": 1, "store_kernel": 2, "table_kernel": 1}
    expected |= {"copy_kernel": 6, "count_kernel": 2 * 3, "scatter_kernel": 2 * 4}
    assert {name: count[name] for name in expected} == expected
    assert served == warm


def test_start_up_compiles_every_kind_of_layer(monkeypatch):
    """A group whose layers differ in transforms and in blocks of the centre, among them two of a kind."""
    launches = Launches(monkeypatch)
    (center,) = on_one_table([random_center(1, 5, PageShape(P, H, D, D), 64, "neox")], "cpu", torch.bfloat16)
    assert center is not None and [len(blocks) for blocks in center.blocks] == [1, 4, 0, 4, 1]
    turned, plain = Hadamard(D), Transform()
    keys = PerLayer((turned, Scaled(torch.ones(1, H, D)), plain, turned, turned))
    coding = Coding(keys, None, PerLayer((turned, plain, turned, plain, turned)), center)
    shape, group = PageShape(P, H, D, D), LayerGroup((3, 4, 6, 8, 9), 4, 2)
    storage = GroupStorage.allocate(shape, group, [9, 9], 4, torch.bfloat16, coding=coding)
    before = [t.clone() for t in (*storage.arenas, storage.page_columns)]
    TritonKernels().warm_up(storage, HQ)
    assert all(map(torch.equal, before, (*storage.arenas, storage.page_columns)))
    warm = launches.take()
    launches.really = False
    decode, extend = TritonKernels().decode(), TritonKernels().extend()
    source = PageSource(torch.zeros(3, 4 * P, dtype=torch.int32), torch.arange(2), P, P)
    decode.plan_source(storage, source, [17, 5])
    extend.plan_source(storage, source, [16, 2], [17, 9])
    for layer in range(5):
        decode.run(torch.zeros(2, HQ, D).bfloat16(), layer, SCALE)
        extend.run(torch.zeros(8, HQ, D).bfloat16(), layer, SCALE)
    for arena, final in enumerate((4, 2)):
        one = np.ones(1, dtype=np.int32)
        TritonKernels().copy(storage, copies(arena, one, 8 * one, 16 * one, 16, final))
    served = launches.take()
    assert served <= warm, {name for name, _ in served - warm}
    count = Counter(name for name, _ in served)
    # Layers 0 and 4 are of a kind; so are 1 and 3 to the kernels that read, who need not know scaled from rotated keys.
    assert count["decode_kernel"] == count["extend_kernel"] == 3 and count["copy_kernel"] == 2


def test_a_centre_is_filled_where_launches_find_it():
    """Calibration while serving: the arguments of a launch made before are those of the centre that comes."""
    shape, length = PageShape(P, H, D, D), 40
    given = random_center(1, 1, shape, length, "neox")
    (to_come,) = on_one_table([Center.to_come(1, H, given.rotary, 4)], "cpu", torch.bfloat16)
    assert to_come is not None
    coding = Coding(center=to_come)
    before = {**coding.read_arguments(0, 1), **coding.copy_arguments((0, 1), 1, shape, torch.device("cpu"))}
    to_come.fill(given.vector, given.blocks)
    after = {**coding.read_arguments(0, 1), **coding.copy_arguments((0, 1), 1, shape, torch.device("cpu"))}
    tensors = {name: x for name, x in before.items() if isinstance(x, torch.Tensor)}
    assert {"center", "center_places", "rotary", "rotary_channels", "center0", "channel_at"} <= set(tensors)
    assert all(x.data_ptr() == after[name].data_ptr() and x.equal(after[name]) for name, x in tensors.items())
    assert before["CENTER_BLOCKS"] == after["CENTER_BLOCKS"] == 4
    assert torch.equal(before["center0"][0], to_come.vector) and to_come.vector.any()
