"""What flags and a calibration say of the pool, read once, before its size is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_pmkvq.artifact import Calibration
from sglang_pmkvq.formats import LayerGroup, PageShape, groups_from_finals
from sglang_pmkvq.kernels.coding import Coding, Transform
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.serving.calibration import load_for
from sglang_pmkvq.serving.config import DEFAULT_FINAL_BITS, PmkvqConfigError, parse_final_bits
from sglang_pmkvq.serving.engine import ModelFacts
from sglang_pmkvq.serving.sizing import page_shape

PLAIN_TWO_BIT_KEYS = (
    "keys may end at 2 bits as they are, which costs answers; rotate them with --pmkvq-key-transform hadamard, end "
    "them at 4 bits with --pmkvq-final-bits k4v2, or calibrate (--pmkvq-key-transform none silences this)"
)


@dataclass(frozen=True)
class Configuration:
    """What the pool will be, whatever its size.

    Attributes:
        shape: bytes of a page on this rank.
        groups: layers by their final widths.
        codings: per layer group, how its keys and values become codes; tensors on the host.
        policy: order and depth of shrinking.
        calibration: what the calibration file says of itself, or None.
        warnings: sentences for the log.
    """

    shape: PageShape
    groups: tuple[LayerGroup, ...]
    codings: tuple[Coding, ...]
    policy: PolicyConfig
    calibration: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def read_configuration(args: Any, facts: ModelFacts) -> Configuration:
    """The configuration that server arguments, the calibration they name, and the model give.

    Raises:
        PmkvqConfigError: a value, the file or the model cannot be served; names the flag and the way out.
    """
    calibration = load_for(args)
    shape = page_shape(
        args.page_size,
        facts.kv_heads,
        facts.head_dim,
        args.pmkvq_group_size if calibration is None else calibration.group_size,
    )
    groups = groups_from_finals(layer_finals(args, facts.layers, calibration))
    warnings: tuple[str, ...] = ()
    if calibration is None:
        transform = args.pmkvq_key_transform or Transform.name
        codings = tuple(Coding.default(transform, len(group.layers), shape) for group in groups)
        if args.pmkvq_key_transform is None and any(group.k_final == 2 for group in groups):
            warnings = (PLAIN_TWO_BIT_KEYS,)
    else:
        rank, size = facts.attention_tp
        heads = rank_heads(calibration.num_kv_heads, size, rank)
        codings = tuple(Coding.from_calibration(calibration, group.layers, heads) for group in groups)
    return Configuration(
        shape=shape,
        groups=groups,
        codings=codings,
        policy=PolicyConfig(
            policy=args.pmkvq_policy,
            window_tokens=args.pmkvq_window,
            sink_tokens=args.pmkvq_sink_tokens,
            protect=args.pmkvq_protect,
            min_active_bits=args.pmkvq_min_active_bits,
        ),
        calibration=None if calibration is None else calibration.summary(),
        warnings=warnings,
    )


def layer_finals(args: Any, layers: int, calibration: Calibration | None) -> list[tuple[int, int]]:
    """(K final, V final) of each layer: from the calibration, the flag, or the default.

    Raises:
        PmkvqConfigError: the calibration has another number of layers.
    """
    if calibration is None:
        return parse_final_bits(args.pmkvq_final_bits or DEFAULT_FINAL_BITS, layers)
    if calibration.num_layers != layers:
        raise PmkvqConfigError(
            f"--pmkvq-calibration {args.pmkvq_calibration}: made for {calibration.num_layers} layers, this server "
            f"runs {layers}"
        )
    return list(calibration.finals)


def rank_heads(total: int, tp_size: int, rank: int) -> slice:
    """KV heads of one tensor-parallel rank: its share, or one head that several ranks replicate."""
    if total >= tp_size:
        share = total // tp_size
        return slice(rank * share, (rank + 1) * share)
    head = rank * total // tp_size
    return slice(head, head + 1)
