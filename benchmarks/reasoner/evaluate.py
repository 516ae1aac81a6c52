"""Accuracy of the reasoner under a quantized KV cache, in plain PyTorch on a CPU.

    python -m benchmarks.reasoner.evaluate --n 200 --lines 64-128 --bits 16 8 4 2

Greedy decoding with a preallocated cache, the final answers checked by ``task.check``. With ``--bits``
below 16 every key (after RoPE) and value is rounded as soon as it is written, per token and head over the
channels of the head: ``zero = min``, ``scale = (max - min) / (2^bits - 1)``, nearest. Whatever attention
reads, the current token's own key and value included, it reads from the cache.

Other ways to keep a cache are subclasses of ``Quantizer``; ``benchmarks/offline.py`` has those that follow
published methods.

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


K, V = 0, 1


class Quantizer:
    """How a cache keeps keys and values. This one keeps them as they come.

    Two things may be overridden: what enters can be rounded at once, and the older part of a sequence can be
    kept at fewer bits. The prompt is fed in one forward, which reads its keys and values as they entered.
    In a later forward that reads ``n`` tokens, its own included, the tokens from ``sink`` up to ``old(n)`` are
    read as ``low`` rounded them.
    """

    sink = 0
    """First tokens of a sequence that never become old."""

    def enter(self, x: Tensor) -> Tensor:
        """Keys or values [..., D] as they are stored and first read."""
        return x

    def old(self, tokens: int) -> tuple[int, int]:
        """Ends of the old keys and of the old values in a forward that reads ``tokens`` tokens.

        Both are below ``tokens`` and never fall as it grows.
        """
        return 0, 0

    def low(self, layer: int, side: int, x: Tensor) -> Tensor:
        """Entered keys (side K) or values (side V) [..., n, D] of n consecutive tokens, as they are kept when old.

        ``n`` is what ``old`` grew by, or a sum of such steps from ``sink`` on.
        """
        return x


class Rounded(Quantizer):
    """Everything at one width, rounded when written: one group of D channels per token and head."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def enter(self, x: Tensor) -> Tensor:
        if self.bits >= 16:
            return x
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self.bits - 1)).clamp_min(1e-12)
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
    """Keys and values of all layers, each [L, B, G, capacity, D], as a quantizer keeps them."""

    def __init__(self, config: Config, batch: int, capacity: int, quantizer: Quantizer) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.data, self.quantizer = (torch.zeros(shape), torch.zeros(shape)), quantizer
        # First token of each sequence that is not old yet, per side.
        self._old = [[quantizer.sink] * batch, [quantizer.sink] * batch]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store [B, G, D] at position ``slots`` [B]."""
        rows = torch.arange(len(slots))
        for data, x in zip(self.data, (key, value), strict=True):
            data[layer][rows, :, slots] = self.quantizer.enter(x)

    def settle(self, tokens: list[int]) -> None:
        """Keep low what is old in the coming forward, which reads ``tokens`` [B] tokens of each sequence."""
        ends = [self.quantizer.old(n) for n in tokens]
        for side, data in enumerate(self.data):
            old, ripe = self._old[side], {}
            for row, end in enumerate(ends):
                if end[side] > old[row]:
                    ripe.setdefault(end[side] - old[row], []).append(row)
            for count, places in ripe.items():
                rows = torch.tensor(places)[:, None]
                at = torch.tensor([old[row] for row in places])[:, None] + torch.arange(count)
                for layer, kept in enumerate(data):
                    x = kept[rows, :, at].transpose(1, 2)  # [rows, G, count, D]
                    kept[rows, :, at] = self.quantizer.low(layer, side, x).transpose(1, 2)
                for row in places:
                    old[row] += count

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but ``rows``, in this order.

        A sequence may move only to the place of one that is dropped: see ``compacted``.
        """
        for place, row in enumerate(rows):
            if place != row:
                for data in self.data:
                    data[:, place] = data[:, row]
        self.data = (self.data[K][:, : len(rows)], self.data[V][:, : len(rows)])
        self._old = [[old[row] for row in rows] for old in self._old]


def compacted(rows: list[int]) -> list[int]:
    """``rows`` (ascending) in an order that leaves as many as possible where they are, so that little is copied."""
    count = len(rows)
    order, moving = list(range(count)), [row for row in rows if row >= count]
    for hole in sorted(set(range(count)).difference(rows)):
        order[hole] = moving.pop()
    return order


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, k_low: Tensor, v_low: Tensor, old_k: Tensor, old_v: Tensor, ahead: Tensor
) -> Tensor:
    """Attention where each query reads some tokens low and the others as they are.

    Args:
        q: [H, Q, D]. k, v, k_low, v_low: [G, T, D], G divides H.
        old_k, old_v, ahead: bool [Q, T], keys read from ``k_low``, values from ``v_low``, tokens not read at all.

    Returns:
        [H, Q, D].
    """
    share = q.shape[0] // k.shape[0]
    k, v, k_low, v_low = (x.repeat_interleave(share, 0) for x in (k, v, k_low, v_low))
    scores = torch.where(old_k, q @ k_low.transpose(-1, -2), q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    p = scores.masked_fill_(ahead, -math.inf).softmax(-1)
    return (p * ~old_v) @ v + (p * old_v) @ v_low


def forward(
    model: Llama,
    tokens: Tensor,
    quantizer: Quantizer,
    prompt: int | None = None,
    cache: Cache | None = None,
    row: int = 0,
) -> Tensor:
    """Hidden states [T, hidden] of all tokens [T] of one sequence at once, each reading what decoding would read.

    Args:
        prompt: the tokens that are fed in one forward, the others come one by one; None: all.
        cache: gets keys and values as they entered, in row ``row``.
    """
    length = len(tokens)
    prompt = length if prompt is None else prompt
    cos, sin = model.cos[:length], model.sin[:length]
    position = torch.arange(length)
    ends = torch.tensor([quantizer.old(n) for n in range(prompt + 1, length + 1)]).reshape(length - prompt, 2)
    last = quantizer.old(length) if length > prompt else (0, 0)
    old = [(position >= quantizer.sink) & (position < ends[:, side, None]) for side in (K, V)]
    ahead = position > position[prompt:, None]
    mixed = max(last) > quantizer.sink
    x = model.model.embed_tokens(tokens)[None]
    for index, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        q, k, v = attn.project(layer.input_layernorm(x), cos, sin)
        k, v = quantizer.enter(k), quantizer.enter(v)
        if cache is not None:
            cache.data[K][index, row, :, :length], cache.data[V][index, row, :, :length] = k[0], v[0]
        share = attn.heads // attn.groups
        first = slice(0, prompt if mixed else length)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, first],
            k[:, :, first].repeat_interleave(share, 1),
            v[:, :, first].repeat_interleave(share, 1),
            is_causal=True,
        )
        if mixed:
            low = [data[0].clone() for data in (k, v)]
            for side, data in enumerate(low):
                part = slice(quantizer.sink, max(last[side], quantizer.sink))
                data[:, part] = quantizer.low(index, side, data[:, part])
            rest = mixed_attention(q[0, :, prompt:], k[0], v[0], *low, *old, ahead)
            out = torch.cat((out, rest[None]), 2)
        x = x + attn.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x[0])


@torch.no_grad()
def whole_chain_right(model: Llama, prompt: list[int], chain: list[int], quantizer: Quantizer) -> bool:
    """Whether greedy decoding would write exactly the gold chain, found in one pass over that chain.

    Greedy decoding repeats the gold chain if and only if each next token is right given the gold tokens
    before it. Much faster than decoding; a lower bound on right answers, as other chains can end right.
    """
    hidden = forward(model, torch.tensor(prompt + chain[:-1]), quantizer, len(prompt))[len(prompt) - 1 :]
    return model.lm_head(hidden).argmax(-1).tolist() == chain


def step(model: Llama, cache: Cache, tokens: Tensor, slots: Tensor) -> Tensor:
    """Feed one token [B] per sequence at position ``slots`` [B]; logits [B, vocab]."""
    cache.settle((slots + 1).tolist())
    batch, used = len(tokens), int(slots.max()) + 1
    cos, sin = model.cos[slots][:, None, None], model.sin[slots][:, None, None]
    ahead = torch.arange(used)[None, None, None] > slots[:, None, None, None]
    x = model.model.embed_tokens(tokens)[:, None]
    for index, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        q, k, v = attn.project(layer.input_layernorm(x), cos, sin)
        cache.write(index, slots, k[:, :, 0], v[:, :, 0])
        keys, values = (data[index][:, :, :used] for data in cache.data)
        q = q.reshape(batch, attn.groups, -1, attn.dim)  # query heads of one group share its keys
        score = q @ keys.transpose(-1, -2) / math.sqrt(attn.dim)
        out = score.masked_fill_(ahead, -math.inf).softmax(-1) @ values
        x = x + attn.o_proj(out.reshape(batch, 1, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x[:, 0]))


@torch.no_grad()
def generate(
    model: Llama, prompts: list[list[int]], limits: list[int], quantizer: Quantizer, end: int, label: str = ""
) -> list[list[int]]:
    """Greedy continuations of token prompts, at most ``limits`` tokens each, the end token included."""
    capacity = max(len(p) + limit for p, limit in zip(prompts, limits, strict=True))
    cache = Cache(model.config, len(prompts), capacity, quantizer)
    last = [forward(model, torch.tensor(p), quantizer, cache=cache, row=row)[-1] for row, p in enumerate(prompts)]
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
            if len(going) < len(alive):
                going = compacted(going)
                alive, tokens, slots = alive[going], tokens[going], slots[going]
                cache.keep(going)
            logits = step(model, cache, tokens, slots)
            slots = slots + 1


def evaluate(
    model: Llama,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[task.Problem],
    quantizer: Quantizer,
    batch: int,
    decode: bool = True,
    label: str = "",
) -> list[dict[str, int | bool]]:
    """One record per problem: lines, tokens, whether the answer and whether the whole chain is right.

    ``label`` names the quantizer in the progress bars.

    A first pass finds the problems whose chain greedy decoding would write exactly; only the others are
    decoded (or, with ``decode=False``, left without an answer).
    """
    records: list[dict[str, int | bool]] = []
    prompts = [prompt_tokens(tokenizer, problem) for problem in problems]
    bar = tqdm(problems, desc=f"{label}, one pass", mininterval=5)
    for prompt, problem in zip(prompts, bar, strict=True):
        chain = [*tokenizer(problem.chain)["input_ids"], tokenizer.eos_token_id]
        whole = whole_chain_right(model, prompt, chain, quantizer)
        records.append(
            {"lines": problem.lines, "prompt_tokens": len(prompt), "gold_tokens": len(chain), "chain_right": whole}
        )
        if whole:
            records[-1] |= {"tokens": len(chain), "right": True}
    if not decode:
        return records
    rest = [i for i, record in enumerate(records) if not record["chain_right"]]
    rest.sort(key=lambda i: problems[i].chain_tokens)
    for first in range(0, len(rest), batch):
        part = rest[first : first + batch]
        limits = [problems[i].chain_tokens + 32 for i in part]
        shown = f"{label}, decoding {first + len(part)}/{len(rest)}"
        outputs = generate(model, [prompts[i] for i in part], limits, quantizer, tokenizer.eos_token_id, shown)
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
        records = evaluate(
            model, tokenizer, problems, Rounded(bits), args.batch, decode=not args.forced, label=f"{bits} bit"
        )
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
