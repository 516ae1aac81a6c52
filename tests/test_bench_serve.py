"""``pmkvq bench serve``: what it makes of the client's output, ratios, and a run that was killed half way."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import serve as bench
from benchmarks.harness.experiment import Job
from benchmarks.harness.methods import Method, bytes_per_token
from benchmarks.harness.results import Results
from benchmarks.harness.servers import REASONER, Server
from benchmarks.serve import Bench, Profile, client_figures, compare_answers, groups, profiles, rows_table, summary


def options(**given: str) -> argparse.Namespace:
    return argparse.Namespace(
        **{"profiles": "random", "random": "8,8", "shared_prefix": "32,8,8", "long_cot": "8,16", **given}
    )


def test_profiles_come_with_their_lengths() -> None:
    got = profiles(options(profiles="long-cot,shared-prefix"))
    assert got == [Profile("long-cot", 0, 8, 16), Profile("shared-prefix", 32, 8, 8)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profiles": "chat"}, "'chat' is unknown; expected some of random,shared-prefix,long-cot"),
        ({"random": "8"}, "--random 8: expected input,output tokens"),
        ({"random": "8,0"}, "--random 8,0: expected positive whole numbers"),
        ({"profiles": "shared-prefix", "shared_prefix": "8,8"}, "--shared-prefix 8,8: expected system,question,output"),
    ],
)
def test_wrong_profiles_say_what_is_allowed(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profiles(options(**given))


@pytest.mark.parametrize(
    "arguments",
    [("--concurrency", "0"), ("--pool-bytes", "much"), ("--methods", "stock,none-2"), ("--rounds", "0")],
)
def test_wrong_options_are_one_sentence_and_status_2(
    arguments: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*arguments, "--out", str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pmkvq bench serve: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_a_shared_prefix_is_needed_once_per_group() -> None:
    profile = Profile("shared-prefix", 512, 32, 128)
    assert profile.requests(5) == 8
    assert profile.tokens(1) == 512 + 160
    assert profile.tokens(5) == 2 * 512 + 5 * 160
    assert Profile("long-cot", 0, 30, 1024).tokens(2) == 2 * 1056


@pytest.mark.parametrize("name", ["random", "long-cot"])
def test_lengths_are_those_that_the_client_draws(name: str, tmp_path: Path) -> None:
    from sglang.benchmark.datasets.random import sample_random_requests
    from transformers import AutoTokenizer

    profile = Profile(name, 0, 40, 30)
    tokenizer = AutoTokenizer.from_pretrained(bench.word_tokenizer(tmp_path, 50))
    ratio = float(profile.client_args(16)[-1])
    np.random.seed(5)  # noqa: NPY002 - as the client does
    rows = sample_random_requests(40, 30, 16, ratio, tokenizer, "", random_sample=False, return_text=False)
    assert profile.output_lengths(16, 5) == [row.output_len for row in rows]
    assert (len(set(profile.output_lengths(16, 5))) == 1) == (name == "long-cot")


def test_every_id_is_one_visible_word(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.word_tokenizer(tmp_path, 300))
    ids = list(range(300))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(text.split()) == 300
    assert tokenizer.encode(text) == ids


def client_output(**changes: Any) -> dict[str, Any]:
    out = {
        "completed": 2, "errors": ["", ""], "output_lens": [4, 5], "ttfts": [0.1, 0.2], "duration": 2.0,
        "output_throughput": 4.5, "median_ttft_ms": 150.0, "p99_ttft_ms": 199.0, "median_tpot_ms": 10.0,
        "p99_tpot_ms": 12.0, "median_itl_ms": 9.0, "p99_itl_ms": 20.0,
    }  # fmt: skip
    return {**out, **changes}


def test_figures_of_a_whole_run() -> None:
    figures = client_figures(client_output(), [4, 5])
    assert figures["output_tok_s"] == 4.5
    assert figures["output_tokens"] == 9
    assert (figures["ttft_p99_ms"], figures["tpot_p50_ms"], figures["itl_p99_ms"]) == (199.0, 10.0, 20.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completed": 1, "errors": ["", "Bad Request"]}, "1 of 2 requests completed: .*Bad Request"),
        ({"output_lens": [4, 3]}, r"1 answers have another length: .*\(5, 3\)"),
        ({"ttfts": [0.1, 0.0]}, "1 answers had no visible token"),
    ],
)
def test_a_run_that_was_not_whole_has_no_figures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        client_figures(client_output(**changes), [4, 5])


def test_stock_reads_prompt_and_answer_at_every_step() -> None:
    out = {"input_lens": [10, 20, 7], "output_lens": [3, 2, 1]}
    # Contexts of the three decode steps: 11 and 12, 21; the last request needs none.
    assert bench.stock_read_bytes(out, 2.0, 4) == round(2 * 4 * (11 + 12 + 21) / 3, 2)
    assert bench.stock_read_bytes(out, None, 4) is None
    assert bench.stock_read_bytes({"input_lens": [7], "output_lens": [1]}, 1.0, 4) is None


def test_an_unshrunk_first_answer_must_be_the_baselines() -> None:
    figures: dict[str, Any] = {"shrinks": 0}
    compare_answers(figures, ["a", "b"], ["a", "c"], exact=True)
    assert figures["answers_equal"] == 1
    with pytest.raises(RuntimeError, match="nothing shrank, yet"):
        compare_answers({"shrinks": 0}, ["a"], ["b"], exact=True)
    compare_answers({"shrinks": 1}, ["a"], ["b"], exact=True)
    compare_answers({"shrinks": 0}, ["a"], ["b"], exact=False)


def test_the_baseline_is_in_every_group_and_what_is_measured_stays_together() -> None:
    names = ["stock", "age-8", "age-4", "age-2"]
    assert groups(names, [], 9) == [names]
    assert groups(names, [], 3) == [["stock", "age-8", "age-4"], ["stock", "age-2"]]
    assert groups(names, [], 1) == [["stock", "age-8"], ["stock", "age-4"], ["stock", "age-2"]]
    assert groups(names, [["stock", "age-4"]], 9) == [["stock", "age-4"], ["stock", "age-8", "age-2"]]
    assert groups(["stock"], [], 9) == [["stock"]]


def row(repeat: int, of: dict[str, tuple[float, float]]) -> dict[str, Any]:
    rest = {
        "duration_s": 1.0, "ttft_p50_ms": 1.0, "ttft_p99_ms": 1.0, "itl_p50_ms": 1.0, "itl_p99_ms": 1.0, "shrinks": 0,
        "shrink_s": 0.0, "logical_tokens": 100, "retractions": 0, "running_peak": 1, "running_mean": None,
        "kv_read_bytes_per_step": None, "scheduler_cpu_s": 0.5, "output_tokens": 100,
    }  # fmt: skip
    return {
        "key": {"profile": "random", "concurrency": 1, "repeat": repeat, "methods": list(of)},
        "saturated": True,
        "of": {name: {**rest, "output_tok_s": speed, "tpot_p50_ms": tpot} for name, (speed, tpot) in of.items()},
    }


def test_ratios_are_made_within_a_repeat() -> None:
    rows = [
        row(0, {"stock": (100.0, 10.0), "age-2": (200.0, 5.0)}),
        row(1, {"stock": (10.0, 100.0), "age-2": (30.0, 40.0)}),
        row(2, {"stock": (50.0, 20.0), "age-2": (60.0, 20.0)}),
        {"key": {"method": "stock-fp8"}, "missing": "no fp8 here"},
    ]
    stock, ours = summary({"rows": rows})
    assert stock["output_tok_s"] == 50.0
    assert stock["tok_s_ratio"] is None
    assert ours["output_tok_s"] == 60.0
    assert ours["tok_s_ratio"] == (2.0, 1.2, 3.0)
    assert ours["tpot_ratio"] == (0.5, 0.4, 1.0)
    text = rows_table({"rows": rows})
    assert "| age-2 | 60 | 2.00 (1.20-3.00) | 20.00 | 0.50 (0.40-1.00) | -, 1 | 0 |" in text
    assert "| - | 5.00 |" in text
    assert "Missing: stock-fp8: no fp8 here" in text


# -- real servers --------------------------------------------------------------------------------------------

POOL = 1 << 20
ARGV = [
    *("--methods", "stock,age-2", "--pool-bytes", str(POOL), "--profiles", "long-cot,shared-prefix"),
    *("--concurrency", "1,4", "--rounds", "1", "--long-cot", "16,112", "--shared-prefix", "64,8,8", "--chunk", "64"),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("serve")
    with contextlib.ExitStack() as stack:
        started: dict[str, Server] = {}

        class Starts(Bench):
            """Keeps the servers that the benchmark starts."""

            def jobs(self) -> Iterator[Job]:
                started.update(self._start(stack, list(self.methods)))
                yield from ()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench, "Bench", Starts)
            tokenizer = bench.word_tokenizer(folder / "tokenizer", 624)
            assert bench.main([*ARGV, "--tokenizer", str(tokenizer), "--out", str(folder / "start.json")]) == 0
        yield started


def attach(servers: dict[str, Server], patch: pytest.MonkeyPatch) -> None:
    """The benchmark uses these servers instead of starting its own."""
    patch.setattr(Bench, "_start", lambda self, stack, group: {name: servers[name] for name in group})


@pytest.mark.full
@pytest.mark.server
def test_a_killed_run_goes_on_and_ends_with_the_same_table(
    servers: dict[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attach(servers, monkeypatch)
    out = tmp_path / "serve.json"
    argv = [*ARGV, "--repeats", "2", "--out", str(out)]
    # Forked, so that it has the servers and need not import anything.
    killed = multiprocessing.get_context("fork").Process(target=bench.main, args=(argv,))
    killed.start()
    end = time.monotonic() + 120
    while not (out.exists() and len(json.loads(out.read_text())["rows"]) >= 2):
        assert killed.is_alive()
        assert time.monotonic() < end
        time.sleep(0.05)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    before = json.loads(out.read_text())["rows"]
    assert 2 <= len(before) < 8

    assert bench.main(argv) == 0
    result = json.loads(out.read_text())
    assert result["rows"][: len(before)] == before
    keys = [tuple(row["key"].values())[:3] for row in result["rows"]]
    cells = [(profile, c) for profile in ("long-cot", "shared-prefix") for c in (1, 4)]
    assert keys == [(*cell, repeat) for repeat in range(2) for cell in cells]
    assert [row["first"] for row in result["rows"]] == 4 * ["stock"] + 4 * ["age-2"]
    capsys.readouterr()

    # Everything is there: nothing is measured, and the table is the same.
    assert bench.main(argv) == 0
    assert capsys.readouterr().out.strip() == rows_table(result)
    assert json.loads(out.read_text()) == result
    check_rows(result["rows"])


def check_rows(rows: list[dict[str, Any]]) -> None:
    stock_tokens = POOL // bytes_per_token(REASONER)
    for row in rows:
        stock, ours = row["of"]["stock"], row["of"]["age-2"]
        saturated = row["key"]["profile"] == "long-cot" and row["key"]["concurrency"] == 4
        assert row["saturated"] == saturated
        assert stock["logical_tokens"] == row["stock_tokens"] == stock_tokens
        assert ours["logical_tokens"] > stock_tokens
        assert ours["storage_bytes"] <= POOL
        for figures in (stock, ours):
            assert figures["running_mean"] is None or 1 <= figures["running_mean"] <= figures["running_peak"]
            assert figures["output_tok_s"] * figures["duration_s"] == pytest.approx(figures["output_tokens"], rel=0.01)
            assert figures["ttft_p50_ms"] > 0
            assert figures["scheduler_cpu_s"] > 0
            assert figures["tpot_p50_ms"] > 0
        if saturated:
            assert stock["running_peak"] < 4 or stock["retractions"] > 0
            assert ours["shrinks"] > 0
            assert 0 < ours["shrink_s"] < ours["duration_s"]
            assert ours["running_peak"] == 4
            assert ours["retractions"] == 0
        elif row["key"]["profile"] == "long-cot":
            assert ours["shrinks"] == 0
            assert ours["answers_equal"] == ours["requests"] == 1


@pytest.mark.full
@pytest.mark.server
def test_a_refused_request_leaves_no_time(servers: dict[str, Server], tmp_path: Path) -> None:
    """More tokens than the server accepts: it refuses within the stream, which the client takes for a success."""
    tokenizer = bench.word_tokenizer(tmp_path / "tokenizer", 624)
    profile = Profile("long-cot", 0, 8000, 1000)
    out = bench.run_client(servers["stock"].url, tokenizer, tmp_path, profile, 1, 1, 0)
    with pytest.raises(RuntimeError, match="1 answers had no visible token: the server refused them"):
        client_figures(out, [1000])


def test_row_of_a_resumed_run_with_a_further_method_is_beside_the_baseline(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json", "serve", {}, [])
    results.add({"profile": "random", "concurrency": 1, "repeat": 0, "methods": ["stock", "age-2"]}, of={})
    done = [row["key"]["methods"] for row in results.rows]
    assert groups(["stock", "age-2", Method.parse("age-4").name], done, 4)[1] == ["stock", "age-4"]
