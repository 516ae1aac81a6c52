"""``pmkvq bench prefix``: the trace, what it makes of answers, and a small replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prefix as bench
from benchmarks.prefix import QUESTIONS, Turn, ask, figures, rows_table, trace
from benchmarks.reasoner.task import check, eval_problem


def test_a_trace_follows_from_its_arguments() -> None:
    turns = trace(6, 40, 12, "zipf", 3)
    assert turns == trace(6, 40, 12, "zipf", 3)
    assert turns != trace(6, 40, 12, "zipf", 4)
    assert {turn.problem.lines for turn in turns} == {12}
    asked: dict[int, list[int]] = {}
    for turn in turns:
        assert turn.back == (turn.context in asked)
        asked.setdefault(turn.context, []).append(turn.problem.asked)
    # The first context comes most often, and a context is asked for another variable each time.
    assert max(asked, key=lambda context: len(asked[context])) == 0
    for lines in asked.values():
        assert all(12 - QUESTIONS <= line < 12 for line in lines)
        assert len(set(lines[:QUESTIONS])) == min(len(lines), QUESTIONS)


def test_round_order_goes_round() -> None:
    assert [turn.context for turn in trace(3, 7, 8, "round", 0)] == [0, 1, 2, 0, 1, 2, 0]


def test_a_new_question_changes_the_last_line_only() -> None:
    problem = eval_problem(1, 20, 20)
    for line in range(20 - QUESTIONS, 20):
        other = ask(problem, line)
        assert other.prompt.rsplit(";", 1)[0] == problem.prompt.rsplit(";", 1)[0]
        assert other.answer == problem.values[line]
        assert check(other, other.chain)
    assert ask(problem, problem.asked) == problem


def answer(
    turn: Turn, cached: int, right: bool = True, bits: tuple[int, float] | None = None
) -> tuple[float, dict[str, Any]]:
    meta: dict[str, Any] = {"prompt_tokens": 100, "cached_tokens": cached, "finish_reason": {"type": "stop"}}
    if bits:
        meta["pmkvq_kv_bits"] = [{"lowest": bits[0], "mean": bits[1]}]
    return 0.001 * (100 - cached), {"text": turn.problem.chain if right else "#", "meta_info": meta}


def test_figures_of_hits_and_misses() -> None:
    turns = trace(2, 8, 8, "round", 0)
    answers = [
        answer(turns[0], 0),
        answer(turns[1], 0, bits=(4, 9.0)),
        answer(turns[2], 80, right=False, bits=(2, 4.0)),
        answer(turns[3], 60, bits=(8, 12.0)),
        answer(turns[4], 40, bits=(16, 16.0)),
        answer(turns[5], 0, right=False),
        answer(turns[6], 0),
        answer(turns[7], 20),
    ]
    got = figures(turns, answers)
    assert got["hit_rate"] == 200 / 800
    assert got["hit_rate_of_returns"] == round(200 / 600, 4)
    assert got["hit_rate_by_part"] == [0.0, 0.7, 0.2, 0.1]
    assert (got["all_right"], got["all_answers"]) == (6, 8)
    assert (got["cold_right"], got["cold_answers"]) == (1, 2)
    assert (got["cold_lowest_bits"], got["cold_mean_bits"]) == (2, 8.0)
    assert (got["ttft_hit_p50_ms"], got["ttft_miss_p50_ms"]) == (30.0, 100.0)


def test_an_aborted_request_has_no_figures() -> None:
    turns = trace(1, 1, 8, "round", 0)
    ((first_s, got),) = [answer(turns[0], 0)]
    got["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory"}
    with pytest.raises(RuntimeError, match="out of memory"):
        figures(turns, [(first_s, got)])


@pytest.mark.parametrize("arguments", [("--turns", "0"), ("--lines", "7"), ("--pool-bytes", "x"), ("--methods", "x")])
def test_wrong_options_are_one_sentence_and_status_2(
    arguments: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*arguments, "--out", str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pmkvq bench prefix: ")
    assert said.count("\n") == 1


@pytest.mark.server
@pytest.mark.full
def test_a_small_replay_keeps_more_than_stock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Contexts go round; stock's bytes hold less than one round, ours more."""
    out = tmp_path / "prefix.json"
    argv = [
        *("--methods", "stock,age-4", "--pool-bytes", "2MiB", "--contexts", "4", "--turns", "12", "--lines", "16"),
        *("--order", "round", "--concurrency", "1", "--chunk", "64", "--out", str(out)),
    ]
    assert bench.main(argv) == 0
    result = json.loads(out.read_text())
    stock, ours = result["rows"]
    assert ours["hit_rate"] > stock["hit_rate"]
    assert ours["shrinks"] > 0
    assert ours["cold_answers"] > 0
    assert stock["all_right"] >= 10
    printed = capsys.readouterr().out.strip()
    assert printed == rows_table(result)
    # Nothing is left to measure.
    assert bench.main(argv) == 0
    assert capsys.readouterr().out.strip() == printed
