"""What flags and a calibration say of the pool, read once, before its size is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sglang_pmkvq.artifact import Calibration
from sglang_pmkvq.formats import LayerGroup, PageShape, groups_from_finals
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.rotary import ModelKeys, center_bytes, default_center
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.serving.calibration import load_for
from sglang_pmkvq.serving.config import DEFAULT_FINAL_BITS, PmkvqConfigError, parse_final_bits
from sglang_pmkvq.serving.engine import ModelFacts
from sglang_pmkvq.serving.sizing import page_shape

# A bias is what some models add to every key; below this width it costs answers unless it is taken off.
BIAS_HARMS_BELOW = 8
BIAS_LEFT_IN = (
    "this model adds a large bias to its keys and --pmkvq-key-center none leaves it in keys that end below 8 bits, "
    "which can ruin answers; leave --pmkvq-key-center out, or end keys at 8 bits with --pmkvq-final-bits k8v4"
)
BIAS_STAYS = (
    "this model adds a large bias to its keys that cannot be taken off ({problem}), and keys end below 8 bits, which "
    "can ruin answers; end keys at 8 bits with --pmkvq-final-bits k8v4, or try `pmkvq check MODEL`"
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
        uncentered: per layer group, why its keys have no centre; "" where they have one. Empty if nobody asked.
        calibrated_centers: per layer group, what a calibration chose: one name for all layers that have a centre, or
            ``mixed``. Empty without a calibration.
    """

    shape: PageShape
    groups: tuple[LayerGroup, ...]
    codings: tuple[Coding, ...]
    policy: PolicyConfig
    calibration: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    uncentered: tuple[str, ...] = ()
    calibrated_centers: tuple[str, ...] = ()

    def center_bytes(self, tokens: int) -> int:
        """Bytes of centres and rotary table in a pool of so many tokens."""
        return center_bytes([coding.center for coding in self.codings], tokens)

    @property
    def measures_means(self) -> bool:
        """Whether centres are still to be measured."""
        return any(coding.center is not None and coding.center.whole for coding in self.codings)

    def without_means(self, why: str) -> Configuration:
        """The same without centres that are still to be measured."""
        measured = [coding.center is not None and coding.center.whole for coding in self.codings]
        codings = tuple(replace(c, center=None) if m else c for c, m in zip(self.codings, measured, strict=True))
        reasons = self.uncentered or ("",) * len(self.groups)
        return replace(
            self,
            codings=codings,
            uncentered=tuple(why if m else reason for m, reason in zip(measured, reasons, strict=True)),
        )

    def for_tokens(self, tokens: int) -> Configuration:
        """The same with a rotary table that is no longer than a pool of so many tokens needs."""
        centers = [None if coding.center is None else coding.center.upto(tokens) for coding in self.codings]
        codings = tuple(replace(coding, center=c) for coding, c in zip(self.codings, centers, strict=True))
        return replace(self, codings=codings)

    def center_source(self, group: int) -> str:
        """Where the centres of a group come from: ``none``, ``bias``, ``mean``, or ``mixed`` by a calibration."""
        center = self.codings[group].center
        if center is None or not center.used:
            return "none"
        if self.calibrated_centers:
            return self.calibrated_centers[group]
        return "mean" if center.whole else "bias"


def read_configuration(args: Any, facts: ModelFacts, keys: ModelKeys | None = None) -> Configuration:
    """The configuration that server arguments, the calibration they name, and the model give.

    Args:
        keys: what the model says of its keys; None is nothing.

    Raises:
        PmkvqConfigError: a value, the file or the model cannot be served; names the flag and the way out.
    """
    keys = keys or ModelKeys()
    calibration = load_for(args)
    shape = page_shape(
        args.page_size,
        facts.kv_heads,
        facts.head_dim,
        args.pmkvq_group_size if calibration is None else calibration.group_size,
    )
    groups = groups_from_finals(layer_finals(args, facts.layers, calibration))
    warnings: tuple[str, ...] = ()
    calibrated: tuple[str, ...] = ()
    if calibration is None:
        transform, center = args.pmkvq_key_transform or "auto", args.pmkvq_key_center or "auto"
        codings = tuple(Coding.default(transform, group, shape, center, keys) for group in groups)
        found = [default_center(keys, group.layers, facts.kv_heads, center, group.k_final) for group in groups]
        uncentered = tuple(why if isinstance(why, str) else "" for why in found)
        warnings = _bias_warnings(groups, codings, keys, center)
    else:
        rank, size = facts.attention_tp
        heads, rotary = rank_heads(calibration.num_kv_heads, size, rank), keys.center_rotary
        try:
            codings = tuple(Coding.from_calibration(calibration, group.layers, heads, rotary) for group in groups)
        except ValueError as error:
            raise PmkvqConfigError(
                f"--pmkvq-calibration {args.pmkvq_calibration}: {error} ({keys.problem}); calibrate with "
                "--center none"
            ) from error
        has = [coding.center is not None and bool(coding.center.used) for coding in codings]
        uncentered = tuple("" if one else "the calibration has none" for one in has)
        kinds = [{calibration.centers[layer] for layer in group.layers} - {"none"} for group in groups]
        calibrated = tuple(kind.pop() if len(kind) == 1 else "mixed" for kind in kinds)
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
        uncentered=uncentered,
        calibrated_centers=calibrated,
    )


def _bias_warnings(
    groups: tuple[LayerGroup, ...], codings: tuple[Coding, ...], keys: ModelKeys, center: str
) -> tuple[str, ...]:
    """A sentence if a large bias stays in keys that become narrow."""
    left = any(
        group.k_final < BIAS_HARMS_BELOW and coding.center is None and keys.large_bias(group.layers)
        for group, coding in zip(groups, codings, strict=True)
    )
    if not left:
        return ()
    return (BIAS_LEFT_IN if center == "none" else BIAS_STAYS.format(problem=keys.problem),)


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
