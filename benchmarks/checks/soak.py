"""Mixed traffic for as long as you like, at four times what the pool holds at 16 bits; nothing may be lost.

    pmkvq bench checks soak --minutes 20 --out benchmarks/results/soak.json

Clients ask, stream, chat, hang up, time out and abort; the server is paused, flushed while busy, and retracts requests
by force. About once a minute all stop, SGLang's and our books are checked, and resident memory is noted. Every request
that nobody cut off must come back whole; a sample of those of whose KV no page had shrunk is asked again from stock
SGLang, token by token. ``--stock`` sends the same traffic to stock: the control for resident memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness.experiment import Experiment, Job
from benchmarks.harness.results import Result, Results, Row, markdown, measured
from tests.support.soak import run


def plan(options: argparse.Namespace, results: Results) -> list[Job]:
    key = {"minutes": options.minutes, "stock": options.stock, "seed": options.seed}
    return [Job.row(key, lambda: run(options.minutes, options.seed, not options.stock), "soak")]


TABLE = {
    "minutes, clients, idle checks": "{minutes:g}, {clients}, {idle_checks}",
    "requests asked": "{asked}",
    "finished whole": "{finished}",
    "cut off by the client or a timeout": "{cut_off}",
    "lost, or checks that failed": "{lost}",
    "times that requests were retracted": "{retraction_events}",
    "most retractions since a request ended": "{peak_retractions_since_finish}",
    "pauses, flushes while busy, weights loaded again": "{pauses}, {flushes_while_busy}, {weight_reloads}",
    "answers with nothing shrunk, right": "{answers_at_16_bits}, {right_at_16_bits}",
    "answers over shrunk pages, right": "{answers_below}, {right_below}",
    "asked again from stock, different": "{asked_again_from_stock}, {different_from_stock}",
    "resident memory: first, after each quarter of the idle moments, MiB": "{resident}",
    "its slope over the last half and quarter, MiB per hour": "{slopes}",
}


def slope(rounds: Sequence[dict[str, Any]], share: float) -> float | None:
    """MiB of resident memory per hour over the last ``share`` of the idle moments; None for fewer than four."""
    last = rounds[round(len(rounds) * (1 - share)) :]
    if len(last) < 4:
        return None
    return float(np.polyfit([r["t"] / 3600 for r in last], [r["rss_mib"] for r in last], 1)[0])


def rows_table(result: Result) -> str:
    """Each row as a table of its own."""

    def shown(row: Row) -> Row:
        resident = [r["rss_mib"] for r in row["rounds"]]
        at = [f"{resident[round(q * (len(resident) - 1))]:,.0f}" for q in (0, 0.25, 0.5, 0.75, 1)]
        slopes = [slope(row["rounds"], share) for share in (0.5, 0.25)]
        return {
            **row["key"],
            **row,
            **{what: sum(row[what].values()) for what in ("asked", "finished", "cut_off")},
            "lost": len(row["lost"]),
            # A figure of our pool's own.
            "peak_retractions_since_finish": row["peak_retractions_since_finish"] if row["shrinks"] else "-",
            "resident": ", ".join(at),
            "slopes": ", ".join("-" if s is None else f"{s:+.0f}" for s in slopes),
        }

    rows = map(shown, measured(result))
    return "\n\n".join(markdown(["what", "count"], [(k, v.format_map(row)) for k, v in TABLE.items()]) for row in rows)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="the control: stock SGLang in the same bytes")


def failed(result: Result) -> bool:
    return any(row["lost"] for row in measured(result))


FREE = ("minutes", "seed", "stock")
EXPERIMENT = Experiment("checks soak", __doc__, plan, rows_table, arguments, free=FREE, failed=failed)
