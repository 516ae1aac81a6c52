"""Servers on CUDA: what the CPU tests ask for, with decode graphs and overlap on and off, shrinking all the time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.pressure import problem_set, prompt_ids
from benchmarks.reasoner.task import check
from benchmarks.serving import REASONER, STRICT, generate_many, serve

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("graphs,overlap", list(product((True, False), repeat=2)))
def test_answers_under_constant_shrinking(graphs: bool, overlap: bool) -> None:
    """Policy static with the smallest window shrinks pages to their final tier in nearly every step."""
    problems = problem_set(10, 60, 70, first=100)
    ids, _ = prompt_ids(REASONER, problems)
    args = [
        "--pmkvq-final-bits", "0-2:8,3-5:k4v2", "--pmkvq-pool-bytes", "32MiB", "--max-running-requests", "10",
        "--chunked-prefill-size", "256", "--pmkvq-policy", "static", "--pmkvq-window", "16", "--enable-mixed-chunk",
        *(() if graphs else ("--disable-cuda-graph",)), *(() if overlap else ("--disable-overlap-schedule",)),
    ]  # fmt: skip
    with serve(REASONER, args, env=STRICT) as server:
        assert ("Capture" in server.log()) == graphs
        bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 1200}} for p in ids]
        out = generate_many(server, bodies, len(bodies))
        assert sum(check(p, a["text"]) for p, a in zip(problems, out, strict=True)) >= len(problems) - 2
        assert server.pool()["shrinks"]["4->2"] > 0
        server.flush()
        assert server.pool()["mapped_pages"] == 0
        assert not server.errors()


def test_without_shrinking_graphs_change_nothing_but_rounding() -> None:
    """Greedy answers of a large pool with graphs, without, and of stock: nearly all right each time."""
    problems = problem_set(8, 60, 70, first=300)
    ids, _ = prompt_ids(REASONER, problems)
    bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 1200}} for p in ids]
    for args, quant in ((["--pmkvq-pool-bytes", "256MiB"], True), (["--disable-cuda-graph"], True), ([], False)):
        with serve(REASONER, args, quant=quant) as server:
            out = generate_many(server, bodies, len(bodies))
            assert sum(check(p, a["text"]) for p, a in zip(problems, out, strict=True)) >= len(problems) - 1
            assert not server.errors()
