"""``pmkvq calibrate``: corpus → key ranges → α → sensitivity → allocation → α at the final widths → file."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_pmkvq import artifact
from sglang_pmkvq.calib import allocate, positions, reparam, sensitivity
from sglang_pmkvq.calib.corpus import Corpus, load_corpus
from sglang_pmkvq.calib.model import CalibrationModel
from sglang_pmkvq.calib.sweep import State, Workspace, sweep
from sglang_pmkvq.formats import GROUP_SIZES, KEY_TRANSFORMS
from sglang_pmkvq.kernels.coding import Coding, Transform, key_transform

# The error of a layer's own output settles within a few samples.
SEARCH_SAMPLES = 16


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for; the flags of ``pmkvq calibrate``.

    Attributes:
        model: folder or name that transformers loads.
        data: ``builtin`` or a file (see ``corpus.load_corpus``).
        target: bits per element or bytes per token (see ``allocate.parse_target``).
        samples, seq_len: size of the corpus.
        effective: effective lengths of positional interpolation, or ``none``.
        interpolation: what is stretched, ``keys`` or the whole ``forward`` (see ``positions``).
        widths: final widths to choose from.
        group_size: G, or None for min(head_dim, 128).
        max_groups: bound on layer groups.
        transform: of keys: ``scale``, ``hadamard`` or ``none``.
        clip: choose the share of their range that 2-bit codes of keys span by error; otherwise they span all of it.
        sensitivity: ``taylor`` or ``kl``, what allocation minimizes.
        kl_samples: samples for the measured sensitivity; 0 leaves it out.
    """

    model: str
    data: str
    target: str = "4"
    samples: int = 64
    seq_len: int = 2048
    effective: str = "8192"
    interpolation: str = "keys"
    widths: tuple[int, ...] = (2, 4, 8)
    group_size: int | None = None
    max_groups: int = 4
    transform: str = "hadamard"
    clip: bool = True
    sensitivity: str = "kl"
    kl_samples: int = 8
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Raise ``ValueError`` for what can be seen without the model."""
        if self.transform == "rotation":
            raise ValueError(
                "--transform rotation: rotations fitted to a covariance did not help where measured "
                "(docs/calibration.md); use scale, hadamard or none"
            )
        for flag, value, allowed in (
            ("transform", self.transform, KEY_TRANSFORMS),
            ("sensitivity", self.sensitivity, ("taylor", "kl")),
            ("interpolation", self.interpolation, positions.MODES),
        ):
            if value not in allowed:
                raise ValueError(f"--{flag} {value}: expected one of {', '.join(allowed)}")
        if not self.widths or set(self.widths) - {16, *sensitivity.WIDTHS}:
            raise ValueError(f"--widths {','.join(map(str, self.widths))}: expected some of 2,4,8,16")
        if self.samples < 1 or self.seq_len < 16:
            raise ValueError("--samples must be at least 1 and --seq-len at least 16")
        if self.kl_samples < 0 or (self.sensitivity == "kl" and self.kl_samples == 0):
            raise ValueError("--kl-samples: --sensitivity kl needs at least 1")
        if self.max_groups < 1:
            raise ValueError(f"--max-groups {self.max_groups}: expected 1 or more")


def calibrate(
    settings: Settings, out: Path, work: Path | None = None, quiet: bool = False
) -> artifact.Calibration:
    """Run a calibration and write ``out``; an interrupted run goes on where it stopped.

    Args:
        work: folder of partial results, default ``OUT.work``; removed when the file is written, unless given.

    Raises:
        ValueError: settings, model or data cannot be used, or the byte budget is infeasible.
    """
    started = time.monotonic()
    settings.check()
    lens = positions.parse_effective_lens(settings.effective, settings.seq_len)
    model = CalibrationModel.load(settings.model, settings.device, settings.dtype)
    group_size = _group_size(settings, model)
    costs = {
        (k, v): allocate.pair_bytes(model.kv_heads, model.head_dim, group_size, (k, v))
        for k in settings.widths
        for v in settings.widths
    }
    budget = allocate.parse_target(settings.target, model.layers, model.kv_heads, model.head_dim, group_size)
    # An infeasible budget must not show after an hour.
    allocate.allocate(np.zeros((model.layers, 2, len(settings.widths))), settings.widths, costs, budget)
    warning = positions.check_lens(lens, getattr(model.config, "max_position_embeddings", None))
    if warning and not quiet:
        print(f"pmkvq calibrate: {warning}", file=sys.stderr)
    corpus = load_corpus(
        settings.data, load_tokenizer(settings.model), settings.samples, settings.seq_len, settings.seed
    )
    folder = work or out.with_name(out.name + ".work")
    run = _Run(settings, model, corpus, lens, group_size, Workspace(folder, _key(settings, corpus)), quiet)
    ranges = run.ranges()
    scales = run.scales_per_width(ranges)
    clips = run.clips("clips", "2/4 clip factors", range(model.layers), None if scales is None else scales[-1])
    sums = run.sensitivities(scales, clips)
    chosen = sums[settings.sensitivity]
    allocation, free = allocate.allocate_both(
        sensitivity.at_widths(chosen, settings.widths), settings.widths, costs, budget, settings.max_groups
    )
    tensors = {"key_max": ranges.numpy(), **sums}
    alphas, scale = None, None
    if settings.transform == "scale":
        alphas, scale = run.final_scales(ranges, allocation.finals, clips)
        tensors["key_scale"] = scale.numpy()
    low = [layer for layer, (k_bits, _) in enumerate(allocation.finals) if k_bits == 2]
    clips = run.clips(f"final-clips-{_short(allocation.finals)}", "4/4 clip factors", low, scale)
    if clips is not None:
        tensors["key_clip"] = clips.numpy()
    report: dict[str, Any] = {
        "widths": list(sensitivity.WIDTHS),
        "budget_bytes_per_token": budget,
        "settings": asdict(settings),
        "alphas": None if alphas is None else [[round(a, 4) for a in layer] for layer in alphas.tolist()],
        "rank_correlation": sensitivity.rank_correlation(sums["taylor"], sums["kl"]) if "kl" in sums else None,
        "device": model.device.type,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": _peak_memory(model.device),
    }
    result = artifact.Calibration(
        model=settings.model,
        config_sha256=artifact.config_digest(model.config),
        weights_sha256=artifact.weights_digest(settings.model),
        data=corpus.describe(),
        seed=settings.seed,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        group_size=group_size,
        finals=allocation.finals,
        transform=settings.transform,
        effective_lens=lens,
        widths=settings.widths,
        sensitivity=settings.sensitivity,
        objective=allocation.objective,
        objective_unbounded=free.objective,
        bytes_per_token=allocation.bytes_per_token,
        report=report,
        tensors=tensors,
    )
    artifact.save(result, out)
    if work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return result


@dataclass
class _Run:
    settings: Settings
    model: CalibrationModel
    corpus: Corpus
    lens: tuple[int, ...]
    group_size: int
    workspace: Workspace
    quiet: bool

    def transform(self, scale: torch.Tensor | None) -> Transform:
        """What is done to keys, with key scales fp32 [L, H, D] where that needs them."""
        return key_transform(self.settings.transform, self.model.head_dim, scale)

    def _sweep(self, name: str, label: str, count: int, state: State, step: Any) -> State:
        samples = self.corpus.samples
        return sweep(
            self.workspace, name, count, state, lambda i, s: step(samples[i], s), label=label, quiet=self.quiet
        )

    def ranges(self) -> torch.Tensor:
        """max|K| fp32 [L, H, D] over natural and stretched samples."""
        state = self._sweep(
            "ranges",
            "1/4 key ranges",
            len(self.corpus.samples),
            reparam.range_state(self.model, self.lens),
            lambda sample, s: reparam.observe_ranges(self.model, sample, self.lens, s, self.settings.interpolation),
        )
        return state["key_max"].amax(0)

    def _alpha_errors(
        self,
        name: str,
        label: str,
        key_max: torch.Tensor,
        pairs: list[list[tuple[int, int]]],
        clips: torch.Tensor | None = None,
    ) -> torch.Tensor:
        model = self.model
        error = torch.zeros(model.layers, model.kv_heads, len(pairs[0]), len(reparam.ALPHAS), dtype=torch.float64)
        state = self._sweep(
            name,
            label,
            min(SEARCH_SAMPLES, len(self.corpus.samples)),
            {"error": error},
            lambda sample, s: reparam.observe_alphas(model, sample, key_max, pairs, self.group_size, clips, s),
        )
        return state["error"]

    def clips(
        self, name: str, label: str, layers: Sequence[int], scales: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Clip factors fp32 [L, H] of least error of 2-bit keys, 1 in other layers; None if unwanted or none is left.

        Args:
            name: of the partial results; must tell key scales and widths apart.
            scales: key scales fp32 [L, H, D], or None.
        """
        model = self.model
        if not (self.settings.clip and layers):
            return None
        error = torch.zeros(model.layers, model.kv_heads, len(reparam.CLIPS), dtype=torch.float64)
        state = self._sweep(
            name,
            label,
            min(SEARCH_SAMPLES, len(self.corpus.samples)),
            {"error": error},
            lambda sample, s: reparam.observe_clips(
                model, sample, layers, self.transform(scales), self.group_size, s
            ),
        )
        return reparam.best_clips(state["error"])

    def scales_per_width(self, key_max: torch.Tensor) -> torch.Tensor | None:
        """Best scales fp32 [widths, L, H, D] of K at each width, V exact; None where keys are not scaled."""
        if self.settings.transform != "scale":
            return None
        pairs = [[(bits, 16) for bits in sensitivity.WIDTHS]] * self.model.layers
        alpha = reparam.best_alphas(self._alpha_errors("alphas", "2/4 scales per width", key_max, pairs))
        return torch.stack([reparam.key_scales(key_max, alpha[..., i, None]) for i in range(len(sensitivity.WIDTHS))])

    def sensitivities(self, scales: torch.Tensor | None, clips: torch.Tensor | None) -> dict[str, np.ndarray]:
        """``taylor`` and, where asked for, ``kl``: float64 [L, 2, widths], per target token."""
        model, samples = self.model, self.corpus.samples
        places = range(len(sensitivity.WIDTHS))
        codings = [Coding(self.transform(None if scales is None else scales[place]), clips) for place in places]
        state = self._sweep(
            "taylor",
            "3/4 sensitivity, Taylor",
            len(samples),
            sensitivity.taylor_state(model.layers),
            lambda sample, s: sensitivity.observe_taylor(model, sample, codings, self.group_size, s),
        )
        out = {"taylor": (state["taylor"] / state["targets"]).numpy()}
        count = min(self.settings.kl_samples, len(samples))
        if count:
            kl = {"kl": torch.zeros_like(state["taylor"])}
            kl = self._sweep(
                "kl",
                "3/4 sensitivity, measured",
                count,
                kl,
                lambda sample, s: sensitivity.observe_kl(model, sample, codings, self.group_size, s),
            )
            out["kl"] = (kl["kl"] / count).clamp_min(0.0).numpy()
        return out

    def final_scales(
        self, key_max: torch.Tensor, finals: tuple[tuple[int, int], ...], clips: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """α float64 [L, H] and scales fp32 [L, H, D] by the error at the widths that each layer really has."""
        name, pairs = "final-" + _short(finals), [[pair] for pair in finals]
        error = self._alpha_errors(name, "4/4 scales at the final widths", key_max, pairs, clips)
        alpha = reparam.best_alphas(error[:, :, 0])
        for layer, (k_bits, _) in enumerate(finals):
            if k_bits == 16:
                alpha[layer] = 0.0
        return alpha, reparam.key_scales(key_max, alpha[..., None])


def _short(finals: tuple[tuple[int, int], ...]) -> str:
    """Digest of the widths, for names: partial results of another allocation must not be taken up."""
    return hashlib.sha256(repr(finals).encode()).hexdigest()[:8]


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, or None if its folder has none."""
    from transformers import AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(model)


def _group_size(settings: Settings, model: CalibrationModel) -> int:
    size = settings.group_size or min(model.head_dim, 128)
    if size not in GROUP_SIZES or model.head_dim % size:
        fits = ", ".join(str(g) for g in GROUP_SIZES if model.head_dim % g == 0)
        raise ValueError(
            f"--group-size {size} does not divide this model's head_dim {model.head_dim}; use one of {fits}"
        )
    return size


def _key(settings: Settings, corpus: Corpus) -> str:
    """What partial results depend on: everything but the target, so another target reuses them."""
    free = {"target", "max_groups", "widths", "sensitivity", "samples"}
    parts = {k: v for k, v in asdict(settings).items() if k not in free} | {
        "corpus": corpus.sha256,
        "weights": artifact.weights_digest(settings.model),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: on the GPU where it calibrated, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
