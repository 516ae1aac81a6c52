"""Transforms of keys and values before they become codes, and of queries and sums that meet codes.

A transform is one subclass of ``Transform`` here, its arithmetic over again in ``reference/codes.py``, and its device
code in ``triton/rotation.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sglang_pmkvq.formats import KEY_TRANSFORMS

# One layer, or some of them in order.
Index = int | slice | list[int]
# The model's own, and what the CPU computes in.
QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Transform:
    """The identity, and what a transform has to say. Stateless; tensors on the device of the pool.

    Every T is symmetric, so the queries that read T(k) and the sums that values T(v) come back from take one T⁻¹.

    Attributes:
        name: as flags and calibration files spell it.
    """

    name: ClassVar[str] = "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """T(x) of fp32 ``x [L, n, H, P, D]``, all layers of the group; may overwrite ``x``."""
        return x

    def inverse(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """T⁻¹(x) of ``x [..., H, M, D]`` of layer ``layer``, in x's dtype; ``x`` itself if that is the identity."""
        return x

    def is_plain(self, layer: int) -> bool:
        """Whether T of a layer is the identity."""
        return True

    def scales(self, layers: int, heads: int, head_dim: int) -> torch.Tensor | None:
        """What the kernel that makes codes divides by: fp32 ``[L, H, D]``; None if nothing is scaled."""
        return None

    def rotated(self, layers: int) -> tuple[bool, ...]:
        """Which of the layers are rotated."""
        return (False,) * layers

    def pick(self, index: Index) -> Transform:
        """The same for some layers of the group."""
        return self

    def on(self, device: torch.device | str) -> Transform:
        """The same with tensors on a device."""
        return self

    def check(self, layers: int, heads: int, head_dim: int) -> None:
        """Raise ``ValueError`` for tensors that do not fit a layer group."""


@dataclass(frozen=True)
class Scaled(Transform):
    """K / s is coded and queries are multiplied by s (paper sec. 3.3, eq. 9).

    Attributes:
        scale: positive fp32 ``[L, H, D]`` (``[H, D]`` once a layer is picked).
    """

    name: ClassVar[str] = "scale"
    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.div_(self.scale[:, None, :, None, :])

    def inverse(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        # The product in fp32, rounded once as it is written: scales are not exact in 16 bits. One launch on a GPU.
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return torch.mul(x, self.scale[layer].unsqueeze(1), out=out)

    def is_plain(self, layer: int) -> bool:
        return False

    def scales(self, layers: int, heads: int, head_dim: int) -> torch.Tensor | None:
        return self.scale

    def pick(self, index: Index) -> Scaled:
        return Scaled(self.scale[index])

    def on(self, device: torch.device | str) -> Scaled:
        return Scaled(self.scale.to(device=device, dtype=torch.float32).contiguous())

    def check(self, layers: int, heads: int, head_dim: int) -> None:
        expected = (layers, heads, head_dim)
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"key scales must have shape {expected}, got {tuple(self.scale.shape)}")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise ValueError("key scales must be positive and finite everywhere")


@dataclass(frozen=True)
class Hadamard(Transform):
    """K·W/2^a is coded and q·W/2^b reads it; W·W = D·I and 2^(a + b) = D.

    W is Sylvester's matrix of ±1, so q·K stays, and every channel that is coded mixes all channels of a head: an
    outlier is spread over all of them instead of stretching the range of its group. Powers of two in place of √D
    scale exactly, so that all who rotate make the same codes, bit for bit.

    Attributes:
        head_dim: D, a power of two.
        device: of ``matrices``.
        matrices: W/2^b ``[D, D]`` by dtype of the queries, exact in each. Held here, so that a captured CUDA graph
            finds them where they were.

    Raises:
        ValueError: ``head_dim`` is no power of two.
    """

    name: ClassVar[str] = "hadamard"
    head_dim: int
    device: torch.device | str = "cpu"
    matrices: dict[torch.dtype, torch.Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.head_dim.bit_count() != 1:
            raise ValueError(f"a Hadamard rotation needs a power of two of channels, got {self.head_dim}")
        with torch.inference_mode(False):
            made = {dtype: query_rotation(self.head_dim, dtype, self.device) for dtype in QUERY_DTYPES}
        object.__setattr__(self, "matrices", made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rotate_keys(x)

    def inverse(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        matrix = self.matrices.get(x.dtype)
        return x @ (query_rotation(self.head_dim, x.dtype, x.device) if matrix is None else matrix)

    def is_plain(self, layer: int) -> bool:
        return False

    def rotated(self, layers: int) -> tuple[bool, ...]:
        return (True,) * layers

    def on(self, device: torch.device | str) -> Hadamard:
        here = torch.device(device) == torch.device(self.device)
        return self if here else Hadamard(self.head_dim, device)

    def check(self, layers: int, heads: int, head_dim: int) -> None:
        if self.head_dim != head_dim:
            raise ValueError(f"a rotation of {self.head_dim} channels does not fit head_dim {head_dim}")


@dataclass(frozen=True)
class PerLayer(Transform):
    """A transform for each layer of a group: what a calibration chose one by one.

    Attributes:
        layers: each for a group of one layer.
    """

    name: ClassVar[str] = "mixed"
    layers: tuple[Transform, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, transform in enumerate(self.layers):
            if not transform.is_plain(0):
                x[layer] = transform.forward(x[layer : layer + 1])[0]
        return x

    def inverse(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return self.layers[layer].inverse(x, 0)

    def is_plain(self, layer: int) -> bool:
        return self.layers[layer].is_plain(0)

    def scales(self, layers: int, heads: int, head_dim: int) -> torch.Tensor | None:
        each = [transform.scales(1, heads, head_dim) for transform in self.layers]
        some = [scale for scale in each if scale is not None]
        if not some:
            return None
        one = torch.ones_like(some[0])
        return torch.cat([one if scale is None else scale for scale in each])

    def rotated(self, layers: int) -> tuple[bool, ...]:
        return tuple(transform.rotated(1)[0] for transform in self.layers)

    def pick(self, index: Index) -> Transform:
        if isinstance(index, int):
            return self.layers[index].pick(0)
        some = self.layers[index] if isinstance(index, slice) else tuple(self.layers[i] for i in index)
        return PerLayer(some)

    def on(self, device: torch.device | str) -> PerLayer:
        return PerLayer(tuple(transform.on(device) for transform in self.layers))

    def check(self, layers: int, heads: int, head_dim: int) -> None:
        if len(self.layers) != layers:
            raise ValueError(f"expected transforms of {layers} layers, got {len(self.layers)}")
        for transform in self.layers:
            transform.check(1, heads, head_dim)


def per_layer(transforms: Sequence[Transform]) -> Transform:
    """The transforms of single layers as that of a group; one where they are all of a kind that has no tensors."""
    first = transforms[0]
    alike = all(type(t) is type(first) for t in transforms)
    if alike and isinstance(first, Scaled):
        return Scaled(torch.cat([t.scale for t in transforms if isinstance(t, Scaled)]))
    return first if alike else PerLayer(tuple(transforms))


def exponents(head_dim: int) -> tuple[int, int]:
    """(a, b): rotated keys are divided by 2^a, rotated queries by 2^b. ``head_dim`` is a power of two."""
    total = head_dim.bit_length() - 1
    assert head_dim == 1 << total
    return total - total // 2, total // 2


def rotate_keys(x: torch.Tensor) -> torch.Tensor:
    """x·W/2^a of fp32 ``x [..., D]``, by butterflies of channels i and i + h for h = 1, 2, 4, …, D/2."""
    dim = x.shape[-1]
    h = 1
    while h < dim:
        first, second = x.unflatten(-1, (-1, 2, h)).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        h *= 2
    return x * 2.0 ** -exponents(dim)[0]


def query_rotation(head_dim: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """W/2^b ``[D, D]``, exact in every float dtype."""
    a, b = exponents(head_dim)
    return (rotate_keys(torch.eye(head_dim)) * 2.0 ** (a - b)).to(device=device, dtype=dtype)


def key_transform(name: str, head_dim: int, scale: torch.Tensor | None = None) -> Transform:
    """The transform of a name in ``KEY_TRANSFORMS``; ``scale`` as ``Scaled`` has it, for that one alone.

    Raises:
        ValueError: an unknown name, or scales that are missing or not asked for.
    """
    if name not in _TRANSFORMS:
        raise ValueError(f"key transform must be one of {KEY_TRANSFORMS}, got {name!r}")
    if (scale is not None) != (name == Scaled.name):
        raise ValueError(f"key transform {name!r} {'without' if scale is None else 'with'} key scales")
    return _TRANSFORMS[name](head_dim, scale)


def layer_transforms(names: Sequence[str], head_dim: int, scale: torch.Tensor | None = None) -> Transform:
    """Transforms of the layers of a group by name; ``scale [L, H, D]`` is read where they are scaled.

    Raises:
        ValueError: as ``key_transform``.
    """
    own = [None if scale is None or name != Scaled.name else scale[i : i + 1] for i, name in enumerate(names)]
    return per_layer([key_transform(name, head_dim, s) for name, s in zip(names, own, strict=True)])


_TRANSFORMS: dict[str, Callable[[int, Any], Transform]] = {
    Transform.name: lambda head_dim, scale: Transform(),
    Scaled.name: lambda head_dim, scale: Scaled(scale),
    Hadamard.name: lambda head_dim, scale: Hadamard(head_dim),
}
assert set(_TRANSFORMS) == set(KEY_TRANSFORMS)
