"""Whether servers on this GPU answer as they should, with the bundled model: graphs on and off, against stock, forced.

Part 2 of the GPU suite (``python -m benchmarks.gpu``); without a GPU the same with few short problems.

Stock itself answers with two attention backends: two kernels that are both right differ in rounding, so a chain may
differ here and there. Ours with and without CUDA graphs runs the same kernels on the same shapes, alone: not one token
may differ. On the CPU ours makes stock's own calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.gpu.cells import BACKENDS
from benchmarks.harness.methods import Method, bytes_per_token, held_bytes
from benchmarks.harness.servers import REASONER, STRICT, Server, generate_many, serve
from benchmarks.harness.tasks import problem_set, prompt_ids
from benchmarks.reasoner.task import Problem, check
from tests.support.servers import sound

GPU = torch.cuda.is_available()
NO_GRAPHS = ("--disable-cuda-graph",)
COMMON = ("--random-seed", "0", "--grammar-backend", "none")
BIG_POOL = 256 << 20
BIG_TOKENS = BIG_POOL // bytes_per_token(REASONER)
# Right answers that ours may lack against stock's: chains differ by rounding, and a chain that differs may go wrong.
SLACK = 1


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    """Of the bundled task, such that the model answers nearly all right."""
    return problem_set(24, 60, 90, first=100) if GPU else problem_set(3, 10, 12, first=100)


def ask(server: Server, problems: Sequence[Problem], concurrency: int) -> dict[str, Any]:
    """Greedy answers, and how many are right."""
    ids = prompt_ids(REASONER, problems)[0]
    params = {"temperature": 0, "max_new_tokens": max(p.chain_tokens for p in problems) + 64}
    server.flush()
    got = generate_many(server, [{"input_ids": p, "sampling_params": params} for p in ids], concurrency)
    texts = AutoTokenizer.from_pretrained(REASONER).batch_decode(
        [a["output_ids"] for a in got], skip_special_tokens=True
    )
    return {
        "output_ids": [a["output_ids"] for a in got],
        "right": sum(check(p, text) for p, text in zip(problems, texts, strict=True)),
        "finished": sum(a["meta_info"]["finish_reason"] is not None for a in got),
    }


def differing(a: dict[str, Any], b: dict[str, Any]) -> int:
    return sum(x != y for x, y in zip(a["output_ids"], b["output_ids"], strict=True))


def answers(problems: Sequence[Problem], quant: bool, *more: str) -> dict[str, Any]:
    """Of a server with memory for everything, each problem alone."""
    # Stock would take most of the machine's memory.
    size = ("--pmkvq-pool-bytes", str(BIG_POOL)) if quant else ("--max-total-tokens", str(BIG_TOKENS))
    args = ["--max-running-requests", "16", "--chunked-prefill-size", "2048", "--disable-radix-cache"]
    with serve(REASONER, [*args, *COMMON, *size, *more], quant=quant, env=STRICT) as server:
        got = ask(server, problems, 1)
        if quant:
            assert not sum(server.pool()["shrinks"].values()), "pages shrank in a pool that holds everything"
            sound(server)
        assert not server.errors()
    return got


def check_against_stock(ours: dict[str, Any], stock: dict[str, Any], gpu: bool) -> None:
    """As many right answers, but for rounding; on the CPU the very same."""
    out = f"right: ours {ours['right']}, stock {stock['right']}; {differing(ours, stock)} answers differ"
    print(out)
    assert gpu or not differing(ours, stock), f"on the CPU ours must be stock's token for token: {out}"
    assert ours["right"] >= stock["right"] - SLACK, f"ours has fewer right answers than stock: {out}"


def test_answers_are_compared_with_stock() -> None:
    a, b = {"output_ids": [[1], [2]], "right": 2}, {"output_ids": [[1], [3]], "right": 2}
    assert (differing(a, a), differing(a, b)) == (0, 1)
    check_against_stock(a, b, gpu=True)
    check_against_stock({**a, "right": 1}, b, gpu=True)
    with pytest.raises(AssertionError, match="token for token"):
        check_against_stock(a, b, gpu=False)
    with pytest.raises(AssertionError, match="fewer right answers"):
        check_against_stock({**a, "right": 0}, a, gpu=False)


@pytest.mark.server
@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_against_stock(backend: str, problems: list[Problem]) -> None:
    if not GPU and backend != BACKENDS[0]:
        pytest.skip("stock has one backend on the CPU")
    more = ("--attention-backend", backend) if GPU else ()
    check_against_stock(answers(problems, True), answers(problems, False, *more), GPU)


@pytest.mark.server
@pytest.mark.full
@pytest.mark.skipif(not GPU, reason="is about CUDA graphs")
def test_graphs_change_no_token(problems: list[Problem]) -> None:
    assert differing(answers(problems, True), answers(problems, True, *NO_GRAPHS)) == 0


# Method, share of what the chains hold at 16 bits, flags.
FORCED = {
    "age-4": ("age-4", 0.15, ()),
    "static-8-k4v2": ("static-0-2:8,3-5:k4v2-soft", 0.5, ("--pmkvq-window", "16", "--enable-mixed-chunk")),
}


@pytest.mark.server
@pytest.mark.full
@pytest.mark.parametrize("name", FORCED)
def test_forced(name: str, problems: list[Problem]) -> None:
    """A pool that is far too small for 16 bits, with and without graphs: all answers are whole, nothing is lost."""
    if not GPU and name != "age-4":
        pytest.skip("other tests do this on the CPU")
    method, share, more = FORCED[name]
    lengths = [len(p) + q.chain_tokens for p, q in zip(prompt_ids(REASONER, problems)[0], problems, strict=True)]
    # A share of the few short chains of a machine without a GPU would not hold two chunks.
    pool, chunk = (int(held_bytes(REASONER, lengths) * share), 256) if GPU else (1 << 20, 64)
    args = Method.parse(method).server_args(REASONER, pool, len(problems), chunk)
    for graphs in ((), NO_GRAPHS) if GPU else ((),):
        with serve(REASONER, [*args, *more, *COMMON, *graphs], env=STRICT) as server:
            got = ask(server, problems, len(problems))
            shrinks = server.pool()["shrinks"]
            sound(server)
        print(f"{got['right']} right, shrinks {shrinks}")
        assert got["finished"] == len(problems)
        assert sum(shrinks.values())
