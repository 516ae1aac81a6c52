"""Parity with the paper's formulas: independent, straightforward implementations judge the calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_pmkvq.calib import reparam, sensitivity
from sglang_pmkvq.calib.centers import add_keys, key_centers, mean_of, mean_state, spread_around
from sglang_pmkvq.calib.corpus import Sample
from sglang_pmkvq.calib.model import CalibrationModel, observing
from sglang_pmkvq.calib.positions import MODES, parse_effective_lens, stretched_positions, turn
from sglang_pmkvq.formats import K, V
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.attention import attention
from sglang_pmkvq.kernels.reference.codes import center_term, fake_quantize
from sglang_pmkvq.kernels.rotary import Center
from sglang_pmkvq.kernels.transforms import Hadamard, Scaled, Transform
from tests.support.models import make_model

LENGTH, GROUP = 48, 64


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CalibrationModel:
    path = make_model(tmp_path_factory.mktemp("m") / "model", request.param, layers=2, dtype=torch.float32)
    return CalibrationModel.load(str(path))


@pytest.fixture(scope="module")
def sample() -> Sample:
    return Sample(np.random.default_rng(0).integers(0, 512, LENGTH), first_target=20)


# --- shrink rule (eq. 1-3) ---


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fake_quantization_is_the_papers_chain(bits: int) -> None:
    """Quantize to 8 bits (eq. 1, 2), then the integer shift of eq. 3 per halving; zero is kept, S_b grows."""
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(bits)) * 3
    want = torch.zeros_like(rows)
    for r, row in enumerate(rows):
        zero = float(row.min().half())
        span = float((row.max() - row.min()).half())
        for c, x in enumerate(row.tolist()):
            code = min(max(round((x - zero) * 255 / span), 0), 255)
            scale = span / 255
            b = 8
            while b > bits:
                b //= 2
                code = ((2 ** (2 * b) - 2**b + 1) * (code + 2 ** (b - 1))) >> (3 * b)
                scale = (2**b + 1) * scale
            want[r, c] = code * scale + zero
    got = fake_quantize(rows, bits, 32)
    # Rounding ties in fp32 and in Python may differ by a code of 8 bits.
    assert (got - want).abs().max() <= (rows.max(1).values - rows.min(1).values).max() / 255
    assert ((got - want).abs() < 1e-5).float().mean() > 0.99


# --- sensitivity (eq. 5) ---


def test_taylor_is_the_papers_formula(model: CalibrationModel, sample: Sample) -> None:
    """‖G ⊙ (X − Q(X))‖₁ with gradients by one plain backward pass through the whole model."""
    scales = torch.rand(3, model.layers, model.kv_heads, model.head_dim) + 0.5
    clips = torch.rand(model.layers, model.kv_heads) * 0.5 + 0.5
    state = sensitivity.taylor_state(model.layers)
    codings = [Coding(Scaled(scale), clips) for scale in scales]
    sensitivity.observe_taylor(model, sample, codings, GROUP, state)

    kept: list[list[torch.Tensor]] = []

    def keep(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = k.detach().requires_grad_() if layer == 0 else k, v.detach().requires_grad_() if layer == 0 else v
        k.retain_grad()
        v.retain_grad()
        kept.append([k, v])
        return k, v

    tokens = torch.from_numpy(sample.tokens)
    with observing(keep):
        logits = model.model(tokens[None], use_cache=False).logits[0]
    first = sample.first_target
    loss = -torch.log_softmax(logits[first - 1 : -1], -1)[torch.arange(LENGTH - first), tokens[first:]].sum()
    loss.backward()
    for layer in range(model.layers):
        for side in (0, 1):
            x = kept[layer][side]
            for place, bits in enumerate(sensitivity.WIDTHS):
                scale = scales[place, layer][:, None] if side == 0 else torch.ones(())
                clip = clips[layer] if side == 0 and bits == 2 else None
                q = fake_quantize(x.detach() / scale, bits, GROUP, Coding(key_clip=clip)) * scale
                off = (x.grad * (x.detach() - q)).abs()  # type: ignore[operator]
                want = float(off[:, :, 16:].sum())  # the pool keeps the first page as it is
                assert float(state["taylor"][layer, side, place]) == pytest.approx(want, rel=2e-3)
    assert int(state["targets"]) == LENGTH - first


@pytest.mark.parametrize("hadamard", [False, True])
def test_kl_is_that_of_a_whole_forward(model: CalibrationModel, sample: Sample, hadamard: bool) -> None:
    transform = Hadamard(model.head_dim) if hadamard else Transform()
    state = {"kl": torch.zeros(model.layers, 2, 3, dtype=torch.float64)}
    clips = torch.rand(model.layers, model.kv_heads, generator=torch.Generator().manual_seed(3)) * 0.5 + 0.5
    sensitivity.observe_kl(model, sample, [Coding(transform, clips)] * 3, GROUP, state)
    tokens = torch.from_numpy(sample.tokens)[None]
    rows = slice(sample.first_target - 1, LENGTH - 1)
    with torch.no_grad():
        exact = model.model(tokens).logits[0, rows].log_softmax(-1)
        for layer in range(model.layers):
            for side in (0, 1):

                def low(
                    at: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = layer, side: int = side
                ) -> tuple[torch.Tensor, torch.Tensor]:
                    pair = [k, v]
                    if at == layer:
                        coding = Coding(transform, clips[layer]) if side == 0 else None
                        whole = fake_quantize(pair[side], 2, GROUP, coding)
                        pair[side] = torch.where(torch.arange(LENGTH)[:, None] < 16, pair[side], whole)
                    return pair[0], pair[1]

                with observing(low):
                    other = model.model(tokens).logits[0, rows].log_softmax(-1)
                want = torch.nn.functional.kl_div(other, exact, log_target=True, reduction="sum") / len(exact)
                assert float(state["kl"][layer, side, 2]) == pytest.approx(float(want), rel=1e-3, abs=1e-7)


def test_taylor_of_rotated_keys(model: CalibrationModel, sample: Sample) -> None:
    """Keys alone are quantized otherwise; the gradient is of the keys themselves."""
    plain, rotated = (sensitivity.taylor_state(model.layers) for _ in range(2))
    for transform, state in ((Transform(), plain), (Hadamard(model.head_dim), rotated)):
        sensitivity.observe_taylor(model, sample, [Coding(transform)] * 3, GROUP, state)
    assert torch.equal(plain["taylor"][:, 1], rotated["taylor"][:, 1])
    ratio = rotated["taylor"][:, 0] / plain["taylor"][:, 0]
    assert (ratio != 1).all() and (ratio > 0.5).all() and (ratio < 2).all()


def test_seam_is_transformers_own_attention(model: CalibrationModel, sample: Sample) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model.model.name_or_path, dtype=torch.float32)
    with torch.no_grad():
        want = plain.base_model(torch.from_numpy(sample.tokens)[None]).last_hidden_state[0]
    assert torch.allclose(model.hidden(sample), want, atol=1e-4)


def test_layers_stream(model: CalibrationModel, sample: Sample) -> None:
    """While gradients flow no more than one layer's keys are alive."""
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watch(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal most
        alive.append(weakref.ref(k))
        most = max(most, sum(ref() is not None for ref in alive))
        return k, v

    with observing(watch):
        model.backward(sample)
    assert len(alive) == 2 * model.layers  # forward, and once more on the way back
    assert most <= 1


def test_rank_correlation() -> None:
    a = np.arange(12.0).reshape(2, 2, 3)
    assert sensitivity.rank_correlation(a, a**2) == [1.0, 1.0, 1.0]
    assert sensitivity.rank_correlation(a, -a) == [-1.0, -1.0, -1.0]
    assert sensitivity.rank_correlation(a, np.zeros_like(a)) == [None] * 3


# --- reparameterization (eq. 9, 10) ---


def test_scales_are_max_to_the_alpha() -> None:
    key_max = torch.tensor([[1.0, 4.0, 16.0, 0.25]])
    got = reparam.key_scales(key_max, 0.5)
    assert torch.allclose(got / got[:, :1], key_max.sqrt())  # λ_i = max|K_i|^α, up to a common factor
    assert torch.allclose(got.log().mean(), torch.zeros(()), atol=1e-6)
    assert torch.equal(reparam.key_scales(key_max, 0.0), torch.ones(1, 4))
    assert torch.isfinite(reparam.key_scales(torch.zeros(1, 4), 1.0)).all()


def test_ranges_are_maxima_over_samples(model: CalibrationModel) -> None:
    rng = np.random.default_rng(1)
    samples = [Sample(rng.integers(0, 512, n)) for n in (20, 33)]
    state = reparam.range_state(model, (128,))
    for one in samples:
        reparam.observe_ranges(model, one, (128,), state)
    largest = torch.zeros(model.layers, model.kv_heads, model.head_dim)
    for one in samples:

        def observer(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            largest[layer] = torch.maximum(largest[layer], k[0, :, 16:].abs().max(1).values)
            return k, v

        with observing(observer):
            model.hidden(one)
    assert torch.equal(state["key_max"][0, 0], largest)
    assert not torch.equal(state["key_max"][0, 1], largest)


@pytest.mark.parametrize("mode", MODES)
def test_ranges_around_centres(model: CalibrationModel, sample: Sample, mode: str) -> None:
    """Turned by the model's own rotary embedding at each token's position, stretched or not."""
    vector = torch.randn(model.layers, model.kv_heads, model.head_dim, generator=torch.Generator().manual_seed(0))
    center = Center.of(vector, [tuple(range(4))] * model.layers, model.rotary(LENGTH))
    state = reparam.range_state(model, (128,), 2)
    reparam.observe_ranges(model, sample, (128,), state, mode, (None, center))
    for place, effective in enumerate((0, 128)):
        seen: dict[int, torch.Tensor] = {}

        def observer(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: dict[int, torch.Tensor] = seen
        ) -> tuple[torch.Tensor, torch.Tensor]:
            seen[layer] = k[0]
            return k, v

        forward = effective if mode == "forward" else 0
        with observing(observer):
            model.hidden(sample, forward)
        angles = model.angles(LENGTH, effective)
        for layer, keys in seen.items():
            if mode == "keys":
                keys = turn(keys, model.angles(LENGTH), angles)
            still = torch.stack((torch.ones_like(angles[0]), torch.zeros_like(angles[0])))
            kept = center.vector[layer][:, None].expand_as(keys)
            want = torch.stack((keys, keys - turn(kept, still, angles)))[:, :, 16:].abs().amax(2)
            assert torch.allclose(state["key_max"][:, place, layer], want, atol=1e-4)


# --- centres ---


def biased(model: CalibrationModel, value: float) -> CalibrationModel:
    for layer in model.model.base_model.layers:
        layer.self_attn.k_proj.bias.data[3] = value
    return model


@pytest.fixture
def qwen2(tmp_path: Path) -> CalibrationModel:
    return CalibrationModel.load(str(make_model(tmp_path / "m", "qwen2", layers=2, dtype=torch.float32)))


def test_key_biases(model: CalibrationModel) -> None:
    """As the weights say; nothing where keys are normed, or have none."""
    got = model.key_biases()
    kind = model.config.model_type
    assert len(got) == model.layers and all((bias is None) == (kind != "qwen2") for bias in got)
    for layer, bias in zip(model.model.base_model.layers, got, strict=True):
        if bias is not None:
            assert torch.equal(bias.flatten(), layer.self_attn.k_proj.bias)


def test_spreads_from_the_weights(qwen2: CalibrationModel) -> None:
    """The variance that keys have where the norm's input is noise of unit variance."""
    module = qwen2.model.base_model.layers[1]
    torch.nn.init.uniform_(module.input_layernorm.weight, 0.5, 2.0)
    noise = torch.randn(20000, qwen2.config.hidden_size, generator=torch.Generator().manual_seed(0))
    keys = module.self_attn.k_proj(noise * module.input_layernorm.weight)
    want = keys.view(-1, qwen2.kv_heads, qwen2.head_dim).var(0).sum(-1)
    assert torch.allclose(qwen2.key_spreads()[1], want, rtol=0.02)
    assert len(qwen2.key_spreads()) == qwen2.layers


def test_a_norm_of_keys_takes_the_bias_apart(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", "qwen3", layers=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    model = CalibrationModel.load(str(path))
    assert model.model.base_model.layers[0].self_attn.k_proj.bias is not None
    assert model.key_biases() == (None, None)


def means(model: CalibrationModel, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    state = reparam.range_state(model, ()) | mean_state(model.layers, model.kv_heads, model.head_dim)
    for one in samples:
        reparam.observe_ranges(model, one, (), state)
    return state


def test_means_are_of_keys_before_they_are_turned(model: CalibrationModel) -> None:
    """What the projection (and the norm) of keys puts out, by hooks on the module."""
    rng = np.random.default_rng(1)
    samples = [Sample(rng.integers(0, 512, n)) for n in (20, 33)]
    state = means(model, samples)
    mean, vector = mean_of(state), torch.randn(model.layers, model.kv_heads, model.head_dim)
    spread = spread_around(state, vector)
    for layer, module in enumerate(model.model.base_model.layers):
        out: list[torch.Tensor] = []
        last = getattr(module.self_attn, "k_norm", None) or module.self_attn.k_proj
        hook = last.register_forward_hook(
            lambda _, given, result, out=out: out.append(result.view(-1, model.kv_heads, model.head_dim)[16:])
        )
        for one in samples:
            model.hidden(one)
        hook.remove()
        keys = torch.cat(out).double()
        assert torch.allclose(mean[layer], keys.mean(0).float(), atol=1e-5)
        assert torch.allclose(spread[layer], (keys - vector[layer]).square().sum(-1).mean(0).float(), rtol=1e-4)


def test_the_spread_around_the_mean_is_the_least(model: CalibrationModel, sample: Sample) -> None:
    state = means(model, [sample])
    least = spread_around(state, mean_of(state))
    assert (least > 0).all()
    for seed in range(3):
        off = torch.randn(mean_of(state).shape, generator=torch.Generator().manual_seed(seed))
        more = spread_around(state, mean_of(state) + off)
        assert torch.allclose(more, least + off.square().sum(-1), rtol=1e-4)


def test_a_large_bias_is_the_centre(qwen2: CalibrationModel, sample: Sample) -> None:
    """Of every layer; the mean finds it too. A spread of a few is not lost beside a bias of hundreds."""
    state = means(biased(qwen2, 300.0), [sample])
    rotary = qwen2.rotary(LENGTH)
    fitted = key_centers(("none", "bias", "mean"), qwen2.key_biases(), state, rotary)
    assert list(fitted) == ["bias", "mean"]
    for one in fitted.values():
        assert all(0 in blocks for blocks in one.center.blocks)  # channel 3 is of pair 3
        assert torch.allclose(one.center.vector[:, 0, 3], torch.tensor(300.0), rtol=0.02)
        assert (one.spread < 1000).all()
    small = means(biased(qwen2, 0.0), [sample])
    none = [torch.zeros(qwen2.kv_heads, qwen2.head_dim)] * qwen2.layers
    assert list(key_centers(("none", "bias", "mean"), none, small, rotary)) == ["mean"]
    assert list(key_centers(("none", "bias"), [None] * qwen2.layers, small, rotary)) == []


def with_scaling(scaling: dict[str, Any], tmp_path: Path) -> CalibrationModel:
    path = make_model(tmp_path / "m", layers=1, context=64, dtype=torch.float32)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
    (path / "config.json").write_text(json.dumps(config))
    return CalibrationModel.load(str(path))


def kept(model: CalibrationModel, sample: Sample) -> list[tuple[torch.Tensor, ...]]:
    """q, k, v [T, heads, D] of each layer."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(tuple(t[0].transpose(0, 1) for t in (q, k, v)))
        return k, v

    with observing(observer):
        model.hidden(sample)
    return seen


def output_error(
    model: CalibrationModel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, low: torch.Tensor, side: int = K
) -> torch.Tensor:
    """Squared error per KV head by the reference attention, ``low`` [T, H, D] in place of one side past a page."""
    scale = model.head_dim**-0.5
    low = torch.cat(((k if side == K else v)[:16], low[16:]))
    out = attention(q, low if side == K else k, low if side == V else v, scale, prefix_len=0)[0]
    off = (out - attention(q, k, v, scale, prefix_len=0)[0]).square().sum((0, 2))
    return off.view(model.kv_heads, -1).sum(1)


def some_center(model: CalibrationModel) -> Center:
    """In layer 1 alone."""
    vector = torch.randn(model.layers, model.kv_heads, model.head_dim, generator=torch.Generator().manual_seed(4)) * 3
    return Center.of(vector, ((), (0, 2)), model.rotary(LENGTH))


def test_alpha_error_is_that_of_the_reference_attention(model: CalibrationModel, sample: Sample) -> None:
    """Around each centre with its own maxima, values exact; not again where a layer has no centre."""
    key_max = torch.rand(2, model.layers, model.kv_heads, model.head_dim) + 0.1
    center = some_center(model)
    shape = (2, model.layers, model.kv_heads, len(sensitivity.WIDTHS), len(reparam.ALPHAS))
    error = torch.zeros(shape, dtype=torch.float64)
    reparam.observe_alphas(model, sample, key_max, (None, center), GROUP, {"error": error})
    assert not error[1, 0].any() and (error[0] > 0).all()
    term = center_term(Coding(center=center.pick(1)), torch.arange(LENGTH))
    assert term is not None
    for which, layer, place, index in ((0, 0, 2, 1), (0, 1, 1, 7), (1, 1, 2, 19), (1, 1, 0, 3)):
        q, k, v = kept(model, sample)[layer]
        s = key_max[which, layer] ** reparam.ALPHAS[index]
        s /= s.log().mean(-1, keepdim=True).exp()  # a common factor moves fp16 ranges and so a few codes
        off = term.transpose(0, 1) if which else torch.zeros(())
        x = ((k - off) / s).transpose(0, 1)
        low = fake_quantize(x, sensitivity.WIDTHS[place], GROUP).transpose(0, 1) * s + off
        want = output_error(model, q, k, v, low)
        assert torch.allclose(error[which, layer, :, place, index].float(), want, rtol=0.02)


@pytest.mark.parametrize("clip", [False, True])
def test_coding_errors_are_those_of_the_reference_attention(
    model: CalibrationModel, sample: Sample, clip: bool
) -> None:
    """Keys of every candidate at every width with exact values, values with exact keys; nothing else is finite."""
    center = some_center(model)
    scales = torch.rand(model.kv_heads, model.head_dim) + 0.5
    plain = [[Coding()] * 3, [Coding(Hadamard(model.head_dim))] * 3, [Coding(Scaled(scales))] * 3]
    keys = [[*plain, []], [*plain, [Coding(Hadamard(model.head_dim), center=center.pick(1))] * 3]]
    state = reparam.error_state(model, 4)
    reparam.observe_codings(model, sample, keys, clip, GROUP, state)
    measured = state["keys"].isfinite()
    assert not measured[0, :, 3].any() and measured[1, :, 3, :, 0].all() and measured[:, :, :3, :, 0].all()
    assert not measured[..., :2, 1:].any()  # clip factors act at 2 bits alone
    assert bool(measured[:, :, :3, 2].all()) == clip
    for layer, (q, k, v) in enumerate(kept(model, sample)):
        energy = attention(q, k, v, model.head_dim**-0.5, prefix_len=0)[0].square().sum((0, 2))
        assert torch.allclose(state["energy"][layer].float(), energy.view(model.kv_heads, -1).sum(1), rtol=1e-4)
        for index, codings in enumerate(keys[layer]):
            for place, at in [(0, 0), (1, 0), (2, 0), *([(2, 7)] if clip and codings else [])]:
                if codings:
                    coding = replace(codings[place], key_clip=torch.full((model.kv_heads,), reparam.CLIPS[at]))
                    low = fake_quantize(k.transpose(0, 1), sensitivity.WIDTHS[place], GROUP, coding).transpose(0, 1)
                    want = output_error(model, q, k, v, low)
                    assert torch.allclose(state["keys"][layer, :, index, place, at].float(), want, rtol=0.02)
        for index, transform in enumerate((Transform(), Hadamard(model.head_dim))):
            for place, bits in enumerate(sensitivity.WIDTHS):
                coding = Coding(value_transform=transform)
                low = fake_quantize(v.transpose(0, 1), bits, GROUP, coding, V).transpose(0, 1)
                want = output_error(model, q, k, v, low, V)
                assert torch.allclose(state["values"][layer, :, index, place].float(), want, rtol=0.02)


def test_errors_add_up_over_samples(model: CalibrationModel, sample: Sample) -> None:
    keys = [[[Coding()] * 3]] * model.layers
    once, twice = (reparam.error_state(model, 1) for _ in range(2))
    for state, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            reparam.observe_codings(model, sample, keys, True, GROUP, state)
    for name, tensor in once.items():
        assert torch.equal(2 * tensor, twice[name])


def test_the_clip_factor_of_a_normal_distribution() -> None:
    """Four levels of least squared error for a normal variable are 0.996 σ apart (Max 1960); codes cover that."""

    def clipped(share: float) -> Coding:
        return Coding(key_clip=torch.tensor([share]))

    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor(
        [float((fake_quantize(x[None], 2, 128, clipped(c))[0] - x).square().mean()) for c in reparam.CLIPS]
    )
    clip = float(reparam.best_clips(errors))
    span = float((x.amax(1) - x.amin(1)).mean())
    assert clip * span / 3 == pytest.approx(0.996, abs=0.06)
    assert errors.min() < 0.6 * errors[0]


# --- positional interpolation (eq. 12) ---


@pytest.mark.parametrize("effective", [LENGTH * 4, 130])
def test_stretched_positions_span_the_effective_length(effective: int) -> None:
    got = stretched_positions(LENGTH, effective)
    assert got[0] == 0
    assert effective - effective // LENGTH - 1 <= got[-1] < effective
    assert bool((got.diff() >= effective // LENGTH).all())
    assert got.dtype == torch.int64
    assert torch.equal(stretched_positions(LENGTH, 0), torch.arange(LENGTH))


@pytest.mark.parametrize("text", ["2048", "x", "8192,1024", "8192;16384"])
def test_bad_effective_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=f"--effective-len {text}"):
        parse_effective_lens(text, 2048)


def test_effective_lengths() -> None:
    assert parse_effective_lens("16384,8192", 2048) == (8192, 16384)
    assert parse_effective_lens("none", 2048) == ()


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_stretched_keys_are_those_of_a_long_text(scaling: dict[str, Any], tmp_path: Path) -> None:
    """A first-layer key depends on its token and position only, so a truly long text can say what it must be.

    With the model's own RoPE scaling, also where that depends on the length of the text.
    """
    model = with_scaling(scaling, tmp_path)
    short = Sample(np.random.default_rng(2).integers(0, 512, 32))
    at = stretched_positions(32, 256)
    long = np.zeros(int(at[-1]) + 1, dtype=np.int64)
    long[at] = short.tokens
    keys: list[torch.Tensor] = []

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys.append(k[0])
        return k, v

    with observing(observer):
        model.hidden(short, 256)
        model.hidden(Sample(long))
        model.hidden(short)
    assert torch.allclose(keys[0], keys[1][:, at], atol=1e-4)
    assert not torch.allclose(keys[0], keys[2], atol=1e-2)
    turned = turn(keys[2], model.angles(32), model.angles(32, 256))
    assert torch.allclose(turned, keys[1][:, at], atol=1e-4)
    states = [reparam.range_state(model, (256,)) for _ in MODES]
    for state, mode in zip(states, MODES, strict=True):
        reparam.observe_ranges(model, short, (256,), state, mode)
    assert torch.allclose(states[0]["key_max"], states[1]["key_max"], atol=1e-4)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_the_rotary_table_is_the_models_own(scaling: dict[str, Any], tmp_path: Path) -> None:
    """Magnitude included: what the module makes of the projection of keys is what the table makes of it."""
    model = with_scaling(scaling, tmp_path)
    seen: list[torch.Tensor] = []
    module = model.model.base_model.layers[0].self_attn.k_proj
    hook = module.register_forward_hook(
        lambda _, given, result: seen.append(result.view(-1, model.kv_heads, model.head_dim).transpose(0, 1))
    )

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(k[0])
        return k, v

    for length, effective in ((32, 0), (96, 0), (32, 256)):
        seen.clear()
        with observing(observer):
            model.hidden(Sample(np.arange(length)), effective)
        before, after = seen
        table = model.rotary(length, effective)
        assert torch.allclose(table.unturned(after, torch.arange(length)), before, atol=1e-4)
        if scaling["rope_type"] == "yarn":
            assert not torch.allclose(after.square().sum(), before.square().sum(), rtol=1e-2)
    hook.remove()


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_stretching_keys_does_not_move_their_mean(scaling: dict[str, Any], tmp_path: Path) -> None:
    """Before the rotary embedding there are no positions: keys turned elsewhere come from the same vectors."""
    model = with_scaling(scaling, tmp_path)
    short = Sample(np.random.default_rng(2).integers(0, 512, 32))
    natural, stretched = (mean_state(1, model.kv_heads, model.head_dim) for _ in range(2))

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        add_keys(natural, layer, k[0], model.rotary(32))
        moved = turn(k[0], model.angles(32), model.angles(32, 256))
        assert not torch.allclose(moved, k[0], atol=0.1)
        add_keys(stretched, layer, moved, model.rotary(32, 256))
        return k, v

    with observing(observer):
        model.hidden(short)
    assert torch.allclose(mean_of(natural), mean_of(stretched), atol=1e-5)
    assert torch.allclose(
        spread_around(natural, mean_of(natural)), spread_around(stretched, mean_of(natural)), rtol=1e-5
    )
