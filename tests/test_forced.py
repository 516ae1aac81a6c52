"""The one-pass comparison of the calibration benchmark reads what a decode step would read."""

from __future__ import annotations

import pytest
import torch

from benchmarks.forced import SINK, Chain, Widths, compare, logits
from benchmarks.reasoner.model import Config, Llama
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import fake_quantize
from sglang_pmkvq.kernels.transforms import key_transform

CONFIG = Config(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=128)
LENGTH, WINDOW = 40, 8
FINALS = ((4, 2), (2, 8))


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    made = Llama(CONFIG).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return made


@torch.no_grad()
def stepwise(model: Llama, tokens: torch.Tensor, widths: Widths) -> torch.Tensor:
    """Token by token with a cache of exact rows, each read at the width that it has at that step."""
    keys: list[list[torch.Tensor]] = [[] for _ in widths.finals]
    values: list[list[torch.Tensor]] = [[] for _ in widths.finals]
    out = []
    for t, token in enumerate(tokens):
        x = model.model.embed_tokens(token)[None, None]
        cos, sin = model.cos[t : t + 1], model.sin[t : t + 1]
        for index, layer in enumerate(model.model.layers):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            keys[index].append(k[0, 0, 0].bfloat16().float())
            values[index].append(v[0, 0, 0].bfloat16().float())
            coding = widths.coding.pick(index)
            read_k, read_v = [], []
            for j in range(t + 1):
                low = j >= SINK and t - j >= WINDOW
                k_bits, v_bits = widths.finals[index] if low else (16, 16)
                read_k.append(fake_quantize(keys[index][j][None, None], k_bits, 128, coding)[0, 0])
                read_v.append(fake_quantize(values[index][j], v_bits, 128))
            p = (q[0, :, 0] @ torch.stack(read_k).T / 128**0.5).softmax(-1)
            x = x + layer.self_attn.o_proj((p @ torch.stack(read_v)).flatten()[None, None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out.append(model.lm_head(model.model.norm(x[0, 0])))
    return torch.stack(out)


@pytest.mark.parametrize(
    "transform,clipped", [("none", False), ("scale", False), ("scale", True), ("hadamard", True)]
)
def test_one_pass_equals_steps(model: Llama, transform: str, clipped: bool) -> None:
    gen = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (LENGTH,), generator=gen)
    scale = torch.exp(torch.randn(2, 1, 128, generator=gen)) if transform == "scale" else None
    clip = torch.tensor([[0.9], [0.6]]) if clipped else None
    widths = Widths(FINALS, coding=Coding(key_transform(transform, 128, scale), clip), window=WINDOW)
    with torch.no_grad():
        got = logits(model, tokens, widths, 5)
        exact = logits(model, tokens, Widths(((16, 16),) * 2), 5)
    want = stepwise(model, tokens, widths)[5:]
    assert torch.allclose(got, want, atol=2e-3)
    assert (got - exact).abs().max() > 0.05


def test_sixteen_bits_diverge_from_nothing(model: Llama) -> None:
    tokens = torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(2))
    sixteen = Widths(((16, 16),) * 2)
    with torch.no_grad():
        exact = logits(model, tokens[:-1], sixteen, 9).log_softmax(-1)
    got = compare(model, [Chain(tokens, 10, exact)], sixteen)
    assert got["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert got["steps"] == LENGTH - 10
    low = compare(model, [Chain(tokens, 10, exact)], Widths(FINALS, window=4))
    assert low["kl_mean"] > 1e-4
