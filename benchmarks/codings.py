"""What each way of coding keys and values costs a real model, without a server: one forward per text and way.

    pmkvq bench offline --codings --model models/qwen2.5-coder-0.5b --text opticks --tokens 768 --pieces 2

Teacher-forced; every query reads the last 128 tokens and the first page exactly and all older ones at their final
width, as a full pool under hard protection would hand them out (``calib/quality``). Methods: ``fp8`` (e4m3, no scales),
``FINAL`` as ``--pmkvq-final-bits`` with the server's defaults, ``FINAL/plain``, ``FINAL/hadamard`` (keys rotated, no
centre), ``FINAL/centre`` (centred, not rotated), ``FILE`` of a calibration, ``kivi-4`` and ``kivi-2`` (keys per channel
over 32 tokens, values per token over 32 channels). Means of keys, where a model has no key bias, are those of the piece
after the compared ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness.experiment import Experiment, Job, numbers
from benchmarks.harness.methods import names
from benchmarks.harness.results import Key, Result, Results, Row, table
from benchmarks.harness.texts import pieces
from benchmarks.offline import KIVI_GROUP, round_groups
from sglang_pmkvq import artifact
from sglang_pmkvq.calib.model import CalibrationModel
from sglang_pmkvq.calib.quality import Codec, compare
from sglang_pmkvq.calib.run import load_tokenizer
from sglang_pmkvq.formats import K
from sglang_pmkvq.serving.config import parse_final_bits
from sglang_pmkvq.tools import check

SUFFIXES = {
    "plain": {"key_transform": "none", "key_center": "none"},
    "hadamard": {"key_transform": "hadamard", "key_center": "none"},
    "centre": {"key_transform": "none", "key_center": "auto"},
}
FINALS = ("8", "4", "k4v2", "2")


def kivi(bits: int) -> Codec:
    """KIVI's two ways of rounding, its window being that of everyone here."""

    def read(layer: int, side: int, x: torch.Tensor) -> torch.Tensor:
        if side != K:
            return round_groups(x.unflatten(-1, (-1, KIVI_GROUP)), bits, -1).flatten(-2)
        # Groups of whole 32 tokens; what is left at the end is in everyone's window.
        whole = x.shape[1] // KIVI_GROUP * KIVI_GROUP
        low = round_groups(x[:, :whole].unflatten(1, (-1, KIVI_GROUP)), bits, 2).flatten(1, 2)
        return torch.cat((low, x[:, whole:]), 1)

    return read


def method(name: str, model: CalibrationModel, means: torch.Tensor, model_path: str) -> tuple[Codec, float]:
    """The codec of a method, and its bits per element with scales and zeros.

    Raises:
        ValueError: there is none of that name.
    """
    elements = 2 * model.layers * model.kv_heads * model.head_dim
    group_size = min(model.head_dim, 128)
    if name == "fp8":
        return check.fp8, 8.0
    if name in ("kivi-4", "kivi-2"):
        bits = int(name[-1])
        return kivi(bits), bits + 32 / KIVI_GROUP
    final, _, suffix = name.partition("/")
    if name.endswith(".safetensors"):
        calibration = artifact.load(name)
        finals = list(calibration.finals)
        codings = check.calibrated_codings(calibration, model, [means])
    elif suffix and suffix not in SUFFIXES:
        raise ValueError(f"{name}: expected one of /{', /'.join(SUFFIXES)} behind the width")
    else:
        finals = parse_final_bits(final, model.layers)
        settings = check.Settings(model=model_path, seq_len=len(means), **SUFFIXES.get(suffix, {}))
        codings = check.default_codings(settings, model, finals, means)
    size = artifact.token_bytes(model.kv_heads, model.head_dim, group_size, tuple(finals))
    return check.codec(codings, finals, group_size), size * 8 / elements


def plan(options: argparse.Namespace, results: Results) -> list[Job]:
    """One job: every method of a text is compared with the same exact forward."""
    torch.set_num_threads(options.threads)
    path = str(options.model)
    chosen = list(names(options.methods))
    keys: list[Key] = [{"method": name} for name in chosen]

    def measure(left: list[Key]) -> Iterator[dict[str, Any]]:
        model = CalibrationModel.load(path)
        cut = pieces(load_tokenizer(path), options.text, options.pieces + 1, options.tokens)
        *compared, means = [torch.tensor(piece) for piece in cut]
        found = {key["method"]: method(key["method"], model, means, path) for key in left}
        exact, each = compare(model, compared, {name: codec for name, (codec, _) in found.items()}, layer_errors=False)
        for name, divergence in each.items():
            yield {
                "bits": round(found[name][1], 3),
                "positions": divergence.positions,
                "kl_mean": divergence.kl_mean,
                "top1_agreement": divergence.top1,
                "perplexity": divergence.perplexity,
                "perplexity_16bit": exact.perplexity,
            }

    return [Job(keys, measure, f"{options.model.name}, {options.text}")]


def rows_table(result: Result) -> str:
    """Rows as Markdown."""

    def shown(row: Row) -> Row:
        return {**row, "name": row["key"]["method"]}

    return table(
        map(shown, result["rows"]),
        "method | bits per element | KL from 16 bits | same likeliest token | perplexity | at 16 bits",
        "{name} | {bits:.2f} | {kl_mean:.5f} | {top1_agreement:.2%} | {perplexity:.3f} | {perplexity_16bit:.3f}",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", default="opticks", help="opticks, or a file, default %(default)s")
    numbers(parser, tokens=(768, "of a piece"), pieces=(2, "of the text"), threads=(2, "of PyTorch"))


OURS = [f"{bits}{suffix}" for bits in FINALS for suffix in ("/plain", "/hadamard", "/centre", "")]
METHODS = ",".join(["fp8", *OURS, "kivi-4", "kivi-2"])
OUT = "results/codings.json"
EXPERIMENT = Experiment("offline --codings", __doc__, plan, rows_table, arguments, METHODS, OUT, ("threads",))
main = EXPERIMENT.main
