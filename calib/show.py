"""``pmkvq inspect``: a calibration file as a table and as a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_pmkvq import artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(c: artifact.Calibration) -> str:
    """What the file says: origin, budget, and per layer widths, codings, α, clip factors and sensitivities."""
    report = c.report
    sixteen = artifact.token_bytes(c.num_kv_heads, c.head_dim, c.group_size, ((16, 16),) * c.num_layers)
    lines = [
        f"model            {c.model}  (config {c.config_sha256[:12]}, weights {(c.weights_sha256 or 'unknown')[:12]})",
        f"data             {c.data.get('source')}: {c.data.get('samples')} samples, {c.data.get('tokens')} tokens, "
        f"sha256 {str(c.data.get('sha256'))[:12]}, seed {c.seed}",
        f"effective length {', '.join(map(str, c.effective_lens)) or 'natural positions only'}",
        f"transform        {_kinds(c.transforms)}",
        f"centre           {_kinds(c.centers)}",
        f"values           {_kinds(c.value_transforms)}",
        f"bytes per token  {c.bytes_per_token} of {sixteen} at 16 bits (budget "
        f"{report.get('budget_bytes_per_token')}), {16 * c.bytes_per_token / sixteen:.3f} bits per element with scales "
        f"and zeros, mean width {c.mean_bits:.2f}, group size {c.group_size}",
        f"objective        {c.objective:.4g} ({c.sensitivity}); without a bound on layer groups "
        f"{c.objective_unbounded:.4g}, loss {_loss(c):.2%}",
    ]
    lines += [f"layer group      {_ranges(g.layers)}: K{g.k_final} V{g.v_final}" for g in c.groups]
    rho = report.get("rank_correlation")
    if rho:
        parts = [f"{b} bits {_number(r)}" for b, r in zip(report["widths"], rho, strict=True)]
        lines.append(f"Taylor vs KL     Spearman {', '.join(parts)}")
    lines.append(
        f"made             on {report.get('device')} in {report.get('seconds')} s, peak memory "
        f"{(report.get('peak_memory_bytes') or 0) / 2**20:.0f} MiB"
    )
    widths = report["widths"]
    shown = c.tensors[c.sensitivity]
    lines += [
        "",
        f"{'layer':>5} {'K':>3} {'V':>3}  {'transform':<10}{'centre':<7}{'J':>3}  {'values':<9}"
        f"{'alpha':<12}{'clip':<12}{_heads(widths)}",
    ]
    alphas, clips = report.get("alphas"), c.tensors.get("key_clip")
    pairs = report.get("center_pairs")
    for layer, (k, v) in enumerate(c.finals):
        alpha = "-" if alphas is None or alphas[layer] is None else _spread(alphas[layer])
        clip = "-" if clips is None or k != 2 else _spread(clips[layer].tolist())
        numbers = "".join(f"{x:>10.3g}" for x in np.concatenate([shown[layer, 0], shown[layer, 1]]))
        done = f"{c.transforms[layer]:<10}{c.centers[layer]:<7}{pairs[layer] if pairs else 0:>3}  "
        done += f"{c.value_transforms[layer]:<9}"
        lines.append(f"{layer:>5} {k:>3} {v:>3}  {done}{alpha:<12}{clip:<12}{numbers}")
    return "\n".join(lines)


def _kinds(names: tuple[str, ...]) -> str:
    """``hadamard`` where all layers are alike, else how many are what."""
    counts = Counter(names).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{name} in {count} layers" for name, count in counts)


def _heads(widths: list[int]) -> str:
    return "".join(f"{f'{side} at {bits}':>10}" for side in "KV" for bits in widths)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if low == high else f"{low:.2f}-{high:.2f}"


def _loss(c: artifact.Calibration) -> float:
    return (c.objective - c.objective_unbounded) / c.objective_unbounded if c.objective_unbounded else 0.0


def _ranges(layers: tuple[int, ...]) -> str:
    text = ", ".join(map(str, layers))
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def draw(c: artifact.Calibration) -> Figure:
    """Bits per layer for K and V above, sensitivities below."""
    from matplotlib.figure import Figure

    layers = np.arange(c.num_layers)
    figure = Figure(figsize=(max(6.0, 0.25 * c.num_layers + 3), 6), layout="tight", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for side, name, offset in ((0, "K", -0.2), (1, "V", 0.2)):
        top.bar(layers + offset, [pair[side] for pair in c.finals], 0.38, label=name)
    top.set_yscale("log", base=2)
    top.set_ylim(1, 20)
    top.set_yticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    top.set_ylabel("final bits")
    top.set_title(f"{Path(c.model).name}: {c.bytes_per_token} bytes per token")
    top.legend()
    sensitivity: Any = c.tensors[c.sensitivity]
    for place, bits in enumerate(c.report["widths"]):
        for side, name, style in ((0, "K", "-o"), (1, "V", "--s")):
            values = np.maximum(sensitivity[:, side, place], 1e-12)
            bottom.plot(layers, values, style, color=f"C{place}", label=f"{name} at {bits}", markersize=3)
    bottom.set_yscale("log")
    bottom.set_ylabel(f"sensitivity ({c.sensitivity})")
    bottom.set_xlabel("layer")
    bottom.legend(ncols=3, fontsize="small")
    return figure


def picture(c: artifact.Calibration, path: Path) -> None:
    """``draw`` into a PNG, SVG or PDF, by the ending of ``path``."""
    draw(c).savefig(path)
