"""From SGLang's memory budget to a pool: the configurator that answers "how many tokens"."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.dp_attention import get_attention_tp_rank, get_attention_tp_size
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator, MemoryPoolConfig

from sglang_pmkvq.calibration import (
    PLAIN_TWO_BIT_KEYS,
    group_key_clips,
    group_key_scales,
    layer_finals,
    load_for,
    normal_key_clips,
    plain_two_bit_keys,
    rank_heads,
)
from sglang_pmkvq.config import (
    PmkvqConfigError,
    Protection,
    choose_geometry,
    choose_limits,
    page_shape,
    parse_size,
)
from sglang_pmkvq.formats import groups_from_finals
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.pool import PoolSetup
from sglang_pmkvq.refusals import MODEL_REFUSALS, check_model_facts
from sglang_pmkvq.timeline import rank_path

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# What SGLang assumes where neither the user nor its own defaults bound the requests.
STOCK_MAX_RUNNING = 2048


class PmkvqPoolConfigurator(DefaultPoolConfigurator):
    """Logical capacity of a mixed-precision pool within SGLang's budget, and the limits it stands on.

    Raises:
        PmkvqConfigError: the model or the budget cannot be served; names the flag and the way out.
    """

    def __init__(self, runner: ModelRunner) -> None:
        _check_model(runner)
        super().__init__(runner)
        self._runner = runner
        self._args = runner.server_args
        args = self._args
        calibration = load_for(args)
        self._shape = page_shape(
            args.page_size,
            runner.model_config.get_num_kv_heads(get_attention_tp_size()),
            runner.model_config.head_dim,
            args.pmkvq_group_size if calibration is None else calibration.group_size,
        )
        self._groups = groups_from_finals(layer_finals(args, runner.num_effective_layers, calibration))
        self._calibration = None if calibration is None else calibration.summary()
        self._key_scales: tuple[torch.Tensor | None, ...] | None = None
        self._key_clips: tuple[torch.Tensor | None, ...] | None = None
        self._hadamard = (args.pmkvq_key_transform if calibration is None else calibration.transform) == "hadamard"
        if calibration is not None:
            heads = rank_heads(calibration.num_kv_heads, get_attention_tp_size(), get_attention_tp_rank())
            self._key_scales = group_key_scales(calibration, self._groups, heads)
            self._key_clips = group_key_clips(calibration, self._groups, heads)
        elif self._hadamard:
            self._key_clips = normal_key_clips(self._groups, self._shape)
        elif plain_two_bit_keys(args, self._groups):
            logger.warning("pmkvq: %s", PLAIN_TWO_BIT_KEYS)
        self._protection = Protection(args.pmkvq_window, args.pmkvq_sink_tokens, args.pmkvq_protect == "hard")
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

    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> MemoryPoolConfig:
        """``--max-total-tokens T`` bounds the bytes: what T tokens take at 16 bits."""
        return self._size(min(self._budget, max_total_num_tokens * self._cell_size))

    def finalize_with_max_running_requests(self, config: MemoryPoolConfig) -> MemoryPoolConfig:
        assert self.setup is not None
        config.max_running_requests = min(config.max_running_requests, self.setup.limits.running)
        return config

    def _size(self, budget: int) -> MemoryPoolConfig:
        args = self._args
        running_is_default = bool(args.pmkvq_default_running)
        running = (
            STOCK_MAX_RUNNING
            if running_is_default or args.max_running_requests is None
            else args.max_running_requests // args.dp_size
        )
        limits = choose_limits(
            self._shape,
            self._groups,
            budget,
            self._protection,
            running,
            args.chunked_prefill_size,
            running_is_default,
            bool(args.pmkvq_default_chunk),
        )
        geometry = choose_geometry(self._shape, self._groups, budget, limits)
        self.setup = PoolSetup(
            geometry=geometry,
            policy=PolicyConfig(
                policy=args.pmkvq_policy,
                window_tokens=args.pmkvq_window,
                sink_tokens=args.pmkvq_sink_tokens,
                protect=args.pmkvq_protect,
                min_active_bits=args.pmkvq_min_active_bits,
            ),
            limits=limits,
            budget_bytes=budget,
            stock_tokens=budget // self._cell_size // args.page_size * args.page_size,
            timeline=rank_path(args.pmkvq_timeline, self._runner.tp_rank, self._runner.dp_rank),
            key_scales=self._key_scales,
            key_clips=self._key_clips,
            hadamard=self._hadamard,
            calibration=self._calibration,
        )
        # The scheduler reads both after the pool is built, so what the reserve covers is what it may use.
        args.chunked_prefill_size = limits.chunk
        if args.max_running_requests is None:
            args.max_running_requests = limits.running * args.dp_size
        return MemoryPoolConfig(max_total_num_tokens=self.setup.tokens)


def _check_model(runner: ModelRunner) -> None:
    """Refuse model facts that the pool or the kernels cannot serve, before any memory is taken."""
    config = runner.model_config
    check_model_facts(runner, MODEL_REFUSALS, config.hf_config.architectures)
    if runner.kv_cache_dtype not in (torch.bfloat16, torch.float16):
        raise PmkvqConfigError(
            f"--kv-quant pmkvq keeps pages in the model's 16-bit dtype, but the KV cache dtype resolved to "
            f"{runner.kv_cache_dtype}; pass --dtype bfloat16 and --kv-cache-dtype auto"
        )
    if runner.kv_cache_dtype != runner.dtype:
        raise PmkvqConfigError(
            f"--kv-cache-dtype resolved to {runner.kv_cache_dtype}, the model computes in {runner.dtype}; "
            "use --kv-cache-dtype auto"
        )


def eager_buffer_tokens(setup: PoolSetup) -> int:
    """Tokens that eager buffers must hold: what stock would have sized them for, or one full batch."""
    return max(setup.stock_tokens, setup.limits.chunk + setup.limits.running)


@contextmanager
def with_max_tokens(runner: ModelRunner, tokens: int) -> Iterator[None]:
    """Inside, ``runner.max_total_num_tokens`` reads at most ``tokens``."""
    saved = runner.max_total_num_tokens
    runner.max_total_num_tokens = min(saved, tokens)
    try:
        yield
    finally:
        runner.max_total_num_tokens = saved
