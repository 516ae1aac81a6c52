"""Tables of every result file, as one Markdown page.

    python -m benchmarks.summary > docs/results.md

A test compares the page with what this prints, so no figure of it can be older than its result file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration_rows import table as calibration_table
from benchmarks.pressure import table as pressure_table
from benchmarks.result import markdown
from benchmarks.soak import slope
from benchmarks.transform_rows import table as transforms_table

RESULTS = Path(__file__).resolve().parent / "results"

INTRO = """# Results

Made by `python -m benchmarks.summary > docs/results.md` from the files in `benchmarks/results/`; each section
names the command that made its file. Everything here ran on the CPU with the bundled reasoning model
(3.3 M parameters, see [its page](../benchmarks/reasoner/README.md)): it shows what the cache does to answers and
to memory, not how fast a GPU serves.
"""


def _pressure(result: dict[str, Any]) -> str:
    return pressure_table(result["rows"])


def _reasoner(result: dict[str, Any]) -> str:
    return markdown(
        ["program lines", "tokens of the chain", "bits", "problems", "right answers", "whole chains right"],
        [
            (
                r["lines"],
                f"{r['chain_tokens']['min']} to {r['chain_tokens']['max']}",
                r["bits"],
                r["problems"],
                f"{100 * r['accuracy']:.1f} %",
                f"{100 * r['chain_accuracy']:.1f} %",
            )
            for r in result["rows"]
        ],
    )


def _equality(result: dict[str, Any]) -> str:
    return markdown(
        ["radix tree, requests at a time", "answers", "tokens", "shrinks", "ours ≠ stock", "stock ≠ stock"],
        [
            (
                "off, 1" if p["alone"] else "on, 8",
                p["answers"],
                f"{p['tokens']:,}",
                p["shrinks"],
                p["ours_against_stock"],
                "-" if p["alone"] else p["stock_against_stock"],
            )
            for p in result["parts"]
        ],
    )


def _tpot(result: dict[str, Any]) -> str:
    return markdown(
        ["batch", "ours ms", "stock ms", "ratio (median)", "lowest to highest", "shrinks"],
        [
            (
                r["batch"],
                f"{r['ours_ms']:.2f}",
                f"{r['stock_ms']:.2f}",
                f"{r['ratio']:.3f}",
                f"{min(r['ratios']):.3f} to {max(r['ratios']):.3f}",
                r["shrinks"],
            )
            for r in result["rows"]
        ],
    )


def _ledger(result: dict[str, Any]) -> str:
    note = (
        f"{result['cpu']}; an empty Python loop costs {result['empty_loop_ns']} ns per turn; load average "
        f"{result['load_average_at_end']:.1f} at the end.\n\n"
    )
    return note + markdown(
        ["groups", "logical tokens", "shrinks per step", "µs p20", "µs p50", "µs p80", "CPU µs p50"],
        [
            (
                r["groups"],
                f"{r['logical_tokens']:,}",
                r["shrinks_per_step_mean"],
                *(r["append_drain_us"][q] for q in ("p20", "p50", "p80")),
                r["append_drain_cpu_us"]["p50"],
            )
            for r in result["rows"]
        ],
    )


def _steady(result: dict[str, Any]) -> str:
    return markdown(
        [
            "`--pmkvq-min-active-bits`",
            "tokens filled",
            "fresh request: lowest bits",
            "mean bits",
            "hit rate of old prompts",
        ],
        [
            (
                r["min_active_bits"],
                f"{r['filled_tokens']:,} into {r['logical_tokens']:,}",
                r["fresh_lowest_bits"],
                r["fresh_mean_bits"],
                f"{100 * r['hit_rate']:.1f} %",
            )
            for r in result["rows"]
        ],
    )


def _capacity(result: dict[str, Any]) -> str:
    tokens = [r for r in result["rows"] if r["part"] == "logical tokens"]
    (memory,) = [r for r in result["rows"] if r["part"] == "resident memory"]
    mib = 1 << 20
    return (
        markdown(
            ["final bits", "pool", "logical tokens", "stock's in the same bytes", "ratio", "of 16 / (b + 32/G)"],
            [
                (
                    r["final"],
                    r["pool"],
                    f"{r['logical_tokens']:,}",
                    f"{r['stock_tokens']:,}",
                    f"{r['ratio']:.2f}",
                    f"{r['of_the_bound']:.3f}",
                )
                for r in tokens
            ],
        )
        + f"\n\nResident memory: {memory['tokens_through']:,} tokens through a pool of "
        f"{memory['budget'] / mib:.0f} MiB, {100 * memory['used_share_at_end']:.0f} % of its bytes in use at the end. "
        "The scheduler's peak is "
        f"{memory['growth'] / mib:.0f} MiB above the same process with an empty pool; what ran at once would take "
        f"{memory['running_set_at_16_bits'] / mib:.0f} MiB at 16 bits."
    )


def _fresh_clone(result: dict[str, Any]) -> str:
    lines = []
    if serve := result.get("serve"):
        right = "right" if serve["right"] else "WRONG"
        lines.append(("`make serve`", f"ready after {serve['ready_s']:.0f} s", f"first problem answered, {right}"))
    if test := result.get("test"):
        counts = ", ".join(f"{test[k]:,} {k}" for k in ("passed", "failed", "error", "skipped") if k in test)
        lines.append(("`make test`", f"{test['test_s'] / 60:.1f} minutes", counts))
    return markdown(["command", f"on {result['cores']} cores", "result"], lines)


def _oracle(result: dict[str, Any]) -> str:
    return markdown(
        [
            "case",
            "chains",
            "positions",
            "mean bits at the end",
            "mean difference",
            "99 %",
            "largest",
            "control: mean",
            "99 %",
            "largest",
        ],
        [
            (
                c["case"],
                c["chains"],
                f"{c['positions']:,}",
                f"{c['mean_bits_at_end']:.2f}",
                f"{c['mean_difference']:.1e}",
                f"{c['p99_difference']:.1e}",
                f"{c['max_difference']:.1e}",
                *(f"{c[k]:.1e}" if k in c else "-" for k in ("control_mean", "control_p99", "control_max")),
            )
            for c in result["cases"]
        ],
    )


def _transforms(result: dict[str, Any]) -> str:
    return transforms_table(result) + "\n"


def _compiled(result: dict[str, Any]) -> str:
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, row in result["kernels"].items():
        kernel, arch = name.split("-")[:2]
        rows.setdefault((kernel, arch), []).append(row)

    def span(values: list[int]) -> str:
        return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"

    return markdown(
        ["kernel", "for", "configurations", "registers", "spilled instructions", "shared memory, KiB", "tensor-core"],
        [
            (
                kernel,
                arch,
                len(group),
                span([r["registers"] for r in group]),
                span([r["spills"] for r in group]),
                span([-(-r["shared"] // 1024) for r in group]),
                span([r["mma"] for r in group]),
            )
            for (kernel, arch), group in sorted(rows.items())
        ],
    )


HEADLINE = ("stock, all in memory", "stock, 35 %", "final 4, 35 %", "final 4, 15 %")


def headline() -> str:
    """The README's table: four rows of the pressure suite."""
    result = json.loads((RESULTS / "pressure.json").read_text())
    by_name = {r["row"]["name"]: r for r in result["rows"]}
    return markdown(
        ["32 problems at once", "pool MiB", "right", "tokens/s", "running at once", "effective bits, mean"],
        [
            (
                name,
                f"{r['pool_bytes'] / 2**20:.0f}",
                f"{r['right']}/{r['problems']}",
                f"{r['output_tokens'] / r['wall_s']:.0f}",
                r["peak_running"],
                f"{r['pool']['effective_bits_avg']:.1f}" if "pool" in r else "16",
            )
            for name in HEADLINE
            for r in [by_name[name]]
        ],
    )


def _horizon(result: dict[str, Any]) -> str:
    rows = [
        ("events, forwards", f"{result['events']:,}, {result['ticks']:,}"),
        ("pages born, shrinks, moves", f"{result['born']:,}, {result['shrinks']:,}, {result['moves']:,}"),
        ("fragmentation, share of the arena: mean, highest, at the end", _percents(result)),
        ("superblocks moved per born page", f"{result['moved_per_born']:.3f}"),
        ("CPU µs per event: first tenth, last tenth", f"{result['us_first_tenth']:.1f}, {result['us_last_tenth']:.1f}"),
        ("resident MiB: after 2 %, at the end", f"{result['blocks'][1]['rss_mib']}, {result['blocks'][-1]['rss_mib']}"),
    ]
    return markdown(["what", "figure"], rows) + "\n\n![over events](../benchmarks/results/horizon.png)"


def _percents(result: dict[str, Any]) -> str:
    return ", ".join(f"{100 * result[f'fragmentation_{key}']:.2f} %" for key in ("mean", "max", "end"))


def _soak(result: dict[str, Any]) -> str:
    resident = [r["rss_mib"] for r in result["rounds"]]
    at = [f"{resident[round(q * (len(resident) - 1))]:,.0f}" for q in (0, 0.25, 0.5, 0.75, 1)]
    slopes = [slope(result["rounds"], share) for share in (0.5, 0.25)]
    ours = bool(result["shrinks"])
    rows = [
        ("minutes, clients, idle checks", f"{result['minutes']:g}, {result['clients']}, {result['idle_checks']}"),
        ("requests asked", sum(result["asked"].values())),
        ("finished whole", sum(result["finished"].values())),
        ("cut off by the client or a timeout", sum(result["cut_off"].values())),
        ("lost, or checks that failed", len(result["lost"])),
        ("times that requests were retracted", result["retraction_events"]),
        # A figure of our pool's own.
        ("most retractions since a request ended", result["peak_retractions_since_finish"] if ours else "-"),
        ("pauses, flushes while busy, weights loaded again", _counts(result)),
        ("answers with nothing shrunk, right", f"{result['answers_at_16_bits']}, {result['right_at_16_bits']}"),
        ("answers over shrunk pages, right", f"{result['answers_below']}, {result['right_below']}"),
        ("asked again from stock, different", f"{result['asked_again_from_stock']}, {result['different_from_stock']}"),
        ("resident memory: first, after each quarter of the idle moments, MiB", ", ".join(at)),
        ("its slope over the last half and quarter, MiB per hour", _slopes(slopes)),
    ]
    return markdown(["what", "count"], rows)


def _slopes(slopes: Sequence[float | None]) -> str:
    return ", ".join("-" if s is None else f"{s:+.0f}" for s in slopes)


def _counts(result: dict[str, Any]) -> str:
    return f"{result['pauses']}, {result['flushes_while_busy']}, {result['weight_reloads']}"


SECTIONS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    (
        "pressure",
        "Less memory than 16 bits need",
        "32 problems at once, in pools of a share of the bytes that they need at 16 bits when their chains end; stock "
        "SGLang (`torch_native`) with the same bytes beside each.",
        _pressure,
    ),
    (
        "accuracy",
        "Accuracy",
        "Greedy, 32 requests at a time, in pools of a share of the bytes that those need at 16 bits. The machine had "
        "other work: wall times of these rows compare nothing.",
        _pressure,
    ),
    (
        "static",
        "Accuracy of the static baseline",
        "Final width as soon as a page leaves the window; sinks and windows stay at 16 bits (hard protection), "
        "or the whole cache goes to its final width (no window, no sinks). The machine had other work: wall times "
        "compare nothing.",
        _pressure,
    ),
    (
        "reasoner",
        "The bundled model alone",
        "In plain PyTorch, without a server: greedy decoding over a cache that is rounded as it is written, all of it "
        "at one width; and at 16 bits programs longer than those it was trained on (130 lines).",
        _reasoner,
    ),
    (
        "equality",
        "Equal to stock while nothing shrinks",
        "Greedy token ids with a pool that holds everything. With several requests at a time batch shapes differ from "
        "run to run, so stock is compared with itself too.",
        _equality,
    ),
    (
        "oracle",
        "Low-bit pages read as the reference says",
        "Log-probabilities of every output token, server against the transformers model over a cache that "
        "`kernels/reference` fake-quantized by the same schedule. The control is that oracle against itself with "
        "activations rounded to bf16: what the server's arithmetic alone explains. Two samples of one "
        "noise: the server's mean and 99 % exceed the control's by at most half, its largest by at most 3.2 times.",
        _oracle,
    ),
    (
        "tpot",
        "Time per output token while nothing shrinks",
        "Both servers up, measured in alternation; 256 tokens in, 128 out.",
        _tpot,
    ),
    (
        "capacity",
        "Tokens and memory",
        "The bundled model on a real server with the default limits; then a wide random-weight model (32 KiB of KV per "
        "token) driven full.",
        _capacity,
    ),
    (
        "fresh_clone",
        "The README's two commands in a fresh clone",
        "Empty package caches unless the command says otherwise.",
        _fresh_clone,
    ),
    (
        "steady",
        "A fresh request on a warm server",
        "After finished requests of 3 × the logical tokens, one request of 2,000 tokens; then the old prompts again.",
        _steady,
    ),
    (
        "ledger",
        "Host time of the ledger per decode step",
        "256 requests, 16 pages born and freed per step, so every step shrinks; `append` + `drain`. The goal is 200 µs "
        "with two groups and 16 shrinks per step; three and four times as many shrinks are shown too, and take longer.",
        _ledger,
    ),
    (
        "horizon",
        "The ledger over ten million events",
        "Random events over a pool of 4,096 pages, layer groups k8v8 and k4v2; CPU time includes making the events.",
        _horizon,
    ),
    (
        "soak",
        "Soak",
        "Mixed traffic at four times what the pool holds at 16 bits, with everything that clients and operators do to "
        "a server; what is checked: [reliability](reliability.md).",
        _soak,
    ),
    (
        "soak_stock",
        "The same traffic on stock SGLang",
        "The control for resident memory, in the same KV bytes.",
        _soak,
    ),
    (
        "calibration",
        "Calibration",
        "*served*: real servers, one pool size for uniform and what is compared with it; seeds pooled, differences "
        "paired by problem, with 95 % bootstrap intervals. *forced*: along gold chains, everything older than the "
        "window at its final widths. What it means, and the ranges of key channels: "
        "[calibration](calibration.md).",
        calibration_table,
    ),
    (
        "transforms",
        "Rotations and clipping",
        "Everything older than the window at its final widths, along gold chains. Ratios are paired by chain, of the "
        "mean KL and (usual) of its geometric mean; brackets are 95 % bootstrap intervals. What the rows are and what "
        "they mean: [calibration](calibration.md).",
        _transforms,
    ),
    (
        "kernels_aot",
        "Triton kernels as compiled",
        "Ahead of time, without a GPU; no speed is claimed. Details: [kernels](kernels.md).",
        _compiled,
    ),
)


def page() -> str:
    """The whole page; a result file that is missing is listed as missing."""
    parts = [INTRO]
    for name, title, text, render in SECTIONS:
        path = RESULTS / f"{name}.json"
        parts.append(f"## {title}\n\n{text}\n")
        if not path.is_file():
            parts.append(f"Missing: {name}.json has not been made yet.\n")
            continue
        result = json.loads(path.read_text())
        versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
        parts.append(f"`{result['command']}`" + (f" ({versions})" if versions else "") + "\n")
        parts.append(render(result) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
