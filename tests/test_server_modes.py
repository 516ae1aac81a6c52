"""On the CPU: several groups, mixed chunks, no overlap, forced retraction; equality with stock over architectures."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.methods import bytes_per_token
from benchmarks.harness.servers import REASONER, STRICT, generate_many, serve
from benchmarks.harness.tasks import problem_set, prompt_ids, random_prompts
from benchmarks.reasoner.task import check
from sglang_pmkvq.formats import PAGE_SIZES
from tests.support.models import make_model
from tests.support.servers import start_together
from tests.support.stock import answers, compare

pytestmark = pytest.mark.server


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        pytest.param(
            ("--enable-mixed-chunk", "--disable-overlap-schedule", "--pmkvq-policy", "uniform"),
            {},
            id="mixed-chunk-no-overlap-uniform",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ("--enable-mixed-chunk", "--page-size", "32", "--pmkvq-protect", "hard", "--pmkvq-group-size", "32"),
            {"SGLANG_TEST_RETRACT": "1"},
            id="mixed-chunk-retract-page32-hard-group32",
        ),
    ],
)
def test_two_groups_under_pressure(flags: tuple[str, ...], env: dict[str, str]) -> None:
    """All finish, nearly all right, nothing leaks, both groups shrink to their own finals."""
    # Forced retraction leaves one request running most of the time.
    problems = problem_set(4 if env else 10, 60, 70, first=100)
    ids, _ = prompt_ids(REASONER, problems)
    args = [
        "--pmkvq-final-bits", "0-2:8,3-5:k4v2", "--pmkvq-pool-bytes", "8MiB", "--max-running-requests", "10",
        "--chunked-prefill-size", "256", "--pmkvq-window", "64", "--decode-log-interval", "8", *flags,
    ]  # fmt: skip
    with serve(REASONER, args, device="cpu", env={**STRICT, **env}) as server:
        assert [g["layers"] for g in server.pool()["groups"]] == [[0, 1, 2], [3, 4, 5]]
        bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 1200}} for p in ids]
        out = generate_many(server, bodies, len(bodies))
        assert all(a["meta_info"]["finish_reason"]["type"] == "stop" for a in out)
        assert sum(check(p, a["text"]) for p, a in zip(problems, out, strict=True)) >= len(problems) - 2
        shrinks = server.pool()["shrinks"]
        assert shrinks["16->8"] > 0
        if env:
            assert server.retracted() > 0
        server.flush()
        assert server.pool()["mapped_pages"] == 0
        assert not server.errors()


@pytest.mark.full
def test_retractions_under_shortage_lose_nothing() -> None:
    """Bytes for a few of the chains, admitted boldly: SGLang must retract; all finish, nearly all right."""
    problems = problem_set(12, 50, 60, first=140)
    ids, _ = prompt_ids(REASONER, problems)
    args = [
        # A group that never shrinks beside one that may go to 2 bits.
        "--pmkvq-final-bits", "0:16,1-5:k4v2", "--pmkvq-pool-bytes", "6MiB", "--max-running-requests", "12",
        "--chunked-prefill-size", "256", "--pmkvq-window", "64", "--decode-log-interval", "8",
        "--schedule-conservativeness", "0.05", "--page-size", "32", "--pmkvq-group-size", "32",
    ]  # fmt: skip
    with serve(REASONER, args, env=STRICT) as server:
        bodies = [{"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 1200}} for p in ids]
        out = generate_many(server, bodies, len(bodies))
        assert server.retracted() > 0
        assert all(a["meta_info"]["finish_reason"]["type"] == "stop" for a in out)
        assert sum(check(p, a["text"]) for p, a in zip(problems, out, strict=True)) >= len(problems) - 3
        server.flush()
        assert server.pool()["mapped_pages"] == 0
        assert not server.errors()


def test_bundled_model_alone_equals_stock() -> None:
    """Token ids of a big pool are those of ``--kv-quant none``; no page shrinks."""
    problems = problem_set(4, 60, 80, first=200)
    ids, _ = prompt_ids(REASONER, problems)
    got = compare(REASONER, ids, max(p.chain_tokens for p in problems) + 16, alone=True)
    assert got["ours_against_stock"] == 0
    assert got["shrinks"] == 0
    assert got["tokens"] > 4 * 500


# What differs between architectures beside their code: grouping of query heads, dtype.
FACTS: dict[str, dict[str, Any]] = {
    "llama": {"heads": 4, "kv_heads": 2, "dtype": torch.float16},
    "qwen2": {"heads": 8, "kv_heads": 1},  # biases on Q, K and V
    "qwen3": {"heads": 4, "kv_heads": 4},  # norms on Q and K
    "mistral": {"heads": 6, "kv_heads": 2},
}
HEAD_DIMS = (64, 128, 256)
# The bundled model is ("llama", 128, 16) in all other tests. The rest of the support matrix is in `make test-full`.
SAMPLE = (("qwen2", 64, 16), ("qwen3", 128, 32))
MATRIX = [
    *((a, d, p) for a in ("llama", "qwen2", "qwen3") for d in HEAD_DIMS for p in PAGE_SIZES),
    ("mistral", 128, 16),
]


@pytest.mark.parametrize(
    ("architecture", "head_dim", "page_size"),
    [row if row in SAMPLE else pytest.param(*row, marks=pytest.mark.full) for row in MATRIX],
)
def test_architectures_equal_stock_then_shrink(
    architecture: str, head_dim: int, page_size: int, tmp_path: Path
) -> None:
    """Random weights: same tokens as stock with a big pool; with a tiny one all finish, at low widths."""
    model = make_model(tmp_path / "model", architecture, head_dim=head_dim, **FACTS[architecture])
    prompts = [p[:n] for p, n in zip(random_prompts(7, 6, 320, 512), (1, 15, 16, 17, 100, 320), strict=True)]
    extra = ["--skip-tokenizer-init", "--context-length", "4096", "--dtype", "auto"]
    common = ["--disable-radix-cache", "--chunked-prefill-size", "2048", "--max-running-requests", "8", *extra]
    # Keys are rotated at one page size; 16-bit pages hold plain keys all the same.
    transform, finals = ("hadamard", "2") if page_size == 32 else ("none", "k4v2")
    pages = ["--page-size", str(page_size), "--pmkvq-key-transform", transform]
    tiny = [
        *pages, *extra, "--max-running-requests", "6", "--chunked-prefill-size", "64",
        "--pmkvq-pool-bytes", str(1000 * bytes_per_token(model)), "--pmkvq-final-bits", finals,
    ]  # fmt: skip
    with ExitStack() as stack:
        big, stock, small = start_together(
            stack,
            serve(model, [*common, *pages, "--pmkvq-pool-bytes", "64MiB"], device="cpu"),
            serve(model, [*common, "--max-total-tokens", "20000"], quant=False, device="cpu"),
            serve(model, tiny, device="cpu", env=STRICT),
        )
        assert answers(big, prompts, 48, 1) == answers(stock, prompts, 48, 1)
        assert not big.pool()["shrinks"]
        assert big.pool()["key_transform"] == transform
        bodies = [
            {"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 120, "ignore_eos": True}}
            for p in random_prompts(8, 12, 200, 512)
        ]
        out = generate_many(small, bodies, 6)
        assert all(len(a["output_ids"]) == 120 for a in out)
        shrinks = small.pool()["shrinks"]
        assert shrinks["8->4"] > 0
        assert shrinks["4->2"] > 0
        small.flush()
        assert small.pool()["mapped_pages"] == 0
        assert not small.errors()
