"""The sgl.function programs: what they decide, how they write prompts, and one server that runs them all."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.harness.methods import PAGE
from benchmarks.harness.servers import REASONER, STRICT, Server, serve
from benchmarks.programs import functions, problems
from benchmarks.programs.__main__ import main, rows_table
from benchmarks.programs.frontend import Endpoint, execute, template_of
from benchmarks.programs.functions import (
    BEST_OF_N,
    SELF_CONSISTENCY,
    TREE_OF_THOUGHT,
    TUTOR,
    Node,
    best_of_n,
    grow,
    prune,
    vote,
)
from benchmarks.programs.problems import Problem, answer_of, load, right_lines, traced
from benchmarks.programs.runs import CachedPrefix, Client, Run, Shared, figures, look_up
from benchmarks.reasoner.task import eval_problem


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REASONER)


def options(*args: str) -> argparse.Namespace:
    """Defaults of every program, and ``args``."""
    parser = argparse.ArgumentParser()
    parser.set_defaults(seed=0)
    problems.arguments(parser)
    functions.arguments(parser)
    return parser.parse_args(args)


# --- votes, checks, pruning ---


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["3", "4", "4"], "4"),
        (["3", "4", "4", "3"], "3"),
        ([None, None, "7"], "7"),
        ([None, None], None),
    ],
)
def test_vote(answers: list[str | None], winner: str | None) -> None:
    assert vote(answers) == winner


@pytest.mark.parametrize("lines", [3, 20, 90])
def test_gold_chains_are_right_to_the_end(lines: int) -> None:
    for index in range(10):
        problem = eval_problem(index, lines, lines)
        assert right_lines(problem.chain, problem.chain) == problem.chain


def test_a_wrong_digit_is_found_in_its_own_line() -> None:
    rng = random.Random(0)
    for index in range(200):
        problem = eval_problem(index, 12, 16)
        digits = [i for i in range(1, len(problem.chain)) if problem.chain[i - 1] == ":"]
        at = rng.choice(digits)
        other = str((int(problem.chain[at]) + rng.randrange(1, 10)) % 10)
        chain = problem.chain[:at] + other + problem.chain[at + 1 :]
        assert right_lines(problem.chain, chain) == problem.chain[: problem.chain.rfind(";", 0, at) + 1]


def test_whole_lines_are_kept_and_nothing_is_skipped() -> None:
    problem = eval_problem(0, 12, 12)
    first, second, third, *_ = (line + ";" for line in problem.chain.split(";"))
    assert right_lines(problem.chain, first + second + third[:-3]) == first + second
    assert right_lines(problem.chain, first + third) == first
    assert right_lines(problem.chain, second) == ""
    assert right_lines(problem.chain, "") == ""
    assert right_lines(problem.chain, problem.chain + "x") == problem.chain[: problem.chain.rfind(";") + 1]


def test_a_checked_node_is_cut_back_to_what_is_right() -> None:
    problem = eval_problem(0, 12, 12)
    gold, check = problem.chain, traced(problem).right_lines
    cut = gold.index(";") + 1
    child = grow(Node(gold[:cut], checked=cut), gold[cut : cut + 5], [-1.0], False, check)
    assert child.chain == gold[:cut]
    last = grow(child, gold[cut:], [-1.0], True, check)
    assert last.chain == gold and last.done
    wrong = grow(child, gold[cut:-1] + str((int(gold[-1]) + 1) % 10), [-1.0], True, check)
    assert wrong.chain == gold[: gold.rfind(";") + 1] and not wrong.done
    assert prune([child, wrong, last], 2) == [last]


def test_unchecked_nodes_compare_by_mean_logprob() -> None:
    root = Node("a", logprob=-1.0, tokens=1)
    likely = grow(root, "b", [-0.1, -0.1], False, None)
    twin = grow(root, "b", [-0.3, -0.3], False, None)
    unlikely = grow(root, "c", [-2.0], False, None)
    assert (likely.chain, likely.tokens, likely.logprob) == ("ab", 3, pytest.approx(-1.2))
    assert prune([unlikely, twin, likely], 2) == [likely, unlikely]
    assert prune([likely, Node("abc", logprob=-9.0, tokens=4)], 2) == [likely, Node("abc", logprob=-9.0, tokens=4)]
    assert prune([unlikely, twin, likely], 1) == [likely]


def test_shared_pages() -> None:
    shared = Shared("x", [40, 40, 33])
    assert (shared.pages_once, shared.pages_apart) == (2, 6)


# --- prompts and problems ---


def test_prompts_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    check_template(tokenizer)


def test_templates_of_other_models(tokenizer: PreTrainedTokenizerBase) -> None:
    """A default system prompt, trimmed messages, text after the generation prompt, as R1 distillates have it."""
    other = AutoTokenizer.from_pretrained(REASONER)
    other.chat_template = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    check_template(other, think="<think>\n")
    other.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        template_of(other)


def check_template(tokenizer: PreTrainedTokenizerBase, think: str = "") -> None:
    template = template_of(tokenizer)
    chat, text = [], ""
    for turn in range(3):
        chat.append({"role": "user", "content": f"ask {turn}"})
        text += "".join(template.get_prefix_and_suffix("user", chat[:-1])) + f"ask {turn}"
        text += "".join(template.get_prefix_and_suffix("assistant", chat))
        whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # What the model thought aloud in earlier turns stays where the frontend is; that text is cached.
        assert text.replace(think, "", turn) == whole
        chat.append({"role": "assistant", "content": f"reply {turn}"})
        text += f"reply {turn}"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather \boxed{0.50}.", "1/2"),
        (r"<think>7</think>\boxed{x + 1}", "x+1"),
        ("it is **1,204** in all.", "1204"),
        ("7 <think>or 8</think>", None),
        ("Paris", "Paris"),
        ("", None),
    ],
)
def test_answers_in_one_form(text: str, answer: str | None) -> None:
    assert answer_of(text) == answer


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    lines = [json.dumps({"prompt": f"{i} + 1?", "answer": str(i + 1), "checker": "numeric"}) for i in range(5)]
    path.write_text("\n".join(lines) + "\n")
    given = ("--task", str(path), "--max-new-tokens", "99")
    lessons = load(options(*given, "--problems", "2"), 1)
    asked = [[p.question.splitlines()[0] for p in (lesson, *lesson.follow_ups)] for lesson in lessons]
    assert asked == [["0 + 1?", "1 + 1?"], ["2 + 1?", "3 + 1?"]]
    first = lessons[0]
    assert first.right("it is 1") and not first.right("it is 2")
    assert (first.max_tokens, first.right_lines) == (99, None)
    with pytest.raises(ValueError, match="--problems 3: .* holds 5, and each takes 2"):
        load(options(*given, "--problems", "3"), 1)
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "x"}], "answer": "1"}))
    with pytest.raises(ValueError, match="one user message per problem"):
        load(options(*given, "--problems", "1"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--programs", "chess"], "--programs chess: expected some of self-consistency"),
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--problems", "0"], "--problems: 0: expected a positive"),
        (["--lines", "many"], "--lines many: expected a range"),
    ],
)
def test_wrong_options(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "programs.json"
    assert main([*args, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_table_shows_every_row_and_says_what_is_missing() -> None:
    right, chains, shared = [True, False], [True, True, False], Shared("x", [40, 40, 40])
    used = Counter(requests=3, prompt_tokens=120, cached_tokens=96, output_tokens=200)
    whole, gone = CachedPrefix(2, 2, 4, 7.0), CachedPrefix(2, 1)
    runs = [Run(right, chains, shared, used, prefix) for prefix in (whole, gone)]
    found = figures(runs, 4.0, 3072)
    assert [found[k] for k in ("right", "answers", "chains_right", "chains")] == [2, 4, 4, 6]
    assert (found["prefix_apart_bytes"], found["prefix_once_bytes"]) == (192 * 3072, 64 * 3072)
    assert [found[f"prefix_{k}"] for k in ("kept", "lowest_bits", "mean_bits")] == [0.75, 4, 7.0]
    row = {**found, "retractions": 1}
    keys = [{"program": "tutor", "method": name} for name in ("age-2", "stock-fp8")]
    lines = rows_table({"rows": [{"key": keys[0], **row}, {"key": keys[1], "missing": "no such dtype"}]}).splitlines()
    assert lines[2] == ("| tutor | age-2 | 2/4 | 15-85 % | 4/6 | 576 / 192 | 75 % | 4 / 7.0 | 80 % | 100 | 1 |")
    assert lines[3].startswith("| tutor | stock-fp8 | missing: no such dtype |")
    assert len({line.count("|") for line in lines}) == 1


# --- on a server ---

RUNNING = 8
REFUSED = "is longer than the model's context length"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A pool of about 1,000 tokens at 16 bits: less than the chains of one problem's forks."""
    args = [
        "--pmkvq-pool-bytes", "3MiB", "--pmkvq-final-bits", "4", "--page-size", str(PAGE), "--random-seed", "0",
        "--max-running-requests", str(RUNNING), "--chunked-prefill-size", "256",
    ]  # fmt: skip
    with serve(REASONER, args, env=STRICT) as running:
        yield running
        assert not [line for line in running.errors() if REFUSED not in line]


@pytest.fixture
def client(server: Server, tokenizer: PreTrainedTokenizerBase) -> Client:
    server.flush()
    return Client(server.url, tokenizer)


def whole_pages(tokens: int) -> int:
    """Tokens of a prompt that a cache which holds all of it gives: whole pages, and one token is left to compute."""
    return (tokens - 1) // PAGE * PAGE


@pytest.mark.server
def test_chains_vote_over_one_prefix(client: Client) -> None:
    (problem,) = load(options("--problems", "1", "--lines", "24"))
    run = client.run(SELF_CONSISTENCY, problem, options("--chains", "7", "--temperature", "0.7"))
    assert list(run.right) == [True]
    assert len(run.candidates) == 7
    readers = run.shared.readers
    prompt = len(client.tokenizer(run.shared.text)["input_ids"])
    assert list(readers) == [prompt] * 7
    assert run.used["requests"] == 7
    assert run.used["cached_tokens"] == 7 * whole_pages(prompt)
    assert run.prefix.cached_pages == run.prefix.pages == whole_pages(prompt) // PAGE


@pytest.mark.server
def test_a_shared_prefix_shrinks_once_for_all_forks(server: Server, client: Client) -> None:
    """The prefix is long and the chains are short, so most of what would be held apart is the prefix."""
    (problem,) = load(options("--problems", "1", "--lines", "110", "--max-new-tokens", "120"))
    own = problem.max_tokens
    args = ("--chains", str(RUNNING), "--temperature", "0.7")
    before = server.pool()["shrinks"]
    run = client.run(SELF_CONSISTENCY, problem, options(*args))
    after = server.pool()["shrinks"]
    shared = run.shared
    assert shared.pages_apart == RUNNING * shared.pages_once
    # Every page shrinks at most once per step, its K and its V; the prefix's pages are of one set for all forks.
    pages = shared.pages_once + RUNNING * (math.ceil(own / PAGE) + 1)
    assert pages < shared.pages_apart
    for step in ("16->8", "8->4"):
        assert after.get(step, 0) - before.get(step, 0) <= 2 * pages
    assert after["16->8"] > before.get("16->8", 0)
    assert run.prefix.cached_pages == run.prefix.pages
    assert run.prefix.lowest_bits is not None and run.prefix.lowest_bits < 16
    assert run.prefix.mean_bits is not None and 4 <= run.prefix.mean_bits < 16


@pytest.mark.server
def test_look_up_measures_the_cached_pages_only(server: Server, client: Client) -> None:
    """Nothing else runs, so what was just written is at 16 bits, and nothing of what was never sent is there."""
    ids = [8 + i % 500 for i in range(10 * PAGE)]
    missing = look_up(server.url, ids)
    assert (missing.pages, missing.cached_pages, missing.lowest_bits) == (9, 0, None)
    there = look_up(server.url, ids)
    assert (there.pages, there.cached_pages, there.lowest_bits, there.mean_bits) == (9, 9, 16, 16.0)


@pytest.mark.server
def test_a_checked_tree_is_right_at_any_temperature(client: Client) -> None:
    """At a temperature at which single chains go wrong, the checker leads to the answer."""
    (problem,) = load(options("--problems", "1", "--lines", "16"))
    run = client.run(TREE_OF_THOUGHT, problem, options("--temperature", "1.3", "--step-tokens", "40"))
    assert list(run.right) == [True]
    assert run.shared.pages_once > len(client.tokenizer(problem.question)["input_ids"]) // PAGE
    # Each child found what its parent held.
    assert run.used["cached_tokens"] > 0.8 * run.used["prompt_tokens"]


@pytest.mark.server
def test_select_takes_the_likeliest_candidate(server: Server, client: Client) -> None:
    """So hot that all candidates differ; their log-probabilities are asked for once more, one by one."""
    (problem,) = load(options("--problems", "1", "--lines", "16"))
    endpoint = Endpoint(client.url, client.template)
    given = options("--candidates", "4")
    state = execute(
        best_of_n, endpoint, problem=replace(problem, max_tokens=40), options=given, temperature=3.0, ignore_eos=True
    )
    texts = state["candidates"]
    assert len(set(texts)) == 4
    assert endpoint.used["requests"] == 4 + 1 + 4  # the candidates, the prefix, the scores
    prompt = len(client.tokenizer(state["prefix"])["input_ids"])

    def mean_logprob(text: str) -> float:
        answer = server.generate(
            text=state["prefix"] + text,
            sampling_params={"max_new_tokens": 0, "temperature": 0},
            return_logprob=True,
            logprob_start_len=prompt - 1,
        )
        values = [value for value, *_ in answer["meta_info"]["input_token_logprobs"] if value is not None]
        return sum(values) / len(values)

    scores = {text: mean_logprob(text) for text in texts}
    assert len({round(score, 2) for score in scores.values()}) > 1
    assert scores[state["best"]] >= max(scores.values()) - 0.05


@pytest.mark.server
def test_best_of_n_is_right_where_its_candidates_are(client: Client) -> None:
    (problem,) = load(options("--problems", "1", "--lines", "16"))
    run = client.run(BEST_OF_N, problem, options("--candidates", "3", "--temperature", "0.7"))
    assert list(run.candidates) == [True] * 3
    assert list(run.right) == [True]


@pytest.mark.server
def test_a_refused_request_is_an_error(client: Client) -> None:
    problem = Problem("1;" * 20_000, bool, answer_of, 16)
    with (
        pytest.raises(RuntimeError, match=f"the server refused a request: .*{REFUSED}"),
        pytest.warns(match="Error in stream"),
    ):
        client.run(SELF_CONSISTENCY, problem, options())


@pytest.mark.server
def test_a_lesson_comes_back_to_what_it_said(client: Client) -> None:
    (problem,) = load(options("--problems", "1", "--lines", "24"), 5)
    run = client.run(TUTOR, problem, options())
    assert list(run.right) == [True] * 6
    readers = run.shared.readers
    assert len(readers) == 5
    # Three tokens ask, one answers.
    assert all(later - earlier == 4 for earlier, later in zip(readers, readers[1:], strict=False))
    # Each turn finds all whole pages of what was computed before it: the last token of an answer never was, but for
    # the chain, which an end token follows.
    held = [readers[0] - 3, *readers[:-1]]
    assert run.used["cached_tokens"] == sum(tokens // PAGE * PAGE for tokens in held)
