"""Calibration data: deterministic, in every format, and apart from what is evaluated."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.harness.servers import REASONER
from benchmarks.reasoner import task
from sglang_pmkvq.calib.corpus import Corpus, builtin_problems, load_corpus

TOKENIZER = AutoTokenizer.from_pretrained(REASONER)
TEXT = "\n\n".join(f"t{i}=:1;t{i + 1}=:2;t{i + 2}=t{i}+t{i + 1};" for i in range(40))
CHAT = [{"role": "user", "content": "t1=:7;t2=t1?"}, {"role": "assistant", "content": "t1=:7=t1:7;t2=t1:7?#:7"}]


def jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def tokens(corpus: Corpus) -> list[list[int]]:
    return [s.tokens.tolist() for s in corpus.samples]


def test_builtin_is_deterministic() -> None:
    first = load_corpus("builtin", TOKENIZER, 3, 512, seed=5)
    again = load_corpus("builtin", TOKENIZER, 3, 512, seed=5)
    other = load_corpus("builtin", TOKENIZER, 3, 512, seed=6)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert all(len(s.tokens) <= 512 for s in first.samples)
    assert first.describe()["tokens"] == sum(len(s.tokens) for s in first.samples)


def test_builtin_counts_the_loss_of_the_chain() -> None:
    (sample,) = load_corpus("builtin", TOKENIZER, 1, 512, seed=0).samples
    assert TOKENIZER.decode(sample.tokens[: sample.first_target]).endswith("<|assistant|>")
    assert sample.tokens[-1] == TOKENIZER.eos_token_id


def test_builtin_never_overlaps_evaluation() -> None:
    """Neither by seed nor by text."""
    drawn = [p for seed in range(20) for p in builtin_problems(20, 2048, random.Random(seed))]
    assert max(p.seed for p in drawn) < task.EVAL_SEED_START
    evaluated = {task.eval_problem(i, 64, 128).prompt for i in range(300)}
    assert len(evaluated) == 300
    assert not evaluated & {p.prompt for p in drawn}


def test_text_is_cut_and_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    corpus = load_corpus(str(path), TOKENIZER, 4, 64, seed=0)
    assert [len(s.tokens) for s in corpus.samples] == [64] * 4
    assert tokens(corpus) == tokens(load_corpus(str(path), TOKENIZER, 4, 64, seed=0))
    assert tokens(corpus) != tokens(load_corpus(str(path), TOKENIZER, 4, 64, seed=1))
    path.write_text("t1=:1;t2=t1;")
    assert len(load_corpus(str(path), TOKENIZER, 4, 64, seed=0).samples) == 1


def test_long_text_is_cut_somewhere(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": TEXT.replace("\n\n", "")}])
    whole = TOKENIZER(TEXT.replace("\n\n", ""))["input_ids"]
    starts = set()
    for seed in range(6):
        (got,) = tokens(load_corpus(path, TOKENIZER, 1, 32, seed=seed))
        starts.add(next(i for i in range(len(whole)) if whole[i : i + 32] == got))
    assert len(starts) > 1


def test_parquet_is_read_by_datasets(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [part for part in TEXT.split("\n\n") if part]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    same = jsonl(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    assert tokens(load_corpus(str(tmp_path / "a.parquet"), TOKENIZER, 3, 64, 0)) == tokens(
        load_corpus(same, TOKENIZER, 3, 64, 0)
    )


@pytest.mark.parametrize("form", ["openai", "sharegpt"])
def test_chat_transcripts(tmp_path: Path, form: str) -> None:
    row: dict[str, object] = {"messages": CHAT}
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]}
    (sample,) = load_corpus(jsonl(tmp_path / "a.jsonl", [row]), TOKENIZER, 2, 64, 0).samples
    text = TOKENIZER.decode(sample.tokens[sample.first_target :])
    assert text.startswith("t1=:7=t1:7;")
    (cut,) = load_corpus(str(tmp_path / "a.jsonl"), TOKENIZER, 2, 8, 0).samples
    assert len(cut.tokens) == 8
    assert cut.first_target == 1  # the prompt alone fills it


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": list(range(100))}, {"input_ids": [7]}])
    (sample,) = load_corpus(path, None, 5, 32, 0).samples
    assert np.array_equal(sample.tokens, np.arange(32))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"txt": "x"}', "has fields .'txt'., expected messages"),
        ("a.jsonl", "nonsense", "line 1 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"input_ids": [1]}', "no row has two tokens"),
        ("a.txt", "some text", "no tokenizer"),
        ("a.jsonl", '{"messages": []}', "chat template"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        load_corpus(str(tmp_path / name), None, 1, 32, 0)


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="--data nowhere.txt: no such file"):
        load_corpus("nowhere.txt", None, 1, 32, 0)
