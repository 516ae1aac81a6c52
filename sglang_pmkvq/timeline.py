"""The timeline file: what the pool looked like over time, as JSON lines (schema: docs/metrics.md).

The scheduler writes it next to serving, so writing may never stop or slow serving: rows are throttled,
the file is buffered, and after the first write error the writer says so once and goes silent.
No torch and no SGLang here.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from sglang_pmkvq.formats import TIERS

SCHEMA = 2
SCHEMA_KEY = "pmkvq_timeline"
# What files of schema 1 called ``pool_bytes``: of a row, and of the header.
_SCHEMA_1_ROW, _SCHEMA_1_HEADER = "arena_bytes", "storage_bytes"
TIER_KEYS = tuple(map(str, TIERS))

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def _plain(value: Any) -> Any:
    """numpy scalars, which the ledger's counters often are, as Python numbers."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def why_not_writable(path: str | os.PathLike[str]) -> str | None:
    """Why ``TimelineWriter`` could not open ``path``, or None; touches nothing."""
    name = os.fspath(path)
    folder = os.path.dirname(name) or "."
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    if os.path.islink(name):
        return "it is a link, which may lead to a file of someone else"
    if os.path.isdir(name) or not os.path.basename(name):
        return "it is a folder"
    if not os.path.exists(name):
        return None if os.access(folder, os.W_OK | os.X_OK) else f"the folder {folder} cannot be written"
    if os.path.isfile(name) and os.stat(name).st_uid != os.geteuid():
        return "it belongs to another user"
    return None if os.access(name, os.W_OK) else "it cannot be written"


def _open_own(name: str) -> TextIO:
    """Open for writing, empty; never through a link and never over another user's file.

    Raises:
        OSError: it cannot be opened, is a link, or belongs to another user.
    """
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    info = os.fstat(descriptor)
    if stat.S_ISREG(info.st_mode):
        if info.st_uid != os.geteuid():
            os.close(descriptor)
            raise PermissionError(errno.EPERM, "belongs to another user", name)
        os.ftruncate(descriptor, 0)
    return os.fdopen(descriptor, "w", encoding="utf-8")


def rank_path(path: str | None, tp_rank: int, dp_rank: int | None) -> str | None:
    """Where one scheduler of several writes: tensor-parallel ranks decide alike, so the first of each replica does.

    The first replica writes ``path`` itself, the others ``path.dp1`` and so on.
    """
    if path is None or tp_rank:
        return None
    return f"{path}.dp{dp_rank}" if dp_rank else path


class TimelineWriter:
    """Appends rows and events to a JSON-lines file; never raises once it is open.

    Rows closer together than ``1 / max_rows_per_s`` seconds replace one another and the last one is
    kept, so the file's end always shows the final state. Events of one name inside such an interval
    become one line: ``count`` says how many, integer fields are added up, of others the last stays.
    Not thread-safe: one scheduler thread writes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: dict[str, Any],
        flush_every_s: float = 0.0,
        max_rows_per_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open ``path`` for writing (an old file is overwritten) and write the header line.

        Args:
            header: what does not change while serving (model, flags, sizes in bytes).
            flush_every_s: seconds after which buffered lines go to the file, at the next call; by
                default every line at once, as the scheduler may be killed at any moment.
            max_rows_per_s: rows per second at most, and events of one name.
            clock: seconds, monotonic.

        Raises:
            ValueError: a limit is not positive.
            OSError: the file cannot be opened, is a link or another user's; better at start than silently never.
        """
        if not (max_rows_per_s > 0 and flush_every_s >= 0):
            raise ValueError(
                f"expected max_rows_per_s > 0 and flush_every_s >= 0, got {max_rows_per_s} and {flush_every_s}"
            )
        self.path = os.fspath(path)
        self._clock = clock
        self._start = clock()
        self._interval = 1.0 / max_rows_per_s
        self._flush_every = flush_every_s
        self._last_flush = self._start
        self._last_row = -math.inf
        self._pending_row: Row | None = None
        self._pending_events: dict[str, Row] = {}
        self._last_event: dict[str, float] = {}
        self._file: TextIO | None = _open_own(self.path)
        self._write({SCHEMA_KEY: SCHEMA, "unix_time": round(time.time(), 3), **header})
        self.flush()

    @property
    def failed(self) -> bool:
        """True after a write error or ``close``: nothing is written any more."""
        return self._file is None

    def record(self, row: Row) -> None:
        """Keep one state of the pool; ``t`` (seconds since start) is filled in if it is absent."""
        if self._file is None:
            return
        now = self._clock()
        self._pending_row = {"t": round(now - self._start, 4), **row}
        if now - self._last_row >= self._interval:
            self._write_row(now)
        self._maybe_flush(now)

    def event(self, name: str, **fields: Any) -> None:
        """Note that something happened: ``retract``, ``evict``, ``flush`` and the like."""
        if self._file is None:
            return
        now = self._clock()
        pending = self._pending_events.get(name)
        if pending is None:
            pending = {"t": round(now - self._start, 4), "event": name, "count": 0}
            self._pending_events[name] = pending
        pending["count"] += 1
        for key, value in fields.items():
            summed = isinstance(value, int) and not isinstance(value, bool) and key in pending
            pending[key] = pending[key] + value if summed else value
        if now - self._last_event.get(name, -math.inf) >= self._interval:
            self._write_event(name, now)
        self._maybe_flush(now)

    def flush(self) -> None:
        """Write what throttling holds back, and hand it to the operating system; for idle moments."""
        now = self._clock()
        for name in list(self._pending_events):
            self._write_event(name, now)
        if self._pending_row is not None:
            self._write_row(now)
        self._flush_file(now)

    def close(self) -> None:
        """Write the last state and close the file; may be called twice."""
        self.flush()
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _write_row(self, now: float) -> None:
        assert self._pending_row is not None
        row, self._pending_row = self._pending_row, None
        self._last_row = now
        self._write(row)

    def _write_event(self, name: str, now: float) -> None:
        event = self._pending_events.pop(name)
        self._last_event[name] = now
        self._write(event)

    def _maybe_flush(self, now: float) -> None:
        if now - self._last_flush >= self._flush_every:
            self._flush_file(now)

    def _flush_file(self, now: float) -> None:
        self._last_flush = now
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _write(self, line: Row) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line, default=_plain, separators=(",", ":")) + "\n")
        except (OSError, TypeError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.error("pmkvq: the timeline %s cannot be written (%s); serving goes on without it", self.path, error)
        file, self._file = self._file, None
        self._pending_row = None
        self._pending_events.clear()
        if file is not None:
            try:
                file.close()
            except OSError:
                pass  # the buffer it could not write before; already reported


@dataclass(frozen=True)
class Timeline:
    """A timeline read back: the header, states in order of time, events in order of time."""

    header: dict[str, Any]
    rows: list[Row]
    events: list[Row]


def read_timeline(path: str | os.PathLike[str]) -> Timeline:
    """Read a timeline; a last line cut short (the server was killed, or still writes) is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a timeline, is of another schema, has no rows, or a line other than the
            last is damaged.
    """
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    header = _parse(lines[0])
    if header is None or SCHEMA_KEY not in header:
        raise ValueError(f"{os.fspath(path)} is not a timeline written by --pmkvq-timeline")
    schema = header[SCHEMA_KEY]
    if schema not in (1, SCHEMA):
        raise ValueError(f"{os.fspath(path)}: expected timeline schema 1 or {SCHEMA}, got {schema!r}")
    if schema == 1:
        header = _renamed(header, _SCHEMA_1_HEADER)
    rows: list[Row] = []
    events: list[Row] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        entry = _parse(line)
        if entry is not None and schema == 1:
            entry = _renamed(entry, _SCHEMA_1_ROW)
        if entry is not None and _is_event(entry):
            events.append(entry)
        elif entry is not None and _is_row(entry):
            rows.append(entry)
        elif number < len(lines):  # ended by a newline, so it was written whole
            raise ValueError(f"{os.fspath(path)}:{number}: neither a row nor an event: {line[:80]!r}")
    if not rows:
        raise ValueError(f"{os.fspath(path)} has a header but no rows: did the server serve anything?")
    rows.sort(key=lambda row: row["t"])
    events.sort(key=lambda event: event["t"])
    return Timeline(header, rows, events)


def _renamed(entry: Row, name: str) -> Row:
    """An entry of schema 1 as of today's."""
    return {name if key == "pool_bytes" else key: value for key, value in entry.items()}


def _parse(line: bytes) -> Row | None:
    try:
        entry = json.loads(line)
    except ValueError:  # bad JSON or bad UTF-8
        return None
    return entry if isinstance(entry, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_event(entry: Row) -> bool:
    return isinstance(entry.get("event"), str) and _is_number(entry.get("t"))


def _is_row(entry: Row) -> bool:
    tiers = entry.get("bytes")
    return (
        isinstance(tiers, dict)
        and all(_is_number(tiers.get(key)) for key in TIER_KEYS)
        and all(_is_number(entry.get(key)) for key in ("t", "arena_bytes", "used_bytes"))
        and (entry.get("effective_bits") is None or _is_number(entry["effective_bits"]))
    )
