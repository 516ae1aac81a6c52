"""Divergence of a quantized cache without a server: what is exact, what is old, and that nothing else differs."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_pmkvq.calib import quality
from sglang_pmkvq.calib.model import CalibrationModel
from sglang_pmkvq.formats import SIDES, K, V
from sglang_pmkvq.kernels.reference.codes import fake_quantize
from tests.support.models import make_model


def test_a_page_is_old_once_the_window_has_passed_it() -> None:
    """As the pool has it under hard protection: whole pages before the last 128 tokens, the first page never."""
    position = torch.arange(400)
    old = quality.seen_low(position[:, None], position)
    for query in range(400):
        tokens = query + 1
        end = max(0, tokens - 128) // 16 * 16
        want = [16 <= key < end for key in range(400)]
        assert old[query].tolist() == want, query


@pytest.mark.parametrize("sides", [(K,), (V,), SIDES], ids=["keys", "values", "both"])
def test_attention_reads_old_tokens_low_and_the_rest_exactly(sides: tuple[int, ...]) -> None:
    gen = torch.Generator().manual_seed(0)
    length = 300
    q = torch.randn(4, length, 8, generator=gen)
    exact = (torch.randn(2, length, 8, generator=gen), torch.randn(2, length, 8, generator=gen))
    low = tuple(exact[s] + torch.randn(2, length, 8, generator=gen) if s in sides else exact[s] for s in SIDES)
    got = quality.attend(q, exact, (low[K], low[V]), 0.3)
    for query in (0, 15, 143, 144, 159, 160, 299):
        end = max(0, query + 1 - 128) // 16 * 16
        where = torch.arange(query + 1)
        is_low = (where >= 16) & (where < end)
        for head in range(4):
            k, v = (torch.where(is_low[:, None], low[s][head // 2, where], exact[s][head // 2, where]) for s in SIDES)
            want = torch.softmax(k @ q[head, query] * 0.3, 0) @ v
            torch.testing.assert_close(got[head, query], want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CalibrationModel:
    folder = make_model(tmp_path_factory.mktemp("quality") / "model", dtype=torch.float32)
    return CalibrationModel.load(str(folder), "cpu", "float32")


def text_of(model: CalibrationModel, length: int = 320) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(3))


def test_a_format_that_changes_nothing_diverges_by_nothing(model: CalibrationModel) -> None:
    exact, results = quality.compare(model, [text_of(model)], {"same": lambda layer, side, x: x})
    same = results["same"]
    assert same.kl == pytest.approx(0.0, abs=1e-6) and same.top1 == 1.0 and exact.top1 == 1.0
    assert same.positions == exact.positions == 320 - 160 - 1
    assert same.loss == pytest.approx(exact.loss) and not same.errors.any()
    # A forward of transformers' own has the same loss.
    ids = text_of(model)[None]
    with torch.no_grad():
        logits = model.model(ids).logits[0].float()
    want = torch.nn.functional.cross_entropy(logits[160:-1], ids[0, 161:])
    assert math.log(exact.perplexity) == pytest.approx(float(want), rel=1e-4)


def test_fewer_bits_diverge_more_and_the_worst_layer_is_named(model: CalibrationModel) -> None:
    def codec(bits: int, only: tuple[int, int] | None = None) -> quality.Codec:
        def read(layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
            return fake_quantize(x, bits, 32) if only in (None, (layer, side)) else x

        return read

    codecs = {"8": codec(8), "4": codec(4), "2": codec(2), "one": codec(2, (1, V))}
    steps: list[str] = []
    _, results = quality.compare(model, [text_of(model), text_of(model, 240)], codecs, on_step=steps.append)
    assert results["8"].kl < results["4"].kl < results["2"].kl
    assert results["one"].kl < results["2"].kl
    assert results["2"].top1 <= results["8"].top1
    layer, side, error = results["one"].worst(1)[0]
    assert (layer, side) == (1, V) and error > 0.01
    assert len(results["2"].worst(2)) == 2
    assert steps == ["16 bits", "8", "4", "2", "one"] * 2
    # What is measured at a layer is the error of that side alone, its inputs exact.
    assert results["2"].errors[V, 1].tolist() == pytest.approx(results["one"].errors[V, 1].tolist())


def test_a_text_without_an_old_page_is_refused(model: CalibrationModel) -> None:
    with pytest.raises(ValueError, match="100 tokens is too short; give at least 176"):
        quality.compare(model, [text_of(model, 100)], {"same": lambda layer, side, x: x})
