"""The model under calibration: transformers' own forward with one seam, the attention function.

Every layer hands query, key (after RoPE and QK-norm) and value to an *observer*, which may look at them or
replace key and value. One sample at a time, never padded, so attention is plainly causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sglang_pmkvq.calib.corpus import Sample
from sglang_pmkvq.calib.positions import NATURAL, stretched_positions
from sglang_pmkvq.formats import PAGE_SIZES
from sglang_pmkvq.kernels.rotary import RotaryTable

SEAM = "pmkvq_calibration"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
LOGIT_ROWS = 256
# Tokens that a server keeps at 16 bits unless told otherwise: the first page of a sequence. Attention of many models
# rests on the first token, whose key is like no other; measured with the rest it would decide what is done to all.
SINK = PAGE_SIZES[0]

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(layer, query [1, Hq, T, D], key [1, H, T, D], value [1, H, T, D]) → (key, value) that attention uses."""

_observer: Observer | None = None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention contract. The mask is not used: stretched positions look like packed
    sequences to transformers, and a lone unpadded sample needs none."""
    if _observer is not None:
        key, value = _observer(module.layer_idx, query, key, value)
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


def as_served(low: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Keys or values ``low [..., T, D]`` but for the first page, which stays ``exact``."""
    return torch.cat((exact[..., :SINK, :].to(low.dtype), low[..., SINK:, :]), -2)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Inside, every attention call goes through ``observer``. Not reentrant, not thread-safe."""
    global _observer
    assert _observer is None
    _observer = observer
    try:
        yield
    finally:
        _observer = None


@dataclass
class CalibrationModel:
    """A loaded model and its KV geometry.

    Attributes:
        model: the transformers model, parameters frozen.
        config: its text configuration.
        layers: decoder layers, L. kv_heads: H. head_dim: D.
    """

    model: Any
    config: Any
    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def load(cls, path: str, device: str = "auto", dtype: str = "auto") -> CalibrationModel:
        """Load a causal language model.

        Args:
            device: ``auto`` is cuda where there is one.
            dtype: ``auto`` is the checkpoint's on a GPU and float32 on a CPU, where 16-bit is slow.

        Raises:
            ValueError: the architecture, its attention or its head size cannot be served mixed-precision.
        """
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path)
        check_architecture(config)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            chosen: torch.dtype | str = torch.float32 if device == "cpu" else "auto"
        else:
            chosen = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
        AttentionInterface.register(SEAM, _attention)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, attn_implementation=SEAM)
        model.requires_grad_(False).to(device).eval()
        heads = config.num_attention_heads
        return cls(
            model,
            config,
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def scaling(self, layer: int) -> float:
        """Softmax scale of a layer."""
        return float(getattr(self.model.base_model.layers[layer].self_attn, "scaling", self.head_dim**-0.5))

    def _tokens(self, sample: Sample) -> torch.Tensor:
        return torch.from_numpy(sample.tokens).to(self.device)[None]

    @torch.no_grad()
    def hidden(self, sample: Sample, effective_len: int = NATURAL) -> torch.Tensor:
        """Final hidden states [T, hidden], positions stretched to ``effective_len`` if that is given."""
        tokens = self._tokens(sample)
        positions = stretched_positions(tokens.shape[1], effective_len, self.device)[None]
        return self.model.base_model(tokens, position_ids=positions, use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def angles(self, length: int, effective_len: int = NATURAL) -> torch.Tensor:
        """Cosine and sine of norm 1, fp32 [2, length, D], of stretched positions, by the model's own embedding."""
        return self._cos_sin(length, effective_len) / self.model.base_model.rotary_emb.attention_scaling

    def rotary(self, length: int, effective_len: int = NATURAL) -> RotaryTable:
        """What the tokens of a sample are turned by, row i for token i at its stretched position; on the host.

        The model's own cosines and sines, magnitude (YaRN) included, so natural rows are its rotary table. The
        architectures here pair channels (j, j + D/2).
        """
        cos, sin = self._cos_sin(length, effective_len).cpu()
        half = cos.shape[1] // 2
        return RotaryTable.of(cos[:, :half], sin[:, :half], self.head_dim)

    def _cos_sin(self, length: int, effective_len: int) -> torch.Tensor:
        positions = stretched_positions(length, effective_len, self.device)[None]
        zero = torch.zeros(1, dtype=torch.float32, device=self.device)
        return torch.stack(self.model.base_model.rotary_emb(zero, positions))[:, 0]

    def key_biases(self) -> tuple[torch.Tensor | None, ...]:
        """What each layer adds to all keys before they are turned, fp32 [H, D] on the host; None where nothing is.

        A norm of keys takes the bias apart, so that is nothing either.
        """
        found: list[torch.Tensor | None] = []
        for layer in self.model.base_model.layers:
            attention = layer.self_attn
            bias = None if getattr(attention, "k_norm", None) is not None else attention.k_proj.bias
            if bias is None or not bool(bias.any()):
                found.append(None)
            else:
                found.append(bias.detach().float().cpu().view(self.kv_heads, self.head_dim))
        return tuple(found)

    @torch.no_grad()
    def key_spreads(self) -> tuple[torch.Tensor, ...]:
        """Energy that the weights give what varies from key to key, fp32 [H] of each layer on the host: Σ (W·g)².

        Over a head's rows and all inputs, g the weight of the layer's norm: normalized inputs have mean square 1.
        """
        found = []
        for layer in self.model.base_model.layers:
            rows = layer.self_attn.k_proj.weight.float() * layer.input_layernorm.weight.float()
            found.append(rows.square().sum(1).view(self.kv_heads, -1).sum(1).cpu())
        return tuple(found)

    @torch.no_grad()
    def layer_inputs(self, sample: Sample) -> tuple[torch.Tensor, ...]:
        """What each layer reads, [1, T, hidden] of layers 0 .. L − 1, then the final hidden states."""
        out = self.model.base_model(self._tokens(sample), use_cache=False, output_hidden_states=True)
        states: tuple[torch.Tensor, ...] = out.hidden_states
        return states

    @torch.no_grad()
    def hidden_from(self, layer: int, entering: torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, hidden] from the input of one layer: layers before it do not run again."""
        base = self.model.base_model
        layers = base.layers
        base.layers = layers[layer:]
        try:
            hidden: torch.Tensor = base(inputs_embeds=entering, use_cache=False).last_hidden_state[0]
        finally:
            base.layers = layers
        return hidden

    @torch.no_grad()
    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 log-probabilities [rows, vocabulary] of the next token from hidden states [rows, hidden]."""
        return torch.log_softmax(self.model.get_output_embeddings()(hidden).float(), -1)

    def backward(self, sample: Sample) -> int:
        """Back-propagate the summed cross-entropy of the sample's targets, layer by layer.

        Held at once: the hidden states between layers (T · hidden each), one layer's activations (layers are
        recomputed on the way back), and the logits of ``LOGIT_ROWS`` tokens. The loss is summed, not averaged,
        so that fp16 gradients do not underflow.

        Returns:
            The number of targets.
        """
        model, tokens = self.model, self._tokens(sample)
        # Reentrant: the first pass builds no graph, so an observer's hooks live only while their layer does.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.train()
        try:
            embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
            positions = torch.arange(tokens.shape[1], device=self.device)[None]
            hidden = model.base_model(
                inputs_embeds=embedded, position_ids=positions, use_cache=False
            ).last_hidden_state
            grad = torch.zeros_like(hidden)
            targets = tokens[0, sample.first_target :]
            for start in range(0, len(targets), LOGIT_ROWS):
                at = slice(sample.first_target - 1 + start, sample.first_target - 1 + start + LOGIT_ROWS)
                part = targets[start : start + LOGIT_ROWS]
                leaf = hidden.detach()[0, at][: len(part)].requires_grad_()
                logits = model.get_output_embeddings()(leaf)
                F.cross_entropy(logits.float(), part, reduction="sum").backward()
                grad[0, at.start : at.start + len(part)] = leaf.grad
            hidden.backward(grad)
        finally:
            model.eval()
            model.gradient_checkpointing_disable()
        return len(targets)


def check_architecture(config: Any) -> None:
    """Refuse what the server would refuse too, before weights are read.

    Raises:
        ValueError: one sentence with the reason.
    """
    from sglang_pmkvq.formats import HEAD_DIMS

    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(f"calibration knows the architectures {', '.join(ARCHITECTURES)}; this model is {kind!r}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, this model has {head_dim}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(f"this model uses a sliding window of {config.sliding_window} tokens, which cannot be served")
