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
