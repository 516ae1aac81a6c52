"""Per-channel maxima of keys from short samples, from the same samples interpolated, and from long ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.figures import PALETTE, new_figure
from benchmarks.harness.tasks import chat_ids
from sglang_pmkvq.calib.corpus import Sample, load_task
from sglang_pmkvq.calib.model import CalibrationModel
from sglang_pmkvq.calib.reparam import observe_ranges, range_state
from sglang_pmkvq.calib.run import load_tokenizer

SHORT_TOKENS = 256
LONG_TOKENS = 2048


def _samples(tokenizer: Any, count: int, tokens: int, seed: int) -> list[Sample]:
    """Problems of training seeds, prompt and chain cut at exactly ``tokens`` tokens."""
    task = load_task()
    rng = random.Random(seed)
    out = []
    while len(out) < count:
        problem = task.make_problem(rng.randrange(task.EVAL_SEED_START), min(150, tokens // 12))
        prompt = chat_ids(tokenizer, task.messages(problem))
        ids = [*prompt, *tokenizer(problem.chain)["input_ids"]]
        if len(ids) >= tokens:
            out.append(Sample(np.array(ids[:tokens], dtype=np.int64), len(prompt)))
    return out


def _maxima(model: CalibrationModel, samples: list[Sample], lens: tuple[int, ...], mode: str = "keys") -> torch.Tensor:
    state = range_state(model, lens)
    for sample in samples:
        observe_ranges(model, sample, lens, state, mode)
    return state["key_max"]


def key_ranges(path: Path, samples: int, picture: Path) -> dict[str, Any]:
    """Errors of the maxima against long samples, over channels; draws ``picture``.

    Short, interpolated and long samples hold the same number of tokens in all, so that no maximum is larger only
    because more was seen; a second, disjoint set of long samples says how well maxima can be known at all.

    Returns:
        Per kind: mean and largest relative error |m − m_long| / m_long over channels, mean signed error, and the
        mean error of each layer.
    """
    model, tokenizer = CalibrationModel.load(str(path)), load_tokenizer(str(path))
    share = LONG_TOKENS // SHORT_TOKENS
    given = _samples(tokenizer, samples * share, SHORT_TOKENS, 1)
    short = _maxima(model, given, (LONG_TOKENS,))
    kinds = {
        "short": short[0],
        "keys interpolated": short[1],
        "short and keys interpolated": short.amax(0),
        "forward interpolated": _maxima(model, given, (LONG_TOKENS,), "forward")[1],
        "long, other samples": _maxima(model, _samples(tokenizer, samples, LONG_TOKENS, 2), ())[0],
    }
    truth = _maxima(model, _samples(tokenizer, samples, LONG_TOKENS, 3), ())[0]
    errors = {name: ((m - truth) / truth)[:, 0] for name, m in kinds.items()}  # one KV head: [L, D]
    _draw(kinds, truth, errors, picture)
    return {
        "short_tokens": SHORT_TOKENS,
        "long_tokens": LONG_TOKENS,
        "tokens_seen": samples * LONG_TOKENS,
        "errors": {
            name: {
                "mean_absolute": float(e.abs().mean()),
                "max_absolute": float(e.abs().max()),
                "mean_signed": float(e.mean()),
                "per_layer": [round(float(x), 4) for x in e.abs().mean(1)],
            }
            for name, e in errors.items()
        },
    }


def _draw(kinds: dict[str, torch.Tensor], truth: torch.Tensor, errors: dict[str, torch.Tensor], path: Path) -> None:
    worst = int(errors["short"].abs().mean(1).argmax())
    figure, (left, right) = new_figure(12, 4, 2, width_ratios=(2, 1))
    channels = np.arange(truth.shape[-1])
    left.plot(channels, truth[worst, 0], PALETTE[0], label=f"long ({LONG_TOKENS} tokens)")
    for name, color in (("short", PALETTE[2]), ("keys interpolated", PALETTE[1])):
        left.plot(channels, kinds[name][worst, 0], color, lw=1, label=name)
    left.set_xlabel(f"channel after RoPE, layer {worst} (pairs are i and i + {truth.shape[-1] // 2})")
    left.set_ylabel("max |K|")
    left.legend()
    for place, (name, e) in enumerate(errors.items()):
        where = np.arange(len(e)) + 0.16 * place - 0.32
        right.bar(where, e.abs().mean(1), 0.16, label=name, color=PALETTE[(2, 1, 3, 4, 0)[place]])
    right.set_xlabel("layer")
    right.set_ylabel("mean relative error of max |K|")
    right.set_ylim(0, 1.6 * max(float(e.abs().mean(1).max()) for e in errors.values()))
    right.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
