"""Tasks of real models: GSM8K, needles, tool calls, JSON by schema, and texts that are forced."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import accuracy, kld, report
from benchmarks.harness import structured, texts
from benchmarks.harness.methods import Method, label, methods
from benchmarks.harness.servers import REASONER, Server
from benchmarks.harness.tasks import Item, item_ids
from benchmarks.reasoner import evaluate

FLAGS = {
    "static-4/plain": "--pmkvq-key-transform none --pmkvq-key-center none",
    "static-k4v2-soft/hadamard": "--pmkvq-key-transform hadamard --pmkvq-key-center none",
    "age-2/centre": "--pmkvq-key-transform none",
    "age-0-2:8,3-5:k4v2/plain": "--pmkvq-key-transform none --pmkvq-key-center none",
    "static-2/key-center=bias/group-size=32": "--pmkvq-key-center bias --pmkvq-group-size 32",
    "static-some/where/m.pmkvq.safetensors/key-center=none": "--pmkvq-key-center none",
    "static-4": "",
}


class Words:
    """A tokenizer of one token per word."""

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        split = [each.split() for each in ([text] if isinstance(text, str) else text)]
        return {"input_ids": split[0] if isinstance(text, str) else split}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[str]:
        return " ".join(message["content"] for message in messages).split()

    def decode(self, ids: list[str]) -> str:
        return " ".join(ids)


@pytest.mark.parametrize("name", FLAGS)
def test_what_stands_behind_a_slash_is_a_flag(name: str) -> None:
    (method,) = methods(name)
    line = " ".join(method.args)
    assert method.name == name
    assert line.endswith(FLAGS[name])
    assert line.count("--pmkvq-key") == FLAGS[name].count("--pmkvq-key")


def test_names_of_codings() -> None:
    assert "--pmkvq-calibration some/where/m.pmkvq.safetensors" in " ".join(
        Method.parse("static-some/where/m.pmkvq.safetensors/key-center=none").args
    )
    assert label("static-some/where/m.pmkvq.safetensors/key-center=none") == "static-m/key-center=none"
    names = ["static-4/plain", "age-2/hadamard", "age-2-hadamard", "static-c.safetensors/centre", "static-2"]
    expected = ["static, plain", "age, rotated", "age, rotated", "static, calibrated", "static"]
    assert [report.family(name) for name in names] == expected
    for bad in ("static-4/", "static-4/centred", "stock/plain", "static-4/plain,", "static/plain"):
        with pytest.raises(ValueError, match="unknown method"):
            Method.parse(bad)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "g.jsonl"
    records = [{"question": f"What is {n} + 1000?", "answer": f"<<{n}+1000>>\n#### {n + 1000:,}"} for n in range(10)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_gsm8k_has_its_first_problems_solved_before_each(lines: Path) -> None:
    items = texts.gsm8k(lines)
    assert [item.answer for item in items] == ["1006", "1007", "1008", "1009"]
    prompt = items[0].prompt or ""
    assert prompt.count("####") == texts.SHOTS
    assert prompt.endswith("Question: What is 6 + 1000?\nAnswer:")
    said = [
        "so\n#### 1,006\n\nQuestion: 1\n#### 5",
        "#### $1006.00",
        "####1007 #### 1006",
        "1006",
        "Question: #### 1006",
    ]
    assert [items[0].check(text) for text in said] == [True, True, False, False, False]
    assert all(item.check(item.gold) for item in items)
    assert item_ids(Words(), items[0]) == prompt.split()


def test_shares_count_a_common_prefix_once(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy.AutoTokenizer, "from_pretrained", lambda model: Words())
    line = ["--task", "gsm8k", "--data", str(lines), "--concurrency", "3", "--share", "1"]
    run = accuracy.load(accuracy.EXPERIMENT.parse(line))
    assert (len(run.items), run.max_new, run.ends) == (4, 300, [3] * 4)
    size = len(run.ids[0])
    shared = (size - 4) // 16 * 16  # "6 + 1000? Answer:" is each problem's own
    pages = shared // 16 + 3 * -(-(size + 3 - shared) // 16)
    assert run.held_bytes == pages * 16 * accuracy.bytes_per_token(REASONER)
    for wrong, message in (("--task gsm8k", "--data FILE"), (f"--task {lines} --share 1", "lengths are known")):
        with pytest.raises(ValueError, match=message):
            accuracy.load(accuracy.EXPERIMENT.parse(wrong.split()))
    lines.write_text('{"question": "a"}')
    with pytest.raises(ValueError, match=r"g\.jsonl:1"):
        texts.gsm8k(lines)


def test_needles_lie_at_ten_depths() -> None:
    text = " ".join(f"Sentence {n} of the book is here." for n in range(6000))
    items = texts.needles(Words(), text, 0)
    assert len(items) == 30
    assert [next(iter(item.parts)) for item in items[::10]] == [f"at {n:,} tokens" for n in texts.LENGTHS]
    for item in items[10:20]:
        words = item.messages[0]["content"].split()
        depth = words.index(f"{item.answer}.") / len(words)
        assert int(10 * depth) == items.index(item) - 10
        assert texts.LENGTHS[1] - 80 < len(words) < texts.LENGTHS[1]
    assert len({item.messages[0]["content"].partition("What is")[0] for item in items[10:20]}) == 1
    answer = items[0].answer
    said = [answer, f"It is {int(answer):,}.", f"1234567 {answer}", f"{answer}1", ""]
    assert [items[0].check(text) for text in said] == [True, True, False, False, False]


class Replies:
    """Answers of a chat endpoint, one after the other; notes what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any] | None]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.calls = iter(calls)
        monkeypatch.setattr(requests, "post", self.post)

    def post(self, url: str, json: dict[str, Any], timeout: float) -> Any:
        self.asked.append(json)
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if call := next(self.calls):
            function = {"name": call["name"], "arguments": dumped(call["arguments"])}
            message["tool_calls"] = [{"id": "1", "type": "function", "function": function}]
        body = {"choices": [{"message": message, "meta_info": {"completion_tokens": 7, "finish_reason": None}}]}
        return SimpleNamespace(json=lambda: body, raise_for_status=lambda: None)


dumped = json.dumps


def test_a_chain_is_right_if_both_calls_are(monkeypatch: pytest.MonkeyPatch) -> None:
    items = structured.tool_chains(12, 0)
    assert [i.messages for i in items] == [i.messages for i in structured.tool_chains(12, 0)]
    assert len({i.messages[-1]["content"] for i in items}) > 8
    item = items[3]
    chain: structured.Chain = item.respond.__self__  # type: ignore[attr-defined]
    second = {**chain.second, "arguments": {**chain.second["arguments"], "branch_number": 99}}
    parsed: Any = None
    for calls, right, valid, first in (
        ([chain.first, chain.second], True, True, True),
        ([chain.first, second], False, True, True),
        ([chain.first, parsed], False, False, True),
        ([chain.second, chain.second], False, True, False),
        ([parsed], False, False, False),
    ):
        replies = Replies(monkeypatch, calls)
        answer = Server("http://x", None, Path()).converse(item.messages, item.tools, item.respond)  # type: ignore[arg-type]
        got = item.check(answer["text"]), *(part(answer["text"]) for part in item.parts.values())
        assert got == (right, valid, first)
        assert answer["meta_info"]["completion_tokens"] == 7 * len(calls)
    replies = Replies(monkeypatch, [chain.first, chain.second])
    Server("http://x", None, Path()).converse(item.messages, item.tools, item.respond, temperature=0)  # type: ignore[arg-type]
    told = replies.asked[1]["messages"][-1]
    assert told["role"] == "tool"
    assert json.loads(told["content"]) == {"isbn": chain.second["arguments"]["isbn"]}
    assert (len(replies.asked[0]["tools"]), replies.asked[0]["temperature"]) == (8, 0)
    examples = [message for message in item.messages if "tool_calls" in message]
    assert len(examples) == 2 * len(structured.SETS)
    assert not any(tools.names[-1] in i.messages[-1]["content"] for tools in structured.SETS for i in items)
    assert all(str(code) in structured.rules() for tools in structured.SETS for code in tools.choices.values())


def test_orders_are_judged_by_schema_and_by_value() -> None:
    (item,) = structured.orders(1, 0, "Some text.")
    order: dict[str, Any] = item.check.args[0]  # type: ignore[attr-defined]
    assert json.loads(item.params["json_schema"]) == structured.SCHEMA
    for text, right, valid in (
        (json.dumps(order), True, True),
        (json.dumps({**order, "customer": "Nobody"}), False, True),
        (json.dumps({**order, "more": 1}), False, False),
        (json.dumps(order)[:-3], False, False),
        ("", False, False),
    ):
        assert (item.check(text), item.parts["valid"](text)) == (right, valid)


def test_parts_are_counted_and_shown() -> None:
    items = [Item([], "", str.isdigit, parts={"valid": bool}), Item([], "", str.isdigit, parts={"long": bool})]
    meta = {"completion_tokens": 3, "finish_reason": {"type": "length"}}
    run: Any = SimpleNamespace(items=items)
    got = accuracy.judge(run, [{"text": "12", "meta_info": meta}, {"text": "", "meta_info": meta}])
    assert got["parts"] == {"valid": [1, 1], "long": [0, 1]}
    row = {
        **got, "key": {"method": "static-4", "budget_bytes": 1 << 20, "problems": 2}, "peak_running": 2, "wall_s": 1.0,
        "used_bytes_peak": 1 << 20, "used_bytes_avg": 1 << 19, "effective_bits_avg": 5.0, "end_bits_mean": 5.0,
        "retractions": 0,
    }  # fmt: skip
    ceiling = {**row, "right": 2, "wrong": [], "key": {"method": "16bit", "budget_bytes": 9 << 20, "problems": 2}}
    table = report.KINDS["accuracy"].table({"config": {"task": "tools"}, "rows": [ceiling, row]}).splitlines()
    assert "| tokens | cut off |" in table[0]
    assert "| valid | long | running | points against 16bit |" in table[0]
    assert "| 2 | 1.0 | 0.5 | 5.00 | 5.00 | 0 | 1/1 | 0/1 | 2 | -50.0 (" in table[3]
    assert len({line.count("|") for line in table}) == 1


def test_a_text_is_forced_in_pieces(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kld.AutoTokenizer, "from_pretrained", lambda model: Words())
    line = ["--text", str(lines), "--tokens", "30", "--prompt-tokens", "10", "--problems", "3", "--out", "k.json"]
    run = kld.load(kld.EXPERIMENT.parse(line))
    assert [len(p) for p in run.prompts] == [10] * 3
    assert [len(t) for t in run.tokens] == [20] * 3
    assert run.prompts[0][:3] == ["Question:", "What", "is"]
    joined = [word for pair in zip(run.prompts, run.tokens, strict=True) for part in pair for word in part]
    assert joined == texts.read_text(str(lines)).split()[:90]
    for wrong, message in ((["--tokens", "10"], "--prompt-tokens"), (["--problems", "99"], "pieces of 30")):
        with pytest.raises(ValueError, match=message):
            kld.load(kld.EXPERIMENT.parse([*line, *wrong]))
    book = texts.read_text("opticks")
    assert len(book) > 400_000
    assert book.startswith("_Part")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a bias, tied embeddings and no head_dim in its config."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=80, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    made = Qwen2ForCausalLM(config)
    for name, p in made.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0, 3)
    made.bfloat16().save_pretrained(folder)
    return folder


def test_plain_pytorch_knows_models_with_a_bias(qwen: Path) -> None:
    tokens = torch.randint(0, 80, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = Qwen2ForCausalLM.from_pretrained(qwen, dtype=torch.float32)(tokens).logits
        got = evaluate.load(qwen)(tokens)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    config = json.loads((qwen / "config.json").read_text())
    other = qwen / "yarn"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "yarn"}}))
    with pytest.raises(ValueError, match="qwen2 with yarn positions"):
        evaluate.load(other)


def test_kivi_is_compared_with_the_same_plain_pytorch(qwen: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    made = torch.randint(0, 80, (2, 320), generator=generator).tolist()
    run: Any = SimpleNamespace(
        options=SimpleNamespace(model=qwen, bin=64), prompts=[t[:160] for t in made], tokens=[t[160:] for t in made],
        digest="d", concurrency=2,
    )  # fmt: skip
    rows = list(kld.offline(run, [{"method": f"kivi-{bits}"} for bits in (8, 2)]))
    assert [row["positions"] for row in rows] == [320, 320]
    eight, two = (row["kl_mean"] for row in rows)
    assert 0 <= eight < two / 20
    assert rows[1]["effective_bits_avg"] < rows[0]["effective_bits_avg"] < 16
    assert rows[1]["curve"][0]["context_from"] == 128
    text = kld.rows_table({"rows": [{"key": {"method": "kivi-2", "budget_bytes": None, "answers": 2}, **rows[1]}]})
    assert "| kivi-2 | - | 2 | 320 |" in text
