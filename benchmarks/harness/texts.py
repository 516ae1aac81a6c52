"""What real models read: few-shot problems of GSM8K, needles in a book, and text that is forced upon them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from benchmarks.harness.tasks import Item, number, read_jsonl

BOOK = "Isaac.Newton-Opticks.txt"
SHOTS = 6
STOP = "Question:"
LENGTHS = (2048, 4096, 8192)
DEPTHS = 10
CITIES = (
    "Aarhus", "Bergen", "Cadiz", "Dresden", "Exeter", "Florence", "Ghent", "Haifa", "Izmir", "Jaipur", "Kyoto", "Lagos",
    "Mombasa", "Nantes", "Oslo", "Porto", "Quito", "Riga", "Seville", "Turin",
)  # fmt: skip


def read_text(source: str) -> str:
    """The text of a file, of JSON lines their questions and answers, or ``opticks``: Newton's Opticks.

    Raises:
        ValueError: a line holds neither, or the book is not installed. OSError: the file cannot be read.
    """
    if source != "opticks":
        path = Path(source)
        return "".join(itertools.starmap(_solved, _pairs(path))) if path.suffix == ".jsonl" else path.read_text("utf-8")
    try:
        found = [file for file in files("apache-tvm-ffi") or () if file.name == BOOK]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError("opticks: the package apache-tvm-ffi, which brings the book, is not here; give a text file")
    text = Path(str(found[0].locate())).read_text("utf-8", errors="replace")
    return text[text.index("_Part of the ensuing Discourse") :]


def pieces(tokenizer: Any, source: str, count: int, tokens: int, first: int = 0) -> list[list[int]]:
    """``count`` pieces of ``tokens`` tokens each that follow one another in a text, from piece ``first`` on.

    Raises:
        ValueError, OSError: as ``read_text``; or the text is too short.
    """
    ids = tokenizer(read_text(source), add_special_tokens=False)["input_ids"]
    if len(ids) < (first + count) * tokens:
        raise ValueError(f"{source} has {len(ids)} tokens, not {first + count} pieces of {tokens}")
    return [ids[n * tokens : (n + 1) * tokens] for n in range(first, first + count)]


# -- GSM8K ---------------------------------------------------------------------------------------------------


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Questions and answers of JSON lines."""

    def pair(record: dict[str, Any]) -> tuple[str, str]:
        asked, said = record.get("question"), record.get("answer")
        if not isinstance(asked, str) or not isinstance(said, str):
            raise ValueError('expected an object with the texts "question" and "answer"')
        return asked, said

    return list(read_jsonl(path, pair))


def _solved(asked: str, said: str) -> str:
    return f"{STOP} {asked}\nAnswer: {said}\n\n"


def final_number(text: str) -> str:
    """What stands behind the first ``####`` of an answer, before another question begins; else nothing."""
    match = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text.partition(STOP)[0])
    return match[1].replace(",", "") if match else ""


def gsm8k(path: Path) -> list[Item]:
    """Problems of a file of GSM8K but its first 8, which stand solved before each of the others.

    Raises:
        ValueError, OSError: the file is none.
    """
    pairs = _pairs(path)
    solved = "".join(itertools.starmap(_solved, pairs[:SHOTS]))

    def right(answer: str, text: str) -> bool:
        given = number(final_number(text))
        return given is not None and given == number(answer)

    items = []
    for asked, said in pairs[SHOTS:]:
        answer = final_number(said)
        prompt = f"{solved}{STOP} {asked}\nAnswer:"
        items.append(Item([], answer, partial(right, answer), prompt=prompt, gold=said, params={"stop": [STOP]}))
    return items


# -- needles -------------------------------------------------------------------------------------------------


def haystack(tokenizer: Any, sentences: Sequence[str], tokens: int, needles: Sequence[str]) -> str:
    """As many sentences as ``tokens`` tokens hold, a needle in the middle of each of as many equal parts of them."""
    sizes = [len(ids) for ids in tokenizer([*needles, *sentences], add_special_tokens=False)["input_ids"]]
    room = tokens - sum(sizes[: len(needles)])
    ends = itertools.takewhile(lambda end: end <= room, itertools.accumulate(sizes[len(needles) :]))
    out, left = [], list(needles)
    for sentence, end in zip(sentences, ends, strict=False):
        out.append(sentence)
        if left and end >= room * (len(needles) - len(left) + 0.5) / len(needles):
            out.append(left.pop(0))
    assert not left, "a text with so few sentences has no room for needles"
    return " ".join(out)


def needles(tokenizer: Any, text: str, seed: int) -> list[Item]:
    """A number asked for at each of 10 depths of 2K, 4K and 8K tokens; the ten of a length share their text."""
    rng = random.Random(seed)
    sentences = re.split(r"(?<=[.?!;])\s+", " ".join(text.split()))
    items = []
    for length in LENGTHS:
        numbers = {city: str(rng.randrange(10**6, 10**7)) for city in rng.sample(CITIES, DEPTHS)}
        hidden = [f"The secret number of {city} is {number}." for city, number in numbers.items()]
        start = rng.randrange(len(sentences) // 2)
        hay = haystack(tokenizer, sentences[start:], length - 64, hidden)
        for city, answer in numbers.items():
            asked = f"{hay}\n\nWhat is the secret number of {city} in the text above? Answer with the number only."
            found = partial(_found, answer)
            parts = {f"at {length:,} tokens": found}
            items.append(Item([{"role": "user", "content": asked}], answer, found, max_tokens=24, parts=parts))
    return items


def _found(answer: str, text: str) -> bool:
    return re.findall(r"\d{7,}", text.replace(",", ""))[:1] == [answer]
