"""What the model's keys are made of: bias, spread and rotary table, against SGLang's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import factory, get_rope
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs
from torch import nn

from sglang_pmkvq.formats import PageShape, groups_from_finals
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import center_term
from sglang_pmkvq.kernels.rotary import Center, ModelKeys, center_bytes, chosen_blocks, default_center
from sglang_pmkvq.kernels.transforms import Hadamard
from sglang_pmkvq.serving import configuration as configuration_module
from sglang_pmkvq.serving import engine
from sglang_pmkvq.serving.config import PmkvqConfigError
from sglang_pmkvq.serving.configuration import read_configuration
from sglang_pmkvq.serving.configurator import PmkvqPoolConfigurator
from sglang_pmkvq.serving.model_keys import model_keys
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.pool_setup import PoolSetup
from sglang_pmkvq.serving.sizing import choose_geometry, limits_for
from tests.test_artifact import layered

D, H, HQ, HIDDEN, CONTEXT = 64, 2, 4, 32, 512


@pytest.fixture(autouse=True)
def _server_arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rotary modules ask for SGLang's arguments while they are made."""
    monkeypatch.setattr(get_context(), "_server_args", ServerArgs(model_path="dummy"))
    factory._ROPE_DICT.clear()
    yield
    factory._ROPE_DICT.clear()


def rope(context: int = CONTEXT, neox: bool = True, partial: float = 1.0, dim: int = D, **scaling: Any) -> Any:
    return get_rope(
        dim, rotary_dim=dim, max_position=context, base=10000, is_neox_style=neox, rope_scaling=scaling or None,
        partial_rotary_factor=partial, dtype=torch.float32,
    )  # fmt: skip


class Attention(nn.Module):
    """Named as SGLang's models name them."""

    def __init__(self, layer: int, rotary: nn.Module | None, bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(HIDDEN, (HQ + 2 * H) * D, bias=bias)
        if norm:
            self.k_norm = nn.RMSNorm(D)
        if rotary is not None:
            self.rotary_emb = rotary
        self.attn = engine.RadixAttention(HQ, D, 1.0, num_kv_heads=H, layer_id=layer)


class Layer(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.self_attn = Attention(*args, **kwargs)
        self.input_layernorm = nn.RMSNorm(HIDDEN)
        nn.init.normal_(self.input_layernorm.weight)


def runner(*layers: Layer, context: int = CONTEXT) -> Any:
    return SimpleNamespace(
        model=nn.ModuleDict({"layers": nn.ModuleList(layers)}), model_config=SimpleNamespace(context_len=context)
    )


def keys_of(*rotaries: nn.Module | None, context: int = CONTEXT, **kwargs: Any) -> ModelKeys:
    made = runner(*(Layer(i, r, **kwargs) for i, r in enumerate(rotaries)), context=context)
    return model_keys(engine.key_facts(made), D)


ROTARY: dict[str, dict[str, Any]] = {
    "neox": {},
    "interleaved": {"neox": False},
    "partial": {"partial": 0.5},
    "partial, interleaved (GLM-4)": {"partial": 0.5, "neox": False},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic, alpha": {"rope_type": "dynamic", "factor": 1.0, "alpha": 100.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "default": {"rope_type": "default"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTARY)
def test_the_model_turns_the_bias_as_the_table_does(name: str, dtype: torch.dtype) -> None:
    """R_m c is what the module makes of a key that is c."""
    module = rope(**ROTARY[name]).to(dtype)
    keys = keys_of(module, module)
    assert keys.rotary is not None and keys.problem == ""
    assert keys.rotary.positions >= CONTEXT
    vector = torch.randn(1, H, D) * 3
    blocks = tuple(keys.rotary.blocks)
    center = Center.of(vector, [blocks], keys.rotary)
    positions = torch.tensor([0, 1, 2, 17, 63, 64, 300, CONTEXT - 1])
    flat = center.vector[0].flatten().expand(len(positions), -1).contiguous()
    # Its table as it is, its arithmetic in fp32.
    _, want = module.float().forward_native(positions, flat.clone(), flat.clone())
    got = center_term(Coding(center=center), positions)
    assert got is not None
    torch.testing.assert_close(got, want.view(-1, H, D).transpose(0, 1), rtol=1e-5, atol=1e-5)
    turned = got.clone()
    assert not torch.allclose(turned[:, 3], got[:, 4])  # positions matter
    torch.testing.assert_close(
        keys.rotary.unturned(got, positions), center.vector[0][:, None].expand_as(got), rtol=1e-4, atol=1e-4
    )


def test_a_table_is_extended_to_the_context() -> None:
    module = rope(context=128)
    keys = keys_of(module, context=1000)
    assert keys.rotary is not None and keys.rotary.positions == 1024
    assert module.cos_sin_cache.shape[0] >= 1000
    want = rope(context=1024).cos_sin_cache[999]
    values = keys.rotary.values[:, 999].unflatten(-1, (2, 8)).transpose(0, 1).flatten()
    torch.testing.assert_close(values, want)


def test_a_table_ends_with_the_context() -> None:
    keys = keys_of(rope(context=4096), context=100)
    assert keys.rotary is not None and keys.rotary.positions == 128
    assert not keys.rotary.values[:, 100:].any()


def mrope() -> Any:
    return rope(rope_type="default", mrope_section=[8, 12, 12])


def longrope() -> Any:
    return rope(
        rope_type="longrope", short_factor=[1.0] * 32, long_factor=[4.0] * 32, original_max_position_embeddings=128,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rotaries", "says"),
    [
        ((None,), "no rotary embedding"),
        ((mrope,), "mrope"),
        ((longrope,), "Phi3LongRoPEScaledRotaryEmbedding has no single table"),
        ((rope, lambda: rope(neox=False)), "different rotary embeddings"),
        ((rope, lambda: rope(rope_type="linear", factor=4.0)), "different rotary embeddings"),
        ((rope, None), "no rotary embedding"),
    ],
)
def test_no_table_and_why(rotaries: tuple[Any, ...], says: str) -> None:
    keys = keys_of(*(None if r is None else r() for r in rotaries))
    assert keys.rotary is None and says in keys.problem
    for choice in ("auto", "bias"):
        assert default_center(keys, (0,), H, choice, 2) == keys.problem


def test_other_modules_with_the_same_table_are_one() -> None:
    first = rope()
    factory._ROPE_DICT.clear()
    second = rope()
    assert first is not second
    assert keys_of(first, second).rotary is not None


def test_bias_and_spread_are_those_of_the_keys() -> None:
    """Of rows between queries and values; the spread is the variance of W·(g ∘ x) for x of unit variance."""
    torch.manual_seed(0)
    layer = Layer(0, rope())
    keys = model_keys(engine.key_facts(runner(layer)), D)
    linear = layer.self_attn.qkv_proj
    rows = slice(HQ * D, (HQ + H) * D)
    assert linear.bias is not None
    assert keys.bias[0] is not None and torch.equal(keys.bias[0], linear.bias.detach()[rows].view(H, D))
    x = torch.randn(20_000, HIDDEN)
    made = (layer.input_layernorm.weight.detach() * x) @ linear.weight.detach()[rows].T
    spread = keys.spread[0]
    assert spread is not None
    torch.testing.assert_close(spread, made.view(-1, H, D).var(0).sum(-1), rtol=0.05, atol=0)


def test_layers_come_in_their_order() -> None:
    second, first = Layer(1, rope()), Layer(0, rope())
    keys = model_keys(engine.key_facts(runner(second, first)), D)
    bias = first.self_attn.qkv_proj.bias
    assert bias is not None and keys.bias[0] is not None
    assert torch.equal(keys.bias[0].flatten(), bias.detach()[HQ * D : (HQ + H) * D])


def test_layers_without_numbers_of_their_own_say_nothing() -> None:
    keys = model_keys(engine.key_facts(runner(Layer(1, rope()), Layer(1, rope()))), D)
    assert keys.rotary is None and keys.bias == () and "not numbered" in keys.problem
    assert not keys.large_bias((0, 1)) and not keys.has_bias((0, 1))


def test_no_bias_where_there_is_none_or_a_norm_follows() -> None:
    assert keys_of(rope(), bias=False).bias == (None,)
    assert keys_of(rope(), norm=True).bias == (None,)
    zero = Layer(0, rope())
    nn.init.zeros_(zero.self_attn.qkv_proj.bias)  # type: ignore[arg-type]
    assert model_keys(engine.key_facts(runner(zero)), D).bias == (None,)


def test_weights_that_cannot_be_read_say_nothing_of_the_spread() -> None:
    """Then every block of a bias is taken off."""
    layer = Layer(0, rope())
    layer.self_attn.qkv_proj.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    keys = model_keys(engine.key_facts(runner(layer)), D)
    assert keys.spread == (None,) and keys.bias[0] is not None
    center = default_center(keys, (0,), H, "auto", 2)
    assert isinstance(center, Center) and center.blocks == ((0, 1, 2, 3),)
    layer = Layer(0, rope())
    layer.self_attn.qkv_proj.use_intel_amx_backend = True  # type: ignore[assignment]
    assert engine.key_facts(runner(layer)).spread == (None,)


def biased(size: float) -> ModelKeys:
    """Three layers; the bias of the second is large in the pairs of block 2."""
    layers = [Layer(i, rope()) for i in range(3)]
    for i, layer in enumerate(layers):
        bias = layer.self_attn.qkv_proj.bias
        assert bias is not None
        nn.init.zeros_(bias)
        with torch.no_grad():
            bias.view(-1, D)[HQ : HQ + H, 20] = size if i == 1 else 1e-3
    return model_keys(engine.key_facts(runner(*layers)), D)


def test_what_is_taken_off() -> None:
    keys = biased(300.0)
    center = default_center(keys, (0, 1, 2), H, "auto", 2)
    assert isinstance(center, Center) and center.blocks == ((), (2,), ()) and not center.whole
    assert center.vector[1, 0, 20] == 300 and not center.vector[0].any()
    assert isinstance(default_center(keys, (1,), H, "bias", 2), Center)
    assert default_center(keys, (1,), H, "none", 2) == "switched off"
    assert default_center(keys, (0, 2), H, "auto", 2) == "the bias is small against what varies"
    assert keys.large_bias((0, 1)) and not keys.large_bias((0, 2))


def test_wider_codes_bear_more_of_a_bias() -> None:
    """What a bias adds to 4-bit keys is little beside what a block costs in time."""
    torch.manual_seed(0)
    spread = biased(1.0).spread[1]
    assert spread is not None
    torch.manual_seed(0)
    keys = biased(float((0.4 * spread.min()).sqrt()))
    narrow, wide = (default_center(keys, (1,), H, "bias", bits) for bits in (2, 4))
    assert isinstance(narrow, Center) and narrow.blocks == ((2,),)
    assert wide == "the bias is small against what varies"
    assert default_center(keys, (1,), H, "bias", 16) == "keys stay at 16 bits"


def test_without_a_bias_means_are_to_come() -> None:
    keys = keys_of(rope(), rope(), bias=False)
    center = default_center(keys, (0, 1), H, "auto", 2)
    assert isinstance(center, Center) and center.whole and not center.vector.any()
    assert default_center(keys, (0, 1), H, "bias", 2) == "no bias in the weights"
    # Means are no centre of a first token; a bias is part of it too.
    rows, every = center.rotary.values, keys.rotary.values  # type: ignore[union-attr]
    assert not rows[:, :16].any() and torch.equal(rows[:, 16:], every[:, 16:]) and every[:, :16].any()
    assert biased(300.0).center_rotary is not None and biased(300.0).center_rotary.values[:, :16].any()  # type: ignore[union-attr]
    assert not keys.large_bias((0, 1))


def test_bytes_of_centres_follow_the_tokens() -> None:
    """Of one table for all groups; whole where the blocks are chosen later."""
    keys = biased(300.0)
    shape, groups = PageShape(16, H, D, D), groups_from_finals([(4, 4), (4, 4), (2, 2)])
    codings = [Coding.default("auto", g, shape, "auto", keys) for g in groups]
    centers = [c.center for c in codings]
    assert centers[1] is None and centers[0] is not None
    assert center_bytes(centers, 100) - centers[0].nbytes == 128 * 16 * 2
    assert center_bytes(centers, 10**9) == center_bytes(centers)
    assert center_bytes([centers[0].upto(100)]) == center_bytes(centers, 100)
    means = Center.to_come(3, H, keys.rotary, 2)  # type: ignore[arg-type]
    assert center_bytes([means], 100) - means.nbytes == 4 * 128 * 16 * 2
    assert chosen_blocks(torch.zeros(1, H, D), torch.ones(1, H), keys.rotary, 0.25) == ((),)  # type: ignore[arg-type]


def arguments(**changes: Any) -> Any:
    return SimpleNamespace(**{
        "page_size": 16, "pmkvq_calibration": None, "pmkvq_key_transform": "auto", "pmkvq_key_center": "auto",
        "pmkvq_final_bits": "4", "pmkvq_group_size": None, "pmkvq_policy": "age", "pmkvq_window": 0,
        "pmkvq_sink_tokens": 0, "pmkvq_protect": "soft", "pmkvq_min_active_bits": 2, **changes,
    })  # fmt: skip


FACTS = engine.ModelFacts(3, H, D, torch.bfloat16, torch.bfloat16, 0, None, (0, 1))


@pytest.mark.parametrize(
    ("size", "center", "finals", "source", "says"),
    [
        (300.0, "auto", "4", "bias", None),
        (300.0, "bias", "8", "bias", None),
        (300.0, "none", "4", "none", "--pmkvq-key-center none leaves it in keys that end below 8 bits"),
        (300.0, "none", "k2v8", "none", "--pmkvq-key-center none leaves it in keys that end below 8 bits"),
        (300.0, "none", "k8v2", "none", None),
        (300.0, "auto", "k16v4", "none", None),
        (0.01, "none", "4", "none", None),
        (0.01, "auto", "4", "none", None),
    ],
)
def test_a_large_bias_that_stays_is_warned_of(
    size: float, center: str, finals: str, source: str, says: str | None
) -> None:
    configuration = read_configuration(
        arguments(pmkvq_key_center=center, pmkvq_final_bits=finals), FACTS, biased(size)
    )
    assert configuration.center_source(0) == source
    assert bool(configuration.uncentered[0]) == (source == "none")
    assert [says in warning for warning in configuration.warnings if says] == ([True] if says else [])
    assert (says is None) == (configuration.warnings == ())
    assert all("\n" not in warning and "; " in warning for warning in configuration.warnings)


@pytest.mark.parametrize(
    ("bias", "budget", "source"), [(0.0, 1 << 20, "none"), (0.0, 8 << 20, "mean"), (300.0, 1 << 20, "bias")]
)
def test_means_are_not_worth_much_of_a_small_pool(bias: float, budget: int, source: str) -> None:
    """Their table may take 3 % of it; a bias is taken off whatever that costs."""
    keys = biased(300.0)
    keys = keys if bias else replace(keys, bias=(None,) * 3)
    limits = {"max_running_requests": 2, "chunked_prefill_size": 64, "dp_size": 1}
    args = arguments(pmkvq_default_running=False, pmkvq_default_chunk=False, **limits)
    configurator = PmkvqPoolConfigurator.__new__(PmkvqPoolConfigurator)
    configurator._args, configurator._timeline = args, None
    configurator._configuration = read_configuration(args, FACTS, keys)
    configurator._cell_size = 3 * 2 * H * D * 2
    configurator._size(budget)
    setup = configurator.setup
    assert setup is not None and setup.configuration.center_source(0) == source
    assert ("more than 3 %" in setup.configuration.uncentered[0]) == (source == "none")
    assert setup.geometry.total_bytes <= budget and bool(setup.geometry.center_bytes) == (source != "none")


def test_a_bias_without_a_table_is_warned_of() -> None:
    """As under mrope: it cannot be taken off."""
    keys = replace(biased(300.0), rotary=None, problem="mrope")
    configuration = read_configuration(arguments(), FACTS, keys)
    assert configuration.uncentered == ("mrope",)
    (warning,) = configuration.warnings
    assert "cannot be taken off (mrope)" in warning and "--pmkvq-final-bits k8v4" in warning
    assert not read_configuration(arguments(pmkvq_final_bits="8"), FACTS, keys).warnings


def test_unset_flags_are_auto() -> None:
    for given in (None, "auto"):
        configuration = read_configuration(
            arguments(pmkvq_key_transform=given, pmkvq_key_center=given, pmkvq_final_bits="k4v2"), FACTS, biased(300.0)
        )
        (coding,) = configuration.codings
        assert coding.key_transform == coding.value_transform == Hadamard(D)
        assert configuration.center_source(0) == "bias"


@pytest.mark.parametrize("center", ["auto", "none"])
def test_the_pool_is_what_was_sized(center: str) -> None:
    """Bytes of the tensors are those of the geometry, within the budget; the summary says what each group got."""
    keys = biased(300.0)
    configuration = read_configuration(
        arguments(pmkvq_key_center=center, pmkvq_final_bits="0:8,1:k4v2,2:16"), FACTS, keys
    )
    limits = limits_for(2, 64, 16, configuration.policy)
    for budget in (400_000, 1 << 20, 1 << 23):
        geometry = choose_geometry(
            configuration.shape, configuration.groups, budget, limits, configuration.center_bytes
        )
        tokens = geometry.num_pages * 16
        setup = PoolSetup(configuration.for_tokens(tokens), geometry, limits, budget, tokens)
        pool = MixedPrecisionTokenPool(setup, tokens, 16, torch.bfloat16, H, D, 3, "cpu", False)
        assert pool.storage_bytes() == geometry.total_bytes <= budget
        kept = [s.coding.center for s in pool.storages]
        assert [c is not None for c in kept] == [False, center == "auto", False]
        if kept[1] is not None:
            assert kept[1].rotary.positions == min(CONTEXT, -(-tokens // 64) * 64)
            assert geometry.center_bytes > 0
        told: Any = setup.summary()["groups"]
        assert [g["key_center"] for g in told] == ["none", "bias" if center == "auto" else "none", "none"]
        assert [(g["key_transform"], g["value_transform"]) for g in told] == [
            ("none", "none"), ("hadamard", "hadamard"), ("none", "none")
        ]  # fmt: skip
        assert told[1]["center_pairs"] == ([8, 8] if center == "auto" else [0, 0])
        assert told[2]["no_key_center"] == "keys stay at 16 bits"
        assert "layers 1 K4/V2 (key transform hadamard, value transform hadamard, key center " in setup.log_line()
        if center == "auto":
            assert "key center bias in 8 to 8 of 32 pairs" in setup.log_line()


def test_centres_of_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file chose is served with the model's own table; without one it is refused."""
    monkeypatch.setattr(configuration_module, "load_for", lambda args: layered())
    args, facts = arguments(pmkvq_calibration="c.safetensors"), replace(FACTS, layers=2)
    configuration = read_configuration(args, facts, biased(300.0))
    assert [configuration.center_source(g) for g in (0, 1)] == ["mean", "none"]
    assert configuration.uncentered == ("", "the calibration has none")
    center = configuration.codings[0].center
    assert center is not None and not center.whole and configuration.center_bytes(100) > center.nbytes
    keys = replace(biased(300.0), rotary=None, problem="mrope")
    with pytest.raises(PmkvqConfigError, match=r"--pmkvq-calibration c.safetensors: .* \(mrope\); calibrate with"):
        read_configuration(args, facts, keys)
