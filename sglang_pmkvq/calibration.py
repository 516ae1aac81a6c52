"""What is done to keys: by ``--pmkvq-calibration``, checked against the other flags, the model and this rank's heads,
or by ``--pmkvq-key-transform`` without one."""

from __future__ import annotations

import os
from typing import Any

import torch

from sglang_pmkvq import artifact
from sglang_pmkvq.config import PmkvqConfigError, parse_final_bits
from sglang_pmkvq.formats import LayerGroup, PageShape

DEFAULT_FINAL_BITS = "4"

# Clip factors of least squared error for 2-bit codes of G normal variates, by G. Rotated channels are sums of all
# channels and nearly normal; factors calibrated on real keys are close to these.
NORMAL_CLIPS = {32: 0.76, 64: 0.63, 128: 0.60}

PLAIN_TWO_BIT_KEYS = (
    "keys may end at 2 bits as they are, which costs answers; rotate them with --pmkvq-key-transform hadamard, end "
    "them at 4 bits with --pmkvq-final-bits k4v2, or calibrate (--pmkvq-key-transform none silences this)"
)


def load_for(args: Any) -> artifact.Calibration | None:
    """The calibration that ``args`` name, checked against the flags; None if they name none.

    Raises:
        PmkvqConfigError: the file is damaged, or a flag says something else than the file.
    """
    if args.pmkvq_calibration is None:
        return None
    flag = f"--pmkvq-calibration {args.pmkvq_calibration}"
    try:
        calibration = artifact.load(args.pmkvq_calibration)
    except artifact.ArtifactError as error:
        raise PmkvqConfigError(f"--pmkvq-calibration {error}") from error
    if args.pmkvq_group_size not in (None, calibration.group_size):
        raise PmkvqConfigError(
            f"{flag} was made for groups of {calibration.group_size} channels, --pmkvq-group-size "
            f"{args.pmkvq_group_size} asks for others; leave --pmkvq-group-size out"
        )
    if args.pmkvq_key_transform not in (None, calibration.transform):
        raise PmkvqConfigError(
            f"{flag} was made for key transform {calibration.transform}, --pmkvq-key-transform "
            f"{args.pmkvq_key_transform} asks for another; leave --pmkvq-key-transform out"
        )
    if args.pmkvq_final_bits is not None:
        asked = parse_final_bits(args.pmkvq_final_bits, calibration.num_layers)
        if tuple(asked) != calibration.finals:
            raise PmkvqConfigError(
                f"{flag} sets the final widths of each layer, --pmkvq-final-bits {args.pmkvq_final_bits} asks for "
                "others; leave one of the two out"
            )
    return calibration


def check_model(args: Any, calibration: artifact.Calibration) -> None:
    """Compare with the model that ``args`` name, from its configuration and weight files alone.

    Raises:
        PmkvqConfigError: the calibration was made for another model.
    """
    folder = args.model_path if os.path.isdir(args.model_path) else None
    try:
        artifact.check_model(
            calibration, args.pmkvq_calibration, args.get_model_config().hf_text_config, folder
        )
    except artifact.ArtifactError as error:
        raise PmkvqConfigError(f"--pmkvq-calibration {error}") from error


def layer_finals(args: Any, layers: int, calibration: artifact.Calibration | None) -> list[tuple[int, int]]:
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


def group_key_scales(
    calibration: artifact.Calibration, groups: tuple[LayerGroup, ...], heads: slice
) -> tuple[torch.Tensor | None, ...]:
    """Per layer group fp32 [L, H of this rank, D], or None where keys are not scaled or stay at 16 bits."""
    out: list[torch.Tensor | None] = []
    for group in groups:
        scale = None if group.k_final == 16 else calibration.key_scale(group.layers, heads)
        out.append(None if scale is None else torch.from_numpy(scale))
    return tuple(out)


def group_key_clips(
    calibration: artifact.Calibration, groups: tuple[LayerGroup, ...], heads: slice
) -> tuple[torch.Tensor | None, ...]:
    """Per layer group clip factors fp32 [L, H of this rank], or None where keys are not clipped or stay wider."""
    out: list[torch.Tensor | None] = []
    for group in groups:
        clip = None if group.k_final != 2 else calibration.key_clip(group.layers, heads)
        out.append(None if clip is None else torch.from_numpy(clip))
    return tuple(out)


def normal_key_clips(groups: tuple[LayerGroup, ...], shape: PageShape) -> tuple[torch.Tensor | None, ...]:
    """Per layer group clip factors fp32 [L, H] of rotated keys without a calibration, or None where keys stay wider."""
    clip = NORMAL_CLIPS[shape.group_size]
    return tuple(
        torch.full((len(group.layers), shape.num_kv_heads), clip) if group.k_final == 2 else None for group in groups
    )


def plain_two_bit_keys(args: Any, groups: tuple[LayerGroup, ...]) -> bool:
    """Whether keys may end at 2 bits with nothing done to them, and nobody asked for that."""
    asked = args.pmkvq_calibration is not None or args.pmkvq_key_transform is not None
    return not asked and any(group.k_final == 2 for group in groups)
