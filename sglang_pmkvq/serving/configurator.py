"""SGLang's question "how many tokens", answered from the byte budget of mixed-precision pages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sglang_pmkvq.serving import engine
from sglang_pmkvq.serving.config import PmkvqConfigError, parse_size
from sglang_pmkvq.serving.configuration import read_configuration
from sglang_pmkvq.serving.engine import DefaultPoolConfigurator, MemoryPoolConfig, ModelFacts
from sglang_pmkvq.serving.model_keys import model_keys
from sglang_pmkvq.serving.pool_setup import PoolSetup
from sglang_pmkvq.serving.refusals import MODEL_REFUSALS, check_model_facts
from sglang_pmkvq.serving.sizing import choose_geometry, choose_limits
from sglang_pmkvq.timeline import rank_path

if TYPE_CHECKING:
    from sglang_pmkvq.serving.engine import ModelRunner

logger = logging.getLogger(__name__)

# What SGLang assumes where neither the user nor its own defaults bound the requests.
STOCK_MAX_RUNNING = 2048
# Means of keys help where keys are coarse, and their table is as long as the longest request: in a small pool it would
# cost more tokens than it is worth. A key bias is taken off whatever it costs.
MEANS_SHARE = 0.03


class PmkvqPoolConfigurator(DefaultPoolConfigurator):
    """Logical capacity of a mixed-precision pool within SGLang's budget, and the limits it stands on.

    Raises:
        PmkvqConfigError: the model or the budget cannot be served; names the flag and the way out.
    """

    def __init__(self, runner: ModelRunner) -> None:
        # First: a model that is refused may lack what the facts are read from.
        check_model_facts(runner, MODEL_REFUSALS, engine.architectures(runner))
        facts = engine.model_facts(runner)
        _check_dtypes(facts)
        super().__init__(runner)
        self._args = runner.server_args
        args = engine.resolved(self._args)
        keys = model_keys(engine.key_facts(runner), facts.head_dim)
        self._configuration = read_configuration(args, facts, keys)
        for warning in self._configuration.warnings:
            logger.warning("pmkvq: %s", warning)
        self._timeline = rank_path(args.pmkvq_timeline, facts.tp_rank, facts.dp_rank)
        self._budget = 0
        self.setup: PoolSetup | None = None

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        budget = available_bytes
        if self._args.pmkvq_pool_bytes is not None:
            budget = parse_size(str(self._args.pmkvq_pool_bytes))
            if budget > available_bytes:
                raise PmkvqConfigError(
                    f"--pmkvq-pool-bytes {self._args.pmkvq_pool_bytes}: only {available_bytes} bytes "
                    f"({available_bytes / 2**30:.2f} GiB) are free for the KV cache; ask for less or raise "
                    "--mem-fraction-static"
                )
        self._budget = budget
        return self._size(budget)

    def calculate_pool_sizes_from_max_tokens(self, max_total_num_tokens: int, page_size: int) -> MemoryPoolConfig:
        """``--max-total-tokens T`` bounds the bytes: what T tokens take at 16 bits."""
        return self._size(min(self._budget, max_total_num_tokens * self._cell_size))

    def finalize_with_max_running_requests(self, config: MemoryPoolConfig) -> MemoryPoolConfig:
        assert self.setup is not None
        config.max_running_requests = min(config.max_running_requests, self.setup.limits.running)
        return config

    def _size(self, budget: int) -> MemoryPoolConfig:
        args, configuration = engine.resolved(self._args), self._configuration
        running_is_default = bool(args.pmkvq_default_running)
        running = (
            STOCK_MAX_RUNNING
            if running_is_default or args.max_running_requests is None
            else args.max_running_requests // args.dp_size
        )
        limits = choose_limits(
            configuration.shape,
            configuration.groups,
            budget,
            configuration.policy,
            running,
            args.chunked_prefill_size,
            running_is_default,
            bool(args.pmkvq_default_chunk),
        )
        page = configuration.shape.page_size
        if configuration.measures_means:
            plain = configuration.without_means("means of keys would take more than 3 % of the pool")
            geometry = choose_geometry(plain.shape, plain.groups, budget, limits, plain.center_bytes)
            if configuration.center_bytes(geometry.num_pages * page) > MEANS_SHARE * budget:
                configuration = plain
        geometry = choose_geometry(
            configuration.shape, configuration.groups, budget, limits, configuration.center_bytes
        )
        self.setup = PoolSetup(
            configuration=configuration.for_tokens(geometry.num_pages * page),
            geometry=geometry,
            limits=limits,
            budget_bytes=budget,
            stock_tokens=budget // self._cell_size // page * page,
            timeline=self._timeline,
        )
        # The scheduler reads both after the pool is built, so what the reserve covers is what it may use.
        engine.set_limits(self._args, limits.running, limits.chunk)
        return MemoryPoolConfig(max_total_num_tokens=self.setup.tokens)


def _check_dtypes(facts: ModelFacts) -> None:
    """Refuse dtypes that the pool or the kernels cannot serve, before any memory is taken."""
    if facts.kv_dtype not in (torch.bfloat16, torch.float16):
        raise PmkvqConfigError(
            f"--kv-quant pmkvq keeps pages in the model's 16-bit dtype, but the KV cache dtype resolved to "
            f"{facts.kv_dtype}; pass --dtype bfloat16 and --kv-cache-dtype auto"
        )
    if facts.kv_dtype != facts.dtype:
        raise PmkvqConfigError(
            f"--kv-cache-dtype resolved to {facts.kv_dtype}, the model computes in {facts.dtype}; "
            "use --kv-cache-dtype auto"
        )


@contextmanager
def with_max_tokens(runner: ModelRunner, tokens: int) -> Iterator[None]:
    """Inside, ``runner.max_total_num_tokens`` reads at most ``tokens``."""
    saved = runner.max_total_num_tokens
    runner.max_total_num_tokens = min(saved, tokens)
    try:
        yield
    finally:
        runner.max_total_num_tokens = saved
