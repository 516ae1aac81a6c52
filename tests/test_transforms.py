"""The benchmark of rotations and clipping: its maps lose nothing, its clipping is what it says, ratios are paired."""

from __future__ import annotations

import pytest
import torch

from benchmarks.transform_rows import Row, rows, table
from benchmarks.transforms import Part, Statistics, coded, families
from sglang_pmkvq.formats import K, V
from sglang_pmkvq.kernels.reference.codes import fake_quantize

HEADS, DIM, TOKENS = 2, 32, 96


def statistics() -> Statistics:
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(HEADS, TOKENS, DIM, generator=gen) * torch.linspace(0.2, 4, DIM) for _ in range(3))
    part = Part(q, torch.arange(TOKENS), k, v, torch.zeros(()))
    moments = {name: x.double().transpose(1, 2) @ x.double() for name, x in (("q", q), ("k", k), ("v", v))}
    return Statistics(k.abs().amax(1), moments, [part])


@pytest.mark.parametrize("side", [K, V])
def test_maps_are_inverted_by_what_is_read(side: int) -> None:
    for name, (family, _) in families(statistics(), side).items():
        into, back = family(torch.tensor([0.3, 0.9]))
        if into is None or back is None:
            assert name == "none"
            continue
        assert torch.allclose(into @ back, torch.eye(DIM).expand(HEADS, DIM, DIM), atol=1e-4), name


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_clipping_at_the_first_step(bits: int) -> None:
    """Whole ranges are the pool's chain; a share c of the range is the chain of values clamped to it."""
    x = torch.randint(-64, 65, (HEADS, TOKENS, DIM), generator=torch.Generator().manual_seed(1)) / 64
    x[..., 0], x[..., 1] = -1, 1  # bounds that fp16 has
    assert torch.equal(coded(x, bits, DIM, torch.ones(HEADS), "first"), fake_quantize(x, bits, DIM))
    c = torch.tensor([0.5, 0.75])
    clamped = x.clamp(-c[:, None, None], c[:, None, None])
    assert torch.equal(coded(x, bits, DIM, c, "first"), fake_quantize(clamped, bits, DIM))


def test_rows_are_apart_by_name() -> None:
    names = [row.name for row in rows()]
    assert len(names) == len(set(names))


def test_ratios_are_paired_by_chain_and_pool_the_seeds_that_both_rows_have() -> None:
    def measured(row: Row, seed: int, kl: list[float]) -> dict[str, object]:
        return {"row": row.name, "seed": seed, "error": [0.1], "kl": kl, "right": [True] * len(kl)}

    whole, clipped = Row("k2", "scale", "none"), Row("k2", "scale", "none", "last")
    result = {
        "rows": [
            measured(whole, 0, [4.0, 2.0]), measured(whole, 1, [8.0, 0.5]), measured(whole, 2, [1e9, 1e9]),
            measured(clipped, 0, [2.0, 1.0]), measured(clipped, 1, [4.0, 0.25]),
        ]
    }  # fmt: skip
    line = next(line for line in table(result).splitlines() if "| last |" in line)
    assert line.endswith("| - | - | 0.50 (0.50-0.50) | 0.50 (0.50-0.50) |")
    assert "4 of 4" in line
