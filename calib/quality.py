"""How far a model with quantized KV is from itself at 16 bits, measured without a server.

One forward per text and format, teacher-forced: every query reads the recent window and the first page exactly, as the
pool protects them, and everything older as ``kernels/reference`` says a reader of the pool would see it at its final
width. That is the worst case of serving: a cache that is full from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_pmkvq.calib.model import CalibrationModel
from sglang_pmkvq.formats import PAGE_SIZES, SIDES, K, V

SEAM = "pmkvq_quality"
PAGE = PAGE_SIZES[0]
WINDOW = 128
# Query rows of one product, and logits that are compared at once.
QUERY_ROWS = 256
LOGIT_ELEMENTS = 1 << 24

Codec = Callable[[int, int, torch.Tensor], torch.Tensor]
"""(layer, side, x fp32 [H, T, D]) → what a reader sees once it is quantized, of the same shape."""


@dataclass
class Divergence:
    """A format against 16 bits, over all compared positions.

    Attributes:
        positions: tokens whose distributions were compared.
        kl: summed KL(16 bits ‖ format), nats.
        agree: positions where both have the same likeliest token.
        loss: summed cross-entropy of the text's next tokens, nats.
        errors: per side and layer, summed squares of error and of the exact attention output: float64 [2, L, 2].
    """

    positions: int = 0
    kl: float = 0.0
    agree: int = 0
    loss: float = 0.0
    errors: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def kl_mean(self) -> float:
        return self.kl / self.positions

    @property
    def top1(self) -> float:
        return self.agree / self.positions

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.positions)

    def worst(self, count: int = 3) -> list[tuple[int, int, float]]:
        """(layer, side, relative error of the attention output) of the layers that suffer most."""
        relative = (self.errors[..., 0] / self.errors[..., 1].clamp_min(1e-30)).sqrt()
        order = relative.flatten().argsort(descending=True)[:count].tolist()
        return [(i % relative.shape[1], i // relative.shape[1], float(relative.flatten()[i])) for i in order]


def seen_low(queries: torch.Tensor, keys: torch.Tensor, window: int = WINDOW, sink: int = PAGE) -> torch.Tensor:
    """Whether a query at position ``[R, 1]`` reads a key at position ``[T]`` at its final width, bool ``[R, T]``.

    Whole pages before the last ``window`` tokens, the query's own among them; the first ``sink`` tokens never.
    """
    end = ((queries + 1 - window).clamp_min(0) // PAGE) * PAGE
    return (keys >= sink) & (keys < end)


def attend(
    q: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    low: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
) -> torch.Tensor:
    """fp32 causal attention of q ``[Hq, T, D]`` where old tokens are read from ``low``, K and V ``[H, T, D]``."""
    heads, length = exact[K].shape[:2]
    grouped = q.float().unflatten(0, (heads, -1))
    out = torch.empty_like(grouped)
    position = torch.arange(length, device=q.device)
    for start in range(0, length, QUERY_ROWS):
        rows = position[start : start + QUERY_ROWS, None]
        seen = slice(0, start + len(rows))
        part = grouped[:, :, start : start + QUERY_ROWS]
        old = seen_low(rows, position[seen])
        scores = part @ exact[K][:, None, seen].transpose(-1, -2)
        if low[K] is not exact[K]:
            scores = torch.where(old, part @ low[K][:, None, seen].transpose(-1, -2), scores)
        weights = (scores * scaling).masked_fill_(position[seen] > rows, -math.inf).softmax(-1)
        if low[V] is exact[V]:
            result = weights @ exact[V][:, None, seen]
        else:
            result = (weights * ~old) @ exact[V][:, None, seen] + (weights * old) @ low[V][:, None, seen]
        out[:, :, start : start + QUERY_ROWS] = result
    return out.flatten(0, 1)


class _Reader:
    """What the attention of a forward does: exact, or with one codec; and, exact, what codecs would do to a layer."""

    def __init__(self, codec: Codec | None = None, errors: dict[str, torch.Tensor] | None = None) -> None:
        self.codec = codec
        self.codecs: dict[str, Codec] = {}
        self.errors = errors or {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        exact = (k, v)
        if self.codec is not None:
            return attend(q, exact, (self.codec(layer, K, k), self.codec(layer, V, v)), scaling)
        out = attend(q, exact, exact, scaling)
        for name, codec in self.codecs.items():
            for side in SIDES:
                low = codec(layer, side, exact[side])
                if low is exact[side]:
                    continue
                other = attend(q, exact, (low, v) if side == K else (k, low), scaling)
                error = torch.stack(((other - out).square().sum(), out.square().sum())).double().cpu()
                self.errors[name][side, layer] += error
        return out


_reader: _Reader | None = None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract, one unpadded sequence."""
    assert _reader is not None
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    out = _reader(module.layer_idx, query[0], key[0].float(), value[0].float(), scaling)
    return out.to(query.dtype)[None].transpose(1, 2).contiguous(), None


@contextmanager
def _reading(model: CalibrationModel, reader: _Reader) -> Iterator[None]:
    from transformers import AttentionInterface

    global _reader
    AttentionInterface.register(SEAM, _attention)
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation(SEAM)
    _reader = reader
    try:
        yield
    finally:
        _reader = None
        model.model.set_attn_implementation(before)


@torch.no_grad()
def compare(
    model: CalibrationModel,
    texts: Sequence[torch.Tensor],
    codecs: dict[str, Codec],
    layer_errors: bool = True,
    on_step: Callable[[str], None] | None = None,
) -> tuple[Divergence, dict[str, Divergence]]:
    """16 bits, and every format against them.

    Args:
        texts: int64 ``[T]`` each, longer than window and sink; positions that read something old are compared.
        codecs: by name of the format.
        layer_errors: also measure what each format does to each layer alone (``Divergence.errors``).
        on_step: told before each forward what it is for.

    Raises:
        ValueError: a text that is too short for any page to be old.
    """
    exact = Divergence()
    results = {name: Divergence(errors=torch.zeros(2, model.layers, 2, dtype=torch.float64)) for name in codecs}
    tell = on_step or (lambda what: None)
    for tokens in texts:
        first = WINDOW + PAGE + PAGE  # the first query that sees a page at its final width
        if len(tokens) < first + PAGE:
            raise ValueError(f"a text of {len(tokens)} tokens is too short; give at least {first + PAGE}")
        rows = torch.arange(first, len(tokens) - 1)
        ids = tokens.to(model.device)[None]
        reader = _Reader(errors={name: result.errors for name, result in results.items()})
        if layer_errors:
            reader.codecs = codecs
        tell("16 bits")
        with _reading(model, reader):
            hidden = model.model.base_model(ids, use_cache=False).last_hidden_state[0]
        exact.positions += len(rows)
        for name, codec in codecs.items():
            tell(name)
            with _reading(model, _Reader(codec)):
                other = model.model.base_model(ids, use_cache=False).last_hidden_state[0]
            result = results[name]
            result.positions += len(rows)
            step = max(1, LOGIT_ELEMENTS // model.config.vocab_size)
            for part in rows.split(step):
                p, q = model.log_probs(hidden[part]), model.log_probs(other[part])
                result.kl += float((p.exp() * (p - q)).sum())
                result.agree += int((p.argmax(-1) == q.argmax(-1)).sum())
                target = ids[0, part + 1][:, None]
                result.loss -= float(q.gather(1, target).sum())
                if name == next(iter(codecs)):
                    exact.loss -= float(p.gather(1, target).sum())
    exact.agree = exact.positions
    return exact, results
