"""SGLang's frontend language on a running server: the model's own chat template, and what requests used."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import ChatTemplate
from sglang.lang.interpreter import ProgramState as State
from sglang.lang.ir import SglFunction, SglSamplingParams


@dataclass
class TokenizerTemplate(ChatTemplate):
    """The chat template of a tokenizer, as the prefixes that SGLang's frontend puts before a role's text.

    SGLang's own list is searched by model path, and what is not found gets ``USER:`` and ``ASSISTANT:``.

    Attributes:
        opening: before the first user message; may hold a default system prompt.
    """

    opening: str = ""

    def get_prefix_and_suffix(self, role: str, hist_messages: list[dict[str, Any]]) -> tuple[str, str]:
        if role == "user" and not hist_messages:
            return self.opening, ""
        return super().get_prefix_and_suffix(role, hist_messages)


def template_of(tokenizer: Any) -> TokenizerTemplate:
    """What the tokenizer's chat template puts around messages, read off a rendered conversation.

    Raises:
        ValueError: it has none.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; give a chat model")
    said = ("question-1", "reply-1", "question-2")
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), said, strict=True)]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    opening, rest = text.split(said[0])
    _, rest = rest.split(said[1])
    between, generation = rest.split(said[2])
    bos = tokenizer.bos_token
    if bos and opening.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        opening = opening.removeprefix(bos)  # the server adds it
    roles = {"user": (between, ""), "assistant": (generation, "")}
    return TokenizerTemplate("tokenizer", None, roles, opening=opening)


class Endpoint(RuntimeEndpoint):
    """SGLang's backend for a running server, for one run of a program.

    Attributes:
        used: its requests, and their prompt, cached and output tokens.
        error: the first one that failed; the frontend itself only warns.
    """

    def __init__(self, url: str, template: ChatTemplate) -> None:
        super().__init__(url)
        self.chat_template = template
        self.used: Counter[str] = Counter()
        self.error: Exception | None = None
        self._lock = threading.Lock()

    def generate(self, s: Any, sampling_params: SglSamplingParams) -> tuple[str, dict[str, Any]]:
        with self._watched():
            text, meta = super().generate(s, sampling_params)
        self._count(meta)
        return text, meta

    def commit_lazy_operations(self, s: Any) -> None:
        with self._watched():
            super().commit_lazy_operations(s)

    def select(self, s: Any, *args: Any, **kwargs: Any) -> Any:
        with self._watched():
            return super().select(s, *args, **kwargs)

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        answer = super()._generate_http_request(s, data)
        for one in answer if isinstance(answer, list) else [answer]:
            self._count(one["meta_info"])
        return answer

    def _count(self, meta: dict[str, Any]) -> None:
        with self._lock:
            self.used["requests"] += 1
            self.used["output_tokens"] += meta["completion_tokens"]
            for name in ("prompt_tokens", "cached_tokens"):
                self.used[name] += meta[name]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with self._lock:
                self.error = self.error or error
            raise


def execute(function: SglFunction, endpoint: Endpoint, **arguments: Any) -> State:
    """Run a program to its end.

    Args:
        arguments: the program's own, and defaults for its ``sgl.gen``, such as ``temperature``.

    Raises:
        RuntimeError: the server refused one of its requests; the message is the server's.
    """
    try:
        state = function.run(**arguments, backend=endpoint)
        state.sync()
    except KeyError:  # the variable of a request that failed
        if endpoint.error is None:
            raise
    if endpoint.error is not None:
        raise RuntimeError(f"the server refused a request: {endpoint.error}") from endpoint.error
    return state
