"""Tree of thought: grow a chain a few lines at a time, several ways each time, and keep the best.

With a checker (the bundled task has one, ``checker.right_lines``) a node is cut back to the lines that are right and
the one that got furthest wins; without one, nodes compare by the mean log-probability of their tokens, as in beam
search. Every expansion forks a node, so what it holds so far is a prefix that its children share.

    python -m benchmarks.programs.tree_of_thought --url http://127.0.0.1:30000 --branch 4 --width 2
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sglang as sgl

from benchmarks.programs.frontend import Endpoint, State, execute, prompt_tokens, token_logprobs
from benchmarks.programs.problems import Problem
from benchmarks.programs.runs import Outcome, Program, Shared, alone


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
def tree_of_thought(
    s: State,
    question: str,
    branch: int,
    width: int,
    step_tokens: int,
    max_tokens: int,
    right_lines: Callable[[str], str] | None,
) -> None:
    """Sets ``chain``, the best one that was found, and ``steps``, the expansions on the way.

    Args:
        branch: children of a node. width: nodes that are kept. step_tokens: tokens that a child adds.
        max_tokens: bound on a path's tokens; those that a checker threw away count as well.
        right_lines: the leading part of a chain that is right; None: there is no checker.
    """
    s += sgl.user(question)
    s += sgl.assistant_begin()
    kept = [Node()]
    s["steps"] = 0
    for _ in range(math.ceil(max_tokens / step_tokens)):
        growing = [node for node in kept if not node.done]
        if not growing or kept[0].done:
            break
        groups = []
        for node in growing:
            state = s.fork(1)[0]
            state += node.chain
            forks = state.fork(branch)
            forks += sgl.gen("step", max_tokens=step_tokens, return_logprob=True)
            groups.append((node, state, forks))
        children = [node for node in kept if node.done]
        for node, _, forks in groups:
            for fork in forks:
                ended = fork.get_meta_info("step")["finish_reason"]["type"] == "stop"
                children.append(grow(node, fork["step"], token_logprobs(fork, "step"), ended, right_lines))
        # What the best node's children shared.
        _, state, forks = groups[0]
        s["prefix"] = state.text()
        s["readers"] = [prompt_tokens(fork, "step") for fork in forks]
        s["steps"] += len(groups)
        kept = prune(children, width)
    s["chain"] = kept[0].chain
    s += kept[0].chain


def run(problem: Problem, endpoint: Endpoint, options: argparse.Namespace) -> Outcome:
    state = execute(
        tree_of_thought,
        endpoint,
        question=problem.question,
        branch=options.branch,
        width=options.width,
        step_tokens=options.step_tokens,
        temperature=options.temperature,
        max_tokens=2 * problem.max_tokens,
        right_lines=problem.right_lines if options.check_lines else None,
    )
    return Outcome(
        right=[problem.right(state["chain"])],
        shared=Shared(state["prefix"], state["readers"]),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--branch", type=int, default=3, help="tree-of-thought: children of a node")
    parser.add_argument("--width", type=int, default=2, help="tree-of-thought: nodes kept at a time")
    parser.add_argument("--step-tokens", type=int, default=80, help="tree-of-thought: tokens that a child adds")
    parser.add_argument(
        "--check-lines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tree-of-thought: check lines where the task can be checked; else log-probabilities decide",
    )


PROGRAM = Program("tree-of-thought", run, arguments)

if __name__ == "__main__":
    raise SystemExit(alone(PROGRAM, __doc__))
