"""Result files, timelines and calibration files of a folder as one page with pictures.

    pmkvq report benchmarks/results --out docs/results

Writes ``report.md``, one PNG per picture, and ``report.html``, which holds everything in one file. Experiments whose
result files are not there are listed as missing. A test compares the committed page with what this makes, so no figure
of it can be older than its result file.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tomllib
from matplotlib.figure import Figure

from benchmarks import accuracy, calibration, codings, kernels_cpu, kld, offline, prefix, serve
from benchmarks.checks.__main__ import ALL as CHECKS
from benchmarks.harness.figures import line, log2_axis, new_figure, style
from benchmarks.harness.methods import label
from benchmarks.harness.results import Result, Row, markdown, measured, table
from benchmarks.programs import __main__ as programs
from sglang_pmkvq import artifact
from sglang_pmkvq.calib import show
from sglang_pmkvq.timeline import read_timeline
from sglang_pmkvq.tools import report as timelines
from sglang_pmkvq.tools.cli import BENCHES

# File name without ending, what it shows, figure or a file that is there.
Picture = tuple[str, str, Figure | Path]


@dataclass
class Section:
    """One part of the page.

    Attributes:
        title: heading; none for what stands before the first one.
        text: Markdown paragraphs and tables.
    """

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """How result files of one experiment are shown.

    Attributes:
        more: a further table, from this result and all others of the folder.
        pictures: from the file's name without ending, this result, and all others.
    """

    table: Callable[[Result], str]
    more: Callable[[Result, Sequence[Result]], str] = lambda result, others: ""
    pictures: Callable[[str, Result, Sequence[Result]], list[Picture]] = lambda stem, result, others: []


# A point of a divergence curve says little where fewer positions are behind it.
LEAST_POSITIONS = 100
# How the marker of a series is filled, by what stands behind the comma of its name.
FILLS = {"calibrated": "none", "rotated": "bottom", "plain": "top", "centre": "left"}


def family(method: str) -> str:
    """Methods that differ in width only are one series: ``age-2`` and ``age-4`` are ``age``."""
    policy = method.partition("-")[0]
    if policy == "kivi":
        return "KIVI, offline"
    if ".safetensors" in method:
        return f"{policy}, calibrated"
    if method.endswith(("-hadamard", "/hadamard")):
        return f"{policy}, rotated"
    if "/" in method:
        return f"{policy}, {method.partition('/')[2]}"
    return method if method in ("16bit", "stock", "stock-fp8") else policy


def _points(result: Result, only: str = "") -> list[Row]:
    """Methods whose name begins with ``only``, of the rows with most problems.

    ``right`` is in percent, its 95 % interval reaches ``below`` and ``above`` it; ``peak`` and ``mean`` are bits, those
    of the peak of all bytes and on average.
    """
    most = max((row["key"]["problems"] for row in measured(result)), default=0)
    found = [(key[0], rows) for key, rows in accuracy.groups(result).items() if key[2] == most]
    full = next((rows[0] for name, rows in found if name == "16bit"), {})
    if any("used_bytes_peak" not in row for row in (full, *(row for _, rows in found for row in rows))):
        return []
    points = []
    for name, rows in found:
        if name.startswith(only):
            right, (low, high) = float(accuracy.correctness(rows).mean()), accuracy.interval(rows)
            points.append({
                "family": family(name),
                "right": 100 * right,
                "below": 100 * (right - low),
                "above": 100 * (high - right),
                "peak": 16 * max(row["used_bytes_peak"] for row in rows) / full["used_bytes_peak"],
                "mean": sum(row["effective_bits_avg"] for row in rows) / len(rows),
            })  # fmt: skip
    return points


def _task(result: Result) -> tuple[str, str]:
    """Model and task of right answers."""
    config = result.get("config", {})
    return config.get("model", ""), config.get("task", "builtin")


def _frontier(stem: str, result: Result, others: Sequence[Result]) -> list[Picture]:
    """Accuracy over bits: of the bytes at their peak, and of the mean over the run; KIVI from the offline files."""
    points = _points(result)
    if len({point["family"] for point in points}) < 3 or any("parts" in row for row in measured(result)):  # no frontier
        return []
    alike = [other for other in others if other["benchmark"] == "offline" and _task(other) == _task(result)]
    points += [point for other in alike for point in _points(other, "kivi")]
    figure, (left, right) = new_figure(9.5, 4.4, 2, sharey=True)
    names = sorted(dict.fromkeys(p["family"] for p in points))
    kinds = list(dict.fromkeys(name.partition(", ")[0] for name in names))
    for name in names:
        kind, _, variant = name.partition(", ")
        look = {**style(kinds.index(kind)), "fillstyle": FILLS.get(variant, "full"), "markersize": 7}
        own = [p for p in points if p["family"] == name]
        y, *spread = ([p[figure] for p in own] for figure in ("right", "below", "above"))
        for axis, bits in ((left, "peak"), (right, "mean")):
            x = [p[bits] for p in own]
            axis.errorbar(x, y, spread, linestyle="none", elinewidth=1, capsize=2, label=name, **look)
    for axis, what in ((left, "peak bytes, as bits (16 = the 16-bit cache's peak)"), (right, "effective bits, mean")):
        log2_axis(axis, [2, 4, 8, 16])
        axis.set(xlim=(1.8, 18), xlabel=what)
    left.set(ylabel="right answers (%), 95 % interval", ylim=(0, 102))
    right.legend(frameon=False, fontsize=9, loc="lower right")
    return [(f"{stem}_frontier", "Right answers over the bits of the cache, at its peak and on average", figure)]


def _divergence(stem: str, result: Result, others: Sequence[Result]) -> list[Picture]:
    """Mean KL over context length, one line per row."""
    figure, (axis,) = new_figure()
    rows = measured(result)
    pools = {row["key"]["budget_bytes"] for row in rows if row["key"]["budget_bytes"]}
    for index, row in enumerate(rows):
        name, pool = label(row["key"]["method"]), row["key"]["budget_bytes"]
        text = f"{name}, {pool / 2**20:.0f} MiB" if pool and len(pools) > 1 else name
        text = "16 bits again (control)" if name == "16bit" else text
        curve = [point for point in row["curve"] if point["positions"] >= LEAST_POSITIONS] or row["curve"]
        x = [(point["context_from"] + point["context_to"]) / 2 for point in curve]
        # Zero cannot stand on a logarithmic axis; it is drawn at the bottom.
        y = [max(point["kl_mean"], 1e-10) for point in curve]
        axis.plot(x, y, label=text, **line(index))
    axis.set(yscale="log", xlabel="context (tokens)", ylabel="mean KL divergence from 16 bits (nats)")
    figure.legend(frameon=False, fontsize=9, ncols=4, loc="outside upper left")
    return [(f"{stem}_length", "Divergence from 16 bits over context length", figure)]


def _throughput(stem: str, result: Result, others: Sequence[Result]) -> list[Picture]:
    """Output tokens per second over concurrency, a panel per profile."""
    entries = serve.summary(result)
    profiles = list(dict.fromkeys(entry["profile"] for entry in entries))
    names = list(dict.fromkeys(entry["method"] for entry in entries))
    if not entries:
        return []
    figure, axes = new_figure(4.6 * len(profiles), 4.0, len(profiles), sharex=True)
    for axis, profile in zip(axes, profiles, strict=True):
        for index, name in enumerate(names):
            own = sorted(
                (e["concurrency"], e["output_tok_s"]) for e in entries if (e["profile"], e["method"]) == (profile, name)
            )
            axis.plot(*zip(*own, strict=True), label=label(name), **line(index))
        log2_axis(axis, sorted({e["concurrency"] for e in entries}))
        axis.set_title(profile, loc="left", fontsize=11)
        axis.set(xlabel="requests at a time")
        axis.set_ylim(bottom=0)
    axes[0].set(ylabel="output tokens per second")
    axes[0].legend(frameon=False, fontsize=9)
    return [(f"{stem}_throughput", "Throughput over concurrency, all in the same KV bytes", figure)]


def _hits(stem: str, result: Result, others: Sequence[Result]) -> list[Picture]:
    """Hit rate over the trace, seeds averaged."""
    rows = measured(result)
    figure, (axis,) = new_figure(7.0, 3.8)
    for index, name in enumerate(dict.fromkeys(row["key"]["method"] for row in rows)):
        parts = [row["hit_rate_by_part"] for row in rows if row["key"]["method"] == name]
        y = [100 * sum(part) / len(part) for part in zip(*parts, strict=True)]
        axis.plot(range(1, len(y) + 1), y, label=label(name), **line(index))
        axis.set_xticks(range(1, len(y) + 1))
    axis.set(ylim=(0, 100), xlabel="part of the trace", ylabel="prompt tokens found in the cache (%)")
    axis.legend(frameon=False, fontsize=9)
    return [(f"{stem}_hits", "What the prefix cache keeps", figure)]


def _by_pool(result: Result) -> str:
    """A table per pool size, smallest first, each against its own static method of one width; 16 bits in the first.

    Stock first, then policy by policy, the best of each first. Tasks of real models have one table, against 16 bits.
    """
    if result.get("config", {}).get("task") in accuracy.TASKS:
        return accuracy.rows_table({"baseline": "16bit", **result})
    order = ("16bit", "stock", "stock-fp8", "age", "uniform", "static")

    def place(row: Row) -> tuple[int, int]:
        return order.index(family(row["key"]["method"]).partition(", ")[0]), -row.get("right", 0)

    by_size: dict[int, list[Row]] = {}
    rows = sorted(result["rows"], key=place)
    full = [row for row in rows if row["key"]["method"] == "16bit"]
    for row in rows[len(full) :]:
        by_size.setdefault(row["key"]["budget_bytes"], []).append(row)
    tables = []
    for size in sorted(by_size) or [0]:
        own = [*full, *by_size.get(size, [])]
        full = []
        static = [row["key"]["method"] for row in own if re.fullmatch("static-[842]", row["key"]["method"])]
        tables.append(accuracy.rows_table({**result, "rows": own, "baseline": static[0] if static else None}))
    return "\n\n".join(tables)


def _served_against_kivi(result: Result, others: Sequence[Result]) -> str:
    """Served methods of a file's smallest pool against KIVI at 2 bits, on the same problems."""
    kivi = [row for row in measured(result) if row["key"]["method"].startswith("kivi-2")]
    asked = {**result["config"], "server_args": "", "lines": kivi[0]["key"]["lines"]} if kivi else {}
    lines = []
    for served in others if kivi else ():
        alike = all(served["config"].get(name) == asked[name] for name in ("first", "lines", "model", "server_args"))
        if served["benchmark"] == "accuracy" and alike:
            groups = accuracy.groups(served)
            smallest = min((pool for name, pool, _ in groups if name != "16bit"), default=0)
            lines += [
                [label(name), *(accuracy.against(rows, [row]) for row in kivi)]
                for (name, pool, problems), rows in groups.items()
                if pool == smallest and all(row["problems"] == problems for row in kivi)
            ]
    return markdown(["served, points against", *(row["key"]["method"] for row in kivi)], lines) if lines else ""


# -- files that other scripts write --------------------------------------------------------------------------


def _ledger(result: Result) -> str:
    text = table(
        result["rows"],
        "groups | logical tokens | shrinks per step | µs p20 | µs p50 | µs p80 | CPU µs p50",
        "{groups} | {logical_tokens:,} | {shrinks_per_step_mean} | {append_drain_us[p20]} | {append_drain_us[p50]} "
        "| {append_drain_us[p80]} | {append_drain_cpu_us[p50]}",
    )
    return (
        f"{result['cpu']}; an empty Python loop costs {result['empty_loop_ns']} ns per turn; load average "
        f"{result['load_average_at_end']:.1f} at the end.\n\n{text}"
    )


def _horizon(result: Result) -> str:
    fragmentation = (f"{100 * result[f'fragmentation_{key}']:.2f} %" for key in ("mean", "max", "end"))
    rows = [
        ("events, forwards", f"{result['events']:,}, {result['ticks']:,}"),
        ("pages born, shrinks, moves", f"{result['born']:,}, {result['shrinks']:,}, {result['moves']:,}"),
        ("fragmentation, share of the arena: mean, highest, at the end", ", ".join(fragmentation)),
        ("superblocks moved per born page", f"{result['moved_per_born']:.3f}"),
        ("CPU µs per event: first tenth, last tenth", f"{result['us_first_tenth']:.1f}, {result['us_last_tenth']:.1f}"),
        ("resident MiB: after 2 %, at the end", f"{result['blocks'][1]['rss_mib']}, {result['blocks'][-1]['rss_mib']}"),
    ]
    return markdown(["what", "figure"], rows)


def _compiled(result: Result) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for name, row in result["kernels"].items():
        kernel, arch = name.split("-")[:2]
        groups.setdefault((kernel, arch), []).append({**row, "kib": -(-row["shared"] // 1024)})

    def span(values: list[int]) -> str:
        return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"

    head = ["kernel", "for", "configurations", "registers", "spilled instructions", "shared memory, KiB", "tensor-core"]
    figures = ("registers", "spills", "kib", "mma")
    lines = [
        [*name, len(rows), *(span([row[figure] for row in rows]) for figure in figures)]
        for name, rows in sorted(groups.items())
    ]
    return markdown(head, lines)


# -- sections ------------------------------------------------------------------------------------------------

KINDS: dict[str, Kind] = {
    "accuracy": Kind(_by_pool, pictures=_frontier),
    "offline": Kind(offline.rows_table, _served_against_kivi),
    "kld": Kind(kld.rows_table, pictures=_divergence),
    "offline --codings": Kind(codings.rows_table),
    "serve": Kind(serve.rows_table, pictures=_throughput),
    "prefix": Kind(prefix.rows_table, pictures=_hits),
    "programs": Kind(programs.rows_table),
    "calibration": Kind(calibration.rows_table),
    **{e.name: Kind(e.table) for e in CHECKS},
    "ledger": Kind(_ledger),
    "horizon": Kind(_horizon),
    "kernels_aot": Kind(_compiled),
    "kernels_cpu": Kind(kernels_cpu.rows_table),
}
# Title and text of each kind.
TEXTS: dict[str, dict[str, str]] = tomllib.loads((Path(__file__).parent / "page.toml").read_text())


def result_section(path: Path, name: str, result: Result, others: Sequence[Result]) -> Section:
    """A result file with its commands and versions, its table and pictures."""
    kind, text = KINDS[name], TEXTS[name]
    rows = [row for row in result.get("rows", []) if "commit" in row]
    commands = list(dict.fromkeys(row["command"] for row in rows)) or [result["command"]]
    versions = dict(result.get("versions", {}))
    commits = [row["commit"][:10] for row in rows] or [versions.get("commit", "")[:10]]
    versions["commit"] = ", ".join(dict.fromkeys(filter(None, commits)))
    made = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    about = [*(f"`{command}`" for command in commands), f"({path.name}{'; ' * bool(made)}{made})"]
    flags = result.get("config", {}).get("server_args")
    title = result.get("title") or text["title"] + (f", with {flags}" if flags else "")
    told = " ".join(text["text"].split())
    parts = [result.get("note", ""), told, "  \n".join(about), kind.table(result), kind.more(result, others)]
    pictures = kind.pictures(path.stem, result, others)
    drawn = path.with_suffix(".png")
    if drawn.is_file():
        pictures.append((drawn.stem, text["title"], drawn))
    return Section(title, "\n\n".join(filter(None, parts)), pictures)


def timeline_section(path: Path) -> Section:
    """Bytes per tier and effective bits over time."""
    timeline = read_timeline(path)
    text = f"From `{path.name}`, written by `--pmkvq-timeline`.\n\n```\n{timelines.summarize(timeline).text()}\n```"
    picture = (path.stem, "Bytes per tier and effective bits", timelines.draw(timeline, title="KV pool over time"))
    return Section("Memory during generation", text, [picture])


def calibration_section(path: Path) -> Section:
    """Bits per layer."""
    calibration = artifact.load(path)
    text = f"From `{path.name}`, written by `pmkvq calibrate`.\n\n```\n{show.table(calibration)}\n```"
    name = path.name.removesuffix(".pmkvq.safetensors") + "_layers"
    picture = (name, "Final bits of each layer's keys and values", show.draw(calibration))
    return Section("Bits per layer", text, [picture])


def sections(folder: Path) -> list[Section]:
    """Everything in ``folder`` that can be shown, behind its ``README.md``, and a list of what is missing.

    Raises:
        ValueError: a file cannot be read, or there is nothing to show.
    """
    found: list[tuple[str, Path, Result]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        kind = result.get("benchmark", path.stem) if isinstance(result, dict) else ""
        if kind in KINDS and result.get("rows", True):
            found.append((kind, path, result))
    others = [result for _, _, result in found]
    order = list(KINDS)
    out = [
        result_section(path, kind, result, [other for other in others if "benchmark" in other])
        for kind, path, result in sorted(found, key=lambda entry: (order.index(entry[0]), entry[1]))
    ]
    out += [timeline_section(path) for path in sorted(folder.glob("*timeline*.jsonl"))]
    out += [calibration_section(path) for path in sorted(folder.glob("*.pmkvq.safetensors"))]
    if not out:
        raise ValueError(f"{folder} holds no result file of pmkvq bench, no timeline and no calibration file")
    if (about := folder / "README.md").is_file():
        out.insert(0, Section("", about.read_text().strip()))
    shown = {kind for kind, _, _ in found}
    missing = [name for name in KINDS if name not in shown and name.split()[0] in BENCHES]
    if missing:
        lines = (f"* {TEXTS[name]['title']}: `pmkvq bench {name}` has not been run." for name in missing)
        out.append(Section("Missing", "\n".join(lines)))
    return out


# -- the page ------------------------------------------------------------------------------------------------

TITLE = "Results"


def page(parts: Sequence[Section], out: Path) -> str:
    """The page as it stands in the folder ``out``, with pictures by name."""
    text = [f"# {TITLE}\n"]
    for part in parts:
        text.append((f"## {part.title}\n\n" if part.title else "") + f"{part.text}\n")
        text += [f"![{caption}]({_source(name, picture, out)})\n" for name, caption, picture in part.pictures]
    return "\n".join(text)


def _source(name: str, picture: Figure | Path, out: Path) -> str:
    return os.path.relpath(picture, out) if isinstance(picture, Path) else f"{name}.png"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;font-size:.85rem;margin:1rem 0;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;white-space:nowrap}
img{max-width:100%}code{font-size:.85em;background:#f4f4f4;padding:.1em .25em;overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:.7rem;overflow-x:auto}pre code{padding:0}"""


def write_report(folder: Path, out: Path) -> list[Path]:
    """``report.md``, ``report.html`` and pictures in ``out``.

    Returns:
        The files written.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: there is nothing to show.
    """
    from markdown_it import MarkdownIt

    parts = sections(folder)
    out.mkdir(parents=True, exist_ok=True)
    text = page(parts, out)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    written = [out / "report.md", out / "report.html"]
    for name, _, picture in (shown for part in parts for shown in part.pictures):
        if not isinstance(picture, Path):
            written.append(out / f"{name}.png")
            picture.savefig(written[-1])
        data = (picture if isinstance(picture, Path) else written[-1]).read_bytes()
        inline = "data:image/png;base64," + base64.b64encode(data).decode()
        body = body.replace(f'src="{_source(name, picture, out)}"', f'src="{inline}"')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{TITLE}</title>'
    (out / "report.md").write_text(text)
    (out / "report.html").write_text(
        f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pmkvq report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="result files, timelines (*timeline*.jsonl), calibration files")
    parser.add_argument("--out", type=Path, help="folder to write to (default: FOLDER/report)")
    options = parser.parse_args(argv)
    try:
        files = write_report(options.folder, options.out or options.folder / "report")
    except (OSError, ValueError) as error:
        print(f"pmkvq report: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, files)))
    return 0
