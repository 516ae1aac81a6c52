"""What each extra of the reparameterization adds at 2 and 4 bits: rotations of K and V, clipping of the group range.

    python -m benchmarks.transforms --problems 12 --seeds 0 1 2

A *map* is a matrix per layer and KV head: x·A is quantized and what is read is multiplied by A⁻¹. Key scales are a
diagonal one. Matrices and the searched numbers (α of a scale, clip factors) come from calibration samples of training
seeds, by the error of the attention output; every row is judged on other samples (error per layer) and on problems of
evaluation seeds: divergence of the decode path from 16 bits and whole chains right, everything older than the window
at its final widths (``benchmarks/forced.py``).

Clipping by a factor c per layer, KV head and side, in two places:

* ``first``: zero and range shrink to the middle share c when 16 bits become 8, and stay; all lower tiers inherit them.
* ``last``: the chain down to 4 bits is untouched; the step from 4 to 2 bits rounds to four levels that span the middle
  share c of the *stored* range. This is the way of the product, for keys.

Rows go to the result file as they are measured; a second run goes on where the first stopped. Intervals are bootstrap
percentiles over chains, seeds pooled; the ratio of two rows is paired by chain.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.forced import WINDOW, chains, force
from benchmarks.pressure import problem_set
from benchmarks.reasoner.evaluate import load
from benchmarks.result import commit, versions, write
from benchmarks.serving import REASONER
from benchmarks.transform_rows import Row, rows, table
from sglang_pmkvq.calib.corpus import Sample, load_corpus
from sglang_pmkvq.calib.model import CalibrationModel, observing
from sglang_pmkvq.calib.reparam import attention_rows, key_scales, observe_ranges, query_rows, range_state
from sglang_pmkvq.calib.run import load_tokenizer
from sglang_pmkvq.formats import SIDES, K, V
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import FP16_MAX, fake_quantize

RESULTS = Path(__file__).resolve().parent / "results"
ALPHAS = tuple(i / 9 for i in range(10))
CLIPS = tuple(1 - i / 20 for i in range(13))  # 1 .. 0.4
EFFECTIVE = (8192,)
SEARCH_ROWS = 128

Maps = tuple[Tensor | None, Tensor | None]
"""fp32 [H, D, D] into the space of the codes and back; None is the identity."""


def coded(x: Tensor, bits: int, group_size: int, clip: Tensor, where: str) -> Tensor:
    """``fake_quantize`` of fp32 x [H, T, D] with clip factors [H] that apply at ``where`` (see the module)."""
    c = clip[:, None]
    if where != "first" or bits == 16:
        return fake_quantize(x, bits, group_size, Coding(key_clip=clip) if where == "last" else None)
    groups = x.unflatten(-1, (-1, group_size))
    c = c[..., None, None]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    zero = (low + (high - low) * ((1 - c) / 2)).clamp(-FP16_MAX, FP16_MAX).half().float()
    span = ((high - low) * c).clamp(0.0, FP16_MAX).half().float()
    codes = torch.round((groups - zero) * 255 / span.clamp_min(1e-9)).clamp(0, 255)
    width = 8
    while width > bits:
        width //= 2
        codes = torch.floor(codes / (2**width + 1) + 0.5)
    return (codes * (span / (2**bits - 1)) + zero).reshape(x.shape)


@dataclass(frozen=True)
class Coder:
    """How one side of one layer is stored: its map and its clip factors fp32 [H]."""

    maps: Maps
    clip: Tensor
    where: str

    def read(self, x: Tensor, bits: int) -> Tensor:
        """What is read instead of x fp32 [H, T, D] at ``bits``; one group per head."""
        into, back = self.maps
        if bits == 16:
            return x
        if into is None or back is None:
            return coded(x, bits, x.shape[-1], self.clip, self.where)
        return coded(x @ into, bits, x.shape[-1], self.clip, self.where) @ back


@dataclass(frozen=True)
class Plan:
    """Coders [layer][side] at the final widths of each layer."""

    finals: tuple[tuple[int, int], ...]
    coders: tuple[tuple[Coder, Coder], ...]

    def read(self, layer: int, side: int, x: Tensor) -> Tensor:
        return self.coders[layer][side].read(x, self.finals[layer][side])


@dataclass
class Part:
    """One sample in one layer: rows of queries [Hq, R, D] at positions [R], K and V [H, T, D], exact output."""

    query: Tensor
    rows: Tensor
    k: Tensor
    v: Tensor
    exact: Tensor

    def error(self, k: Tensor, v: Tensor) -> Tensor:
        """Squared error of the attention output per KV head, float64 [H]."""
        out = attention_rows(self.query, k, v, self.rows, self.k.shape[-1] ** -0.5)
        return (out - self.exact).square().sum((1, 2, 3)).double()


@dataclass
class Statistics:
    """Of one layer: max|K| fp32 [H, D], second moments float64 [H, D, D], and the samples of the searches."""

    key_max: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)


def observe(model: CalibrationModel, samples: Sequence[Sample], keep: int) -> list[Statistics]:
    """Statistics of every layer over the samples, K and V rounded as 16-bit pages hold them."""
    state = range_state(model, EFFECTIVE)
    for sample in samples:
        observe_ranges(model, sample, EFFECTIVE, state)
    layers = [Statistics(m) for m in state["key_max"].amax(0)]
    for index, sample in enumerate(samples):

        def observer(layer: int, q: Tensor, k: Tensor, v: Tensor, kept: bool = index < keep) -> tuple[Tensor, Tensor]:
            here = layers[layer]
            held_k, held_v = k[0].bfloat16().float(), v[0].bfloat16().float()
            grouped = q[0].unflatten(0, (held_k.shape[0], -1)).flatten(1, 2)
            for name, x in (("q", grouped), ("k", held_k), ("v", held_v)):
                moment = x.double().transpose(-1, -2) @ x.double()
                here.moments[name] = here.moments.get(name, 0.0) + moment
            if kept:
                query, rows = query_rows(q[0], SEARCH_ROWS)
                exact = attention_rows(query, held_k, held_v, rows, model.head_dim**-0.5)
                here.parts.append(Part(query, rows, held_k, held_v, exact))
            return k, v

        with observing(observer):
            model.hidden(sample)
    return layers


def hadamard(dim: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, float64 [dim, dim]; ``dim`` a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < dim:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(dim)


def eigenvectors(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (floored at 1e-6 of their mean) and eigenvectors (columns) of symmetric [H, D, D]."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp_min(1e-6 * values.mean(-1, keepdim=True)), vectors


def _power(moment: Tensor, exponent: float) -> Tensor:
    values, vectors = eigenvectors(moment)
    return (vectors * values[..., None, :] ** exponent) @ vectors.transpose(-1, -2)


Family = Callable[[Tensor], Maps]
"""α [H] → maps."""


def _linear(matrix: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Family:
    def made(alpha: Tensor) -> Maps:
        into, back = matrix(alpha)
        return into.float(), back.float()

    return made


def _orthogonal(rotation: Tensor) -> Family:
    return _linear(lambda alpha: (rotation, rotation.transpose(-1, -2)))


def _scaled(before: Tensor, largest: Tensor, after: Tensor) -> Family:
    """x·before / s · after with s = largest^α; ``before`` and ``after`` orthogonal."""

    def matrix(alpha: Tensor) -> tuple[Tensor, Tensor]:
        s = key_scales(largest, alpha[:, None]).double()
        into = before / s[:, None, :] @ after
        return into, after.transpose(-1, -2) @ (before * s[:, None, :]).transpose(-1, -2)

    return _linear(matrix)


def families(layer: Statistics, side: int) -> dict[str, tuple[Family, bool]]:
    """Name → (maps, whether α is searched) of one side of a layer."""
    mine = layer.moments["k" if side == K else "v"]
    heads, dim = mine.shape[0], mine.shape[-1]
    eye = torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim)
    spread = hadamard(dim).expand(heads, dim, dim)
    own = eigenvectors(mine)[1]
    samples = [(p.k if side == K else p.v) @ own.float() for p in layer.parts]
    largest = torch.stack([x.abs().amax(1) for x in samples]).amax(0)
    out: dict[str, tuple[Family, bool]] = {
        "none": (lambda alpha: (None, None), False),
        "hadamard": (_orthogonal(spread), False),
        "eigen": (_orthogonal(own), False),
        "eigen, hadamard": (_orthogonal(own @ spread), False),
        "eigen, scale": (_scaled(own, largest, eye), True),
        "eigen, scale, hadamard": (_scaled(own, largest, spread), True),
    }
    if side == V:
        return out
    # Least error of the scores times least range: the geometric mean of the two moments, M·K²·M = Q².
    root, inverse = _power(mine, 0.5), _power(mine, -0.5)
    mean = inverse @ _power(root @ layer.moments["q"] @ root, 0.5) @ inverse
    values, vectors = eigenvectors(mean)

    def balanced(alpha: Tensor) -> tuple[Tensor, Tensor]:
        power = values ** (alpha[:, None].double() / 2)
        power = power / power.log().mean(-1, keepdim=True).exp()
        into = (vectors * power[:, None, :]) @ spread
        return into, spread.transpose(-1, -2) @ (vectors / power[:, None, :]).transpose(-1, -2)

    out |= {
        "scale": (_scaled(eye, layer.key_max, eye), True),
        "scale, hadamard": (_scaled(eye, layer.key_max, spread), True),
        "eigen of queries, hadamard": (_orthogonal(eigenvectors(layer.moments["q"])[1] @ spread), False),
        "balanced, hadamard": (_linear(balanced), True),
    }
    return out


def fit(layer: Statistics, side: int, name: str, bits: int, where: str) -> Coder:
    """The coder of least error of the attention output at ``bits``, the other side exact.

    α and the clip factor are searched in turns, α once more at the end.
    """
    family, searched = families(layer, side)[name]
    heads = layer.key_max.shape[0]
    alpha, clip = torch.zeros(heads), torch.ones(heads)
    if bits == 16:
        return Coder((None, None), clip, "")

    def errors(coder: Coder) -> Tensor:
        total = torch.zeros(heads, dtype=torch.float64)
        for part in layer.parts:
            k = coder.read(part.k, bits) if side == K else part.k
            v = coder.read(part.v, bits) if side == V else part.v
            total += part.error(k, v)
        return total

    def best(values: Sequence[float], coder: Callable[[Tensor], Coder]) -> Tensor:
        found = torch.stack([errors(coder(torch.full((heads,), value))) for value in values])
        return torch.tensor(values)[found.argmin(0)]

    for turn in range(2 if where else 1):
        if searched:
            alpha = best(ALPHAS, lambda a, clip=clip: Coder(family(a), clip, where))
        if where and turn == 0:
            maps = family(alpha)
            clip = best(CLIPS, lambda c, maps=maps: Coder(maps, c, where))
    return Coder(family(alpha), clip, where)


class Bench:
    """Options, the result file, and what a seed shares."""

    def __init__(self, options: argparse.Namespace, result: dict[str, Any]) -> None:
        self.options, self.result = options, result

    def key(self, row: Row, seed: int) -> dict[str, Any]:
        o = self.options
        return {"row": row.name, "seed": seed, "problems": o.problems, "lines": list(o.lines), "samples": o.samples}

    def missing(self, seed: int) -> list[Row]:
        done = self.result["rows"]
        return [r for r in rows() if not any(all(d.get(k) == v for k, v in self.key(r, seed).items()) for d in done)]

    def seed(self, seed: int) -> None:
        """Fit on training seed ``seed``, judge on other samples and on problems seed·n .. seed·n + n − 1."""
        missing = self.missing(seed)
        if not missing:
            return
        o = self.options
        path = str(REASONER)
        calibrated, tokenizer = CalibrationModel.load(path), load_tokenizer(path)
        samples = load_corpus("builtin", tokenizer, o.samples, 2048, seed).samples
        fitted = observe(calibrated, samples, o.search_samples)
        held_out = observe(calibrated, load_corpus("builtin", tokenizer, 2, 2048, 1000 + seed).samples, 2)
        model = load(REASONER)
        given = chains(model, tokenizer, problem_set(o.problems, *o.lines, first=seed * o.problems))
        coders: dict[tuple[int, int, str, int, str], Coder] = {}

        def coder(layer: int, side: int, name: str, bits: int, where: str) -> Coder:
            key = (layer, side, name, bits, where)
            if key not in coders:
                coders[key] = fit(fitted[layer], side, name, bits, where)
            return coders[key]

        for row in missing:
            finals = row.finals(len(fitted))
            made = tuple(
                (
                    coder(i, K, row.k, k, row.clip if k == 2 or row.plan == "k4v4" else ""),
                    coder(i, V, row.v, v, row.clip if (v == 2 or row.plan == "k4v4") and not row.keys else ""),
                )
                for i, (k, v) in enumerate(finals)
            )
            if row.read_bits:
                finals = tuple((min(16, k // 2 * row.read_bits), min(16, v // 2 * row.read_bits)) for k, v in finals)
            plan = Plan(finals, made)
            with torch.no_grad():
                forced = [force(model, chain, plan) for chain in given]
            self.result["rows"].append(
                {
                    **self.key(row, seed),
                    "commit": commit(),
                    "error": [_relative_error(here, plan, i) for i, here in enumerate(held_out)],
                    "kl": [float(kl.mean()) for kl, _ in forced],
                    "right": [bool(hit.all()) for _, hit in forced],
                    "clips": [[round(float(c.clip.mean()), 3) for c in pair] for pair in made] if row.clip else None,
                }
            )
            write(self.result, o.out)
            new = self.result["rows"][-1]
            print(f"{seed} {row.name}: KL {np.mean(new['kl']):.3e}, right {sum(new['right'])}", flush=True)


def _relative_error(layer: Statistics, plan: Plan, index: int) -> float:
    """Σ‖out − exact‖² / Σ‖exact‖² of the attention output of one layer, over samples that nothing was fitted to."""
    error = sum(float(p.error(*(plan.read(index, s, (p.k, p.v)[s]) for s in SIDES)).sum()) for p in layer.parts)
    return error / sum(float(p.exact.square().sum()) for p in layer.parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=12, help="per row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lines", default="64-128", help="program lines, low-high")
    parser.add_argument("--samples", type=int, default=16, help="calibration samples of ranges and covariances")
    parser.add_argument("--search-samples", type=int, default=4, help="of them, for α and clip factors")
    parser.add_argument("--out", type=Path, default=RESULTS / "transforms.json")
    options = parser.parse_args(argv)
    low, _, high = options.lines.partition("-")
    options.lines = (int(low), int(high or low))
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.transforms", *(sys.argv[1:] if argv is None else argv)]),
        "versions": versions(),
        "window": WINDOW,
        "rows": [],
    }
    if options.out.exists():
        result = json.loads(options.out.read_text())
    bench = Bench(options, result)
    for seed in options.seeds:
        bench.seed(seed)
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
