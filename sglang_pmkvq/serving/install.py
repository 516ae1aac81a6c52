"""Builds our pool and allocator where SGLang builds its own, and verifies that it took."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_pmkvq.serving import engine, runtime
from sglang_pmkvq.serving.allocator import PmkvqAllocator
from sglang_pmkvq.serving.metrics import MetricsReporter
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.pool_setup import PoolSetup
from sglang_pmkvq.serving.versions import patch_set

if TYPE_CHECKING:
    from sglang_pmkvq.serving.engine import ModelRunner

logger = logging.getLogger(__name__)


def build_runtime(runner: ModelRunner, setup: PoolSetup) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Factories of pool and allocator that SGLang calls in place of its classes."""
    current = runtime.Runtime(setup)

    def make_pool(*args: Any, **kwargs: Any) -> MixedPrecisionTokenPool:
        current.pool = MixedPrecisionTokenPool(setup, *args, **kwargs)
        return current.pool

    def make_allocator(size: int, **kwargs: Any) -> PmkvqAllocator:
        current.allocator = PmkvqAllocator(size, max_requests=runner.req_to_token_pool.size, **kwargs)
        assert current.pool is not None
        current.pool.watch(current.allocator.ledger)
        current.metrics = MetricsReporter(setup, current.allocator.ledger, current.pool)
        current.allocator.on_event = current.metrics.event
        if runtime.metric_labels is not None:
            current.metrics.attach(runtime.metric_labels)
        return current.allocator

    runtime.activate(current)
    return make_pool, make_allocator


def verify_pools(runner: ModelRunner) -> None:
    """Raise unless pool and allocator are ours and every hook is installed; logs what the flags resolved to.

    Raises:
        RuntimeError: SGLang kept a class of its own, or a hook failed to apply (SGLang only logs that).
    """
    current = runtime.current()
    assert current is not None
    pool, allocator = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
    if pool is not current.pool or allocator is not current.allocator:
        raise RuntimeError(
            f"--kv-quant pmkvq: SGLang built {type(pool).__name__} and {type(allocator).__name__} instead of this "
            "plugin's pool and allocator"
        )
    missing = [t.path for t in patch_set().targets if t.path not in engine.HookRegistry._patched]
    if missing:
        raise RuntimeError(f"--kv-quant pmkvq: hooks did not apply: {', '.join(missing)}; see the log above")
    assert current.pool is not None
    assert current.allocator is not None
    commands = current.allocator.ledger.drain()
    current.pool.execute(commands)
    logger.info(current.setup.log_line())


def verify_backend(runner: ModelRunner) -> None:
    """Raise unless attention runs in our backend.

    Raises:
        RuntimeError: SGLang built another one, which could not read the pages.
    """
    from sglang_pmkvq.serving.attention import PmkvqAttnBackend

    if not isinstance(runner.attn_backend, PmkvqAttnBackend):
        raise RuntimeError(
            f"--kv-quant pmkvq: SGLang built {type(runner.attn_backend).__name__} instead of this plugin's attention "
            "backend"
        )
