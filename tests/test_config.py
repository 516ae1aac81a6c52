"""Flags: sizes, widths, limits, refusals."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_pmkvq.formats import TIERS, check_tiers, groups_from_finals, hard_reserve_bytes, page_bytes, steps_of
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.serving.config import PmkvqConfigError, parse_final_bits, parse_size
from sglang_pmkvq.serving.refusals import REFUSALS, check_refusals
from sglang_pmkvq.serving.sizing import (
    HARD_RESERVE_SHARE,
    MIN_CHUNK_TOKENS,
    MIN_RUNNING_REQUESTS,
    choose_geometry,
    choose_limits,
    limits_for,
    page_shape,
)

SOFT = PolicyConfig(window_tokens=128, sink_tokens=1, protect="soft")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("200MB", 200_000_000), ("4096", 4096), ("1 gib", 1 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "abc", "", "1e99GiB", "12XB", "0MiB", "99999999999TiB", "1GiB2"])
def test_bad_sizes_name_flag_and_value(text: str) -> None:
    with pytest.raises(PmkvqConfigError, match="--pmkvq-pool-bytes"):
        parse_size(text)


def test_final_bits() -> None:
    assert parse_final_bits("4", 2) == [(4, 4)] * 2
    assert parse_final_bits("k4v2", 1) == [(4, 2)]
    assert parse_final_bits("0-1:8, 2:k4v2", 3) == [(8, 8), (8, 8), (4, 2)]
    groups = groups_from_finals(parse_final_bits("0:8,1-2:4,3:8", 4))
    assert [(g.layers, g.k_final) for g in groups] == [((0, 3), 8), ((1, 2), 4)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3", "not a width"),
        ("k4", "not a width"),
        ("0-1:8", "no width for layers 2, 3"),
        ("0-9:8", "outside this model's 0-3"),
        ("0-3:8,2:4", "named twice"),
        ("0-3=8,1:4", "is not LAYERS:WIDTH"),
        ("2-1:8", "outside"),
    ],
)
def test_bad_final_bits(text: str, says: str) -> None:
    with pytest.raises(PmkvqConfigError, match=says):
        parse_final_bits(text, 4)


@pytest.mark.parametrize("tiers", [(16, 8, 4, 3), (16, 4), (8, 4)])
def test_tiers_that_do_not_halve_from_16_are_refused(tiers: tuple[int, ...]) -> None:
    check_tiers(TIERS)
    with pytest.raises(ValueError, match=rf"must start at 16 and halve .*, got {re.escape(str(tiers))}"):
        check_tiers(tiers)


def test_steps_reach_both_finals_together() -> None:
    assert steps_of(4, 2) == ((16, 16), (16, 8), (8, 4), (4, 2))
    assert steps_of(2, 8) == ((16, 16), (8, 16), (4, 16), (2, 8))
    assert steps_of(16, 16) == ((16, 16),)
    assert steps_of(4, 4) == ((16, 16), (8, 8), (4, 4))


def test_bits_per_element_with_scales() -> None:
    """Design §4: 16, 8.25, 4.25, 2.25 bits per element at D = G = 128."""
    shape = page_shape(16, 1, 128, None)
    (group,) = groups_from_finals([(2, 2)])
    elements = 2 * 16 * 128
    assert [8 * page_bytes(shape, group, s) / elements for s in range(4)] == [16, 8.25, 4.25, 2.25]


# (layers, KV heads, head dim) of models that people serve, and the bundled one.
SHAPES = {
    "Llama-3.1-8B": (32, 8, 128),
    "R1-Distill-Qwen-7B": (28, 4, 128),
    "bundled": (6, 1, 128),
}


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("gib", [1, 8, 24])
@pytest.mark.parametrize("model", SHAPES)
def test_logical_tokens_against_stock(model: str, gib: int, bits: int) -> None:
    """Default request and chunk limits: at least 0.95 · 16/(b + 32/G) times the tokens of a 16-bit pool."""
    layers, heads, dim = SHAPES[model]
    shape = page_shape(16, heads, dim, None)
    groups = groups_from_finals([(bits, bits)] * layers)
    budget = gib << 30
    limits = choose_limits(shape, groups, budget, SOFT, 2048, 4096, True, True)
    geometry = choose_geometry(shape, groups, budget, limits)
    stock = budget // (layers * 2 * heads * dim * 2)
    assert geometry.total_bytes <= budget
    assert geometry.num_pages * 16 / stock >= 0.95 * 16 / (bits + 32 / 128)


@given(
    budget=st.integers(1 << 20, 1 << 34),
    running=st.integers(1, 4096),
    chunk=st.integers(16, 16384).map(lambda n: n // 16 * 16),
    running_default=st.booleans(),
    chunk_default=st.booleans(),
    bits=st.sampled_from([8, 4, 2]),
)
def test_limits_honour_the_user_and_the_floor(
    budget: int, running: int, chunk: int, running_default: bool, chunk_default: bool, bits: int
) -> None:
    shape = page_shape(16, 4, 128, None)
    groups = groups_from_finals([(bits, bits)] * 8)
    limits = choose_limits(shape, groups, budget, SOFT, running, chunk, running_default, chunk_default)
    assert limits.chunk % 16 == 0
    if not running_default:
        assert limits.running == running
    if not chunk_default:
        assert limits.chunk == chunk
    assert min(running, MIN_RUNNING_REQUESTS) <= limits.running <= running
    assert min(chunk, MIN_CHUNK_TOKENS) <= limits.chunk <= chunk
    if running_default and chunk_default:
        floor = limits.running <= MIN_RUNNING_REQUESTS or limits.chunk <= MIN_CHUNK_TOKENS
        reserve = hard_reserve_bytes(shape, groups, limits.hard_pages)
        assert reserve <= HARD_RESERVE_SHARE * budget or floor


@given(
    budget=st.integers(1, 1 << 30), running=st.integers(1, 64), chunk=st.integers(1, 64), row=st.integers(0, 2048),
    context=st.integers(1, 1 << 16),
)  # fmt: skip
def test_too_small_pools_name_the_smallest_that_works(
    budget: int, running: int, chunk: int, row: int, context: int
) -> None:
    """Also where a table grows with the pool, as far as the longest sequence."""

    def table(tokens: int) -> int:
        return row * (-(-min(tokens, context) // 64) * 64) + 1000 * (row > 0)

    shape = page_shape(16, 2, 64, None)
    groups = groups_from_finals([(8, 8), (4, 2)])
    limits = limits_for(running, chunk * 16, 16, SOFT)
    try:
        geometry = choose_geometry(shape, groups, budget, limits, table)
    except PmkvqConfigError as error:
        least = int(str(error).split("smallest pool that works is ")[1].split()[0])
        assert least > budget
        choose_geometry(shape, groups, least, limits, table)
        with pytest.raises(PmkvqConfigError):
            choose_geometry(shape, groups, least - 1, limits, table)
    else:
        assert geometry.total_bytes <= budget
        assert geometry.num_pages * 16 >= 2 * limits.chunk
        assert geometry.center_bytes == table(geometry.num_pages * 16)


def test_group_size_and_head_dim() -> None:
    assert page_shape(16, 1, 64, None).group_size == 64
    assert page_shape(16, 1, 256, None).group_size == 128
    with pytest.raises(PmkvqConfigError, match="does not divide this model's head_dim 64; use one of 32, 64"):
        page_shape(16, 1, 64, 128)
    with pytest.raises(PmkvqConfigError, match="this model has 80"):
        page_shape(16, 1, 80, None)


REFUSED = {
    "--enable-hierarchical-cache": {"enable_hierarchical_cache": True},
    "--speculative-algorithm": {"speculative_algorithm": "EAGLE"},
    "--disaggregation-mode": {"disaggregation_mode": "prefill"},
    "--kv-cache-dtype": {"kv_cache_dtype": "fp8_e5m2"},
    "--pp-size": {"pp_size": 2},
    "--chunked-prefill-size": {"chunked_prefill_size": -1},
    "--page-size": {"page_size": 1},
    "--attention-backend": {"attention_backend": "triton"},
    "--enable-deterministic-inference": {"enable_deterministic_inference": True},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_refusals_name_flag_reason_and_way_out(flag: str) -> None:
    check_refusals(SimpleNamespace())
    with pytest.raises(PmkvqConfigError) as error:
        check_refusals(SimpleNamespace(**REFUSED[flag]))
    sentence = str(error.value)
    assert flag in sentence
    assert sentence.count(";") == 1
    assert "\n" not in sentence


def test_every_refusal_reads_an_argument_that_sglang_has() -> None:
    """A predicate on a misspelt attribute would never refuse anything."""
    import dataclasses

    from sglang.srt.server_args import ServerArgs

    names = {f.name for f in dataclasses.fields(ServerArgs)}

    class Recorder:
        def __init__(self) -> None:
            self.read: set[str] = set()

        def __getattr__(self, name: str) -> object:
            self.read.add(name)
            raise AttributeError(name)

    for refusal in REFUSALS:
        recorder = Recorder()
        refusal.applies(recorder)
        assert recorder.read <= names, refusal.flag
        assert recorder.read or refusal.flag.startswith("SGLANG_"), refusal.flag
