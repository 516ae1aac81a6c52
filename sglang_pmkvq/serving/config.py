"""What the ``--pmkvq-*`` flags mean: parsing, defaults, and values that are refused. No SGLang, no torch."""

from __future__ import annotations

import re
from typing import Any

from sglang_pmkvq.formats import GROUP_SIZES, KEY_CENTER_CHOICES, KEY_TRANSFORM_CHOICES, TIERS
from sglang_pmkvq.ledger.policy import POLICIES, PROTECTIONS, PolicyConfig
from sglang_pmkvq.timeline import why_not_writable

DEFAULT_FINAL_BITS = "4"
_WIDTHS = ", ".join(map(str, TIERS))

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
            f"--pmkvq-final-bits {whole}: {text!r} is not a width; expected one of {_WIDTHS}, or a pair such as k4v2"
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
        ("min-active-bits", args.pmkvq_min_active_bits, TIERS),
        ("key-transform", args.pmkvq_key_transform, (None, *KEY_TRANSFORM_CHOICES)),
        ("key-center", args.pmkvq_key_center, (None, *KEY_CENTER_CHOICES)),
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
        ("window", args.pmkvq_window, PolicyConfig.window_tokens),
        ("sink-tokens", args.pmkvq_sink_tokens, PolicyConfig.sink_tokens),
    ):
        # A default may be longer: then all of a request is in its window.
        if value > max(context, default):
            raise PmkvqConfigError(
                f"--pmkvq-{flag} {value}: longer than this model's context; expected 0 to {context} tokens"
            )
    if args.pmkvq_final_bits is not None:
        parse_final_bits(args.pmkvq_final_bits, num_layers)
