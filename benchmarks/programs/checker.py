"""Check a chain of the bundled task step by step, with nothing but the prompt and what the chain wrote before."""

from __future__ import annotations

import re

_STEP = re.compile(
    r"(?P<target>t\d+)="
    r"(?:(?P<constant>:\d)|(?P<left>t\d+):(?P<a>\d)(?P<op>[+-])(?P<right>t\d+):(?P<b>\d))"
    r"=(?P<again>t\d+):(?P<result>\d);"
)
_ANSWER = re.compile(r"(?P<target>t\d+)=(?P<asked>t\d+):(?P<value>\d)\?#:(?P<answer>\d)")


def right_lines(prompt: str, chain: str) -> str:
    """The leading whole lines of ``chain`` that are right, its answer included if that is right as well.

    A line is right if it is the program's next line, quotes every operand as an earlier line of the chain
    defined it, and gets the arithmetic (modulo 10) right.

    Args:
        prompt: a program, ``t17=:7;t18=:4;t19=t17+t18;t20=t19?``.
        chain: any text.
    """
    *program, question = prompt.split(";")
    values: dict[str, str] = {}
    end = 0
    for line in program:
        step = _STEP.match(chain, end)
        if step is None or not _is_right(line, step, values):
            return chain[:end]
        values[step["target"]] = step["result"]
        end = step.end()
    last = _ANSWER.fullmatch(chain, end)
    if last is None or f"{last['target']}={last['asked']}?" != question:
        return chain[:end]
    right = values.get(last["asked"]) == last["value"] == last["answer"]
    return chain if right else chain[:end]


def _is_right(line: str, step: re.Match[str], values: dict[str, str]) -> bool:
    target, _, expression = line.partition("=")
    if not target == step["target"] == step["again"]:
        return False
    if step["constant"]:
        return expression == step["constant"] == f":{step['result']}"
    a, b = int(step["a"]), int(step["b"])
    return (
        expression == f"{step['left']}{step['op']}{step['right']}"
        and values.get(step["left"]) == step["a"]
        and values.get(step["right"]) == step["b"]
        and int(step["result"]) == (a + b if step["op"] == "+" else a - b) % 10
    )
