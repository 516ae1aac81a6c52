"""One server whose free bytes are NaN before every forward: isolation, starvation, bad requests, and its violent end.

The pool holds one request of about 3,000 tokens. The planted fault (``tests/support/faulty_server.py``) overwrites
every byte that no page owns, and the block of every page born for the coming forward, so an answer that is right was
computed from nothing but what its own request, or the prefix that it may share, has written.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.harness.results import ROOT
from benchmarks.harness.servers import REASONER, STRICT, Server, ServerFailed, generate_many, scheduler_pid, serve
from benchmarks.harness.tasks import problem_set, prompt_ids, random_prompts
from benchmarks.reasoner.task import check

pytestmark = pytest.mark.server

FAULTY = (sys.executable, "-m", "tests.support.faulty_server")
ARGS = [
    "--pmkvq-pool-bytes", "3MiB", "--max-running-requests", "4", "--chunked-prefill-size", "128",
    "--schedule-conservativeness", "0.1", "--decode-log-interval", "8", "--enable-metrics", "--enable-cache-report",
]  # fmt: skip
# A lone retraction may repeat while others run; a livelock would pass any bound.
WATCHDOG = 64


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    env = {**STRICT, "PMKVQ_FAULT": "poison"}
    with serve(REASONER, [*ARGS, "--pmkvq-timeline", "/dev/full"], env=env, command=FAULTY) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    if "server" not in request.fixturenames:
        yield
        return
    server: Server = request.getfixturevalue("server")
    server.flush()
    server.mark()
    yield
    if server.process.poll() is None:
        idle(server)
        server.flush()
        pool = server.pool()
        assert (pool["mapped_pages"], pool["running_requests"], pool["used_bytes"]) == (0, 0, 0)
        assert requests.get(f"{server.url}/health_generate", timeout=60).status_code == 200
        assert not server.errors(since_mark=True)


def idle(server: Server) -> None:
    for _ in range(300):
        if not server.pool()["running_requests"]:
            return
        time.sleep(0.1)
    raise AssertionError("requests still run after half a minute")


def filler(prompt: list[int], new: int) -> dict[str, Any]:
    return {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}}


def test_timeline_on_a_full_disk_stops_nothing(server: Server) -> None:
    assert server.generate(**filler([9] * 20, 4))["meta_info"]["completion_tokens"] == 4
    assert server.log().count("cannot be written") == 1
    assert "serving goes on without it" in server.log()


# -- isolation -----------------------------------------------------------------------------------------------


def test_free_bytes_are_never_read(server: Server) -> None:
    """Right answers out of a poisoned arena, while pages shrink, move, are freed and born again."""
    problems = problem_set(8, 40, 60, first=300)
    ids, _ = prompt_ids(REASONER, problems)
    params = {"temperature": 0, "max_new_tokens": 1000}
    answers = generate_many(server, [{"input_ids": p, "sampling_params": params} for p in ids], 8)
    assert sum(check(p, a["text"]) for p, a in zip(problems, answers, strict=True)) >= len(problems) - 1
    assert server.pool()["shrinks"]["8->4"] > 0
    assert "poisoned" in server.log()


def test_cached_pages_are_shared_only_within_a_key(server: Server) -> None:
    prompt = random_prompts(21, 1, 200, 100)[0]

    def cached(key: str | None) -> int:
        return server.generate(**filler(prompt, 2), extra_key=key)["meta_info"]["cached_tokens"]

    assert [cached("a"), cached("b"), cached(None)] == [0, 0, 0]
    assert [cached("a"), cached("b"), cached(None)] == [192, 192, 192]


def test_nothing_that_is_observed_holds_a_prompt(server: Server) -> None:
    secret = "t91=:7;t92=:4;t93=t91+t92;t94=t93"
    server.generate(text=secret, sampling_params={"max_new_tokens": 8})
    seen = requests.get(f"{server.url}/metrics", timeout=60).text + json.dumps(server.info()) + server.log()
    assert secret not in seen
    assert "t91" not in seen


def listening(server: Server) -> set[tuple[str, int]]:
    tree = [psutil.Process(server.process.pid)]
    tree += tree[0].children(recursive=True)
    found = set()
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr[:2] for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


# -- starvation ----------------------------------------------------------------------------------------------


def test_request_that_can_never_fit_is_refused_with_what_would(server: Server) -> None:
    tokens = server.pool()["logical_tokens"]
    response = requests.post(f"{server.url}/generate", json=filler([7] * (tokens + 1), 1), timeout=60)
    assert response.status_code == 400
    said = response.json()["error"]["message"]
    assert f"({tokens + 1} tokens)" in said
    allowed = int(said.split("maximum allowed length (")[1].split()[0])
    assert allowed == tokens - 2 * 16 + 1
    answer = server.generate(**filler([7] * (allowed - 1), 9))
    assert answer["meta_info"]["completion_tokens"] == 9
    assert "Traceback" not in server.new_log()
    server.mark()  # SGLang logs each refusal as an error


def watched(server: Server, bodies: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int, int]:
    """Answers, the most pages mapped and the most retractions since a request ended while they were made."""
    most = stuck = 0
    with ThreadPoolExecutor(1) as background:
        running = background.submit(generate_many, server, bodies, len(bodies))
        while not running.done():
            pool = server.pool()
            most, stuck = max(most, pool["mapped_pages"]), max(stuck, pool["retractions_since_finish"])
            time.sleep(0.1)
        answers = running.result()
    pool = server.pool()
    return answers, max(most, pool["mapped_pages"]), stuck


def test_exactly_full(server: Server) -> None:
    """One request grows until SGLang admits no more of it, at the final tiers; then three that only fit alone."""
    tokens = server.pool()["logical_tokens"]
    (answer,), most, _ = watched(server, [filler(random_prompts(22, 1, tokens - 100, 100)[0], 1000)])
    meta = answer["meta_info"]
    assert meta["finish_reason"]["type"] == "length"
    # SGLang keeps one page back for whoever is admitted.
    assert tokens - 2 * 16 <= meta["prompt_tokens"] + meta["completion_tokens"] < tokens
    assert most >= tokens // 16 - 2
    bodies = [filler(p, 120) for p in random_prompts(23, 3, int(0.6 * tokens), 100)]
    answers, _, stuck = watched(server, bodies)
    assert all(a["meta_info"]["completion_tokens"] == 120 for a in answers)
    assert stuck < WATCHDOG


@pytest.mark.full
def test_far_too_much_at_once_is_no_livelock(server: Server) -> None:
    """Twice the pool, admitted boldly: requests are retracted, all of them end, and the watchdog stays low."""
    tokens = server.pool()["logical_tokens"]
    bodies = [filler(p, int(0.3 * tokens)) for p in random_prompts(24, 5, int(0.06 * tokens), 100)]
    answers, most, stuck = watched(server, bodies)
    assert all(a["meta_info"]["completion_tokens"] == int(0.3 * tokens) for a in answers)
    assert server.retracted() > 0
    assert most >= 0.9 * tokens / 16
    assert stuck < WATCHDOG
    assert server.pool()["retractions_since_finish"] == 0


# -- bad requests --------------------------------------------------------------------------------------------

EDGES = st.sampled_from([-(1 << 63), -1, 0, 1, 15, 16, 17, 255, 1 << 31, 1 << 63]) | st.integers(-5, 300)
JSON = st.recursive(
    st.none() | st.booleans() | EDGES | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("pmkvq_kv_bits"), inner),
    max_leaves=5,
)
IS_JSON = {"Content-Type": "application/json"}
TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=40)
PARAMS: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.integers(0, 20) | st.sampled_from([-1, None, 1 << 40, "x"]),
    "temperature": st.just(0) | JSON,
    "custom_params": JSON | st.fixed_dictionaries({"pmkvq_kv_bits": JSON}),
    "ignore_eos": st.booleans(),
}
BODY: dict[str, st.SearchStrategy[Any]] = {
    "input_ids": TOKENS | st.lists(TOKENS, min_size=1, max_size=3) | JSON,
    "text": st.text(max_size=30),
    "stream": st.booleans() | JSON,
    "extra_key": st.text(max_size=5) | JSON,
    "rid": st.text(max_size=5) | JSON,
    "priority": EDGES,
    "return_logprob": st.booleans(),
    "sampling_params": st.fixed_dictionaries({}, optional=PARAMS) | JSON,
}


def calls(schema: dict[str, Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Requests to what we touch, as far as the server's own schema knows it; one in three keeps to the types."""
    known = schema["components"]["schemas"]["GenerateReqInput"]["properties"]
    assert set(BODY) <= set(known), set(BODY) - set(known)
    good = st.fixed_dictionaries({"input_ids": TOKENS, "sampling_params": st.fixed_dictionaries({}, optional=PARAMS)})
    wild = st.fixed_dictionaries({}, optional=BODY)
    paths = ("/abort_request", "/flush_cache", "/pause_generation", "/continue_generation")
    assert {"/generate", *paths} <= set(schema["paths"])
    other = st.tuples(
        st.sampled_from(paths),
        st.fixed_dictionaries({}, optional={"rid": JSON, "abort_all": JSON, "mode": st.just("in_place") | JSON}),
    )
    return st.tuples(st.just("/generate"), good | wild) | st.tuples(st.just("/generate"), wild) | other


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input_ids": [], "text": ""}, "the prompt has no token"),
        ({"input_ids": [[7, 8], []]}, "the prompt has no token"),
        ({"input_ids": [7, 8], "extra_key": []}, "extra_key of a request must be one string, got []"),
        ({"input_ids": [7, 8], "extra_key": ["a"]}, "extra_key of a request must be one string, got ['a']"),
    ],
)
def test_what_ends_stock_is_refused(server: Server, body: dict[str, Any], says: str) -> None:
    """An empty prompt ends the scheduler of stock SGLang 0.5.15, a list as ``extra_key`` with its second request."""
    response = requests.post(f"{server.url}/generate", json={**body, "sampling_params": {}}, timeout=60)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert "Traceback" not in server.new_log()
    server.mark()  # SGLang logs each refusal as an error


def fuzz(server: Server, examples: int) -> dict[int, int]:
    """Random calls; after each batch the server is healthy and empty. Returns calls per status."""
    schema = requests.get(f"{server.url}/openapi.json", timeout=60).json()
    seen: dict[int, int] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls(schema))
    def run(call: tuple[str, dict[str, Any]]) -> None:
        path, body = call
        try:
            # Infinity is written as Python's json writes it, which is no JSON; servers meet that too.
            status = requests.post(f"{server.url}{path}", json.dumps(body), headers=IS_JSON, timeout=3).status_code
        except requests.Timeout:  # asked to wait for ever: it runs, or is paused
            status = 0
        except requests.exceptions.ChunkedEncodingError:  # SGLang's handler raised once a stream had begun (rid=[])
            status = -1
        seen[status] = seen.get(status, 0) + 1
        if path == "/pause_generation":
            requests.post(f"{server.url}/continue_generation", json={}, timeout=20)
        assert server.process.poll() is None, (call, server.log()[-3000:])

    run()
    requests.post(f"{server.url}/continue_generation", json={}, timeout=20)
    requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=20)
    return seen


def through_our_files(log: str) -> list[str]:
    """Lines of tracebacks in our package, wherever the repository lies."""
    ours = [f'File "{ROOT}/{folder}/' for folder in ("sglang_pmkvq", "kernels", "patches", "calib")]
    return [line for line in log.splitlines() if any(part in line for part in ours)]


def test_random_requests(server: Server) -> None:
    pid = scheduler_pid(server)
    seen = fuzz(server, 60)
    assert seen.get(200, 0) >= 5
    assert seen.get(400, 0) + seen.get(422, 0) >= 5
    assert psutil.pid_exists(pid)
    assert not through_our_files(server.new_log())
    server.mark()  # SGLang's own handlers write tracebacks about some of these; none goes through our files


# -- the end -------------------------------------------------------------------------------------------------


def ends(server: Server, within_s: float) -> int:
    """Exit status; no process of the server may be left, and its port must be free."""
    tree = psutil.Process(server.process.pid).children(recursive=True) if server.process.poll() is None else []
    status = server.process.wait(within_s)
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive, alive
    port = int(server.url.rsplit(":", 1)[1])
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))
    return status


def test_killed_scheduler_ends_the_server(server: Server) -> None:
    """Last in this file: kill -9 under load; the server exits by itself, not with 0, leaving nothing."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(server.generate, **filler(p, 800)) for p in random_prompts(25, 2, 50, 100)]
        time.sleep(1)
        tree = psutil.Process(server.process.pid).children(recursive=True)
        os.kill(scheduler_pid(server), signal.SIGKILL)
        assert ends(server, 90) != 0
        assert not psutil.wait_procs(tree, timeout=20)[1]
        assert all(run.exception() is not None for run in runs)
    assert "crashed with exit code -9" in server.log()


# -- faults, one server each ---------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("shrink", "injected: a shrink failed on the device"),
        ("workspace", "injected: no memory for the kernels"),
        ("ledger", "injected: no bytes can be made free"),
    ],
)
def test_fault_in_mid_service_ends_the_server_with_its_reason(fault: str, says: str, tmp_path: Path) -> None:
    """Never an answer from half a shrink: clients get an error, the log the reason, the machine its port."""
    with serve(REASONER, ARGS, env={**STRICT, "PMKVQ_FAULT": fault}, command=FAULTY, log_path=tmp_path / "log") as s:
        with pytest.raises(Exception, match=r"\w"):
            generate_many(s, [filler(p, 700) for p in random_prompts(26, 8, 300, 100)], 8)
        assert ends(s, 90) != 0
        assert says in s.log()


@pytest.mark.full
def test_arenas_that_cannot_be_allocated_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="injected: the arenas cannot be allocated"):
        with serve(REASONER, ARGS, env={"PMKVQ_FAULT": "pool"}, command=FAULTY, log_path=tmp_path / "log"):
            pass


@pytest.mark.full
def test_sigterm_under_load_drains(tmp_path: Path) -> None:
    """Whoever is running is answered to the end; then the server exits with 0 or by the signal, leaving nothing."""
    with serve(REASONER, ARGS, env=STRICT, log_path=tmp_path / "log") as s:
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(s.generate, **filler(p, 500)) for p in random_prompts(27, 4, 60, 100)]
            while s.pool()["running_requests"] < 4:
                time.sleep(0.05)
            os.kill(s.process.pid, signal.SIGTERM)
            assert all(run.result()["meta_info"]["completion_tokens"] == 500 for run in runs)
        ends(s, 90)
        assert "Draining requests" in s.log()


@pytest.mark.full
def test_clocks_that_jump_and_more_random_requests(tmp_path: Path) -> None:
    """Answers as ever with a ``time`` that jumps by years in our modules; then 1,000 random requests."""
    timeline = tmp_path / "timeline.jsonl"
    env = {**STRICT, "PMKVQ_FAULT": "clock"}
    with serve(REASONER, [*ARGS, "--pmkvq-timeline", str(timeline)], env=env, command=FAULTY) as s:
        test_exactly_full(s)
        assert timeline.read_text().count("\n") > 2
        s.flush()
        s.mark()
        seen = fuzz(s, 1000)
        print(seen)
        assert s.process.poll() is None
        assert not through_our_files(s.new_log())


@pytest.mark.full
def test_no_new_open_port(tmp_path: Path) -> None:
    """As many listening sockets as stock has, each on this machine only."""
    counts = []
    for quant in (True, False):
        args = ARGS if quant else ["--max-total-tokens", "4096"]
        with serve(REASONER, args, quant=quant) as s:
            counts.append(sorted(host for host, _ in listening(s)))
    assert counts[0] == counts[1], counts


@pytest.mark.full
@pytest.mark.parametrize("flags", [("--dp-size", "2"), ("--tp-size", "2")], ids=" ".join)
def test_two_ranks(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Where stock starts, so do we, and every rank answers; where it does not, neither do we, for its reason."""
    try:
        with serve(REASONER, ["--max-total-tokens", "8192", *flags], quant=False, log_path=tmp_path / "stock"):
            stock = True
    except ServerFailed:
        stock = False
    if not stock:
        pytest.skip(f"stock SGLang does not start here with {' '.join(flags)}")
    with serve(REASONER, [*ARGS, *flags, "--pmkvq-timeline", str(tmp_path / "t")], env=STRICT) as s:
        bodies = [filler(p, 300) for p in random_prompts(28, 8, 200, 100)]
        assert all(a["meta_info"]["completion_tokens"] == 300 for a in generate_many(s, bodies, 8))
        assert sum(s.pool()["shrinks"].values()) > 0
        written = sorted(p.name for p in tmp_path.glob("t*"))
        assert written == (["t", "t.dp1"] if "--dp-size" in flags else ["t"])
        assert not s.errors()
