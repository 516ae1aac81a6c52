"""Mixed traffic at four times what a pool holds at 16 bits, and everything that clients and operators do to a server.

Clients ask, stream, chat, hang up, time out and abort; the server is paused, flushed while busy, and retracts requests
by force. About once a minute all stop, SGLang's and our books are checked, and resident memory is noted. Every request
that nobody cut off must come back whole; a sample of those of whose KV no page had shrunk is asked again from stock
SGLang, token by token.
"""


from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
import requests
from transformers import AutoTokenizer

from benchmarks.harness.methods import bytes_per_token
from benchmarks.harness.servers import REASONER, STRICT, Server, generate_many, greedy, scheduler_pid, serve
from benchmarks.harness.tasks import chat_ids
from benchmarks.prefix import ask
from benchmarks.reasoner import task

BUDGET = 6 << 20
ARGS = [
    "--max-running-requests", "12", "--chunked-prefill-size", "256", "--schedule-conservativeness", "0.2",
    "--enable-priority-scheduling", "--disable-priority-preemption", "--enable-cache-report",
]  # fmt: skip
ENV = {**STRICT, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "97", "SGLANG_REQ_WAITING_TIMEOUT": "90"}
TOKENS_16_BIT = BUDGET // bytes_per_token(REASONER)
OURS = ["--pmkvq-pool-bytes", str(BUDGET), "--enable-metrics"]
# Without metrics: SGLang 0.5.15's count of responses by path raises where a router was included, as /v1/loads is.
STOCK = ["--max-total-tokens", str(TOKENS_16_BIT)]
# Mean tokens that a request of the mix holds at its end: with so many clients four pools are asked for at once.
MEAN_TOKENS = 600
CLIENTS = 4 * TOKENS_16_BIT // MEAN_TOKENS + 1
ROUND_S = 50.0
# Whoever was asked before an idle moment is answered within this time, or counts as lost for ever.
PATIENCE_S = 120.0
SAMPLE = 60


@dataclass
class Done:
    """A finished greedy answer: what was asked, what came, and the narrowest bits it was computed from."""

    ids: list[int]
    limit: int
    output: list[int]
    lowest: int
    right: bool


class Soak:
    """Clients of one server. Seeded; what interleaves how is up to the machine.

    Attributes:
        asked, finished, cut: requests per kind; cut are those that the client itself cut off or the server timed out.
        lost: sentences, one per request that should have come back whole and did not, or check that failed.
        done: what was done to the server, by name.
        rounds: what was seen in each idle moment.
        doing: what each busy client does: name of the request kind, and its rids.
    """

    def __init__(self, server: Server, seed: int, quant: bool = True) -> None:
        self.server, self.quant = server, quant
        self.rng = random.Random(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(REASONER)
        self.asked, self.finished, self.cut, self.done = (Counter[str]() for _ in range(4))
        self.lost: list[str] = []
        self.answers: list[Done] = []
        self.rounds: list[dict[str, Any]] = []
        self.doing: dict[int, str] = {}
        self.stop = False
        self.told = self.serial = self.peak_since_finish = 0
        self.forks = [
            ask(task.make_problem(task.EVAL_SEED_START + 9000 + seed, 40), line)
            for seed in range(3)
            for line in range(32, 40)
        ]
        self.gate = asyncio.Event()
        self.gate.set()

    # ------------------------------------------------------------ clients

    def problem(self) -> task.Problem:
        kind = self.rng.random()
        if kind < 0.3:
            return self.rng.choice(self.forks)
        lines = self.rng.randint(6, 24) if kind < 0.65 else self.rng.randint(50, 90)
        return task.make_problem(task.EVAL_SEED_START + self.rng.randrange(2000), lines)

    def body(self, problem: task.Problem, **more: Any) -> dict[str, Any]:
        ids = chat_ids(self.tokenizer, task.messages(problem))
        self.serial += 1
        # As many digits for all: SGLang aborts every request whose rid begins with the one that is named.
        rid = f"soak-{self.serial:08}"
        task_id = id(asyncio.current_task())
        if task_id in self.doing:
            self.doing[task_id] += f" {rid}"
        asked = greedy(ids, problem.chain_tokens + 64, bits=self.quant)
        return {**asked, "rid": rid, "priority": self.rng.randrange(3), **more}

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self.session.post(f"{self.server.url}{path}", json=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text

    def timed_out(self, status: int, answer: Any) -> bool:
        """Whether the server gave up on a request that had waited too long, as it was told to."""
        late = status == 503 and "timeout" in str(answer).lower()
        self.cut["server timeout"] += late
        return late

    def judge(self, kind: str, body: dict[str, Any], problem: task.Problem, status: int, answer: Any) -> None:
        """Whole: a finish reason of its own, all tokens there, the figures that were asked for."""
        if self.timed_out(status, answer):
            return
        answer = answer if isinstance(answer, dict) else {"text": answer}
        meta, ids = answer.get("meta_info", {}), answer.get("output_ids", [])
        reason = (meta.get("finish_reason") or {}).get("type")
        bits = meta.get("pmkvq_kv_bits") if self.quant else [{"lowest": 16}]
        if status != 200 or reason not in ("stop", "length") or len(ids) != meta["completion_tokens"] or not bits:
            self.lost.append(f"{kind} {body['rid']}: status {status}, {str(answer)[:200]}")
            return
        self.finished[kind] += 1
        limit, right = body["sampling_params"]["max_new_tokens"], task.check(problem, answer["text"])
        self.answers.append(Done(body["input_ids"], limit, ids, bits[0]["lowest"], right))

    async def plain(self) -> None:
        problem = self.problem()
        body = self.body(problem)
        self.judge("plain", body, problem, *await self.post("/generate", body))

    async def stream(self) -> None:
        """The parts must be one another's beginnings, and the last one the whole."""
        problem = self.problem()
        body = self.body(problem, stream=True)
        last: dict[str, Any] = {}
        async with self.session.post(f"{self.server.url}/generate", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    part = json.loads(line[6:])
                    if "error" in part or not part["text"].startswith(last.get("text", "")):
                        self.lost.append(f"stream {body['rid']}: {str(part)[:200]}")
                        return
                    last = part
            self.judge("stream", body, problem, response.status, last)

    async def chat(self) -> None:
        """Three turns; every turn is answered to its end."""
        messages: list[dict[str, str]] = []
        for _ in range(3):
            problem = task.make_problem(task.EVAL_SEED_START + self.rng.randrange(2000), self.rng.randint(5, 12))
            messages += task.messages(problem)
            body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 300}
            status, answer = await self.post("/v1/chat/completions", body)
            if self.timed_out(status, answer):
                return
            choice = answer["choices"][0] if status == 200 else {}
            if choice.get("finish_reason") not in ("stop", "length"):
                self.lost.append(f"chat: status {status}, {str(answer)[:200]}")
                return
            messages.append({"role": "assistant", "content": choice["message"]["content"]})
        self.finished["chat"] += 1

    async def hang_up(self) -> None:
        """Leave in mid-stream."""
        left = self.rng.randint(1, 60)
        body = self.body(self.problem(), stream=True)
        async with self.session.post(f"{self.server.url}/generate", json=body) as response:
            async for line in response.content:
                left -= line.startswith(b"data: ")
                if left <= 0:
                    break
            response.close()
        self.cut["hang up"] += 1

    async def impatient(self) -> None:
        """A client that waits for a short time only."""
        try:
            await asyncio.wait_for(self.post("/generate", self.body(self.problem())), self.rng.uniform(0.05, 4))
        except asyncio.TimeoutError:
            pass
        self.cut["client timeout"] += 1

    async def abort(self) -> None:
        """Ask, and abort by name; the answer must come all the same, and say so if it was in time."""
        problem = self.problem()
        body = self.body(problem)
        asked = asyncio.create_task(self.post("/generate", body))
        await asyncio.sleep(self.rng.uniform(0, 3))
        await self.post("/abort_request", {"rid": body["rid"]})
        status, answer = await asked
        if "abort" in str(answer).lower():
            self.cut["abort"] += 1
        else:
            self.judge("abort too late", body, problem, status, answer)

    async def client(self) -> None:
        kinds: dict[Callable[[], Awaitable[None]], float] = {
            self.plain: 0.48, self.stream: 0.14, self.chat: 0.12,
            self.hang_up: 0.09, self.impatient: 0.08, self.abort: 0.09,
        }  # fmt: skip
        while not self.stop:
            await self.gate.wait()
            if self.stop:
                return
            (kind,) = self.rng.choices(list(kinds), list(kinds.values()))
            name, me = kind.__name__, id(asyncio.current_task())  # type: ignore[attr-defined]
            self.doing[me] = name
            self.asked[name] += 1
            try:
                await kind()
            except (aiohttp.ClientError, OSError, KeyError, ValueError) as error:
                self.lost.append(f"{name}: {type(error).__name__}: {error}")
                await asyncio.sleep(1)
            finally:
                del self.doing[me]

    # ------------------------------------------------------------ what is done to the server

    async def disturb(self, seconds: float) -> None:
        """Pauses and flushes in between, for about ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(self.rng.uniform(1, 6))
            self.alive()
            state = await asyncio.to_thread(self.state)
            self.peak_since_finish = max(self.peak_since_finish, state["retractions_since_finish"])
            what = self.rng.random()
            if what < 0.25:
                await self.post("/pause_generation", {"mode": self.rng.choice(["in_place", "retract"])})
                await asyncio.sleep(self.rng.uniform(0, 1.5))
                await self.post("/continue_generation", {})
                self.done["pauses"] += 1
            elif what < 0.45:
                await self.post("/flush_cache", {})
                self.done["flushes_while_busy"] += 1

    async def idle(self, reload: bool) -> None:
        """Stop the clients, check everything, let them go on."""
        self.gate.clear()
        end = time.monotonic() + PATIENCE_S
        while self.doing and not self.stop:
            await asyncio.sleep(0.2)
            self.alive()
            if time.monotonic() > end:
                waiting = ", ".join(self.doing.values())
                self.lost.append(f"no answer {PATIENCE_S:.0f} s after the last client asked: {waiting}")
                self.stop = True
        state = await self.until_idle()
        if reload:
            status, answer = await self.post("/update_weights_from_disk", {"model_path": str(REASONER)})
            self.done["weight_reloads"] += 1
            if status != 200 or not answer.get("success"):
                self.lost.append(f"weights could not be loaded again: {status} {str(answer)[:200]}")
        await asyncio.to_thread(self.server.flush)
        empty = await asyncio.to_thread(self.state)
        if empty["mapped_pages"] or empty["used_bytes"] or empty["running_requests"]:
            self.lost.append(f"after a flush: {empty}")
        self.lost += [f"log: {line}" for line in self.server.errors(since_mark=True)]
        self.server.mark()
        self.rounds.append(
            {
                "t": round(time.monotonic() - self.start, 1),
                "rss_mib": round(psutil.Process(self.pid).memory_info().rss / 2**20, 1),
                "mapped_before_flush": state["mapped_pages"],
                "finished": sum(self.finished.values()),
                "lost": len(self.lost),
            }
        )
        print(json.dumps(self.rounds[-1]), *(f"lost: {sentence}" for sentence in self.lost[self.told :]), sep="\n")
        self.told = len(self.lost)
        self.gate.set()

    async def until_idle(self) -> dict[str, Any]:
        """The pool's state once nothing runs; what hung up is aborted by SGLang a moment later."""
        for _ in range(300):
            state = await asyncio.to_thread(self.state)
            if not state["running_requests"]:
                return state
            await asyncio.sleep(0.2)
        self.lost.append(f"requests still run a minute after the last client left: {state}")
        return state

    def state(self) -> dict[str, Any]:
        """The pool's own figures; of stock, what it says of its load."""
        if self.quant:
            return self.server.pool()
        (load,) = requests.get(f"{self.server.url}/v1/loads", timeout=60).json()["loads"]
        return {
            "running_requests": load["num_running_reqs"] + load["num_waiting_reqs"],
            "mapped_pages": load["num_used_tokens"],
            "used_bytes": load["num_used_tokens"] * bytes_per_token(REASONER),
            "retractions_since_finish": 0,
        }

    def alive(self) -> None:
        if self.server.process.poll() is not None:
            raise SystemExit(f"the server ended: {self.server.process.returncode}\n{self.server.log()[-6000:]}")

    async def run(self, seconds: float) -> None:
        self.start = time.monotonic()
        self.pid = scheduler_pid(self.server)
        self.server.mark()
        # A connection each: one that the server closes while it is taken up again would look like a lost request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self.session:
            clients = [asyncio.create_task(self.client()) for _ in range(CLIENTS)]
            while True:
                left = seconds - (time.monotonic() - self.start)
                await self.disturb(min(left, ROUND_S * self.rng.uniform(0.6, 1.2)))
                await self.idle(reload=len(self.rounds) % 4 == 1)
                if self.stop or time.monotonic() - self.start >= seconds:
                    break
            self.stop = True
            self.gate.set()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


def against_stock(answers: Sequence[Done], rng: random.Random) -> tuple[int, int]:
    """(asked again, different) of a sample of the answers of whose KV no page had shrunk."""
    whole = [a for a in answers if a.lowest == 16]
    chosen = rng.sample(whole, min(SAMPLE, len(whole)))
    if not chosen:
        return 0, 0
    with serve(REASONER, ["--max-total-tokens", "100000", "--chunked-prefill-size", "256"], quant=False) as stock:
        again = generate_many(stock, [greedy(a.ids, a.limit) for a in chosen], 8)
    return len(chosen), sum(a.output != b["output_ids"] for a, b in zip(chosen, again, strict=True))


def run(minutes: float, seed: int, quant: bool) -> dict[str, Any]:
    """The values of a row."""
    with serve(REASONER, [*ARGS, *(OURS if quant else STOCK)], env=ENV, quant=quant) as server:
        soak = Soak(server, seed, quant)
        asyncio.run(soak.run(60 * minutes))
        pool: dict[str, Any] = server.pool() if quant else {"shrinks": {}, "evict_requests": 0}
        retracted = server.log().count("#retracted_reqs")
    asked, different = against_stock(soak.answers, soak.rng) if quant else (0, 0)
    if different:
        soak.lost.append(f"{different} of {asked} answers at 16 bits differ from stock SGLang's")
    narrow, wide = ([a for a in soak.answers if (a.lowest < 16) == below] for below in (True, False))
    return {
        "budget_bytes": BUDGET,
        "tokens_16_bit": TOKENS_16_BIT,
        "clients": CLIENTS,
        "asked": dict(soak.asked),
        "finished": dict(soak.finished),
        "cut_off": dict(soak.cut),
        "lost": soak.lost,
        "retraction_events": retracted,
        "peak_retractions_since_finish": soak.peak_since_finish,
        **{what: soak.done[what] for what in ("pauses", "flushes_while_busy", "weight_reloads")},
        "idle_checks": len(soak.rounds),
        "shrinks": pool["shrinks"],
        "evict_requests": pool["evict_requests"],
        "asked_again_from_stock": asked,
        "different_from_stock": different,
        "answers_at_16_bits": len(wide),
        "answers_below": len(narrow),
        "right_at_16_bits": sum(a.right for a in wide),
        "right_below": sum(a.right for a in narrow),
        "rounds": soak.rounds,
    }
