"""Mixed traffic for as long as you like, at four times what the pool holds at 16 bits; nothing may be lost.

    python -m benchmarks.soak --minutes 20 --out benchmarks/results/soak.json

Clients, each in a loop: short and long problems, forked programs over one prefix, chats of three turns, streams,
low and high priorities; and clients that hang up in mid-stream, time out, or abort what they asked. Meanwhile the
server is paused and continued at random, asked to flush while it is busy, and retracts requests by force. About once
a minute the clients stop; when the server is idle

* SGLang's checks of its books run, strict, and so do ours (ledger, and the device's page tables against it),
* no request runs, a flush brings mapped pages and bytes to zero, and resident memory is noted;
* sometimes the weights are loaded again.

Every request that nobody cut off must come back whole. Of those of whose KV no page had shrunk a sample is asked again
from stock SGLang, token by token; of the others the share of right answers is stated. Exit status 1 if anything was
lost.

``--stock`` sends the same traffic to stock SGLang in the same bytes: the control for resident memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import requests
from transformers import AutoTokenizer

from benchmarks.methods import bytes_per_token
from benchmarks.reasoner import task
from benchmarks.result import versions, write
from benchmarks.serving import REASONER, STRICT, Server, generate_many, scheduler_pid, serve

POOL = 6 << 20
RUNNING = 12
OURS = ["--pmkvq-pool-bytes", str(POOL), "--enable-metrics"]
ARGS = [
    "--max-running-requests", str(RUNNING), "--chunked-prefill-size", "256",
    "--schedule-conservativeness", "0.2", "--enable-priority-scheduling", "--disable-priority-preemption",
    "--enable-cache-report",
]  # fmt: skip
ENV = {**STRICT, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "97", "SGLANG_REQ_WAITING_TIMEOUT": "90"}
TOKENS_16_BIT = POOL // bytes_per_token(REASONER)
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


@dataclass
class Tally:
    """What happened.

    Attributes:
        asked, finished, cut: requests per kind; cut are those that the client itself cut off or the server timed out.
        lost: sentences, one per request that should have come back whole and did not, or check that failed.
    """

    asked: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    answers: list[Done] = field(default_factory=list)


def forks(seed: int) -> list[task.Problem]:
    """Problems over one program that differ in their last line only."""
    base = task.make_problem(seed, 40)
    out = []
    for asked in range(32, 40):
        prompt, chain = task.render(base.program, asked, base.start, base.values)
        answer = base.values[asked]
        out.append(task.Problem(asked, base.start, base.program, asked, base.values, prompt, chain, answer))
    return out


class Soak:
    """Clients of one server. Seeded; what interleaves how is up to the machine."""

    def __init__(self, server: Server, seed: int, quant: bool = True) -> None:
        self.server = server
        self.quant = quant
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.tokenizer = AutoTokenizer.from_pretrained(REASONER)
        self.gate = asyncio.Event()
        self.gate.set()
        # What each busy client does: name of the request kind, and its rid if it has one.
        self.doing: dict[int, str] = {}
        self.stop = False
        self.told = 0
        self.serial = 0
        self.rounds: list[dict[str, Any]] = []
        self.pauses = self.busy_flushes = self.reloads = 0
        self.peak_since_finish = 0
        self.forks = [p for s in range(3) for p in forks(task.EVAL_SEED_START + 9000 + s)]

    # ------------------------------------------------------------ clients

    def problem(self) -> task.Problem:
        kind = self.rng.random()
        if kind < 0.3:
            return self.rng.choice(self.forks)
        lines = self.rng.randint(6, 24) if kind < 0.65 else self.rng.randint(50, 90)
        return task.make_problem(task.EVAL_SEED_START + self.rng.randrange(2000), lines)

    def body(self, problem: task.Problem, **more: Any) -> dict[str, Any]:
        ids = self.tokenizer.apply_chat_template(task.messages(problem), add_generation_prompt=True, return_dict=False)
        params = {"temperature": 0, "max_new_tokens": problem.chain_tokens + 64}
        if self.quant:
            params["custom_params"] = {"pmkvq_kv_bits": True}
        self.serial += 1
        # As many digits for all: SGLang aborts every request whose rid begins with the one that is named.
        rid = f"soak-{self.serial:08}"
        task_id = id(asyncio.current_task())
        if task_id in self.doing:
            self.doing[task_id] += f" {rid}"
        return {"input_ids": ids, "sampling_params": params, "rid": rid, "priority": self.rng.randrange(3), **more}

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        async with self.session.post(f"{self.server.url}{path}", json=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text

    def judge(self, kind: str, body: dict[str, Any], problem: task.Problem, status: int, answer: Any) -> None:
        """Whole: a finish reason of its own, all tokens there, the figures that were asked for."""
        if status == 503 and "timeout" in str(answer).lower():
            self.tally.cut["server timeout"] += 1
            return
        meta = answer.get("meta_info", {}) if isinstance(answer, dict) else {}
        reason = (meta.get("finish_reason") or {}).get("type")
        ids = answer.get("output_ids", []) if isinstance(answer, dict) else []
        bits = meta.get("pmkvq_kv_bits") if self.quant else [{"lowest": 16}]
        if status != 200 or reason not in ("stop", "length") or len(ids) != meta["completion_tokens"] or not bits:
            self.tally.lost.append(f"{kind} {body['rid']}: status {status}, {str(answer)[:200]}")
            return
        self.tally.finished[kind] += 1
        right = task.check(problem, answer["text"])
        limit = body["sampling_params"]["max_new_tokens"]
        self.tally.answers.append(Done(body["input_ids"], limit, ids, bits[0]["lowest"], right))

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
                        self.tally.lost.append(f"stream {body['rid']}: {str(part)[:200]}")
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
            if status == 503 and "timeout" in str(answer).lower():
                self.tally.cut["server timeout"] += 1
                return
            choice = answer["choices"][0] if status == 200 else {}
            if choice.get("finish_reason") not in ("stop", "length"):
                self.tally.lost.append(f"chat: status {status}, {str(answer)[:200]}")
                return
            messages.append({"role": "assistant", "content": choice["message"]["content"]})
        self.tally.finished["chat"] += 1

    async def hang_up(self) -> None:
        """Leave in mid-stream."""
        body = self.body(self.problem(), stream=True)
        left = self.rng.randint(1, 60)
        async with self.session.post(f"{self.server.url}/generate", json=body) as response:
            async for line in response.content:
                left -= line.startswith(b"data: ")
                if left <= 0:
                    break
            response.close()
        self.tally.cut["hang up"] += 1

    async def impatient(self) -> None:
        """A client that waits for a short time only."""
        try:
            await asyncio.wait_for(self.post("/generate", self.body(self.problem())), self.rng.uniform(0.05, 4))
        except asyncio.TimeoutError:
            pass
        self.tally.cut["client timeout"] += 1

    async def abort(self) -> None:
        """Ask, and abort by name; the answer must come all the same, and say so if it was in time."""
        problem = self.problem()
        body = self.body(problem)
        asked = asyncio.create_task(self.post("/generate", body))
        await asyncio.sleep(self.rng.uniform(0, 3))
        await self.post("/abort_request", {"rid": body["rid"]})
        status, answer = await asked
        reason = str((answer.get("meta_info") or {}).get("finish_reason") if isinstance(answer, dict) else answer)
        if "abort" in reason.lower() or "abort" in str(answer).lower():
            self.tally.cut["abort"] += 1
        else:
            self.judge("abort too late", body, problem, status, answer)

    async def client(self) -> None:
        kinds: Sequence[tuple[float, Callable[[], Awaitable[None]]]] = (
            (0.48, self.plain),
            (0.14, self.stream),
            (0.12, self.chat),
            (0.09, self.hang_up),
            (0.08, self.impatient),
            (0.09, self.abort),
        )
        while not self.stop:
            await self.gate.wait()
            if self.stop:
                return
            (kind,) = self.rng.choices([k for _, k in kinds], [w for w, _ in kinds])
            me = id(asyncio.current_task())
            self.doing[me] = kind.__name__  # type: ignore[attr-defined]
            self.tally.asked[kind.__name__] += 1  # type: ignore[attr-defined]
            try:
                await kind()
            except (aiohttp.ClientError, OSError, KeyError, ValueError) as error:
                self.tally.lost.append(f"{kind.__name__}: {type(error).__name__}: {error}")  # type: ignore[attr-defined]
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
                mode = self.rng.choice(["in_place", "retract"])
                await self.post("/pause_generation", {"mode": mode})
                await asyncio.sleep(self.rng.uniform(0, 1.5))
                await self.post("/continue_generation", {})
                self.pauses += 1
            elif what < 0.45:
                await self.post("/flush_cache", {})
                self.busy_flushes += 1

    async def idle(self, reload: bool) -> None:
        """Stop the clients, check everything, let them go on."""
        self.gate.clear()
        end = time.monotonic() + PATIENCE_S
        while self.doing and not self.stop:
            await asyncio.sleep(0.2)
            self.alive()
            if time.monotonic() > end:
                waiting = ", ".join(self.doing.values())
                self.tally.lost.append(f"no answer {PATIENCE_S:.0f} s after the last client asked: {waiting}")
                self.stop = True
        state = await self.until_idle()
        if reload:
            body = {"model_path": str(REASONER)}
            status, answer = await self.post("/update_weights_from_disk", body)
            self.reloads += 1
            if status != 200 or not answer.get("success"):
                self.tally.lost.append(f"weights could not be loaded again: {status} {str(answer)[:200]}")
        await asyncio.to_thread(self.server.flush)
        empty = await asyncio.to_thread(self.state)
        if empty["mapped_pages"] or empty["used_bytes"] or empty["running_requests"]:
            self.tally.lost.append(f"after a flush: {empty}")
        self.tally.lost += [f"log: {line}" for line in self.server.errors(since_mark=True)]
        self.server.mark()
        self.rounds.append(
            {
                "t": round(time.monotonic() - self.start, 1),
                "rss_mib": round(psutil.Process(self.pid).memory_info().rss / 2**20, 1),
                "mapped_before_flush": state["mapped_pages"],
                "finished": sum(self.tally.finished.values()),
                "lost": len(self.tally.lost),
            }
        )
        print(json.dumps(self.rounds[-1]), flush=True)
        for sentence in self.tally.lost[self.told :]:
            print(f"lost: {sentence}", flush=True)
        self.told = len(self.tally.lost)
        self.gate.set()

    async def until_idle(self) -> dict[str, Any]:
        """The pool's state once nothing runs; what hung up is aborted by SGLang a moment later."""
        for _ in range(300):
            state = await asyncio.to_thread(self.state)
            if not state["running_requests"]:
                return state
            await asyncio.sleep(0.2)
        self.tally.lost.append(f"requests still run a minute after the last client left: {state}")
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


def slope(rounds: Sequence[dict[str, Any]], share: float = 0.5) -> float | None:
    """MiB of resident memory per hour over the last ``share`` of the idle moments; None for fewer than four."""
    last = rounds[round(len(rounds) * (1 - share)) :]
    if len(last) < 4:
        return None
    return float(np.polyfit([r["t"] / 3600 for r in last], [r["rss_mib"] for r in last], 1)[0])


def against_stock(answers: Sequence[Done], rng: random.Random) -> tuple[int, int]:
    """(asked again, different) of a sample of the answers of whose KV no page had shrunk."""
    whole = [a for a in answers if a.lowest == 16]
    chosen = rng.sample(whole, min(SAMPLE, len(whole)))
    if not chosen:
        return 0, 0
    bodies = [{"input_ids": a.ids, "sampling_params": {"temperature": 0, "max_new_tokens": a.limit}} for a in chosen]
    with serve(REASONER, ["--max-total-tokens", "100000", "--chunked-prefill-size", "256"], quant=False) as stock:
        again = generate_many(stock, bodies, 8)
    return len(chosen), sum(a.output != b["output_ids"] for a, b in zip(chosen, again, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="the control: stock SGLang in the same bytes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    quant = not options.stock
    with serve(REASONER, [*ARGS, *(OURS if quant else STOCK)], env=ENV, quant=quant) as server:
        soak = Soak(server, options.seed, quant)
        asyncio.run(soak.run(60 * options.minutes))
        pool: dict[str, Any] = server.pool() if quant else {"shrinks": {}, "evict_requests": 0}
        retracted = len([x for x in server.log().splitlines() if "#retracted_reqs" in x])
    tally = soak.tally
    asked, different = against_stock(tally.answers, soak.rng) if quant else (0, 0)
    if different:
        tally.lost.append(f"{different} of {asked} answers at 16 bits differ from stock SGLang's")
    narrow = [a for a in tally.answers if a.lowest < 16]
    result = {
        "command": " ".join(["python -m benchmarks.soak", *(argv or sys.argv[1:])]),
        "versions": versions(),
        "minutes": options.minutes,
        "seed": options.seed,
        "pool_bytes": POOL,
        "tokens_16_bit": TOKENS_16_BIT,
        "clients": CLIENTS,
        "asked": dict(tally.asked),
        "finished": dict(tally.finished),
        "cut_off": dict(tally.cut),
        "lost": tally.lost,
        "retraction_events": retracted,
        "peak_retractions_since_finish": soak.peak_since_finish,
        "pauses": soak.pauses,
        "flushes_while_busy": soak.busy_flushes,
        "weight_reloads": soak.reloads,
        "idle_checks": len(soak.rounds),
        "shrinks": pool["shrinks"],
        "evict_requests": pool["evict_requests"],
        "asked_again_from_stock": asked,
        "different_from_stock": different,
        "answers_at_16_bits": len(tally.answers) - len(narrow),
        "answers_below": len(narrow),
        "right_at_16_bits": sum(a.right for a in tally.answers if a.lowest == 16),
        "right_below": sum(a.right for a in narrow),
        "mib_per_hour": slope(soak.rounds),
        "rounds": soak.rounds,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))
    write(result, options.out)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
