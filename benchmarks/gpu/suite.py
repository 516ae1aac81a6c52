#!/usr/bin/env python3
"""The GPU suite: SGLang with ``--kv-quant pmkvq`` against the same SGLang on one GPU, in parts of at most 9 minutes.

    python -m benchmarks.gpu.suite --out OUT                 all parts that OUT lacks, most important first
    python -m benchmarks.gpu.suite --out OUT --parts 3       one part: the next cells that fit its time
    python -m benchmarks.gpu.suite --out OUT --dry-run       every part on the CPU, tiny shapes, nothing worth timing

1 kernels      `benchmarks/kernels.py`: kernels against FlashInfer and SGLang's Triton kernels
2 smoke        the bundled model: graphs on and off, against stock, a pool far too small, SGLang's strict checks
3 throughput   stock and ours in the same KV bytes under SGLang's own client, dummy weights of real shapes
4 unsaturated  time per output token while nothing shrinks
5 profile      where the time of a decode step goes

A part ends at ``--limit-s``, wherever it is; rows that are measured are in OUT/PART.json. The same command goes on with
what is missing. Exits with 0 if all is there, 1 if something failed, 4 if time was up and there is more to do.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import smoke, step_profile, throughput, unsaturated
from benchmarks.gpu.cells import MARGIN_S, Cell, CheckFailed, Clock, Context, TimeUp, facts, open_results, run_cells
from benchmarks.kernels import PARTS as KERNEL_PARTS
from benchmarks.result import ROOT, Results, Row

LIMIT_S = 540.0


def kernel_cells(context: Context, results: Results) -> Iterator[Cell]:
    """One table of `benchmarks/kernels.py` each; it writes rows as it goes and goes on with those that it lacks."""
    for part in KERNEL_PARTS:

        def run(values: dict[str, Any], part: str = part) -> None:
            file = context.out / f"kernels_{part}.json"
            command = [sys.executable, "benchmarks/kernels.py", "--only", part]
            command += ["--dry-run"] if context.dry else ["--out", str(file), "--resume"]
            log = context.log("kernels", part)
            values |= {"file": file.name if not context.dry else None, "log": log.name}
            with log.open("w") as out:
                process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
                try:
                    status = process.wait()
                except TimeUp:
                    process.kill()
                    process.wait()
                    raise
            lines = log.read_text().splitlines()
            values["lines"] = sum(line.startswith("{") for line in lines)
            if status:
                raise CheckFailed(
                    "; ".join(line for line in lines if line.startswith("FAILED")) or "\n".join(lines[-5:])
                )

        yield Cell({"table": part}, run, needs_s=20.0)


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        cells: in the order of importance.
        config: options that decide its figures; a result file with others is refused.
        table: its rows as Markdown.
    """

    name: str
    cells: Callable[[Context, Results], Iterator[Cell]]
    config: tuple[str, ...] = ()
    table: Callable[[Sequence[Row]], str] | None = None


PARTS = (
    Part("kernels", kernel_cells),
    Part("smoke", smoke.cells),
    Part("throughput", lambda c, _: throughput.cells(c), ("seconds", "seed"), throughput.table),
    Part("unsaturated", lambda c, _: unsaturated.cells(c), ("repeats",)),
    Part("profile", lambda c, _: step_profile.cells(c), (), step_profile.table),
)


def run_part(part: Part, context: Context) -> tuple[bool, int]:
    """Run a part within its limit; (whether nothing is left to do, rows that failed)."""
    context.clock = Clock(context.options.limit_s - MARGIN_S)
    results = open_results(context, part.name, {name: getattr(context.options, name) for name in part.config})
    whole = run_cells(context, results, part.cells(context, results))
    if part.table is not None:
        text = part.table(results.rows)
        (context.out / f"{part.name}.md").write_text(text + "\n")
        print(text, flush=True)
    return whole, sum("failed" in row for row in results.rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, logs and traces")
    parser.add_argument("--parts", type=int, nargs="+", choices=range(1, 1 + len(PARTS)), help="default: all")
    parser.add_argument("--only", help="cells whose names hold this text")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds of a part at most (default: 540)")
    parser.add_argument("--seconds", type=float, default=100.0, help="part 3: of a workload at most (default: 100)")
    parser.add_argument("--rounds", type=int, default=1, help="part 3: times that each server has its turn")
    parser.add_argument("--repeats", type=int, default=5, help="part 4: alternations")
    parser.add_argument("--seed", type=int, default=0, help="part 3: of the client's prompts")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny shapes: checks, no figures")
    options = parser.parse_args(argv)
    if options.limit_s <= MARGIN_S:
        parser.error(
            f"--limit-s {options.limit_s:g}: expected more than the {MARGIN_S:g} s that ending a server may take"
        )
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("suite: no CUDA GPU on this machine; --dry-run checks every part on the CPU", file=sys.stderr)
        return 2
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    # Nothing may be looked up on a network: models and tokenizers are folders.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if options.dry_run:
        options.repeats = 1
    context = Context(options.out, options.dry_run, options)
    print(f"suite: {facts()}", flush=True)
    whole, failed = True, 0
    for number in options.parts or range(1, 1 + len(PARTS)):
        part = PARTS[number - 1]
        print(f"suite: part {number}, {part.name}, at most {options.limit_s:.0f} s", flush=True)
        done, wrong = run_part(part, context)
        whole, failed = whole and done, failed + wrong
    if failed:
        print(f"suite: {failed} cells failed; see the rows with 'failed' in {options.out}", file=sys.stderr)
        return 1
    if not whole:
        print("suite: time was up; the same command goes on", flush=True)
        return 4
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
