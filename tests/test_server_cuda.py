"""Servers on CUDA: what the CPU tests ask for, with decode graphs and overlap on and off, shrinking all the time."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.harness.servers import REASONER, STRICT, generate_many, serve
from benchmarks.harness.tasks import problem_set, prompt_ids, random_prompts
from benchmarks.reasoner.task import check
from tests.support.models import make_model
from tests.support.servers import sound
from tests.support.stock import answers

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MODES = list(product((True, False), repeat=2))
# Each head_dim and page size once, with and without query groups.
MODELS = [("qwen2", 64, 16, 8, 1), ("qwen3", 128, 32, 4, 4), ("llama", 256, 64, 4, 2), ("qwen3", 128, 16, 6, 2)]
# Two layer groups, one of them with unequal K and V; a page goes to its final tier as soon as it leaves the window, so
# the precision of every page is a function of its place alone.
STATIC = (
    "--pmkvq-final-bits", "0:8,1-2:k4v2", "--pmkvq-policy", "static", "--pmkvq-protect", "hard",
    "--skip-tokenizer-init", "--context-length", "4096", "--dtype", "auto",
)  # fmt: skip


def mode_args(graphs: bool, overlap: bool) -> list[str]:
    return [
        *(() if graphs else ("--disable-cuda-graph",)),
        *(() if overlap else ("--disable-overlap-schedule",)),
    ]


@pytest.mark.parametrize(("architecture", "head_dim", "page_size", "heads", "kv_heads"), MODELS)
def test_graphs_and_overlap_change_no_token(
    architecture: str, head_dim: int, page_size: int, heads: int, kv_heads: int, tmp_path: Path
) -> None:
    """One request at a time, so that shapes and splits are the same: equal ids in all four modes."""
    model = make_model(tmp_path / "model", architecture, head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    prompts = [p[:n] for p, n in zip(random_prompts(7, 5, 700, 512), (1, 63, 64, 65, 700), strict=True)]
    args = [
        *STATIC, "--pmkvq-pool-bytes", "64MiB", "--page-size", str(page_size), "--pmkvq-window", str(page_size),
        "--disable-radix-cache", "--chunked-prefill-size", "256", "--max-running-requests", "4",
    ]  # fmt: skip
    tokens = {}
    for graphs, overlap in MODES:
        with serve(model, [*args, *mode_args(graphs, overlap)], env=STRICT) as server:
            assert ("Capture" in server.log()) == graphs
            tokens[graphs, overlap] = answers(server, prompts, 150, 1)
            shrinks = server.pool()["shrinks"]
            assert sum(n for pair, n in shrinks.items() if pair.endswith("->8")) > 0
            assert sum(n for pair, n in shrinks.items() if pair.endswith("->2")) > 0
            sound(server)
    assert all(ids == tokens[True, True] for ids in tokens.values())
    assert sum(map(len, tokens[True, True])) > 150


@pytest.mark.parametrize(("graphs", "overlap"), MODES)
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_page_shrinks_at_every_forward(graphs: bool, overlap: bool, page_size: int, tmp_path: Path) -> None:
    """As many requests as a page has tokens, each one token further: at every forward one of them leaves a page.

    The page that then falls out of its window shrinks ahead of the very forward that reads it.
    """
    model = make_model(tmp_path / "model", "qwen3", head_dim=128, heads=4, kv_heads=2)
    prompts = [p[: 2 * page_size + i] for i, p in enumerate(random_prompts(9, page_size, 4 * page_size, 512))]
    args = [
        *STATIC, "--pmkvq-pool-bytes", "128MiB", "--page-size", str(page_size), "--pmkvq-window", str(page_size),
        "--disable-radix-cache", "--chunked-prefill-size", "2048", "--max-running-requests", str(page_size),
        *mode_args(graphs, overlap),
    ]  # fmt: skip
    length = 128
    params = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
    bodies = [{"input_ids": p, "sampling_params": params} for p in prompts]
    with serve(model, args, env=STRICT) as server:
        before = sum(server.pool()["shrinks"].values())
        out = generate_many(server, bodies, page_size)
        assert all(len(a["output_ids"]) == length for a in out)
        # K and V of both groups: four shrinks at each forward, but for the last, which no other follows.
        assert sum(server.pool()["shrinks"].values()) - before >= 4 * (length - 2)
        assert server.peak_running() == page_size
        sound(server)


@pytest.mark.parametrize(("graphs", "overlap"), MODES)
def test_answers_under_constant_shrinking(graphs: bool, overlap: bool) -> None:
    """A model that reasons, mixed chunks and a radix tree, every page at its final tier outside the smallest window."""
    problems = problem_set(10, 60, 70, first=100)
    ids, _ = prompt_ids(REASONER, problems)
    args = [
        "--pmkvq-final-bits", "0-2:8,3-5:k4v2", "--pmkvq-pool-bytes", "32MiB", "--max-running-requests", "10",
        "--chunked-prefill-size", "256", "--pmkvq-policy", "static", "--pmkvq-window", "16", "--enable-mixed-chunk",
        *mode_args(graphs, overlap),
    ]  # fmt: skip
    with serve(REASONER, args, env=STRICT) as server:
        assert ("Capture" in server.log()) == graphs
        bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 1200}} for p in ids]
        out = generate_many(server, bodies, len(bodies))
        assert sum(check(p, a["text"]) for p, a in zip(problems, out, strict=True)) >= len(problems) - 2
        shrinks = server.pool()["shrinks"]
        assert sum(n for pair, n in shrinks.items() if pair.endswith("->2")) > 0
        sound(server)


def test_without_shrinking_graphs_change_nothing_but_rounding() -> None:
    """Greedy answers of a large pool with graphs, without, and of stock: nearly all right each time."""
    problems = problem_set(8, 60, 70, first=300)
    ids, _ = prompt_ids(REASONER, problems)
    bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 1200}} for p in ids]
    for args, quant in ((["--pmkvq-pool-bytes", "256MiB"], True), (["--disable-cuda-graph"], True), ([], False)):
        with serve(REASONER, args, quant=quant) as server:
            out = generate_many(server, bodies, len(bodies))
            assert sum(check(p, a["text"]) for p, a in zip(problems, out, strict=True)) >= len(problems) - 1
            if quant:
                sound(server)
            assert not server.errors()
