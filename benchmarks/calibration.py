"""What calibration gives on the bundled model: uniform, allocation alone, reparameterization alone, both, clipping,
and rotated keys in place of scaled ones.

    python -m benchmarks.calibration --problems 200 --seeds 0 1 2

Parts, each row written as soon as it is measured. A second run goes on where the first stopped; started beside it, it
takes the rows that the first is not at:

* ``forced``: divergence of the decode path from 16 bits and whole chains right, everything older than the window at
  its final widths (``benchmarks/forced.py``).
* ``served``: accuracy of real servers, the same *peak* pool bytes for every row of a target, policy ``age``.
* ``ranges``: key-channel maxima of short, interpolated and long samples; a table and a picture.

Problems and calibration data are apart: evaluation seeds there, training seeds here. Seed s answers problems
s·n .. s·n + n − 1 and calibrates with seed s. With widths 2, 4 and 8 a mean of 2 leaves allocation no choice, so
its rows are measured at 2.5 and compared with uniform 2 in the *same* pool bytes, and with both mixed pairs at 3.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.calibration_rows import FORCED, SERVED, Variant, table
from benchmarks.forced import WINDOW, Chain, Widths, chains, compare
from benchmarks.key_ranges import key_ranges
from benchmarks.oracle import coding_of
from benchmarks.pressure import Row, problem_set, prompt_ids, run_row
from benchmarks.reasoner.evaluate import load
from benchmarks.reasoner.model import Llama
from benchmarks.reasoner.task import Problem
from benchmarks.result import commit, versions, wilson, write
from benchmarks.serving import REASONER, ROOT
from sglang_pmkvq import artifact
from sglang_pmkvq.calib.run import Settings, calibrate
from sglang_pmkvq.serving.config import parse_final_bits

RESULTS = Path(__file__).resolve().parent / "results"
WORK = ROOT / "results" / "tmp" / "calibration"
PARTS = ("forced", "served", "ranges")


@dataclass
class Bench:
    """Options, the result file, and calibrations made so far."""

    options: argparse.Namespace
    result: dict[str, Any]

    def measured(self, key: dict[str, Any]) -> bool:
        self.read()
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.result["rows"])

    def add(self, row: dict[str, Any]) -> None:
        out = self.options.out
        with _locked(str(out.resolve()), wait=True):
            self.read()
            self.result["rows"].append(row | {"commit": commit()})
            write(self.result, out)
        print(json.dumps({k: v for k, v in row.items() if k != "pool"}), flush=True)

    def read(self) -> None:
        """Rows that are in the file, from this run, an earlier one or one beside it."""
        if self.options.out.exists():
            self.result["rows"] = json.loads(self.options.out.read_text())["rows"]

    @contextmanager
    def claim(self, key: dict[str, Any]) -> Iterator[bool]:
        """Whether this run is to measure a row: it is not in the file, and no run beside this one is at it."""
        with _locked(str(self.options.out.resolve()), key, wait=False) as mine:
            yield mine and not self.measured(key)

    def calibration(self, variant: Variant, seed: int) -> artifact.Calibration | None:
        """The calibration of a variant; None where there is nothing to calibrate. Made once, then read."""
        path = self.path(variant, seed)
        if path is None:
            return None
        # One work folder per seed and transform: targets share what was measured.
        work = WORK / f"{seed}-{variant.transform}{'-clip' if variant.clip else ''}"
        with _locked(str(work), wait=True):
            return artifact.load(path) if path.exists() else self.calibrate(variant, seed, path, work)

    def calibrate(self, variant: Variant, seed: int, path: Path, work: Path) -> artifact.Calibration:
        o = self.options
        settings = Settings(
            model=str(REASONER),
            data="builtin",
            target=variant.target or variant.final,
            widths=(2, 4, 8) if variant.target else (int(variant.final),),
            samples=o.samples,
            kl_samples=o.kl_samples,
            transform=variant.transform,
            clip=variant.clip,
            sensitivity=variant.sensitivity,
            seed=seed,
        )
        return calibrate(settings, path, work)

    def path(self, variant: Variant, seed: int) -> Path | None:
        if not variant.target and variant.transform == "none":
            return None
        o = self.options
        name = f"{variant.target or variant.final}-{variant.transform}-{variant.sensitivity}"
        name += "-clip" if variant.clip else ""
        return WORK / f"{name}-seed{seed}-{o.samples}-{o.kl_samples}.pmkvq.safetensors"

    def forced(self, seed: int) -> None:
        o = self.options
        keys = [self.key("forced", v, seed) for v in FORCED]
        if all(map(self.measured, keys)):
            return
        from transformers import AutoTokenizer

        model, tokenizer = load(REASONER), AutoTokenizer.from_pretrained(REASONER)
        given = chains(model, tokenizer, problem_set(o.problems, *o.lines, first=seed * o.problems))
        for variant, key in zip(FORCED, keys, strict=True):
            with self.claim(key) as mine:
                if mine:
                    self.add({**key, **self.force(variant, seed, model, given)})

    def force(self, variant: Variant, seed: int, model: Llama, given: Sequence[Chain]) -> dict[str, Any]:
        """One forced row."""
        c = self.calibration(variant, seed)
        layers = model.config.num_hidden_layers
        if c is None:
            widths = Widths(tuple(parse_final_bits(variant.final, layers)))
        else:
            widths = Widths(c.finals, c.group_size, coding_of(c))
        got = compare(model, given, widths)
        mean = sum(map(sum, widths.finals)) / (2 * layers)
        interval = wilson(got["chains_right"], len(given))
        return {**_plan(widths.finals), "mean_bits": mean, **got, "confidence95": interval}

    def served(self, seed: int) -> None:
        o = self.options
        problems = problem_set(o.problems, *o.lines, first=seed * o.problems)
        ids, _ = prompt_ids(REASONER, problems)
        for share, variants in SERVED:
            for variant in variants:
                key = self.key("served", variant, seed)
                with self.claim(key) as mine:
                    if mine:
                        self.add({**key, **self.serve(variant, seed, share, problems, ids)})

    def serve(
        self, variant: Variant, seed: int, share: float | None, problems: Sequence[Problem], ids: Sequence[list[int]]
    ) -> dict[str, Any]:
        """One served row, in ``share`` of the 16-bit bytes of what runs at once; None: in all of them."""
        o = self.options
        c, path = self.calibration(variant, seed), self.path(variant, seed)
        if path is None:
            row = Row(variant.name, share, True, ("--pmkvq-final-bits", variant.final))
        else:
            row = Row(variant.name, share, True, ("--pmkvq-calibration", str(path)))
        got = run_row(row, REASONER, problems, ids, o.concurrency, o.chunk)
        got = {k: v for k, v in got.items() if k not in ("row", "problems", "output_ids")}
        return {"share": share, **(_plan(c.finals) if c else {"final": variant.final}), **got}

    def key(self, part: str, variant: Variant, seed: int) -> dict[str, Any]:
        o = self.options
        key = {"part": part, "row": variant.name, "seed": seed, "problems": o.problems, "lines": list(o.lines)}
        if self.path(variant, seed) is not None:
            key |= {"samples": o.samples, "kl_samples": o.kl_samples}
        return key

    def ranges(self) -> None:
        key = {"part": "ranges", "samples": self.options.samples}
        with self.claim(key) as mine:
            if mine:
                self.add({**key, **key_ranges(REASONER, self.options.samples, self.options.out.with_suffix(".png"))})


@contextmanager
def _locked(*what: object, wait: bool) -> Iterator[bool]:
    """Hold the lock of that name, or, where another run holds it and ``wait`` is false, say so."""
    WORK.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    with open(WORK / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def _plan(finals: Sequence[tuple[int, int]]) -> dict[str, str]:
    return {"final": " ".join(f"k{k}v{v}" for k, v in finals)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--problems", type=int, default=200, help="per row and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lines", default="64-128", help="program lines, low-high")
    parser.add_argument("--samples", type=int, default=64, help="of the calibration")
    parser.add_argument("--kl-samples", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration.json")
    options = parser.parse_args(argv)
    low, _, high = options.lines.partition("-")
    options.lines = (int(low), int(high or low))
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.calibration", *(sys.argv[1:] if argv is None else argv)]),
        "versions": versions(),
        "window": WINDOW,
        "rows": [],
    }
    bench = Bench(options, result)
    if "ranges" in options.parts:
        bench.ranges()
    for part in ("forced", "served"):
        for seed in options.seeds if part in options.parts else ():
            getattr(bench, part)(seed)
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
