"""How keys and values become codes, and how queries meet codes: one frozen object per layer group.

Quantized tiers hold codes of T(k − R c), k a key after its rotary embedding R and c a centre (``rotary.py``), and are
read by T⁻¹(q)·T(k − R c) + q·R c = q·k; values are codes of T(v), and T⁻¹ undoes their sum. The 16-bit tier is never
touched. Every room asks this object: who makes codes (``transformed``, ``edges``, ``copy_arguments``), who reads them
(``queries``, ``center_queries``, ``values_back``, ``key_clip``, ``read_arguments``), and who chooses
(``from_calibration``, ``default``). Transforms are in ``transforms.py``, centres in ``rotary.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_pmkvq.artifact import Calibration
from sglang_pmkvq.formats import K, LayerGroup, PageShape
from sglang_pmkvq.kernels.rotary import Center, ModelKeys, RotaryTable, chosen_blocks, default_center
from sglang_pmkvq.kernels.transforms import Hadamard, Index, Transform, exponents, key_transform, layer_transforms

# Clip factors of least squared error for 2-bit codes of G normal variates, by G. Rotated channels are sums of all
# channels and nearly normal; factors calibrated on real keys are close to these.
NORMAL_CLIPS = {32: 0.76, 64: 0.63, 128: 0.60}


def clip_edges(clip: torch.Tensor) -> torch.Tensor:
    """Where 4-bit codes become 2-bit code 1 instead of 0, int32 in 3 .. 8, for clip factors c in (0, 1].

    2-bit codes then span the middle share c of the range, so level j lies at 15·((1 − c)/2 + c·j/3) on the scale
    of 4-bit codes, and the first two meet at 7.5 − 5c. The upper half mirrors the lower. c = 1 gives 3, the edge of
    the equivalent right shift.
    """
    return torch.ceil(7.5 - 5.0 * clip.double()).to(torch.int32)


@dataclass(frozen=True)
class Coding:
    """How keys and values of one layer group become codes.

    Attributes:
        key_transform: of keys before they become codes, and of queries that read codes.
        key_clip: clip factors fp32 ``[L, H]`` in (0, 1] (``[H]`` once a layer is picked), or None for whole ranges.
            2-bit codes of keys span the middle share ``key_clip`` of the stored range: the step from 4 to 2 bits
            rounds to those four levels, and readers narrow (zero, range) alike. Wider tiers and what is stored of a
            range are untouched.
        value_transform: of values before they become codes, and of what attention sums of codes.
        center: what is subtracted from keys before ``key_transform``, and added to scores; None for nothing.
    """

    key_transform: Transform = Transform()
    key_clip: torch.Tensor | None = None
    value_transform: Transform = Transform()
    center: Center | None = None

    @classmethod
    def from_calibration(
        cls, calibration: Calibration, layers: Sequence[int], heads: slice, rotary: RotaryTable | None = None
    ) -> Coding:
        """What a calibration says of some layers and KV heads.

        Args:
            rotary: all pairs of the model's rotary table; needed where the calibration has centres.

        Raises:
            ValueError: keys of these layers have centres, and there is no ``rotary``.
        """
        own = tuple(layers)
        scale, clip, vector, spread = (
            None if tensor is None else torch.from_numpy(tensor)
            for tensor in (
                calibration.key_scale(own, heads),
                calibration.key_clip(own, heads),
                calibration.key_center(own, heads),
                calibration.key_spread(own, heads),
            )
        )
        center = None
        if vector is not None and spread is not None and bool(vector.any()):
            if rotary is None:
                raise ValueError("the calibration centres keys, and the model has no rotary table to do it with")
            # What the file has is what was measured: all of it is taken off.
            center = Center.of(vector, chosen_blocks(vector, spread, rotary, tolerance=0.0), rotary)
        return cls(
            layer_transforms([calibration.transforms[layer] for layer in own], calibration.head_dim, scale),
            clip,
            layer_transforms([calibration.value_transforms[layer] for layer in own], calibration.head_dim),
            center,
        )

    @classmethod
    def default(
        cls, transform: str, group: LayerGroup, shape: PageShape, center: str = "none", keys: ModelKeys | None = None
    ) -> Coding:
        """What needs no data, for a layer group; 2-bit codes of rotated keys span what suits a normal distribution.

        Args:
            transform: of keys, ``none`` or ``hadamard``, and then values stay plain; ``auto`` rotates keys that end
                below 8 bits and values that end at 2.
            center: as ``default_center`` takes it.
            keys: what the model says of its keys; None is nothing, and then there is no centre.
        """
        auto = transform == "auto"
        if auto:
            transform = Hadamard.name if group.k_final < 8 else Transform.name
        clip = None
        if transform == Hadamard.name:
            clip = torch.full((len(group.layers), shape.num_kv_heads), NORMAL_CLIPS[shape.group_size])
        values = Hadamard(shape.head_dim) if auto and group.v_final == 2 else Transform()
        found = default_center(keys or ModelKeys(), group.layers, shape.num_kv_heads, center, group.k_final)
        taken = found if isinstance(found, Center) else None
        return cls(key_transform(transform, shape.head_dim), clip, values, taken)

    def for_group(self, group: LayerGroup, shape: PageShape, device: torch.device | str) -> Coding:
        """The same on a device, less what the group's final widths never use.

        Raises:
            ValueError: tensors that do not fit the group, a scale that is not positive, or a clip factor outside
                (0, 1].
        """
        layers, heads = len(group.layers), shape.num_kv_heads
        for transform in (self.key_transform, self.value_transform):
            transform.check(layers, heads, shape.head_dim)
        if self.center is not None:
            self.center.check(layers, heads, shape.head_dim)
        clip = self.key_clip
        if clip is not None:
            if tuple(clip.shape) != (layers, heads):
                raise ValueError(f"clip factors of keys must have shape {(layers, heads)}, got {tuple(clip.shape)}")
            if not bool(((clip > 0) & (clip <= 1)).all()):
                raise ValueError("clip factors of keys must be above 0 and at most 1 everywhere")
            clip = clip.to(device=device, dtype=torch.float32).contiguous() if group.k_final == 2 else None
        keys = self.key_transform.on(device) if group.k_final < 16 else Transform()
        values = self.value_transform.on(device) if group.v_final < 16 else Transform()
        center = self.center.on(device) if self.center is not None and group.k_final < 16 else None
        if center is not None:
            # Made now: the first to ask may be a CUDA graph that is being captured.
            assert center.rotary.channel_at.numel() and center.rotary.block_channels.numel()
        return Coding(keys, clip, values, center)

    def on(self, device: torch.device | str) -> Coding:
        """The same with tensors on a device."""
        return Coding(
            self.key_transform.on(device),
            None if self.key_clip is None else self.key_clip.to(device),
            self.value_transform.on(device),
            None if self.center is None else self.center.on(device),
        )

    def pick(self, index: Index) -> Coding:
        """The same for some layers of the group: an index, which drops the axis of layers, or several.

        A centre keeps the axis: picked by an index it is a group of one layer.
        """
        return Coding(
            self.key_transform.pick(index),
            None if self.key_clip is None else self.key_clip[index],
            self.value_transform.pick(index),
            None if self.center is None else self.center.pick(index),
        )

    @cached_property
    def _key_edges(self) -> torch.Tensor | None:
        return None if self.key_clip is None else clip_edges(self.key_clip)

    def edges(self, side: int) -> torch.Tensor | None:
        """int32 ``[L, H]``, what the step from 4 to 2 bits compares 4-bit codes of a side with; None if not clipped."""
        return self._key_edges if side == K else None

    @cached_property
    def _copy_arguments(self) -> dict[tuple[int, ...], dict[str, object]]:
        return {}

    def copy_arguments(
        self, sides: tuple[int, ...], layers: int, shape: PageShape, device: torch.device
    ) -> dict[str, object]:
        """What the kernel that makes codes takes of a coding; made once, so the same tensors at every wave.

        Args:
            sides: of an arena: both, or one.
            layers: of the group.
            device: of the pool.
        """
        if sides not in self._copy_arguments:
            with torch.inference_mode(False):
                flags = [self._rotation_flags(side, layers, device) for side in sides]
                scale = self.key_transform.scales(layers, shape.num_kv_heads, shape.head_dim)
            keys, turned = sides[0] == K, any(flag is not None for flag in flags)
            center = self.center if keys else None
            self._copy_arguments[sides] = {
                "scale0": scale if keys else None,
                "rotated0": flags[0],
                "rotated1": flags[1] if len(flags) > 1 else None,
                "ROTATE": 2.0 ** -exponents(shape.head_dim)[0] if turned else 0.0,
                "edges0": self.edges(K) if keys else None,
                "center0": None if center is None else center.factors,
                "center_stride": None if center is None else center.factors.stride(0),
                "rotary": None if center is None else center.rotary.values,
                "channel_at": None if center is None else center.rotary.channel_at,
            }
        return self._copy_arguments[sides]

    def _rotation_flags(self, side: int, layers: int, device: torch.device) -> torch.Tensor | None:
        """int32 ``[L]``, nonzero for layers of a side that are rotated; None if there are none."""
        flags = self.transform_of(side).rotated(layers)
        return torch.tensor(flags, dtype=torch.int32, device=device) if any(flags) else None

    def center_blocks(self, layer: int) -> int:
        """Blocks of rotary pairs that attention of a layer reads, 0 without a centre."""
        return 0 if self.center is None else self.center.places[layer].numel()

    def read_arguments(self, layer: int, layers: int) -> dict[str, object]:
        """What the kernels that read codes of one of ``layers`` layers take of a coding, beside the queries."""
        center = self.center if self.center_blocks(layer) else None
        return {
            "key_clip": None if self.key_clip is None else self.key_clip[layer],
            "center": None if center is None else center.factors[:, layer],
            "center_stride": None if center is None else center.factors.stride(0),
            "center_places": None if center is None else center.places[layer],
            "rotary": None if center is None else center.rotary.values,
            "rotary_stride": None if center is None else center.rotary.values.stride(0),
            "rotary_channels": None if center is None else center.rotary.block_channels,
            "CENTER_BLOCKS": self.center_blocks(layer),
            "TURN_VALUES": self.value_transform.rotated(layers)[layer],
        }

    def transform_of(self, side: int) -> Transform:
        return self.key_transform if side == K else self.value_transform

    def transformed(self, side: int, x: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """What is coded of fp32 ``x [L, n, H, P, D]`` of a side; may overwrite ``x``.

        Args:
            columns: int64 ``[n]``, pages of the sequence before each page; centred keys need it.
        """
        if side == K and self.center is not None:
            assert columns is not None, "centred keys depend on where they stand"
            x = self.center.subtracted(x, columns)
        return self.transform_of(side).forward(x)

    def queries(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """``q [..., H, M, D]`` as it reads quantized keys of a layer, in q's dtype; ``q`` itself if there is no change.

        Whoever multiplies these with codes must also sum these for the zero term, else it does not cancel.
        """
        return self.key_transform.inverse(q, layer)

    def center_queries(self, q: torch.Tensor, layer: int) -> torch.Tensor | None:
        """What table rows of the layer's centre are multiplied by, see ``Center.query_rows``; None without a centre."""
        return None if self.center is None else self.center.query_rows(q, layer)

    def values_back(self, out: torch.Tensor, layer: int) -> torch.Tensor:
        """What sums ``out [..., H, M, D]`` of quantized values of a layer are in the model's own units."""
        return self.value_transform.inverse(out, layer)
