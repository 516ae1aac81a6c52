"""Serving from a calibration: the bundled model answers, keys are read as the file says, other architectures too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.harness.servers import REASONER, STRICT, generate_many, serve
from benchmarks.harness.tasks import problem_set, prompt_ids, random_prompts
from benchmarks.reasoner.task import check
from sglang_pmkvq import artifact
from sglang_pmkvq.calib.run import Settings, calibrate
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.transforms import Hadamard
from tests.support.models import make_model
from tests.support.oracle import CASES, Case, load, replay, serve_case
from tests.support.stock import answers

pytestmark = pytest.mark.server


# Scales do less than a rotation, so more keys have to be narrow for their effect to stand clear of bf16's rounding,
# which is not the same on all CPUs.
@pytest.mark.parametrize("transform,narrow", [("scale", 4), pytest.param("hadamard", 1, marks=pytest.mark.full)])
def test_bundled_model_is_calibrated_and_answers(transform: str, narrow: int, tmp_path: Path) -> None:
    """A few samples, the whole cache at final widths, keys of the last layers at 2 bits: right answers, and
    log-probabilities that only the transform of keys and the clip factors of the file explain."""
    path = tmp_path / "c.safetensors"
    settings = Settings(
        str(REASONER), "builtin", "5", samples=2, seq_len=400, effective="1600", widths=(4, 8), kl_samples=1,
        transform=transform, center="none",
    )  # fmt: skip
    made = calibrate(settings, path, quiet=True)
    finals = (*made.finals[:-narrow], *((2, v) for _, v in made.finals[-narrow:]))
    clip = np.ones((made.num_layers, made.num_kv_heads), np.float32)
    clip[-narrow:] = 0.6
    made = dataclasses.replace(
        made,
        finals=finals,
        bytes_per_token=artifact.token_bytes(made.num_kv_heads, made.head_dim, made.group_size, finals),
        tensors={**made.tensors, "key_clip": clip},
    )
    artifact.save(made, path)
    case = Case("calibrated", "", "static", 0, "64MiB", str(path))
    problems = problem_set(3, 30, 36, first=400)
    ids, _ = prompt_ids(REASONER, problems)
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    with serve(REASONER, case.args()) as server:
        info = server.pool()
        assert info["calibration"]["transform"] == transform and info["calibration"]["clipped"]
        assert [(tuple(g["layers"]), g["k_final"], g["v_final"]) for g in info["groups"]] == [
            (g.layers, g.k_final, g.v_final) for g in made.groups
        ]
        assert "calibrated for" in server.log() and f"transform {transform}" in server.log()
        served = serve_case(server, ids, max(p.chain_tokens for p in problems) + 16)
        assert sum(server.pool()["shrinks"].values()) > 0
        assert not server.errors()
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in served]
    assert sum(check(p, text) for p, text in zip(problems, texts, strict=True)) >= 2
    model = load(REASONER)
    plain, whole = (dataclasses.replace(case, calibration=str(tmp_path / name)) for name in ("plain", "whole"))
    tensors = {k: t for k, t in made.tensors.items() if k != "key_scale"}
    nothing = ("none",) * made.num_layers
    artifact.save(dataclasses.replace(made, transforms=nothing, tensors=tensors), plain.calibration)
    tensors = {k: t for k, t in made.tensors.items() if k != "key_clip"}
    artifact.save(dataclasses.replace(made, tensors=tensors), whole.calibration)
    as_served, untransformed, unclipped = (
        np.concatenate(
            [
                np.abs(replay(model, c, prompt, output)[0] - np.array(logprobs))
                for prompt, (output, logprobs) in zip(ids, served, strict=True)
            ]
        )
        for c in (case, plain, whole)
    )
    # 4.1e-6 against 15.1e-6 and 24.7e-6 (rotated: 1.9e-6 against 4.3e-6 and 3.2e-6): all are small, and what is left is
    # the rounding of bf16.
    assert as_served.mean() < 1e-5
    assert as_served.mean() < untransformed.mean() / 1.5
    assert as_served.mean() < unclipped.mean() / 1.5


@pytest.mark.full
def test_keys_are_rotated_and_clipped_without_a_calibration() -> None:
    """Log-probabilities that only the rotation and the clip factors explain."""
    case = next(c for c in CASES if c.hadamard)
    problems = problem_set(3, 30, 36, first=400)
    ids, _ = prompt_ids(REASONER, problems)
    with serve(REASONER, case.args()) as server:
        assert server.pool()["key_transform"] == "hadamard"
        assert "key transform hadamard" in server.log()
        served = serve_case(server, ids, max(p.chain_tokens for p in problems) + 16)
        assert not server.errors()
    model = load(REASONER)
    geometry = case.geometry(model)
    as_served, plain, unclipped = (
        np.concatenate(
            [
                np.abs(replay(model, case, prompt, output, coding)[0] - np.array(logprobs))
                for prompt, (output, logprobs) in zip(ids, served, strict=True)
            ]
        ).mean()
        for coding in (case.coding(geometry), Coding(), Coding(Hadamard(geometry.shape.head_dim)))
    )
    assert as_served < 1e-5
    assert as_served < plain / 1.5
    assert as_served < unclipped / 1.5


FACTS: dict[str, dict[str, Any]] = {"qwen2": {"heads": 8, "kv_heads": 1}, "qwen3": {"heads": 4, "kv_heads": 4}}


def calibrated(architecture: str, folder: Path) -> tuple[Path, Path]:
    """(random model, its calibration), with more than one layer group."""
    model = make_model(folder / "model", architecture, dtype=torch.bfloat16, **FACTS[architecture])
    rng = np.random.default_rng(0)
    rows = (json.dumps({"input_ids": rng.integers(2, 512, 64).tolist()}) for _ in range(4))
    (folder / "d.jsonl").write_text("\n".join(rows))
    settings = Settings(
        str(model), str(folder / "d.jsonl"), "3", samples=4, seq_len=64, effective="256", kl_samples=2,
        transform="scale", center="none",
    )  # fmt: skip
    assert len(calibrate(settings, folder / "c", quiet=True).groups) > 1
    return model, folder / "c"


COMMON = ["--skip-tokenizer-init", "--context-length", "4096"]


@pytest.mark.parametrize("architecture", ["qwen2", pytest.param("qwen3", marks=pytest.mark.full)])
def test_other_architectures_under_pressure(architecture: str, tmp_path: Path) -> None:
    """Biases; QK-norm. A pool of a third of what the requests need: all finish, all groups reach their finals.

    Without overlap, with mixed chunks and the policy ``uniform``: the suite's servers elsewhere have the other modes.
    """
    model, path = calibrated(architecture, tmp_path)
    token_bytes = 3 * FACTS[architecture]["kv_heads"] * 64 * 2 * 2
    args = [
        *COMMON, "--pmkvq-calibration", str(path), "--pmkvq-pool-bytes", str(1100 * token_bytes),
        "--chunked-prefill-size", "64", "--max-running-requests", "6",
        "--disable-overlap-schedule", "--enable-mixed-chunk", "--pmkvq-policy", "uniform",
    ]  # fmt: skip
    with serve(model, args, env=STRICT) as server:
        bodies = [
            {"input_ids": p, "sampling_params": {"temperature": 0, "max_new_tokens": 120, "ignore_eos": True}}
            for p in random_prompts(8, 12, 200, 512)
        ]
        out = generate_many(server, bodies, 6)
        assert all(len(a["output_ids"]) == 120 for a in out)
        assert server.pool()["shrinks"]["4->2"] > 0
        server.flush()
        assert server.pool()["mapped_pages"] == 0
        assert not server.errors()


@pytest.mark.full
@pytest.mark.parametrize("architecture", FACTS)
def test_calibrated_equals_stock_while_nothing_shrinks(architecture: str, tmp_path: Path) -> None:
    model, path = calibrated(architecture, tmp_path)
    prompts = [p[:n] for p, n in zip(random_prompts(7, 6, 320, 512), (1, 15, 16, 17, 100, 320), strict=True)]
    common = ["--disable-radix-cache", "--chunked-prefill-size", "2048", "--max-running-requests", "8", *COMMON]
    ours_args = [*common, "--pmkvq-calibration", str(path), "--pmkvq-pool-bytes", "64MiB"]
    with serve(model, ours_args, device="cpu") as server:
        ours = answers(server, prompts, 48, 1)
        assert not server.pool()["shrinks"]
    with serve(model, [*common, "--max-total-tokens", "20000"], quant=False, device="cpu") as server:
        assert ours == answers(server, prompts, 48, 1)
