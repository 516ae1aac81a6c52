"""Problems with checkable answers: the bundled task, or a JSON-lines file of prompts and answers.

A record of a file has a prompt (``prompt``, ``question``, ``problem`` or ``Question``, or ``messages`` as chat
messages) and an answer (``answer``, ``Answer`` or ``target``); AIME and MATH-500 files are of this form. GPQA's own
columns (``Question``, ``Correct Answer``, ``Incorrect Answer 1`` …) become multiple choice, options in an order that
depends only on the seed and the question. ``checker`` in a record overrides that of the command.

Checkers compare what stands behind the last ``</think>``, if there is one; docs/benchmarks.md says when each is right.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer

from benchmarks.reasoner import task
from benchmarks.reasoner.task import Problem

Read = TypeVar("Read")
PROMPT_KEYS = ("prompt", "question", "problem", "Question", "Problem")
ANSWER_KEYS = ("answer", "Answer", "target", "Correct Answer")
LETTERS = "ABCDEFGHIJ"
INSTRUCTIONS = {
    "exact": "",
    "numeric": "Please reason step by step, and put your final answer within \\boxed{}.",
    "boxed": "Please reason step by step, and put your final answer within \\boxed{}.",
    "choice": "Please reason step by step, and put the letter of your answer within \\boxed{}.",
}

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_FRACTION = re.compile(r"\\d?t?frac\{([^{}]+)\}\{([^{}]+)\}|\\d?t?frac(\d)(\d)")


@dataclass(frozen=True)
class Item:
    """A problem to send and how to judge what comes back.

    Attributes:
        messages: chat messages.
        answer: the right answer.
        check: whether an output is right.
        max_tokens: output tokens that suffice, where that is known.
        prompt: plain text to be continued, in place of messages.
        gold: a right answer in full, where there is one; its tokens are taken as those of an answer.
        params: further sampling parameters.
        parts: what else to count of an output.
        tools: definitions of tools; the output is then a JSON list of the calls of a conversation.
        respond: what the tools say to a call.
    """

    messages: list[dict[str, Any]]
    answer: str
    check: Callable[[str], bool]
    max_tokens: int | None = None
    prompt: str | None = None
    gold: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Callable[[str], bool]] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    respond: Callable[[dict[str, Any]], str] = str


def final_part(text: str) -> str:
    """What a reasoning model wrote behind its thoughts."""
    return text.rpartition("</think>")[2].strip()


def boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{…}`` with its braces balanced, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None


def number(text: str) -> Fraction | None:
    """``text`` as an exact number: integers with thousands commas, decimals, ``a/b``, ``\\frac{a}{b}``; else None."""
    plain = _FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)
    plain = plain.replace("\\!", "").replace("{,}", ",").strip().strip("$").rstrip(".%").removesuffix("\\").strip()
    if not re.fullmatch(_NUMBER, plain):
        return None
    top, _, bottom = plain.replace(",", "").replace(" ", "").partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / int(bottom or 1)


def latex(text: str) -> str:
    """Text of a formula without spacing, style and delimiters."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|!|:|quad|qquad)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|\\%|[%$]", "", text)
    return re.sub(r"\s+", "", text).rstrip(".")


def same(given: str, answer: str) -> bool:
    """Equal as numbers if both are, else as formulas' text."""
    a, b = number(given), number(answer)
    return a == b if a is not None and b is not None else latex(given) == latex(answer)


def check_exact(text: str, answer: str) -> bool:
    return final_part(text).split() == answer.split()


def check_numeric(text: str, answer: str) -> bool:
    part = final_part(text)
    given = boxed(part)
    if given is None or number(given) is None:
        found = _NUMBER.findall(given if given is not None else part)
        given = found[-1] if found else None
    return given is not None and number(given) is not None and number(given) == number(answer)


def check_boxed(text: str, answer: str) -> bool:
    given = boxed(final_part(text))
    return given is not None and same(given, answer)


def check_choice(text: str, answer: str) -> bool:
    part = final_part(text)
    given = boxed(part)
    letter = None
    if given is not None:
        match = re.search(r"(?<![A-Za-z])([A-J])(?![A-Za-z])", re.sub(r"\\text\w*", "", given))
        letter = match[1] if match else None
    else:
        said = re.findall(r"(?i:answer(?:\s+is|:)?)\s*:?\s*\**\(?([A-J])\)?(?![A-Za-z])", part)
        alone = re.search(r"^\W*([A-J])\W*\Z", part, re.M)
        letter = said[-1] if said else alone[1] if alone else None
    return letter == answer.strip().strip("()")


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "exact": check_exact,
    "numeric": check_numeric,
    "boxed": check_boxed,
    "choice": check_choice,
}


def read_jsonl(path: Path, parse: Callable[[dict[str, Any]], Read]) -> Iterator[Read]:
    """What ``parse`` makes of each object of a file of JSON lines.

    Raises:
        ValueError: a line is no object, or ``parse`` refuses it; names the line. OSError: the file cannot be read.
    """
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield parse(json.loads(line))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}:{n}: {error}") from error


def load_jsonl(path: Path, checker: str | None, seed: int) -> list[Item]:
    """The problems of a file.

    Args:
        checker: for records without one of their own; None: ``choice`` for GPQA's columns, else ``boxed``.
        seed: of the order of options.

    Raises:
        ValueError: a record cannot be used; names the line and what is missing. OSError: the file cannot be read.
    """
    items = list(read_jsonl(path, lambda record: _item(record, checker, seed)))
    if not items:
        raise ValueError(f"{path} holds no problems; expected JSON lines with a prompt and an answer")
    return items


def _item(record: dict[str, Any], checker: str | None, seed: int) -> Item:
    answer = next((record[key] for key in ANSWER_KEYS if record.get(key) is not None), None)
    prompt = next((record[key] for key in PROMPT_KEYS if isinstance(record.get(key), str)), None)
    messages = record.get("messages")
    if answer is None:
        raise ValueError(f"no answer; expected one of {', '.join(ANSWER_KEYS)}")
    if prompt is None and not (isinstance(messages, list) and messages):
        raise ValueError(f"no prompt; expected messages or one of {', '.join(PROMPT_KEYS)}")
    answer = str(answer)
    wrong = [record[key] for key in sorted(record) if key.startswith("Incorrect Answer")]
    name = record.get("checker") or checker or ("choice" if wrong else "boxed")
    if name not in CHECKERS:
        raise ValueError(f"unknown checker {name!r}; expected one of {', '.join(CHECKERS)}")
    if wrong:
        prompt, answer = _options(str(prompt), answer, list(map(str, wrong)), seed)
    if not messages:
        instruction = INSTRUCTIONS[name]
        messages = [{"role": "user", "content": f"{prompt}\n{instruction}" if instruction else prompt}]
    return Item(messages, answer, lambda text: CHECKERS[name](text, answer))


def _options(question: str, right: str, wrong: Sequence[str], seed: int) -> tuple[str, str]:
    """A multiple-choice question, and the letter of its answer."""
    digest = hashlib.sha256(f"{seed} {question}".encode()).digest()
    order = [right, *wrong]
    random.Random(digest).shuffle(order)
    lines = [f"{letter}) {option.strip()}" for letter, option in zip(LETTERS, order, strict=False)]
    return "\n".join([question.strip(), "", *lines]), LETTERS[order.index(right)]


def line_range(lines: str) -> tuple[int, int]:
    """``low-high`` of ``--lines``, or one number for both.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", lines)
    if not match:
        raise ValueError(f"--lines {lines}: expected a range such as 64-128")
    return int(match[1]), int(match[2] or match[1])


def problem_set(count: int, low: int, high: int, first: int = 0) -> list[Problem]:
    """Evaluation problems of the bundled task, numbers ``first`` and on, with programs of ``low`` to ``high`` lines."""
    return [task.eval_problem(first + i, low, high) for i in range(count)]


def builtin(count: int, lines: str, first: int = 0) -> list[Item]:
    """The same as items; ``lines`` is ``low-high``.

    Raises:
        ValueError: ``lines`` is no range.
    """
    return [
        Item(task.messages(p), str(p.answer), partial(task.check, p), p.chain_tokens)
        for p in problem_set(count, *line_range(lines), first)
    ]


def chat_ids(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> list[int]:
    """Token ids of a conversation up to where the answer begins."""
    options = {"add_generation_prompt": True, "return_dict": False, "tools": tools or None}
    return list(tokenizer.apply_chat_template(messages, **options))


def item_ids(tokenizer: Any, item: Item) -> list[int]:
    """Token ids of a problem up to where the answer begins."""
    if item.prompt is not None:
        return list(tokenizer(item.prompt)["input_ids"])
    return chat_ids(tokenizer, item.messages, item.tools)


def prompt_ids(model: Path, problems: Sequence[Problem]) -> tuple[list[list[int]], int]:
    """Token ids of each chat prompt, and the end-of-answer token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [chat_ids(tokenizer, task.messages(p)) for p in problems], tokenizer.eos_token_id


def random_prompts(seed: int, count: int, tokens: int, vocab: int) -> list[list[int]]:
    """Token ids from 8 on, drawn alike; [count][tokens]."""
    rng = random.Random(seed)
    return [[rng.randrange(8, vocab) for _ in range(tokens)] for _ in range(count)]
