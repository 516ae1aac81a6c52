"""Centred keys on real servers: a huge bias does no harm by default and is warned of otherwise; means are measured."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.servers import REASONER, STRICT, Server, greedy, serve
from benchmarks.harness.tasks import random_prompts
from sglang_pmkvq.kernels.rotary import MIN_CENTER_TOKENS
from sglang_pmkvq.serving.first_shrink import KEY_ERROR_HARMS
from tests.support.models import make_model
from tests.support.servers import metrics, start_together

pytestmark = pytest.mark.server

CHUNK = 256
# Whatever is not of the last chunk is read as codes, or as it is where finals are 16 bits.
STATIC = [
    "--pmkvq-policy", "static", "--pmkvq-window", "0", "--pmkvq-sink-tokens", "0", "--disable-radix-cache",
    "--chunked-prefill-size", str(CHUNK), "--max-running-requests", "4",
]  # fmt: skip
PLAIN = ["--pmkvq-key-center", "none", "--pmkvq-key-transform", "none"]


def forced(server: Server, prompt: list[int]) -> np.ndarray:
    """Log-probabilities of the prompt's tokens beyond the first chunk."""
    body = {**greedy(prompt, 1), "return_logprob": True, "logprob_start_len": 0}
    rows = server.generate(**body)["meta_info"]["input_token_logprobs"]
    return np.array([row[0] for row in rows[CHUNK:]], float)


def test_a_huge_bias_of_keys(tmp_path: Path) -> None:
    """Random weights of the Qwen2 family, 300 in one pair of the key bias; 4 bits, as soon as a page is written."""
    model = make_model(tmp_path / "model", "qwen2", layers=2, heads=4, kv_heads=2, key_bias=300.0)
    common = [*STATIC, "--skip-tokenizer-init", "--context-length", "2048", "--pmkvq-pool-bytes", "8MiB"]
    (prompt,) = random_prompts(5, 1, 1024, 512)
    with ExitStack() as stack:
        exact, ours, plain = start_together(
            stack,
            serve(model, [*common, "--pmkvq-final-bits", "16"], device="cpu"),
            serve(model, [*common, "--pmkvq-final-bits", "4", "--enable-metrics"], device="cpu", env=STRICT),
            serve(model, [*common, "--pmkvq-final-bits", "4", *PLAIN], device="cpu"),
        )
        want, got, bad = (forced(server, prompt) for server in (exact, ours, plain))
        close, far = np.abs(got - want).mean(), np.abs(bad - want).mean()
        assert close < 0.1
        assert far > 5 * close

        pool = ours.pool()
        (group,) = pool["groups"]
        assert (group["key_transform"], group["value_transform"]) == ("hadamard", "none")
        assert group["key_center"] == pool["key_center"] == "bias" and group["center_pairs"][1] >= 8
        assert "key transform hadamard, value transform none, key center bias in" in ours.log()
        assert pool["storage_bytes"] <= pool["budget_bytes"] and pool["measured_centers"] is None
        error = pool["key_error"]["k4v4"]["key_error"]
        assert 0 < error < KEY_ERROR_HARMS
        assert metrics(ours)["sglang:pmkvq_key_error{group=k4v4}"] == pytest.approx(error)
        assert "attention logits" not in ours.log() and "adds a large bias" not in ours.log()

        assert plain.pool()["key_error"]["k4v4"]["key_error"] > KEY_ERROR_HARMS
        assert plain.log().count("change attention logits by") == 1 and "`pmkvq check MODEL`" in plain.log()
        assert plain.log().count("--pmkvq-key-center none leaves it in keys that end below 8 bits") == 1
        assert plain.pool()["groups"][0]["no_key_center"] == "switched off"
        assert not ours.errors() and not plain.errors()


def test_means_are_measured_once_and_survive_a_flush() -> None:
    """The bundled model has no bias of keys; its first long prompt gives the means, whatever short ones came before."""
    args = [*STATIC, "--pmkvq-final-bits", "4", "--pmkvq-pool-bytes", "32MiB", "--chunked-prefill-size", "1024"]
    args += ["--context-length", "2048"]
    (prompt,) = random_prompts(6, 1, 1200, 100)
    with serve(REASONER, args, env=STRICT, device="cpu") as server:
        assert server.pool()["key_center"] == "mean"
        server.generate(**greedy(prompt[:100], 4, ignore_eos=True))
        pool = server.pool()
        assert pool["measured_centers"] is None and not any(pool["shrinks"].values()), "codes wait for a mean"
        server.generate(**greedy(prompt, 4, ignore_eos=True))
        pool = server.pool()
        measured = pool["measured_centers"]
        assert measured["tokens"] >= MIN_CENTER_TOKENS and measured["of_layers"] == 6
        assert server.log().count("centres of keys measured over") == 1
        assert "keys have no centres yet" not in server.log()
        assert 0 < pool["key_error"]["k4v4"]["key_error"] < KEY_ERROR_HARMS
        server.flush()
        server.generate(**greedy(prompt, 4, ignore_eos=True))
        assert server.pool()["measured_centers"] == measured
        assert pool["storage_bytes"] == server.pool()["storage_bytes"] <= pool["budget_bytes"]
        assert not server.errors()
