"""Result files: what ran, with which versions and settings, and its rows as they are measured."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Key = dict[str, Any]
Row = dict[str, Any]


def write(result: dict[str, Any], path: Path | None) -> None:
    """``result`` as JSON; the file appears whole or not at all, so that a run killed while writing can be resumed.

    None writes nothing.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


def versions() -> dict[str, str]:
    """Of everything that decides a figure; ``commit`` ends in ``+`` where tracked files differ from it."""
    import sglang
    import torch

    return {
        "python": platform.python_version(),
        "sglang": sglang.__version__,
        "torch": torch.__version__,
        "commit": commit(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def commit() -> str:
    """The commit that is checked out, with a ``+`` where tracked files other than results and docs differ from it.

    Without a checkout, what the environment variable PMKVQ_COMMIT says (a kit for GPU machines sets it).
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("PMKVQ_COMMIT", "")

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson score); (0, 1) for no trials."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


class Results:
    """The result file of one benchmark run: settings first, then each row as soon as it is measured.

    A second run with the same settings goes on with the rows that the file lacks.

    Attributes:
        command, commit: of this run; the commit is the one that was checked out when it began.
        rows: measured rows; each holds its ``key``, and either values or ``missing``: why there are none.
    """

    def __init__(self, path: Path | None, benchmark: str, config: dict[str, Any], argv: Sequence[str] | None) -> None:
        """Open ``path`` (None: nothing is written) and write what is known before the first row.

        Args:
            benchmark: its name, as ``pmkvq bench`` takes it.
            config: everything that decides the figures, the seed included; JSON values.
            argv: arguments of the command, or None for the process's own.

        Raises:
            ValueError: the file holds something else, or rows of other settings.
        """
        self.path = path
        self.head: dict[str, Any] = {
            "benchmark": benchmark,
            "config": json.loads(json.dumps(config)),
            "versions": versions(),
        }
        self.command = " ".join(["pmkvq bench", benchmark, *(sys.argv[1:] if argv is None else argv)])
        self.commit = commit()
        self.rows: list[Row] = []
        if path is not None and path.exists():
            self._resume(path)
        self._save()

    def _resume(self, path: Path) -> None:
        try:
            earlier = json.loads(path.read_text())
            kind, config, rows = earlier["benchmark"], earlier["config"], earlier["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--out {path} is not a result file ({error!r}); give another") from error
        mine = self.head["config"]
        other = sorted(k for k in {*config, *mine} if config.get(k) != mine.get(k))
        if kind != self.head["benchmark"] or other:
            what = f"the benchmark {kind}" if kind != self.head["benchmark"] else f"other {', '.join(other)}"
            raise ValueError(f"--out {path} holds rows of {what}; give another --out, or remove it")
        self.head, self.rows = {k: v for k, v in earlier.items() if k != "rows"}, rows

    def has(self, key: Key) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, key: Key, **values: Any) -> Row:
        """Append a row and write the file. Command and commit are noted: a resumed run's may be others."""
        row = {"key": key, **values, "command": self.command, "commit": self.commit}
        self.rows.append(row)
        self._save()
        return row

    def missing(self, key: Key, reason: str) -> Row:
        """Say why a row has no values."""
        return self.add(key, missing=reason)

    def order(self, keys: Iterable[Key]) -> None:
        """Sort the rows as planned, whatever order they were measured in; rows outside the plan come last."""
        place = {json.dumps(key, sort_keys=True): i for i, key in enumerate(keys)}
        self.rows.sort(key=lambda row: place.get(json.dumps(row["key"], sort_keys=True), len(place)))
        self._save()

    def _save(self) -> None:
        write({**self.head, "rows": self.rows}, self.path)
