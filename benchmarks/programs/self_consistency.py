"""Self-consistency: k chains of thought sampled from one prompt; the answer that most of them give.

The chains are forks of one state, so the server keeps the prompt once for all of them.

    python -m benchmarks.programs.self_consistency --url http://127.0.0.1:30000 --chains 8
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence

import sglang as sgl

from benchmarks.programs.frontend import Endpoint, State, execute, prompt_tokens
from benchmarks.programs.problems import Problem
from benchmarks.programs.runs import Outcome, Program, Shared, alone


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first of them in a tie; None only if there is none at all."""
    given = Counter(answer for answer in answers if answer is not None)
    return given.most_common(1)[0][0] if given else None


@sgl.function
def self_consistency(
    s: State,
    question: str,
    chains: int,
    max_tokens: int,
    answer_of: Callable[[str], str | None],
) -> None:
    """Sets ``chains`` and ``answers``, one of each per fork, ``answer`` and ``chain``, the first one that gives it.

    Args:
        answer_of: what a chain answers, in one form for equal answers; None if it gives no answer.
    """
    s += sgl.user(question)
    s += sgl.assistant_begin()
    s["prefix"] = s.text()
    forks = s.fork(chains)
    forks += sgl.gen("chain", max_tokens=max_tokens)
    s["chains"] = [fork["chain"] for fork in forks]
    s["readers"] = [prompt_tokens(fork, "chain") for fork in forks]
    s["answers"] = [answer_of(chain) for chain in s["chains"]]
    s["answer"] = vote(s["answers"])
    s["chain"] = s["chains"][s["answers"].index(s["answer"])]


def run(problem: Problem, endpoint: Endpoint, options: argparse.Namespace) -> Outcome:
    state = execute(
        self_consistency,
        endpoint,
        question=problem.question,
        chains=options.chains,
        temperature=options.temperature,
        max_tokens=problem.max_tokens,
        answer_of=problem.answer_of,
    )
    return Outcome(
        right=[problem.right(state["chain"])],
        candidates=[problem.right(chain) for chain in state["chains"]],
        shared=Shared(state["prefix"], state["readers"]),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chains", type=int, default=4, help="self-consistency: chains per problem")


PROGRAM = Program("self-consistency", run, arguments)

if __name__ == "__main__":
    raise SystemExit(alone(PROGRAM, __doc__))
