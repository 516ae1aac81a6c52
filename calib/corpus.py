"""Calibration data: token sequences drawn deterministically from a file, or from the bundled reasoning task."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

BUILTIN = "builtin"
# The repository's reasoning task; an installed wheel has none.
BUNDLED_TASK = Path(__file__).resolve().parent.parent / "benchmarks" / "reasoner" / "task.py"
BUILTIN_LINES = (64, 128)


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: ids, int64 [T].
        first_target: tokens from this index on count in the loss; at least 1.
    """

    tokens: np.ndarray
    first_target: int = 1


@dataclass(frozen=True)
class Corpus:
    """Samples and where they come from."""

    source: str
    samples: tuple[Sample, ...]

    @property
    def sha256(self) -> str:
        """Digest of token ids and targets: what the calibration really saw."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(np.array([len(sample.tokens), sample.first_target], dtype="<i8").tobytes())
            digest.update(sample.tokens.astype("<i8").tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the calibration file."""
        return {
            "source": self.source,
            "samples": len(self.samples),
            "tokens": int(sum(len(s.tokens) for s in self.samples)),
            "sha256": self.sha256,
        }


def load_corpus(source: str, tokenizer: Any, samples: int, seq_len: int, seed: int) -> Corpus:
    """``samples`` sequences of at most ``seq_len`` tokens; the same ones for the same arguments and file.

    Sources:
        ``builtin``: the bundled reasoning task, problems and their chains, from training seeds only; the loss
            counts the chain. Chains are not cut: ``seq_len`` bounds the problems that are drawn.
        ``*.jsonl``, ``*.parquet``: rows with ``messages`` or ``conversations`` (chat transcripts, rendered by
            the tokenizer's template; the loss counts from the first answer on), ``input_ids``, or ``text``.
        any other file: plain text, documents apart by blank lines.

    Transcripts and ``input_ids`` are one sample per row, cut at ``seq_len``. Texts are cut at a random offset
    if longer; shorter ones are joined until ``seq_len`` is reached.

    Raises:
        ValueError: the file is empty, has no known field, or the tokenizer is missing.
        FileNotFoundError: there is no such file.
    """
    rng = random.Random(seed)
    if source == BUILTIN:
        return Corpus(BUILTIN, tuple(_builtin(tokenizer, samples, seq_len, rng)))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"--data {source}: no such file; give a text, .jsonl or .parquet file, or builtin")
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"--data {source}: no rows")
    rng.shuffle(rows)
    drawn = tuple(_draw(rows, tokenizer, samples, seq_len, rng, source))
    if not drawn:
        raise ValueError(f"--data {source}: no row has two tokens or more")
    return Corpus(path.name, drawn)


def load_task() -> ModuleType:
    """The reasoning task, loaded by path: the package imports nothing from the benchmarks.

    Raises:
        ValueError: this is an installed wheel.
    """
    if not BUNDLED_TASK.is_file():
        raise ValueError("--data builtin: the reasoning task is in the repository only; give a file with --data")
    name = "_pmkvq_calibration_task"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BUNDLED_TASK)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def builtin_problems(samples: int, seq_len: int, seed_source: random.Random) -> list[Any]:
    """Problems of training seeds whose prompt and chain fit ``seq_len`` tokens (15 per line, at most)."""
    task = load_task()
    low, high = BUILTIN_LINES
    high = max(2, min(high, (seq_len - 16) // 15))
    low = min(low, high)
    return [
        task.make_problem(seed_source.randrange(task.EVAL_SEED_START), seed_source.randint(low, high))
        for _ in range(samples)
    ]


def _builtin(tokenizer: Any, samples: int, seq_len: int, rng: random.Random) -> Iterator[Sample]:
    if tokenizer is None:
        raise ValueError("--data builtin: the model folder has no tokenizer")
    task = load_task()
    for problem in builtin_problems(samples, seq_len, rng):
        prompt = _template(tokenizer, task.messages(problem), True)
        chain = [*tokenizer(problem.chain, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        yield Sample(np.array([*prompt, *chain], dtype=np.int64), len(prompt))


def _template(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False, tokenize=True)
    return [int(i) for i in ids]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"--data {path}: line {number} is not JSON ({error})") from error
                    if not isinstance(row, dict):
                        raise ValueError(f"--data {path}: line {number} is not a JSON object")
                    yield row
    elif path.suffix == ".parquet":
        from datasets import load_dataset

        # Streaming reads the file where it lies; without it `datasets` copies it into a cache.
        yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    else:
        text = path.read_text(encoding="utf-8")
        yield from ({"text": part.strip()} for part in text.split("\n\n") if part.strip())


def _draw(
    rows: list[dict[str, Any]], tokenizer: Any, samples: int, seq_len: int, rng: random.Random, source: str
) -> Iterator[Sample]:
    encode = _encoder(tokenizer, source)
    joined: list[int] = []
    count = 0
    for row in rows:
        if count == samples:
            return
        kind = next((k for k in ("messages", "conversations", "input_ids", "text") if row.get(k) is not None), None)
        if kind is None:
            raise ValueError(
                f"--data {source}: a row has fields {sorted(row)}, expected messages, conversations, input_ids or text"
            )
        if kind == "text":
            ids = encode(row["text"])
            if len(ids) > seq_len:
                start = rng.randrange(len(ids) - seq_len + 1)
                sample = Sample(np.array(ids[start : start + seq_len], dtype=np.int64))
            else:
                joined += ids
                if len(joined) < seq_len:
                    continue
                sample = Sample(np.array(joined[:seq_len], dtype=np.int64))
                joined = []
        elif kind == "input_ids":
            sample = Sample(np.array(row[kind][:seq_len], dtype=np.int64))
        else:
            sample = _chat(_messages(row[kind]), tokenizer, seq_len, source)
        if len(sample.tokens) > sample.first_target:
            count += 1
            yield sample
    if len(joined) > 1 and count < samples:  # a file shorter than one sample is still a sample
        yield Sample(np.array(joined, dtype=np.int64))


def _encoder(tokenizer: Any, source: str) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise ValueError(f"--data {source}: the model folder has no tokenizer; give rows of input_ids")
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    return encode


def _messages(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """OpenAI's roles; ShareGPT's ``from``/``value`` are renamed."""
    roles = {"human": "user", "gpt": "assistant"}
    return [
        {
            "role": roles.get(t.get("role") or t["from"], t.get("role") or t["from"]),
            "content": t["content"] if "content" in t else t["value"],
        }
        for t in turns
    ]


def _chat(messages: list[dict[str, str]], tokenizer: Any, seq_len: int, source: str) -> Sample:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"--data {source}: chat transcripts need a tokenizer with a chat template")
    ids = _template(tokenizer, messages, False)
    answer = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
    first = len(_template(tokenizer, messages[:answer], True)) if answer else 1
    if first >= min(len(ids), seq_len):  # the prompt alone fills the sample: every token counts
        first = 1
    return Sample(np.array(ids[:seq_len], dtype=np.int64), first)
