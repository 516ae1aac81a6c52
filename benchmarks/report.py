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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]

# Okabe and Ito, "Color Universal Design" (2008), without yellow, which is too light for lines.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass
class Section:
    """One part of the page.

    Attributes:
        title: heading.
        text: Markdown paragraphs and tables.
        pictures: (file name without ending, what it shows, figure).
    """

    title: str
    text: str
    pictures: list[tuple[str, str, Figure]] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """How result files of one benchmark are shown."""

    title: str
    text: str
    table: Callable[[Result], str]
    pictures: Callable[[str, Result], list[tuple[str, str, Figure]]]


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


def family(method: str) -> str:
    """Methods that differ in width only are one series: ``age-2`` and ``age-4`` are ``age``."""
    return method if method in ("16bit", "stock", "stock-fp8") else method.partition("-")[0]


def _frontier(stem: str, result: Result) -> list[tuple[str, str, Figure]]:
    """Accuracy over bits: of the bytes at their peak, and of the mean over the run."""
    found = accuracy.groups(result)
    full = [rows for (name, _, _), rows in found.items() if name == "16bit"]
    if not full:
        return []
    peak16 = full[0][0]["used_bytes_peak"]
    figure, (left, right) = new_figure(9.5, 4.4, 2, sharey=True)
    series: dict[str, list[tuple[str, float, float, float, tuple[float, float]]]] = {}
    for (name, _, _), rows in found.items():
        value = 100 * float(accuracy.correctness(rows).mean())
        low, high = accuracy.interval(rows)
        peak = 16 * max(row["used_bytes_peak"] for row in rows) / peak16
        mean = sum(row["effective_bits_avg"] for row in rows) / len(rows)
        series.setdefault(family(name), []).append((name, peak, mean, value, (100 * low, 100 * high)))
    for index, (label, points) in enumerate(series.items()):
        for axis, place in ((left, 1), (right, 2)):
            x = [p[place] for p in points]
            y = [p[3] for p in points]
            spread = [[p[3] - p[4][0] for p in points], [p[4][1] - p[3] for p in points]]
            axis.errorbar(x, y, spread, linestyle="none", elinewidth=1, capsize=2, label=label, **style(index))
    for axis, what in ((left, "peak bytes, as bits (16 = the 16-bit server's peak)"), (right, "effective bits, mean")):
        axis.set_xscale("log", base=2)
        axis.set_xlim(1.8, 18)
        axis.set_xticks([2, 4, 8, 16], labels=["2", "4", "8", "16"])
        axis.minorticks_off()
        axis.set_xlabel(what)
    left.set_ylabel("right answers (%), 95 % interval")
    left.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=9, loc="lower right")
    return [(f"{stem}_frontier", "Right answers over the bits of the cache, at its peak and on average", figure)]


def _none(stem: str, result: Result) -> list[tuple[str, str, Figure]]:
    return []


KINDS: dict[str, Kind] = {
    "accuracy": Kind(
        "Accuracy at equal bytes",
        "Right answers through the decode path of real servers. Rows of one pool size had the same bytes; `16bit` had "
        "all it needs. *Peak* and *mean* are bytes of pages in use; *at the end* is the mean width of a request's KV "
        "when its answer was complete.",
        lambda result: accuracy.table(result, _baseline(result)),
        _frontier,
    ),
}


def _baseline(result: Result) -> str | None:
    """The static method of the table, if there is one."""
    names = [row["key"]["method"] for row in result["rows"]]
    static = [name for name in names if name.startswith("static-")]
    return static[0] if static else None


def result_section(path: Path, result: Result) -> Section:
    """A result file with its commands and versions, its table and pictures."""
    kind = KINDS[result["benchmark"]]
    commands = list(dict.fromkeys(row["command"] for row in result["rows"]))
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if name != "commit")
    commits = ", ".join(dict.fromkeys(row["commit"][:10] for row in result["rows"]))
    about = [f"`{command}`" for command in commands]
    about.append(f"({path.name}; {versions}; commit {commits})")
    text = "\n\n".join([kind.text, "  \n".join(about), kind.table(result)])
    return Section(kind.title, text, kind.pictures(path.stem, result))


def timeline_section(path: Path) -> Section:
    """Bytes per tier and effective bits over time."""
    from sglang_pmkvq.report import draw, summarize
    from sglang_pmkvq.timeline import read_timeline

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
    for _, path, result in sorted(found, key=lambda entry: entry[:2]):
        seen.add(result["benchmark"])
        out.append(result_section(path, result))
    out += [timeline_section(path) for path in sorted(folder.glob("*timeline*.jsonl"))]
    out += [calibration_section(path) for path in sorted(folder.glob("*.pmkvq.safetensors"))]
    if not out:
        raise ValueError(f"{folder} holds no result file of pmkvq bench, no timeline and no calibration file")
    lines = [f"* {k.title}: `pmkvq bench {name}` has not been run." for name, k in KINDS.items() if name not in seen]
    if lines:
        out.append(Section("Missing", "\n".join(lines)))
    return out


TITLE = "KV-cache methods compared"


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
    page = [f"# {TITLE}\n"]
    body = [f"<h1>{TITLE}</h1>"]
    written = []
    for part in parts:
        page.append(f"## {part.title}\n\n{part.text}\n")
        body.append(f"<h2>{html.escape(part.title)}</h2>\n{render(part.text)}")
        for name, caption, figure in part.pictures:
            data = _png(figure)
            (out / f"{name}.png").write_bytes(data)
            written.append(out / f"{name}.png")
            page.append(f"![{caption}]({name}.png)\n")
            source = "data:image/png;base64," + base64.b64encode(data).decode()
            shown = html.escape(caption, quote=True)
            body.append(f'<figure><img src="{source}" alt="{shown}"><figcaption>{shown}</figcaption></figure>')
    (out / "report.md").write_text("\n".join(page))
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
