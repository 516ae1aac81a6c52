"""Sensitivity of each layer's K and V at each width: first-order Taylor, and measured.

Taylor (paper sec. 3.2, eq. 5): ‖G ⊙ (X − Q_b(X))‖₁, G the gradient of the loss with respect to X; K after
RoPE and V apart. Measured: KL divergence of the output when only that side of that layer is quantized. Both
quantize exactly as the pool does, equivalent right shifts included, and leave the first page as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_pmkvq.calib.corpus import Sample
from sglang_pmkvq.calib.model import CalibrationModel, as_served, observing
from sglang_pmkvq.calib.sweep import State
from sglang_pmkvq.formats import TIERS, K, V
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.codes import fake_quantize

WIDTHS: tuple[int, ...] = TIERS[1:]
# Log-probabilities of one forward that are compared: rows · vocabulary, fp32, three of them at once.
KL_ELEMENTS = 1 << 26


def taylor_state(layers: int) -> State:
    """``taylor`` float64 [L, 2, widths], summed over tokens; ``targets`` float64 scalar."""
    return {
        "taylor": torch.zeros(layers, 2, len(WIDTHS), dtype=torch.float64),
        "targets": torch.zeros((), dtype=torch.float64),
    }


def observe_taylor(
    model: CalibrationModel,
    sample: Sample,
    codings: Sequence[Coding],
    group_size: int,
    state: State,
) -> None:
    """Add one sample's Taylor terms (paper eq. 5). Divide by ``targets`` for the change of the mean loss.

    Args:
        codings: how K and V of all layers become codes, at each of ``WIDTHS``; on the model's device.
    """

    def observer(
        layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and k.requires_grad:
            k.register_hook(lambda grad: add(layer, K, k.detach(), grad))
            v.register_hook(lambda grad: add(layer, V, v.detach(), grad))
        return k, v

    def add(layer: int, side: int, x: torch.Tensor, grad: torch.Tensor) -> None:
        exact = x.float()
        for place, bits in enumerate(WIDTHS):
            error = exact - as_served(fake_quantize(exact, bits, group_size, codings[place].pick(layer), side), exact)
            state["taylor"][layer, side, place] += (grad.float() * error).abs().sum(dtype=torch.float64).cpu()

    with observing(observer):
        state["targets"] += model.backward(sample)


def observe_kl(
    model: CalibrationModel,
    sample: Sample,
    codings: Sequence[Coding],
    group_size: int,
    state: State,
) -> None:
    """Add one sample's mean KL(16 bits ‖ quantized) to ``kl`` float64 [L, 2, widths].

    One forward per (layer, side, width), from that layer on; the divergence is taken at all targets, or as
    many of them, spread evenly, as ``KL_ELEMENTS`` allow.
    """
    first, last = sample.first_target - 1, len(sample.tokens) - 1
    count = max(1, min(KL_ELEMENTS // model.config.vocab_size, last - first))
    rows = torch.arange(count, device=model.device) * (last - first) // count + first
    inputs = model.layer_inputs(sample)
    exact = model.log_probs(inputs[-1][0, rows])
    probabilities = exact.exp()
    for layer in range(model.layers):
        for side in (K, V):
            for place, bits in enumerate(WIDTHS):
                coding = codings[place].pick(layer)

                def observer(
                    at: int,
                    q: torch.Tensor,
                    k: torch.Tensor,
                    v: torch.Tensor,
                    where: tuple[int, int, int] = (layer, side, bits),
                    coding: Coding = coding,
                ) -> tuple[torch.Tensor, torch.Tensor]:
                    if at != where[0]:
                        return k, v
                    if where[1] == K:
                        return as_served(fake_quantize(k, where[2], group_size, coding), k), v
                    return k, as_served(fake_quantize(v, where[2], group_size, coding, V), v)

                with observing(observer):
                    other = model.log_probs(model.hidden_from(layer, inputs[layer])[rows])
                divergence = (probabilities * (exact - other)).sum(-1).mean()
                state["kl"][layer, side, place] += divergence.double().cpu()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> list[float | None]:
    """Spearman's ρ of two sensitivities [L, 2, widths] over layers and sides, one per width; None if constant."""
    from scipy.stats import spearmanr

    out: list[float | None] = []
    for place in range(a.shape[-1]):
        x, y = a[..., place].ravel(), b[..., place].ravel()
        out.append(float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else None)
    return out


def at_widths(sensitivity: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Columns of a sensitivity [L, 2, len(WIDTHS)] for ``widths``; 16 bits cost nothing."""
    columns = [
        np.zeros(sensitivity.shape[:2]) if bits == 16 else sensitivity[..., WIDTHS.index(bits)] for bits in widths
    ]
    return np.stack(columns, -1)
