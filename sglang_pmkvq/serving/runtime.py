"""What is alive in this process: set once by the scheduler process that serves with ``--kv-quant pmkvq``.

Hooks are installed in every process that loads the plugin; they do nothing while ``current()`` is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_pmkvq.serving.allocator import PmkvqAllocator
    from sglang_pmkvq.serving.configurator import PmkvqPoolConfigurator
    from sglang_pmkvq.serving.metrics import MetricsReporter
    from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
    from sglang_pmkvq.serving.pool_setup import PoolSetup


@dataclass
class Runtime:
    """Pool, allocator and metrics of the scheduler in this process; filled in the order of start-up."""

    setup: PoolSetup
    pool: MixedPrecisionTokenPool | None = None
    allocator: PmkvqAllocator | None = None
    metrics: MetricsReporter | None = None


_current: Runtime | None = None
# Who answered how many tokens fit, from then until the pools are built.
configurator: PmkvqPoolConfigurator | None = None
# Labels of SGLang's own metrics; its collector is made before the pools are.
metric_labels: dict[str, str] | None = None


def current() -> Runtime | None:
    return _current


def activate(runtime: Runtime) -> None:
    global _current
    _current = runtime
