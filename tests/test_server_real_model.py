"""SmolLM2-135M-Instruct on real servers: token-equal to stock while nothing shrinks, close to 16 bits once it has."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import requests
from transformers import AutoTokenizer

from benchmarks.accuracy import TASK_FLAGS
from benchmarks.harness import structured
from benchmarks.harness.servers import STRICT, Server, greedy, serve
from benchmarks.harness.texts import pieces
from sglang_pmkvq.kernels.rotary import MIN_CENTER_TOKENS
from sglang_pmkvq.serving.first_shrink import KEY_ERROR_HARMS
from tests.support.servers import sound, start_together

pytestmark = [pytest.mark.server, pytest.mark.slow]

CHUNK = 1280
COMMON = ["--chunked-prefill-size", str(CHUNK), "--max-running-requests", "2", "--context-length", "4096"]
# Whatever is not of the last chunk is read as codes, but for the first page.
STATIC = [*COMMON, "--pmkvq-pool-bytes", "256MiB", "--pmkvq-policy", "static", "--pmkvq-protect", "hard"]
STATIC += ["--pmkvq-window", "0", "--disable-radix-cache"]


def forced(server: Server, prompt: list[int]) -> np.ndarray:
    """Log-probabilities of the prompt's tokens beyond the first chunk."""
    rows = server.generate(**greedy(prompt, 1), return_logprob=True, logprob_start_len=0)["meta_info"]
    return np.array([row[0] for row in rows["input_token_logprobs"][CHUNK:]], float)


def asked(server: Server, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 48}
    reply = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).json()
    return str(reply["choices"][0]["message"]["content"])


def test_answers_and_low_bits_of_a_real_model(smollm2: Path) -> None:
    """The model has no bias of keys, so the server measures means at its first shrink."""
    (prompt,) = pieces(AutoTokenizer.from_pretrained(smollm2), "opticks", 1, 2 * CHUNK)
    with ExitStack() as stack:
        stock, ours = start_together(
            stack,
            serve(smollm2, COMMON, quant=False, device="cpu"),
            serve(smollm2, [*STATIC, "--pmkvq-final-bits", "4", *TASK_FLAGS["tools"]], device="cpu", env=STRICT),
        )
        answers = [asked(server, "What is the capital of France?") for server in (stock, ours)]
        assert "Paris" in answers[0] and answers[1] == answers[0]
        assert not any(ours.pool()["shrinks"].values()), "no page was old enough to shrink"

        off = float(np.abs(forced(ours, prompt) - forced(stock, prompt)).mean())
        assert 0.01 < off < 0.1, off
        pool = ours.pool()
        assert pool["measured_centers"]["tokens"] >= MIN_CENTER_TOKENS
        assert pool["measured_centers"]["layers"] == pool["measured_centers"]["of_layers"] == 30
        assert all(group["key_error"] < KEY_ERROR_HARMS for group in pool["key_error"].values())

        # A tool call by schema, its tools and examples far back in the prompt.
        (chain,) = structured.tool_chains(1, 0)
        chosen = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0, "max_tokens": 200}
        calls = json.loads(ours.converse(chain.messages, chain.tools, chain.respond, turns=1, **chosen)["text"])
        assert calls and set(calls[0]) == {"name", "arguments"}
        sound(ours)
