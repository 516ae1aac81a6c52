"""Result files, timelines and calibration files of a folder as one page with pictures.

    pmkvq report benchmarks/results --out docs/results

Writes ``report.md``, one PNG per picture, and ``report.html``, which holds everything in one file. Sections whose
result files are not there are listed as missing. Colours are those of Okabe and Ito (told apart by colour-blind
readers); every line and point has a marker of its own too.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import accuracy, kld, offline, prefix, serve
from benchmarks.methods import label
from benchmarks.programs import __main__ as programs
from benchmarks.result import markdown as table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
# File name without ending, what it shows, figure.
Picture = tuple[str, str, "Figure"]

# Okabe and Ito, "Color Universal Design" (2008), without yellow, which is too light for lines.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass
class Section:
    """One part of the page.

    Attributes:
        title: heading.
        text: Markdown paragraphs and tables.
    """

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """How result files of one benchmark are shown; pictures may use the results of the others in the folder."""

    title: str
    text: str
    table: Callable[[Result], str]
    pictures: Callable[[str, Result, dict[str, Result]], list[Picture]]
    more: Callable[[Result, dict[str, Result]], str] = lambda result, others: ""


def new_figure(width: float = 8.0, height: float = 4.2, columns: int = 1, **axes: Any) -> tuple[Figure, Any]:
    """A figure with one row of axes, readable at page width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    made = figure.subplots(1, columns, squeeze=False, **axes)[0]
    for axis in made:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e3e3e3", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, made if columns > 1 else made[0]


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the series number ``index``."""
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


# A point of a divergence curve says little where fewer positions are behind it.
LEAST_POSITIONS = 100
# How the marker of a series is filled, by what stands behind the comma of its name.
FILLS = {"calibrated": "none", "rotated": "bottom"}


def family(method: str) -> str:
    """Methods that differ in width only are one series: ``age-2`` and ``age-4`` are ``age``."""
    policy = method.partition("-")[0]
    if method.endswith(".safetensors"):
        return f"{policy}, calibrated"
    if "-hadamard" in method:
        return f"{policy}, rotated"
    return method if method in ("16bit", "stock", "stock-fp8") else policy


@dataclass(frozen=True)
class Point:
    """A method's accuracy (%), its 95 % interval, and its bits: of the peak of all bytes, and the mean."""

    family: str
    accuracy: float
    interval: tuple[float, float]
    peak_bits: float
    mean_bits: float


def _served(result: Result) -> list[Point]:
    found = accuracy.groups(result)
    full = [rows[0] for (name, _, _), rows in found.items() if name == "16bit"]
    points = []
    for (name, _, _), rows in found.items() if full else ():
        low, high = accuracy.interval(rows)
        peak = 16 * max(row["used_bytes_peak"] for row in rows) / full[0]["used_bytes_peak"]
        mean = sum(row["effective_bits_avg"] for row in rows) / len(rows)
        value = 100 * float(accuracy.correctness(rows).mean())
        points.append(Point(family(name), value, (100 * low, 100 * high), peak, mean))
    return points


def _offline(result: Result) -> list[Point]:
    """KIVI only, its rows of most problems: the other offline rows repeat what servers measured."""
    rows = [row for row in result["rows"] if "missing" not in row]
    most = max((row["key"]["problems"] for row in rows), default=0)
    rows = [row for row in rows if row["key"]["problems"] == most]
    full = [row for row in rows if row["key"]["method"] == "16bit"]
    points = []
    for row in rows if full else ():
        if row["key"]["method"].startswith("kivi"):
            low, high = row["confidence95"]
            peak = 16 * row["used_bytes_peak"] / full[0]["used_bytes_peak"]
            interval = (100 * low, 100 * high)
            points.append(Point("KIVI, offline", 100 * row["accuracy"], interval, peak, row["effective_bits_avg"]))
    return points


def _frontier(stem: str, result: Result, others: dict[str, Result]) -> list[Picture]:
    """Accuracy over bits: of the bytes at their peak, and of the mean over the run."""
    points = _served(result)
    if len({point.family for point in points}) < 3:  # no frontier
        return []
    points += _offline(others["offline"]) if "offline" in others else []
    figure, (left, right) = new_figure(9.5, 4.4, 2, sharey=True)
    names = sorted(dict.fromkeys(p.family for p in points))
    kinds = list(dict.fromkeys(name.partition(", ")[0] for name in names))
    for name in names:
        kind, _, variant = name.partition(", ")
        look = {**style(kinds.index(kind)), "fillstyle": FILLS.get(variant, "full"), "markersize": 7}
        own = [p for p in points if p.family == name]
        y = [p.accuracy for p in own]
        spread = [[p.accuracy - p.interval[0] for p in own], [p.interval[1] - p.accuracy for p in own]]
        for axis, x in ((left, [p.peak_bits for p in own]), (right, [p.mean_bits for p in own])):
            axis.errorbar(x, y, spread, linestyle="none", elinewidth=1, capsize=2, label=name, **look)
    for axis, what in ((left, "peak bytes, as bits (16 = the 16-bit cache's peak)"), (right, "effective bits, mean")):
        axis.set_xscale("log", base=2)
        axis.set_xlim(1.8, 18)
        axis.set_xticks([2, 4, 8, 16], labels=["2", "4", "8", "16"])
        axis.minorticks_off()
        axis.set_xlabel(what)
    left.set_ylabel("right answers (%), 95 % interval")
    left.set_ylim(0, 102)
    right.legend(frameon=False, fontsize=9, loc="lower right")
    return [(f"{stem}_frontier", "Right answers over the bits of the cache, at its peak and on average", figure)]


def _divergence(stem: str, result: Result, others: dict[str, Result]) -> list[Picture]:
    """Mean KL over context length, one line per row."""
    figure, axis = new_figure()
    rows = [row for row in result["rows"] if "missing" not in row]
    pools = {row["key"]["pool_bytes"] for row in rows if row["key"]["pool_bytes"]}
    for index, row in enumerate(rows):
        name, pool = label(row["key"]["method"]), row["key"]["pool_bytes"]
        text = f"{name}, {pool / 2**20:.0f} MiB" if pool and len(pools) > 1 else name
        text = "16 bits again (control)" if name == "16bit" else text
        curve = [point for point in row["curve"] if point["positions"] >= LEAST_POSITIONS] or row["curve"]
        x = [(point["context_from"] + point["context_to"]) / 2 for point in curve]
        # Zero cannot stand on a logarithmic axis; it is drawn at the bottom.
        y = [max(point["kl_mean"], 1e-10) for point in curve]
        axis.plot(x, y, linewidth=1.6, markersize=5, label=text, **style(index))
    axis.set_yscale("log")
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel("mean KL divergence from 16 bits (nats)")
    figure.legend(frameon=False, fontsize=9, ncols=4, loc="outside upper left")
    return [(f"{stem}_length", "Divergence from 16 bits over context length", figure)]


def _throughput(stem: str, result: Result, others: dict[str, Result]) -> list[Picture]:
    """Output tokens per second over concurrency, a panel per profile."""
    entries = serve.summary(result)
    profiles = list(dict.fromkeys(entry["profile"] for entry in entries))
    names = list(dict.fromkeys(entry["method"] for entry in entries))
    if not entries:
        return []
    figure, axes = new_figure(4.6 * len(profiles), 4.0, len(profiles), sharex=True)
    axes = [axes] if len(profiles) == 1 else list(axes)
    for axis, profile in zip(axes, profiles, strict=True):
        for index, name in enumerate(names):
            own = sorted(
                (e["concurrency"], e["output_tok_s"]) for e in entries if (e["profile"], e["method"]) == (profile, name)
            )
            axis.plot(*zip(*own, strict=True), linewidth=1.6, markersize=5, label=label(name), **style(index))
        axis.set_xscale("log", base=2)
        ticks = sorted({e["concurrency"] for e in entries})
        axis.set_xticks(ticks, labels=list(map(str, ticks)))
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(profile, loc="left", fontsize=11)
        axis.set_xlabel("requests at a time")
    axes[0].set_ylabel("output tokens per second")
    axes[0].legend(frameon=False, fontsize=9)
    return [(f"{stem}_throughput", "Throughput over concurrency, all in the same KV bytes", figure)]


def _hits(stem: str, result: Result, others: dict[str, Result]) -> list[Picture]:
    """Hit rate over the trace, seeds averaged."""
    rows = [row for row in result["rows"] if "missing" not in row]
    figure, axis = new_figure(7.0, 3.8)
    for index, name in enumerate(dict.fromkeys(row["key"]["method"] for row in rows)):
        parts = [row["hit_rate_by_part"] for row in rows if row["key"]["method"] == name]
        y = [100 * sum(part) / len(part) for part in zip(*parts, strict=True)]
        axis.plot(range(1, len(y) + 1), y, linewidth=1.6, markersize=5, label=label(name), **style(index))
        axis.set_xticks(range(1, len(y) + 1))
    axis.set_ylim(0, 100)
    axis.set_xlabel("part of the trace")
    axis.set_ylabel("prompt tokens found in the cache (%)")
    axis.legend(frameon=False, fontsize=9)
    return [(f"{stem}_hits", "What the prefix cache keeps", figure)]


def _by_pool(result: Result) -> str:
    """A table per pool size, smallest first, each against its own static method of one width; 16 bits in the first.

    Stock first, then policy by policy, the best of each first.
    """
    order = ("16bit", "stock", "stock-fp8", "age", "uniform", "static")

    def place(row: dict[str, Any]) -> tuple[int, int]:
        return order.index(family(row["key"]["method"]).partition(", ")[0]), -row.get("right", 0)

    rows = sorted(result["rows"], key=place)
    sizes = sorted({row["key"]["pool_bytes"] for row in rows if row["key"]["method"] != "16bit"}) or [None]
    tables = []
    for size in sizes:
        own = [
            row
            for row in rows
            if (size == sizes[0] if row["key"]["method"] == "16bit" else row["key"]["pool_bytes"] == size)
        ]
        static = [row["key"]["method"] for row in own if re.fullmatch("static-[842]", row["key"]["method"])]
        tables.append(accuracy.table({"rows": own}, static[0] if static else None))
    return "\n\n".join(tables)


def _served_against_kivi(result: Result, others: dict[str, Result]) -> str:
    """Served methods of the smallest pool against KIVI at 2 bits, on the same problems."""
    served = others.get("accuracy")
    alike = ("first", "lines", "model")
    if not served or any(served["config"].get(k) != result["config"].get(k) for k in alike):
        return ""
    groups = accuracy.groups(served)
    smallest = min((pool for name, pool, _ in groups if name != "16bit"), default=0)
    kivi = [row for row in result["rows"] if row["key"]["method"].startswith("kivi-2") and "missing" not in row]
    lines = [
        [label(name), *(accuracy.against(rows, [row]) for row in kivi)]
        for (name, pool, problems), rows in groups.items()
        if pool == smallest and kivi and all(row["problems"] == problems for row in kivi)
    ]
    head = ["served, points against", *(row["key"]["method"] for row in kivi)]
    return table_of(head, lines) if lines else ""


def _none(stem: str, result: Result, others: dict[str, Result]) -> list[Picture]:
    return []


KINDS: dict[str, Kind] = {
    "accuracy": Kind(
        "Accuracy at equal bytes",
        "Right answers through the decode path of real servers. Rows of one pool size had the same bytes; `16bit` had "
        "all it needs. *Peak* and *mean* are bytes of mapped pages; ours count finished answers that the prefix cache "
        "still holds, stock's (from its log) do not. *At the end* is the mean width of a request's KV when its answer "
        "was complete. Speed is measured by `serve`.",
        _by_pool,
        _frontier,
    ),
    "offline": Kind(
        "KIVI, offline",
        "Greedy decoding in plain PyTorch over a cache that is quantized as each method does; all bytes counted. "
        "`16bit` and `static` stand here to compare this harness with the servers. KIVI-n: keys per channel in groups "
        "of 32 tokens, values per token in groups of 32 channels, 128 recent tokens at 16 bits; with a size, the "
        "recent part is as long as the bytes allow.",
        offline.table,
        _none,
        _served_against_kivi,
    ),
    "kld": Kind(
        "Divergence from 16 bits over context length",
        "KL(16 bits ‖ method) in nats on identical tokens, each fed through the decode path of a real server. "
        f"The picture leaves out ranges of context with fewer than {LEAST_POSITIONS} positions.",
        kld.table,
        _divergence,
    ),
    "serve": Kind(
        "Throughput and latency at equal bytes",
        "SGLang's own client; the servers of all methods up at the same time, measured in turn. Ratios are made within "
        "one repeat: median (lowest to highest).",
        serve.table,
        _throughput,
    ),
    "prefix": Kind(
        "Prefix cache at equal bytes",
        "Contexts that come back with a new question. *Cold hits* found their prefix at less than 16 bits.",
        prefix.table,
        _hits,
    ),
    "programs": Kind(
        "Programs in SGLang's frontend language",
        "`sgl.function` programs that fork and join. *Bits* are of the shared prefix's cached pages when the program "
        "ends.",
        programs.table,
        _none,
    ),
}


# Methods in the README, in its order.
HEADLINE = ("16bit", "stock", "age-k4v2", "age-2-hadamard", "age-2", "static-2")


def headline(result: Result) -> str:
    """The README's rows of an accuracy file: methods of ``HEADLINE`` that had the smallest pool, and 16 bits."""
    groups = accuracy.groups(result)
    smallest = min(pool for _, pool, _ in groups)
    shown = [key for key in groups if key[0] in HEADLINE and (key[1] == smallest or key[0] == "16bit")]
    lines = []
    for name, pool, problems in sorted(shown, key=lambda key: HEADLINE.index(key[0])):
        rows = groups[name, pool, problems]
        low, high = accuracy.interval(rows)
        bits = sum(row["effective_bits_avg"] for row in rows) / len(rows)
        right = f"{sum(row['right'] for row in rows)}/{problems * len(rows)}"
        lines.append([name, f"{pool / 2**20:.0f}", right, f"{100 * low:.0f} to {100 * high:.0f} %", f"{bits:.1f}"])
    return table_of(["method", "pool MiB", "right answers", "95 %", "bits, mean"], lines)


def result_section(path: Path, result: Result, others: dict[str, Result]) -> Section:
    """A result file with its commands and versions, its table and pictures."""
    kind = KINDS[result["benchmark"]]
    commands = list(dict.fromkeys(row["command"] for row in result["rows"]))
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if name != "commit")
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in result["rows"]))
    about = [f"`{command}`" for command in commands]
    about.append(f"({path.name}; {versions}; commit {commits})")
    text = "\n\n".join([kind.text, "  \n".join(about), kind.table(result), kind.more(result, others)]).rstrip()
    flags = result["config"].get("server_args")
    title = f"{kind.title}, with {flags}" if flags else kind.title
    return Section(title, text, kind.pictures(path.stem, result, others))


def timeline_section(path: Path) -> Section:
    """Bytes per tier and effective bits over time."""
    from sglang_pmkvq.timeline import read_timeline
    from sglang_pmkvq.tools.report import draw, summarize

    timeline = read_timeline(path)
    figure = draw(timeline, title="KV pool over time")
    text = f"From `{path.name}`, written by `--pmkvq-timeline`.\n\n```\n{summarize(timeline).text()}\n```"
    return Section("Memory during generation", text, [(path.stem, "Bytes per tier and effective bits", figure)])


def calibration_section(path: Path) -> Section:
    """Bits per layer."""
    from sglang_pmkvq.artifact import load
    from sglang_pmkvq.calib.show import draw, table

    calibration = load(path)
    text = f"From `{path.name}`, written by `pmkvq calibrate`.\n\n```\n{table(calibration)}\n```"
    name = path.name.removesuffix(".pmkvq.safetensors") + "_layers"
    return Section("Bits per layer", text, [(name, "Final bits of each layer's keys and values", draw(calibration))])


def sections(folder: Path) -> list[Section]:
    """Everything in ``folder`` that can be shown, and a list of what is missing.

    Raises:
        ValueError: a file cannot be read, or there is nothing to show.
    """
    out: list[Section] = []
    seen: set[str] = set()
    found: list[tuple[int, Path, Result]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        kind = result.get("benchmark") if isinstance(result, dict) else None
        if kind in KINDS and result["rows"]:
            found.append((list(KINDS).index(kind), path, result))
    # Of several files of a kind the first by name.
    others = {result["benchmark"]: result for _, _, result in reversed(found)}
    for _, path, result in sorted(found, key=lambda entry: entry[:2]):
        seen.add(result["benchmark"])
        out.append(result_section(path, result, others))
    out += [timeline_section(path) for path in sorted(folder.glob("*timeline*.jsonl"))]
    out += [calibration_section(path) for path in sorted(folder.glob("*.pmkvq.safetensors"))]
    if not out:
        raise ValueError(f"{folder} holds no result file of pmkvq bench, no timeline and no calibration file")
    lines = [f"* {k.title}: `pmkvq bench {name}` has not been run." for name, k in KINDS.items() if name not in seen]
    if lines:
        out.append(Section("Missing", "\n".join(lines)))
    return out


TITLE = "KV-cache methods compared"


def markdown(parts: Sequence[Section]) -> str:
    """The page, with pictures by name."""
    page = [f"# {TITLE}\n"]
    for part in parts:
        page.append(f"## {part.title}\n\n{part.text}\n")
        page += [f"![{caption}]({name}.png)\n" for name, caption, _ in part.pictures]
    return "\n".join(page)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;font-size:.85rem;margin:1rem 0;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;white-space:nowrap}
img{max-width:100%}code{font-size:.85em;background:#f4f4f4;padding:.1em .25em;overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:.7rem;overflow-x:auto}pre code{padding:0}figcaption{color:#555;font-size:.85rem}"""


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
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    body = [f"<h1>{TITLE}</h1>"]
    written = []
    for part in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>\n{render(part.text)}")
        for name, caption, figure in part.pictures:
            data = _png(figure)
            (out / f"{name}.png").write_bytes(data)
            written.append(out / f"{name}.png")
            source = "data:image/png;base64," + base64.b64encode(data).decode()
            shown = html.escape(caption, quote=True)
            body.append(f'<figure><img src="{source}" alt="{shown}"><figcaption>{shown}</figcaption></figure>')
    (out / "report.md").write_text(markdown(parts))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{TITLE}</title>'
    document = f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body>\n"
    (out / "report.html").write_text(document + "\n".join(body) + "\n</body></html>\n")
    return [out / "report.md", out / "report.html", *written]


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
    for path in files:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
