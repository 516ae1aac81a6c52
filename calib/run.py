"""``pmkvq calibrate``: corpus → ranges and means → errors of codings → sensitivity → allocation → file.

The error of a layer's own output at a width does not depend on what other layers do, so one measurement of all
candidates at all widths serves the sensitivities and the final choice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_pmkvq import artifact
from sglang_pmkvq.calib import allocate, candidates, positions, reparam, sensitivity
from sglang_pmkvq.calib.candidates import AUTO, CENTER_ORDER, TRANSFORM_ORDER, Keys, Search, asked
from sglang_pmkvq.calib.centers import KeyCenter, key_centers, mean_state
from sglang_pmkvq.calib.corpus import Corpus, load_corpus
from sglang_pmkvq.calib.model import SINK, CalibrationModel
from sglang_pmkvq.calib.sweep import State, Workspace, sweep
from sglang_pmkvq.formats import GROUP_SIZES, ROTARY_PAIRS, K, V
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.rotary import CENTER_TOLERANCE, Center, ModelKeys, RotaryTable

# The error of a layer's own output settles within a few samples.
SEARCH_SAMPLES = 16
# Of what partial results hold: those of other versions are not taken up.
STATE_VERSION = 4


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
        transform: of keys: ``scale``, ``hadamard`` or ``none``; ``auto`` chooses by error, layer by layer.
        center: of keys: ``bias``, ``mean`` or ``none``; ``auto`` likewise.
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
    transform: str = AUTO
    center: str = AUTO
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
                "(docs/calibration.md); use auto, scale, hadamard or none"
            )
        for flag, value, allowed in (
            ("transform", self.transform, (AUTO, *TRANSFORM_ORDER)),
            ("center", self.center, (AUTO, *CENTER_ORDER)),
            ("sensitivity", self.sensitivity, ("taylor", "kl")),
            ("interpolation", self.interpolation, positions.MODES),
        ):
            if value not in allowed:
                raise ValueError(f"--{flag} {value}: expected one of {', '.join(allowed)}")
        if not self.widths or set(self.widths) - {16, *sensitivity.WIDTHS}:
            raise ValueError(f"--widths {','.join(map(str, self.widths))}: expected some of 2,4,8,16")
        if self.samples < 1 or self.seq_len < 2 * SINK:
            raise ValueError(f"--samples must be at least 1 and --seq-len at least {2 * SINK}")
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
    search = run.search(ranges)
    errors = run.errors(search)
    sums = run.sensitivities([run.chosen(search, errors, [(bits, bits)] * model.layers) for bits in sensitivity.WIDTHS])
    chosen = sums[settings.sensitivity]
    allocation, free = allocate.allocate_both(
        sensitivity.at_widths(chosen, settings.widths), settings.widths, costs, budget, settings.max_groups
    )
    keys, value_transforms = run.chosen(search, errors, allocation.finals)
    tensors = {
        "key_max": ranges["key_max"].amax((0, 1)).numpy(),
        **sums,
        **keys.tensors(allocation.finals, settings.clip),
    }
    report: dict[str, Any] = {
        "widths": list(sensitivity.WIDTHS),
        "budget_bytes_per_token": budget,
        "settings": asdict(settings),
        "alphas": list(keys.alphas),
        "center_pairs": [ROTARY_PAIRS * len(blocks) for blocks in keys.blocks],
        "key_errors": list(keys.errors),
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
        transforms=keys.transforms,
        centers=keys.centers,
        value_transforms=value_transforms,
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

    def _sweep(self, name: str, label: str, count: int, state: State, step: Any) -> State:
        samples = self.corpus.samples
        return sweep(
            self.workspace, name, count, state, lambda i, s: step(samples[i], s), label=label, quiet=self.quiet
        )

    def _search_sweep(self, name: str, label: str, half: int, state: State, step: Any) -> State:
        """Over every second search sample, from ``half`` on: α is fitted to samples 0, 2, …, and candidates are
        measured on samples 1, 3, …, or scales would be praised for what they were fitted to. A lone sample is both."""
        searched = self.corpus.samples[:SEARCH_SAMPLES]
        samples = searched[half::2] or searched
        return sweep(
            self.workspace, name, len(samples), state, lambda i, s: step(samples[i], s), label=label, quiet=self.quiet
        )

    @cached_property
    def rotary(self) -> RotaryTable:
        """Long enough for every sample, on the host."""
        return self.model.rotary(max(len(sample.tokens) for sample in self.corpus.samples))

    @cached_property
    def center_rotary(self) -> RotaryTable:
        """The same as a server turns centres with."""
        rotary = ModelKeys(self.rotary, tuple(self.model.key_biases())).center_rotary
        assert rotary is not None
        return rotary

    def _ranges(self, name: str, label: str, centers: Sequence[Center | None], state: State) -> State:
        model, lens, mode = self.model, self.lens, self.settings.interpolation
        return self._sweep(
            name,
            label,
            len(self.corpus.samples),
            {**reparam.range_state(model, lens, len(centers)), **state},
            lambda sample, s: reparam.observe_ranges(model, sample, lens, s, mode, centers),
        )

    def ranges(self) -> State:
        """max|K| of keys as they are over natural and stretched samples, and what their means are made of."""
        model = self.model
        return self._ranges(
            "ranges", "1/4 key ranges, means", [None], mean_state(model.layers, model.kv_heads, model.head_dim)
        )

    def search(self, ranges: State) -> Search:
        """Centres from the sums of ``ranges``, and the best scales around each where keys may be scaled."""
        model, settings = self.model, self.settings
        transforms = asked(settings.transform, TRANSFORM_ORDER)
        centers = asked(settings.center, CENTER_ORDER)
        fitted: dict[str, KeyCenter] = key_centers(centers, model.key_biases(), ranges, self.center_rotary)
        if settings.center == "bias" and not fitted:
            raise ValueError("--center bias: the keys of this model have no bias; use mean, none or auto")
        fitted = {name: replace(one, center=one.center.on(model.device)) for name, one in fitted.items()}
        if "scale" not in transforms:
            return Search(transforms, centers, fitted, {}, {}, model.head_dim)
        around: list[Center | None] = [None, *(one.center for one in fitted.values())]
        key_max = ranges["key_max"].amax(1)
        if fitted:
            more = self._ranges("centred-ranges", "2/4 ranges around centres", around[1:], {})
            key_max = torch.cat((key_max, more["key_max"].amax(1)))
        shape = (len(around), model.layers, model.kv_heads, len(sensitivity.WIDTHS), len(reparam.ALPHAS))
        state = self._search_sweep(
            "alphas",
            "2/4 scales per width",
            0,
            {"error": torch.zeros(shape, dtype=torch.float64)},
            lambda sample, s: reparam.observe_alphas(model, sample, key_max, around, self.group_size, s),
        )
        alpha = reparam.best_alphas(state["error"])  # [C, L, H, widths]
        scales = [
            torch.stack([reparam.key_scales(maxima, own[..., place, None]) for place in range(own.shape[-1])])
            for maxima, own in zip(key_max, alpha, strict=True)
        ]
        names = ("none", *fitted)
        return Search(
            transforms,
            centers,
            fitted,
            dict(zip(names, scales, strict=True)),
            dict(zip(names, alpha, strict=True)),
            model.head_dim,
        )

    def errors(self, search: Search) -> State:
        """Errors of the attention output by all that may be done to keys and to values, at every width."""
        model, clip = self.model, self.settings.clip
        keys = [search.codings(layer, model.device) for layer in range(model.layers)]
        return self._search_sweep(
            "codings",
            "2/4 transforms, centres, clip",
            1,
            reparam.error_state(model, len(search.candidates)),
            lambda sample, s: reparam.observe_codings(model, sample, keys, clip, self.group_size, s),
        )

    def chosen(
        self, search: Search, errors: State, widths: Sequence[tuple[int, int]]
    ) -> tuple[Keys, tuple[str, ...]]:
        """What measured best for keys and for values of each layer at its (K, V) widths."""
        places = [
            [None if pair[side] == 16 else sensitivity.WIDTHS.index(pair[side]) for pair in widths] for side in (K, V)
        ]
        return search.chosen(errors, places[K]), candidates.chosen_values(errors, places[V])

    def sensitivities(self, best: Sequence[tuple[Keys, tuple[str, ...]]]) -> dict[str, np.ndarray]:
        """``taylor`` and, where asked for, ``kl``: float64 [L, 2, widths], per target token.

        Args:
            best: what is done to keys and values at each width.
        """
        model, samples = self.model, self.corpus.samples
        codings: list[Coding] = [keys.coding(values, self.center_rotary).on(model.device) for keys, values in best]
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
                "4/4 sensitivity, measured",
                count,
                kl,
                lambda sample, s: sensitivity.observe_kl(model, sample, codings, self.group_size, s),
            )
            out["kl"] = (kl["kl"] / count).clamp_min(0.0).numpy()
        return out


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
        "version": [STATE_VERSION, CENTER_TOLERANCE],
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
