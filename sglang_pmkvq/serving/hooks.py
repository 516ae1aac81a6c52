"""What the hooks do; where they hang, and why, is in ``patches``.

Hooks are installed in every process that loads the plugin and call the original untouched unless this process
serves with ``--kv-quant pmkvq``.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from sglang_pmkvq.serving import engine, runtime


def create_configurator(original: Callable[..., Any], runner: Any) -> Any:
    configurator = original(runner)
    if getattr(runner.server_args, "kv_quant", "none") != "pmkvq":
        return configurator
    from sglang_pmkvq.serving.config import PmkvqConfigError
    from sglang_pmkvq.serving.configurator import PmkvqPoolConfigurator

    if type(configurator) is not engine.DefaultPoolConfigurator:
        raise PmkvqConfigError(
            f"--kv-quant pmkvq cannot serve {engine.architectures(runner)}: SGLang sizes its pool by "
            f"{type(configurator).__name__}; use --kv-quant none"
        )
    runtime.configurator = PmkvqPoolConfigurator(runner)
    return runtime.configurator


def init_pools(original: Callable[..., Any], self: Any) -> Any:
    configurator, runtime.configurator = runtime.configurator, None
    if configurator is None:
        return original(self)
    setup = configurator.setup
    assert setup is not None, "SGLang sizes its pools before it builds them"
    from sglang_pmkvq.serving.install import build_runtime, verify_pools

    # Our classes stand in SGLang's module only while the pools are built.
    module, names = engine.pool_module(), (engine.POOL_CLASS, engine.ALLOCATOR_CLASS)
    saved = {name: getattr(module, name) for name in names}
    factories = build_runtime(self, setup)
    try:
        for name, factory in zip(names, factories, strict=True):
            setattr(module, name, factory)
        result = original(self)
    finally:
        for name, cls in saved.items():
            setattr(module, name, cls)
    verify_pools(self)
    return result


def verify_backend(result: Any, self: Any) -> None:
    if runtime.current() is not None:
        from sglang_pmkvq.serving.install import verify_backend as verify

        verify(self)


def size_eager_buffers(original: Callable[..., Any], self: Any, model_runner: Any) -> Any:
    current = runtime.current()
    if current is None:
        return original(self, model_runner)
    from sglang_pmkvq.serving.configurator import with_max_tokens

    with with_max_tokens(model_runner, current.setup.eager_buffer_tokens):
        return original(self, model_runner)


def before_forward(self: Any, *args: Any, **kwargs: Any) -> None:
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


def alloc_for_batch(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
    current = runtime.current()
    if current is None or current.allocator is None:
        return original(batch, *args, **kwargs)
    with current.allocator.batch_context(batch):
        return original(batch, *args, **kwargs)


def release(original: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
    current = runtime.current()
    slot = None if current is None or current.allocator is None else engine.request_slot(req)
    if slot is not None:
        assert current is not None and current.allocator is not None
        from sglang_pmkvq.serving.request_bits import attach_request_bits

        attach_request_bits(current.allocator.ledger, req, slot, engine.streams_increments())
        if current.metrics is not None and req.finished():
            current.metrics.on_finish()
        current.allocator.finish(slot)
    return original(req, *args, **kwargs)


def stream_output(original: Callable[..., Any], self: Any, reqs: Any, *args: Any, **kwargs: Any) -> Any:
    if runtime.current() is None:
        return original(self, reqs, *args, **kwargs)
    from sglang_pmkvq.serving.request_bits import has_request_bits

    told = [req for req in reqs if has_request_bits(req)]
    if not told:
        return original(self, reqs, *args, **kwargs)
    others = [req for req in reqs if not has_request_bits(req)]
    if others:
        original(self, others, *args, **kwargs)
    return original(self, told, *args, **kwargs)


def cache_unfinished(original: Callable[..., Any], self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    current = runtime.current()
    if current is None or current.allocator is None:
        return original(self, req, *args, **kwargs)
    with current.allocator.row_rewrite(req):
        return original(self, req, *args, **kwargs)


def fused_set_kv_buffer(original: Callable[..., Any], forward_batch: Any) -> Any:
    return False if runtime.current() is not None else original(forward_batch)


def support_triton(original: Callable[..., Any], backend: str) -> Any:
    if backend == "pmkvq":
        import torch

        return torch.cuda.is_available()
    return original(backend)


def decode_usage(result: list[str], self: Any) -> list[str]:
    current = runtime.current()
    if current is None or current.metrics is None:
        return result
    return [*result, current.metrics.log_part()]


def update_stats(result: Any, self: Any, stats: Any) -> None:
    current = runtime.current()
    if current is not None and current.metrics is not None:
        current.metrics.export()


def metrics_init(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    runtime.metric_labels = dict(self.labels)


def retract(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    current = runtime.current()
    if current is not None and current.metrics is not None:
        current.metrics.on_retract(len(result[0]))
    return result


def worker_info(result: tuple[Any, ...], self: Any) -> tuple[Any, ...]:
    current = runtime.current()
    if current is None:
        return result
    # SGLang admits a request only if its whole pages, one new token and one page more are less than the pool,
    # but refuses only inputs of about the whole pool: those in between would wait for ever.
    page = current.setup.geometry.shape.page_size
    longest = current.setup.tokens - 2 * page
    return (*result[:5], min(result[5], longest + 1), *result[6:])


def internal_state(result: Any, self: Any, recv_req: Any) -> Any:
    current = runtime.current()
    if current is not None:
        result.internal_state["pmkvq"] = {
            **current.setup.summary(),
            **(current.metrics.state() if current.metrics is not None else {}),
        }
        if current.allocator is not None and engine.page_checks_wanted():
            current.allocator.check()
    return result


def validate_request(self: Any, obj: Any, input_ids: Any) -> None:
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
