"""Decode-path comparison without decoding: one pass over gold chains that reads what the pool would hand out.

Every token reads the sink page and the last ``window`` tokens at 16 bits and everything older at its layer's
final widths, which is what policy ``static`` with hard protection serves (up to where the window falls within a
page). One pass gives the logits of all steps, so the divergence from 16 bits and the chains that greedy decoding
would write exactly are cheap. Weights in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.stats import mean_error
from benchmarks.harness.tasks import chat_ids
from benchmarks.reasoner import task
from benchmarks.reasoner.evaluate import Quantizer, forward
from benchmarks.reasoner.model import Llama
from sglang_pmkvq import artifact
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import fake_quantize

SINK = 16
WINDOW = 128


def coding_of(c: artifact.Calibration) -> Coding:
    """What a calibration does to the keys and values of all layers and heads."""
    return Coding.from_calibration(c, range(c.num_layers), slice(None))


@dataclass(frozen=True)
class Widths(Quantizer):
    """What the pool hands out of tokens older than the window.

    Attributes:
        finals: (K, V) bits per layer.
        group_size: channels that share one scale and zero.
        coding: how the keys and values of all layers become codes.
        window: recent tokens that are read at 16 bits.
    """

    finals: tuple[tuple[int, int], ...]
    group_size: int = 128
    coding: Coding = Coding()
    window: int = WINDOW
    sink = SINK

    def enter(self, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    def old(self, tokens: int) -> tuple[int, int]:
        return max(0, tokens - self.window), max(0, tokens - self.window)

    def low(self, layer: int, side: int, x: Tensor) -> Tensor:
        return fake_quantize(x, self.finals[layer][side], self.group_size, self.coding.pick(layer), side)


def logits(model: Llama, tokens: Tensor, widths: Quantizer, first: int) -> Tensor:
    """Logits fp32 [T − first, vocabulary] of tokens [T] of one sequence, from position ``first`` on."""
    # Tokens come one by one from the second on: the prompt is read at final widths too.
    result: Tensor = model.lm_head(forward(model, tokens, widths, 1)[first:])
    return result


@dataclass(frozen=True)
class Chain:
    """A gold chain, ready to be forced: tokens [T], index of the first chain token, exact log-probabilities."""

    tokens: Tensor
    first: int
    exact: Tensor


@torch.no_grad()
def chains(model: Llama, tokenizer: Any, problems: Sequence[task.Problem]) -> list[Chain]:
    """Chains with the log-probabilities of a 16-bit cache."""
    out = []
    sixteen = Widths(((16, 16),) * model.config.num_hidden_layers)
    for problem in problems:
        prompt = chat_ids(tokenizer, task.messages(problem))
        tokens = torch.tensor([*prompt, *tokenizer(problem.chain)["input_ids"], tokenizer.eos_token_id])
        out.append(Chain(tokens, len(prompt), logits(model, tokens[:-1], sixteen, len(prompt) - 1).log_softmax(-1)))
    return out


@torch.no_grad()
def force(model: Llama, chain: Chain, widths: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """Per step of a chain: KL(16 bits ‖ widths) in nats, and whether the greedy choice is the gold one."""
    low = logits(model, chain.tokens[:-1], widths, chain.first - 1).log_softmax(-1)
    kl = (chain.exact.exp() * (chain.exact - low)).sum(-1)
    return kl.numpy(), (low.argmax(-1) == chain.tokens[chain.first :]).numpy()


def compare(model: Llama, given: Sequence[Chain], widths: Quantizer) -> dict[str, Any]:
    """KL(16 bits ‖ widths) per step in nats, steps and whole chains whose greedy choice is the gold one."""
    forced = [force(model, chain, widths) for chain in given]
    every = np.concatenate([kl for kl, _ in forced])
    return {
        "chains": len(given),
        "steps": len(every),
        "kl_mean": float(every.mean()),
        "kl_mean_standard_error": mean_error(np.array([kl.mean() for kl, _ in forced])),
        "kl_p99": float(np.quantile(every, 0.99)),
        "step_accuracy": sum(int(hit.sum()) for _, hit in forced) / len(every),
        "chains_right": sum(bool(hit.all()) for _, hit in forced),
    }
