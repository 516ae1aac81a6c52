"""The door to SGLang: every name, attribute and convention of it that serving uses, and nothing else knows.

What differs between SGLang's versions in *where something hangs* is in ``patches``; what differs in *name or type* is
here; product policy is in neither. A name is looked up when it is first asked for, so that importing this module costs
nothing: the plugin is loaded before SGLang has read its arguments, in every process.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any

# Our name -> where SGLang 0.5.15 has it.
_NAMES: dict[str, str] = {
    # arguments and plugins
    "A": "sglang.srt.arg_groups.arg_utils:A",
    "Arg": "sglang.srt.arg_groups.arg_utils:Arg",
    "ServerArgs": "sglang.srt.server_args:ServerArgs",
    "add_attention_backend_choices": "sglang.srt.server_args:add_attention_backend_choices",
    "Engine": "sglang.srt.entrypoints.engine:Engine",
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    # memory
    "BaseTokenToKVPoolAllocator": "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator",
    "DefaultPoolConfigurator": "sglang.srt.model_executor.pool_configurator:DefaultPoolConfigurator",
    "KVCache": "sglang.srt.mem_cache.memory_pool:KVCache",
    "MemoryPoolConfig": "sglang.srt.model_executor.pool_configurator:MemoryPoolConfig",
    "unwrap_write_loc": "sglang.srt.mem_cache.memory_pool:unwrap_write_loc",
    # attention
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "RadixAttention": "sglang.srt.layers.radix_attention:RadixAttention",
    "register_attention_backend": "sglang.srt.layers.attention.attention_registry:register_attention_backend",
    "RotaryEmbedding": "sglang.srt.layers.rotary_embedding:RotaryEmbedding",
    "MRotaryEmbedding": "sglang.srt.layers.rotary_embedding:MRotaryEmbedding",
    # for annotations
    "ForwardBatch": "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    "ModelRunner": "sglang.srt.model_executor.model_runner:ModelRunner",
    "Req": "sglang.srt.managers.schedule_batch:Req",
    "ScheduleBatch": "sglang.srt.managers.schedule_batch:ScheduleBatch",
}
# The module in whose globals SGLang looks up the classes of pool and allocator.
_POOL_MODULE = "sglang.srt.model_executor.model_runner_kv_cache_mixin"
POOL_CLASS = "MHATokenToKVPool"
ALLOCATOR_CLASS = "PagedTokenToKVPoolAllocator"


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"{__name__} takes no {name!r} from SGLang")
    return pkgutil.resolve_name(_NAMES[name])


def version() -> str:
    """Of the installed SGLang."""
    import sglang

    return str(sglang.__version__)


# -- arguments ---------------------------------------------------------------------------------------------------


def argument_fields(args: Any) -> dict[str, Any]:
    """Default of every server argument, by name."""
    import dataclasses

    return {field.name: field.default for field in dataclasses.fields(args)}


def model_config(args: Any) -> Any:
    """SGLang's configuration of the model that server arguments name."""
    return args.get_model_config()


def resolved(args: Any) -> Any:
    """The same arguments with SGLang's own choices in place of what the user left open."""
    return args


def set_limits(args: Any, running: int, chunk: int) -> None:
    """Make the scheduler, which reads both later, run at most ``running`` requests and prefill ``chunk`` tokens."""
    args.chunked_prefill_size = chunk
    if args.max_running_requests is None:
        args.max_running_requests = running * args.dp_size


def streams_increments() -> bool:
    """Whether the server streams increments (``--incremental-streaming-output``)."""
    from sglang.srt.runtime_context import get_server_args

    return bool(get_server_args().incremental_streaming_output)


def page_checks_wanted() -> bool:
    """Whether SGLang's own page invariants are being checked (SGLANG_CHECK_KV_PAGE_INVARIANTS)."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get())


# -- model and ranks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What sizing needs to know of the model on this rank.

    Attributes:
        layers: attention layers that this rank runs. kv_heads: of this rank, H. head_dim: D.
        dtype: of the model. kv_dtype: of its KV cache, as SGLang resolved it.
        tp_rank, dp_rank: of this scheduler process.
        attention_tp: (rank, size) of the ranks that share KV heads.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Any
    kv_dtype: Any
    tp_rank: int
    dp_rank: int | None
    attention_tp: tuple[int, int]


def architectures(runner: Any) -> Any:
    """Names of the model's architecture, for messages."""
    return runner.model_config.hf_config.architectures


def model_facts(runner: Any) -> ModelFacts:
    """Facts of the model of SGLang's ``ModelRunner``."""
    from sglang.srt.layers.dp_attention import get_attention_tp_rank, get_attention_tp_size

    config, ranks = runner.model_config, (get_attention_tp_rank(), get_attention_tp_size())
    return ModelFacts(
        layers=runner.num_effective_layers,
        kv_heads=config.get_num_kv_heads(ranks[1]),
        head_dim=config.head_dim,
        dtype=runner.dtype,
        kv_dtype=runner.kv_cache_dtype,
        tp_rank=runner.tp_rank,
        dp_rank=runner.dp_rank,
        attention_tp=ranks,
    )


@dataclass(frozen=True)
class KeyFacts:
    """What the keys of a model are made of, on this rank.

    Attributes:
        bias: per layer, the bias of keys ``[H, D]`` before the rotary embedding, or None.
        spread: per layer, ``[H]``, the energy that the weights give what varies from key to key: the sum over channels
            of the variance, for inputs of unit variance before the layer's norm; None where the weights do not say.
        cos, sin: of the model's rotary embedding, ``[positions, rotary_dim / 2]``, or None.
        neox: pairs are channels (j, j + rotary_dim / 2), else they interleave.
        problem: why there is no ``cos``.
    """

    bias: tuple[Any, ...]
    spread: tuple[Any, ...]
    cos: Any
    sin: Any
    neox: bool
    problem: str


def key_facts(runner: Any) -> KeyFacts:
    """Facts of the keys of SGLang's ``ModelRunner``, whose weights are loaded."""
    modules = dict(runner.model.named_modules())
    found = []
    for name, attn in modules.items():
        if isinstance(attn, __getattr__("RadixAttention")):
            parent = name.rpartition(".")[0]
            found.append((attn, modules[parent], modules[parent.rpartition(".")[0]]))
    found.sort(key=lambda one: one[0].layer_id)
    problem, module = _one_rotary([attention for _, attention, _ in found], runner.model_config.context_len)
    cos, sin = (None, None) if module is None else _cos_sin(module, runner.model_config.context_len)
    return KeyFacts(
        bias=tuple(_key_bias(attn, attention) for attn, attention, _ in found),
        spread=tuple(_key_spread(*one) for one in found),
        cos=cos,
        sin=sin,
        neox=bool(getattr(module, "is_neox_style", True)),
        problem=problem,
    )


def _key_rows(attn: Any) -> slice:
    """Rows of keys in the projection of queries, keys and values."""
    queries = attn.tp_q_head_num * attn.qk_head_dim
    return slice(queries, queries + attn.tp_k_head_num * attn.qk_head_dim)


def _projected(attn: Any, attention: Any, name: str) -> Any:
    """The keys' part of a parameter of the projection, fp32 ``[H, D, ...]``; None if there is none that can be read."""
    projection = getattr(attention, "qkv_proj", None)
    tensor = getattr(projection, name, None)
    rows, values = _key_rows(attn), attn.tp_v_head_num * attn.v_head_dim
    # Quantized weights have other shapes or dtypes; on some CPUs SGLang packs them.
    packed = name == "weight" and getattr(projection, "use_intel_amx_backend", False)
    if tensor is None or packed or not tensor.is_floating_point() or tensor.element_size() < 2:
        return None
    if tensor.shape[0] != rows.stop + values:
        return None
    return tensor.detach()[rows].float().cpu().unflatten(0, (attn.tp_k_head_num, attn.qk_head_dim))


def _key_bias(attn: Any, attention: Any) -> Any:
    """Bias of keys as it is stored, ``[H, D]``; None if there is none or a norm comes after it."""
    names = [name.lower() for name, _ in attention.named_children()]
    if any("norm" in name and name.startswith(("k_", "key", "qk_")) for name in names):
        return None
    bias = _projected(attn, attention, "bias")
    return bias if bias is not None and bool(bias.any()) else None


def _key_spread(attn: Any, attention: Any, layer: Any) -> Any:
    """``KeyFacts.spread`` of a layer: Σ (W·g)² over a head's rows and all inputs, g the weight of the layer's norm."""
    weight, norm = _projected(attn, attention, "weight"), getattr(layer, "input_layernorm", None)
    gain = getattr(norm, "weight", None)
    if weight is None or gain is None or weight.dim() != 3 or gain.shape != weight.shape[2:]:
        return None
    gain = gain.detach().float().cpu()
    if "Gemma" in type(norm).__name__:
        gain = 1.0 + gain
    return (weight * gain).square().sum((1, 2))


def _one_rotary(attentions: list[Any], context: int) -> tuple[str, Any]:
    """(why there is none, the rotary embedding that all layers share)."""
    rotary = __getattr__("RotaryEmbedding")
    first = None
    for attention in attentions:
        module = getattr(attention, "rotary_emb", None)
        if module is None:
            return "no rotary embedding", None
        if isinstance(module, __getattr__("MRotaryEmbedding")):
            return "its rotary embedding has positions along several axes (mrope)", None
        kind = type(module)
        plain = isinstance(module, rotary) and kind.forward_native is rotary.forward_native
        if not plain or len(getattr(module, "scaling_factors", "1")) > 1:
            return f"its rotary embedding {kind.__name__} has no single table of cosines and sines", None
        module._ensure_cos_sin_cache_length(context - 1)
        if first is None:
            first = module
        if module is not first and not _same_rotation(module, first):
            return "its layers have different rotary embeddings", None
    return ("", first) if first is not None else ("no attention layer", None)


def _same_rotation(a: Any, b: Any) -> bool:
    if (a.is_neox_style, a.rotary_dim, a.head_size) != (b.is_neox_style, b.rotary_dim, b.head_size):
        return False
    return a.cos_sin_cache.shape == b.cos_sin_cache.shape and bool((a.cos_sin_cache == b.cos_sin_cache).all())


def _cos_sin(module: Any, context: int) -> Any:
    """Cosines and sines of positions 0 .. context − 1, on the host."""
    return module.cos_sin_cache[:context].detach().cpu().chunk(2, dim=-1)


def query_heads(runner: Any) -> int:
    """Query heads of this rank, Hq."""
    return int(runner.model_config.num_attention_heads // runner.tp_size)


def pool_module() -> Any:
    """The module whose globals ``POOL_CLASS`` and ``ALLOCATOR_CLASS`` SGLang builds its pools from."""
    return pkgutil.resolve_name(_POOL_MODULE)


# -- requests and the radix tree ---------------------------------------------------------------------------------


def request_slot(req: Any) -> int | None:
    """Row of a request in SGLang's request table, None while it has none."""
    slot: int | None = req.req_pool_idx
    return slot


def prefix_slots(req: Any) -> Any:
    """Token slots of a request's prefix, in sequence order: integer tensor."""
    return req.prefix_indices


def tree_of(batch: Any) -> Any:
    """The radix tree that a batch's prefixes live in."""
    return batch.tree_cache


def evict(tree: Any, tokens: int) -> None:
    """Let the radix tree free about ``tokens`` cached tokens in its own order; nothing if it caches nothing."""
    if tree is not None and not tree.is_chunk_cache():
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        tree.evict(EvictParams(num_tokens=tokens))
