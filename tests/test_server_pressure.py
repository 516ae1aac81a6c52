"""One server with the bundled model and a pool too small for 16 bits: shrinking, sharing, reuse, what it reports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import requests

from benchmarks.harness.methods import PAGE, bytes_per_token
from benchmarks.harness.servers import REASONER, STRICT, Server, generate_many, serve
from benchmarks.harness.tasks import problem_set, prompt_ids, random_prompts
from benchmarks.reasoner.task import check, messages
from tests.support.servers import metrics

pytestmark = pytest.mark.server

PROBLEMS = problem_set(8, 60, 80)
POOL = 5 << 20
ASK_BITS = {"pmkvq_kv_bits": True}


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("timeline") / "timeline.jsonl"


@pytest.fixture(scope="module")
def server(timeline: Path) -> Iterator[Server]:
    args = [
        "--pmkvq-pool-bytes", str(POOL), "--max-running-requests", "18", "--chunked-prefill-size", "256",
        "--decode-log-interval", "8", "--enable-metrics", "--pmkvq-timeline", str(timeline),
        "--enable-cache-report",
    ]  # fmt: skip
    with serve(REASONER, args, env=STRICT) as running:
        yield running
        assert not running.errors()


@pytest.fixture(autouse=True)
def _nothing_left(server: Server) -> Iterator[None]:
    server.flush()
    server.mark()
    yield
    server.flush()
    pool = server.pool()
    assert (pool["mapped_pages"], pool["running_requests"], pool["used_bytes"]) == (0, 0, 0)


def test_start_up_says_what_the_flags_resolved_to(server: Server) -> None:
    pool = server.pool()
    assert pool["storage_bytes"] <= POOL
    assert pool["stock_tokens"] == POOL // bytes_per_token(REASONER) // PAGE * PAGE
    assert pool["logical_tokens"] > 2 * pool["stock_tokens"]
    line = next(x for x in server.log().splitlines() if "pmkvq pool:" in x)
    for part in (f"{pool['logical_tokens']} logical tokens", f"({pool['stock_tokens']} at 16 bits", "layers 0-5 K4/V4"):
        assert part in line
    assert server.info()["kv_quant"] == "pmkvq"


def test_problems_shrink_finish_and_are_right(server: Server) -> None:
    ids, _ = prompt_ids(REASONER, PROBLEMS)
    before = server.pool()["shrinks"]
    bodies = [
        {"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 1200, "custom_params": ASK_BITS}}
        for p in ids
    ]
    answers = generate_many(server, bodies, len(bodies))
    right = sum(check(p, a["text"]) for p, a in zip(PROBLEMS, answers, strict=True))
    assert right >= len(PROBLEMS) - 1
    assert all(a["meta_info"]["finish_reason"]["type"] == "stop" for a in answers)
    assert server.retracted() == 0
    assert server.peak_running() >= 4
    shrinks = server.pool()["shrinks"]
    assert shrinks["16->8"] > before.get("16->8", 0)
    bits = [a["meta_info"]["pmkvq_kv_bits"] for a in answers]
    assert all(len(b) == 1 and b[0]["lowest"] <= b[0]["mean"] <= 16 for b in bits)
    assert min(b[0]["lowest"] for b in bits) < 16
    assert "#pages 16/8/4/2:" in server.new_log()
    assert "eff bits:" in server.new_log()


@pytest.mark.parametrize("stream", [False, True])
def test_meta_info_tells_those_who_asked_and_no_one_else(server: Server, stream: bool) -> None:
    """Requests that end at different times share messages with others that are in mid-answer.

    Without streaming SGLang sends what it has every 50 tokens, so that is where those who asked end.
    """
    bodies = []
    lengths = [50 * (1 + i // 2) if i % 2 else 330 for i in range(12)]
    for i, prompt in enumerate(random_prompts(11, 12, 20, 100)):
        params = {"temperature": 0, "max_new_tokens": lengths[i], "ignore_eos": True}
        if i % 2:
            params["custom_params"] = ASK_BITS
        bodies.append({"input_ids": prompt, "sampling_params": params, "stream": stream})

    def last(body: dict[str, Any]) -> dict[str, Any]:
        with requests.post(f"{server.url}/generate", json=body, stream=stream, timeout=300) as response:
            if not stream:
                return response.json()
            lines = [x for x in response.iter_lines(decode_unicode=True) if x.startswith("data: {")]
        assert all("pmkvq_kv_bits" not in json.loads(x.removeprefix("data: "))["meta_info"] for x in lines[:-1])
        return json.loads(lines[-1].removeprefix("data: "))

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(last, bodies))
    for i, answer in enumerate(answers):
        assert answer["meta_info"]["completion_tokens"] == lengths[i]
        if i % 2:
            assert answer["meta_info"]["pmkvq_kv_bits"] == [{"lowest": ANY, "mean": ANY}]
        else:
            assert "pmkvq_kv_bits" not in answer["meta_info"]


def test_prometheus_agrees_with_the_ledger(server: Server) -> None:
    ids, _ = prompt_ids(REASONER, PROBLEMS)
    bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 300}} for p in ids]
    generate_many(server, bodies, len(bodies))
    samples, pool = metrics(server), server.pool()
    prefix = "sglang:pmkvq_"
    assert samples[f"{prefix}storage_bytes"] == pool["storage_bytes"]
    assert samples[f"{prefix}logical_tokens"] == pool["logical_tokens"]
    for name in ("effective_bits", "effective_bits_avg", "effective_bits_peak"):
        assert samples[f"{prefix}{name}"] > 0
    assert samples[f"{prefix}used_bytes_peak"] >= samples[f"{prefix}used_bytes_avg"] > 0
    for tier in (16, 8, 4, 2):
        assert f"{prefix}pages{{tier={tier}}}" in samples
        assert f"{prefix}bytes{{tier={tier}}}" in samples
    shrunk = {k: v for k, v in samples.items() if k.startswith(f"{prefix}shrinks_total")}
    assert sum(shrunk.values()) > 0
    assert samples[f"{prefix}shrinks_total{{from=16,to=8}}"] <= pool["shrinks"]["16->8"]
    assert samples[f"{prefix}shrunk_bytes_total{{from=16,to=8}}"] > 0
    assert f"{prefix}protected_pages{{kind=hard}}" in samples
    assert samples[f"{prefix}dropped_rows_total"] == samples[f"{prefix}unmapped_reads_total"] == 0
    assert samples["sglang:max_total_num_tokens"] == pool["logical_tokens"]


def test_shared_prefix_exists_once_and_shrinks_once(server: Server) -> None:
    """16 requests over one 1,000-token prefix, then a 17th that hits it."""
    tail = random_prompts(3, 17, 24, 100)
    prefix = random_prompts(2, 1, 1008, 100)[0]
    server.generate(input_ids=prefix, sampling_params={"temperature": 0, "max_new_tokens": 1})
    assert server.pool()["mapped_pages"] == len(prefix) // PAGE
    bodies = [
        {"input_ids": prefix + t, "sampling_params": {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}}
        for t in tail[:16]
    ]
    before = server.pool()["shrinks"]
    held = []
    with ThreadPoolExecutor(1) as background:
        running = background.submit(generate_many, server, bodies, 16)
        while not running.done():
            pool = server.pool()
            held.append((pool["running_requests"], pool["mapped_pages"]))
            time.sleep(0.2)
        answers = running.result()
    assert all(a["meta_info"]["cached_tokens"] == len(prefix) for a in answers)
    pool = server.pool()
    held.append((pool["running_requests"], pool["mapped_pages"]))
    assert max(requests_running for requests_running, _ in held) == 16
    # The prefix's pages exist once, not once per request: all that is ever mapped is one prefix and the tails.
    most = len(prefix) // PAGE + 16 * math.ceil((24 + 150) / PAGE)
    assert max(pages for _, pages in held) <= most
    # And each page shrinks once per step, its K and its V, however many requests share it.
    for step in ("16->8", "8->4"):
        assert pool["shrinks"].get(step, 0) - before.get(step, 0) <= 2 * most
    assert pool["shrinks"]["16->8"] > before.get("16->8", 0)
    (last,) = generate_many(server, [{**bodies[0], "input_ids": prefix + tail[16]}], 1)
    assert last["meta_info"]["cached_tokens"] == len(prefix)


def test_three_turns_hit_the_pages_of_earlier_answers(server: Server) -> None:
    problems = problem_set(3, 12, 16, first=500)
    chat: list[dict[str, str]] = []
    held = 0
    for turn, problem in enumerate(problems):
        chat += messages(problem)
        response = requests.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "default", "messages": chat, "temperature": 0, "max_tokens": 400},
            timeout=600,
        ).json()
        usage = response["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        if turn:
            # All whole pages of what the previous turn held, its answer included.
            assert cached >= held // PAGE * PAGE - PAGE
        held = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        chat.append({"role": "assistant", "content": response["choices"][0]["message"]["content"]})


def test_abort_in_mid_stream_frees_everything(server: Server) -> None:
    body = {
        "input_ids": random_prompts(5, 1, 300, 100)[0],
        "sampling_params": {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True},
        "stream": True,
    }
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)
    # Leaving the block drops the connection; the fixture checks that nothing stays behind.
    requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=60)


def test_timeline_becomes_a_picture(server: Server, timeline: Path, tmp_path: Path) -> None:
    server.generate(input_ids=[5] * 64, sampling_params={"temperature": 0, "max_new_tokens": 32, "ignore_eos": True})
    lines = [json.loads(x) for x in timeline.read_text().splitlines()]
    assert any("bytes" in x for x in lines)
    picture = tmp_path / "timeline.png"
    subprocess.run(
        [sys.executable, "-m", "sglang_pmkvq.tools.cli", "report", str(timeline), "--out", str(picture)],
        check=True,
        capture_output=True,
    )
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
