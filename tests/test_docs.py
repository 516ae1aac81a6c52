"""What the documents claim is what tests run and result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import calibration_rows, report, serve, summary
from tests.test_server_modes import MATRIX, SAMPLE

ROOT = Path(__file__).resolve().parent.parent
READMES = (ROOT / "README.md", ROOT / "benchmarks/reasoner/README.md", ROOT / "scripts/offline_kit/README.md")
DOCS = sorted([*ROOT.glob("docs/**/*.md"), *READMES])


def test_results_page_is_made_from_the_result_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == summary.page(), "run `python -m benchmarks.summary`"


def test_headline_of_the_readme_is_from_the_result_file() -> None:
    readme = (ROOT / "README.md").read_text()
    assert summary.headline() in readme
    assert report.headline(json.loads((summary.RESULTS / "methods.json").read_text())) in readme


def test_throughput_in_the_readme_is_from_the_result_file() -> None:
    entries = serve.summary(json.loads((summary.RESULTS / "serve.json").read_text()))
    readme = " ".join((ROOT / "README.md").read_text().split())
    for method, says in (("age-2", " made {} times stock's tokens per second ({} to {} in three repeats)"),
                         ("age-2-hadamard", " {} times ({} to {})"), ("age-4", " {} times ({} to {})")):  # fmt: skip
        (entry,) = (e for e in entries if (e["profile"], e["concurrency"], e["method"]) == ("long-cot", 16, method))
        assert entry["saturated"] and entry["repeats"] == 3
        assert f"`{method}`" + says.format(*(f"{ratio:.1f}" for ratio in entry["tok_s_ratio"])) in readme


def test_calibration_page_has_the_rows_of_the_result_file() -> None:
    result = json.loads((summary.RESULTS / "calibration.json").read_text())
    page = (ROOT / "docs" / "calibration.md").read_text()
    for rows in (calibration_rows.served(result), calibration_rows.forced(result)):
        assert rows in page, "copy the table from docs/results.md"
    both, uniform, sixteen = (
        sum(r["right"] for r in result["rows"] if r["part"] == "served" and r["row"] == name)
        for name in ("both, hadamard and clipping, 2.5", "uniform 2", "16 bits")
    )
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{both} of 600 problems right, uniform 2 {uniform}, and 16 bits with all memory {sixteen}" in readme


def test_headline_is_of_the_smallest_pool() -> None:
    result = json.loads((summary.RESULTS / "methods.json").read_text())
    before = report.headline(result)
    small = min(row["key"]["pool_bytes"] for row in result["rows"])
    (row,) = (row for row in result["rows"] if row["key"]["method"] == "age-2" and row["key"]["pool_bytes"] == small)
    wider = {**row, "key": {**row["key"], "pool_bytes": 2 * small}}
    assert report.headline({**result, "rows": [*result["rows"], wider]}) == before
    narrower = {**row, "key": {**row["key"], "pool_bytes": small // 2}}
    lines = report.headline({**result, "rows": [*result["rows"], narrower]}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["16bit", "age-2"]


def test_every_result_file_is_on_a_page() -> None:
    named = {name for name, *_ in summary.SECTIONS}
    other = {path for path in summary.RESULTS.glob("*.json") if path.stem not in named}
    assert {json.loads(path.read_text())["benchmark"] for path in other} <= set(report.KINDS)


def test_report_is_made_from_the_result_files() -> None:
    page = ROOT / "docs" / "results" / "report.md"
    assert page.read_text() == report.markdown(report.sections(summary.RESULTS)), "run `pmkvq report` as the page says"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / picture).is_file(), picture


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
    folders = "tests|benchmarks|docs|scripts|examples|kernels|patches|calib|sglang_pmkvq"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").glob("*.py")), name
