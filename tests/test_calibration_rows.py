"""Rows of the calibration benchmark: pooled and paired."""

from __future__ import annotations

from benchmarks.calibration import FORCED, SERVED, against, outcomes, rows_table


def served(row: str, seed: int, wrong: list[int], share: float | None = 0.22, problems: int = 40) -> dict:
    right = problems - len(wrong)
    return {
        "key": {"part": "served", "row": row, "seed": seed, "problems": problems}, "share": share, "wrong": wrong,
        "right": right, "budget_bytes": (10 + seed) << 20, "effective_bits_avg": 4.0 + seed,
    }  # fmt: skip


def forced(row: str, seed: int, kl: float, error: float, right: int) -> dict:
    return {
        "key": {"part": "forced", "row": row, "seed": seed, "problems": 10}, "chains": 10, "steps": 100 * (1 + seed),
        "kl_mean": kl, "kl_mean_standard_error": error, "chains_right": right,
    }  # fmt: skip


def cells(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_variant_has_its_own_name() -> None:
    for variants in (FORCED, [v for _, some in SERVED for v in some]):
        assert len({v.name for v in variants}) == len(variants)


def test_differences_are_paired_by_seed_and_problem() -> None:
    a = [served("both, 2.5", 0, [1]), served("both, 2.5", 1, [])]
    b = [served("uniform 2", 0, [1, 2, 3, 4]), served("uniform 2", 1, [1]), served("uniform 2", 2, list(range(40)))]
    assert outcomes(b)[1, 1] is False and outcomes(b)[1, 2] is True
    # Seed 2 is in one only; 4 of 80 are better, none worse.
    assert against(a, b).startswith("+5.0 (+1.2 to +")
    assert against(b[:2], a).startswith("-5.0 (-")
    assert against(a, a) == "+0.0 (+0.0 to +0.0)"


def test_seeds_are_pooled_and_compared_within_their_pool() -> None:
    rows = [
        served("both, 2.5", 1, []),
        served("uniform 2", 0, [0, 1]),
        served("uniform 4", 0, [5], share=0.33),
        served("both, 2.5", 0, [1]),
        served("16 bits", 0, [], share=None),
        served("uniform 2", 1, [3]),
    ]
    text = rows_table({"rows": rows})
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [
        "16 bits", "uniform 4", "uniform 2", "both, 2.5",
    ]  # fmt: skip
    both = cells(text, "both, 2.5")
    assert both[1:3] == ["2 x 40", "79 (98.8 %)"]
    assert both[4].startswith("+2.5 ") and both[5].startswith("-2.5 ")
    assert both[6:] == ["10.0 to 11.0", "4.50"]
    assert cells(text, "uniform 2")[4] == "-" and cells(text, "16 bits")[4:6] == ["-", "-"]


def test_divergence_is_per_step_and_its_error_per_chain() -> None:
    rows = [forced("uniform 2", 0, 1e-3, 3e-4, 4), forced("uniform 2", 1, 4e-3, 4e-4, 2)]
    # (100 · 1e-3 + 200 · 4e-3) / 300; √((3e-4 / 2)² + (4e-4 / 2)²)
    assert cells(rows_table({"rows": rows}), "uniform 2")[1:] == [
        "2 x 10", "6 (30.0 %)", "14.5 to 51.9", "3.00e-03 ± 2.5e-04",
    ]  # fmt: skip
