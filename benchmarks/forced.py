"""Decode-path comparison without decoding: one pass over gold chains that reads what the pool would hand out.

Every token reads the sink page and the last ``window`` tokens at 16 bits and everything older at its layer's
final widths, which is what policy ``static`` with hard protection serves (up to where the window falls within a
page). One pass gives the logits of all steps, so the divergence from 16 bits and the chains that greedy decoding
would write exactly are cheap. Weights in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.reasoner.evaluate import prompt_tokens
from benchmarks.reasoner.model import Llama
from benchmarks.reasoner.task import Problem
from sglang_pmkvq.formats import TIERS, K, V
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import fake_quantize

SINK = 16
WINDOW = 128
# Queries at a time; they read nothing that comes after them, and exact rows of a window only.
BLOCK = 128


class Reader(Protocol):
    """Decides what is read of tokens older than the window."""

    def read(self, layer: int, side: int, x: Tensor) -> Tensor:
        """What the pool hands out instead of ``x`` fp32 [H, T, D], K (side 0) or V (1) of a layer."""


@dataclass(frozen=True)
class Widths:
    """Final (K, V) bits per layer, channels per group, and how the keys of all layers become codes."""

    finals: tuple[tuple[int, int], ...]
    group_size: int = 128
    coding: Coding = Coding()

    def read(self, layer: int, side: int, x: Tensor) -> Tensor:
        bits = self.finals[layer][side]
        assert bits in TIERS
        return fake_quantize(x, bits, self.group_size, self.coding.pick(layer) if side == K else None)


def logits(model: Llama, tokens: Tensor, widths: Reader, first: int, window: int = WINDOW) -> Tensor:
    """Logits fp32 [T − first, vocabulary] of tokens [T] of one sequence, from position ``first`` on."""
    length = len(tokens)
    cos, sin = model.cos[:length], model.sin[:length]
    x = model.model.embed_tokens(tokens)[None]
    for index, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        q, k, v = attn.project(layer.input_layernorm(x), cos, sin)
        out = _attention(q[0], _bf16(k[0]), _bf16(v[0]), widths, index, window)
        x = x + attn.o_proj(out.transpose(0, 1).flatten(1))[None]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    result: Tensor = model.lm_head(model.model.norm(x[0, first:]))
    return result


def _bf16(x: Tensor) -> Tensor:
    """What a 16-bit page holds."""
    return x.bfloat16().float()


def _attention(q: Tensor, k: Tensor, v: Tensor, widths: Reader, layer: int, window: int) -> Tensor:
    """[H, T, D] of q [H, T, D], k and v [G, T, D]: all as read at final widths, then corrected where it is exact."""
    (heads, length, dim), kv_heads = q.shape, k.shape[0]
    q = q.view(kv_heads, -1, length, dim) / math.sqrt(dim)
    k_low, v_low = widths.read(layer, K, k), widths.read(layer, V, v)
    v_lost = v - v_low
    out = torch.empty_like(q)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        # Exact: the sinks, and in each row the last `window` tokens, which begin at `near`.
        near = min(max(SINK, start - window + 1), end)
        rows, recent = torch.arange(start, end)[:, None], torch.arange(near, end)
        old = rows - recent >= window
        own = q[:, :, start:end].flatten(1, 2)
        scores = (own @ k_low[:, :end].mT).view(kv_heads, -1, end - start, end)
        scores[..., :SINK] = (own @ k[:, : min(SINK, end)].mT).view_as(scores[..., :SINK])
        exact = (own @ k[:, near:end].mT).view_as(scores[..., near:])
        scores[..., near:] = torch.where(old, scores[..., near:], exact)
        p = scores.masked_fill_(torch.arange(end) > rows, -math.inf).softmax(-1)
        read = p.flatten(1, 2) @ v_low[:, :end]
        read += p[..., :SINK].flatten(1, 2) @ v_lost[:, : min(SINK, end)]
        read += (p[..., near:] * ~old).flatten(1, 2) @ v_lost[:, near:end]
        out[:, :, start:end] = read.view_as(out[:, :, start:end])
    return out.view(heads, length, dim)


@dataclass(frozen=True)
class Chain:
    """A gold chain, ready to be forced: tokens [T], index of the first chain token, exact log-probabilities."""

    tokens: Tensor
    first: int
    exact: Tensor


@torch.no_grad()
def chains(model: Llama, tokenizer: Any, problems: Sequence[Problem]) -> list[Chain]:
    """Chains with the log-probabilities of a 16-bit cache."""
    out = []
    sixteen = Widths(((16, 16),) * model.config.num_hidden_layers)
    for problem in problems:
        prompt = prompt_tokens(tokenizer, problem)
        chain = [*tokenizer(problem.chain)["input_ids"], tokenizer.eos_token_id]
        tokens = torch.tensor(prompt + chain)
        out.append(Chain(tokens, len(prompt), logits(model, tokens[:-1], sixteen, len(prompt) - 1).log_softmax(-1)))
    return out


@torch.no_grad()
def force(model: Llama, chain: Chain, widths: Reader, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Per step of a chain: KL(16 bits ‖ widths) in nats, and whether the greedy choice is the gold one."""
    low = logits(model, chain.tokens[:-1], widths, chain.first - 1, window).log_softmax(-1)
    kl = (chain.exact.exp() * (chain.exact - low)).sum(-1)
    return kl.numpy(), (low.argmax(-1) == chain.tokens[chain.first :]).numpy()


def compare(model: Llama, given: Sequence[Chain], widths: Reader, window: int = WINDOW) -> dict[str, Any]:
    """KL(16 bits ‖ widths) per step in nats, steps and whole chains whose greedy choice is the gold one."""
    forced = [force(model, chain, widths, window) for chain in given]
    every = np.concatenate([kl for kl, _ in forced])
    means = np.array([kl.mean() for kl, _ in forced])
    return {
        "chains": len(given),
        "steps": len(every),
        "kl_mean": float(every.mean()),
        "kl_mean_standard_error": float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        "kl_p99": float(np.quantile(every, 0.99)),
        "step_accuracy": sum(int(hit.sum()) for _, hit in forced) / len(every),
        "chains_right": sum(bool(hit.all()) for _, hit in forced),
    }
