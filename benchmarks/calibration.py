"""What calibration gives on the bundled model: uniform, allocation alone, reparameterization alone, both, clipping,
and rotated keys in place of scaled ones.

    pmkvq bench calibration --problems 200 --seeds 0 1 2

``forced``: along gold chains, everything older than the window at its final widths (``benchmarks/forced.py``).
``served``: accuracy of real servers, the same *peak* pool bytes for every row of a target, policy ``age``. Seed s
answers problems s·n .. s·n + n − 1 of evaluation seeds and calibrates with training seed s. With widths 2, 4 and 8 a
mean of 2 leaves allocation no choice, so its rows are measured at 2.5 and compared with uniform 2 in the *same* pool
bytes, and with both mixed pairs at 3.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks import accuracy
from benchmarks.forced import Chain, Widths, chains, coding_of, compare
from benchmarks.harness.experiment import Experiment, Job, numbers
from benchmarks.harness.methods import Method
from benchmarks.harness.results import RESULTS, ROOT, Key, Result, Results, Row, locked, markdown, mib
from benchmarks.harness.stats import percent, points, wilson
from benchmarks.harness.tasks import line_range, problem_set
from benchmarks.reasoner.evaluate import load
from benchmarks.reasoner.model import Llama
from sglang_pmkvq import artifact
from sglang_pmkvq.calib.run import Settings, calibrate
from sglang_pmkvq.serving.config import parse_final_bits

WORK = ROOT / "results" / "tmp" / "calibration"
PARTS = ("forced", "served")


@dataclass(frozen=True)
class Variant:
    """One way to choose final widths and what is done to keys.

    Attributes:
        name: of the row.
        target: mean final width that allocation gets; "" for a fixed width.
        final: fixed final width, as ``--pmkvq-final-bits`` takes it.
        transform: ``none``, ``scale`` or ``hadamard``.
        clip: whether ranges of keys are clipped at 2 bits.
        sensitivity: what allocation minimizes.
    """

    name: str
    target: str = ""
    final: str = ""
    transform: str = "none"
    clip: bool = False
    sensitivity: str = "kl"

    @property
    def calibrated(self) -> bool:
        return bool(self.target) or self.transform != "none"


def _pair(alone: str, both: str, target: str, uniform: str, transform: str, clip: bool = False) -> tuple[Variant, ...]:
    """Keys transformed at a uniform width, and with allocation."""
    return (
        Variant(f"{alone}, {uniform}", final=uniform, transform=transform, clip=clip),
        Variant(f"{both}, {target}", target=target, transform=transform, clip=clip),
    )


def _four(target: str, uniform: str) -> tuple[Variant, ...]:
    return (
        Variant(f"uniform {uniform}", final=uniform),
        Variant(f"allocation alone, {target}", target=target),
        *_pair("reparameterization alone", "both", target, uniform, "scale"),
    )


SIXTEEN = Variant("16 bits", final="16")
CLIPPED = _pair("reparameterization and clipping", "both and clipping", "2.5", "2", "scale", clip=True)
ROTATED = _pair("hadamard and clipping", "both, hadamard and clipping", "2.5", "2", "hadamard", clip=True)
FORCED = (
    SIXTEEN,
    *_four("4", "4"),
    Variant("K4 V2", final="k4v2"),
    Variant("K2 V4", final="k2v4"),
    Variant("both, 3", target="3", transform="scale"),
    *_four("2.5", "2"),
    *CLIPPED,
    Variant("allocation by Taylor, 2.5", target="2.5", sensitivity="taylor"),
    Variant("both by Taylor, 2.5", target="2.5", transform="scale", sensitivity="taylor"),
    *ROTATED,
)
# Per group of rows with the same pool: bytes as a share of what the running problems need at 16 bits. A full pool
# of the widest row (4 or 2.5 bits, scales, zeros, the 16-bit reserve) just fits.
SERVED: tuple[tuple[float | None, tuple[Variant, ...]], ...] = (
    (None, (SIXTEEN,)),
    (0.33, _four("4", "4")),
    (0.22, (*_four("2.5", "2"), *CLIPPED, *ROTATED)),
)


def calibration_file(variant: Variant, seed: int, options: argparse.Namespace) -> Path | None:
    """The calibration of a variant, made once; None where there is nothing to calibrate."""
    o = options
    if not variant.calibrated:
        return None
    width = variant.target or variant.final
    clip = "-clip" if variant.clip else ""
    name = f"{width}-{variant.transform}-{variant.sensitivity}{clip}-seed{seed}-{o.samples}-{o.kl_samples}"
    path = WORK / f"{name}.pmkvq.safetensors"
    # One work folder per seed and transform: targets share what was measured.
    work = WORK / f"{seed}-{variant.transform}{clip}"
    with locked(work, wait=True):
        if not path.exists():
            work.mkdir(parents=True, exist_ok=True)
            settings = Settings(
                model=str(o.model),
                data="builtin",
                target=width,
                widths=(2, 4, 8) if variant.target else (int(width),),
                samples=o.samples,
                kl_samples=o.kl_samples,
                transform=variant.transform,
                center="none",
                clip=variant.clip,
                sensitivity=variant.sensitivity,
                seed=seed,
            )
            calibrate(settings, path, work)
    return path


def forced_row(
    variant: Variant, seed: int, options: argparse.Namespace, model: Llama, given: Sequence[Chain]
) -> dict[str, Any]:
    """One row along gold chains."""
    path = calibration_file(variant, seed, options)
    if path is None:
        widths = Widths(tuple(parse_final_bits(variant.final, model.config.num_hidden_layers)))
    else:
        c = artifact.load(path)
        widths = Widths(c.finals, c.group_size, coding_of(c))
    return {
        "final": _finals(widths.finals),
        "mean_bits": sum(map(sum, widths.finals)) / (2 * len(widths.finals)),
        **compare(model, given, widths),
    }


def served_row(
    variant: Variant, seed: int, options: argparse.Namespace, share: float | None, run: accuracy.Run
) -> dict[str, Any]:
    """One row of a real server, in ``share`` of the 16-bit bytes of what runs at once; None: in all of them."""
    path = calibration_file(variant, seed, options)
    method = Method.parse(f"age-{path or variant.final}")
    budget = int(run.held_bytes * share) if share else int(run.held_bytes * 1.5) + (64 << 20)
    finals = _finals(artifact.load(path).finals) if path else variant.final
    return {**accuracy.measure(run, method, budget), "share": share, "budget_bytes": budget, "final": finals}


def _finals(finals: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"k{k}v{v}" for k, v in finals)


def plan(options: argparse.Namespace, results: Results) -> Iterator[Job]:
    line_range(options.lines)

    def key(part: str, variant: Variant, seed: int) -> Key:
        key = {"part": part, "row": variant.name, "seed": seed, "problems": options.problems, "lines": options.lines}
        calibrated = {"samples": options.samples, "kl_samples": options.kl_samples}
        return key | calibrated if variant.calibrated else key

    @cache
    def gold(seed: int) -> tuple[Llama, list[Chain]]:
        model, tokenizer = load(options.model), AutoTokenizer.from_pretrained(options.model)
        problems = problem_set(options.problems, *line_range(options.lines), seed * options.problems)
        return model, chains(model, tokenizer, problems)

    @cache
    def run(seed: int) -> accuracy.Run:
        line = ["--model", options.model, "--problems", options.problems, "--first", seed * options.problems]
        line += ["--lines", options.lines, "--concurrency", options.concurrency, "--chunk", options.chunk]
        return accuracy.load(accuracy.EXPERIMENT.parse(list(map(str, line))))

    def jobs() -> Iterator[Job]:
        for seed in options.seeds if "forced" in options.parts else ():
            for variant in FORCED:
                yield Job.row(
                    key("forced", variant, seed),
                    lambda variant=variant, seed=seed: forced_row(variant, seed, options, *gold(seed)),
                    f"forced {variant.name}",
                )
        for seed in options.seeds if "served" in options.parts else ():
            for share, variants in SERVED:
                for variant in variants:
                    yield Job.row(
                        key("served", variant, seed),
                        lambda v=variant, s=seed, share=share: served_row(v, s, options, share, run(s)),
                        f"served {variant.name}",
                    )

    return jobs()


# -- tables --------------------------------------------------------------------------------------------------

Rows = Sequence[Row]


def rows_table(result: Result) -> str:
    """Rows as Markdown, seeds pooled; differences are paired by problem, in points, with bootstrap intervals."""
    return "\n\n".join(part for part in (served(result), forced(result)) if part)


def _rows(result: Result, part: str) -> dict[str, Rows]:
    """Rows of a part by name, in the order of the variants, each in the order of its seeds."""
    order = [v.name for v in (FORCED if part == "forced" else [v for _, some in SERVED for v in some])]
    by: dict[str, list[Row]] = {name: [] for name in order}
    for row in sorted((r for r in result["rows"] if r["key"]["part"] == part), key=lambda r: r["key"]["seed"]):
        by[row["key"]["row"]].append(row)
    return {name: rows for name, rows in by.items() if rows}


def outcomes(rows: Rows) -> dict[tuple[int, int], bool]:
    """Whether the answer was right, by seed and problem."""
    return {(r["key"]["seed"], i): i not in r["wrong"] for r in rows for i in range(r["key"]["problems"])}


def against(rows: Rows, other: Rows) -> str:
    """Points by which ``rows`` are better than ``other`` on the problems that both answered."""
    a, b = outcomes(rows), outcomes(other)
    return points(np.array([float(a[k]) - b[k] for k in sorted(a.keys() & b.keys())]))


def _right(name: str, rows: Rows, count: str) -> list[str]:
    n, right = sum(r["key"]["problems"] for r in rows), sum(r[count] for r in rows)
    size = f"{len(rows)} x {rows[0]['key']['problems']}"
    return [name, size, f"{right} ({100 * right / n:.1f} %)", percent(wilson(right, n))]


def served(result: Result) -> str:
    """The rows of real servers."""
    by = _rows(result, "served")
    head = ["served", "seeds x problems", "right", "95 %", "points against uniform", "against 16 bits"]
    lines = []
    for name, rows in by.items():
        same = [k for k in by if by[k][0]["share"] == rows[0]["share"] and k.startswith("uniform")]
        cells = _right(name, rows, "right")
        for other in (*(same or [""]), SIXTEEN.name):
            cells.append(against(rows, by[other]) if other in by and other != name else "-")
        budgets = [r["budget_bytes"] for r in rows]
        bits = sum(r["effective_bits_avg"] for r in rows) / len(rows)
        lines.append([*cells, f"{mib(min(budgets))} to {mib(max(budgets))}", f"{bits:.2f}"])
    return markdown([*head, "pool MiB", "bits, mean"], lines) if lines else ""


def forced(result: Result) -> str:
    """The rows along gold chains."""
    lines = []
    for name, rows in _rows(result, "forced").items():
        kl = sum(r["kl_mean"] * r["steps"] for r in rows) / sum(r["steps"] for r in rows)
        # Chains are the independent units; the seeds' errors add in squares.
        total = sum(r["chains"] for r in rows)
        errors = [math.nan if r["kl_mean_standard_error"] is None else r["kl_mean_standard_error"] for r in rows]
        error = math.hypot(*(e * r["chains"] / total for e, r in zip(errors, rows, strict=True)))
        lines.append([*_right(name, rows, "chains_right"), f"{kl:.2e} ± {error:.1e}"])
    head = ["forced", "seeds x chains", "whole chains right", "95 %", "KL ± s.e., nats per step"]
    return markdown(head, lines) if lines else ""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lines", default="64-128", help="program lines, low-high")
    parser.add_argument("--kl-samples", type=int, default=16)
    numbers(parser, problems=(200, "per row and seed"), samples=(64, "of the calibration"))
    numbers(parser, concurrency=(32, "requests at a time"), chunk=(512, "--chunked-prefill-size of every server"))


OUT = str(RESULTS / "calibration.json")
FREE = ("parts", "problems", "seeds", "lines", "samples", "kl_samples")
EXPERIMENT = Experiment("calibration", __doc__, plan, rows_table, arguments, out=OUT, free=FREE)
main = EXPERIMENT.main
