"""End-to-end oracle: what the server computed, recomputed by transformers over a fake-quantized cache.

A lone request is decoded greedily by a real server with output log-probabilities. The same tokens then go
through the transformers model whose cache holds, page by page and forward by forward, what
``kernels/reference`` says the pool would hand a reader. It computes in fp32 (a bf16 cache would round
dequantized values as coarsely as 8-bit codes do), and its 16-bit rows are rounded to bf16 as the server stores
them. Which page had which width at which forward comes from a ledger of our own that is fed the same events:
decisions are a pure function of them. With 16 bits everywhere the difference is bf16 noise, the yardstick for
the other rows. At 2 bits noise is amplified: where bf16 arithmetic moves a key over the border between two codes,
what is read back jumps by a third of the group's range. So each row has a control: the oracle against itself with
every activation rounded to bf16, under the same schedule and on the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.forced import coding_of
from benchmarks.harness.methods import PAGE
from benchmarks.harness.servers import Server, greedy, serve
from sglang_pmkvq import artifact
from sglang_pmkvq.formats import K, LayerGroup, PoolGeometry, V, groups_from_finals
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import fake_quantize
from sglang_pmkvq.ledger import Ledger, PolicyConfig
from sglang_pmkvq.serving.config import parse_final_bits, parse_size
from sglang_pmkvq.serving.sizing import choose_geometry, limits_for, page_shape

RUNNING = 2
# Small, because the pages of a chunk are reserved at 16 bits: only then can a small pool end at 2 bits.
CHUNK = 64


@dataclass(frozen=True)
class Case:
    """One server configuration: final widths, policy, window, pool bytes, whether keys are rotated; or what a
    calibration says."""

    name: str
    final: str
    policy: str
    window: int
    pool: str
    calibration: str = ""
    hadamard: bool = False

    def args(self) -> list[str]:
        keys = ["--pmkvq-calibration", self.calibration] if self.calibration else ["--pmkvq-final-bits", self.final]
        if not self.calibration:
            keys += ["--pmkvq-key-center", "none", "--pmkvq-key-transform", "hadamard" if self.hadamard else "none"]
        return [
            *keys, "--pmkvq-policy", self.policy, "--pmkvq-window", str(self.window),
            "--pmkvq-sink-tokens", "0", "--pmkvq-pool-bytes", self.pool, "--page-size", str(PAGE),
            "--max-running-requests", str(RUNNING), "--chunked-prefill-size", str(CHUNK), "--disable-radix-cache",
        ]  # fmt: skip

    def geometry(self, model: Any) -> PoolGeometry:
        """The pool that the server builds from these flags."""
        config = model.config
        shape = page_shape(PAGE, config.num_key_value_heads, config.head_dim, None)
        layers = config.num_hidden_layers
        finals = parse_final_bits(self.final, layers) if self.final else list(self._file().finals)
        groups = groups_from_finals(finals)
        limits = limits_for(RUNNING, CHUNK, PAGE, self._policy())
        return choose_geometry(shape, groups, parse_size(self.pool), limits)

    def coding(self, geometry: PoolGeometry) -> Coding:
        """Of all layers: what the file says, or the flags without one."""
        if self.calibration:
            return coding_of(self._file())
        every = LayerGroup(tuple(range(sum(len(g.layers) for g in geometry.groups))), 2, 2)
        return Coding.default("hadamard" if self.hadamard else "none", every, geometry.shape)

    def _policy(self) -> PolicyConfig:
        return PolicyConfig(policy=self.policy, window_tokens=self.window, sink_tokens=0)  # type: ignore[arg-type]

    def _file(self) -> artifact.Calibration:
        return artifact.load(self.calibration)

    def ledger(self, geometry: PoolGeometry) -> Ledger:
        return Ledger(geometry, self._policy(), RUNNING)


CASES = (
    Case("16 bits", "4", "age", 128, "512MiB"),
    Case("static 8, window 0", "8", "static", 0, "512MiB"),
    Case("static 4, window 0", "4", "static", 0, "512MiB"),
    Case("static 2, window 0", "2", "static", 0, "512MiB"),
    # So small that 1,200 tokens just fit: pages walk through all tiers.
    Case("progressive 4, window 64", "4", "age", 64, "1400KiB"),
    Case("progressive 2, window 64", "2", "age", 64, "960KiB"),
    Case("progressive k4v2, window 64", "k4v2", "age", 64, "1180KiB"),
    Case("static 4, keys of one layer 2, rotated", "0-4:4,5:k2v4", "static", 0, "512MiB", hadamard=True),
)


def spans(prompt: int, output: int) -> list[tuple[int, int]]:
    """Tokens [start, end) that each forward of a lone request feeds: prefill chunks, then one token at a time."""
    chunks = [(start, min(start + CHUNK, prompt)) for start in range(0, prompt, CHUNK)]
    return [*chunks, *((prompt + i, prompt + i + 1) for i in range(output - 1))]


def schedule(case: Case, geometry: PoolGeometry, forwards: Sequence[tuple[int, int]], prompt: int) -> list[np.ndarray]:
    """Steps int8 [groups, pages] of a lone request's pages at each forward."""
    ledger = case.ledger(geometry)
    pages = np.empty(0, np.int64)
    steps = []
    for start, end in forwards:
        if start < prompt:
            new = ledger.extend([1], [pages], [start], [end])
        else:
            new = ledger.append(np.array([1]), np.array([end]))
        assert new is not None
        pages = np.concatenate((pages, new))
        steps.append(ledger.page_steps(pages))
        ledger.drain()
    return steps


def replay(
    model: Any, case: Case, prompt: Sequence[int], output: Sequence[int], coding: Coding | None = None
) -> tuple[np.ndarray, float]:
    """Log-probability of each output token by the transformers model under the case's schedule.

    ``coding``: what is done to keys instead of what the case says.

    Returns:
        float64 [len(output)], and the mean width over pages, sides and layers at the last forward.
    """
    from transformers import DynamicCache

    geometry = case.geometry(model)
    group_of = {layer: g for g, group in enumerate(geometry.groups) for layer in group.layers}
    forwards = spans(len(prompt), len(output))
    steps = schedule(case, geometry, forwards, len(prompt))
    everything = torch.tensor([[*prompt, *output]])
    cache = DynamicCache(config=model.config)
    exact: list[list[torch.Tensor]] = [[], []]
    held = np.zeros((len(geometry.groups), 0), np.int8)
    coding = coding or case.coding(geometry)
    logprobs = []
    for (start, end), now in zip(forwards, steps, strict=True):
        known = np.zeros_like(now)
        known[:, : held.shape[1]] = held
        for page in np.flatnonzero((now != known).any(axis=0)):
            _shrink_page(cache, exact, geometry, group_of, int(page), now[:, page], coding)
        held = now
        with torch.no_grad():
            tokens = everything[:, start:end]
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        if end >= len(prompt):
            logprobs.append(torch.log_softmax(logits.float(), -1)[everything[0, end]].item())
        for side, name in ((K, "keys"), (V, "values")):
            for layer, entry in enumerate(cache.layers):
                data = getattr(entry, name)
                if len(exact[side]) <= layer:
                    exact[side].append(data[:, :, :0].clone())
                new = slice(exact[side][layer].shape[2], None)
                data[:, :, new] = data[:, :, new].bfloat16().float()
                exact[side][layer] = torch.cat((exact[side][layer], data[:, :, new]), 2)
    tiers = np.array([np.array(g.steps)[held[i]].mean() for i, g in enumerate(geometry.groups) for _ in g.layers])
    return np.array(logprobs), float(tiers.mean())


def _shrink_page(
    cache: Any,
    exact: list[list[torch.Tensor]],
    geometry: PoolGeometry,
    group_of: dict[int, int],
    page: int,
    steps: np.ndarray,
    coding: Coding,
) -> None:
    """Replace one page in every layer by what a reader of the pool sees at its steps."""
    part = slice(page * PAGE, (page + 1) * PAGE)
    for layer, entry in enumerate(cache.layers):
        group = geometry.groups[group_of[layer]]
        tiers = group.steps[int(steps[group_of[layer]])]
        for side, name in ((K, "keys"), (V, "values")):
            x = exact[side][layer][:, :, part]
            at = torch.arange(part.start, part.stop)
            read = fake_quantize(x, tiers[side], geometry.shape.group_size, coding.pick(layer), side, at)
            getattr(entry, name)[:, :, part] = read


def serve_case(server: Server, ids: Sequence[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities, one request at a time."""
    out = []
    for prompt in ids:
        meta = server.generate(**greedy(prompt, tokens), return_logprob=True)["meta_info"]
        logprobs, chosen, *_ = zip(*meta["output_token_logprobs"], strict=True)
        out.append((list(chosen), list(logprobs)))
    return out


def noisy(model: Any) -> Any:
    """The same model with the outputs of all its linear layers and norms rounded to bf16, as a bf16 server has them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if not list(module.children()) and any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(lambda _module, _inputs, out: out.bfloat16().float())
    return model


def run_case(
    model_path: Path, model: Any, case: Case, ids: Sequence[list[int]], tokens: int, control: Any = None
) -> dict[str, Any]:
    """Differences of log-probabilities over all positions of all chains.

    ``control``: a ``noisy`` model to compare the oracle with as well, or None.
    """
    with serve(model_path, case.args()) as server:
        served = serve_case(server, ids, tokens)
        shrinks = server.pool()["shrinks"]
    differences, noise, bits = [], [], []
    for prompt, (output, logprobs) in zip(ids, served, strict=True):
        expected, width = replay(model, case, prompt, output)
        differences.append(np.abs(expected - np.array(logprobs)))
        bits.append(width)
        if control is not None:
            noise.append(np.abs(replay(control, case, prompt, output)[0] - expected))
    return {
        "chains": len(ids),
        "positions": sum(map(len, differences)),
        "shrinks": shrinks,
        "mean_bits_at_end": sum(bits) / len(bits),
        **_spread("{}_difference", differences),
        **(_spread("control_{}", noise) if noise else {}),
    }


def _spread(name: str, parts: Sequence[np.ndarray]) -> dict[str, float]:
    every = np.concatenate(parts)
    figures = {"max": every.max(), "mean": every.mean(), "p99": np.quantile(every, 0.99)}
    return {name.format(what): float(value) for what, value in figures.items()}


def load(model_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
