"""The kernels: their speed on this machine's GPU, or what the compiler makes of them without one; and on the CPU.

    python -m benchmarks.kernels                   the whole table -> benchmarks/results/kernels_<GPU>.json
    python -m benchmarks.kernels --only decode     one part: decode, extend, shrink, store, plan
    python -m benchmarks.kernels --dry-run         no GPU: tiny shapes in Triton's interpreter, SGLang's kernels too
    python -m benchmarks.kernels --cpu             what centred keys cost the CPU -> results/kernels_cpu.json
    python -m benchmarks.kernels --aot             compiled for GPUs that are not there -> results/kernels_aot.json
    python -m benchmarks.kernels --aot --only X    the configurations whose name contains X, others kept
    python -m benchmarks.kernels --aot --sample    those that the normal test suite compiles, others kept

The table compares with FlashInfer and SGLang's Triton kernels on bf16. Every cell is checked against fp32 before it is
timed; a cell that fails prints no time. A cell that does not fit the memory, and a baseline that cannot run, are rows
of the table with the reason. A run goes on with the cells of decode and extend that its file lacks. Exits with 1 if any
check failed or a baseline is missing, with 2 if there is no GPU.

Timed by replays of a CUDA graph that rotates through layers, so that the data is several times the L2; the time of a
row is the median of the replays, per layer. GB/s counts the bytes that must be read (and written), 1 GB = 1e9 bytes;
the share is of a large device-to-device copy measured in the same run. A plan is timed as SGLang has it, from its table
of token slots, and from dense page ids; `host_us` is what one plan costs the host, waiting for nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PARTS = ("decode", "extend", "shrink", "store", "plan")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="one part of the table; with --aot: a part of the names")
    parser.add_argument("--dry-run", action="store_true", help="check tiny shapes in the interpreter, time nothing")
    parser.add_argument("--repeats", type=int, default=30, help="graph replays per row")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/kernels_<GPU>.json)")
    parser.add_argument("--aot", action="store_true", help="compile ahead of time instead")
    parser.add_argument("--sample", action="store_true", help="with --aot: those that the normal test suite compiles")
    parser.add_argument("--cpu", action="store_true", help="the CPU's attention instead, with and without centres")
    options = parser.parse_args(argv)
    if options.cpu:
        from benchmarks import kernels_cpu

        return kernels_cpu.run(options.out, options.repeats)
    if options.aot:
        from benchmarks import kernels_aot

        return kernels_aot.remake(options.only, options.sample)
    if options.only not in ("", *PARTS):
        parser.error(f"--only {options.only}: expected one of {', '.join(PARTS)}")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by the table below
    from benchmarks import kernel_table

    return kernel_table.run(options, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
