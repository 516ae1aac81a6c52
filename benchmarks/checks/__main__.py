"""Checks of servers against stock SGLang, against a reference, and against time; each takes ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.checks import pool, soak
from benchmarks.harness.experiment import Experiment

ALL: tuple[Experiment, ...] = (*pool.EXPERIMENTS, soak.EXPERIMENT)
EXPERIMENTS = {experiment.name.removeprefix("checks "): experiment for experiment in ALL}


def main(argv: Sequence[str] | None = None) -> int:
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in EXPERIMENTS:
        return EXPERIMENTS[name].main(rest)
    asked = name in ("-h", "--help")
    lines = (f"  pmkvq bench checks {name:<12} {e.about.splitlines()[0]}" for name, e in EXPERIMENTS.items())
    print(f"{__doc__}\n", *lines, sep="\n", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    raise SystemExit(main())
