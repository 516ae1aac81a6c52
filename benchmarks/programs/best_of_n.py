"""Best of n: n candidates sampled from one prompt; ``sgl.select`` takes the one the model itself finds likeliest.

``select`` compares log-probabilities per token of whole candidates, so one unlikely step in a long chain counts.
The candidates are forks of one state and ``select`` reads the same prompt again: the server keeps it once.

    python -m benchmarks.programs.best_of_n --url http://127.0.0.1:30000 --candidates 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import sglang as sgl

from benchmarks.programs.frontend import Endpoint, State, execute, prompt_tokens
from benchmarks.programs.problems import Problem
from benchmarks.programs.runs import Outcome, Program, Shared, alone


@sgl.function
def best_of_n(
    s: State,
    question: str,
    candidates: int,
    max_tokens: int,
    answer_of: Callable[[str], str | None],
) -> None:
    """Sets ``texts``, the candidates, and ``best``, one of them ("" if all are empty).

    Args:
        answer_of: what a candidate answers; those that answer are preferred, as a chain that was cut off may well be
            likely.
    """
    s += sgl.user(question)
    s += sgl.assistant_begin()
    s["prefix"] = s.text()
    forks = s.fork(candidates)
    forks += sgl.gen("candidate", max_tokens=max_tokens)
    s["texts"] = [fork["candidate"] for fork in forks]
    s["readers"] = [prompt_tokens(fork, "candidate") for fork in forks]
    distinct = list(dict.fromkeys(text for text in s["texts"] if text))
    choices = [text for text in distinct if answer_of(text) is not None] or distinct
    if len(choices) > 1:
        s += sgl.select("best", choices=choices)
    else:
        s["best"] = choices[0] if choices else ""


def run(problem: Problem, endpoint: Endpoint, options: argparse.Namespace) -> Outcome:
    state = execute(
        best_of_n,
        endpoint,
        question=problem.question,
        candidates=options.candidates,
        temperature=options.temperature,
        max_tokens=problem.max_tokens,
        answer_of=problem.answer_of,
    )
    return Outcome(
        right=[problem.right(state["best"])],
        candidates=[problem.right(text) for text in state["texts"]],
        shared=Shared(state["prefix"], state["readers"]),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--candidates", type=int, default=4, help="best-of-n: candidates per problem")


PROGRAM = Program("best-of-n", run, arguments)

if __name__ == "__main__":
    raise SystemExit(alone(PROGRAM, __doc__))
