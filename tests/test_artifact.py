"""The calibration file: what is written is read back, and every kind of damage is named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from benchmarks.harness.servers import REASONER
from sglang_pmkvq import artifact
from sglang_pmkvq.artifact import ArtifactError, Calibration
from sglang_pmkvq.calib.show import table
from sglang_pmkvq.formats import KEY_TRANSFORMS

CONFIG = SimpleNamespace(
    model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=512, head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip


def example(transform: str = "scale", **changes: Any) -> Calibration:
    """Keys of both layers with one transform, uncentred, values as they are."""
    finals = ((4, 2), (8, 4))
    values: dict[str, Any] = {
        "model": "a/b",
        "config_sha256": artifact.config_digest(CONFIG),
        "weights_sha256": None,
        "data": {"source": "x.txt", "samples": 1, "tokens": 2, "sha256": "00"},
        "seed": 3,
        "num_kv_heads": 2,
        "head_dim": 64,
        "group_size": 64,
        "finals": finals,
        "transforms": (transform, transform),
        "centers": ("none", "none"),
        "value_transforms": ("none", "none"),
        "effective_lens": (8192,),
        "widths": (2, 4, 8),
        "sensitivity": "taylor",
        "objective": 1.5,
        "objective_unbounded": 1.25,
        "bytes_per_token": artifact.token_bytes(2, 64, 64, finals),
        "report": {"widths": [8, 4, 2]},
        "tensors": {
            "key_scale": np.exp(np.random.default_rng(0).normal(size=(2, 2, 64))).astype(np.float32),
            "key_clip": np.array([[0.6, 0.75], [1, 1]], dtype=np.float32),
            "taylor": np.ones((2, 2, 3)),
        },
    }
    return Calibration(**values | changes)


def layered(**changes: Any) -> Calibration:
    """Layer 0 scaled around a mean, layer 1 rotated around nothing, with rotated values."""
    scale, center = example().tensors["key_scale"].copy(), np.zeros((2, 2, 64), np.float32)
    scale[1] = 1
    center[0] = np.random.default_rng(1).normal(size=(2, 64))
    spread = np.array([[3.0, 0.0], [0.0, 0.0]], np.float32)
    values: dict[str, Any] = {
        "transforms": ("scale", "hadamard"),
        "centers": ("mean", "none"),
        "value_transforms": ("none", "hadamard"),
        "tensors": {**example().tensors, "key_scale": scale, "key_center": center, "key_spread": spread},
    }
    return example(**values | changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    artifact.save(example(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["pmkvq"])
    return header


def rewrite(path: Path, header: Any, tensors: dict[str, np.ndarray] | None = None) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or load_file(path), path, metadata={"pmkvq": text})


@pytest.mark.parametrize("wrote", [example(), layered()], ids=["alike", "layered"])
def test_round_trip(wrote: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact.save(wrote, path)
    read = artifact.load(path)
    for field in dataclasses.fields(Calibration):
        if field.name != "tensors":
            assert getattr(read, field.name) == getattr(wrote, field.name), field.name
    assert read.tensors.keys() == wrote.tensors.keys()
    for name, tensor in wrote.tensors.items():
        assert np.array_equal(read.tensors[name], tensor)
        assert read.tensors[name].dtype == tensor.dtype
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing partial stays behind
    assert read.mean_bits == 4.5
    assert [g.layers for g in read.groups] == [(0,), (1,)]


def test_header_holds_what_is_promised(path: Path) -> None:
    header = header_of(path)
    assert header["schema"] == artifact.SCHEMA
    assert len(header["sha256"]) == 64
    for name in ("model", "config_sha256", "data", "seed", "group_size", "finals", "transform", "bytes_per_token"):
        assert name in header
    assert header["transform"] == "scale"


def test_the_summary_of_transforms(tmp_path: Path) -> None:
    """Layers at 16 bits are not transformed, whatever they say."""
    artifact.save(layered(), tmp_path / "a")
    assert header_of(tmp_path / "a")["transform"] == layered().transform == "mixed"
    assert layered().summary() | {"transforms": {"scale": 1, "hadamard": 1}, "centers": {"mean": 1, "none": 1}} == (
        layered().summary() | {"value_transforms": {"none": 1, "hadamard": 1}}
    )
    finals = ((16, 2), (8, 4))
    assert layered(finals=finals).transform == "hadamard"
    assert example("hadamard", finals=((16, 16),) * 2).transform == "hadamard"


def test_bytes_per_token_are_those_of_formats() -> None:
    """1 head of 128 channels at 4 and 2 bits: 64 + 32 bytes of codes, 4 bytes of (zero, range) each."""
    assert artifact.token_bytes(1, 128, 128, ((4, 2),)) == 64 + 32 + 4 + 4
    assert artifact.token_bytes(1, 128, 128, ((16, 16),)) == 512


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such calibration file; make one with `pmkvq calibrate`"):
        artifact.load(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="truncated, or not a safetensors file"):
        artifact.load(path)


def test_pickle_is_not_read(path: Path) -> None:
    import pickle

    path.write_bytes(pickle.dumps({"finals": [4, 4]}))
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        artifact.load(path)


def test_some_other_safetensors_file(path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a calibration"):
        artifact.load(REASONER / "model.safetensors")
    save_file({"weight": np.zeros(2)}, path)
    with pytest.raises(ArtifactError, match="not a calibration"):
        artifact.load(path)
    rewrite(path, "not json", {"weight": np.zeros(2)})
    with pytest.raises(ArtifactError, match="not a calibration"):
        artifact.load(path)


def test_every_changed_byte_of_the_tensors_is_seen(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="do not match their SHA-256"):
        artifact.load(path)


@pytest.mark.parametrize(("field", "value"), [("finals", [[2, 2], [8, 4]]), ("seed", 4), ("bytes_per_token", 1)])
def test_changed_header(path: Path, field: str, value: object) -> None:
    rewrite(path, header_of(path) | {field: value})
    with pytest.raises(ArtifactError, match="do not match their SHA-256"):
        artifact.load(path)


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_unknown_version(path: Path, version: object) -> None:
    rewrite(path, header_of(path) | {"schema": version})
    with pytest.raises(ArtifactError, match="schema version .* this version of sglang-pmkvq reads 1, 2 and 3"):
        artifact.load(path)


LAYER_FIELDS = ("transforms", "centers", "value_transforms")


def older(path: Path, schema: int, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Rewrite a file as an older version wrote it: one transform for all layers."""
    tensors = {name: t for name, t in load_file(path).items() if name not in drop}
    header = {k: v for k, v in header_of(path).items() if k not in LAYER_FIELDS}
    rewrite(path, signed(header | {"schema": schema} | changes, tensors), tensors)


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize("transform", KEY_TRANSFORMS)
def test_older_schemas_are_read(path: Path, schema: int, transform: str) -> None:
    """Into the same fields. Files of schema 1 are from before clip factors: ranges whole."""
    drop = ("key_clip",) * (schema == 1) + ("key_scale",) * (transform != "scale")
    older(path, schema, drop, transform=transform)
    read = artifact.load(path)
    assert read.finals == example().finals
    assert (read.transform, read.transforms) == (transform, (transform, transform))
    assert read.centers == read.value_transforms == ("none", "none")
    for name in ("key_scale", "key_clip"):
        assert name in drop or np.array_equal(read.tensors[name], example().tensors[name])
    assert (read.key_clip((0, 1), slice(0, 2)) is None) == (schema == 1)
    assert read.summary()["clipped"] is (schema == 2)
    assert read.key_center((0,), slice(0, 1)) is None is read.key_spread((0,), slice(0, 1))


def test_a_file_that_an_older_version_wrote() -> None:
    path = REASONER.parents[1] / "results" / "reasoner-2.5.pmkvq.safetensors"
    read = artifact.load(path)
    assert header_of(path)["schema"] == 2
    assert read.transform == header_of(path)["transform"] and set(read.transforms) == {read.transform}
    assert set(read.centers) == set(read.value_transforms) == {"none"}
    assert len(read.transforms) == len(read.centers) == len(read.value_transforms) == read.num_layers
    assert f"transform        {read.transform}" in table(read)


@pytest.mark.parametrize(
    ("schema", "change", "says"),
    [
        (2, {"transform": "mixed"}, "unknown transform 'mixed'"),
        (2, {"centers": ["none", "none"]}, "missing or unknown"),
        (3, {}, "missing or unknown"),
    ],
)
def test_schemas_do_not_mix(path: Path, schema: int, change: dict[str, Any], says: str) -> None:
    older(path, schema, **change)
    with pytest.raises(ArtifactError, match=says):
        artifact.load(path)


def test_centres_of_an_older_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    artifact.save(example(tensors=example().tensors), path)
    tensors = load_file(path) | {name: layered().tensors[name] for name in ("key_center", "key_spread")}
    header = {k: v for k, v in header_of(path).items() if k not in LAYER_FIELDS} | {"schema": 2}
    rewrite(path, signed(header, tensors), tensors)
    with pytest.raises(ArtifactError, match="disagree"):
        artifact.load(path)


def test_clip_factors_of_layers_and_heads(path: Path) -> None:
    read, whole = artifact.load(path), example().tensors["key_clip"]
    got = read.key_clip((0,), slice(1, 2))
    assert got is not None and np.array_equal(got, whole[:1, 1:])
    assert read.summary()["clipped"] is True


def signed(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    body = {k: v for k, v in header.items() if k != "sha256"}
    return body | {"sha256": artifact._digest(body, tensors)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"finals": [[3, 2], [8, 4]]}, "final widths"),
        ({"finals": [[4, 2]]}, "key_scale must be"),
        ({"finals": [[4]]}, "malformed header"),
        ({"group_size": 48}, "group size 48"),
        ({"transforms": ["rotation", "scale"]}, "unknown transform 'rotation'"),
        ({"transforms": ["hadamard", "hadamard"]}, "disagree"),
        ({"transforms": ["hadamard", "scale"]}, "key_scale of layer 0, whose transform is hadamard, must be 1"),
        ({"transforms": ["scale"]}, "transforms has 1 names for 2 layers"),
        ({"transforms": "scale"}, "malformed header"),
        ({"transform": "hadamard"}, "disagrees with its layers"),
        ({"centers": ["mean", "none"]}, "centers .* disagree"),
        ({"centers": ["median", "none"]}, "unknown center 'median'"),
        ({"centers": ["none", 1]}, "malformed header"),
        ({"value_transforms": ["scale", "none"]}, "unknown value_transform 'scale'"),
        ({"value_transforms": []}, "value_transforms has 0 names for 2 layers"),
        ({"bytes_per_token": 1}, "do not follow from the widths"),
        ({"surprise": 1}, "missing or unknown"),
    ],
)
def test_fields_that_do_not_fit(path: Path, change: dict[str, Any], says: str) -> None:
    """Also with a digest that is right: a file made by other code."""
    tensors = load_file(path)
    rewrite(path, signed(header_of(path) | change, tensors), tensors)
    with pytest.raises(ArtifactError, match=says):
        artifact.load(path)


def with_tensor(name: str, tensor: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = {k: t for k, t in layered().tensors.items() if k != name}
    return tensors if tensor is None else tensors | {name: tensor}


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("key_center", None, "centers .* disagree"),
        ("key_spread", None, "centers .* disagree"),
        ("key_center", np.ones((2, 2, 32), np.float32), "key_center must be float32"),
        ("key_center", np.ones((2, 2, 64)), "key_center must be float32"),
        ("key_center", np.full((2, 2, 64), np.inf, np.float32), "key_center must be finite"),
        ("key_center", np.ones((2, 2, 64), np.float32), "key_center of layer 1, whose center is none"),
        ("key_center", np.zeros((2, 2, 64), np.float32), "key_center of layer 0, whose center is mean"),
        ("key_spread", np.ones((2, 1), np.float32), "key_spread must be float32"),
        ("key_spread", np.full((2, 2), -1, np.float32), "key_spread must be finite and not negative"),
        ("key_spread", np.full((2, 2), np.nan, np.float32), "key_spread must be finite and not negative"),
        ("key_scale", np.full((2, 2, 64), 2, np.float32), "key_scale of layer 1, whose transform is hadamard"),
    ],
)
def test_centres_that_do_not_fit(tmp_path: Path, name: str, tensor: np.ndarray | None, says: str) -> None:
    with pytest.raises(ArtifactError, match=says):
        artifact.save(layered(tensors=with_tensor(name, tensor)), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_centres_of_layers_and_heads(tmp_path: Path) -> None:
    artifact.save(layered(), tmp_path / "x")
    read = artifact.load(tmp_path / "x")
    center, spread = read.key_center((1, 0), slice(1, 2)), read.key_spread((1, 0), slice(1, 2))
    assert center is not None and np.array_equal(center, layered().tensors["key_center"][[1, 0], 1:])
    assert spread is not None and np.array_equal(spread, layered().tensors["key_spread"][[1, 0], 1:])


def test_rotated_keys_have_no_scales(tmp_path: Path) -> None:
    tensors = {name: t for name, t in example().tensors.items() if name != "key_scale"}
    artifact.save(example("hadamard", tensors=tensors), tmp_path / "x")
    read = artifact.load(tmp_path / "x")
    assert (read.transform, example().transform) == ("hadamard", "scale")
    assert read.key_scale((0, 1), slice(0, 2)) is None and read.key_clip((0, 1), slice(0, 2)) is not None
    assert read.summary()["transform"] == "hadamard"


def test_unknown_tensors(path: Path) -> None:
    """What a reader would not look at may have been meant to be."""
    tensors = load_file(path) | {"value_clip": np.ones((2, 2), np.float32)}
    rewrite(path, signed(header_of(path), tensors), tensors)
    with pytest.raises(ArtifactError, match="unknown tensors .'value_clip'."):
        artifact.load(path)


@pytest.mark.parametrize(
    "scale",
    [np.ones((2, 2, 32), np.float32), np.ones((2, 2, 64)), np.zeros((2, 2, 64), np.float32)],
    ids=["shape", "dtype", "zero"],
)
def test_scales_that_do_not_fit(tmp_path: Path, scale: np.ndarray) -> None:
    with pytest.raises(ArtifactError, match="key_scale must be"):
        artifact.save(example(tensors={"key_scale": scale}), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "clip",
    [np.ones((2, 1), np.float32), np.ones((2, 2)), *(np.full((2, 2), x, np.float32) for x in (0, 1.1, np.nan))],
    ids=["shape", "dtype", "zero", "above 1", "nan"],
)
def test_clip_factors_that_do_not_fit(tmp_path: Path, clip: np.ndarray) -> None:
    with pytest.raises(ArtifactError, match="key_clip must be"):
        artifact.save(example(tensors=example().tensors | {"key_clip": clip}), tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 3}, "2 layers .* this one has 3"),
        ({"num_key_value_heads": 4}, "2 KV heads .* this one has 4"),
        ({"head_dim": 128}, "64 head_dim .* this one has 128"),
        ({"vocab_size": 1024}, "configuration differs"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "configuration differs"),
    ],
)
def test_wrong_model(change: dict[str, Any], says: str) -> None:
    artifact.check_model(example(), "f", CONFIG)
    with pytest.raises(ArtifactError, match=says):
        artifact.check_model(example(), "f", SimpleNamespace(**vars(CONFIG) | change))


def test_old_and_new_rope_fields_are_one() -> None:
    old = {k: v for k, v in vars(CONFIG).items() if k != "rope_parameters"} | {"rope_theta": 1e4, "rope_scaling": None}
    assert artifact.config_digest(SimpleNamespace(**old)) == artifact.config_digest(CONFIG)


def test_other_weights_of_the_same_architecture(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"w": np.full(8, value)}, tmp_path / name / "model.safetensors")
    mine = example(weights_sha256=artifact.weights_digest(tmp_path / "a"))
    artifact.check_model(mine, "f", CONFIG, str(tmp_path / "a"))
    with pytest.raises(ArtifactError, match="other weights of the same architecture"):
        artifact.check_model(mine, "f", CONFIG, str(tmp_path / "b"))
    assert artifact.weights_digest(tmp_path) is None


FLIPS = 1000


def test_bit_flips_are_refused_or_harmless(path: Path) -> None:
    """At 1,000 random bits of the whole file; nothing but ArtifactError, and what loads says what was written."""
    data, wrote = path.read_bytes(), example()
    rng = np.random.default_rng(0)
    refused = 0
    for bit in rng.integers(0, 8 * len(data), FLIPS).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(damaged))
        try:
            read = artifact.load(path)
        except ArtifactError:
            refused += 1
            continue
        for field in dataclasses.fields(Calibration):
            if field.name != "tensors":
                assert getattr(read, field.name) == getattr(wrote, field.name), (bit, field.name)
        assert all(np.array_equal(read.tensors[name], wrote.tensors[name]) for name in wrote.tensors), bit
    assert refused > 0.95 * FLIPS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["transform", *(f.name for f in dataclasses.fields(Calibration) if f.name != "tensors")]),
    value=JSON,
)
def test_any_value_in_a_signed_header_is_refused_or_usable(path: Path, field: str, value: object) -> None:
    """Whoever writes such a file can sign it, so a digest that is right proves nothing about its fields."""
    artifact.save(layered(), path)
    tensors = load_file(path)
    header = header_of(path) | {field: value}
    try:
        header = signed(header, tensors)
    except ValueError:  # no digest can be made of NaN and Infinity, but such a file can
        pass
    rewrite(path, header, tensors)
    try:
        read = artifact.load(path)
    except ArtifactError:
        return
    # All that a server does with it.
    json.dumps(read.summary())
    assert len(read.groups) >= 1
    assert read.key_scale((0,), slice(0, 1)) is not None
    assert read.key_clip((0,), slice(0, 1)) is not None
    assert read.key_center((0,), slice(0, 1)) is not None
    assert read.transform in (*KEY_TRANSFORMS, "mixed")
    with contextlib.suppress(ArtifactError):
        artifact.check_model(read, "f", CONFIG)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), keep=st.integers(0, 400))
def test_any_bytes_are_refused(path: Path, data: bytes, keep: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:keep] + data)
    with pytest.raises(ArtifactError):
        artifact.load(path)
    path.write_bytes(whole)
