"""Small models with random weights, made where a test needs a shape that the bundled model does not have."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")


def make_model(
    path: Path,
    architecture: str = "llama",
    *,
    head_dim: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    hidden: int = 128,
    vocab: int = 512,
    context: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    key_bias: float = 0.0,
) -> Path:
    """Write a random-weight model (config and safetensors, no tokenizer) and return its folder.

    Args:
        key_bias: added to one rotary pair of each KV head of the key bias, where the architecture has one; real
            models of the Qwen2 family have up to 360 there.
    """
    torch.manual_seed(seed)
    # Qwen2's configuration derives head_dim from the hidden size.
    if architecture == "qwen2":
        hidden = heads * head_dim
    config = AutoConfig.for_model(
        architecture,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    if architecture == "mistral":
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than usual, so that attention is peaked and wrong keys change the output.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            if key_bias and name.endswith("k_proj.bias"):
                # A pair that turns slowly, as in those models: positions are not told by it.
                pair = head_dim // 2 - 4
                parameter.view(kv_heads, head_dim)[:, [pair, pair + head_dim // 2]] += key_bias
    model.save_pretrained(path)
    return path
