"""The file of ``--pmkvq-calibration``, checked against the other flags and the model."""

from __future__ import annotations

import os
from typing import Any

from sglang_pmkvq import artifact
from sglang_pmkvq.serving import engine
from sglang_pmkvq.serving.config import PmkvqConfigError, parse_final_bits


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
    if args.pmkvq_key_center not in (None, "auto"):
        raise PmkvqConfigError(
            f"{flag} says itself what is taken off keys, --pmkvq-key-center {args.pmkvq_key_center} asks for something "
            "else; leave --pmkvq-key-center out"
        )
    if args.pmkvq_key_transform not in (None, "auto", calibration.transform):
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
            calibration, args.pmkvq_calibration, engine.model_config(args).hf_text_config, folder
        )
    except artifact.ArtifactError as error:
        raise PmkvqConfigError(f"--pmkvq-calibration {error}") from error
