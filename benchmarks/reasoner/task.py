"""Program tracing: a reasoning task whose long chain of thought a program can check.

A *program* is a list of numbered assignments over one-digit values, arithmetic modulo 10::

    t17=:7;t18=:4;t19=t17+t18;t20=t19-t17;t21=t20?

The last line asks for a variable. The *chain of thought* executes the program line by line and looks
every operand up in what it wrote before; the answer follows the ``#``::

    t17=:7=t17:7;t18=:4=t18:4;t19=t17:7+t18:4=t19:1;t20=t19:1-t17:7=t20:4;t21=t20:4?#:4

Every digit of the chain rests on two earlier digits, so one wrong lookup anywhere on the path to the
asked variable gives a wrong answer: errors propagate, they do not average out.

Values carry a colon because ``t3`` next to a bare ``7`` would read ``t37``. A value always stands directly behind the
name it belongs to, where it is defined and where it is used, so that looking a variable up is finding an earlier
occurrence of its name. Tokens and lengths: README.md.

Pure Python, no third-party packages; ``random.Random`` makes it identical on every machine.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

NAMES = 256
"""Variable names are ``t0`` .. ``t255``; a program may not have more lines than names."""

EVAL_SEED_START = 1_000_000_000
"""Seeds below are for training only, seeds from here on for evaluation only."""

MIN_DEPENDENCE = 0.6
"""Least share of the program's lines that the answer of an evaluated problem depends on."""

_ANSWER = re.compile(r"#:([0-9])\s*(?:<\|end\|>)?\s*\Z")


@dataclass(frozen=True)
class Line:
    """One assignment: a constant (``op == ""``, value in ``left``) or ``left op right`` (line indices)."""

    op: str
    left: int
    right: int = -1


@dataclass(frozen=True)
class Problem:
    """A program, its question, and the gold chain of thought."""

    seed: int
    start: int
    """Number of the first line's variable; line ``i`` assigns ``t{(start + i) % NAMES}``."""
    program: tuple[Line, ...]
    asked: int
    """Index of the line whose variable the question asks for."""
    values: tuple[int, ...]
    """The value (0..9) that each line assigns."""
    prompt: str
    chain: str
    """Gold chain of thought, answer included, without the end token."""
    answer: int

    @property
    def lines(self) -> int:
        """Assignments in the program (the question line not counted)."""
        return len(self.program)

    @property
    def chain_tokens(self) -> int:
        """Tokens of the gold chain, the end token included."""
        constants = sum(line.op == "" for line in self.program)
        return 10 * (self.lines - constants) + 6 * constants + 7


def dependence(program: tuple[Line, ...] | list[Line], asked: int) -> float:
    """Share of a program's lines that the answer depends on."""
    needed = {asked}
    for index in range(asked, -1, -1):  # operands always precede their line
        line = program[index]
        if index in needed and line.op:
            needed.update((line.left, line.right))
    return len(needed) / len(program)


def _draw(rng: random.Random, lines: int, constants: int) -> tuple[list[Line], int]:
    """Draw a program of ``lines`` lines with exactly ``constants`` constants, and the asked line."""
    first = min(3, constants)
    later = set(rng.sample(range(first, lines), constants - first))
    program: list[Line] = []
    unused: list[int] = []
    for index in range(lines):
        if index < first or index in later:
            program.append(Line("", rng.randrange(10)))
        else:
            # Taking one operand from the variables nothing has used yet keeps most lines on the path to
            # the answer; the other is mostly uniform over all earlier lines: lookups reach any distance.
            left = rng.choice(unused) if unused and rng.random() < 0.85 else rng.randrange(index)
            right = rng.choice(unused) if unused and rng.random() < 0.25 else rng.randrange(index)
            if rng.random() < 0.5:
                left, right = right, left
            unused = [name for name in unused if name not in (left, right)]
            program.append(Line("+" if rng.random() < 0.5 else "-", left, right))
        unused.append(index)
    asked = lines - 1 if rng.random() < 0.8 else rng.randrange(max(0, lines - 8), lines)
    return program, asked


def run(program: tuple[Line, ...] | list[Line]) -> list[int]:
    """Execute a program; the value of each line, 0..9."""
    values: list[int] = []
    for line in program:
        if not line.op:
            values.append(line.left)
        else:
            sign = 1 if line.op == "+" else -1
            values.append((values[line.left] + sign * values[line.right]) % 10)
    return values


def make_problem(seed: int, lines: int, constants: int | None = None) -> Problem:
    """The problem of this seed with ``lines`` assignments (2..255).

    ``constants`` fixes the number of constant lines, and so the exact length (training uses this to make
    batches without padding); by default it is drawn: three, and one more in about sixteen lines. A problem for
    evaluation has no more than leave its answer enough lines to depend on.

    Raises:
        ValueError: ``lines`` is out of range, or so many ``constants`` are asked of a problem for evaluation.
    """
    if not 2 <= lines < NAMES:
        raise ValueError(f"lines must be 2..{NAMES - 1}, got {lines}")
    rng = random.Random(seed * 1024 + lines)
    most = lines - 1
    if seed >= EVAL_SEED_START:
        # n operations reach n + 1 other lines at most: a tree.
        most = max(c for c in range(1, lines) if 2 * (lines - c) + 1 >= MIN_DEPENDENCE * lines)
    if constants is None:
        constants = min(most, 3 + sum(rng.random() < 1 / 16 for _ in range(lines - 3)))
    if constants > most:
        raise ValueError(f"a problem of {lines} lines has at most {most} constants, got {constants}")
    program, asked = _draw(rng, lines, constants)
    if seed >= EVAL_SEED_START:
        while dependence(program, asked) < MIN_DEPENDENCE:
            program, asked = _draw(rng, lines, constants)
    start = rng.randrange(NAMES)
    values = run(program)
    prompt, chain = render(program, asked, start, values)
    return Problem(seed, start, tuple(program), asked, tuple(values), prompt, chain, values[asked])


def eval_problem(index: int, low: int, high: int) -> Problem:
    """Evaluation problem number ``index``; its number of lines is uniform in ``low..high``."""
    seed = EVAL_SEED_START + index
    return make_problem(seed, random.Random(seed).randint(low, high))


def render(
    program: tuple[Line, ...] | list[Line], asked: int, start: int, values: list[int] | tuple[int, ...]
) -> tuple[str, str]:
    """Write a program and its execution as ``(prompt, chain)``."""

    def name(index: int) -> str:
        return f"t{(start + index) % NAMES}"

    prompt: list[str] = []
    chain: list[str] = []
    for index, line in enumerate(program):
        target = name(index)
        if not line.op:
            prompt.append(f"{target}=:{line.left};")
            chain.append(f"{target}=:{line.left}={target}:{line.left};")
            continue
        left, right = name(line.left), name(line.right)
        prompt.append(f"{target}={left}{line.op}{right};")
        chain.append(
            f"{target}={left}:{values[line.left]}{line.op}{right}:{values[line.right]}={target}:{values[index]};"
        )
    question, wanted = name(len(program)), name(asked)
    prompt.append(f"{question}={wanted}?")
    chain.append(f"{question}={wanted}:{values[asked]}?#:{values[asked]}")
    return "".join(prompt), "".join(chain)


def messages(problem: Problem) -> list[dict[str, str]]:
    """The problem as chat messages, for an OpenAI-compatible server or ``apply_chat_template``."""
    return [{"role": "user", "content": problem.prompt}]


def parse_answer(text: str) -> int | None:
    """The answer that a generated text ends with, or ``None`` if it does not end with one."""
    found = _ANSWER.search(text)
    return int(found.group(1)) if found else None


def check(problem: Problem, text: str) -> bool:
    """Whether a generated text ends with the right answer (the chain before it is not judged)."""
    return parse_answer(text) == problem.answer
