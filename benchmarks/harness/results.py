"""Result files: one format for all experiments, its writer, and its rows as tables.

A file is a JSON object: ``benchmark`` (as ``pmkvq bench`` takes it), ``config`` (all that decides the figures),
``versions``, perhaps ``title`` and ``note`` for the page, and ``rows``. A row has a ``key`` that no other row has, the
``command`` and ``commit`` that made it, and its values, or ``missing``: why there are none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.harness.methods import label

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Key = dict[str, Any]
Row = dict[str, Any]
Result = dict[str, Any]


def write(result: Result, path: Path | None) -> None:
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
    """Of everything that decides a figure."""
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


@contextmanager
def locked(*what: object, wait: bool) -> Iterator[bool]:
    """Hold this machine's lock of that name, or, where another run holds it and ``wait`` is false, yield False."""
    name = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"pmkvq-bench-{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


class Results:
    """The result file of one run: settings first, then each row as soon as it is measured.

    A second run with the same settings goes on with the rows that the file lacks; started beside the first, it takes
    the rows that the first is not at.

    Attributes:
        head: all of the file but its rows.
        command, commit: of this run; the commit is the one that was checked out when it began.
        rows: measured rows, those of earlier runs included.
    """

    def __init__(
        self,
        path: Path | None,
        benchmark: str,
        config: dict[str, Any],
        argv: Sequence[str] | None,
        page: Mapping[str, str] | None = None,
    ) -> None:
        """Open ``path`` (None: nothing is written); ``save`` writes what is known before the first row.

        Args:
            benchmark: its name, as ``pmkvq bench`` takes it.
            config: everything that decides the figures, the seed included; JSON values.
            argv: arguments of the command, or None for the process's own.
            page: ``title`` and ``note`` of a new file.

        Raises:
            ValueError: the file holds something else, or rows of other settings.
        """
        self.path = path
        self.head: Result = {"benchmark": benchmark, **(page or {}), "config": json.loads(json.dumps(config))}
        self.head["versions"] = versions()
        self.command = " ".join(["pmkvq bench", benchmark, *(sys.argv[1:] if argv is None else argv)])
        self.commit = commit()
        self.rows: list[Row] = []
        self._known: set[str] = set()
        if path is not None and path.exists():
            self._resume(path)

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
        self.head = {k: v for k, v in earlier.items() if k != "rows"}
        self._take(rows)

    def _take(self, rows: Iterable[Row]) -> None:
        """Add the rows of the file that this run has not seen yet."""
        for row in rows:
            if (key := json.dumps(row["key"], sort_keys=True)) not in self._known:
                self._known.add(key)
                self.rows.append(row)

    def _read(self) -> None:
        if self.path is not None and self.path.exists():
            self._take(json.loads(self.path.read_text())["rows"])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Change the rows, those of runs beside this one included, and write the file."""
        with self._lock(wait=True):
            self._read()
            yield
            write({**self.head, "rows": self.rows}, self.path)

    def _lock(self, *what: object, wait: bool) -> AbstractContextManager[bool]:
        return nullcontext(True) if self.path is None else locked(self.path.resolve(), *what, wait=wait)

    def save(self) -> None:
        """Write what is known."""
        with self._writing():
            pass

    def has(self, key: Key) -> bool:
        return any(row["key"] == key for row in self.rows)

    @contextmanager
    def claim(self, keys: Sequence[Key]) -> Iterator[list[Key]]:
        """Those of ``keys`` that are to be measured now: the file lacks them, and no run beside this one is at them."""
        with self._lock(keys, wait=False) as mine:
            self._read()
            yield [key for key in keys if not self.has(key)] if mine else []

    def add(self, key: Key, **values: Any) -> Row:
        """Append a row and write the file. Command and commit are noted: a resumed run's may be others."""
        row = {"key": key, **values, "command": self.command, "commit": self.commit}
        with self._writing():
            # A row that the caller has dropped may be measured again.
            self.rows.append(row)
            self._known.add(json.dumps(key, sort_keys=True))
        return row

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Forget the rows of an earlier run that are not wanted: they are measured again."""
        with self._writing():
            self.rows[:] = [row for row in self.rows if wanted(row)]

    def order(self, keys: Iterable[Key]) -> None:
        """Sort the rows as planned, whatever order they were measured in; rows outside the plan come last."""
        place = {json.dumps(key, sort_keys=True): i for i, key in enumerate(keys)}
        with self._writing():
            self.rows.sort(key=lambda row: place.get(json.dumps(row["key"], sort_keys=True), len(place)))


# -- tables --------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


class Cells(string.Formatter):
    """``str.format`` for tables, with formats that end in ``%`` (a share in percent), ``M`` (bytes in MiB) and ``m`` (a
    method's label). What a row lacks is a dash."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        try:
            return super().get_field(field_name, args, kwargs)
        except (KeyError, TypeError):
            return None, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        form, unit = format_spec[:-1], format_spec[-1:]
        if value is None:
            return "-"
        if unit == "%":
            return f"{100 * value:{form}f} %"
        if unit == "M":
            return f"{value / 2**20:{form or '.1f'}}"
        return label(value) if unit == "m" else format(value, format_spec)


def table(rows: Iterable[Row], head: str, form: str, names: int = 1) -> str:
    """Rows as a Markdown table.

    Args:
        head: headings between bars.
        form: the cells of a row, as ``Cells`` takes them; a row's key counts as part of it.
        names: leading columns that name a row; the one behind them says why a missing row has no values.
    """
    heads, forms = ([part.strip() for part in text.split("|")] for text in (head, form))
    lines = []
    for row in rows:
        reason = [f"missing: {row['missing']}"] if "missing" in row else []
        cells = [Cells().vformat(f, (), {**row.get("key", {}), **row}) for f in (forms[:names] if reason else forms)]
        lines.append([*cells, *reason, *[""] * (len(heads) - len(cells) - len(reason))])
    return markdown(heads, lines)


def mib(size: float) -> str:
    """Bytes in MiB, one digit."""
    return f"{size / 2**20:.1f}"


def measured(result: Result) -> list[Row]:
    """Rows that have values."""
    return [row for row in result["rows"] if "missing" not in row]


def unmeasured(result: Result) -> list[Row]:
    """Rows that have none."""
    return [row for row in result["rows"] if "missing" in row]
