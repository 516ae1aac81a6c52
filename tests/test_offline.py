"""The offline quantizers against definitions written out one element at a time, and their bytes against storage."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import offline
from benchmarks.harness.methods import bytes_per_token
from benchmarks.harness.results import ROOT
from benchmarks.harness.servers import REASONER, Unmeasurable
from benchmarks.harness.tasks import chat_ids
from benchmarks.offline import Kivi, Rounded, Sixteen, Static, parse_method
from benchmarks.reasoner.evaluate import (
    K,
    Quantizer,
    V,
    evaluate,
    forward,
    generate,
    load,
    whole_chain_right,
)
from benchmarks.reasoner.model import Config, Llama
from benchmarks.reasoner.task import eval_problem, messages
from sglang_pmkvq.formats import PageShape, groups_from_finals, page_bytes
from sglang_pmkvq.kernels.reference.codes import chain, quantize_group

SMALL = Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
)  # fmt: skip
FINALS = ((4, 2), (2, 8))
CASES: dict[str, Sixteen] = {
    "16bit": Sixteen(SMALL),
    "static": Static(SMALL, FINALS),
    "kivi": Kivi(SMALL, 2),
    "kivi, short residual": Kivi(SMALL, 4, 32),
}


@pytest.fixture(scope="module")
def small() -> Llama:
    torch.manual_seed(0)
    model = Llama(SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return model


# -- definitions, one element at a time ----------------------------------------------------------------------


@cache
def pool_row(values: tuple[float, ...], bits: int) -> torch.Tensor:
    """One head of one token [D] as the pool hands it out, from the definition of codes."""
    codes, zero, span = quantize_group(torch.tensor(values))
    return torch.tensor([chain(c, bits) * (float(span) / (2**bits - 1)) + float(zero) for c in codes])


def kivi_group(values: list[float], bits: int) -> list[float]:
    """One group of KIVI: asymmetric, zero and scale in fp16."""
    zero = float(np.float16(min(values)))
    scale = float(np.float16((max(values) - zero) / (2**bits - 1)))
    if scale == 0:
        return [zero] * len(values)
    return [min(max(round((v - zero) / scale), 0), 2**bits - 1) * scale + zero for v in values]


@cache
def kivi_rows(data: bytes, bits: int) -> torch.Tensor:
    """float32 [groups, 32], each row a group."""
    rows = np.frombuffer(data, np.float32).reshape(-1, 32).tolist()
    return torch.tensor([kivi_group(row, bits) for row in rows])


def expected(case: str, side: int, layer: int, rows: torch.Tensor, reads: int) -> torch.Tensor:
    """What a forward that reads ``reads`` tokens finds for [n, D], the n < reads stored ones of one head."""
    out, quantizer = rows.clone(), CASES[case]
    n = len(rows)
    if isinstance(quantizer, Static):
        for page in range(1, n // 16 + 1):
            # A page quantizes as a whole when the last 128 tokens touch it no more.
            if 16 * (page + 1) <= reads - 128:
                for t in range(16 * page, 16 * page + 16):
                    out[t] = pool_row(tuple(rows[t].tolist()), FINALS[layer][side])
    elif isinstance(quantizer, Kivi):
        residual, bits = quantizer.residual, quantizer.bits
        if side == K:
            for start in range(0, n // residual * residual, 32):
                channels = rows[start : start + 32].T.contiguous()
                out[start : start + 32] = kivi_rows(channels.numpy().tobytes(), bits).T
        else:
            for t in range(max(0, n - residual)):
                out[t] = kivi_rows(rows[t].numpy().tobytes(), bits).flatten()
    return out


@torch.no_grad()
def stepwise(model: Llama, tokens: list[int], prompt: int, case: str) -> torch.Tensor:
    """Logits [T − prompt + 1, vocab] of the last prompt token and of each further one, token by token.

    Every step starts from all keys and values as they were computed, and quantizes them anew.
    """
    layers = model.model.layers
    nothing = torch.zeros(SMALL.num_key_value_heads, 0, SMALL.head_dim)
    stored: list[list[torch.Tensor]] = [[nothing] * len(layers) for _ in (K, V)]
    out = []
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, len(tokens)))]:
        x = model.model.embed_tokens(torch.tensor(tokens[start:end]))[None]
        cos, sin = model.cos[start:end], model.sin[start:end]
        for index, layer in enumerate(layers):
            attn = layer.self_attn
            q, *new = attn.project(layer.input_layernorm(x), cos, sin)
            reads = []
            for side, data in enumerate(new):
                data = data[0].bfloat16().float()
                old = stored[side][index]
                stored[side][index] = torch.cat((old, data), 1)
                seen = [torch.cat((expected(case, side, index, h, end), d)) for h, d in zip(old, data, strict=True)]
                reads.append(torch.stack(seen))
            k, v = (r.repeat_interleave(attn.heads // attn.groups, 0) for r in reads)
            scores = q[0] @ k.transpose(1, 2) / attn.dim**0.5
            future = torch.arange(end) > torch.arange(start, end)[:, None]
            o = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
            x = x + attn.o_proj(o.transpose(0, 1).flatten(1))[None]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out.append(model.lm_head(model.model.norm(x[0, -1])))
    return torch.stack(out)


@torch.no_grad()
def one_pass(model: Llama, tokens: list[int], prompt: int, case: str) -> torch.Tensor:
    """The same logits by ``forward``."""
    return model.lm_head(forward(model, torch.tensor(tokens), CASES[case], prompt)[prompt - 1 :])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("prompt", "limits"), [(20, [160, 30]), (150, [110, 20])])
def test_one_pass_and_decoding_read_what_the_definition_says(
    small: Llama, case: str, prompt: int, limits: list[int]
) -> None:
    """Greedy decoding, the definition, and one pass over the outcome give the same logits."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 64, (n,), generator=generator).tolist() for n in (prompt, prompt + 21)]
    for given, limit in zip(prompts, limits, strict=True):
        output = generate(small, given, limit, CASES[case], end=-1)
        assert len(output) == limit
        tokens = given + output[:-1]
        want = stepwise(small, tokens, len(given), case)
        got = one_pass(small, tokens, len(given), case)
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
        chosen = want.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (want.amax(1) - chosen).max() < 4e-3, "each token is the most likely one"
        moved = (one_pass(small, tokens, len(given), "16bit") - got).abs().amax(1)
        assert moved[0] < 1e-4, "the prompt's own forward reads 16 bits"
        if case != "16bit" and len(tokens) > 170:
            assert moved[-1] > 0.02


# -- bytes ---------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_pool() -> None:
    config = Config()
    quantizer = Static(config, ((8, 8),) * 3 + ((4, 2),) * 3)
    shape = PageShape(16, 1, 128, 128)
    wide, mixed = groups_from_finals(list(quantizer.finals))
    # 300 tokens are 19 pages; 128 of them touch pages from 172 // 16 = 10 on, and page 0 is the sink.
    want = 9 * (page_bytes(shape, wide, 1) + page_bytes(shape, mixed, 3))
    want += 10 * (page_bytes(shape, wide, 0) + page_bytes(shape, mixed, 0))
    assert quantizer.bytes(300) == want
    assert quantizer.bytes(128) == Sixteen(config).bytes(128) == 128 * bytes_per_token(REASONER)


def test_bytes_are_those_of_kivi() -> None:
    quantizer = Kivi(Config(), 2)
    layers, dim = 6, 128
    # 301 tokens: 300 are stored, so 256 keys and 172 values are quantized; 45 keys and 129 values are not.
    codes = layers * dim * (256 + 172) * 2 // 8
    scales = layers * (256 // 32 * dim + 172 * dim // 32) * 4
    rest = layers * dim * (45 + 129) * 2
    assert quantizer.bytes(301) == codes + scales + rest
    assert quantizer.bytes(100) == 100 * bytes_per_token(REASONER)
    long = 1 << 20
    assert 8 * quantizer.bytes(long) / (long * quantizer.elements) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_memory_follows_the_decode_steps(concurrency: int) -> None:
    quantizer = Kivi(Config(), 2, 32)
    spans = [(40, 90), (10, 30), (100, 60), (20, 20)]
    waiting, running, held, bits = list(spans), [], [], []
    while waiting or running:
        while waiting and len(running) < concurrency:
            prompt, output = waiting.pop(0)
            running.append([prompt + 1, output - 1])
        held.append(sum(quantizer.bytes(n) for n, _ in running))
        bits.append(sum(n for n, _ in running) * quantizer.elements)
        running = [[n + 1, left - 1] for n, left in running if left > 1]
    got = offline.memory(quantizer, spans, concurrency)
    assert got["used_bytes_peak"] == max(held)
    assert got["used_bytes_avg"] == pytest.approx(sum(held) / len(held))
    assert got["effective_bits_avg"] == pytest.approx(8 * sum(held) / sum(bits))
    assert got["effective_bits_at_peak"] == pytest.approx(8 * max(held) / bits[held.index(max(held))])


def test_the_residual_grows_as_far_as_the_bytes_allow() -> None:
    quantizer, spans = Kivi(Config(), 2), [(400, 900), (350, 700)]
    full = offline.together(Sixteen(Config()), spans)
    assert full == sum(p + o for p, o in spans) * bytes_per_token(REASONER)
    sizes = []
    for share in (0.25, 0.5, 0.9, 1.0):
        found = offline.grown(quantizer, spans, int(full * share))
        assert offline.together(found, spans) <= full * share
        sizes.append(found.residual)
    assert sizes == sorted(sizes)
    assert sizes[0] < 128 < sizes[1]
    assert sizes[-1] >= 1300
    with pytest.raises(Unmeasurable, match="shortest residual"):
        offline.grown(quantizer, spans, int(full * 0.19))


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        ("16bit", Sixteen(Config())),
        ("static-2", Static(Config(), ((2, 2),) * 6)),
        ("static-0-2:8,3-5:k4v2", Static(Config(), ((8, 8),) * 3 + ((4, 2),) * 3)),
        ("kivi-4", Kivi(Config(), 4)),
    ],
)
def test_names(name: str, quantizer: Sixteen) -> None:
    assert parse_method(name, Config()) == (quantizer, False)
    if name.startswith("kivi"):
        assert parse_method(f"{name}@bytes", Config()) == (quantizer, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--methods age-2", "unknown method 'age-2'"),
        ("--methods kivi-3", "kivi-3"),
        ("--methods static-0-2:8", "no width for layers 3, 4, 5"),
        ("--methods kivi-2@bytes", "needs --share"),
        ("--methods kivi-2@bytes --share much", "--share much"),
        ("--lines many", "--lines many"),
        ("--threads 0", "--threads: 0"),
        ("--methods 16bit --model nowhere", "nowhere"),
    ],
)
def test_wrong_options_are_one_sentence(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offline.main(["--problems", "1", "--out", str(tmp_path / "o.json"), *line.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "o.json").exists()


def test_a_run_goes_on_and_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.json"
    args = ["--problems", "2", "--lines", "12-14", "--concurrency", "2", "--threads", "1", "--out", str(out)]
    assert offline.main([*args, "--methods", "16bit"]) == 0
    first = json.loads(out.read_text())["rows"]
    both = [*args, "--methods", "16bit,kivi-4@bytes", "--share", "0.1,2"]
    assert offline.main(both) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == first[0]
    assert rows[0]["right"] == 2
    assert "needs" in rows[1]["missing"]
    # The whole of such short problems stays in the residual.
    assert rows[2]["right"] == 2
    assert rows[2]["output_tokens"] == rows[0]["output_tokens"]
    assert rows[2]["used_bytes_peak"] == rows[0]["used_bytes_peak"]
    shown = capsys.readouterr().out
    assert "| 16bit | 12-14 |" in shown and "| 2/2 = 100.0 % |" in shown
    assert len({line.count("|") for line in shown.splitlines() if line.startswith("|")} - {14}) <= 1


@pytest.fixture(scope="module")
def reasoner() -> tuple[Llama, Any]:
    return load(REASONER), AutoTokenizer.from_pretrained(REASONER)


def answers(reasoner: tuple[Llama, Any], quantizer: Quantizer, problems: int, lines: tuple[int, int]) -> list[Any]:
    found = [eval_problem(i, *lines) for i in range(problems)]
    records = evaluate(*reasoner, found, quantizer)
    return [(r["right"], r["chain_right"], r["tokens"]) for r in records]


def test_sixteen_bits_answer_as_the_model_does(reasoner: tuple[Llama, Any]) -> None:
    """A bf16 cache decides like the fp32 one of the model's own evaluation, and decoding like the one pass."""
    exact = answers(reasoner, Rounded(Config(), 16), 6, (40, 60))
    assert answers(reasoner, Sixteen(Config()), 6, (40, 60)) == exact
    assert sum(right for right, *_ in exact) >= 5
    model, tokenizer = reasoner
    problem = eval_problem(0, 30, 40)
    prompt = chat_ids(tokenizer, messages(problem))
    gold = [*tokenizer(problem.chain)["input_ids"], tokenizer.eos_token_id]
    for quantizer in (Sixteen(Config()), Kivi(Config(), 4)):
        output = generate(model, prompt, len(gold) + 8, quantizer, tokenizer.eos_token_id)
        assert (output == gold) == whole_chain_right(model, prompt, gold, quantizer)


@pytest.mark.full
def test_static_answers_as_our_server_does(reasoner: tuple[Llama, Any]) -> None:
    """The same problems as in the committed figures of real servers: the same widths, right and wrong.

    The server computes in bf16, which decides a chain differently now and then, and at 2 bits often.
    """
    rows = {r["key"]["method"]: r for r in json.loads((ROOT / "benchmarks/results/static.json").read_text())["rows"]}
    for bits, slack in ((8, 1), (4, 2), (2, 7)):
        right = [right for right, *_ in answers(reasoner, Static(Config(), ((bits, bits),) * 6), 60, (64, 128))]
        print(f"static {bits}: {sum(right)}/60 offline, {rows[f'static-{bits}']['right']}/60 on the server")
        assert abs(sum(right) - rows[f"static-{bits}"]["right"]) <= slack
