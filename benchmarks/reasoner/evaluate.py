"""The reasoner over a quantized KV cache, in plain PyTorch on a CPU.

Greedy decoding, the final answers checked by ``task.check``; and one pass over a known chain that reads what decoding
would read. A ``Quantizer`` says how a cache is kept; ``benchmarks/offline.py`` and ``benchmarks/forced.py`` have them.
Whatever attention reads, the current token's own key and value included, it reads from the cache. This measures the
model, not a serving engine: weights are the shipped bfloat16 ones, computed in float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.harness.tasks import chat_ids
from benchmarks.reasoner import task
from benchmarks.reasoner.model import Config, Llama, rope_tables

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


def load(directory: Path) -> Llama:
    """The model of a folder, the bundled one or another of its kind, its bfloat16 weights as float32.

    Raises:
        ValueError: the model is neither Llama nor Qwen2, or its positions are scaled. OSError: it cannot be read.
    """
    raw = json.loads((directory / "config.json").read_text())
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind, scaling = raw.get("model_type"), rope.get("rope_type", "default")
    if kind not in ("llama", "qwen2") or scaling != "default" or raw.get("use_sliding_window"):
        raise ValueError(f"{directory}: {kind} with {scaling} positions has no plain PyTorch model here, only a server")
    raw = {"head_dim": raw["hidden_size"] // raw["num_attention_heads"], **rope, **raw}
    raw["attention_bias"] = kind == "qwen2" or raw.get("attention_bias", False)
    weights = {k: v.float() for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    with torch.device("meta"):
        model = Llama(Config(**{name: raw[name] for name in Config.__dataclass_fields__}))
    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = rope_tables(model.config, model.config.max_position_embeddings)
    return model.eval().requires_grad_(False)


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
    model: Llama, tokens: Tensor, quantizer: Quantizer, prompt: int | None = None, cache: Tensor | None = None
) -> Tensor:
    """Hidden states [T, hidden] of all tokens [T] of one sequence at once, each reading what decoding would read.

    Args:
        prompt: the tokens that are fed in one forward, the others come one by one; None: all.
        cache: [2 (K, V), L, G, at least T, D], gets keys and values as they entered.
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
            cache[:, index, :, :length] = torch.cat((k, v))
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


def step(model: Llama, cache: Tensor, token: int, slot: int, quantizer: Quantizer) -> Tensor:
    """Hidden state [hidden] of a token at position ``slot``, over a cache [2, L, G, T, D] that holds old tokens low."""
    cos, sin = model.cos[slot : slot + 1], model.sin[slot : slot + 1]
    x = model.model.embed_tokens(torch.tensor([[token]]))
    for index, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        q, k, v = attn.project(layer.input_layernorm(x), cos, sin)
        cache[:, index, :, slot] = quantizer.enter(torch.cat((k, v))[:, :, 0])
        keys, values = cache[:, index, :, : slot + 1]
        q = q.reshape(attn.groups, -1, attn.dim)  # query heads of one group share its keys
        out = (q @ keys.transpose(-1, -2) / math.sqrt(attn.dim)).softmax(-1) @ values
        x = x + attn.o_proj(out.reshape(1, 1, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x[0, 0])


@torch.no_grad()
def generate(model: Llama, prompt: list[int], limit: int, quantizer: Quantizer, end: int) -> list[int]:
    """Greedy continuation of at most ``limit`` tokens, the end token included."""
    c = model.config
    cache = torch.zeros(2, c.num_hidden_layers, c.num_key_value_heads, len(prompt) + limit, c.head_dim)
    hidden = forward(model, torch.tensor(prompt), quantizer, cache=cache)[-1]
    output: list[int] = []
    old = [quantizer.sink, quantizer.sink]
    while True:
        output.append(int(model.lm_head(hidden).argmax()))
        if output[-1] == end or len(output) == limit:
            return output
        slot = len(prompt) + len(output) - 1
        for side, until in enumerate(quantizer.old(slot + 1)):
            if until > old[side]:
                for layer, data in enumerate(cache[side]):
                    data[:, old[side] : until] = quantizer.low(layer, side, data[:, old[side] : until])
                old[side] = until
        hidden = step(model, cache, output[-1], slot, quantizer)


def evaluate(
    model: Llama, tokenizer: PreTrainedTokenizerFast, problems: list[task.Problem], quantizer: Quantizer, name: str = ""
) -> list[dict[str, int | bool]]:
    """One record per problem: tokens, whether the answer and whether the whole chain is right.

    A first pass finds the problems whose chain greedy decoding would write exactly; only the others are decoded.
    """
    records: list[dict[str, int | bool]] = []
    for problem in tqdm(problems, desc=name, mininterval=5):
        prompt = chat_ids(tokenizer, task.messages(problem))
        chain = [*tokenizer(problem.chain)["input_ids"], tokenizer.eos_token_id]
        whole = whole_chain_right(model, prompt, chain, quantizer)
        output = chain
        if not whole:
            output = generate(model, prompt, problem.chain_tokens + 32, quantizer, tokenizer.eos_token_id)
        right = whole or task.check(problem, tokenizer.decode(output, skip_special_tokens=True))
        records.append({"prompt_tokens": len(prompt), "tokens": len(output), "chain_right": whole, "right": right})
    return records
