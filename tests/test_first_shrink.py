"""What happens once, before the first keys become codes: centres are measured, and what coding costs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_pmkvq.formats import K, LayerGroup, PageShape, V, geometry_for_pages, groups_from_finals
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.page_lists import write_columns
from sglang_pmkvq.kernels.reference.attention import read_page
from sglang_pmkvq.kernels.reference.codes import fake_quantize
from sglang_pmkvq.kernels.reference.scores import key_error
from sglang_pmkvq.kernels.rotary import MEASURED_BLOCKS, Center, ModelKeys, RotaryTable
from sglang_pmkvq.ledger import Ledger, PolicyConfig
from sglang_pmkvq.serving import first_shrink
from sglang_pmkvq.serving.attention import PmkvqAttnBackend
from sglang_pmkvq.serving.configuration import Configuration
from sglang_pmkvq.serving.metrics import GAUGES, MetricsReporter
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.pool_setup import PoolSetup
from sglang_pmkvq.serving.sizing import limits_for

P, H, HQ, D = 16, 2, 4, 64
FINALS = ((4, 4), (2, 2), (16, 16), (4, 4))
RUNNING, CHUNK = 4, 1024


def table(positions: int = 4096) -> RotaryTable:
    angle = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(D // 2) / (D // 2))
    return RotaryTable.of(angle.cos(), angle.sin(), D)


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """R_m x of ``[T, H, D]`` at ``positions [T]``."""
    angle = positions[:, None, None] * 10000.0 ** (-torch.arange(D // 2) / (D // 2))
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class Driven:
    """A pool and its ledger, one request that is fed keys of a known centre."""

    def __init__(
        self, finals: Sequence[tuple[int, int]] = FINALS, center: str = "auto", transform: str = "auto",
        policy: str = "static", size: float = 5.0, seed: int = 0, waits: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.layers = len(finals)
        shape, groups = PageShape(P, H, D, D), groups_from_finals(list(finals))
        keys = ModelKeys(table(), (None,) * self.layers, (None,) * self.layers, "")
        codings = tuple(Coding.default(transform, g, shape, center, keys) for g in groups)
        wanted = PolicyConfig(policy=policy, window_tokens=0, sink_tokens=0)  # type: ignore[arg-type]
        configuration = Configuration(shape, groups, codings, wanted)
        limits = limits_for(RUNNING, CHUNK, P, configuration.policy)
        pages = 160
        geometry = geometry_for_pages(shape, groups, pages, limits.hard_pages, configuration.center_bytes(pages * P))
        self.setup = PoolSetup(
            configuration.for_tokens(pages * P), geometry, limits, geometry.total_bytes, geometry.num_pages * P
        )
        self.pool = MixedPrecisionTokenPool(
            self.setup, pages * P, P, torch.bfloat16, H, D, self.layers, "cpu", False
        )
        self.ledger = Ledger(geometry, self.setup.policy if waits else configuration.policy, RUNNING)
        self.pool.watch(self.ledger)
        self.pages = np.empty(0, np.int64)
        self.tokens = 0
        # The centre is in blocks 1 and 3 alone.
        self.c = torch.zeros(self.layers, H, D)
        self.c[..., 8:16], self.c[..., 32 + 24 : 64] = size, -size
        self.keys = [torch.empty(0, H, D, dtype=torch.bfloat16) for _ in range(self.layers)]

    def forward(self, count: int) -> None:
        """One forward of ``count`` new tokens, as far as the pool sees it."""
        after = self.tokens + count
        if count > 1:
            new = self.ledger.extend([1], [self.pages], [self.tokens], [after])
        else:
            new = self.ledger.append(np.array([1]), np.array([after]))
        assert new is not None
        self.pages = np.concatenate((self.pages, new))
        self.pool.execute(self.ledger.drain())
        positions = torch.arange(self.tokens, after)
        slots = torch.from_numpy(self.pages)[positions // P] * P + positions % P
        rows = torch.from_numpy(self.pages)[None]
        for storage in self.pool.storages:
            write_columns(storage, rows, np.array([self.tokens]), np.array([after]))
        self.pool.kernels.begin_forward()
        for layer in range(self.layers):
            k = turned(self.c[layer] + 0.5 * torch.randn(count, H, D), positions).bfloat16()
            group, index = self.pool.place(layer)
            self.pool.kernels.store(self.pool.storages[group], index, slots, k, torch.randn(count, H, D).bfloat16())
            self.keys[layer] = torch.cat((self.keys[layer], k))
        self.tokens = after

    def attend(self, layer: int, rows: int = 40) -> None:
        """Queries of a layer pass by."""
        group, index = self.pool.place(layer)
        if self.pool.probe is not None:
            self.pool.show_queries(group, index, torch.randn(rows, HQ, D).bfloat16())

    def center(self, layer: int) -> torch.Tensor:
        group, index = self.pool.place(layer)
        center = self.pool.storages[group].coding.center
        assert center is not None
        return center.vector[index]


def test_bytes_are_counted() -> None:
    driven = Driven()
    assert driven.pool.storage_bytes() == driven.setup.geometry.total_bytes
    plain = Driven(center="none")
    assert plain.pool.storage_bytes() == plain.setup.geometry.total_bytes < driven.setup.geometry.total_bytes
    before = driven.pool.storage_bytes()
    for count in (CHUNK, 1):
        driven.forward(count)
    assert driven.pool.first_shrink is not None and driven.pool.first_shrink.measured is not None
    assert driven.pool.storage_bytes() == before


def test_centres_are_measured_before_the_first_shrink(caplog: pytest.LogCaptureFixture) -> None:
    """Means of what is there, in the blocks where they are; then codes are of keys less them."""
    driven = Driven()
    with caplog.at_level(logging.INFO):
        driven.forward(CHUNK - 8)
        assert not any(s.coding.center is not None and s.coding.center.vector.any() for s in driven.pool.storages)
        assert driven.pool.first_shrink is not None and driven.pool.first_shrink.measured is None
        driven.forward(1)
    measured = driven.pool.first_shrink.measured
    # All but the first page and the partial last one.
    assert measured is not None
    assert (measured.tokens, measured.layers, measured.of_layers) == (CHUNK - 2 * P, 3, 3)
    lines = [r.message for r in caplog.records if "centres of keys measured over 992 tokens" in r.message]
    assert len(lines) == 1 and "3 of 3 layers have one" in lines[0]
    for layer in (0, 1, 3):
        torch.testing.assert_close(driven.center(layer), driven.c[layer], atol=0.1, rtol=0)
        group, index = driven.pool.place(layer)
        storage = driven.pool.storages[group]
        center = storage.coding.center
        assert center is not None and {1, 3} <= set(center.blocks[index])
        assert len(center.blocks[index]) == min(MEASURED_BLOCKS, D // 16)
        page = int(driven.pages[5])
        read = read_page(storage, K, index, page)
        want = fake_quantize(
            driven.keys[layer][5 * P : 6 * P].transpose(0, 1).float(), storage.group.k_final, D,
            storage.coding.pick(index), positions=torch.arange(5 * P, 6 * P),
        ).transpose(0, 1)  # fmt: skip
        torch.testing.assert_close(read.float(), want, atol=2e-3, rtol=1e-3)
    assert read_page(driven.pool.storages[1], V, 0, int(driven.pages[5])).isfinite().all()
    # Fixed from then on.
    before = driven.center(0).clone()
    driven.c += 1
    for _ in range(40):
        driven.forward(1)
    assert torch.equal(driven.center(0), before)


@pytest.mark.parametrize("page", [0, -1], ids=["first", "last"])
def test_a_first_page_and_one_that_is_being_written_are_no_data(page: int) -> None:
    """The key of a first token lies far from all others; what nobody has written may be anything."""
    driven = Driven()
    driven.forward(CHUNK - 8)
    for storage in driven.pool.storages:
        for layer in range(storage.num_layers):
            block = int(storage.table[storage.arena_of(K), int(driven.pages[page])]) // 32
            storage.pages16(K, layer)[block] = math.nan
    driven.forward(1)
    assert all(driven.center(layer).isfinite().all() and driven.center(layer).any() for layer in (0, 1, 3))


def test_the_same_events_and_keys_give_the_same_centres() -> None:
    made = []
    for _ in range(2):
        driven = Driven(seed=3)
        driven.forward(700)
        driven.forward(1)
        made.append(torch.stack([driven.center(layer) for layer in (0, 1, 3)]))
    assert torch.equal(*made)


def test_static_codes_wait_until_a_mean_is_one() -> None:
    """Short prompts do not spend the only chance; a server's own policy, not the one these tests are driven by."""
    driven = Driven(waits=True)
    found = driven.pool.first_shrink
    assert found is not None
    driven.forward(first_shrink.MIN_CENTER_TOKENS - 1)
    for _ in range(3):
        driven.forward(1)
    assert found.measured is None and not driven.ledger.page_steps(driven.pages).any()
    while driven.tokens < 2 * first_shrink.MIN_CENTER_TOKENS + P:
        assert found.measured is None
        driven.forward(P)
    assert found.measured is not None and found.measured.layers == 3 and driven.center(0).any()
    assert driven.ledger.page_steps(driven.pages[:-2])[0].all()
    assert Driven(waits=True, center="none").setup.policy.first_shrink_tokens == 0


def test_too_few_tokens_are_no_mean(caplog: pytest.LogCaptureFixture) -> None:
    """Then the first codes have no centre, and as long as one of them is left neither have the others."""
    driven = Driven()
    found = driven.pool.first_shrink
    assert found is not None
    with caplog.at_level(logging.INFO):
        driven.forward(first_shrink.MIN_CENTER_TOKENS - 1)
        driven.forward(1)
        assert found.measured is not None and (found.measured.tokens, found.measured.layers) == (480, 0)
        for layer in range(4):
            driven.attend(layer)
        without = dict(found.errors)
        driven.forward(CHUNK)
        driven.forward(1)
        assert not driven.center(0).any() and driven.pool._watcher is found
        driven.ledger.free(driven.pages)
        driven.ledger.finish(1)
        driven.pages, driven.tokens = np.empty(0, np.int64), 0
        driven.keys = [keys[:0] for keys in driven.keys]
        driven.forward(CHUNK)
        driven.forward(1)
    assert found.measured.layers == 3 and driven.center(0).any() and driven.pool._watcher is None
    # What is coded now has other errors, and they are measured again.
    for layer in range(4):
        driven.attend(layer)
    assert driven.pool.probe is None and found.errors[0] != without[0]
    says = [r.message for r in caplog.records if "centres" in r.message]
    assert len(says) == 2 and "only 480 tokens are there, and means need 512" in says[0]
    assert "measured over 1008 tokens" in says[1]


def test_tokens_are_spread_evenly_over_many_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_shrink, "MAX_CENTER_TOKENS", 640)
    driven = Driven()
    driven.forward(CHUNK)
    driven.forward(1)
    assert driven.pool.first_shrink is not None and driven.pool.first_shrink.measured is not None
    assert driven.pool.first_shrink.measured.tokens == 640
    torch.testing.assert_close(driven.center(0), driven.c[0], atol=0.15, rtol=0)
    assert first_shrink._spread_evenly(np.arange(100), 3).tolist() == [0, 50, 99]


def test_a_flush_keeps_the_centres() -> None:
    driven = Driven()
    driven.forward(CHUNK)
    driven.forward(1)
    before = driven.center(1).clone()
    driven.ledger.clear()
    driven.pages, driven.tokens = np.empty(0, np.int64), 0
    driven.forward(600)
    driven.forward(1)
    assert torch.equal(driven.center(1), before)


# -- errors of logits --------------------------------------------------------------------------------------------


def test_the_formula() -> None:
    """By hand: one query, two tokens, one head; a constant error is none."""
    shape = LayerGroup((0,), 4, 4)
    coding = Coding.default("none", shape, PageShape(P, 1, D, D)).pick(0)
    torch.manual_seed(0)
    q, keys, positions = torch.randn(3, HQ, D), torch.randn(H, 20, D), torch.arange(20)
    coded = fake_quantize(keys, 4, D, coding)
    error, signal = [], []
    for row in q:
        for head in range(HQ):
            s, e = (x[head // (HQ // H)] @ row[head] for x in (keys, coded - keys))
            error.append(e - e.mean())
            signal.append(s - s.mean())
    want = (torch.cat(error).square().sum() / torch.cat(signal).square().sum()).sqrt().item()
    assert key_error(q, keys, coding, 4, D, positions) == pytest.approx(want, rel=1e-4)
    assert key_error(q, keys, coding, 16, D, positions) == 0
    assert 0.001 < key_error(q, keys, coding, 8, D, positions) < want / 4
    coded_alike = key_error(q, torch.zeros_like(keys), coding, 4, D, positions)
    assert coded_alike == 0


def test_errors_are_measured_once_and_the_hook_goes() -> None:
    driven = Driven()
    driven.forward(CHUNK)
    assert driven.pool.probe is None
    driven.forward(1)
    found = driven.pool.first_shrink
    assert found is not None and driven.pool.probe is found
    assert driven.pool._watcher is None  # nothing looks at commands any more
    for layer in (0, 1):
        driven.attend(layer)
    assert set(found.errors) == {1} and driven.pool.probe is found
    for layer in (2, 3):
        driven.attend(layer)
    assert set(found.errors) == {0, 1} and driven.pool.probe is None and not found.waiting
    assert found.errors[1].layer == 1 and found.errors[0].layer in (0, 3)
    assert 0.001 < found.errors[0].key_error < found.errors[1].key_error < 0.5
    # Later shrinks, of other pages, bring nothing back.
    for _ in range(40):
        driven.forward(1)
    assert driven.pool.probe is None


def test_what_is_measured_is_of_the_pages_that_shrink() -> None:
    driven = Driven(finals=((4, 4),))
    driven.forward(CHUNK)
    driven.forward(1)
    found = driven.pool.first_shrink
    assert found is not None
    (sample,) = found._samples.values()
    assert sample.keys.shape == (1, H, 64, D)
    want = driven.keys[0][sample.positions].transpose(0, 1)
    assert torch.equal(sample.keys[0], want)
    q = torch.randn(first_shrink.SAMPLED_QUERIES, HQ, D)
    driven.pool.show_queries(0, 0, q)
    coding = driven.pool.storages[0].coding.pick(0)
    assert found.errors[0].key_error == key_error(q, want, coding, 4, D, sample.positions)


@pytest.mark.parametrize(("center", "transform", "harms"), [("auto", "auto", False), ("none", "none", True)])
def test_harm_is_said_in_one_line(center: str, transform: str, harms: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Keys with a centre far larger than what varies, in a pair that hardly turns, coded plainly at 4 bits."""
    driven = Driven(finals=((4, 4), (4, 4)), center=center, transform=transform)
    driven.c.zero_()[..., [31, 63]] = 200.0
    reporter = MetricsReporter(driven.setup, driven.ledger, driven.pool)
    assert reporter.state()["key_error"] == {}
    with caplog.at_level(logging.WARNING):
        for count in (CHUNK, 1):
            driven.forward(count)
        for layer in (0, 1):
            driven.attend(layer)
    lines = [r.message for r in caplog.records if "attention logits" in r.message]
    state: Any = reporter.state()
    error = state["key_error"]["k4v4"]
    assert (error["key_error"] > first_shrink.KEY_ERROR_HARMS) == harms
    assert len(lines) == harms
    if harms:
        said = ("layer group k4v4", f"layer {error['layer']}", f"{error['key_error']:.2f}", "`pmkvq check MODEL`")
        assert all(word in lines[0] for word in said)
    assert (state["measured_centers"] is None) == (center == "none")
    assert "key_error" in [name for name, *_ in GAUGES]


def test_attention_shows_its_queries_only_while_somebody_wants_them() -> None:
    """Of the layer's own shape, and nothing at all without a probe."""
    shown: list[tuple[int, int, tuple[int, ...]]] = []
    backend = PmkvqAttnBackend.__new__(PmkvqAttnBackend)
    pool = SimpleNamespace(
        probe=None, place=lambda layer: (0, layer), show_queries=lambda g, i, q: shown.append((g, i, tuple(q.shape)))
    )
    backend.token_to_kv_pool = pool  # type: ignore[assignment]
    wrapper: Any = SimpleNamespace(run=lambda q, index, scale, logit_cap: q)
    layer: Any = SimpleNamespace(
        layer_id=1, tp_q_head_num=HQ, qk_head_dim=D, v_head_dim=D, scaling=1.0, logit_cap=0.0,
        is_cross_attention=False,
    )  # fmt: skip
    q, k, forward = torch.zeros(3, HQ * D), torch.zeros(3, H * D), SimpleNamespace(out_cache_loc=None)
    for probe in (None, object()):
        pool.probe = probe
        backend._forward([wrapper], q, k, k, layer, forward, False, {})  # type: ignore[arg-type]
        assert shown == ([] if probe is None else [(0, 1, (3, HQ, D))])


def test_centres_are_taken_once() -> None:
    center = Center.to_come(1, H, table(64), 2)
    center.fill(torch.ones(1, H, D), [(0, 2)])
    assert center.blocks == ((0, 2),)
    with pytest.raises(AssertionError, match="taken once"):
        center.fill(torch.ones(1, H, D), [(0, 1)])
