"""The GPU suite: SGLang with ``--kv-quant pmkvq`` against the same SGLang on one GPU, in parts of at most 9 minutes.

    python -m benchmarks.gpu --out OUT                 all parts that OUT lacks, most important first
    python -m benchmarks.gpu --out OUT --parts 3       one part: the next cells that fit its time
    python -m benchmarks.gpu --out OUT --dry-run       every part on the CPU, tiny shapes, nothing worth timing

1 kernels      `python -m benchmarks.kernels`: kernels against FlashInfer and SGLang's Triton kernels
2 smoke        `tests/test_gpu_smoke.py`: graphs on and off, against stock, a pool far too small, SGLang's strict checks
3 throughput   stock and ours in the same KV bytes under SGLang's own client, dummy weights of real shapes
4 unsaturated  time per output token while nothing shrinks
5 profile      where the time of a decode step goes

A part ends at ``--limit-s``, wherever it is; rows that are measured are in OUT/PART.json. The same command goes on with
what is missing. Exits with 0 if all is there, 1 if something failed, 4 if time was up and there is more to do.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.gpu import step_profile, throughput, unsaturated
from benchmarks.gpu.cells import MARGIN_S, Cell, CheckFailed, Clock, Context, TimeUp, facts, open_results, run_cells
from benchmarks.harness.results import ROOT, Row
from benchmarks.kernels import PARTS as KERNEL_PARTS

LIMIT_S = 540.0
# Two servers each, so that a run that ends early has something to keep.
SMOKE = (
    "answers_against_stock[flashinfer]",
    "graphs_change_no_token",
    "forced[age-4]",
    "forced[static-8-k4v2]",
    "answers_against_stock[triton]",
)


def run_module(context: Context, name: str, arguments: Sequence[str], values: Row) -> None:
    """A Python module as a process of its own; its lines that begin with FAILED say what is wrong."""
    log = context.out / "logs" / f"{name}.log"
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if context.dry else {})}
    with log.open("w") as out:
        command = [sys.executable, "-m", *arguments]
        # A suite that was started by nohup ignores SIGINT, and its child would too.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=heed, **pipes)
        try:
            status = process.wait()
        except TimeUp:
            process.send_signal(signal.SIGINT)  # it may have servers to end
            with suppress(subprocess.TimeoutExpired):
                process.wait(MARGIN_S / 2)
            process.kill()
            process.wait()
            raise
    if status:
        lines = log.read_text().splitlines()
        raise CheckFailed("; ".join(line for line in lines if line.startswith("FAILED")) or "\n".join(lines[-5:]))


def kernel_cells(context: Context) -> Iterator[Cell]:
    """One table each; it writes rows as it goes and goes on with those that it lacks."""
    for part in KERNEL_PARTS:
        arguments = ["benchmarks.kernels", "--only", part]
        arguments += ["--dry-run"] if context.dry else ["--out", str(context.out / f"kernels_{part}.json")]
        yield Cell({"table": part}, partial(run_module, context, f"kernels-{part}", arguments), needs_s=20.0)


def smoke_cells(context: Context) -> Iterator[Cell]:
    for name in SMOKE:
        arguments = ["pytest", "-rA", "-m", "", f"tests/test_gpu_smoke.py::test_{name}"]
        yield Cell({"test": name}, partial(run_module, context, f"smoke-{name}", arguments))


@dataclass(frozen=True)
class Part:
    """A part of the suite: its cells in the order of importance, and its rows as Markdown."""

    name: str
    cells: Callable[[Context], Iterator[Cell]]
    table: Callable[[Sequence[Row]], str] | None = None


PARTS = (
    Part("kernels", kernel_cells),
    Part("smoke", smoke_cells),
    Part("throughput", throughput.cells, throughput.table),
    Part("unsaturated", unsaturated.cells),
    Part("profile", step_profile.cells, step_profile.table),
)


def run_part(part: Part, context: Context) -> tuple[bool, int]:
    """Run a part within its limit; (whether nothing is left to do, rows that failed)."""
    context.clock = Clock(context.options.limit_s - MARGIN_S)
    results = open_results(context, part.name)
    whole = run_cells(context, results, part.cells(context))
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
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny shapes: checks, no figures")
    options = parser.parse_args(argv)
    if options.limit_s <= MARGIN_S:
        parser.error(f"--limit-s {options.limit_s:g}: expected more than the {MARGIN_S:g} s that ending may take")
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("suite: no CUDA GPU on this machine; --dry-run checks every part on the CPU", file=sys.stderr)
        return 2
    options.out = options.out.resolve()
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    # Nothing may be looked up on a network: models and tokenizers are folders.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    context = Context(options.out, options.dry_run, options)
    print(f"suite: {facts()}", flush=True)
    whole, failed = True, 0
    for number in options.parts or range(1, 1 + len(PARTS)):
        print(f"suite: part {number}, {PARTS[number - 1].name}, at most {options.limit_s:.0f} s", flush=True)
        done, wrong = run_part(PARTS[number - 1], context)
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
