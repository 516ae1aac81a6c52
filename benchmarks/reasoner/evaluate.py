"""Accuracy of the reasoner under a quantized KV cache, in plain PyTorch on a CPU.

    python -m benchmarks.reasoner.evaluate --n 200 --lines 64-128 --bits 16 8 4 2

Greedy decoding with a preallocated cache, the final answers checked by ``task.check``. With ``--bits``
below 16 every key (after RoPE) and value is rounded as soon as it is written, per token and head over the
channels of the head: ``zero = min``, ``scale = (max - min) / (2^bits - 1)``, nearest. Whatever attention
reads, the current token's own key and value included, it reads from the cache.

This measures the model, not a serving engine: weights are the shipped bfloat16 ones, computed in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.reasoner import task
from benchmarks.reasoner.model import Config, Llama

HERE = Path(__file__).parent


def quantize(x: Tensor, bits: int) -> Tensor:
    """Round [..., D] to ``bits`` bits, one group of D channels per token and head."""
    if bits >= 16:
        return x
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return low + ((x - low) / scale).round() * scale


def load(directory: Path) -> Llama:
    """The exported model, its bfloat16 weights as float32."""
    raw = json.loads((directory / "config.json").read_text())
    model = Llama(Config(**{name: raw[name] for name in Config.__dataclass_fields__}))
    model.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
    return model.eval()


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, problem: task.Problem) -> list[int]:
    """The problem's prompt as a server would render it."""
    messages = task.messages(problem)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


class Cache:
    """Keys and values of all layers, each [L, B, G, capacity, D]; rounded when written."""

    def __init__(self, config: Config, batch: int, capacity: int, bits: int) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values, self.bits = torch.zeros(shape), torch.zeros(shape), bits

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store [B, G, D] at position ``slots`` [B]."""
        rows = torch.arange(len(slots))
        self.keys[layer][rows, :, slots] = quantize(key, self.bits)
        self.values[layer][rows, :, slots] = quantize(value, self.bits)

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but ``rows``."""
        self.keys, self.values = self.keys[:, rows].contiguous(), self.values[:, rows].contiguous()


def forward(model: Llama, tokens: Tensor, bits: int, cache: Cache | None = None, row: int = 0) -> Tensor:
    """All tokens [T] of one sequence at once, each reading the rounded cache; hidden states [T, hidden].

    Fills row ``row`` of ``cache`` if one is given.
    """
    length = len(tokens)
    cos, sin = model.cos[:length], model.sin[:length]
    x = model.model.embed_tokens(tokens)[None]
    for index, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        q, k, v = attn.project(layer.input_layernorm(x), cos, sin)
        k, v = quantize(k, bits), quantize(v, bits)
        if cache is not None:
            cache.keys[index, row, :, :length], cache.values[index, row, :, :length] = k[0], v[0]
        share = attn.heads // attn.groups
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), is_causal=True
        )
        x = x + attn.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x[0])


@torch.no_grad()
def whole_chain_right(model: Llama, prompt: list[int], chain: list[int], bits: int) -> bool:
    """Whether greedy decoding would write exactly the gold chain, found in one pass over that chain.

    Greedy decoding repeats the gold chain if and only if each next token is right given the gold tokens
    before it. Much faster than decoding; a lower bound on right answers, as other chains can end right.
    """
    hidden = forward(model, torch.tensor(prompt + chain[:-1]), bits)[len(prompt) - 1 :]
    return model.lm_head(hidden).argmax(-1).tolist() == chain


def step(model: Llama, cache: Cache, tokens: Tensor, slots: Tensor) -> Tensor:
    """Feed one token [B] per sequence at position ``slots`` [B]; logits [B, vocab]."""
    batch, used = len(tokens), int(slots.max()) + 1
    cos, sin = model.cos[slots][:, None, None], model.sin[slots][:, None, None]
    ahead = torch.arange(used)[None, None, None] > slots[:, None, None, None]
    x = model.model.embed_tokens(tokens)[:, None]
    for index, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        q, k, v = attn.project(layer.input_layernorm(x), cos, sin)
        cache.write(index, slots, k[:, :, 0], v[:, :, 0])
        keys, values = cache.keys[index][:, :, :used], cache.values[index][:, :, :used]
        q = q.reshape(batch, attn.groups, -1, attn.dim)  # query heads of one group share its keys
        score = q @ keys.transpose(-1, -2) / math.sqrt(attn.dim)
        out = score.masked_fill_(ahead, -math.inf).softmax(-1) @ values
        x = x + attn.o_proj(out.reshape(batch, 1, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x[:, 0]))


@torch.no_grad()
def generate(
    model: Llama, prompts: list[list[int]], limits: list[int], bits: int, end: int, label: str = ""
) -> list[list[int]]:
    """Greedy continuations of token prompts, at most ``limits`` tokens each, the end token included."""
    capacity = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
    cache = Cache(model.config, len(prompts), capacity, bits)
    last = [forward(model, torch.tensor(p), bits, cache, row)[-1] for row, p in enumerate(prompts)]
    logits = model.lm_head(torch.stack(last))
    slots = torch.tensor([len(p) for p in prompts])
    alive = torch.arange(len(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=max(limits), desc=label, mininterval=5) as bar:
        while True:
            tokens = logits.argmax(-1)
            going = []
            for place, (index, token) in enumerate(zip(alive.tolist(), tokens.tolist(), strict=True)):
                outputs[index].append(token)
                if token != end and len(outputs[index]) < limits[index]:
                    going.append(place)
            bar.update()
            if not going:
                return outputs
            keep = torch.tensor(going)
            if len(keep) < len(alive):
                alive, tokens, slots = alive[keep], tokens[keep], slots[keep]
                cache.keep(keep)
            logits = step(model, cache, tokens, slots)
            slots = slots + 1


def evaluate(
    model: Llama,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[task.Problem],
    bits: int,
    batch: int,
    decode: bool = True,
) -> list[dict[str, int | bool]]:
    """One record per problem: lines, tokens, whether the answer and whether the whole chain is right.

    A first pass finds the problems whose chain greedy decoding would write exactly; only the others are
    decoded (or, with ``decode=False``, left without an answer).
    """
    records: list[dict[str, int | bool]] = []
    prompts = [prompt_tokens(tokenizer, problem) for problem in problems]
    shown = tqdm(problems, desc=f"{bits} bit, one pass", mininterval=5)
    for prompt, problem in zip(prompts, shown, strict=True):
        chain = [*tokenizer(problem.chain)["input_ids"], tokenizer.eos_token_id]
        whole = whole_chain_right(model, prompt, chain, bits)
        records.append({"lines": problem.lines, "gold_tokens": len(chain), "chain_right": whole})
        if whole:
            records[-1] |= {"tokens": len(chain), "right": True}
    if not decode:
        return records
    rest = [i for i, record in enumerate(records) if not record["chain_right"]]
    rest.sort(key=lambda i: problems[i].chain_tokens)
    for first in range(0, len(rest), batch):
        part = rest[first : first + batch]
        limits = [problems[i].chain_tokens + 32 for i in part]
        label = f"{bits} bit, decoding {first + len(part)}/{len(rest)}"
        outputs = generate(model, [prompts[i] for i in part], limits, bits, tokenizer.eos_token_id, label)
        for i, output in zip(part, outputs, strict=True):
            text = tokenizer.decode(output, skip_special_tokens=True)
            records[i] |= {"tokens": len(output), "right": task.check(problems[i], text)}
    return records


def add_row(path: Path, row: dict[str, object]) -> None:
    """Put ``row`` into the table, in place of one of the same programs and width."""
    command = "python -m benchmarks.reasoner.evaluate --table " + path.as_posix()
    table = json.loads(path.read_text()) if path.is_file() else {"command": command, "rows": []}
    kept = [r for r in table["rows"] if (r["lines"], r["bits"]) != (row["lines"], row["bits"])]
    table["rows"] = sorted([*kept, row], key=lambda r: (int(r["lines"].split("-")[0]), -r["bits"]))
    path.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    """Evaluate and write one JSON file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4, 2])
    parser.add_argument("--n", type=int, default=200, help="problems")
    parser.add_argument("--first", type=int, default=0, help="index of the first evaluation problem")
    parser.add_argument("--lines", default="64-128", help="range of program lengths, low-high")
    parser.add_argument("--forced", action="store_true", help="whole chains only, without decoding (fast)")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--table", type=Path, help="result file (JSON) that gets a row per width, others are kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    low, high = (int(x) for x in args.lines.split("-"))
    model = load(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    problems = [task.eval_problem(args.first + i, low, high) for i in range(args.n)]
    lengths = [p.chain_tokens for p in problems]
    result: dict[str, object] = {
        "problems": args.n,
        "first": args.first,
        "lines": [low, high],
        "chain_tokens": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "dependence": sum(p.dependence for p in problems) / len(problems),
        "bits": {},
    }
    for bits in args.bits:
        began = time.monotonic()
        summary: dict[str, object] = {}
        records = evaluate(model, tokenizer, problems, bits, args.batch, decode=not args.forced)
        if not args.forced:
            summary["accuracy"] = sum(r["right"] for r in records) / len(records)
        summary["chain_accuracy"] = sum(r["chain_right"] for r in records) / len(records)
        summary["seconds"] = round(time.monotonic() - began, 1)
        print(bits, "bit:", json.dumps(summary), flush=True)
        result["bits"][str(bits)] = summary | {"records": records}
        if args.out:
            args.out.write_text(json.dumps(result) + "\n")
        if args.table:
            row = {"lines": args.lines, "bits": bits, "problems": args.n, "chain_tokens": result["chain_tokens"]}
            add_row(args.table, row | summary)


if __name__ == "__main__":
    main()
