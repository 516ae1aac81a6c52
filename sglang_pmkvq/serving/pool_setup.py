"""What start-up decided about the pool: one record, from sizing to pool, allocator, metrics and log."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sglang_pmkvq.formats import ROTARY_PAIRS, LayerGroup, PoolGeometry
from sglang_pmkvq.kernels.rotary import MIN_CENTER_TOKENS
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.serving.configuration import Configuration
from sglang_pmkvq.serving.sizing import Limits


@dataclass(frozen=True)
class PoolSetup:
    """A configuration, and what it became in a budget.

    Attributes:
        configuration: what flags and calibration say.
        geometry: sizes of arenas, tables and side arrays.
        limits: running requests and chunk that the 16-bit reserve covers.
        budget_bytes: bytes the pool may use, everything included.
        stock_tokens: tokens that SGLang's own pool would hold in the same bytes.
        timeline: file to write the timeline to, or None.
    """

    configuration: Configuration
    geometry: PoolGeometry
    limits: Limits
    budget_bytes: int
    stock_tokens: int
    timeline: str | None = None

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return self.geometry.groups

    @property
    def policy(self) -> PolicyConfig:
        """Twice the tokens where centres are measured: the first page of a sequence is no part of them."""
        to_come = any(coding.center is not None and coding.center.whole for coding in self.configuration.codings)
        return replace(self.configuration.policy, first_shrink_tokens=2 * MIN_CENTER_TOKENS if to_come else 0)

    @property
    def key_transform(self) -> str:
        """What is done to keys before they are quantized; ``mixed`` where layer groups differ."""
        return _common([self._group_coding(g)["key_transform"] for g in range(len(self.groups))])

    @property
    def key_center(self) -> str:
        """What is taken off keys before that; ``mixed`` where layer groups differ."""
        return _common([self._group_coding(g)["key_center"] for g in range(len(self.groups))])

    def _group_coding(self, group: int) -> dict[str, Any]:
        """How keys and values of a layer group become codes, by name.

        Pairs are the least and the most of a layer: rotary pairs whose part of the centre is taken off.
        """
        spec, configuration = self.groups[group], self.configuration
        coding = configuration.codings[group]
        blocks = [] if coding.center is None else [len(layer) for layer in coding.center.blocks]
        told: dict[str, Any] = {
            "key_transform": coding.key_transform.name if spec.k_final < 16 else "none",
            "value_transform": coding.value_transform.name if spec.v_final < 16 else "none",
            "key_center": configuration.center_source(group),
            "center_pairs": [ROTARY_PAIRS * f(blocks, default=0) for f in (min, max)],
        }
        if configuration.uncentered and configuration.uncentered[group]:
            told["no_key_center"] = configuration.uncentered[group]
        return told

    @property
    def tokens(self) -> int:
        return self.geometry.num_pages * self.geometry.shape.page_size

    @property
    def eager_buffer_tokens(self) -> int:
        """Tokens that eager buffers must hold: what stock would have sized them for, or one full batch."""
        return max(self.stock_tokens, self.limits.chunk + self.limits.running)

    def summary(self) -> dict[str, object]:
        """What the flags resolved to, for the timeline and for ``/server_info``."""
        return {
            "storage_bytes": self.geometry.total_bytes,
            "budget_bytes": self.budget_bytes,
            "logical_tokens": self.tokens,
            "stock_tokens": self.stock_tokens,
            "groups": [
                {"layers": list(g.layers), "k_final": g.k_final, "v_final": g.v_final, **self._group_coding(i)}
                for i, g in enumerate(self.groups)
            ],
            "page_size": self.geometry.shape.page_size,
            "group_size": self.geometry.shape.group_size,
            "policy": self.policy.policy,
            "protect": self.policy.protect,
            "window": self.policy.window_tokens,
            "sink_tokens": self.policy.sink_tokens,
            "min_active_bits": self.policy.min_active_bits,
            "max_running_requests": self.limits.running,
            "chunked_prefill_size": self.limits.chunk,
            "hard_pages": self.limits.hard_pages,
            "key_transform": self.key_transform,
            "key_center": self.key_center,
            "calibration": self.configuration.calibration,
        }

    def log_line(self) -> str:
        """The start-up line: bytes, logical tokens, what stock would have had, groups, limits."""
        groups = "; ".join(
            f"layers {_ranges(g.layers)} K{g.k_final}/V{g.v_final} ({self._coding_part(i)})"
            for i, g in enumerate(self.groups)
        )
        reserve = self.limits.hard_pages * self.geometry.shape.page_size
        return (
            f"pmkvq pool: {self.geometry.total_bytes / 2**30:.3f} GiB of {self.budget_bytes / 2**30:.3f} GiB, "
            f"{self.tokens} logical tokens ({self.stock_tokens} at 16 bits in the same bytes), final widths: {groups}, "
            f"policy {self.policy.policy}, window {self.policy.window_tokens} and sink {self.policy.sink_tokens} "
            f"tokens ({self.policy.protect}), 16-bit reserve R={self.limits.hard_pages} pages ({reserve} tokens: "
            f"{self.limits.running} requests, chunks of {self.limits.chunk}){self._calibration_part()}"
        )

    def _coding_part(self, group: int) -> str:
        """``key transform hadamard, value transform none, key center bias in 0 to 24 of 32 pairs``."""
        told = self._group_coding(group)
        low, high = told["center_pairs"]
        center = told["key_center"]
        if center != "none":
            center += f" in {low} to {high} of {self.geometry.shape.head_dim // 2} pairs"
        elif "no_key_center" in told:
            center += f": {told['no_key_center']}"
        return (
            f"key transform {told['key_transform']}, value transform {told['value_transform']}, key center {center}"
        )

    def _calibration_part(self) -> str:
        c = self.configuration.calibration
        if c is None:
            return ""
        return f", calibrated for {c['model']}: mean final width {c['mean_bits']:.2f}, transform {c['transform']}"


def _common(names: list[str]) -> str:
    return names[0] if len(set(names)) == 1 else "mixed"


def _ranges(layers: tuple[int, ...]) -> str:
    """``0-3,6`` for (0, 1, 2, 3, 6)."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
