"""From a byte budget to a pool: the limits it stands on and the largest geometry in it. No SGLang, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sglang_pmkvq.formats import (
    GROUP_SIZES,
    HEAD_DIMS,
    LayerGroup,
    PageShape,
    PoolGeometry,
    geometry_for_budget,
    geometry_for_pages,
    hard_reserve_bytes,
)
from sglang_pmkvq.ledger.policy import PolicyConfig
from sglang_pmkvq.serving.config import PmkvqConfigError

# Automatic limits: the 16-bit reserve may cost this share of the pool ...
HARD_RESERVE_SHARE = 0.03
# ... but never fewer requests, and never a smaller chunk, than these.
MIN_RUNNING_REQUESTS = 8
MIN_CHUNK_TOKENS = 256


def page_shape(page_size: int, num_kv_heads: int, head_dim: int, group_size: int | None) -> PageShape:
    """The page shape of a model, with the default group size min(head_dim, 128).

    Raises:
        PmkvqConfigError: head_dim is not supported, or the group size does not divide it.
    """
    if head_dim not in HEAD_DIMS:
        raise PmkvqConfigError(
            f"--kv-quant pmkvq supports head_dim {', '.join(map(str, HEAD_DIMS))}, this model has {head_dim}; "
            "use --kv-quant none"
        )
    group = min(head_dim, 128) if group_size is None else group_size
    if head_dim % group:
        raise PmkvqConfigError(
            f"--pmkvq-group-size {group} does not divide this model's head_dim {head_dim}; use one of "
            f"{', '.join(str(g) for g in GROUP_SIZES if head_dim % g == 0)}"
        )
    return PageShape(page_size, num_kv_heads, head_dim, group)


@dataclass(frozen=True)
class Limits:
    """Bounds on what may be hard-protected at once.

    Attributes:
        running: requests that may run at the same time.
        chunk: tokens of the largest prefill batch.
        hard_pages: R = running · (pages that one request keeps at 16 bits) + ⌈chunk / P⌉.
    """

    running: int
    chunk: int
    hard_pages: int


def hard_pages_per_request(policy: PolicyConfig, page_size: int) -> int:
    """The tail page; with hard protection also the sink pages and every page the window touches."""
    if policy.protect != "hard":
        return 1
    window_pages = math.ceil(policy.window_tokens / page_size) + 1 if policy.window_tokens else 1
    return window_pages + math.ceil(policy.sink_tokens / page_size)


def limits_for(running: int, chunk: int, page_size: int, policy: PolicyConfig) -> Limits:
    per_request = hard_pages_per_request(policy, page_size)
    return Limits(running, chunk, running * per_request + math.ceil(chunk / page_size))


def choose_limits(
    shape: PageShape,
    groups: tuple[LayerGroup, ...],
    budget_bytes: int,
    policy: PolicyConfig,
    running: int,
    chunk: int,
    running_is_default: bool,
    chunk_is_default: bool,
) -> Limits:
    """Lower SGLang's defaults until the 16-bit reserve costs at most 3 % of the budget.

    What the user set (``*_is_default`` False) is honoured. Half of the reserve goes to requests and half to
    the chunk if both may move; never below 8 requests and 256 tokens.
    """
    page = shape.page_size
    per_page = hard_reserve_bytes(shape, groups, 1)
    affordable = int(HARD_RESERVE_SHARE * budget_bytes / per_page) if per_page else 1 << 30
    per_request = hard_pages_per_request(policy, page)
    if running_is_default:
        chunk_pages = math.ceil(chunk / page)
        spare = affordable - (min(chunk_pages, affordable // 2) if chunk_is_default else chunk_pages)
        running = max(min(running, MIN_RUNNING_REQUESTS), min(running, spare // per_request))
    if chunk_is_default:
        spare = affordable - running * per_request
        chunk = max(min(chunk, MIN_CHUNK_TOKENS), min(chunk, spare * page)) // page * page
    return limits_for(running, chunk, page, policy)


def _no_centers(tokens: int) -> int:
    """Bytes of rotary table and centres of a pool of ``tokens`` whose keys have no centre."""
    return 0


def smallest_budget(
    shape: PageShape,
    groups: tuple[LayerGroup, ...],
    limits: Limits,
    tokens: int,
    center_bytes: Callable[[int], int] = _no_centers,
) -> int:
    """Bytes of the smallest pool that holds ``tokens`` logical tokens under ``limits``."""
    pages = math.ceil(tokens / shape.page_size)
    centers = center_bytes(pages * shape.page_size)
    return geometry_for_pages(shape, groups, pages, limits.hard_pages, centers).total_bytes


def choose_geometry(
    shape: PageShape,
    groups: tuple[LayerGroup, ...],
    budget_bytes: int,
    limits: Limits,
    center_bytes: Callable[[int], int] = _no_centers,
) -> PoolGeometry:
    """The largest pool in ``budget_bytes``; it must hold two chunks.

    Args:
        center_bytes: rotary table and centres of a pool of so many tokens, which never falls.

    Raises:
        PmkvqConfigError: the budget is too small; names the smallest pool that works.
    """
    geometry = geometry_for_budget(shape, groups, budget_bytes, limits.hard_pages, center_bytes)
    need = 2 * limits.chunk
    if geometry is None or geometry.num_pages * shape.page_size < need:
        least = smallest_budget(shape, groups, limits, need, center_bytes)
        tails = limits.running + math.ceil(limits.chunk / shape.page_size)
        window = " or --pmkvq-window (--pmkvq-protect hard keeps it at 16 bits)" if limits.hard_pages > tails else ""
        raise PmkvqConfigError(
            f"--pmkvq-pool-bytes: {budget_bytes} bytes hold less than two prefill chunks of {limits.chunk} tokens "
            f"with {limits.running} running requests; the smallest pool that works is {least} bytes "
            f"({least / 2**20:.1f} MiB), or lower --chunked-prefill-size or --max-running-requests{window}"
        )
    return geometry
