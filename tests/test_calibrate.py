"""``pmkvq calibrate`` and ``inspect`` from end to end on small models, interruptions included."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.servers import REASONER
from sglang_pmkvq import artifact
from sglang_pmkvq.calib import reparam, sensitivity
from sglang_pmkvq.calib import run as calib_run
from sglang_pmkvq.calib.candidates import Search, chosen_values
from sglang_pmkvq.calib.corpus import Sample
from sglang_pmkvq.calib.model import CalibrationModel, observing
from sglang_pmkvq.calib.run import Settings, calibrate
from sglang_pmkvq.calib.sensitivity import WIDTHS
from sglang_pmkvq.calib.show import table
from sglang_pmkvq.formats import (
    GROUP_SIZES,
    KEY_CENTERS,
    KEY_TRANSFORMS,
    LayerGroup,
    PageShape,
    geometry_for_pages,
    groups_from_finals,
)
from sglang_pmkvq.kernels.coding import NORMAL_CLIPS, Coding
from sglang_pmkvq.kernels.reference.codes import fake_quantize
from sglang_pmkvq.kernels.rotary import rounded
from sglang_pmkvq.kernels.transforms import Hadamard, Scaled, Transform
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.serving.calibration import load_for
from sglang_pmkvq.serving.config import PmkvqConfigError
from sglang_pmkvq.serving.configuration import Configuration, layer_finals, rank_heads
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.pool_setup import PoolSetup
from sglang_pmkvq.serving.sizing import Limits
from sglang_pmkvq.tools.cli import build_parser, main
from tests.support.models import make_model


def token_file(path: Path, rows: int = 6, length: int = 40) -> Path:
    rng = np.random.default_rng(0)
    path.write_text("\n".join(json.dumps({"input_ids": rng.integers(2, 512, length).tolist()}) for _ in range(rows)))
    return path


def codings_of(
    calibration: artifact.Calibration, groups: tuple[LayerGroup, ...], heads: slice = slice(0, 4)
) -> list[Coding]:
    return [Coding.from_calibration(calibration, group.layers, heads) for group in groups]


def settings(model: Path, data: Path, **changes: Any) -> Settings:
    base = Settings(
        str(model), str(data), "3", samples=4, seq_len=32, effective="128", kl_samples=2, max_groups=3,
        transform="scale", center="none",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, data)."""
    folder = tmp_path_factory.mktemp("small")
    return make_model(folder / "model", "qwen3", kv_heads=4, layers=3), token_file(folder / "d.jsonl")


@pytest.mark.parametrize(
    ("architecture", "facts"),
    [
        ("llama", {"dtype": torch.float16}),
        ("qwen2", {"heads": 8, "kv_heads": 1}),
        ("qwen3", {"heads": 4, "kv_heads": 4}),
        ("mistral", {"heads": 6, "kv_heads": 2, "head_dim": 128}),
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_architectures(architecture: str, facts: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Biases, QK-norm, grouped queries, both 16-bit checkpoints, computed in fp32 and in 16 bits."""
    model = make_model(tmp_path / "model", architecture, layers=2, **facts)
    got = calibrate(
        settings(model, token_file(tmp_path / "d.jsonl"), dtype=dtype), tmp_path / "out.safetensors", quiet=True
    )
    kv_heads, head_dim = facts.get("kv_heads", 2), facts.get("head_dim", 64)
    assert got.tensors["key_scale"].shape == (2, kv_heads, head_dim)
    assert got.tensors["key_scale"].dtype == np.float32
    clip = got.tensors.get("key_clip")
    if any(k == 2 for k, _ in got.finals):
        assert clip is not None and clip.shape == (2, kv_heads) and clip.dtype == np.float32
        for layer, (k_bits, _) in enumerate(got.finals):
            assert k_bits == 2 or (clip[layer] == 1).all()
        assert clip.min() < 1  # whole ranges are far from the best that 2 bits can do
    else:
        assert clip is None
    for name in ("taylor", "kl"):
        assert got.tensors[name].shape == (2, 2, 3)
        assert np.isfinite(got.tensors[name]).all()
    assert (got.tensors["taylor"][..., 2] > got.tensors["taylor"][..., 0]).all()  # 2 bits hurt more than 8
    assert got.bytes_per_token <= got.report["budget_bytes_per_token"]
    read = artifact.load(tmp_path / "out.safetensors")
    assert read.finals == got.finals
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "model", "out.safetensors"]


def test_interrupted_run_ends_the_same(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = small
    whole = calibrate(settings(model, data), tmp_path / "whole.safetensors", quiet=True)

    monkeypatch.setattr("sglang_pmkvq.calib.sweep.SAVE_EVERY_S", -1.0)
    real, calls = sensitivity.observe_taylor, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(sensitivity, "observe_taylor", failing)
    out = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(settings(model, data), out, quiet=True)
    assert not out.exists()
    work = tmp_path / "parts.safetensors.work"
    assert {p.stem for p in work.iterdir()} >= {"ranges", "alphas", "codings", "taylor"}
    resumed = calibrate(settings(model, data), out, quiet=True)
    assert calls == 5  # two before, two after: nothing ran twice
    assert resumed.finals == whole.finals
    assert resumed.objective == whole.objective
    for name, tensor in whole.tensors.items():
        assert np.array_equal(resumed.tensors[name], tensor), name
    assert not work.exists()


def test_partial_results_of_another_version_are_not_used(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulators of the same name and shape may have meant something else."""
    model, data = small
    work = tmp_path / "work"
    with monkeypatch.context() as older:
        older.setattr(calib_run, "STATE_VERSION", 1)
        calibrate(settings(model, data), tmp_path / "a", work, quiet=True)
    real, calls = sensitivity.observe_taylor, 0

    def counting(*args: Any) -> None:
        nonlocal calls
        calls += 1
        real(*args)

    monkeypatch.setattr(sensitivity, "observe_taylor", counting)
    calibrate(settings(model, data), tmp_path / "b", work, quiet=True)
    assert calls == 4


def test_partial_results_of_other_data_are_not_used(small: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = small
    work = tmp_path / "work"
    first = calibrate(settings(model, data), tmp_path / "a", work, quiet=True)
    other = calibrate(settings(model, data, seed=1, samples=3), tmp_path / "b", work, quiet=True)
    fresh = calibrate(settings(model, data, seed=1, samples=3), tmp_path / "c", quiet=True)
    assert np.array_equal(other.tensors["taylor"], fresh.tensors["taylor"])
    assert not np.array_equal(other.tensors["taylor"], first.tensors["taylor"])


def test_another_target_reuses_partial_results(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = small
    work = tmp_path / "work"
    calibrate(settings(model, data), tmp_path / "a", work, quiet=True)

    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity, "observe_taylor", never)
    monkeypatch.setattr(sensitivity, "observe_kl", never)
    got = calibrate(settings(model, data, target="2", sensitivity="taylor"), tmp_path / "b", work, quiet=True)
    assert got.finals == ((2, 2),) * 3
    assert got.sensitivity == "taylor"


def test_transform_none_and_16_bit_layers(small: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = small
    got = calibrate(settings(model, data, transform="none", widths=(2, 16), target="9"), tmp_path / "a", quiet=True)
    assert "key_scale" not in got.tensors
    assert {bits for pair in got.finals for bits in pair} == {2, 16}
    groups = groups_from_finals(list(got.finals))
    assert [c.key_transform for c in codings_of(got, groups)] == [Transform()] * len(groups)


def test_rotated_keys(small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scales anywhere; keys, and they alone, are measured and clipped as rotated ones are quantized."""
    model, data = small
    monkeypatch.setattr("sglang_pmkvq.calib.reparam.observe_alphas", None)
    got, plain = (
        calibrate(settings(model, data, transform=name, target="2"), tmp_path / name, quiet=True)
        for name in ("hadamard", "none")
    )
    assert "key_scale" not in got.tensors and "key_center" not in got.tensors
    for name in ("taylor", "kl"):
        assert (got.tensors[name][:, 0] != plain.tensors[name][:, 0]).all(), name
        assert np.array_equal(got.tensors[name][:, 1], plain.tensors[name][:, 1]), name
    assert not np.array_equal(got.tensors["key_clip"], plain.tensors["key_clip"])
    read = artifact.load(tmp_path / "hadamard")
    assert (read.transform, plain.transform) == ("hadamard", "none")
    assert set(read.transforms) == {"hadamard"} and read.report["alphas"] == [None] * 3
    assert read.centers == ("none",) * 3
    assert read.summary()["transform"] == "hadamard" and read.summary()["clipped"]
    assert "transform        hadamard" in table(read)
    assert [c.key_transform for c in codings_of(read, read.groups)] == [Hadamard(64)] * len(read.groups)


# --- the choice, layer by layer ---

# A bias of a few rotary pairs that turn slowly, as real models have it, far above all that varies.
BIAS = {channel: 200.0 * (-1) ** channel for channel in (*range(24, 32), *range(56, 64))}


def bias_keys(model: Path, layer: int, pairs: dict[int, float]) -> Path:
    """Give one layer a key bias of these channels and all others none."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("k_proj.bias"):
            tensor.zero_()
            if f".{layer}." in name:
                for channel, value in pairs.items():
                    tensor.view(-1, 64)[:, channel] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, data): layer 1 of 3 has a key bias."""
    folder = tmp_path_factory.mktemp("biased")
    model = bias_keys(make_model(folder / "model", "qwen2", layers=3), 1, BIAS)
    return model, token_file(folder / "d.jsonl", length=80)


AUTO: dict[str, Any] = {"transform": "auto", "center": "auto", "seq_len": 64, "effective": "256"}


@pytest.fixture(scope="module")
def chosen(biased: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, artifact.Calibration]:
    """(file, what is in it) of a choice among everything, at 4 bits."""
    path = tmp_path_factory.mktemp("c") / "c.safetensors"
    return path, calibrate(settings(*biased, target="4", widths=(4,), **AUTO), path, quiet=True)


@pytest.mark.slow
def test_a_biased_layer_is_centred(chosen: tuple[Path, artifact.Calibration]) -> None:
    """By what was measured: at 4 bits the error is far below that of all that is done around no centre."""
    got = chosen[1]
    assert got.finals == ((4, 4),) * 3
    assert got.centers[1] in ("bias", "mean")
    assert got.report["center_pairs"][1] >= 8
    errors = got.report["key_errors"][1]
    assert set(errors) == {f"{c}+{t}" for c in KEY_CENTERS for t in KEY_TRANSFORMS}
    best = errors[f"{got.centers[1]}+{got.transforms[1]}"]
    assert best == min(errors.values())
    assert best * 10 <= min(error for name, error in errors.items() if name.startswith("none"))


def test_the_choice_is_the_least_error_of_each_layer(chosen: tuple[Path, artifact.Calibration]) -> None:
    """Nothing is chosen unmeasured, and no layer without a bias has one for a centre."""
    path, got = chosen
    for layer, errors in enumerate(got.report["key_errors"]):
        assert errors[f"{got.centers[layer]}+{got.transforms[layer]}"] == min(errors.values())
        assert any(name.startswith("bias") for name in errors) == (layer == 1)
        assert (got.report["alphas"][layer] is not None) == (got.transforms[layer] == "scale")
        assert (got.report["center_pairs"][layer] > 0) == (got.centers[layer] != "none")
    text = table(artifact.load(path)).splitlines()
    assert text[-2].split()[:5] == ["1", "4", "4", got.transforms[1], got.centers[1]]


def test_a_centred_file_is_read_back_as_it_was_measured(
    biased: tuple[Path, Path], chosen: tuple[Path, artifact.Calibration]
) -> None:
    """The coding that the server makes of the file leaves keys as close as calibration said: centred ones."""
    model = CalibrationModel.load(str(biased[0]))
    read, rotary = artifact.load(chosen[0]), model.rotary(64)
    with pytest.raises(ValueError, match="the calibration centres keys, and the model has no rotary table"):
        Coding.from_calibration(read, (0, 1, 2), slice(0, 2))
    coding = Coding.from_calibration(read, (0, 1, 2), slice(0, 2), rotary)
    assert coding.center is not None
    assert [8 * len(blocks) for blocks in coding.center.blocks] == read.report["center_pairs"]
    sample = Sample(np.random.default_rng(5).integers(2, 512, 64))

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == 1:
            off, plain = (
                (fake_quantize(k[0].float(), 4, 64, c) - k[0]).abs().max() for c in (coding.pick(1), Coding())
            )
            assert off * 8 < plain
        return k, v

    with observing(observer):
        model.hidden(sample)
    alone = Coding.from_calibration(read, (2, 1), slice(1, 2), rotary)  # another group, another rank
    assert alone.center is not None
    assert torch.equal(alone.center.vector[1], coding.center.vector[1][1:])


@pytest.mark.parametrize("transform", KEY_TRANSFORMS)
@pytest.mark.parametrize("center", KEY_CENTERS)
def test_a_name_restricts_the_choice(
    biased: tuple[Path, Path], tmp_path: Path, transform: str, center: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a centre is too small to be one, keys stay around none. No α is tried where nothing is scaled."""
    if transform != "scale":
        monkeypatch.setattr("sglang_pmkvq.calib.reparam.observe_alphas", None)
    changes = {**AUTO, "transform": transform, "center": center, "sensitivity": "taylor", "kl_samples": 0}
    got = calibrate(settings(*biased, target="2", samples=2, **changes), tmp_path / "a", quiet=True)
    assert set(got.transforms) == {transform} == {got.transform}
    assert got.centers[1] == center and set(got.centers) <= {"none", center}
    if center == "bias":
        assert got.centers == ("none", "bias", "none")
        bias = load_file(biased[0] / "model.safetensors")["model.layers.1.self_attn.k_proj.bias"]
        kept = got.tensors["key_center"][1]
        assert np.array_equal(kept[kept != 0], rounded(bias.float().view(2, 64)).numpy()[kept != 0])
        assert (kept[:, [*range(24, 32), *range(56, 64)]] != 0).all()
    assert ("key_scale" in got.tensors) == (transform == "scale")
    assert ("key_center" in got.tensors) == ("key_spread" in got.tensors) == (center != "none")
    assert got.tensors["key_clip"].min() < 1
    assert artifact.load(tmp_path / "a").summary()["centers"] == got.summary()["centers"]


def test_scales_that_break_a_layer_are_not_chosen(tmp_path: Path) -> None:
    """The two channels of a huge pair end the range of their group, so plain codes have them exactly; scaled by their
    maxima they are in its middle, where a step is large, and queries that look at that pair miss. Just short of α = 1
    is best, α = 1 worse than no scale: the choice must see it."""
    model = bias_keys(make_model(tmp_path / "m", "qwen2", layers=2), 1, {28: 50.0, 60: -50.0})
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"].view(-1, 64)[:, [28, 60]] = torch.tensor([30.0, -30.0]).bfloat16()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = token_file(tmp_path / "d.jsonl", length=80)
    changes = {**AUTO, "transform": "scale", "center": "none", "sensitivity": "taylor", "kl_samples": 0}
    work = tmp_path / "work"
    got = calibrate(settings(model, data, target="4", widths=(4,), **changes), tmp_path / "a", work, quiet=True)
    by_alpha = load_file(work / "alphas.safetensors")["error"][0, 1].sum(0)[WIDTHS.index(4)]
    assert by_alpha[-1] > by_alpha[0] and by_alpha[-1] > 50 * by_alpha.min()
    assert max(got.report["alphas"][1]) < 1
    auto = calibrate(
        settings(model, data, target="4", widths=(4,), **changes | {"transform": "auto"}), tmp_path / "b", quiet=True
    )
    errors = auto.report["key_errors"][1]
    assert errors[f"none+{auto.transforms[1]}"] == min(errors.values())
    assert errors["none+scale"] == got.report["key_errors"][1]["none+scale"] < errors["none+none"] / 3


def test_scales_are_not_measured_on_what_they_were_fitted_to(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of α and of candidates are apart, and a lone sample serves both."""
    seen: dict[str, list[tuple[int, ...]]] = {"observe_alphas": [], "observe_codings": []}

    def noting(name: str, real: Any) -> Any:
        def observe(model: Any, sample: Sample, *rest: Any) -> None:
            seen[name].append(tuple(sample.tokens))
            real(model, sample, *rest)

        return observe

    for name in seen:
        monkeypatch.setattr(reparam, name, noting(name, getattr(reparam, name)))
    calibrate(settings(*small, sensitivity="taylor", kl_samples=0, samples=5), tmp_path / "a", quiet=True)
    fitted, measured = map(set, seen.values())
    assert (len(fitted), len(measured)) == (3, 2) and not fitted & measured
    for tokens in seen.values():
        tokens.clear()
    calibrate(settings(*small, sensitivity="taylor", kl_samples=0, samples=1), tmp_path / "b", quiet=True)
    fitted, measured = map(set, seen.values())
    assert fitted == measured and len(fitted) == 1


def test_choices_prefer_the_simpler_on_a_tie(biased: tuple[Path, Path]) -> None:
    search = Search(("none", "hadamard"), KEY_CENTERS, {}, {}, {}, 64)
    state = {"keys": torch.ones(2, 1, 2, 3, 13, dtype=torch.float64), "energy": torch.ones(2, 1, dtype=torch.float64)}
    state["keys"][1, :, 1, 0] = 0.5
    state["values"] = torch.ones(2, 1, 2, 3, dtype=torch.float64)
    got = search.chosen(state, (0, 0))
    assert got.transforms == ("none", "hadamard") and got.centers == ("none", "none")
    assert search.chosen(state, (1, None)).transforms == ("none", "none")
    assert chosen_values(state, (0, 2)) == ("none", "none")
    state["values"][0, :, 1, 2] = 0.9
    assert chosen_values(state, (2, 2)) == ("hadamard", "none")
    assert chosen_values(state, (None, 0)) == ("none", "none")


def test_heads_have_their_own_clip_factors_and_layers_one_transform() -> None:
    """The least sum over heads of what each head has at its best factor."""
    state = {"keys": torch.full((1, 2, 2, 3, 13), 9.0, dtype=torch.float64), "energy": torch.ones(1, 2)}
    state["keys"][0, 0, 0, 2, 3] = 1.0
    state["keys"][0, 1, 0, 2, 5] = 4.0
    state["keys"][0, 0, 1, 2, 0] = 3.0
    state["keys"][0, 1, 1, 2, 7] = 1.5
    search = Search(("none", "hadamard"), KEY_CENTERS, {}, {}, {}, 64)
    got = search.chosen(state, (2,))
    assert got.transforms == ("hadamard",)
    assert got.clip.tolist() == [[1.0, pytest.approx(reparam.CLIPS[7])]]


def test_what_measures_best_serves_sensitivities_and_file_alike(biased: tuple[Path, Path], tmp_path: Path) -> None:
    """Widths apart: the file has for each layer the choice at the width that it ends at."""
    work = tmp_path / "work"
    changes = {**AUTO, "sensitivity": "taylor", "kl_samples": 0}
    uniform = {
        bits: calibrate(settings(*biased, target=str(bits), widths=(bits,), **changes), tmp_path / "u", work, True)
        for bits in (2, 4, 8)
    }
    mixed = calibrate(settings(*biased, target="3.5", **changes), tmp_path / "m", work, quiet=True)
    assert len(set(mixed.finals)) > 1
    for layer, (k_bits, v_bits) in enumerate(mixed.finals):
        keys, values = uniform[k_bits], uniform[v_bits]
        assert (mixed.transforms[layer], mixed.centers[layer]) == (keys.transforms[layer], keys.centers[layer])
        assert mixed.value_transforms[layer] == values.value_transforms[layer]
        if k_bits == 2:
            assert np.array_equal(mixed.tensors["key_clip"][layer], keys.tensors["key_clip"][layer])
        if mixed.transforms[layer] == "scale":
            assert np.array_equal(mixed.tensors["key_scale"][layer], keys.tensors["key_scale"][layer])


def test_without_clipping(small: tuple[Path, Path], tmp_path: Path) -> None:
    """Unwanted, or nothing ends at 2 bits."""
    model, data = small
    got = calibrate(settings(model, data, clip=False), tmp_path / "a", quiet=True)
    assert any(k == 2 for k, _ in got.finals) and "key_clip" not in got.tensors
    assert [c.key_clip for c in codings_of(got, got.groups)] == [None] * len(got.groups)
    assert got.summary()["clipped"] is False
    wide = calibrate(settings(model, data, widths=(4, 8), target="5"), tmp_path / "b", quiet=True)
    assert "key_clip" not in wide.tensors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transform": "rotation"}, "--transform rotation: rotations fitted to a covariance did not help"),
        ({"transform": "pca"}, "--transform pca"),
        ({"center": "median"}, "--center median: expected one of auto, none, bias, mean"),
        ({"center": "bias"}, "--center bias: the keys of this model have no bias; use mean, none or auto"),
        ({"sensitivity": "hessian"}, "--sensitivity hessian"),
        ({"sensitivity": "kl", "kl_samples": 0}, "--kl-samples"),
        ({"widths": (2, 3)}, "--widths 2,3"),
        ({"samples": 0}, "--samples"),
        ({"seq_len": 31}, "--seq-len at least 32"),
        ({"max_groups": 0}, "--max-groups 0"),
        ({"group_size": 128}, "--group-size 128 does not divide this model's head_dim 64; use one of 32, 64"),
        ({"target": "1"}, "bytes per token are infeasible; the smallest budget for widths 2, 4, 8 is"),
        ({"effective": "16"}, "--effective-len 16"),
    ],
)
def test_refused_settings(small: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        calibrate(settings(*small, **changes), tmp_path / "a", quiet=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gemma2"}, "this model is 'gemma2'"),
        ({"head_dim": 96}, "this model has 96"),
        ({"sliding_window": 4096}, "sliding window of 4096 tokens"),
    ],
)
def test_refused_architectures(change: dict[str, Any], says: str) -> None:
    from sglang_pmkvq.calib.model import check_architecture

    config = SimpleNamespace(model_type="mistral", head_dim=64, sliding_window=None)
    check_architecture(config)
    with pytest.raises(ValueError, match=says):
        check_architecture(SimpleNamespace(**vars(config) | change))


def test_commands(small: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "model.pmkvq.safetensors")
    line = ["calibrate", "--model", str(small[0]), "--data", str(small[1]), "--out", out, "--target-bits", "3"]
    line += ["--samples", "2", "--seq-len", "32", "--kl-samples", "1"]
    assert main(line) == 0
    assert "written" in capsys.readouterr().out
    assert main(["inspect", out, "--out", str(tmp_path / "p.png")]) == 0
    shown = capsys.readouterr().out
    for word in ("bytes per token", "layer group", "Spearman", "K at 2", "sha256", "loss", "clip"):
        assert word in shown
    assert "  transform centre   J  values " in shown
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert main([*line[:-1], "1", "--target-bits", "1B"]) == 2
    assert "infeasible" in capsys.readouterr().err
    Path(out).write_bytes(b"")
    assert main(["inspect", out]) == 2
    assert "truncated" in capsys.readouterr().err


# --- what the server makes of it ---


@pytest.fixture(scope="module")
def calibration(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, calibration file)."""
    path = tmp_path_factory.mktemp("c") / "c.safetensors"
    calibrate(settings(*small), path, quiet=True)
    return small[0], path


def arguments(model: Path, path: Path, **flags: Any) -> Any:
    from sglang_pmkvq.serving.server_args import PmkvqServerArgs

    return PmkvqServerArgs(
        model_path=str(model), device="cpu", kv_quant="pmkvq", pmkvq_calibration=str(path),
        skip_tokenizer_init=True, **flags,
    )  # fmt: skip


def text_of(finals: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{i}:k{k}v{v}" for i, (k, v) in enumerate(finals))


def test_server_arguments_take_a_calibration(calibration: tuple[Path, Path]) -> None:
    finals = artifact.load(calibration[1]).finals
    args = arguments(*calibration)
    assert layer_finals(args, 3, load_for(args)) == list(finals)
    arguments(*calibration, pmkvq_final_bits=text_of(finals), pmkvq_group_size=64)  # says the same
    with pytest.raises(PmkvqConfigError, match="made for 3 layers, this server runs 4"):
        layer_finals(args, 4, load_for(args))


def test_refused_beside_other_flags(calibration: tuple[Path, Path]) -> None:
    with pytest.raises(PmkvqConfigError, match=r"--pmkvq-final-bits 16 asks for others; leave one of the two out"):
        arguments(*calibration, pmkvq_final_bits="16")
    with pytest.raises(PmkvqConfigError, match="--pmkvq-group-size 32 asks for others"):
        arguments(*calibration, pmkvq_group_size=32)
    with pytest.raises(PmkvqConfigError, match="transform scale, --pmkvq-key-transform hadamard asks for another"):
        arguments(*calibration, pmkvq_key_transform="hadamard")
    arguments(*calibration, pmkvq_key_transform="auto", pmkvq_key_center="auto")  # nothing is asked for
    for center in ("none", "bias"):
        with pytest.raises(PmkvqConfigError, match=f"--pmkvq-key-center {center} asks for something else; leave"):
            arguments(*calibration, pmkvq_key_center=center)


@pytest.mark.parametrize("channels", GROUP_SIZES)
def test_clip_factors_of_normal_variates(channels: int) -> None:
    """Of the hundredths those of least squared error; the error is flat there, so one more is allowed for chance."""
    x = torch.randn(4000, channels, generator=torch.Generator().manual_seed(channels))
    shares = [i / 100 for i in range(50, 91)]
    codings = [Coding(key_clip=torch.tensor([c])) for c in shares]
    errors = [(fake_quantize(x[None], 2, channels, c)[0] - x).square().mean().item() for c in codings]
    assert abs(shares[int(np.argmin(errors))] - NORMAL_CLIPS[channels]) < 0.015


def test_rotation_without_a_calibration() -> None:
    """2-bit keys are clipped, wider ones are not; the summary says what is done."""
    groups = groups_from_finals([(2, 2), (4, 2), (16, 16), (2, 2)])
    shape = PageShape(16, 4, 64, 32)
    codings = tuple(Coding.default("hadamard", g, shape) for g in groups)
    geometry = geometry_for_pages(shape, groups, 8, 2)
    configuration = Configuration(shape, groups, codings, PolicyConfig())
    setup = PoolSetup(configuration, geometry, Limits(1, 16, 2), geometry.total_bytes, 64)
    pool = MixedPrecisionTokenPool(setup, 128, 16, torch.bfloat16, 4, 64, 4, "cpu", False)
    clips = [s.coding.key_clip for s in pool.storages]
    assert [None if c is None else c.unique().tolist() for c in clips] == [
        [pytest.approx(NORMAL_CLIPS[32])] if g.k_final == 2 else None for g in groups
    ]
    assert clips[0] is not None and clips[0].shape == (2, 4)
    used = [s.coding.key_transform for s in pool.storages]
    assert used == [Transform() if g.k_final == 16 else Hadamard(64) for g in groups]
    told = [g["key_transform"] for g in setup.summary()["groups"]]  # type: ignore[attr-defined]
    assert told == ["none" if g.k_final == 16 else "hadamard" for g in groups]
    assert setup.summary()["key_transform"] == "mixed" and "key transform hadamard" in setup.log_line()
    configuration = dataclasses.replace(configuration, codings=(Coding(),) * len(groups))
    plain = dataclasses.replace(setup, configuration=configuration)
    assert plain.summary()["key_transform"] == "none" and "key transform hadamard" not in plain.log_line()


def test_refused_before_memory_is_taken(calibration: tuple[Path, Path], tmp_path: Path) -> None:
    """Missing, damaged, and made for another model: all while the arguments are read."""
    model, path = calibration
    with pytest.raises(PmkvqConfigError, match="--pmkvq-calibration .* no such calibration file"):
        arguments(model, tmp_path / "none")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PmkvqConfigError, match="--pmkvq-calibration .* truncated"):
        arguments(model, tmp_path / "cut")
    with pytest.raises(PmkvqConfigError, match="--pmkvq-calibration .* made for a model with 3 layers"):
        arguments(REASONER, path)
    twin = make_model(tmp_path / "twin", "qwen3", kv_heads=4, layers=3, seed=1)
    with pytest.raises(PmkvqConfigError, match="--pmkvq-calibration .* other weights"):
        arguments(twin, path)


@pytest.mark.parametrize(
    ("total", "size", "slices"),
    [(4, 1, [(0, 4)]), (4, 2, [(0, 2), (2, 4)]), (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)])],
)
def test_heads_of_a_rank(total: int, size: int, slices: list[tuple[int, int]]) -> None:
    assert [rank_heads(total, size, rank) for rank in range(size)] == [slice(a, b) for a, b in slices]


def test_key_scales_of_groups_and_ranks(calibration: tuple[Path, Path]) -> None:
    c = artifact.load(calibration[1])
    whole = torch.from_numpy(c.tensors["key_scale"])
    for group, coding in zip(c.groups, codings_of(c, c.groups, slice(2, 4)), strict=True):
        assert isinstance(coding.key_transform, Scaled)
        assert torch.equal(coding.key_transform.scale, whole[list(group.layers)][:, 2:4])


def test_clip_factors_of_groups_and_ranks(calibration: tuple[Path, Path]) -> None:
    c = artifact.load(calibration[1])
    whole = torch.from_numpy(c.tensors["key_clip"])
    assert any(g.k_final == 2 for g in c.groups)
    for group, coding in zip(c.groups, codings_of(c, c.groups, slice(2, 4)), strict=True):
        clip = coding.for_group(group, PageShape(16, 2, 64, 64), "cpu").key_clip
        if group.k_final != 2:
            assert clip is None
        else:
            assert clip is not None and torch.equal(clip, whole[list(group.layers), 2:4])


def test_pool_holds_the_scales_of_its_groups(calibration: tuple[Path, Path]) -> None:
    """What start-up hands to the pool ends in the storage that codes are made and read with."""
    c = artifact.load(calibration[1])
    geometry = geometry_for_pages(PageShape(16, 4, 64, 64), c.groups, 8, 2)
    codings = tuple(codings_of(c, c.groups))
    configuration = Configuration(geometry.shape, c.groups, codings, PolicyConfig(), c.summary())
    setup = PoolSetup(configuration, geometry, Limits(1, 16, 2), geometry.total_bytes, 64)
    pool = MixedPrecisionTokenPool(setup, 128, 16, torch.bfloat16, 4, 64, c.num_layers, "cpu", False)
    for layer in range(c.num_layers):
        group, index = pool.place(layer)
        held = pool.storages[group].coding.key_transform
        assert isinstance(held, Scaled)
        assert np.array_equal(held.scale[index].numpy(), c.tensors["key_scale"][layer])
        clip = pool.storages[group].coding.key_clip
        if c.finals[layer][0] == 2:
            assert clip is not None and np.array_equal(clip[index].numpy(), c.tensors["key_clip"][layer])
        else:
            assert clip is None
    assert "calibrated for" in setup.log_line()
    assert json.dumps(setup.summary())  # what /server_info sends
    turned = tuple(dataclasses.replace(coding, key_transform=Hadamard(64)) for coding in codings)
    setup = dataclasses.replace(setup, configuration=dataclasses.replace(configuration, codings=turned))
    rotated = MixedPrecisionTokenPool(setup, 128, 16, torch.bfloat16, 4, 64, c.num_layers, "cpu", False)
    for storage in rotated.storages:
        assert storage.coding.key_transform == (Transform() if storage.group.k_final == 16 else Hadamard(64))


def test_the_command_and_settings_have_the_same_defaults() -> None:
    args = vars(build_parser().parse_args(["calibrate", "--model", "m", "--data", "d", "--out", "o"]))
    said = {**args, "target": args["target_bits"], "effective": str(4 * args["seq_len"])}
    said["widths"] = tuple(map(int, args["widths"].split(",")))
    assert args["effective_len"] is None
    assert Settings("m", "d") == Settings(**{f.name: said[f.name] for f in dataclasses.fields(Settings)})


def test_tokenizer_is_optional(small: tuple[Path, Path]) -> None:
    assert calib_run.load_tokenizer(str(small[0])) is None
    assert calib_run.load_tokenizer(str(REASONER)) is not None
