"""What the documents claim is what tests run and result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import accuracy, report, serve
from benchmarks.harness.results import RESULTS, ROOT, Result, Row, markdown, measured, table
from benchmarks.harness.stats import percent
from tests.test_server_modes import MATRIX, SAMPLE

READMES = (ROOT / "README.md", ROOT / "benchmarks/reasoner/README.md", ROOT / "scripts/offline_kit/README.md")
DOCS = sorted([*ROOT.glob("docs/**/*.md"), *READMES])
PAGE = ROOT / "docs" / "results" / "report.md"


def result(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_the_page_is_made_from_the_result_files() -> None:
    page = report.page(report.sections(RESULTS), PAGE.parent)
    assert PAGE.read_text() == page, "run `pmkvq report benchmarks/results --out docs/results`"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (PAGE.parent / picture).is_file(), picture


def test_every_result_file_is_on_the_page() -> None:
    for path in RESULTS.glob("*.json"):
        assert json.loads(path.read_text()).get("benchmark", path.stem) in report.KINDS, path


def pressure_headline() -> str:
    """The README's first table."""
    by = {(row["key"]["method"], row["share"]): row for row in result("pressure")["rows"]}
    shown = {
        "stock, all in memory": by["16bit", None],
        "stock, 35 %": by["stock", 0.35],
        "final 4, 35 %": by["age-4", 0.35],
        "final 4, 15 %": by["age-4", 0.15],
    }

    def cells(name: str, row: Row) -> Row:
        bits = f"{row['effective_bits_avg']:.1f}" if row["shrinks"] else "16"
        return {**row, "name": name, "speed": row["output_tokens"] / row["wall_s"], "bits": bits}

    return table(
        [cells(*one) for one in shown.items()],
        "32 problems at once | pool MiB | right | tokens/s | running at once | effective bits, mean",
        "{name} | {budget_bytes:.0fM} | {right}/{problems} | {speed:.0f} | {peak_running} | {bits}",
    )


METHODS = ("16bit", "stock", "age-k4v2", "age-2-hadamard", "age-2", "static-2")


def methods_headline(found: Result) -> str:
    """The README's second table: methods that had the smallest pool, and 16 bits."""
    groups = accuracy.groups(found)
    smallest = min(pool for _, pool, _ in groups)
    shown = [key for key in groups if key[0] in METHODS and (key[1] == smallest or key[0] == "16bit")]
    lines = []
    for name, pool, problems in sorted(shown, key=lambda key: METHODS.index(key[0])):
        rows = groups[name, pool, problems]
        bits = sum(row["effective_bits_avg"] for row in rows) / len(rows)
        right = f"{sum(row['right'] for row in rows)}/{problems * len(rows)}"
        span = f"{percent(accuracy.interval(rows), '.0f')} %"
        lines.append([name, f"{pool / 2**20:.0f}", right, span, f"{bits:.1f}"])
    return markdown(["method", "pool MiB", "right answers", "95 %", "bits, mean"], lines)


CODINGS = {"fp8": "fp8", "4/plain": "4, plain", "4/hadamard": "4, rotated", "4": "**4**", "k4v2": "**k4v2**",
           "2/hadamard": "2, rotated", "2": "**2**"}  # fmt: skip
MODELS = {"qwen1.5b": "Qwen2.5-Coder-1.5B", "qwen0.5b": "Qwen2.5-Coder-0.5B", "smollm2": "SmolLM2-135M"}


def codings_table(text: str) -> str:
    """Tables of real models without a server: divergence and how often the likeliest token stays."""
    found = {model: result(f"codings_{model}_{text}")["rows"] for model in MODELS}
    rows = {model: {row["key"]["method"]: row for row in some} for model, some in found.items()}

    def cell(row: Row) -> str:
        return f"{row['kl_mean']:.4f}, {row['top1_agreement']:.1%}"

    shown = [name for name in CODINGS if all(name in rows[model] for model in MODELS)]
    lines = [[CODINGS[name], *(cell(rows[model][name]) for model in MODELS)] for name in shown]
    return markdown(["KV at", *MODELS.values()], lines)


SERVED = {"stock-fp8": "fp8", "static-4": "4", "static-k4v2": "k4v2", "static-2": "2"}


def served_table() -> str:
    """The page on measuring: divergence of real servers on real models, at final widths as soon as tokens are old."""
    rows = {model: {row["key"]["method"]: row for row in result(f"kld_{model}_gsm8k")["rows"]} for model in MODELS}

    def cell(row: Row | None) -> str:
        return f"{row['kl_mean']:.4f}, {row['top1_agreement']:.1%}" if row else "not measured"

    lines = [[told, *(cell(rows[model].get(name)) for model in MODELS)] for name, told in SERVED.items()]
    return markdown(["KV at", *MODELS.values()], lines)


def right_table(name: str) -> str:
    """Right answers of a task of real models, and points against 16 bits."""
    found = result(name)
    by = accuracy.groups(found)
    ((_, sixteen),) = [(key, rows) for key, rows in by.items() if key[0] == "16bit"]
    lines = []
    order = ["16bit", *SERVED]
    for (method, _, problems), rows in sorted(by.items(), key=lambda entry: order.index(entry[0][0])):
        points = "-" if rows is sixteen else accuracy.against(rows, sixteen)
        bits = f"{sum(row['effective_bits_avg'] for row in rows) / len(rows):.1f}"
        lines.append([method, f"{sum(row['right'] for row in rows)}/{problems}", points, bits])
    return markdown(["KV at", "right", "points against 16 bits", "bits, mean"], lines)


def test_tables_of_real_models_are_from_the_result_files() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert served_table() in page
    assert codings_table("opticks") in page
    assert right_table("tools_qwen1.5b") in page


def test_tables_of_the_readme_are_from_the_result_files() -> None:
    readme = (ROOT / "README.md").read_text()
    assert codings_table("gsm8k") in readme
    assert pressure_headline() in readme
    assert methods_headline(result("methods")) in readme


def test_headline_is_of_the_smallest_pool() -> None:
    found = result("methods")
    before = methods_headline(found)
    small = min(row["key"]["budget_bytes"] for row in found["rows"])
    (row,) = (r for r in found["rows"] if (r["key"]["method"], r["key"]["budget_bytes"]) == ("age-2", small))
    wider = {**row, "key": {**row["key"], "budget_bytes": 2 * small}}
    assert methods_headline({**found, "rows": [*found["rows"], wider]}) == before
    narrower = {**row, "key": {**row["key"], "budget_bytes": small // 2}}
    lines = methods_headline({**found, "rows": [*found["rows"], narrower]}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["16bit", "age-2"]


def test_throughput_in_the_readme_is_from_the_result_file() -> None:
    entries = serve.summary(result("serve"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    for method, says in (("age-2", " made {} times stock's tokens per second ({} to {} in three repeats)"),
                         ("age-2-hadamard", " {} times ({} to {})"), ("age-4", " {} times ({} to {})")):  # fmt: skip
        (entry,) = (e for e in entries if (e["profile"], e["concurrency"], e["method"]) == ("long-cot", 16, method))
        assert entry["saturated"] and entry["repeats"] == 3
        assert f"`{method}`" + says.format(*(f"{ratio:.1f}" for ratio in entry["tok_s_ratio"])) in readme


def test_calibration_in_the_readme_is_from_the_result_file() -> None:
    served = [row for row in measured(result("calibration")) if row["key"]["part"] == "served"]
    both, uniform, sixteen = (
        sum(row["right"] for row in served if row["key"]["row"] == name)
        for name in ("both, hadamard and clipping, 2.5", "uniform 2", "16 bits")
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{both} of 600 problems right, uniform 2 {uniform}, and 16 bits with all memory {sixteen}" in readme


def test_what_the_support_matrix_calls_tested_is_a_case() -> None:
    text = (ROOT / "docs" / "support_matrix.md").read_text()
    tested = set()
    for architecture, dims, pages in re.findall(
        r"^\| (\w+)[^|]* \| ([\d, ]+) \| ([\d, ]+) \| tested", text, re.MULTILINE
    ):
        tested |= {(architecture.lower(), int(d), int(p)) for d in dims.split(",") for p in pages.split(",")}
    assert tested == set(MATRIX)
    assert {row[0] for row in SAMPLE} | {"llama", "mistral"} == {row[0] for row in MATRIX}


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_tests_that_documents_name_exist(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(TODO|TBD|FIGURES|TRAINING)\b|<!-- (draft|results)", text)
    for name in re.findall(r"`((?:tests|benchmarks|docs|kernels|patches|calib|sglang_pmkvq)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").glob("*.py")), name
