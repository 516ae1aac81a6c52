"""The calibration file: save, load, check. No torch and no SGLang: a server reads it before it takes memory.

One safetensors file. Its metadata hold one key, ``pmkvq``: a JSON header with everything but the tensors, and
``sha256`` over the rest of the header and the bytes of all tensors. Loading verifies format, schema version,
digest, field types and shapes, in this order; ``check_model`` compares with the model that is to be served.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_pmkvq.formats import (
    DATA_FREE_TRANSFORMS,
    GROUP_SIZES,
    HEAD_DIMS,
    KEY_CENTERS,
    KEY_TRANSFORMS,
    TIERS,
    LayerGroup,
    PageShape,
    groups_from_finals,
    page_bytes,
)

# 2 added the tensor ``key_clip``, 3 what is done layer by layer: transforms of keys and values, and centres. Older
# files say one transform of keys for all layers. A transform needs no new number: a reader refuses those that it does
# not know.
SCHEMA = 3
READ_SCHEMAS = (1, 2, 3)
METADATA_KEY = "pmkvq"
# What the summary ``transform`` says where layers differ.
MIXED = "mixed"

# What decides keys, values and their shapes. Names that configurations of one architecture share.
_FACTS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SLICE_BYTES = 1 << 16


class ArtifactError(ValueError):
    """A calibration file cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Calibration:
    """Everything that a calibration decided, and what it was decided from.

    Attributes:
        model: name or path of the model, for people.
        config_sha256: digest of ``config_facts``.
        weights_sha256: ``weights_digest`` of the model folder, or None if it was not known.
        data: corpus: source, samples, tokens, sha256.
        seed: of the corpus sampling.
        num_kv_heads: KV heads of the whole model, H.
        head_dim: channels per head, D.
        group_size: channels that share one (zero, range) pair, G.
        finals: (K final, V final) bits of each layer.
        transforms: of keys, per layer: ``none``, ``scale`` (per-channel key scales, paper eq. 9, 10) or ``hadamard``
            (rotated).
        centers: what is subtracted from keys before that, per layer: ``none``, ``bias`` (the model's own key bias) or
            ``mean`` (of keys before the rotary embedding).
        value_transforms: of values, per layer: ``none`` or ``hadamard``.
        effective_lens: effective lengths of positional interpolation, tokens (paper eq. 12).
        widths: final widths that allocation could choose from.
        sensitivity: ``taylor`` (paper eq. 5) or ``kl`` (measured): what allocation minimized.
        objective: its sum at ``finals``; ``objective_unbounded`` without the bound on layer groups.
        bytes_per_token: of K and V over all layers and heads at ``finals``, scales and zeros included.
        report: further figures for people (rank correlation, times), JSON.
        tensors: ``key_scale`` fp32 [L, H, D] if some layer is scaled, 1 in the others; ``key_center`` fp32 [L, H, D],
            what is taken off, and ``key_spread`` fp32 [L, H], the energy of keys around their whole centre, if some
            layer is centred, 0 in the others;
            ``key_max`` fp32 [L, H, D]; ``taylor`` and optionally ``kl`` fp64 [L, 2, W] for K and V at
            ``report["widths"]``; optionally ``key_clip`` fp32 [L, H]: the middle share of their range that 2-bit
            codes of keys span, 1 where keys stay wider.
    """

    model: str
    config_sha256: str
    weights_sha256: str | None
    data: dict[str, Any]
    seed: int
    num_kv_heads: int
    head_dim: int
    group_size: int
    finals: tuple[tuple[int, int], ...]
    transforms: tuple[str, ...]
    centers: tuple[str, ...]
    value_transforms: tuple[str, ...]
    effective_lens: tuple[int, ...]
    widths: tuple[int, ...]
    sensitivity: str
    objective: float
    objective_unbounded: float
    bytes_per_token: int
    report: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @property
    def num_layers(self) -> int:
        return len(self.finals)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return groups_from_finals(list(self.finals))

    @property
    def mean_bits(self) -> float:
        """Mean final width over layers and sides, codes only."""
        return sum(k + v for k, v in self.finals) / (2 * len(self.finals))

    @property
    def transform(self) -> str:
        """That of keys in all layers that are quantized, or ``mixed``."""
        names = {name for name, (k_bits, _) in zip(self.transforms, self.finals, strict=True) if k_bits < 16}
        names = names or set(self.transforms)
        return names.pop() if len(names) == 1 else MIXED

    def key_scale(self, layers: tuple[int, ...], heads: slice) -> np.ndarray | None:
        """fp32 [len(layers), heads, D] of the key scales, or None if no keys are scaled."""
        return self._picked("key_scale", layers, heads)

    def key_clip(self, layers: tuple[int, ...], heads: slice) -> np.ndarray | None:
        """fp32 [len(layers), heads] of the clip factors, or None if ranges are whole."""
        return self._picked("key_clip", layers, heads)

    def key_center(self, layers: tuple[int, ...], heads: slice) -> np.ndarray | None:
        """fp32 [len(layers), heads, D] of the centres of keys, or None if no keys are centred."""
        return self._picked("key_center", layers, heads)

    def key_spread(self, layers: tuple[int, ...], heads: slice) -> np.ndarray | None:
        """fp32 [len(layers), heads], the energy of keys around their centres, or None if no keys are centred."""
        return self._picked("key_spread", layers, heads)

    def _picked(self, name: str, layers: tuple[int, ...], heads: slice) -> np.ndarray | None:
        tensor = self.tensors.get(name)
        return None if tensor is None else np.ascontiguousarray(tensor[list(layers), heads])

    def summary(self) -> dict[str, Any]:
        """For logs and ``/server_info``: small, JSON."""
        return {
            "model": self.model,
            "transform": self.transform,
            "transforms": _counts(self.transforms),
            "centers": _counts(self.centers),
            "value_transforms": _counts(self.value_transforms),
            "clipped": "key_clip" in self.tensors,
            "mean_bits": self.mean_bits,
            "bytes_per_token": self.bytes_per_token,
            "data_sha256": self.data.get("sha256"),
            "seed": self.seed,
        }


def _counts(names: Sequence[str]) -> dict[str, int]:
    """Layers of each kind, the most frequent first."""
    return dict(Counter(names).most_common())


def token_bytes(num_kv_heads: int, head_dim: int, group_size: int, finals: tuple[tuple[int, int], ...]) -> int:
    """Bytes of K and V of one token at its final widths over all layers, scales and zeros included."""
    shape = PageShape(16, num_kv_heads, head_dim, group_size)
    groups = groups_from_finals(list(finals))
    return sum(page_bytes(shape, g, g.final_step) for g in groups) // shape.page_size


def config_facts(config: Any) -> dict[str, Any]:
    """What a calibration depends on, from a ``transformers`` configuration (or one like it)."""
    facts: dict[str, Any] = {name: getattr(config, name, None) for name in _FACTS}
    heads = facts["num_attention_heads"] or 1
    facts["num_key_value_heads"] = facts["num_key_value_heads"] or heads
    facts["head_dim"] = getattr(config, "head_dim", None) or facts["hidden_size"] // heads
    # transformers 5 keeps theta and scaling in one dictionary, older configurations apart.
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    facts["rope"] = {key: rope[key] for key in sorted(rope) if rope[key] is not None}
    return facts


def config_digest(config: Any) -> str:
    """SHA-256 of ``config_facts``, hexadecimal."""
    return hashlib.sha256(_canonical(config_facts(config))).hexdigest()


def weights_digest(folder: str | os.PathLike[str]) -> str | None:
    """SHA-256 over names, sizes and three 64-KiB slices of every safetensors file; None if there is none.

    Tells fine-tuned weights from their base without reading gigabytes; it is no proof of identity.
    """
    files = sorted(Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as data:
            for start in (0, max(0, size // 2 - _SLICE_BYTES // 2), max(0, size - _SLICE_BYTES)):
                data.seek(start)
                digest.update(data.read(_SLICE_BYTES))
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(_canonical(header))
    for name in sorted(tensors):
        data = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{data.dtype.str}:{list(data.shape)};".encode())
        digest.update(data.tobytes())
    return digest.hexdigest()


def save(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration; the file appears whole or not at all.

    Raises:
        ArtifactError: the calibration does not hold together. OSError: it cannot be written, a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    _validate(calibration, str(path))
    header = {k: v for k, v in asdict(calibration).items() if k != "tensors"}
    header = json.loads(_canonical({"schema": SCHEMA, "transform": calibration.transform, **header}))
    header["sha256"] = _digest(header, calibration.tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    tensors = {name: np.ascontiguousarray(t) for name, t in calibration.tensors.items()}
    partial.unlink(missing_ok=True)  # or a link of this name would be followed
    try:
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(header, sort_keys=True)})
        partial.chmod(0o644)  # safetensors makes it private; the server may run as another user
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Calibration:
    """Read and verify a calibration.

    Raises:
        ArtifactError: no such file, truncated, not a calibration, unknown schema version, changed since it
            was written, or fields and shapes that do not fit together.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    if not os.path.isfile(name):
        raise ArtifactError(f"{name}: no such calibration file; make one with `pmkvq calibrate`")
    try:
        with safe_open(name, framework="np") as file:
            metadata = file.metadata() or {}
            # Weights given by mistake may be gigabytes, and of types that numpy does not have.
            keys = file.keys() if METADATA_KEY in metadata else []
            tensors = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{name}: truncated, or not a safetensors file ({error}); calibrate again or copy it again"
        ) from error
    try:
        header = json.loads(metadata[METADATA_KEY])
        schema = header.pop("schema")
        stored = header.pop("sha256")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{name}: a safetensors file, but not a calibration: it has no pmkvq header") from error
    if schema not in READ_SCHEMAS:
        known = f"{', '.join(map(str, READ_SCHEMAS[:-1]))} and {READ_SCHEMAS[-1]}"
        raise ArtifactError(
            f"{name}: schema version {schema!r}, this version of sglang-pmkvq reads {known}; calibrate again"
        )
    try:
        digest = _digest({"schema": schema, **header}, tensors)
    except (ValueError, RecursionError) as error:  # NaN and infinity: JSON of other writers may have them, ours never
        raise ArtifactError(f"{name}: malformed header ({error})") from error
    if digest != stored:
        raise ArtifactError(f"{name}: its contents do not match their SHA-256; the file was damaged or changed")
    expected = set(_FIELDS) - (set(_LAYER_NAMES) if schema < 3 else set())
    if set(header) != expected:
        raise ArtifactError(f"{name}: header fields {sorted(set(header) ^ expected)} are missing or unknown")
    wrong = [field for field, value in header.items() if not _FIELDS[field](value)]
    if wrong:
        raise ArtifactError(f"{name}: malformed header ({', '.join(f'{f} is {header[f]!r:.40}' for f in wrong)})")
    transform, layers = header.pop("transform"), len(header["finals"])
    if schema < 3:
        header |= {"transforms": [transform] * layers, "centers": ["none"] * layers}
        header["value_transforms"] = ["none"] * layers
    header["finals"] = tuple((k, v) for k, v in header["finals"])
    for field in ("effective_lens", "widths", *_LAYER_NAMES):
        header[field] = tuple(header[field])
    calibration = Calibration(**header, tensors=tensors)
    _validate(calibration, name)
    if calibration.transform != transform:
        raise ArtifactError(f"{name}: transform {transform!r} disagrees with its layers, {calibration.transform!r}")
    return calibration


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _size(value: Any) -> bool:
    return _int(value) and 1 <= value < 1 << 31


def _number(value: Any) -> bool:
    return _int(value) or isinstance(value, float)


def _ints(value: Any) -> bool:
    return isinstance(value, list) and all(map(_int, value))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


# Header fields with a name per layer, and the names.
_LAYER_NAMES = {"transforms": KEY_TRANSFORMS, "centers": KEY_CENTERS, "value_transforms": DATA_FREE_TRANSFORMS}


# Type of each header field as JSON has it. A signature that is right says nothing about them.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "config_sha256", "transform", "sensitivity"), _text),
    **dict.fromkeys(("num_kv_heads", "head_dim", "group_size"), _size),
    **dict.fromkeys(("seed", "bytes_per_token"), _int),
    **dict.fromkeys(("objective", "objective_unbounded"), _number),
    **dict.fromkeys(("data", "report"), lambda value: isinstance(value, dict)),
    **dict.fromkeys(("effective_lens", "widths"), _ints),
    **dict.fromkeys(_LAYER_NAMES, _texts),
    "weights_sha256": lambda value: value is None or _text(value),
    "finals": lambda value: isinstance(value, list) and all(_ints(pair) and len(pair) == 2 for pair in value),
}

_TENSORS = {"key_scale", "key_center", "key_spread", "key_max", "key_clip", "taylor", "kl"}


def _validate(c: Calibration, name: str) -> None:
    problems = []
    if not c.finals or any(k not in TIERS or v not in TIERS for k, v in c.finals):
        problems.append(f"final widths must be {TIERS}, got {c.finals}")
    if c.head_dim not in HEAD_DIMS:
        problems.append(f"head_dim must be one of {HEAD_DIMS}, got {c.head_dim}")
    if c.group_size not in GROUP_SIZES or c.head_dim % c.group_size:
        problems.append(f"group size {c.group_size} does not fit head_dim {c.head_dim}")
    for field, known in _LAYER_NAMES.items():
        names = getattr(c, field)
        if len(names) != c.num_layers:
            problems.append(f"{field} has {len(names)} names for {c.num_layers} layers")
        unknown = sorted(set(names) - set(known))
        if unknown:
            problems.append(f"unknown {field.removesuffix('s')} {', '.join(map(repr, unknown))}")
    present = sorted(c.tensors)
    if ("scale" in c.transforms) != ("key_scale" in c.tensors):
        problems.append(f"transforms {sorted(set(c.transforms))} and tensors {present} disagree")
    centred = any(center != "none" for center in c.centers)
    if not (("key_center" in c.tensors) == ("key_spread" in c.tensors) == centred):
        problems.append(f"centers {sorted(set(c.centers))} and tensors {present} disagree")
    unknown = sorted(set(c.tensors) - _TENSORS)
    if unknown:
        problems.append(f"unknown tensors {unknown}")
    heads = (c.num_layers, c.num_kv_heads)
    channels = (*heads, c.head_dim)
    shapes = dict.fromkeys(("key_scale", "key_center", "key_max"), channels)
    for key, shape in {**shapes, "key_spread": heads, "key_clip": heads}.items():
        tensor = c.tensors.get(key)
        if tensor is not None and (tensor.shape != shape or tensor.dtype != np.float32):
            problems.append(f"{key} must be float32 {shape}, got {tensor.dtype} {tensor.shape}")
    scale = c.tensors.get("key_scale")
    if scale is not None and not bool(np.all(np.isfinite(scale) & (scale > 0))):
        problems.append("key_scale must be positive and finite")
    center, spread = c.tensors.get("key_center"), c.tensors.get("key_spread")
    if center is not None and not bool(np.isfinite(center).all()):
        problems.append("key_center must be finite")
    if spread is not None and not bool(np.all(np.isfinite(spread) & (spread >= 0))):
        problems.append("key_spread must be finite and not negative")
    if not problems:
        for layer, (transform, kind) in enumerate(zip(c.transforms, c.centers, strict=True)):
            if scale is not None and transform != "scale" and (scale[layer] != 1).any():
                problems.append(f"key_scale of layer {layer}, whose transform is {transform}, must be 1")
            if center is not None and (kind == "none") == center[layer].any():
                problems.append(f"key_center of layer {layer}, whose center is {kind}, does not fit")
    clip = c.tensors.get("key_clip")
    if clip is not None and not bool(np.all((clip > 0) & (clip <= 1))):
        problems.append("key_clip must be above 0 and at most 1")
    for key in ("taylor", "kl"):
        tensor = c.tensors.get(key)
        if tensor is not None and (tensor.ndim != 3 or tensor.shape[:2] != (c.num_layers, 2)):
            problems.append(f"{key} must be [{c.num_layers}, 2, widths], got {tensor.shape}")
    if not (math.isfinite(c.objective) and math.isfinite(c.objective_unbounded)):
        problems.append("the objective is not finite")
    if not problems and c.bytes_per_token != token_bytes(c.num_kv_heads, c.head_dim, c.group_size, c.finals):
        problems.append(f"{c.bytes_per_token} bytes per token do not follow from the widths")
    if problems:
        raise ArtifactError(f"{name}: {'; '.join(problems)}")


def check_model(c: Calibration, name: str, config: Any, folder: str | None = None) -> None:
    """Compare with the model that is to be served.

    Args:
        name: the calibration file, for messages.
        config: its ``transformers`` text configuration.
        folder: local folder of its weights, if there is one.

    Raises:
        ArtifactError: another architecture, other shapes or other weights.
    """
    facts = config_facts(config)
    for what, calibrated, served in (
        ("layers", c.num_layers, facts["num_hidden_layers"]),
        ("KV heads", c.num_kv_heads, facts["num_key_value_heads"]),
        ("head_dim", c.head_dim, facts["head_dim"]),
    ):
        if calibrated != served:
            raise ArtifactError(
                f"{name}: made for a model with {calibrated} {what} ({c.model}), this one has {served}"
            )
    if c.config_sha256 != config_digest(config):
        raise ArtifactError(
            f"{name}: made for {c.model}, whose configuration differs from this model's (same shapes); calibrate "
            "this model"
        )
    weights = weights_digest(folder) if folder else None
    if c.weights_sha256 and weights and weights != c.weights_sha256:
        raise ArtifactError(
            f"{name}: made for other weights of the same architecture ({c.model}); calibrate this model"
        )
