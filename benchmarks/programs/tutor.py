"""Tutor: a lesson of several questions in one conversation, each answered on top of everything said before.

Nothing forks; every turn comes back to what the turns before it left in the cache.

    python -m benchmarks.programs.tutor --url http://127.0.0.1:30000 --follow-ups 8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import sglang as sgl

from benchmarks.programs.frontend import Endpoint, State, execute, prompt_tokens
from benchmarks.programs.problems import Problem
from benchmarks.programs.runs import Outcome, Program, Shared, alone


@sgl.function
def tutor(s: State, lesson: Sequence[Problem]) -> None:
    """Sets ``answer_0``, ``answer_1``, …, greedy; one per question of ``lesson``."""
    s += sgl.user(lesson[0].question)
    s += sgl.assistant_begin()
    for turn, problem in enumerate(lesson):
        if turn:
            s["prefix"] = s.text()
            if problem.in_place:
                s += problem.question
            else:
                s += sgl.assistant_end()
                s += sgl.user(problem.question)
                s += sgl.assistant_begin()
        s += sgl.gen(f"answer_{turn}", max_tokens=problem.max_tokens, temperature=0)


def run(problem: Problem, endpoint: Endpoint, options: argparse.Namespace) -> Outcome:
    lesson = [problem, *problem.follow_ups]
    state = execute(tutor, endpoint, lesson=lesson)
    turns = range(1, len(lesson))
    return Outcome(
        right=[p.right(state[f"answer_{turn}"]) for turn, p in enumerate(lesson)],
        shared=Shared(state["prefix"], [prompt_tokens(state, f"answer_{turn}") for turn in turns]),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--follow-ups", type=int, default=6, help="tutor: questions after the first, default %(default)s"
    )


def follow_ups(options: argparse.Namespace) -> int:
    if options.follow_ups < 1:
        raise ValueError(f"--follow-ups {options.follow_ups}: expected at least 1")
    return int(options.follow_ups)


PROGRAM = Program("tutor", run, arguments, follow_ups=follow_ups)

if __name__ == "__main__":
    raise SystemExit(alone(PROGRAM, __doc__))
