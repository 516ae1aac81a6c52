"""The programs: self-consistency, tree of thought, tutor and best of n.

Each is an ``sgl.function`` over a problem and the command's options. Their forks go on from one state, so the server
keeps what they share once. A program sets ``answers``, pairs of a problem and the text to be judged, ``prefix``, the
largest text that its requests shared, ``readers``, the prompt tokens of each request that goes on from it, and
``candidates``, the chains that it chose from, if any.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sglang as sgl
from sglang.lang.interpreter import ProgramState as State

from benchmarks.harness.experiment import numbers
from benchmarks.programs.problems import Problem
from benchmarks.programs.runs import Program


def prompt_tokens(state: State, name: str) -> int:
    """Tokens of the prompt that ``sgl.gen(name)`` went on from."""
    return int(state.get_meta_info(name)["prompt_tokens"])


def sample(s: State, problem: Problem, count: int) -> None:
    """Ask ``problem`` and sample ``count`` chains from one prompt."""
    s += sgl.user(problem.question)
    s += sgl.assistant_begin()
    s["prefix"] = s.text()
    forks = s.fork(count)
    forks += sgl.gen("chain", max_tokens=problem.max_tokens)
    s["candidates"] = [fork["chain"] for fork in forks]
    s["readers"] = [prompt_tokens(fork, "chain") for fork in forks]


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first of them in a tie; None only if there is none at all."""
    given = Counter(answer for answer in answers if answer is not None)
    return given.most_common(1)[0][0] if given else None


@sgl.function
def self_consistency(s: State, problem: Problem, options: argparse.Namespace) -> None:
    """Chains of thought sampled from one prompt; the answer that most of them give."""
    sample(s, problem, options.chains)
    answers = [problem.answer_of(chain) for chain in s["candidates"]]
    s["answers"] = [(problem, s["candidates"][answers.index(vote(answers))])]


@sgl.function
def best_of_n(s: State, problem: Problem, options: argparse.Namespace) -> None:
    """Candidates sampled from one prompt; ``sgl.select`` takes the one that the model itself finds likeliest.

    It compares log-probabilities per token of whole candidates, so one unlikely step in a long chain counts. Those that
    answer are preferred, as a chain that was cut off may well be likely.
    """
    sample(s, problem, options.candidates)
    distinct = list(dict.fromkeys(text for text in s["candidates"] if text))
    choices = [text for text in distinct if problem.answer_of(text) is not None] or distinct
    if len(choices) > 1:
        s += sgl.select("best", choices=choices)
    else:
        s["best"] = choices[0] if choices else ""
    s["answers"] = [(problem, s["best"])]


@dataclass(frozen=True)
class Node:
    """A chain so far.

    Attributes:
        chain: its text. done: it has ended.
        checked: characters of it that a checker confirmed; 0 without one.
        logprob: sum over its tokens, natural logarithm. tokens: how many it has. Both 0 with a checker.
    """

    chain: str = ""
    done: bool = False
    checked: int = 0
    logprob: float = 0.0
    tokens: int = 0

    @property
    def rank(self) -> tuple[int, bool, float]:
        """Higher is better."""
        return self.checked, self.done, self.logprob / max(1, self.tokens)


def grow(
    node: Node, text: str, logprobs: Sequence[float], done: bool, right_lines: Callable[[str], str] | None
) -> Node:
    """The child that ``text`` makes of ``node``; with a checker, without what does not check out."""
    chain = node.chain + text
    if right_lines is None:
        return Node(chain, done, logprob=node.logprob + sum(logprobs), tokens=node.tokens + len(logprobs))
    right = right_lines(chain)
    return Node(right, done and right == chain, checked=len(right))


def prune(nodes: Sequence[Node], width: int) -> list[Node]:
    """The ``width`` best, best first, without chains that a better one goes on from."""
    kept: list[Node] = []
    for node in sorted(nodes, key=lambda node: node.rank, reverse=True):
        if len(kept) < width and not any(better.chain.startswith(node.chain) for better in kept):
            kept.append(node)
    return kept


@sgl.function
def tree_of_thought(s: State, problem: Problem, options: argparse.Namespace) -> None:
    """Grow a chain a few lines at a time, several ways each time, and keep the best.

    With a checker a node is cut back to the lines that are right and the one that got furthest wins; without one, nodes
    compare by the mean log-probability of their tokens, as in beam search. A path may have twice the problem's tokens:
    those that a checker threw away count as well.
    """
    s += sgl.user(problem.question)
    s += sgl.assistant_begin()
    kept = [Node()]
    for _ in range(math.ceil(2 * problem.max_tokens / options.step_tokens)):
        growing = [node for node in kept if not node.done]
        if not growing or kept[0].done:
            break
        groups = []
        for node in growing:
            state = s.fork(1)[0]
            state += node.chain
            forks = state.fork(options.branch)
            forks += sgl.gen("step", max_tokens=options.step_tokens, return_logprob=True)
            groups.append((node, state, forks))
        children = [node for node in kept if node.done]
        for node, _, forks in groups:
            for fork in forks:
                meta, check = fork.get_meta_info("step"), problem.right_lines if options.check_lines else None
                logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
                children.append(grow(node, fork["step"], logprobs, meta["finish_reason"]["type"] == "stop", check))
        # What the best node's children shared.
        _, state, forks = groups[0]
        s["prefix"] = state.text()
        s["readers"] = [prompt_tokens(fork, "step") for fork in forks]
        kept = prune(children, options.width)
    s["candidates"], s["answers"] = [], [(problem, kept[0].chain)]
    s += kept[0].chain


@sgl.function
def tutor(s: State, problem: Problem, options: argparse.Namespace) -> None:
    """Several questions in one conversation, each answered greedily on top of everything said before."""
    lesson = [problem, *problem.follow_ups]
    s += sgl.user(problem.question)
    s += sgl.assistant_begin()
    for turn, asked in enumerate(lesson):
        if turn:
            s["prefix"] = s.text()
            if asked.in_place:
                s += asked.question
            else:
                s += sgl.assistant_end()
                s += sgl.user(asked.question)
                s += sgl.assistant_begin()
        s += sgl.gen(f"answer_{turn}", max_tokens=asked.max_tokens, temperature=0)
    s["readers"] = [prompt_tokens(s, f"answer_{turn}") for turn in range(1, len(lesson))]
    s["candidates"] = []
    s["answers"] = [(asked, s[f"answer_{turn}"]) for turn, asked in enumerate(lesson)]


SELF_CONSISTENCY = Program("self-consistency", self_consistency)
TREE_OF_THOUGHT = Program("tree-of-thought", tree_of_thought)
TUTOR = Program("tutor", tutor, follow_ups=lambda options: options.follow_ups)
BEST_OF_N = Program("best-of-n", best_of_n)
PROGRAMS = {program.name: program for program in (SELF_CONSISTENCY, TREE_OF_THOUGHT, TUTOR, BEST_OF_N)}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the single programs."""
    numbers(parser, chains=(4, "self-consistency: chains per problem"), candidates=(4, "best-of-n: per problem"))
    numbers(parser, branch=(3, "tree-of-thought: children of a node"), width=(2, "tree-of-thought: nodes kept"))
    numbers(parser, step_tokens=(80, "tree-of-thought: tokens that a child adds"))
    numbers(parser, follow_ups=(6, "tutor: questions after the first"))
    checked = "tree-of-thought: check lines where the task can be checked; else log-probabilities decide"
    parser.add_argument("--check-lines", action=argparse.BooleanOptionalAction, default=True, help=checked)
