"""What the programs are asked: the bundled task, whose chains can be checked line by line, or a file of problems."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness import tasks
from benchmarks.harness.experiment import numbers
from benchmarks.reasoner import task


def right_lines(gold: str, chain: str) -> str:
    """The leading whole lines of ``chain`` that are those of the ``gold`` one; all of it if it ends right as well.

    A program has one right chain: each line executes the program's next one over what the lines before it defined.
    """
    if chain == gold:
        return chain
    same = len(os.path.commonprefix((gold, chain)))
    return chain[: gold.rfind(";", 0, same) + 1]


@dataclass(frozen=True)
class Problem:
    """A question, and how to judge what comes back.

    Attributes:
        question: text of the user's message.
        right: whether an output is right.
        answer_of: what an output answers, in one form for equal answers; None if it gives no answer.
        max_tokens: enough for a chain of thought and the answer.
        right_lines: the leading part of a chain that is right; None where nothing can check a chain.
        follow_ups: what a tutor is asked next in the same conversation.
        in_place: the question is no message but text that the assistant's own turn is to go on from.
    """

    question: str
    right: Callable[[str], bool]
    answer_of: Callable[[str], str | None]
    max_tokens: int
    right_lines: Callable[[str], str] | None = None
    follow_ups: tuple[Problem, ...] = ()
    in_place: bool = False


def answer_of(text: str) -> str | None:
    r"""The answer of a free text: its last ``\boxed{…}``, else its last number, else all of it.

    What stands before the last ``</think>`` does not count. Equal numbers are equal texts: ``1/2`` and ``0.5``.
    """
    part = tasks.final_part(text)
    given = tasks.boxed(part)
    if given is None:
        words = [word.strip("*,;:!?()") for word in part.split()]
        given = next((word for word in reversed(words) if tasks.number(word) is not None), part)
    value = tasks.number(given)
    return str(value) if value is not None else tasks.latex(given) or None


def traced(problem: task.Problem, follow_ups: int = 0) -> Problem:
    """A problem of the bundled task.

    The model was trained on conversations of one turn, so follow-ups go on in its answer: lines such as ``;t21=t18``
    that ask for a variable of the program once more, one token each.
    """
    rng = random.Random(problem.seed)

    def name(index: int) -> str:
        return f"t{(problem.start + index) % task.NAMES}"

    def follow_up(number: int) -> Problem:
        asked = rng.randrange(problem.lines)
        answer = f":{problem.values[asked]}"
        question = f";{name(problem.lines + number)}={name(asked)}"
        return Problem(question, lambda text: text == answer, str, max_tokens=1, in_place=True)

    def digit(text: str) -> str | None:
        answer = task.parse_answer(text)
        return None if answer is None else str(answer)

    return Problem(
        question=problem.prompt,
        right=lambda text: task.check(problem, text),
        answer_of=digit,
        max_tokens=problem.chain_tokens + 16,
        right_lines=lambda chain: right_lines(problem.chain, chain),
        follow_ups=tuple(follow_up(number) for number in range(1, follow_ups + 1)),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose problems and how they are asked; of every program."""
    parser.add_argument("--task", default="builtin", help="builtin, or a JSON-lines file; see docs/benchmarks.md")
    parser.add_argument("--checker", choices=sorted(tasks.CHECKERS), help="for records that name none")
    parser.add_argument("--lines", default="40-56", help="program lines of the bundled task, default %(default)s")
    parser.add_argument("--temperature", type=float, default=1.5, help="of sampled chains, default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="default: what the task needs, 1024 for files")
    numbers(parser, problems=(8, "how many"), concurrency=(4, "problems at a time"))


def load(options: argparse.Namespace, follow_ups: int = 0) -> list[Problem]:
    """The problems that the options name, each with as many follow-ups.

    Raises:
        ValueError: a file that holds too few or others than questions, or an option out of range.
        OSError: the file cannot be read.
    """
    if options.task == "builtin":
        low, high = tasks.line_range(options.lines)
        if high + follow_ups >= task.NAMES:
            raise ValueError(f"--lines {options.lines}: expected less than {task.NAMES - follow_ups}")
        found = [traced(problem, follow_ups) for problem in tasks.problem_set(options.problems, low, high)]
        bound = options.max_new_tokens
        return [replace(p, max_tokens=bound) for p in found] if bound else found
    items = tasks.load_jsonl(Path(options.task), options.checker, options.seed)
    each = 1 + follow_ups
    if len(items) < options.problems * each:
        raise ValueError(
            f"--problems {options.problems}: {options.task} holds {len(items)}, and each takes {each} "
            f"(lower --problems or --follow-ups)"
        )
    if any([m["role"] for m in item.messages] != ["user"] for item in items):
        raise ValueError(f"--task {options.task}: the programs ask one user message per problem, not a conversation")
    plain = [
        Problem(item.messages[0]["content"], item.check, answer_of, options.max_new_tokens or 1024) for item in items
    ]
    groups = [plain[i * each : (i + 1) * each] for i in range(options.problems)]
    return [replace(group[0], follow_ups=tuple(group[1:])) for group in groups]
