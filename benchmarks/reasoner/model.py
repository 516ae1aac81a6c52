"""A minimal Llama for training and batched evaluation on a CPU; weights named as in transformers.

Same function as ``transformers.LlamaForCausalLM`` (tested), without its per-call cost.
Shapes: B sequences, T tokens, H query heads, G key/value heads, D = head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Architecture; the fields carry the names of ``LlamaConfig``."""

    vocab_size: int = 624
    hidden_size: int = 256
    intermediate_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 128
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    attention_bias: bool = False
    """Of queries, keys and values."""


def rope_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [length, D], in the two-halves layout of transformers."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [..., T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, D], rotated keys and values [B, G, T, D]."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.groups, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.groups, self.dim).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention over the whole sequence, [B, T, hidden]."""
        q, k, v = self.project(x, cos, sin)
        if self.groups != self.heads:
            k = k.repeat_interleave(self.heads // self.groups, dim=1)
            v = v.repeat_interleave(self.heads // self.groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Llama(nn.Module):
    """The language model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_tables(config, config.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final normalized hidden states [B, T, hidden] of tokens [B, T]."""
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab]."""
        return self.lm_head(self.hidden(tokens))


@torch.no_grad()
def initialize(model: Llama, seed: int) -> None:
    """Random weights with two priors that save most of the training time.

    Small transformers spend most of their training until "previous token" heads and the heads that match
    on them appear. Both are built in as a starting point here, and trained like everything else:

    * Layers 0 and 1 start with heads that attend 1, 2, 3 and 4 tokens back. Embeddings share a constant
      channel 0; keys read it as a fixed vector u, queries as u rotated by the offset, so RoPE makes the
      score peak at that distance. Each writes what it saw to channels of its own.
    * Layers 2, 3 and 4 start with a head whose query and key compare such channels: "current token"
      against "token before" (induction), "two back" with "two back", "three back" with "three back".
      The comparison uses the RoPE pairs that turn slowly, so it holds at any distance.
    """
    config = model.config
    hidden, dim, half = config.hidden_size, config.head_dim, config.head_dim // 2
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(noise(*module.weight.shape, std=0.4 / math.sqrt(module.in_features)))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
        layer.mlp.down_proj.weight.mul_(0.5)
    # Channels: 0 constant, 1..width current token, then one block for each of four offsets; rest free.
    width = (hidden - 1) // 5
    embedding = noise(config.vocab_size, hidden, std=0.05)
    embedding[:, 1 : 1 + width] = noise(config.vocab_size, width, std=1.0)
    embedding[:, 0] = 4.0
    model.model.embed_tokens.weight.copy_(embedding)
    rms = float(embedding.square().mean(1).sqrt().mean())
    block = {back: slice(1 + back * width, 1 + (back + 1) * width) for back in range(5)}

    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    fast = 12  # only the quickly turning pairs tell neighbours apart
    peak = math.sqrt(50.0 * math.sqrt(dim) / fast) / (4.0 / rms)  # score 50 there, 44 one token beside
    for index, offsets in ((0, (1, 2)), (1, (3, 4))):
        attn = model.model.layers[index].self_attn
        attn.k_proj.weight.mul_(0.3)
        attn.k_proj.weight[:, 0] = 0.0
        attn.k_proj.weight[:fast, 0] = peak
        value = noise(dim, width, std=1 / math.sqrt(dim))
        attn.v_proj.weight.mul_(0.3)
        attn.v_proj.weight[:, block[0]] += value
        for head, back in enumerate(offsets):
            rows = slice(head * dim, (head + 1) * dim)
            # R(p - back) q must equal R(p - back) u at the key's place: q = R(-back) u.
            attn.q_proj.weight[rows] *= 0.3
            turn = peak * torch.cat(((frequency * back).cos(), -(frequency * back).sin())).float()
            turn[fast:half] = 0.0
            turn[half + fast :] = 0.0
            attn.q_proj.weight[rows, 0] = turn
            attn.o_proj.weight[block[back], rows] += value.T
    slow = torch.arange(half // 2 + 4, half)
    slow = torch.cat((slow, slow + half))
    for index, (ask, match) in ((2, (0, 1)), (3, (2, 2)), (4, (3, 3))):
        attn = model.model.layers[index].self_attn
        compare = noise(len(slow), width, std=1.0 / math.sqrt(width))  # score about 20 on a match
        attn.q_proj.weight[slow, block[ask]] += compare
        attn.k_proj.weight[slow, block[match]] += compare
