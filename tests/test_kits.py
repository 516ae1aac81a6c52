"""SGLang's own server test kits, unchanged, against servers with our pool and SGLang's strict memory checks.

Kits that need a large vocabulary run on a random-weight model in a pool so small that pages shrink. Where a
kit judges content, which random weights cannot give, the bundled reasoning model answers and a program judges.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
from sglang.test import kl_test_utils
from sglang.test.kits import basic_scheduler_stress_kit, radix_cache_server_kit
from sglang.test.kits.abort_timeout_kit import AbortAllMixin, RunningTimeoutTwoWaveMixin, WaitingTimeoutMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_scheduler_stress_kit import BasicSchedulerStressMixin
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.kits.kl_divergence_kit import KLDivergenceMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from transformers import AutoTokenizer

from benchmarks.harness.servers import REASONER, STRICT, Server, generate_many, serve
from benchmarks.reasoner import task
from tests.support import kit_model
from tests.support.kits import KitCase, bind, clean, shrinks

pytestmark = pytest.mark.server

PAGE = 16
RUNNING = 32
# Two layer groups, the second with K and V of different widths, in 8,192 tokens at 16 bits.
KIT_ARGS = [
    *("--pmkvq-pool-bytes", str(8192 * kit_model.TOKEN_BYTES), "--pmkvq-final-bits", "0-1:4,2:k4v2"),
    *("--page-size", str(PAGE), "--max-running-requests", str(RUNNING), "--chunked-prefill-size", "512"),
]
REASONER_TOKEN_BYTES = 6 * 1 * 128 * 2 * 2
REASONER_ARGS = [
    *("--pmkvq-pool-bytes", str(3400 * REASONER_TOKEN_BYTES), "--pmkvq-final-bits", "8"),
    *("--page-size", str(PAGE), "--max-running-requests", "16", "--chunked-prefill-size", "512"),
]
LINES = 50
PROBLEM = task.make_problem(task.EVAL_SEED_START + 7, LINES)

# Bounds on the mean KL estimate between decode from the cache and a fresh prefill, about four times what was measured:
# 5e-5 for the reasoner at 16 bits (batch shapes differ), 7e-5 for the random-weight model with shrunk pages, whose
# logits depend little on the cache.
KL_16_BITS = 2e-4
KL_LOW_BITS = 3e-4


# -- servers and how a kit gets one --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit_model.make_kit_model(tmp_path_factory.mktemp("kit") / "model")


@pytest.fixture(scope="module")
def small_pool(model: Path) -> Iterator[Server]:
    with serve(model, KIT_ARGS, env=STRICT) as server:
        yield server


@pytest.fixture(scope="module")
def retracting(model: Path) -> Iterator[Server]:
    """SGLang retracts a running request every third forward."""
    with serve(model, KIT_ARGS, env={**STRICT, "SGLANG_TEST_RETRACT": "1"}) as server:
        yield server


@pytest.fixture(scope="module")
def reasoner() -> Iterator[Server]:
    with serve(REASONER, REASONER_ARGS, env=STRICT) as server:
        yield server


@pytest.fixture(scope="class")
def on_small_pool(request: pytest.FixtureRequest, small_pool: Server, model: Path) -> Iterator[None]:
    bind(request.cls, small_pool, model)
    with clean(small_pool):
        yield


@pytest.fixture(scope="class")
def on_retracting(request: pytest.FixtureRequest, retracting: Server, model: Path) -> Iterator[None]:
    bind(request.cls, retracting, model)
    with clean(retracting):
        yield
        assert retracting.retracted() > 0


@pytest.fixture(scope="class")
def on_retracting_alone(request: pytest.FixtureRequest, retracting: Server, model: Path) -> Iterator[None]:
    """For kits that send one request at a time, which SGLang never retracts."""
    bind(request.cls, retracting, model)
    with clean(retracting):
        yield


@pytest.fixture(scope="class")
def on_reasoner(request: pytest.FixtureRequest, reasoner: Server) -> Iterator[None]:
    bind(request.cls, reasoner, REASONER)
    with clean(reasoner):
        yield


# -- random-weight model, pages shrink -----------------------------------------------------------------------


def run_radix_kit(server: Server, monkeypatch: pytest.MonkeyPatch, nodes: int, chunk: int) -> None:
    """``run_radix_attention_test`` with a tree of ``nodes`` requests that differ by up to ``chunk`` tokens each."""
    tree = radix_cache_server_kit.gen_radix_tree
    monkeypatch.setattr(radix_cache_server_kit, "gen_radix_tree", lambda: tree(nodes, chunk))
    random.seed(nodes)
    with clean(server):
        before = shrinks(server)
        radix_cache_server_kit.run_radix_attention_test(server.url)
        assert shrinks(server) > before


def test_radix_cache(small_pool: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run_radix_kit(small_pool, monkeypatch, nodes=60, chunk=96)


@pytest.mark.full
def test_radix_cache_in_the_size_of_the_kit(small_pool: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run_radix_kit(small_pool, monkeypatch, nodes=400, chunk=256)


def run_cache_hit_kit(server: Server, model: Path, folder: Path) -> None:
    with clean(server):
        dataset = kit_model.make_sharegpt(folder / "sharegpt.json")
        result = run_multiturn_cache_hit_test(
            server.url, str(model), dataset_path=str(dataset), num_clients=6, num_rounds=3
        )
    # 3 rounds of 256 new tokens: the second finds 287 of 544 cached, the third 575 of 832, less a part page.
    assert result["overall"]["cache_hit_rate"] > 0.5


def test_cache_hit(small_pool: Server, model: Path, tmp_path: Path) -> None:
    run_cache_hit_kit(small_pool, model, tmp_path)


@pytest.mark.usefixtures("on_small_pool")
class TestAPIContract(KitCase, BasicAPIContractMixin):
    pass


@pytest.mark.usefixtures("on_small_pool")
class TestMatchedStop(KitCase, MatchedStopMixin):
    test_finish_stop_eos = None  # random weights hit the end token by chance only; see TestReasonerStop


@pytest.mark.usefixtures("on_small_pool")
class TestAbortAll(KitCase, AbortAllMixin):
    pass


@pytest.mark.usefixtures("on_small_pool")
class TestPause(KitCase, PauseResumeInPlaceMixin):
    pause_max_new_tokens = 256
    pause_duration = 2


@pytest.mark.usefixtures("on_small_pool")
class TestSchedulerStress(KitCase, BasicSchedulerStressMixin):
    # Both look for capitals in the answers; see test_stream_is_the_answer and test_kit_concurrency.
    test_streaming_response = None
    test_concurrent_requests = None


class SeededKL(KitCase, KLDivergenceMixin):
    """The KL kit with token ids put where it keeps those of the data set that it would download."""

    __test__ = False
    prompts: Sequence[list[int]]

    @classmethod
    def seed(cls) -> None:
        samples = max(kl_test_utils.DEFAULT_NUM_SAMPLES, cls.kl_div_max_samples)
        key = f"{cls.model}_{kl_test_utils.DEFAULT_PROMPT_TOKENS}_{samples}"
        kl_test_utils._cached_input_ids[key] = [list(ids) for ids in cls.prompts]


def seed_prompts(cls: type[SeededKL]) -> None:
    rng = random.Random(5)
    cls.prompts = [[rng.randrange(258, kit_model.VOCAB) for _ in range(rng.randrange(700, 1100))] for _ in range(10)]
    cls.seed()


@pytest.fixture(scope="class")
def low_bits(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prompts for the KL kit on the server that the class is bound to, whose pages must shrink meanwhile."""
    seed_prompts(request.cls)
    before = shrinks(request.cls.server)
    yield
    assert shrinks(request.cls.server) > before


class LowBitsKL(SeededKL):
    kl_div_thres = KL_LOW_BITS
    kl_div_max_samples = 10
    kl_div_prefill_max_new_tokens = 64
    kl_div_decode_max_new_tokens = 64


@pytest.mark.usefixtures("on_small_pool", "low_bits")
class TestKLDivergenceOfShrunkPages(LowBitsKL):
    __test__ = True


# -- the same with requests retracted all the time -----------------------------------------------------------


def test_radix_cache_while_retracting(retracting: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run_radix_kit(retracting, monkeypatch, nodes=40, chunk=192)
    assert retracting.retracted() > 0


@pytest.mark.usefixtures("on_retracting")
class TestMatchedStopWhileRetracting(KitCase, MatchedStopMixin):
    test_finish_stop_eos = None

    def test_many_at_once(self) -> None:
        """A lone request is never retracted."""
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(self.test_finish_length) for _ in range(4)]
            runs += [pool.submit(self.test_finish_stop_str) for _ in range(4)]
        for run in runs:
            run.result()


@pytest.mark.usefixtures("on_retracting")
class TestAbortAllWhileRetracting(KitCase, AbortAllMixin):
    pass


@pytest.mark.usefixtures("on_retracting")
class TestPauseWhileRetracting(KitCase, PauseResumeInPlaceMixin):
    pause_num_requests = 16
    pause_max_new_tokens = 64
    pause_duration = 2


def test_cache_hit_while_retracting(retracting: Server, model: Path, tmp_path: Path) -> None:
    run_cache_hit_kit(retracting, model, tmp_path)


@pytest.mark.usefixtures("on_retracting_alone")
class TestAPIContractWhileRetracting(KitCase, BasicAPIContractMixin):
    pass


@pytest.mark.usefixtures("on_retracting")
class TestSchedulerStressWhileRetracting(KitCase, BasicSchedulerStressMixin):
    test_streaming_response = None
    test_concurrent_requests = None

    def test_many_at_once(self) -> None:
        """A lone request is never retracted."""
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(self.test_long_prompt) for _ in range(4)]
        for run in runs:
            run.result()


@pytest.mark.usefixtures("on_retracting", "low_bits")
class TestKLDivergenceWhileRetracting(LowBitsKL):
    __test__ = True


# -- bundled model: the content is right ---------------------------------------------------------------------


@cache
def chat_text(problem: task.Problem) -> str:
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    return tokenizer.apply_chat_template(task.messages(problem), add_generation_prompt=True, tokenize=False)


def greedy(problem: task.Problem, **sampling: Any) -> dict[str, Any]:
    limit = problem.chain_tokens + 64
    params = {"temperature": 0, "max_new_tokens": limit, **sampling}
    return {"text": chat_text(problem), "sampling_params": params}


def questions() -> list[task.Problem]:
    """Eight problems over one program: they differ in their last line only."""
    program, start = PROBLEM.program, PROBLEM.start
    out = []
    for asked in range(LINES - 8, LINES):
        prompt, chain = task.render(program, asked, start, PROBLEM.values)
        answer = PROBLEM.values[asked]
        out.append(task.Problem(asked, start, program, asked, PROBLEM.values, prompt, chain, answer))
    return out


@pytest.fixture(scope="class")
def sixteen_bits(request: pytest.FixtureRequest, on_reasoner: None, reasoner: Server) -> Iterator[None]:
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    request.cls.prompts = [
        tokenizer.encode(chat_text(p) + p.chain[: 20 * seed])
        for seed in range(5)
        for p in [task.make_problem(task.EVAL_SEED_START + seed, 30 + 5 * seed)]
    ]
    request.cls.seed()
    before = shrinks(reasoner)
    yield
    assert shrinks(reasoner) == before


@pytest.mark.usefixtures("sixteen_bits")
class TestKLDivergenceAt16Bits(SeededKL):
    __test__ = True
    kl_div_thres = KL_16_BITS
    kl_div_max_samples = 5
    kl_div_prefill_max_new_tokens = 96
    kl_div_decode_max_new_tokens = 96


@pytest.mark.usefixtures("on_reasoner")
class TestReasonerStop(KitCase, MatchedStopMixin):
    """The kit's cases with strings that the model is known to write."""

    test_finish_stop_eos = None

    @property
    def prompt(self) -> str:
        return chat_text(PROBLEM)

    def test_finish_stop_str(self) -> None:
        self._run_completions_generation(
            prompt=self.prompt, max_tokens=1000, stop=";", finish_reason="stop", matched_stop=";"
        )
        self._run_chat_completions_generation_of_problem(stop=";", matched_stop=";")
        text = self.server.generate(**greedy(PROBLEM, stop=[";"]))["text"]
        assert text == PROBLEM.chain.split(";")[0]

    def test_finish_stop_regex_str(self) -> None:
        regex = r"\?#:\d"
        self._run_completions_generation(
            prompt=self.prompt, max_tokens=1000, stop_regex=regex, finish_reason="stop", matched_stop=regex
        )
        self._run_chat_completions_generation_of_problem(stop_regex=regex, matched_stop=regex)

    def test_finish_end_token(self) -> None:
        end = AutoTokenizer.from_pretrained(REASONER).eos_token_id
        self._run_completions_generation(prompt=self.prompt, max_tokens=1000, finish_reason="stop", matched_stop=[end])
        self._run_chat_completions_generation_of_problem(matched_stop=end)
        answer = self.server.generate(**greedy(PROBLEM))
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": end}
        assert task.check(PROBLEM, answer["text"])

    def _run_chat_completions_generation_of_problem(self, matched_stop: object, **stop: str) -> None:
        """Without the kit's system message, which the model's chat template has no word for."""
        body = {"model": self.model, "messages": task.messages(PROBLEM), "temperature": 0, "max_tokens": 1000}
        response = requests.post(f"{self.base_url}/v1/chat/completions", json={**body, **stop}, timeout=300)
        (choice,) = response.json()["choices"]
        assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", matched_stop)


def test_kit_concurrency(reasoner: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's own concurrency test; its questions and expected words are those of eight problems."""
    texts = [chat_text(p) for p in questions()]
    shared = texts[0][: texts[0].rindex(";") + 1]
    assert all(text.startswith(shared) for text in texts)
    pairs = [(t[len(shared) :], f"#:{p.answer}") for t, p in zip(texts, questions(), strict=True)]
    monkeypatch.setattr(basic_scheduler_stress_kit, "_CONCURRENT_PREFIX", shared)
    monkeypatch.setattr(basic_scheduler_stress_kit, "_CONCURRENT_QA", pairs)

    class Kit(KitCase, BasicSchedulerStressMixin):
        sanity_max_new_tokens_short = PROBLEM.chain_tokens + 64

    bind(Kit, reasoner, REASONER)
    with clean(reasoner):
        Kit("test_concurrent_requests").test_concurrent_requests()


def all_right(server: Server) -> int:
    """Answer the eight problems at once; every chain must be right to its end. Returns tokens found cached."""
    problems = questions()
    answers = generate_many(server, [greedy(p) for p in problems], len(problems))
    wrong = [a["text"] for p, a in zip(problems, answers, strict=True) if a["text"] != p.chain]
    assert not wrong
    return sum(a["meta_info"]["cached_tokens"] for a in answers)


def test_eight_problems_over_one_prefix(reasoner: Server) -> None:
    with clean(reasoner):
        reasoner.generate(**greedy(questions()[0], max_new_tokens=1))
        before = shrinks(reasoner)
        cached = all_right(reasoner)
        assert shrinks(reasoner) > before
    shared = 5 * (LINES - 8) // PAGE * PAGE
    assert cached >= 8 * shared


def test_stream_is_the_answer(reasoner: Server) -> None:
    with clean(reasoner):
        answer = reasoner.generate(**greedy(PROBLEM))
        reasoner.flush()
        texts = []
        url, body = f"{reasoner.url}/generate", {**greedy(PROBLEM), "stream": True}
        with requests.post(url, json=body, stream=True, timeout=300) as response:
            for line in response.iter_lines(decode_unicode=True):
                if line.startswith("data: {"):
                    texts.append(json.loads(line.removeprefix("data: "))["text"])
    assert task.check(PROBLEM, answer["text"])
    assert texts[-1] == answer["text"]
    assert len(texts) > LINES
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_in_the_middle_of_a_chain(reasoner: Server, mode: str) -> None:
    """Paused requests go on from the pages they had, or from what the tree kept of them."""
    problems = questions()
    with clean(reasoner), ThreadPoolExecutor(len(problems)) as pool:
        runs = [pool.submit(reasoner.generate, **greedy(p)) for p in problems]
        end = time.monotonic() + 120
        while reasoner.pool()["running_requests"] < len(problems) and time.monotonic() < end:
            time.sleep(0.1)
        url = reasoner.url
        requests.post(f"{url}/pause_generation", json={"mode": mode}, timeout=60).raise_for_status()
        time.sleep(1)
        assert not any(run.done() for run in runs)
        requests.post(f"{url}/continue_generation", json={}, timeout=60).raise_for_status()
        answers = [run.result() for run in runs]
        assert [a["text"] for a in answers] == [p.chain for p in problems]


# -- kits that need a server of their own --------------------------------------------------------------------


@pytest.fixture(scope="class")
def own_server(request: pytest.FixtureRequest, model: Path) -> Iterator[None]:
    """A server with the class's ``args`` and ``env``."""
    with serve(model, [*KIT_ARGS, *request.cls.args], env={**STRICT, **request.cls.env}) as server:
        bind(request.cls, server, model)
        with clean(server):
            yield
            assert server.new_log().count('"POST /generate HTTP/1.1" 503') >= request.cls.least_timeouts


@pytest.mark.usefixtures("own_server")
class TestWaitingTimeout(KitCase, WaitingTimeoutMixin):
    args = ("--max-running-requests", "1")
    env = {"SGLANG_REQ_WAITING_TIMEOUT": "0.001"}  # noqa: RUF012
    least_timeouts = 1


@pytest.mark.full
@pytest.mark.usefixtures("own_server")
class TestRunningTimeout(KitCase, RunningTimeoutTwoWaveMixin):
    args = ()
    env = {"SGLANG_REQ_RUNNING_TIMEOUT": "1"}  # noqa: RUF012
    running_timeout_max_new_tokens = 8192
    least_timeouts = 16


@pytest.mark.full
def test_reasoning_while_retracting() -> None:
    with serve(REASONER, REASONER_ARGS, env={**STRICT, "SGLANG_TEST_RETRACT": "1"}) as server:
        with clean(server):
            all_right(server)
            assert server.retracted() > 0


@pytest.mark.full
@pytest.mark.parametrize("flags", [["--disable-overlap-schedule"], ["--enable-mixed-chunk"]], ids=" ".join)
def test_kits_with_other_schedulers(
    model: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(model, [*KIT_ARGS, *flags], env=STRICT) as server:
        run_radix_kit(server, monkeypatch, nodes=60, chunk=96)
        run_cache_hit_kit(server, model, tmp_path)
