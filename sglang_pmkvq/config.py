"""What the ``--pmkvq-*`` flags mean: parsing, defaults, limits, and what is refused. No SGLang, no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from sglang_pmkvq.formats import (
    GROUP_SIZES,
    HEAD_DIMS,
    TIERS,
    LayerGroup,
    PageShape,
    PoolGeometry,
    geometry_for_budget,
    geometry_for_pages,
    hard_reserve_bytes,
)
from sglang_pmkvq.timeline import why_not_writable

POLICIES = ("age", "uniform", "static")
PROTECTIONS = ("soft", "hard")
ACTIVE_BITS = (16, 8, 4, 2)
KEY_TRANSFORMS = (None, "none", "hadamard")
DEFAULT_WINDOW = 128
DEFAULT_SINK_TOKENS = 1

# Automatic limits: the 16-bit reserve may cost this share of the pool ...
HARD_RESERVE_SHARE = 0.03
# ... but never fewer requests, and never a smaller chunk, than these.
MIN_RUNNING_REQUESTS = 8
MIN_CHUNK_TOKENS = 256

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_UNITS = {
    "b": 1,
    **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
}


class PmkvqConfigError(ValueError):
    """A flag cannot be honoured; the message names the flag, the value and what is allowed."""


def parse_size(text: str) -> int:
    """Bytes of ``512MiB``, ``1.5GiB``, ``200MB`` or a plain number of bytes.

    Raises:
        PmkvqConfigError: not a size, or not positive.
    """
    match = _SIZE.fullmatch(text.strip())
    # A float: digits without end are infinity, which no integer is.
    size = float(match[1]) * _UNITS[(match[2] or "B").lower()] if match else 0.0
    if not 1 <= size < 1 << 62:
        raise PmkvqConfigError(
            f"--pmkvq-pool-bytes {text}: expected a positive size such as 512MiB, 8GiB or 1000000000"
        )
    return int(size)


def _parse_pair(text: str, whole: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:k(\d{1,9})v(\d{1,9})|(\d{1,9}))", text.strip().lower())
    pair = (0, 0)
    if match:
        pair = (int(match[1] or match[3]), int(match[2] or match[3]))
    if pair[0] not in TIERS or pair[1] not in TIERS:
        raise PmkvqConfigError(
            f"--pmkvq-final-bits {whole}: {text!r} is not a width; expected one of 16, 8, 4, 2, or a pair such as k4v2"
        )
    return pair


def parse_final_bits(text: str, num_layers: int) -> list[tuple[int, int]]:
    """(K final, V final) of each layer from ``4``, ``k4v2`` or ``0-3:8,4-7:k4v2``.

    Raises:
        PmkvqConfigError: a width is unknown, a range is malformed or outside the model, or a layer is
            named twice or not at all.
    """
    if ":" not in text:
        return [_parse_pair(text, text)] * num_layers
    finals: list[tuple[int, int] | None] = [None] * num_layers
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*:(.*)", part)
        if not match:
            raise PmkvqConfigError(
                f"--pmkvq-final-bits {text}: {part!r} is not LAYERS:WIDTH; expected for example 0-3:8,4-7:k4v2"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= num_layers:
            raise PmkvqConfigError(
                f"--pmkvq-final-bits {text}: layers {first}-{last} are outside this model's 0-{num_layers - 1}"
            )
        pair = _parse_pair(match[3], text)
        for layer in range(first, last + 1):
            if finals[layer] is not None:
                raise PmkvqConfigError(f"--pmkvq-final-bits {text}: layer {layer} is named twice")
            finals[layer] = pair
    missing = [str(i) for i, pair in enumerate(finals) if pair is None]
    if missing:
        raise PmkvqConfigError(
            f"--pmkvq-final-bits {text}: no width for layers {', '.join(missing)}; name every layer of "
            f"0-{num_layers - 1}"
        )
    return [pair for pair in finals if pair is not None]


def check_flags(args: Any) -> None:
    """Check the values of our own flags, without knowing the model.

    Raises:
        PmkvqConfigError: a value is out of range.
    """
    if args.pmkvq_pool_bytes is not None:
        parse_size(str(args.pmkvq_pool_bytes))
    for flag, value in (("window", args.pmkvq_window), ("sink-tokens", args.pmkvq_sink_tokens)):
        if value < 0:
            raise PmkvqConfigError(f"--pmkvq-{flag} {value}: expected 0 or more tokens")
    for flag, value, allowed in (
        ("policy", args.pmkvq_policy, POLICIES),
        ("protect", args.pmkvq_protect, PROTECTIONS),
        ("min-active-bits", args.pmkvq_min_active_bits, ACTIVE_BITS),
        ("key-transform", args.pmkvq_key_transform, KEY_TRANSFORMS),
    ):
        if value not in allowed:
            expected = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise PmkvqConfigError(f"--pmkvq-{flag} {value}: expected one of {expected}")
    if args.pmkvq_timeline is not None:
        problem = why_not_writable(args.pmkvq_timeline)
        if problem:
            raise PmkvqConfigError(
                f"--pmkvq-timeline {args.pmkvq_timeline}: {problem}; expected a file of yours in a folder that exists"
            )
    if args.pmkvq_group_size is not None and args.pmkvq_group_size not in GROUP_SIZES:
        raise PmkvqConfigError(
            f"--pmkvq-group-size {args.pmkvq_group_size}: expected one of {', '.join(map(str, GROUP_SIZES))}"
        )
    if args.pmkvq_final_bits is not None and ":" not in args.pmkvq_final_bits:
        _parse_pair(args.pmkvq_final_bits, args.pmkvq_final_bits)


def check_context(args: Any, context: int, num_layers: int) -> None:
    """Check the values of our own flags against the model, before any memory is taken.

    Args:
        context: tokens that a request may have at most.

    Raises:
        PmkvqConfigError: a protected range is longer than any request, or a width names no layer of the model.
    """
    for flag, value, default in (
        ("window", args.pmkvq_window, DEFAULT_WINDOW),
        ("sink-tokens", args.pmkvq_sink_tokens, DEFAULT_SINK_TOKENS),
    ):
        # A default may be longer: then all of a request is in its window.
        if value > max(context, default):
            raise PmkvqConfigError(
                f"--pmkvq-{flag} {value}: longer than this model's context; expected 0 to {context} tokens"
            )
    if args.pmkvq_final_bits is not None:
        parse_final_bits(args.pmkvq_final_bits, num_layers)


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


@dataclass(frozen=True)
class Protection:
    """What one running request keeps out of shrinking (flags ``--pmkvq-window``, ``-sink-tokens``, ``-protect``)."""

    window: int
    sink_tokens: int
    hard: bool

    def hard_pages_per_request(self, page_size: int) -> int:
        """The tail page; with hard protection also the sink pages and every page the window touches."""
        if not self.hard:
            return 1
        window_pages = math.ceil(self.window / page_size) + 1 if self.window else 1
        return window_pages + math.ceil(self.sink_tokens / page_size)


def limits_for(running: int, chunk: int, page_size: int, protection: Protection) -> Limits:
    per_request = protection.hard_pages_per_request(page_size)
    return Limits(running, chunk, running * per_request + math.ceil(chunk / page_size))


def choose_limits(
    shape: PageShape,
    groups: tuple[LayerGroup, ...],
    budget_bytes: int,
    protection: Protection,
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
    per_request = protection.hard_pages_per_request(page)
    if running_is_default:
        chunk_pages = math.ceil(chunk / page)
        spare = affordable - (min(chunk_pages, affordable // 2) if chunk_is_default else chunk_pages)
        running = max(min(running, MIN_RUNNING_REQUESTS), min(running, spare // per_request))
    if chunk_is_default:
        spare = affordable - running * per_request
        chunk = max(min(chunk, MIN_CHUNK_TOKENS), min(chunk, spare * page)) // page * page
    return limits_for(running, chunk, page, protection)


def smallest_budget(shape: PageShape, groups: tuple[LayerGroup, ...], limits: Limits, tokens: int) -> int:
    """Bytes of the smallest pool that holds ``tokens`` logical tokens under ``limits``."""
    pages = math.ceil(tokens / shape.page_size)
    return geometry_for_pages(shape, groups, pages, limits.hard_pages).total_bytes


def choose_geometry(
    shape: PageShape, groups: tuple[LayerGroup, ...], budget_bytes: int, limits: Limits
) -> PoolGeometry:
    """The largest pool in ``budget_bytes``; it must hold two chunks.

    Raises:
        PmkvqConfigError: the budget is too small; names the smallest pool that works.
    """
    geometry = geometry_for_budget(shape, groups, budget_bytes, limits.hard_pages)
    need = 2 * limits.chunk
    if geometry is None or geometry.num_pages * shape.page_size < need:
        least = smallest_budget(shape, groups, limits, need)
        tails = limits.running + math.ceil(limits.chunk / shape.page_size)
        window = " or --pmkvq-window (--pmkvq-protect hard keeps it at 16 bits)" if limits.hard_pages > tails else ""
        raise PmkvqConfigError(
            f"--pmkvq-pool-bytes: {budget_bytes} bytes hold less than two prefill chunks of {limits.chunk} tokens "
            f"with {limits.running} running requests; the smallest pool that works is {least} bytes "
            f"({least / 2**20:.1f} MiB), or lower --chunked-prefill-size or --max-running-requests{window}"
        )
    return geometry
