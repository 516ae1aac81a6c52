"""``pmkvq check MODEL``: will this model survive a quantized KV cache, at which width, and with which flags?

No server: the model runs in transformers, and attention reads what a reader of the pool would see (``calib/quality``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_pmkvq.formats import PAGE_SIZES, groups_from_finals
from sglang_pmkvq.serving.config import DEFAULT_FINAL_BITS, parse_final_bits

if TYPE_CHECKING:
    import torch

    from sglang_pmkvq.artifact import Calibration
    from sglang_pmkvq.calib.model import CalibrationModel
    from sglang_pmkvq.calib.quality import Codec, Divergence
    from sglang_pmkvq.kernels.coding import Coding
    from sglang_pmkvq.kernels.rotary import RotaryTable

FINALS = ("8", "4", "k4v2", "2")
FP8 = "fp8"
SIXTEEN = "16 bits"


@dataclass(frozen=True)
class Settings:
    """What is asked for; the flags of ``pmkvq check``.

    Attributes:
        model: folder or name that transformers loads.
        final_bits: as ``--pmkvq-final-bits``, or None for ``FINALS``.
        calibration: file whose widths and codings are checked in their place.
        data: file of ``corpus.load_corpus``, or None for English prose that every Python has.
        samples, seq_len: texts and their tokens.
        min_top1: share of positions whose likeliest token must stay.
        key_transform, key_center: as the server's flags.
    """

    model: str
    final_bits: str | None = None
    calibration: str | None = None
    data: str | None = None
    samples: int = 2
    seq_len: int = 1024
    min_top1: float = 0.97
    key_transform: str = "auto"
    key_center: str = "auto"
    group_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Row:
    """A format's figures.

    Attributes:
        name: ``16 bits``, ``fp8``, final bits, or the calibration's mean width.
        bits: per KV element at the final width, scales and zeros included.
        kl: mean KL(16 bits ‖ format), nats. top1: share of positions with the same likeliest token.
        worst: sentences, layers that suffer most.
    """

    name: str
    bits: float
    kl: float
    top1: float
    perplexity: float
    worst: tuple[str, ...] = ()


def prose() -> str:
    """English text that every Python carries: its own language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def texts(settings: Settings, tokenizer: Any) -> list[torch.Tensor]:
    """Token ids int64 [T] of each text; the first is for means of keys, the others are compared.

    Raises:
        ValueError, FileNotFoundError: see ``corpus.load_corpus``; a tokenizer that is missing.
    """
    import torch

    from sglang_pmkvq.calib.corpus import load_corpus

    if settings.data is not None:
        corpus = load_corpus(settings.data, tokenizer, settings.samples + 1, settings.seq_len, 0)
        return [torch.from_numpy(sample.tokens) for sample in corpus.samples]
    if tokenizer is None:
        raise ValueError("this model's folder has no tokenizer; give --data FILE with rows of input_ids")
    ids = torch.tensor(tokenizer(prose(), add_special_tokens=False)["input_ids"])
    step = len(ids) // (settings.samples + 1)
    return [ids[i * step : i * step + settings.seq_len] for i in range(settings.samples + 1)]


def check(settings: Settings, on_step: Any = None) -> list[Row]:
    """Measures; the first row is 16 bits.

    Raises:
        ValueError: model, data, widths or calibration cannot be used.
    """
    from sglang_pmkvq import artifact
    from sglang_pmkvq.calib.model import CalibrationModel
    from sglang_pmkvq.calib.quality import compare
    from sglang_pmkvq.calib.run import load_tokenizer
    from sglang_pmkvq.serving.sizing import page_shape

    calibration = None if settings.calibration is None else artifact.load(settings.calibration)
    if settings.data is not None and not Path(settings.data).is_file() and settings.data != "builtin":
        raise ValueError(f"--data {settings.data}: no such file")
    if settings.final_bits is not None and ":" not in settings.final_bits:
        parse_final_bits(settings.final_bits, 1)  # a wrong width shows before the weights are read
    found = texts(settings, load_tokenizer(settings.model))
    if len(found) == 1:
        found *= 2  # means of the very text that is compared: a little too good, and better than nothing
    model = CalibrationModel.load(settings.model, settings.device, settings.dtype)
    if calibration is not None:
        artifact.check_model(calibration, settings.calibration or "", model.config, settings.model)
    group_size = settings.group_size if calibration is None else calibration.group_size
    shape = page_shape(16, model.kv_heads, model.head_dim, group_size)
    formats: dict[str, tuple[list[tuple[int, int]], Codec]] = {}
    if calibration is not None:
        name = f"calibrated {calibration.mean_bits:.2f}"
        finals = list(calibration.finals)
        formats[name] = (finals, codec(calibrated_codings(calibration, model, found), finals, shape.group_size))
    else:
        for name in (settings.final_bits,) if settings.final_bits else FINALS:
            finals = parse_final_bits(name, model.layers)
            codings = default_codings(settings, model, finals, found[0])
            formats[name] = (finals, codec(codings, finals, shape.group_size))
    codecs: dict[str, Codec] = {FP8: fp8}
    codecs |= {name: one for name, (_, one) in formats.items()}
    exact, results = compare(model, found[1:], codecs, on_step=on_step)
    rows = [Row(SIXTEEN, 16.0, 0.0, 1.0, exact.perplexity), row(FP8, 8.0, results[FP8])]
    for name, (finals, _) in formats.items():
        bits = artifact.token_bytes(model.kv_heads, model.head_dim, shape.group_size, tuple(finals)) * 8
        rows.append(row(name, bits / (2 * model.layers * model.kv_heads * model.head_dim), results[name]))
    return rows


def row(name: str, bits: float, result: Divergence) -> Row:
    worst = tuple(f"{'KV'[side]} of layer {layer} ({error:.3f})" for layer, side, error in result.worst())
    return Row(name, bits, result.kl_mean, result.top1, result.perplexity, worst)


def default_codings(
    settings: Settings, model: CalibrationModel, finals: list[tuple[int, int]], text: torch.Tensor
) -> list[Coding]:
    """Per layer, what a server would choose without a calibration.

    Where it would take means of what it holds at its first shrink, these are those of ``text``.
    """
    from sglang_pmkvq.kernels.coding import Coding
    from sglang_pmkvq.kernels.rotary import CENTER_TOLERANCE, MEASURED_BLOCKS, Center, ModelKeys, chosen_blocks
    from sglang_pmkvq.serving.sizing import page_shape

    shape = page_shape(16, model.kv_heads, model.head_dim, settings.group_size)
    table = model.rotary(max(settings.seq_len, len(text)))
    keys = ModelKeys(table, model.key_biases(), model.key_spreads())
    codings: dict[int, Coding] = {}
    for group in groups_from_finals(finals):
        coding = Coding.default(settings.key_transform, group, shape, settings.key_center, keys)
        if coding.center is not None and not coding.center.vector.any():
            vector, spread = (of[list(group.layers)] for of in key_means(model, table, text))
            blocks = chosen_blocks(vector, spread, table, CENTER_TOLERANCE[group.k_final], most=MEASURED_BLOCKS)
            coding = replace(coding, center=Center.of(vector, blocks, coding.center.rotary))
        coding = coding.for_group(group, shape, "cpu")
        codings |= {layer: coding.pick(i) for i, layer in enumerate(group.layers)}
    return [codings[layer] for layer in range(model.layers)]


def key_means(model: CalibrationModel, table: RotaryTable, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of keys before their rotary embedding, fp32 [L, H, D], and the energy of what varies, [L, H]."""
    import torch

    from sglang_pmkvq.calib.corpus import Sample
    from sglang_pmkvq.calib.model import observing

    mean = torch.zeros(model.layers, model.kv_heads, model.head_dim)
    spread = torch.zeros(model.layers, model.kv_heads)

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Without the first page, as a server: the key of a first token lies far from all others.
        keys = table.unturned(k[0].cpu(), torch.arange(k.shape[2]))[:, PAGE_SIZES[0] :]
        mean[layer] = keys.mean(1)
        spread[layer] = keys.var(1, correction=0).sum(-1)
        return k, v

    with observing(observer):
        model.hidden(Sample(text.numpy()))
    return mean, spread


def calibrated_codings(
    calibration: Calibration, model: CalibrationModel, found: Sequence[torch.Tensor]
) -> list[Coding]:
    """Per layer, what a calibration says."""
    from sglang_pmkvq.kernels.coding import Coding
    from sglang_pmkvq.kernels.rotary import ModelKeys

    table = model.rotary(max(map(len, found)))
    rotary = ModelKeys(table, model.key_biases()).center_rotary
    whole = Coding.from_calibration(calibration, range(model.layers), slice(0, model.kv_heads), rotary)
    return [whole.pick(layer) for layer in range(model.layers)]


def codec(codings: Sequence[Coding], finals: Sequence[tuple[int, int]], group_size: int) -> Codec:
    """What readers see of a side of a layer at its final width."""
    from sglang_pmkvq.kernels.reference.codes import fake_quantize

    def read(layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
        bits = finals[layer][side]
        return x if bits == 16 else fake_quantize(x, bits, group_size, codings[layer], side)

    return read


def fp8(layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
    """e4m3 without scales, as stock SGLang stores it; what is beyond 448 saturates."""
    import torch

    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype)


def verdict(settings: Settings, rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether what was asked for (else the server's default) passes, and a sentence with the flags to use."""
    ours = [r for r in rows if r.name not in (SIXTEEN, FP8)]
    asked = ours[0] if len(ours) == 1 else next(r for r in ours if r.name == DEFAULT_FINAL_BITS)
    passing = [r for r in ours if r.top1 >= settings.min_top1]
    if settings.calibration is not None:
        flags = f"--pmkvq-calibration {settings.calibration}"
    else:
        given = {"key-transform": settings.key_transform, "key-center": settings.key_center}
        best = min(passing, key=lambda r: r.bits, default=asked)
        flags = f"--pmkvq-final-bits {best.name}" + "".join(
            f" --pmkvq-{flag} {value}" for flag, value in given.items() if value != "auto"
        )
    if passing:
        text = f"use --kv-quant pmkvq {flags}"
    else:
        text = (
            f"nothing measured keeps {settings.min_top1:.0%} of the likeliest tokens: calibrate (pmkvq calibrate), ask "
            "for wider pages (--pmkvq-final-bits 8), or use --kv-quant none"
        )
    return asked in passing, text


def table(rows: Sequence[Row], min_top1: float) -> str:
    """The rows as text."""
    lines = [f"{'format':>16} {'bits':>6} {'KL':>9} {'top-1':>7} {'perplexity':>11}   layers that suffer most"]
    for r in rows:
        mark = "" if r.top1 >= min_top1 else "  <- below --min-top1"
        worst = "" if r.name == SIXTEEN else "; ".join(r.worst) + mark
        lines.append(f"{r.name:>16} {r.bits:6.2f} {r.kl:9.5f} {r.top1:7.4f} {r.perplexity:11.3f}   {worst}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], min_top1: float, path: Path, model: str) -> None:
    """Bits per element against the share of likeliest tokens that change, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for r in rows:
        if r.name == SIXTEEN:
            continue
        changed = max(1 - r.top1, 1e-4)
        axes.scatter(r.bits, changed, color="tab:gray" if r.name == FP8 else "tab:blue", zorder=3)
        axes.annotate(r.name, (r.bits, changed), textcoords="offset points", xytext=(7, 5))
    axes.axhline(1 - min_top1, color="tab:red", linestyle="--", linewidth=1)
    axes.annotate(f"--min-top1 {min_top1}", (0, 1 - min_top1), xycoords=("axes fraction", "data"), color="tab:red",
                  textcoords="offset points", xytext=(4, 4))  # fmt: skip
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)
    axes.set_xlabel("bits per KV element at the final width, scales and zeros included")
    axes.set_ylabel("share of likeliest tokens that change")
    axes.set_title(f"{Path(model).name}: every old page at its final width")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(settings: Settings, out: Path | None, plot: Path | None) -> int:
    """The command: prints the table and the flags to use; 0 if they pass, 1 if not."""
    rows = check(settings, lambda what: print(f"pmkvq check: {what} ...", file=sys.stderr, flush=True))
    passes, sentence = verdict(settings, rows)
    print(table(rows, settings.min_top1))
    print(f"pmkvq check: {sentence}")
    if out is not None:
        out.write_text(json.dumps({"settings": asdict(settings), "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    if plot is not None:
        draw(rows, settings.min_top1, plot, settings.model)
    return 0 if passes else 1
