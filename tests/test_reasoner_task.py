"""The program-tracing task, its tokenizer and chat template, and the shipped model's facts."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from pathlib import Path

import pytest

from benchmarks.reasoner import task

MODEL = Path(task.__file__).parent / "model"


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def _interpret(prompt: str) -> int:
    """Execute a prompt from its text alone, sharing no code with the task."""
    *assignments, question = prompt.split(";")
    values: dict[str, int] = {}
    for assignment in assignments:
        target, expression = assignment.split("=")
        constant = re.fullmatch(r":(\d)", expression)
        if constant:
            result = int(constant[1])
        else:
            left, op, right = re.fullmatch(r"(t\d+)([+-])(t\d+)", expression).groups()
            result = (values[left] + values[right] if op == "+" else values[left] - values[right]) % 10
        assert target not in values, "a variable is assigned once"
        values[target] = result
    asked = re.fullmatch(r"t\d+=(t\d+)\?", question)
    return values[asked[1]]


def test_problems_are_deterministic() -> None:
    assert task.make_problem(7, 50) == task.make_problem(7, 50)
    assert task.make_problem(7, 50) != task.make_problem(8, 50)
    texts = "".join(p.prompt + p.chain for p in (task.eval_problem(i, 64, 128) for i in range(20)))
    # Fixed once and for all: published figures refer to exactly these problems.
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "c847bba321f80ad9"


def test_evaluation_seeds_are_not_training_seeds() -> None:
    assert task.eval_problem(0, 5, 5).seed == task.EVAL_SEED_START
    assert task.eval_problem(10, 5, 9).seed > task.EVAL_SEED_START


@pytest.mark.parametrize("lines", [2, 3, 10, 60, 126, 255])
def test_chain_is_the_execution_of_the_program(lines: int) -> None:
    for seed in range(20):
        problem = task.make_problem(seed, lines)
        assert _interpret(problem.prompt) == problem.answer == problem.values[problem.asked]
        assert problem.chain.endswith(f"#:{problem.answer}")
        values: dict[str, str] = {}
        steps = problem.chain.split(";")
        for written, assignment in zip(steps, problem.prompt.split(";"), strict=True):
            # Without the looked-up values a chain line is its program line followed by the result.
            bare = re.sub(r"(t\d+):\d", r"\1", written)
            assert bare.startswith(assignment)
            for name, value in re.findall(r"(t\d+):(\d)", written):
                assert values.setdefault(name, value) == value, "every use shows the assigned value"


def test_evaluated_answers_depend_on_most_lines() -> None:
    problems = [task.eval_problem(i, 64, 128) for i in range(30)]
    assert all(task.dependence(p.program, p.asked) >= task.MIN_DEPENDENCE for p in problems)


def test_short_evaluated_problems_have_an_end() -> None:
    """Seed 855 draws five constants for six lines: one operation reaches three of them, too few."""
    seeds = range(task.EVAL_SEED_START + 850, task.EVAL_SEED_START + 860)
    short = [task.make_problem(seed, lines) for lines in range(2, 13) for seed in seeds]
    assert all(task.dependence(p.program, p.asked) >= task.MIN_DEPENDENCE for p in short)
    with pytest.raises(ValueError, match="6 lines has at most 4 constants, got 5"):
        task.make_problem(task.EVAL_SEED_START, 6, 5)


def test_changing_any_needed_constant_changes_the_execution() -> None:
    rng = random.Random(0)
    for seed in range(20):
        problem = task.eval_problem(seed, 30, 40)
        program = list(problem.program)
        index = rng.choice([i for i, line in enumerate(program) if not line.op])
        program[index] = task.Line("", (program[index].left + 1) % 10)
        assert task.run(program) != list(problem.values)


def test_check_accepts_gold_and_rejects_the_rest() -> None:
    problem = task.make_problem(3, 20)
    wrong = (problem.answer + 1) % 10
    assert task.check(problem, problem.chain)
    assert task.check(problem, problem.chain + "<|end|>")
    assert task.check(problem, problem.chain + "\n")
    assert not task.check(problem, problem.chain[:-1] + str(wrong))
    assert not task.check(problem, "")
    assert not task.check(problem, problem.chain.split("#")[0])
    assert not task.check(problem, problem.chain + str(problem.answer))
    assert not task.check(problem, problem.chain + ";t1=:3")
    assert not task.check(problem, f"#:{problem.answer} and so on")


def test_constants_fix_the_length() -> None:
    lengths = {task.make_problem(seed, 30, 5).chain_tokens for seed in range(20)}
    assert len(lengths) == 1


def test_bad_sizes_are_refused() -> None:
    for lines in (0, 1, 256):
        with pytest.raises(ValueError, match="lines"):
            task.make_problem(0, lines)


def test_tokenizer_keeps_any_ascii_text(tokenizer) -> None:
    rng = random.Random(1)
    alphabet = [chr(code) for code in range(0x20, 0x7F)] + ["\n", "\t", "t25", "t3=", ":7", "t300", "t07"]
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=40))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_names_values_and_openings_are_single_tokens(tokenizer) -> None:
    for word in ["t0", "t9", "t10", "t255", "t0=", "t199=", ":0", ":9", "+", "-", "=", ";", "?", "#"]:
        assert len(tokenizer(word)["input_ids"]) == 1
    problem = task.make_problem(5, 40)
    assert len(tokenizer(problem.chain)["input_ids"]) + 1 == problem.chain_tokens


def test_stepwise_decoding_equals_decoding_at_once(tokenizer) -> None:
    """Servers stream text token by token; the pieces must add up."""
    ids = tokenizer(task.make_problem(5, 10).chain)["input_ids"]
    assert "".join(tokenizer.decode([i]) for i in ids) == tokenizer.decode(ids)


def test_a_follow_up_starts_with_the_tokens_of_the_first_exchange(tokenizer) -> None:
    problem = task.make_problem(11, 60)
    first = task.messages(problem)

    def render(messages: list[dict[str, str]]) -> list[int]:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]

    generated = [*tokenizer(problem.chain)["input_ids"], tokenizer.eos_token_id]
    answer = tokenizer.decode(generated, skip_special_tokens=True)
    assert answer == problem.chain
    question = {"role": "user", "content": "t1=:7;t2=t1?"}
    follow_up = [*first, {"role": "assistant", "content": answer}, question]
    so_far = render(first) + generated
    assert render(follow_up)[: len(so_far)] == so_far
    assert len(render(follow_up)) > len(so_far)


def test_shipped_model_facts(tokenizer) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    weights = MODEL / "model.safetensors"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert 6 <= config["num_hidden_layers"] <= 8
    assert config["head_dim"] == 128
    assert config["num_attention_heads"] > config["num_key_value_heads"] >= 1
    assert config["vocab_size"] == len(tokenizer)
    assert config["max_position_embeddings"] == 8192
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.eos_token_id == end == config["eos_token_id"]
    assert json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"] == end
    assert weights.stat().st_size <= 16 * 2**20
    with weights.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    size = sum(end - begin for begin, end in (entry["data_offsets"] for entry in header.values())) // 2
    assert 2_000_000 <= size <= 6_000_000


def test_own_model_code_equals_transformers() -> None:
    """Training and evaluation use a small Llama of their own; it must be the one that servers load."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from benchmarks.reasoner.evaluate import load

    reference = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = torch.randint(5, 600, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load(MODEL)(tokens), reference(tokens).logits, atol=5e-3, rtol=1e-3)


def test_training_log_is_that_of_the_recipe() -> None:
    """Token counts and learning rates of the shipped weights' log follow from the script and its seed."""
    from benchmarks.reasoner.train import PHASES, STEPS, batch_shape, longest, rate

    log = Path(task.__file__).parent / "train_log.jsonl"
    rows = {row["step"]: row for row in map(json.loads, log.read_text().splitlines())}
    assert max(rows) == STEPS
    tokens = 0
    for step in range(STEPS):
        _, lines, constants, problems = batch_shape(step, seed=1, batch_tokens=2048)
        # Template and question 13 tokens; a line 5 in the prompt and 10 in the chain, a constant 3 and 6.
        tokens += problems * (13 + 15 * (lines - constants) + 9 * constants)
        row = rows.get(step + 1)
        if row is None:
            continue
        assert row["tokens"] == tokens, step
        if row["step"] not in [phase.end for phase in PHASES]:
            assert (row["lines"], row["lr"]) == (longest(step + 1), round(rate(step + 1), 7))
