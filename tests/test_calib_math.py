"""Parity with the paper's formulas: independent, straightforward implementations judge the calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_pmkvq.calib import reparam, sensitivity
from sglang_pmkvq.calib.corpus import Sample
from sglang_pmkvq.calib.model import CalibrationModel, observing
from sglang_pmkvq.calib.positions import MODES, parse_effective_lens, stretched_positions, turn
from sglang_pmkvq.kernels.coding import Coding, Hadamard, Transform, Scaled
from sglang_pmkvq.kernels.reference.attention import attention
from sglang_pmkvq.kernels.reference.codes import fake_quantize
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
                want = float((x.grad * (x.detach() - q)).abs().sum())  # type: ignore[operator]
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
                        pair[side] = fake_quantize(pair[side], 2, GROUP, coding)
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
            largest[layer] = torch.maximum(largest[layer], k[0].abs().max(1).values)
            return k, v

        with observing(observer):
            model.hidden(one)
    assert torch.equal(state["key_max"][0], largest)
    assert not torch.equal(state["key_max"][1], largest)


def test_alpha_error_is_that_of_the_reference_attention(model: CalibrationModel, sample: Sample) -> None:
    key_max = torch.rand(model.layers, model.kv_heads, model.head_dim) + 0.1
    pairs = [[(2, 4)]] * model.layers
    error = torch.zeros(model.layers, model.kv_heads, 1, len(reparam.ALPHAS), dtype=torch.float64)
    clips = torch.linspace(0.5, 0.9, model.layers * model.kv_heads).view(model.layers, model.kv_heads)
    reparam.observe_alphas(model, sample, key_max, pairs, GROUP, clips, {"error": error})
    seen: dict[int, tuple[torch.Tensor, ...]] = {}

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen[layer] = tuple(t[0].transpose(0, 1) for t in (q, k, v))  # [T, heads, D]
        return k, v

    with observing(observer):
        model.hidden(sample)
    for layer, index in ((0, 0), (1, 7), (1, 19)):
        q, k, v = seen[layer]
        s = key_max[layer] ** reparam.ALPHAS[index]
        s /= s.log().mean(-1, keepdim=True).exp()  # a common factor moves fp16 ranges and so a few codes
        coding = Coding(key_clip=clips[layer])
        low = fake_quantize((k / s).transpose(0, 1), 2, GROUP, coding).transpose(0, 1) * s
        out = attention(q, low, fake_quantize(v, 4, GROUP), model.head_dim**-0.5, prefix_len=0)[0]
        want = (out - attention(q, k, v, model.head_dim**-0.5, prefix_len=0)[0]).square().sum((0, 2))
        per_head = want.view(model.kv_heads, -1).sum(1)
        assert torch.allclose(error[layer, :, 0, index].float(), per_head, rtol=0.01)


@pytest.mark.parametrize("hadamard", [False, True])
def test_clip_error_is_that_of_the_reference_attention(
    model: CalibrationModel, sample: Sample, hadamard: bool
) -> None:
    """Keys at 2 bits, values exact, and only in the layers asked for."""
    scales = None if hadamard else torch.rand(model.layers, model.kv_heads, model.head_dim) + 0.5
    error = torch.zeros(model.layers, model.kv_heads, len(reparam.CLIPS), dtype=torch.float64)
    transform = Hadamard(model.head_dim) if scales is None else Scaled(scales)
    reparam.observe_clips(model, sample, [1], transform, GROUP, {"error": error})
    seen: list[tuple[torch.Tensor, ...]] = []

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(tuple(t[0].transpose(0, 1) for t in (q, k, v)))  # [T, heads, D]
        return k, v

    with observing(observer):
        model.hidden(sample)
    q, k, v = seen[1]
    for index in (0, 5, 12):
        s = torch.ones(()) if scales is None else scales[1]
        coding = Coding(transform if hadamard else Transform(), torch.full((model.kv_heads,), reparam.CLIPS[index]))
        low = fake_quantize((k / s).transpose(0, 1), 2, GROUP, coding).transpose(0, 1) * s
        out = attention(q, low, v, model.head_dim**-0.5, prefix_len=0)[0]
        want = (out - attention(q, k, v, model.head_dim**-0.5, prefix_len=0)[0]).square().sum((0, 2))
        assert torch.allclose(error[1, :, index].float(), want.view(model.kv_heads, -1).sum(1), rtol=0.05)
    assert not error[0].any() and (reparam.best_clips(error)[0] == 1).all()


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
    path = make_model(tmp_path / "m", layers=1, context=64, dtype=torch.float32)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
    (path / "config.json").write_text(json.dumps(config))
    model = CalibrationModel.load(str(path))
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
