"""Every place where SGLang 0.5.15 is changed, and why. Nothing else changes SGLang.

Hooks are installed in every process that loads the plugin and call the original untouched unless this process
serves with ``--kv-quant pmkvq``.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from sglang_pmkvq import runtime
from sglang_pmkvq.patches.base import Target

SUPPORTED = ("0.5.15.post1",)


def _create_configurator(original: Callable[..., Any], mr: Any) -> Any:
    configurator = original(mr)
    if getattr(mr.server_args, "kv_quant", "none") != "pmkvq":
        return configurator
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    from sglang_pmkvq.config import PmkvqConfigError
    from sglang_pmkvq.sizing import PmkvqPoolConfigurator

    if type(configurator) is not DefaultPoolConfigurator:
        raise PmkvqConfigError(
            f"--kv-quant pmkvq cannot serve {mr.model_config.hf_config.architectures}: SGLang sizes its pool by "
            f"{type(configurator).__name__}; use --kv-quant none"
        )
    ours = PmkvqPoolConfigurator(mr)
    mr.pmkvq_configurator = ours
    return ours


def _init_pools(original: Callable[..., Any], self: Any) -> Any:
    configurator = getattr(self, "pmkvq_configurator", None)
    if configurator is None:
        return original(self)
    from sglang.srt.model_executor import model_runner_kv_cache_mixin as mixin

    from sglang_pmkvq.install import build_runtime

    # SGLang looks its classes up in this module's globals; ours stand there only while the pools are built.
    names = ("MHATokenToKVPool", "PagedTokenToKVPoolAllocator")
    saved = {name: getattr(mixin, name) for name in names}
    factories = build_runtime(self, configurator.setup)
    try:
        for name, factory in zip(names, factories, strict=True):
            setattr(mixin, name, factory)
        result = original(self)
    finally:
        for name, cls in saved.items():
            setattr(mixin, name, cls)
    from sglang_pmkvq.install import verify_pools

    verify_pools(self)
    return result


def _verify_backend(result: Any, self: Any) -> None:
    if runtime.current() is not None:
        from sglang_pmkvq.install import verify_backend

        verify_backend(self)


def _eager_runner_init(original: Callable[..., Any], self: Any, model_runner: Any) -> Any:
    current = runtime.current()
    if current is None:
        return original(self, model_runner)
    from sglang_pmkvq.sizing import eager_buffer_tokens, with_max_tokens

    with with_max_tokens(model_runner, eager_buffer_tokens(current.setup)):
        return original(self, model_runner)


def _before_forward(self: Any, *args: Any, **kwargs: Any) -> None:
    current = runtime.current()
    if current is None or current.allocator is None:
        return
    assert current.pool is not None
    assert current.metrics is not None
    start = perf_counter()
    commands = current.allocator.ledger.drain()
    if commands:
        current.pool.execute(commands)
        if commands.waves:
            current.metrics.on_shrinks(current.allocator.alloc_seconds + perf_counter() - start)
    current.allocator.alloc_seconds = 0.0
    current.metrics.on_forward()


def _alloc_for_batch(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
    current = runtime.current()
    if current is None or current.allocator is None:
        return original(batch, *args, **kwargs)
    with current.allocator.batch_context(batch):
        return original(batch, *args, **kwargs)


def _release(original: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
    current = runtime.current()
    if current is not None and current.allocator is not None and req.req_pool_idx is not None:
        from sglang.srt.runtime_context import get_server_args

        from sglang_pmkvq.metrics import attach_request_bits

        attach_request_bits(
            current.allocator.ledger, req, get_server_args().incremental_streaming_output
        )
        if current.metrics is not None and req.finished():
            current.metrics.on_finish()
        current.allocator.finish(req.req_pool_idx)
    return original(req, *args, **kwargs)


def _stream_output(original: Callable[..., Any], self: Any, reqs: Any, *args: Any, **kwargs: Any) -> Any:
    if runtime.current() is None:
        return original(self, reqs, *args, **kwargs)
    from sglang_pmkvq.metrics import has_request_bits

    told = [req for req in reqs if has_request_bits(req)]
    if not told:
        return original(self, reqs, *args, **kwargs)
    others = [req for req in reqs if not has_request_bits(req)]
    if others:
        original(self, others, *args, **kwargs)
    return original(self, told, *args, **kwargs)


def _cache_unfinished(original: Callable[..., Any], self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    current = runtime.current()
    if current is None or current.allocator is None:
        return original(self, req, *args, **kwargs)
    with current.allocator.row_rewrite(req):
        return original(self, req, *args, **kwargs)


def _fused_set_kv_buffer(original: Callable[..., Any], forward_batch: Any) -> Any:
    return False if runtime.current() is not None else original(forward_batch)


def _support_triton(original: Callable[..., Any], backend: str) -> Any:
    if backend == "pmkvq":
        import torch

        return torch.cuda.is_available()
    return original(backend)


def _decode_usage(result: list[str], self: Any) -> list[str]:
    current = runtime.current()
    if current is None or current.metrics is None:
        return result
    return [*result, current.metrics.log_part()]


def _update_stats(result: Any, self: Any, stats: Any) -> None:
    current = runtime.current()
    if current is not None and current.metrics is not None:
        current.metrics.export()


def _metrics_init(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    runtime.metric_labels = dict(self.labels)


def _retract(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    current = runtime.current()
    if current is not None and current.metrics is not None:
        current.metrics.on_retract(len(result[0]))
    return result


def _worker_info(result: tuple[Any, ...], self: Any) -> tuple[Any, ...]:
    current = runtime.current()
    if current is None:
        return result
    # SGLang admits a request only if its whole pages, one new token and one page more are less than the pool,
    # but refuses only inputs of about the whole pool: those in between would wait for ever.
    page = current.setup.geometry.shape.page_size
    longest = current.setup.tokens - 2 * page
    return (*result[:5], min(result[5], longest + 1), *result[6:])


def _internal_state(result: Any, self: Any, recv_req: Any) -> Any:
    from sglang.srt.environ import envs

    current = runtime.current()
    if current is not None:
        result.internal_state["pmkvq"] = {
            **current.setup.summary(),
            **(current.metrics.state() if current.metrics is not None else {}),
        }
        if current.allocator is not None and envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get():
            current.allocator.check()
    return result


def _validate_request(self: Any, obj: Any, input_ids: Any) -> None:
    """Refuse what ends SGLang's scheduler: an empty batch in its forward, a key that its radix tree cannot hash.

    Raises:
        ValueError: the prompt has no token, or ``extra_key`` is not one string.
    """
    if getattr(self.server_args, "kv_quant", "none") != "pmkvq":
        return
    if input_ids is not None and len(input_ids) == 0 and getattr(obj, "input_embeds", None) is None:
        raise ValueError("the prompt has no token; at least one is needed")
    key = getattr(obj, "extra_key", None)
    if not isinstance(key, str | None):
        raise ValueError(f"extra_key of a request must be one string, got {key!r}")


def targets() -> tuple[Target, ...]:
    """The hooks, in one list. A function because the server-arguments class imports SGLang."""
    from sglang_pmkvq.server_args import PmkvqServerArgs

    common = "sglang.srt.mem_cache.common"
    mixin = "sglang.srt.model_executor.model_runner_kv_cache_mixin.ModelRunnerKVCacheMixin"
    pool_stats = "sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats"
    return (
        Target(
            "sglang.srt.server_args.ServerArgs",
            "replace",
            PmkvqServerArgs,
            (),
            "adds --kv-quant and --pmkvq-* flags",
        ),
        Target(
            "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
            "around",
            _create_configurator,
            ("mr",),
            "logical capacity comes from the byte budget of mixed-precision pages",
        ),
        Target(f"{mixin}._init_pools", "around", _init_pools, ("self",), "builds our pool and allocator"),
        Target(
            "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
            "after",
            _verify_backend,
            ("self",),
            "a server whose attention cannot read the pages must not start",
        ),
        Target(
            "sglang.srt.model_executor.runner.eager_runner.EagerRunner.__init__",
            "around",
            _eager_runner_init,
            ("self", "model_runner"),
            "its buffers grow with the token count; ours is several times larger at equal bytes",
        ),
        Target(
            "sglang.srt.model_executor.model_runner.ModelRunner.forward",
            "before",
            _before_forward,
            (
                "self",
                "forward_batch",
                "skip_attn_backend_init",
                "pp_proxy_tensors",
                "reinit_attn_backend",
                "split_forward_count",
            ),
            "executes shrinks and table updates on the forward stream, ahead of the forward that needs them",
        ),
        Target(
            f"{common}.alloc_for_extend",
            "around",
            _alloc_for_batch,
            ("batch",),
            "tells the allocator whose pages",
        ),
        Target(
            f"{common}.alloc_for_decode",
            "around",
            _alloc_for_batch,
            ("batch", "token_per_req"),
            "tells the allocator whose pages",
        ),
        Target(
            f"{common}.release_kv_cache",
            "around",
            _release,
            ("req", "tree_cache", "is_insert"),
            "a request that ends no longer protects its pages",
        ),
        Target(
            "sglang.srt.mem_cache.radix_cache.RadixCache.cache_unfinished_req",
            "around",
            _cache_unfinished,
            ("self", "req", "chunked"),
            "the tree may replace pages of a running request by its own copies",
        ),
        Target(
            "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
            "around",
            _stream_output,
            ("self", "reqs", "return_logprob", "skip_req"),
            "requests that asked for their bits travel apart: in one message SGLang pads the others' meta_info",
        ),
        Target(
            "sglang.srt.models.utils.enable_fused_set_kv_buffer",
            "around",
            _fused_set_kv_buffer,
            ("forward_batch",),
            "fused writers address 16-bit buffers by token slot",
        ),
        Target(
            "sglang.srt.utils.common.support_triton",
            "around",
            _support_triton,
            ("backend",),
            "SGLang would launch Triton kernels on the CPU for a backend name it does not know",
        ),
        Target(
            f"{pool_stats}.get_decode_usage_msg_parts",
            "after",
            _decode_usage,
            ("self",),
            "pages per tier in the periodic decode log",
        ),
        Target(
            f"{pool_stats}.update_scheduler_stats",
            "after",
            _update_stats,
            ("self", "stats"),
            "Prometheus gauges follow SGLang's own metrics interval",
        ),
        Target(
            "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.__init__",
            "after",
            _metrics_init,
            (
                "self",
                "labels",
                "enable_lora",
                "enable_hierarchical_cache",
                "enable_streaming_session",
                "server_args",
            ),
            "our metrics carry SGLang's labels and appear on its /metrics",
        ),
        Target(
            "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
            "around",
            _retract,
            ("self", "server_args"),
            "retractions are events of the timeline",
        ),
        Target(
            "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info",
            "after",
            _worker_info,
            ("self",),
            "the longest input that SGLang accepts is one that it can ever admit; others are refused with that number",
        ),
        Target(
            "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
            "before",
            _validate_request,
            ("self", "obj", "input_ids"),
            "two requests that end stock's scheduler are refused: without a token, and with a key that is no string",
        ),
        Target(
            "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
            "after",
            _internal_state,
            ("self", "recv_req"),
            "/server_info shows what the flags resolved to",
        ),
    )
