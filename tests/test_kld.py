"""Divergence between servers: its arithmetic, the logit processor's steps, and two real servers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch.nn import functional as F

from benchmarks import kld, logit_record
from benchmarks.harness import experiment
from benchmarks.kld import Compared, divergence, summary
from benchmarks.logit_record import ForceAndRecord

VOCAB = 50
STEPS = 6


def params(
    path: Path, prompt: int = 4, reference: Path | None = None, tokens: list[int] | None = None
) -> dict[str, Any]:
    """What SGLang hands to the processor for a request, its own object included."""
    body = logit_record.request(tokens or list(range(STEPS)), path, reference)
    request = SimpleNamespace(origin_input_ids=[0] * prompt, kv_committed_len=prompt)
    return {**body["sampling_params"]["custom_params"], "__req__": request}


def run(path: Path, logits: torch.Tensor, top: int = VOCAB, reference: Path | None = None) -> np.ndarray:
    """A record of logits [STEPS, VOCAB], made by the processor."""
    logit_record.create(path, STEPS, top, ids=top < VOCAB and reference is None)
    given = params(path, reference=reference)
    for row in logits:
        ForceAndRecord()(row[None].clone(), [given])
        given["__req__"].kv_committed_len += 1
    assert logit_record.is_complete(path, STEPS)
    return np.load(path)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = 4 * torch.randn(STEPS, VOCAB, generator=generator)
    return a, a + torch.randn(STEPS, VOCAB, generator=generator)


def kl(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """KL(p ‖ q) of log-probabilities, by torch."""
    return F.kl_div(q.double(), p.double(), reduction="none", log_target=True).sum(-1).numpy()


def test_divergence_is_that_of_torch(pair: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    a, b = (run(tmp_path / name, x) for name, x in zip("ab", pair, strict=True))
    p, q = (x.log_softmax(-1) for x in pair)
    np.testing.assert_allclose(divergence(a, b), kl(p, q), rtol=1e-5)
    np.testing.assert_allclose(divergence(b, a), kl(q, p), rtol=1e-5)
    assert (divergence(a, a) == 0).all()
    assert (a["best"] == pair[0].argmax(-1).numpy()).all()
    assert (np.isneginf(a["rest"])).all()


def test_what_is_not_recorded_is_one_bucket(pair: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    top = 8
    a = run(tmp_path / "a", pair[0], top)
    b = run(tmp_path / "b", pair[1], top, reference=tmp_path / "a")
    p, q = (x.double().softmax(-1) for x in pair)
    ids = p.topk(top).indices
    assert (a["ids"] == ids.numpy()).all()
    buckets = [torch.cat((x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)), 1).log() for x in (p, q)]
    np.testing.assert_allclose(divergence(a, b), kl(*buckets), rtol=1e-4)
    # Merging tokens can only hide a difference.
    assert (divergence(a, b) <= kl(p.log(), q.log()) + 1e-9).all()
    assert (b["best"] == pair[1].argmax(-1).numpy()).all()


def test_the_processor_forces_tokens_and_touches_nobody_else(tmp_path: Path) -> None:
    """A batch of a request in the middle of its prompt, one at step 2, and one that overlap runs beyond its end."""
    paths = [tmp_path / name for name in "abc"]
    batch = []
    for path, committed in zip(paths, (3, 6, 10), strict=True):
        logit_record.create(path, STEPS, VOCAB)
        batch.append(params(path, tokens=[7, 8, 9, 10, 11, 12]))
        batch[-1]["__req__"].kv_committed_len = committed
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    out = ForceAndRecord()(logits.clone(), batch)
    assert torch.equal(out[0], logits[0])
    assert torch.equal(out[2], logits[2])
    assert out[1].argmax() == 9
    assert torch.isneginf(out[1]).sum() == VOCAB - 1
    records = [np.load(path) for path in paths]
    assert (records[0]["best"] == logit_record.NOT_WRITTEN).all()
    assert (records[2]["best"] == logit_record.NOT_WRITTEN).all()
    assert np.flatnonzero(records[1]["best"] != logit_record.NOT_WRITTEN).tolist() == [2]
    np.testing.assert_allclose(records[1]["logprobs"][2], logits[1].log_softmax(-1).numpy(), rtol=1e-6)
    assert not logit_record.is_complete(paths[1], STEPS)


def test_a_retracted_request_writes_its_steps_again(tmp_path: Path) -> None:
    """Four steps, the last one's result dropped; then prompt and three outputs are prefilled in chunks."""
    logit_record.create(tmp_path / "a", STEPS, VOCAB)
    given = params(tmp_path / "a")
    generator = torch.Generator().manual_seed(2)
    last: dict[int, torch.Tensor] = {}
    chosen = []
    # Committed tokens at each forward: prompt of 4, decode; after retraction chunks of 5 and 2, decode.
    for committed in (4, 5, 6, 7, 5, 7, 8, 9):
        given["__req__"].kv_committed_len = committed
        logits = torch.randn(1, VOCAB, generator=generator)
        out = ForceAndRecord()(logits.clone(), [given])
        last[committed - 4] = logits[0]
        chosen.append(int(out.argmax()))
    assert chosen[:4] == [0, 1, 2, 3]
    assert chosen[5:] == [3, 4, 5]
    record = np.load(tmp_path / "a")
    for step, logits in last.items():
        np.testing.assert_allclose(record["logprobs"][step], logits.log_softmax(-1).numpy(), rtol=1e-6)


def test_records_that_were_cut_short_are_not_complete(pair: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a"
    run(path, pair[0])
    whole = path.read_bytes()
    for size in (0, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not logit_record.is_complete(path, STEPS)
    path.write_bytes(whole)
    assert logit_record.is_complete(path, STEPS)
    assert not logit_record.is_complete(path, STEPS + 1)
    assert not logit_record.is_complete(tmp_path / "none", STEPS)


def test_servers_can_load_the_processor() -> None:
    text = logit_record.request([1], Path("x"))["custom_logit_processor"]
    assert isinstance(CustomLogitProcessor.from_str(text), ForceAndRecord)
    assert len(text) < 1000, "by name, not by value"


def compared(context: list[int], values: list[float], agree: list[bool]) -> Compared:
    return Compared(np.array(context), np.array(values), np.array(agree))


def test_curve_and_summary() -> None:
    answers = [
        compared([98, 99, 100, 101], [1.0, 2.0, 3.0, 4.0], [True, True, False, True]),
        compared([100, 250], [5.0, 9.0], [True, False]),
    ]
    points = summary(answers, 100)["curve"]
    assert [(p["context_from"], p["context_to"], p["positions"]) for p in points] == [
        (0, 100, 2),
        (100, 200, 3),
        (200, 300, 1),
    ]
    assert [p["kl_mean"] for p in points] == [1.5, 4.0, 9.0]
    assert points[1]["kl_p99"] == pytest.approx(4.98)
    assert points[1]["top1_agreement"] == pytest.approx(2 / 3)
    got = summary(answers, 100)
    assert got["kl_mean"] == pytest.approx(4.0)
    assert got["kl_mean_standard_error"] == pytest.approx(abs(7.0 - 2.5) / 2)
    assert (got["kl_max"], got["kl_max_context"]) == (9.0, 250)
    assert got["top1_agreement"] == pytest.approx(4 / 6)
    rows = [
        {"key": {"method": "16bit", "budget_bytes": None}, **got, "retractions": 0},
        {"key": {"method": "age-2", "budget_bytes": 1 << 20}, **got, "effective_bits_avg": 3.5, "retractions": 2},
        {"key": {"method": "stock-fp8", "budget_bytes": 1 << 20}, "missing": "not on a CPU"},
    ]
    text = kld.rows_table({"rows": rows})
    assert "| age-2 | 1.0 | 2 | 6 | 4.00e+00 | 2.2e+00 |" in text
    assert "| stock-fp8 | 1.0 | missing: not on a CPU |" in text
    first, second = ([line.count("|") for line in part.splitlines()] for part in text.split("\n\n"))
    assert set(first) == {12}
    assert set(second) == {4}
    assert math.isfinite(summary(answers[:1], 100)["kl_mean"])
    assert summary(answers[:1], 100)["kl_mean_standard_error"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--methods int4 --share 0.2", "int4"),
        ("--methods age-2", "either --share"),
        ("--share much", "--share much"),
        ("--share 0.2 --lines many", "--lines many"),
        ("--share 0.2 --top 0", "--top: 0"),
        ("--share 0.2 --max-new-tokens 0", "--max-new-tokens: 0"),
        ("--share 0.2 --data nowhere.jsonl", "nowhere.jsonl"),
        ("--share 0.2 --model nowhere", "nowhere"),
    ],
)
def test_wrong_options_are_one_sentence(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kld.main(["--problems", "1", "--out", str(tmp_path / "k.json"), *line.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "k.json").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{", "d.jsonl:1"),
        ("[1]", "d.jsonl:1"),
        ('{"prompt": "a"}\n{"prompt": 1}', "d.jsonl:2"),
        ('{"prompt": "a", "answer": 4}', "d.jsonl:1"),
        ('{"prompt": "a"}\n{"prompt": "b", "answer": "c"}', "all or none"),
        ('{"prompt": "a", "answer": ""}', "empty"),
        ("", "no more lines"),
    ],
)
def test_bad_files_name_the_line(lines: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(lines)
    assert kld.main(["--share", "0.2", "--data", str(path), "--out", str(tmp_path / "k.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_file_gives_prompts_and_answers(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    records = [{"prompt": f"t{i}=:1;t9=t{i}?", "answer": f"t{i}=:1=t{i}:1"} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, records)))
    line = [
        "--data",
        str(path),
        "--first",
        "1",
        "--problems",
        "2",
        "--max-new-tokens",
        "3",
        "--out",
        str(tmp_path / "k"),
    ]
    run = kld.load(kld.EXPERIMENT.parse(line))
    assert len(run.prompts) == len(run.tokens) == 2
    assert all(len(t) == 3 for t in run.tokens)
    assert run.lengths == [len(p) + 3 for p in run.prompts]
    other = kld.load(kld.EXPERIMENT.parse([*line, "--first", "0"]))
    assert other.digest != run.digest


@pytest.mark.server
@pytest.mark.full
def test_two_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The control is bf16 noise, 2 bits stand out behind the window; a second run starts no server."""
    out = tmp_path / "k.json"
    line = ["--methods", "16bit,static-2", "--pool-bytes", "8MiB", "--problems", "2", "--lines", "30-34"]
    line += ["--concurrency", "2", "--top", "64", "--chunk", "64", "--bin", "64", "--out", str(out)]
    assert kld.main(line) == 0
    control, static = json.loads(out.read_text())["rows"]
    assert control["positions"] == static["positions"] > 500
    # Measured: 0 for the control (two requests always share their batch), 1e-2 and 5e-4 for 2 bits. Rounding of bf16
    # alone, with batches that differ, gives 1e-6.
    assert control["kl_mean"] < 1e-5
    assert control["top1_agreement"] > 0.99
    assert static["kl_mean"] > 1e-5 + 10 * control["kl_mean"]
    assert static["kl_p99"] > 1e-4
    assert static["effective_bits_avg"] < 12
    assert all(point["kl_p99"] > 1e-5 for point in static["curve"] if point["context_from"] >= 192)
    shown = capsys.readouterr().out

    def no_server(*_: Any, **__: Any) -> None:
        raise AssertionError("a server was started for rows that are there")

    monkeypatch.setattr(experiment, "serve", no_server)
    assert kld.main(line) == 0
    assert capsys.readouterr().out == shown
