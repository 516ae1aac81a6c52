"""How keys become codes and how queries meet them: ``kernels/coding.py`` against the reference."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sglang_pmkvq.formats import (
    DATA_FREE_TRANSFORMS,
    GROUP_SIZES,
    HEAD_DIMS,
    KEY_TRANSFORMS,
    SIDES,
    K,
    LayerGroup,
    PageShape,
    V,
)
from sglang_pmkvq.kernels.coding import NORMAL_CLIPS, Coding, clip_edges
from sglang_pmkvq.kernels.reference import codes as reference
from sglang_pmkvq.kernels.reference.inputs import random_center
from sglang_pmkvq.kernels.rotary import RotaryTable, on_one_table, rounded
from sglang_pmkvq.kernels.transforms import Hadamard, PerLayer, Scaled, Transform, key_transform, query_rotation
from tests.test_artifact import example, layered

L, H, P = 3, 2, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def transform_of(name: str, dim: int, seed: int = 0) -> Transform:
    gen = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.rand(L, H, dim, generator=gen) * 4 - 2) if name == "scale" else None
    return key_transform(name, dim, scale)


def clips_of(layers: int = L, heads: int = H, seed: int = 0) -> torch.Tensor:
    return 0.4 + 0.6 * torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed))


# -- keys and queries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("name", KEY_TRANSFORMS)
def test_transformed_keys_are_the_references_bit_for_bit(name: str, dim: int) -> None:
    coding = Coding(transform_of(name, dim))
    x = torch.randn(L, 5, H, P, dim, generator=torch.Generator().manual_seed(dim)) * 3
    x[0, 0, 0, 0] *= 2.0**40
    x[1, 2, 1, 3, 5] = torch.nan
    want = torch.stack([reference.transformed_keys(x[i], coding.pick(i).key_transform) for i in range(L)])
    got = coding.transformed(K, x.clone())
    assert got.dtype == torch.float32
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))
    assert torch.equal(got.view(torch.int32), x.view(torch.int32)) == (name == "none")


@pytest.mark.parametrize("name", KEY_TRANSFORMS)
def test_values_are_coded_as_they_are(name: str) -> None:
    coding = Coding(transform_of(name, 64), clips_of())
    x = torch.randn(L, 2, H, P, 64)
    assert coding.transformed(V, x) is x
    assert coding.edges(V) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("name", KEY_TRANSFORMS)
def test_queries_meet_transformed_keys_as_plain_ones_meet_keys(name: str, dim: int, dtype: torch.dtype) -> None:
    """T*(q)·T(k) = q·k, in every layer and for any leading axes; what has no transform gets its own queries back."""
    coding = Coding(transform_of(name, dim))
    gen = torch.Generator().manual_seed(dim)
    keys = torch.randn(L, 1, H, P, dim, generator=gen)
    q = torch.randn(3, 5, H, 4, dim, generator=gen).to(dtype)
    coded = coding.transformed(K, keys.clone())
    for layer in range(L):
        low = coding.queries(q, layer)
        assert low.dtype == dtype and low.shape == q.shape
        assert (low is q) == (name == "none")
        got = low.float() @ coded[layer, 0].transpose(-1, -2)
        want = q.float() @ keys[layer, 0].transpose(-1, -2)
        # A query is rounded to its dtype once: by half a unit in the last place of each channel.
        unit = torch.finfo(dtype).eps
        bound = (low.float().abs() @ coded[layer, 0].abs().transpose(-1, -2)) * (unit + 1e-6) + 1e-6
        assert ((got - want).abs() <= bound).all()
        assert torch.equal(coding.queries(q[0, 0], layer), low[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_queries_are_rounded_once(dtype: torch.dtype) -> None:
    transform = transform_of("scale", 64)
    assert isinstance(transform, Scaled)
    q = torch.randn(7, H, 3, 64).to(dtype)
    before = q.clone()
    for layer in range(L):
        want = (q.double() * transform.scale[layer].double()[:, None]).float().to(dtype)
        assert torch.equal(transform.inverse(q, layer), want)
    assert torch.equal(q, before), "queries must stay for 16-bit pages"


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_rotated_queries_are_those_of_the_reference(dim: int) -> None:
    q = torch.randn(3, H, 4, dim, generator=torch.Generator().manual_seed(1))
    got = Hadamard(dim).inverse(q, 0)
    torch.testing.assert_close(got, reference.unrotated_keys(q), rtol=1e-5, atol=1e-5)
    for dtype in DTYPES:
        w = query_rotation(dim, dtype, torch.device("cpu"))
        assert torch.equal(w.float(), query_rotation(dim, torch.float32, torch.device("cpu"))), "not exact"
        assert torch.equal(w, Hadamard(dim).matrices[dtype]) and w.dtype == dtype


@pytest.mark.parametrize("name", KEY_TRANSFORMS)
def test_restored_keys_invert_the_reference(name: str) -> None:
    transform = Coding(transform_of(name, 64)).pick(1).key_transform
    x = torch.randn(H, P, 64)
    back = reference.restored_keys(reference.transformed_keys(x, transform), transform)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)


# -- what kernels are told -----------------------------------------------------------------------------------


def test_edges_are_those_of_the_clip_factors() -> None:
    clip = clips_of()
    edges = Coding(key_clip=clip).edges(K)
    assert edges is not None and edges.dtype == torch.int32
    assert torch.equal(edges, clip_edges(clip))
    assert Coding(key_clip=clip).read_arguments(1, L)["key_clip"].tolist() == clip[1].tolist()  # type: ignore[attr-defined]
    assert Coding().edges(K) is None and Coding().read_arguments(0, L)["key_clip"] is None
    coding = Coding(key_clip=clip)
    assert coding.edges(K) is coding.edges(K), "made at every wave"


@pytest.mark.parametrize("clip", [None, clips_of()])
@pytest.mark.parametrize("name", KEY_TRANSFORMS)
def test_arguments_of_the_copy_kernel(name: str, clip: torch.Tensor | None) -> None:
    """Of one set of names whatever the coding; an arena of values alone has nothing of what is done to keys."""
    transform = transform_of(name, 128)
    coding = Coding(transform, clip)
    arguments = partial(coding.copy_arguments, layers=L, shape=PageShape(P, H, 128, 128), device=torch.device("cpu"))
    got = arguments((K,))
    assert got["scale0"] is (transform.scale if isinstance(transform, Scaled) else None)
    assert got["ROTATE"] == (2.0**-4 if name == "hadamard" else 0.0)  # 128 = 2^(4 + 3)
    flags = got["rotated0"]
    assert flags.tolist() == [1] * L if isinstance(flags, torch.Tensor) else name != "hadamard"
    assert got["edges0"] is coding.edges(K) and got["rotated1"] is got["center0"] is None
    assert arguments((K, V))["rotated1"] is None
    none = arguments((V,))
    assert set(none) == set(got) and none.pop("ROTATE") == 0.0 and set(none.values()) == {None}
    assert arguments((K,)) is got, "made at every wave"


@pytest.mark.parametrize("sides", [(K, V), (K,), (V,)])
def test_rotated_layers_by_side(sides: tuple[int, ...]) -> None:
    """Transforms differ from layer to layer and from side to side; a layer that is not scaled is divided by 1."""
    scale = transform_of("scale", 64)
    mixed = PerLayer((Hadamard(64), scale.pick(slice(1, 2)), Transform()))
    coding = Coding(mixed, value_transform=PerLayer((Transform(), Hadamard(64), Hadamard(64))))
    got = coding.copy_arguments(sides, L, PageShape(P, H, 64, 64), torch.device("cpu"))
    flags = {K: [1, 0, 0], V: [0, 1, 1]}
    for name, side in zip(("rotated0", "rotated1"), sides, strict=False):
        assert isinstance(got[name], torch.Tensor) and got[name].tolist() == flags[side]
        assert got[name].dtype == torch.int32
    assert got["ROTATE"] == 2.0**-3
    assert isinstance(scale, Scaled)
    if sides[0] == K:
        want = torch.stack([torch.ones(H, 64), scale.scale[1], torch.ones(H, 64)])
        assert isinstance(got["scale0"], torch.Tensor) and torch.equal(got["scale0"], want)
    else:
        assert got["scale0"] is got["rotated1"] is None
    assert [coding.read_arguments(layer, L)["TURN_VALUES"] for layer in range(L)] == [False, True, True]


@pytest.mark.parametrize("style", ["neox", "interleaved", "partial"])
def test_arguments_of_a_centre(style: str) -> None:
    """The very tensors of the centre, which are filled in place, and what they say is R_m c and q·R_m c."""
    (center,) = on_one_table([random_center(3, L, PageShape(P, H, 64, 64), 80, style)], "cpu", torch.float16)
    assert center is not None
    coding = Coding(center=center)
    copy = coding.copy_arguments((K, V), L, PageShape(P, H, 64, 64), torch.device("cpu"))
    assert copy["center0"] is center.factors and copy["center_stride"] == L * H * 64
    assert copy["rotary"] is center.rotary.values and copy["channel_at"] is center.rotary.channel_at
    flat, m = center.rotary.values.flatten(), 37
    at = center.rotary.channel_at.long() + m * 16
    got = center.factors[0] * flat[at] + center.factors[1] * flat[at + 8]
    want = torch.stack([reference_center(coding, layer, m) for layer in range(L)])
    assert torch.equal(got, want)
    q = torch.randn(H, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for layer in range(L):
        read = coding.read_arguments(layer, L)
        n = len(center.blocks[layer])
        assert read["CENTER_BLOCKS"] == n == coding.center_blocks(layer)
        if not n:
            assert read["center"] is read["center_places"] is read["rotary"] is None
            continue
        assert read["center_places"] is center.places[layer] and read["rotary"] is center.rotary.values
        assert read["center"].data_ptr() == center.factors[0, layer].data_ptr()  # type: ignore[attr-defined]
        channels = center.rotary.block_channels[center.places[layer]].long().view(n, 2, 8)
        products = q.float() * center.factors[:, layer, :, None]  # [2, H, M, D]
        rows = products[..., channels[:, 0]] + products[..., channels[:, 1]]  # [2, H, M, n, 8]
        assert torch.equal(rows.movedim(0, -2).flatten(2), coding.center_queries(q, layer))  # type: ignore[arg-type]


def reference_center(coding: Coding, layer: int, position: int) -> torch.Tensor:
    term = reference.center_term(coding.pick(layer), torch.tensor([position]))
    return torch.zeros(H, 64) if term is None else term[:, 0]


# -- parts of a coding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEY_TRANSFORMS)
def test_pick(name: str) -> None:
    coding = Coding(transform_of(name, 64), clips_of())
    one, some = coding.pick(1), coding.pick(slice(1, 3))
    assert one.key_clip is not None and some.key_clip is not None and coding.key_clip is not None
    assert torch.equal(one.key_clip, coding.key_clip[1]) and torch.equal(some.key_clip, coding.key_clip[1:])
    if isinstance(coding.key_transform, Scaled):
        assert isinstance(one.key_transform, Scaled) and isinstance(some.key_transform, Scaled)
        assert torch.equal(one.key_transform.scale, coding.key_transform.scale[1])
        assert torch.equal(some.key_transform.scale, coding.key_transform.scale[1:])
    else:
        assert one.key_transform == some.key_transform == coding.key_transform
    assert Coding(transform_of(name, 64)).pick(0).key_clip is None
    assert torch.equal(some.edges(K), coding.edges(K)[1:])  # type: ignore[arg-type,index]


def test_a_picked_coding_keeps_no_edges_of_the_whole() -> None:
    coding = Coding(key_clip=clips_of())
    before = coding.edges(K)
    assert before is not None
    assert torch.equal(coding.pick(2).edges(K), before[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KEY_TRANSFORMS)
@pytest.mark.parametrize("finals", [(2, 2), (2, 16), (4, 4), (8, 2), (16, 2), (16, 16)])
def test_a_group_keeps_what_its_widths_use(finals: tuple[int, int], name: str) -> None:
    """Keys that stay at 16 bits are not transformed; only those that reach 2 bits are clipped."""
    given = Coding(transform_of(name, 64), clips_of())
    got = given.for_group(LayerGroup((4, 5, 6), *finals), PageShape(16, H, 64, 32), "cpu")
    assert got.key_transform.name == ("none" if finals[0] == 16 else name)
    assert (got.key_clip is not None) == (finals[0] == 2)
    if got.key_clip is not None:
        assert torch.equal(got.key_clip, given.key_clip) and got.key_clip.dtype == torch.float32
    if isinstance(got.key_transform, Scaled):
        assert torch.equal(got.key_transform.scale, given.key_transform.scale)  # type: ignore[attr-defined]


def test_tensors_of_a_group_are_contiguous_fp32() -> None:
    scale = torch.rand(L, 64, H, dtype=torch.float64).transpose(1, 2) + 0.5
    clip = clips_of(H, L).double().T
    got = Coding(Scaled(scale), clip).for_group(LayerGroup((0, 1, 2), 2, 2), PageShape(16, H, 64, 64), "cpu")
    assert isinstance(got.key_transform, Scaled) and got.key_clip is not None
    for tensor, want in ((got.key_transform.scale, scale), (got.key_clip, clip)):
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and torch.equal(tensor, want.float())


@pytest.mark.parametrize("final", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("coding", "says"),
    [
        (Coding(Scaled(torch.ones(L, H, 128))), "key scales must have shape (3, 2, 64), got (3, 2, 128)"),
        (Coding(Scaled(torch.ones(H, 64))), "key scales must have shape (3, 2, 64), got (2, 64)"),
        (Coding(Scaled(torch.zeros(L, H, 64))), "key scales must be positive and finite everywhere"),
        (Coding(Scaled(torch.full((L, H, 64), torch.inf))), "key scales must be positive and finite everywhere"),
        (Coding(Scaled(torch.full((L, H, 64), torch.nan))), "key scales must be positive and finite everywhere"),
        (Coding(Hadamard(128)), "a rotation of 128 channels does not fit head_dim 64"),
        (Coding(key_clip=torch.ones(L)), "clip factors of keys must have shape (3, 2), got (3,)"),
        (Coding(key_clip=torch.zeros(L, H)), "clip factors of keys must be above 0 and at most 1 everywhere"),
        (Coding(key_clip=torch.full((L, H), 1.01)), "clip factors of keys must be above 0 and at most 1 everywhere"),
        (Coding(key_clip=torch.full((L, H), torch.nan)), "clip factors of keys must be above 0 and at most 1"),
    ],
    ids=range(10),
)
def test_what_does_not_fit_a_group_is_refused(coding: Coding, says: str, final: int) -> None:
    """Also where the group would drop it."""
    with pytest.raises(ValueError) as error:
        coding.for_group(LayerGroup((0, 1, 2), final, final), PageShape(16, H, 64, 64), "cpu")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("name", "scale", "says"),
    [
        ("rotation", None, f"key transform must be one of {KEY_TRANSFORMS}, got 'rotation'"),
        ("", None, f"key transform must be one of {KEY_TRANSFORMS}, got ''"),
        ("scale", None, "key transform 'scale' without key scales"),
        ("none", torch.ones(L, H, 64), "key transform 'none' with key scales"),
        ("hadamard", torch.ones(L, H, 64), "key transform 'hadamard' with key scales"),
    ],
)
def test_transforms_that_are_refused(name: str, scale: torch.Tensor | None, says: str) -> None:
    """Keys are scaled or rotated, never both."""
    with pytest.raises(ValueError) as error:
        key_transform(name, 64, scale)
    assert str(error.value) == says


def test_transforms_by_name() -> None:
    assert key_transform("none", 64) == Transform()
    assert key_transform("hadamard", 64) == Hadamard(64) != Transform()
    scale = torch.ones(L, H, 64)
    scaled = key_transform("scale", 64, scale)
    assert isinstance(scaled, Scaled) and scaled.scale is scale
    assert {transform_of(name, 64).name for name in KEY_TRANSFORMS} == set(KEY_TRANSFORMS)


def test_a_coding_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Coding().key_clip = torch.ones(1)  # type: ignore[misc]


# -- where codings come from ---------------------------------------------------------------------------------


def test_a_calibration_of_layers_that_differ() -> None:
    """Each layer its transforms and its centre, whatever the group's order and the rank's heads."""
    calibration, turn = layered(), torch.arange(96)[:, None] * torch.rand(32)
    rotary = RotaryTable.of(turn.cos(), turn.sin(), 64)
    vector = torch.from_numpy(calibration.tensors["key_center"])
    scale = torch.from_numpy(calibration.tensors["key_scale"])
    with pytest.raises(ValueError, match="the calibration centres keys, and the model has no rotary table"):
        Coding.from_calibration(calibration, (1, 0), slice(0, 2))
    assert Coding.from_calibration(calibration, (1,), slice(0, 2)).center is None  # this group needs none
    for layers in ((0, 1), (1, 0)):
        for heads in (slice(0, 2), slice(1, 2)):
            coding = Coding.from_calibration(calibration, layers, heads, rotary)
            first = layers.index(0)
            assert isinstance(coding.key_transform, PerLayer) and isinstance(coding.value_transform, PerLayer)
            assert coding.key_transform.rotated(2)[1 - first] and not coding.key_transform.rotated(2)[first]
            assert coding.value_transform.rotated(2) == coding.key_transform.rotated(2)
            own = coding.key_transform.pick(first)
            assert isinstance(own, Scaled) and torch.equal(own.scale, scale[0, heads])
            assert coding.center is not None and coding.center.blocks[1 - first] == ()
            assert torch.equal(coding.center.vector[first], rounded(vector[0, heads]))  # spread is small: all blocks
            shape = PageShape(16, heads.stop - heads.start, 64, 64)
            coding.for_group(LayerGroup(layers, 4, 2), shape, "cpu")  # fits


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", KEY_TRANSFORMS)
def test_from_a_calibration(name: str, clipped: bool) -> None:
    """The layers of a group, in its order, and the heads of a rank."""
    tensors: dict[str, Any] = dict(example().tensors)
    if name != "scale":
        tensors.pop("key_scale")
    if not clipped:
        tensors.pop("key_clip")
    calibration = example(transform=name, tensors=tensors)
    for layers in ((0,), (1, 0), (0, 1)):
        for heads in (slice(0, 2), slice(1, 2)):
            coding = Coding.from_calibration(calibration, layers, heads)
            assert coding.key_transform.name == name
            assert (coding.key_clip is not None) == clipped
            if coding.key_clip is not None:
                assert np.array_equal(coding.key_clip.numpy(), tensors["key_clip"][list(layers), heads])
            if isinstance(coding.key_transform, Scaled):
                assert np.array_equal(coding.key_transform.scale.numpy(), tensors["key_scale"][list(layers), heads])
            shape = PageShape(16, heads.stop - heads.start, 64, 64)
            coding.for_group(LayerGroup(layers, 2, 2), shape, "cpu")  # fits
    if name == "hadamard":
        assert coding.key_transform == Hadamard(64)


GROUP = LayerGroup(tuple(range(L)), 2, 2)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("name", DATA_FREE_TRANSFORMS)
def test_without_a_calibration(name: str, group_size: int) -> None:
    """A name is what is done to keys, and values stay plain."""
    coding = Coding.default(name, GROUP, PageShape(16, H, 128, group_size))
    assert coding.key_transform == (Hadamard(128) if name == "hadamard" else Transform())
    assert coding.value_transform == Transform() and coding.center is None
    if name == "hadamard":
        assert coding.key_clip is not None
        assert torch.equal(coding.key_clip, torch.full((L, H), NORMAL_CLIPS[group_size]))
    else:
        assert coding.key_clip is None


@pytest.mark.parametrize(("finals", "rotated"), [
    ((16, 16), (False, False)), ((8, 8), (False, False)), ((8, 2), (False, True)), ((4, 4), (True, False)),
    ((4, 2), (True, True)), ((2, 8), (True, False)), ((2, 2), (True, True)),
])  # fmt: skip
def test_what_is_chosen_by_final_widths(finals: tuple[int, int], rotated: tuple[bool, bool]) -> None:
    coding = Coding.default("auto", LayerGroup((0, 1, 2), *finals), PageShape(16, H, 64, 64))
    assert (coding.key_transform == Hadamard(64), coding.value_transform == Hadamard(64)) == rotated
    assert (coding.key_clip is not None) == rotated[0]


def test_scales_need_a_calibration() -> None:
    with pytest.raises(ValueError, match="key transform 'scale' without key scales"):
        Coding.default("scale", GROUP, PageShape(16, H, 64, 64))
    assert set(DATA_FREE_TRANSFORMS) == set(KEY_TRANSFORMS) - {"scale"}


@pytest.mark.parametrize("side", SIDES)
def test_a_new_coding_does_nothing(side: int) -> None:
    x, q = torch.randn(L, 2, H, P, 64), torch.randn(2, H, 4, 64)
    assert Coding().transformed(side, x) is x and Coding().queries(q, 0) is q and Coding().edges(side) is None
