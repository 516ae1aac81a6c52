"""What may be done to the keys of a layer, and the choice among it by measured error; likewise for values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_pmkvq.calib import reparam
from sglang_pmkvq.calib.centers import KeyCenter
from sglang_pmkvq.calib.sensitivity import WIDTHS
from sglang_pmkvq.calib.sweep import State
from sglang_pmkvq.formats import KEY_CENTERS, KEY_TRANSFORMS
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.rotary import Center, RotaryTable
from sglang_pmkvq.kernels.transforms import Scaled, key_transform, layer_transforms

AUTO = "auto"
# The simpler first: on a tie the first is taken.
TRANSFORM_ORDER = tuple(sorted(KEY_TRANSFORMS, key=("none", "hadamard", "scale").index))
CENTER_ORDER = tuple(sorted(KEY_CENTERS, key=("none", "bias", "mean").index))


def asked(setting: str, order: tuple[str, ...]) -> tuple[str, ...]:
    """Names that a flag asks to choose from."""
    return order if setting == AUTO else (setting,)


@dataclass(frozen=True)
class Candidate:
    """A transform of keys around a centre."""

    transform: str
    center: str

    def __str__(self) -> str:
        return f"{self.center}+{self.transform}"


@dataclass(frozen=True)
class Keys:
    """What was chosen for the keys of all layers.

    Attributes:
        transforms, centers: names per layer.
        scale: fp32 [L, H, D], 1 in layers that are not scaled.
        alphas: per layer the α of each head, None where not scaled.
        clip: fp32 [L, H].
        vector: fp32 [L, H, D], what is taken off and nothing else; 0 in layers without a centre.
        spread: fp32 [L, H], energy of keys around the whole centre; likewise.
        blocks: per layer, blocks of rotary pairs of its centre.
        errors: per layer, relative error of the attention output of every candidate; {} where keys stay at 16 bits.
    """

    transforms: tuple[str, ...]
    centers: tuple[str, ...]
    scale: torch.Tensor
    alphas: tuple[list[float] | None, ...]
    clip: torch.Tensor
    vector: torch.Tensor
    spread: torch.Tensor
    blocks: tuple[tuple[int, ...], ...]
    errors: tuple[dict[str, float], ...]

    def tensors(self, finals: Sequence[tuple[int, int]], clip: bool) -> dict[str, Any]:
        """What of it belongs into the calibration file."""
        out = {}
        if "scale" in self.transforms:
            out["key_scale"] = self.scale.numpy()
        if set(self.centers) != {"none"}:
            out |= {"key_center": self.vector.numpy(), "key_spread": self.spread.numpy()}
        if clip and any(k_bits == 2 for k_bits, _ in finals):
            out["key_clip"] = self.clip.numpy()
        return out

    def coding(self, value_transforms: Sequence[str], rotary: RotaryTable) -> Coding:
        """All layers as one."""
        head_dim = self.scale.shape[-1]
        return Coding(
            layer_transforms(self.transforms, head_dim, self.scale),
            self.clip,
            layer_transforms(value_transforms, head_dim),
            Center.of(self.vector, self.blocks, rotary) if any(self.blocks) else None,
        )


@dataclass(frozen=True)
class Search:
    """All candidates of a model.

    Attributes:
        transforms, centers: names asked for.
        fitted: centres by name, on the model's device.
        scales: fp32 [widths, L, H, D] by name of the centre, where keys may be scaled.
        alphas: float64 [L, H, widths], likewise.
        head_dim: D.
    """

    transforms: tuple[str, ...]
    centers: tuple[str, ...]
    fitted: dict[str, KeyCenter]
    scales: dict[str, torch.Tensor]
    alphas: dict[str, torch.Tensor]
    head_dim: int

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The simpler first. Keys as they are belong to any: a centre may be too small to be one."""
        return tuple(Candidate(t, c) for c in ("none", *self.fitted) for t in self.transforms)

    def possible(self, candidate: Candidate, layer: int) -> bool:
        """Whether a candidate is to be measured in a layer."""
        others = [name for name, one in self.fitted.items() if one.center.blocks[layer]]
        if candidate.center == "none":
            return "none" in self.centers or not others
        return candidate.center in others

    def codings(self, layer: int, device: torch.device) -> list[list[Coding]]:
        """Per candidate, how keys of a layer become codes at each of ``WIDTHS``; [] where it is none."""
        out = []
        for candidate in self.candidates:
            fitted = self.fitted.get(candidate.center)
            center = None if fitted is None else fitted.center.pick(layer)
            out.append(
                [
                    Coding(self._transform(candidate, layer, place).on(device), center=center)
                    for place in range(len(WIDTHS))
                ]
                if self.possible(candidate, layer)
                else []
            )
        return out

    def _transform(self, candidate: Candidate, layer: int, place: int) -> Any:
        if candidate.transform == Scaled.name:
            return Scaled(self.scales[candidate.center][place, layer])
        return key_transform(candidate.transform, self.head_dim)

    def chosen(self, state: State, places: Sequence[int | None]) -> Keys:
        """The candidate of least error in each layer, summed over heads, each head at its best clip factor.

        Args:
            state: see ``reparam.error_state``.
            places: per layer, which of ``WIDTHS`` its keys have; None is 16 bits, where nothing is done.
        """
        layers, heads, *_ = state["keys"].shape
        picks: list[Candidate] = []
        scale, clip = torch.ones(layers, heads, self.head_dim), torch.ones(layers, heads)
        vector, spread = torch.zeros(layers, heads, self.head_dim), torch.zeros(layers, heads)
        alphas: list[list[float] | None] = [None] * layers
        blocks: list[tuple[int, ...]] = [()] * layers
        errors: list[dict[str, float]] = [{}] * layers
        for layer, place in enumerate(places):
            if place is None:
                picks.append(Candidate("none", "none"))
                continue
            error = state["keys"][layer, :, :, place]  # [H, candidates, clips]
            total = error.amin(-1).sum(0)
            index = int(total.argmin())
            pick = self.candidates[index]
            picks.append(pick)
            clip[layer] = reparam.best_clips(error[:, index])
            if pick.transform == Scaled.name:
                scale[layer] = self.scales[pick.center][place, layer]
                alphas[layer] = [round(a, 4) for a in self.alphas[pick.center][layer, :, place].tolist()]
            if pick.center in self.fitted:
                fitted = self.fitted[pick.center]
                vector[layer], spread[layer] = fitted.center.vector[layer].cpu(), fitted.spread[layer]
                blocks[layer] = fitted.center.blocks[layer]
            relative = (total / state["energy"][layer].sum()).sqrt().tolist()
            errors[layer] = {
                str(candidate): float(f"{value:.4g}")
                for candidate, value in zip(self.candidates, relative, strict=True)
                if self.possible(candidate, layer)
            }
        return Keys(
            transforms=tuple(pick.transform for pick in picks),
            centers=tuple(pick.center for pick in picks),
            scale=scale,
            alphas=tuple(alphas),
            clip=clip,
            vector=vector,
            spread=spread,
            blocks=tuple(blocks),
            errors=tuple(errors),
        )


def chosen_values(state: State, places: Sequence[int | None]) -> tuple[str, ...]:
    """Transform of least error of the values of each layer; ``places`` as ``Search.chosen`` has them."""
    total = state["values"].sum(1)  # [L, transforms, widths]
    return tuple(
        "none" if place is None else reparam.VALUE_TRANSFORMS[int(total[layer, :, place].argmin())]
        for layer, place in enumerate(places)
    )
