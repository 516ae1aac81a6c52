"""The model's own rotary embedding as a table that quantized keys are centred with, and the centres themselves.

R_m is the model's rotary matrix at position m, after which keys are stored; c a vector per layer and KV head before
it. Codes are made of k_m − R_m c, whose range is that of what varies from token to token, and readers add q·R_m c.
Per rotary pair j of channels (x₁, x₂):

    (R_m c)₁ = c₁·cos − c₂·sin      (R_m c)₂ = c₂·cos + c₁·sin
    q·R_m c  = Σ_j (q₁c₁ + q₂c₂)·cos_mj + (q₂c₁ − q₁c₂)·sin_mj

so reading costs one more dot product, of a row made from the query once per step with a row of the table, which
depends on the position alone. What the table says is subtracted and added alike: its rounding is no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from sglang_pmkvq.formats import PAGE_SIZES, ROTARY_COLUMNS, ROTARY_PAIRS

# Significant bits of a centre. With at most 11 of a 16-bit cosine its product is exact in fp32, so that every order of
# operations, fused or not, rounds R_m c once and to the same bits.
CENTER_BITS = 12
# Energy of the centre that may be left in keys, as a share of the energy of what varies: it widens ranges by half of
# that share. Wider codes bear more, and every block of pairs costs time.
CENTER_TOLERANCE = {2: 0.25, 4: 0.5, 8: 0.5}
# Blocks of pairs that each layer reads where centres are measured while serving: how many must be said at start.
MEASURED_BLOCKS = 4
# Such centres are means over at least so many tokens, else there are none.
MIN_CENTER_TOKENS = 512


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of a model's rotary pairs by position, in blocks of ``ROTARY_PAIRS`` pairs.

    Channels that are not rotated (partial rotary embeddings) are pairs that never turn, cosine 1 and sine 0.

    Attributes:
        values: ``[blocks, positions, 16]``: 8 cosines of the block's pairs, then their 8 sines. Positions are a
            multiple of every page size.
        first, second: int64 ``[D/2]``, the channels of each pair.
        blocks: which blocks of pairs these are, ascending: block b has the pairs 8·b .. 8·b + 7.
    """

    values: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, neox: bool = True) -> RotaryTable:
        """The table of all pairs, from the model's own cosines and sines ``[positions, rotary_dim/2]``.

        Args:
            head_dim: D, of which the first ``rotary_dim`` channels are rotated.
            neox: pair j is channels (j, j + rotary_dim/2); else they interleave, (2j, 2j + 1).

        Raises:
            ValueError: shapes that do not fit each other or ``head_dim``.
        """
        half = cos.shape[1]
        if cos.shape != sin.shape or not 0 < 2 * half <= head_dim or (head_dim // 2) % ROTARY_PAIRS:
            raise ValueError(f"{tuple(cos.shape)} cosines and {tuple(sin.shape)} sines do not fit head_dim {head_dim}")
        pair = torch.arange(half)
        first, second = (pair, pair + half) if neox else (2 * pair, 2 * pair + 1)
        rest = torch.arange(2 * half, head_dim).view(2, -1)
        first, second = torch.cat((first, rest[0])), torch.cat((second, rest[1]))
        still = head_dim // 2 - half
        rows = F.pad(torch.stack((cos, sin)), (0, still))
        rows[0, :, half:] = 1.0
        rows = F.pad(rows, (0, 0, 0, -cos.shape[0] % PAGE_SIZES[-1]))
        # [2, positions, blocks, 8] -> [blocks, positions, 2, 8]
        values = rows.unflatten(2, (-1, ROTARY_PAIRS)).permute(2, 1, 0, 3).flatten(2).contiguous()
        return cls(values, first, second, tuple(range(values.shape[0])))

    @property
    def positions(self) -> int:
        return self.values.shape[1]

    @cached_property
    def channel_at(self) -> torch.Tensor:
        """Where a channel's cosine stands at position 0, int32 ``[D]``, in elements of ``values``; its sine is 8 on.

        Position m is 16·m further. Channels of a block that is not there point at the first.
        """
        at = torch.zeros(2 * self.first.numel(), dtype=torch.int64)
        for place, block in enumerate(self.blocks):
            start = place * self.positions * ROTARY_COLUMNS
            for channels in self.channels(block):
                at[channels] = start + torch.arange(ROTARY_PAIRS)
        return at.to(device=self.values.device, dtype=torch.int32)

    @cached_property
    def block_channels(self) -> torch.Tensor:
        """Channels of the pairs of each block that is there, int32 ``[blocks, 16]``: 8 first ones, then 8 second."""
        rows = [torch.cat(self.channels(block)) for block in self.blocks]
        return torch.stack(rows).to(device=self.values.device, dtype=torch.int32)

    def keep(self, blocks: Sequence[int]) -> RotaryTable:
        """The same with some of its blocks."""
        places = [self.blocks.index(block) for block in blocks]
        return replace(self, values=self.values[places].contiguous(), blocks=tuple(blocks))

    def rows_for(self, tokens: int) -> int:
        """Positions of a table that serves sequences of at most ``tokens``."""
        return min(self.positions, -(-tokens // PAGE_SIZES[-1]) * PAGE_SIZES[-1])

    def upto(self, tokens: int) -> RotaryTable:
        """The same for sequences of at most ``tokens``."""
        return replace(self, values=self.values[:, : self.rows_for(tokens)].contiguous())

    def on(self, device: torch.device | str, dtype: torch.dtype) -> RotaryTable:
        """The same on a device, in the dtype of 16-bit pages; channels stay on the host."""
        return replace(self, values=self.values.to(device=device, dtype=dtype).contiguous())

    def without_start(self) -> RotaryTable:
        """The same with zeros at the positions of a smallest page: keys there have no centre."""
        values = self.values.clone()
        values[:, : PAGE_SIZES[0]] = 0
        return replace(self, values=values)

    def channels(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First and second channels of the 8 pairs of a block."""
        pairs = slice(block * ROTARY_PAIRS, (block + 1) * ROTARY_PAIRS)
        return self.first[pairs], self.second[pairs]

    def pages(self, blocks: torch.Tensor, columns: torch.Tensor, page_size: int) -> torch.Tensor:
        """Table rows of pages, fp32 ``[..., P, 16·n]``, of pages that start at ``columns [...] · P``.

        Args:
            blocks: int64 ``[n]`` places in this table.
        """
        per_block = self.positions // page_size
        rows = self.values.view(-1, page_size * ROTARY_COLUMNS)
        index = blocks.view(-1, *[1] * columns.dim()) * per_block + columns
        found = rows.index_select(0, index.flatten()).view(*index.shape, page_size, ROTARY_COLUMNS)
        out = torch.empty(
            (*columns.shape, page_size, blocks.numel(), ROTARY_COLUMNS), dtype=torch.float32, device=rows.device
        )
        return out.copy_(found.movedim(0, -2)).flatten(-2)

    def unturned(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """R_m⁻¹ k_m of keys ``[..., T, D]`` at int64 ``positions [T]``, fp32; every block must be there.

        R_m may scale too (YaRN), so it is divided by cos² + sin².
        """
        rows = self.values.index_select(1, positions.to(self.values.device)).float()
        cos, sin = rows.unflatten(2, (2, ROTARY_PAIRS)).permute(2, 1, 0, 3).flatten(2).to(keys.device)
        keys = keys.float()
        a, b = keys[..., self.first], keys[..., self.second]
        norm = cos * cos + sin * sin
        out = torch.empty_like(keys)
        out[..., self.first] = (a * cos + b * sin) / norm
        out[..., self.second] = (b * cos - a * sin) / norm
        return out


def rounded(vector: torch.Tensor) -> torch.Tensor:
    """fp32 ``vector`` with ``CENTER_BITS`` significant bits, half to even."""
    mantissa, exponent = torch.frexp(vector.float())
    return torch.ldexp(torch.round(torch.ldexp(mantissa, torch.tensor(CENTER_BITS))), exponent - CENTER_BITS)


def chosen_blocks(
    vector: torch.Tensor,
    spread: torch.Tensor,
    rotary: RotaryTable,
    tolerance: float,
    most: int | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Blocks of pairs that each layer's centre needs: as few as leave at most ``tolerance`` of ``spread`` in the keys.

    Args:
        vector: ``[L, H, D]``, pre-rotary centres.
        spread: ``[L, H]``, energy of what varies from key to key: the sum over channels of the variance.
        tolerance: a value of ``CENTER_TOLERANCE``; 0 keeps every block that is not 0.
        most: bound on the blocks of a layer, None for no bound.

    Returns:
        per layer, blocks ascending; none where the centre is small against what varies.
    """
    energy = vector.double().square()
    pairs = energy[..., rotary.first] + energy[..., rotary.second]
    per_block = pairs.unflatten(-1, (-1, ROTARY_PAIRS)).sum(-1)  # [L, H, blocks]
    share = per_block / spread.double().clamp_min(torch.finfo(torch.float64).tiny)[..., None]
    chosen = []
    for layer in share:
        # The worst head decides: a block is read for all heads of a layer or for none.
        order = layer.amax(0).argsort()
        left = layer[:, order].cumsum(-1).amax(0)
        dropped = int((left <= tolerance).sum())
        kept = order[dropped:] if most is None else order[dropped:][-most:]
        chosen.append(tuple(sorted(kept.tolist())))
    return tuple(chosen)


@dataclass(frozen=True)
class Center:
    """Centres of the keys of one layer group.

    Attributes:
        vector: fp32 ``[L, H, D]``, c before the rotary embedding; ``rounded``, and 0 outside a layer's blocks.
        blocks: per layer, the blocks of pairs that are subtracted and read, ascending; () is no centre.
        rotary: table that has these blocks.
        whole: the centres are measured while serving, so the device's table keeps all blocks to choose from.
        channels: per layer, int64 ``[2, 8·n]``, first and second channels of the pairs of its n blocks.
        pairs: per layer, fp32 ``[2, H, 1, 8·n]``, c there; None where there is no centre.
        places: per layer, int64 ``[n]``, where its blocks are in the table.
        live: per layer, (number among its blocks, place) of those blocks in which its centre is not 0, on the host.
        factors: fp32 ``[2, L, H, D]``, what a channel's cosine and sine are multiplied by to make R_m c.
    """

    vector: torch.Tensor
    blocks: tuple[tuple[int, ...], ...]
    rotary: RotaryTable
    whole: bool = False
    channels: tuple[torch.Tensor, ...] = field(init=False, repr=False, compare=False)
    pairs: tuple[torch.Tensor | None, ...] = field(init=False, repr=False, compare=False)
    places: tuple[torch.Tensor, ...] = field(init=False, repr=False, compare=False)
    live: tuple[tuple[tuple[int, int], ...], ...] = field(init=False, repr=False, compare=False)
    factors: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._derive()

    def _derive(self) -> None:
        device = self.vector.device
        channels: list[torch.Tensor] = []
        pairs: list[torch.Tensor | None] = []
        places: list[torch.Tensor] = []
        for vector, blocks in zip(self.vector, self.blocks, strict=True):
            places.append(torch.tensor([self.rotary.blocks.index(b) for b in blocks], dtype=torch.int64, device=device))
            own = torch.tensor(blocks, dtype=torch.int64)[:, None] * ROTARY_PAIRS + torch.arange(ROTARY_PAIRS)
            both = torch.stack((self.rotary.first[own.flatten()], self.rotary.second[own.flatten()])).to(device)
            channels.append(both)
            pairs.append(vector[:, both].transpose(0, 1).unsqueeze(2).contiguous() if blocks else None)
        factors = torch.stack((self.vector, self.vector))
        factors[1][..., self.rotary.first] = -self.vector[..., self.rotary.second]
        factors[1][..., self.rotary.second] = self.vector[..., self.rotary.first]
        derived = {"channels": tuple(channels), "pairs": tuple(pairs), "places": tuple(places), "factors": factors}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        self._find_live()

    def _find_live(self) -> None:
        live = []
        for vector, blocks in zip(self.vector.cpu(), self.blocks, strict=True):
            there = [bool(vector[:, torch.cat(self.rotary.channels(block))].any()) for block in blocks]
            live.append(tuple((i, self.rotary.blocks.index(b)) for i, b in enumerate(blocks) if there[i]))
        object.__setattr__(self, "live", tuple(live))

    @classmethod
    def to_come(cls, layers: int, heads: int, rotary: RotaryTable, most: int) -> Center:
        r"""Centres of 0, to be ``fill``\ ed before the first key is coded; each layer reads ``most`` blocks."""
        blocks = rotary.blocks[:most]
        return cls(torch.zeros(layers, heads, 2 * rotary.first.numel()), (blocks,) * layers, rotary, whole=True)

    def fill(self, vector: torch.Tensor, blocks: Sequence[Sequence[int]]) -> None:
        """Take centres ``vector [L, H, D]`` as far as they lie in ``blocks``, once, while no key is coded.

        In place: a captured CUDA graph finds the tensors where they were. Every layer goes on reading as many blocks
        as before.

        Args:
            blocks: per layer, no more than it reads.
        """
        assert not bool(self.vector.any()), "centres are taken once"
        filled = Center.of(
            vector.to(self.vector.device),
            [
                [*own, *[b for b in self.rotary.blocks if b not in own][: len(have) - len(own)]]
                for own, have in zip(blocks, self.blocks, strict=True)
            ],
            self.rotary,
        )
        object.__setattr__(self, "blocks", filled.blocks)
        self.vector.copy_(filled.vector)
        self.factors.copy_(filled.factors)
        mine_and_new = ((self.channels, filled.channels), (self.pairs, filled.pairs), (self.places, filled.places))
        for mine, new in mine_and_new:
            for a, b in zip(mine, new, strict=True):
                if a is not None and b is not None:
                    a.copy_(b)
        self._find_live()

    @classmethod
    def of(cls, vector: torch.Tensor, blocks: Sequence[Sequence[int]], rotary: RotaryTable) -> Center:
        """Centres ``vector [L, H, D]`` as far as they lie in ``blocks``."""
        own = tuple(tuple(sorted(b)) for b in blocks)
        mask = torch.zeros(len(own), 1, vector.shape[-1], dtype=torch.bool)
        for layer, chosen in enumerate(own):
            for block in chosen:
                for channels in rotary.channels(block):
                    mask[layer, :, channels] = True
        kept = torch.where(mask.to(vector.device), rounded(vector), torch.zeros(()))
        return cls(kept, own, rotary)

    @property
    def used(self) -> tuple[int, ...]:
        """Blocks of pairs that some layer reads."""
        return tuple(sorted({block for layer in self.blocks for block in layer}))

    @property
    def nbytes(self) -> int:
        """Bytes of what the device holds beside the table."""
        each = (*self.channels, *self.pairs, *self.places)
        return self.vector.nbytes + self.factors.nbytes + sum(x.nbytes for x in each if x is not None)

    def pick(self, index: int | slice | list[int]) -> Center:
        """Some layers of the group; one layer stays a group of one."""
        some = [index] if isinstance(index, int) else index
        layers = range(len(self.blocks))[some] if isinstance(some, slice) else some
        return Center(self.vector[some], tuple(self.blocks[layer] for layer in layers), self.rotary, self.whole)

    def upto(self, tokens: int) -> Center:
        """The same for sequences of at most ``tokens``."""
        return replace(self, rotary=self.rotary.upto(tokens))

    def on(self, device: torch.device | str) -> Center:
        """The same with tensors on a device."""
        if self.vector.device == torch.device(device):
            return self
        rotary = self.rotary.on(device, self.rotary.values.dtype)
        return Center(self.vector.to(device), self.blocks, rotary, self.whole)

    def check(self, layers: int, heads: int, head_dim: int) -> None:
        """Raise ``ValueError`` for tensors that do not fit a layer group."""
        expected = (layers, heads, head_dim)
        if tuple(self.vector.shape) != expected:
            raise ValueError(f"centres of keys must have shape {expected}, got {tuple(self.vector.shape)}")
        if not bool(torch.isfinite(self.vector).all()):
            raise ValueError("centres of keys must be finite everywhere")

    def subtracted(self, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """k_m − R_m c of fp32 keys ``x [L, n, H, P, D]``, written over them; pages start at ``columns [n] · P``."""
        for layer, pairs in enumerate(self.pairs):
            if pairs is None:
                continue
            rows = self.rotary.pages(self.places[layer], columns, x.shape[3])  # [n, P, 16 n_blocks]
            cos, sin = (part.flatten(2).unsqueeze(1) for part in rows.unflatten(2, (-1, 2, ROTARY_PAIRS)).unbind(3))
            (c1, c2), (first, second) = pairs, self.channels[layer]
            x[layer].index_add_(3, first, c1 * cos - c2 * sin, alpha=-1)
            x[layer].index_add_(3, second, c2 * cos + c1 * sin, alpha=-1)
        return x

    def query_rows(self, q: torch.Tensor, layer: int) -> torch.Tensor | None:
        """``q [..., H, M, D]`` as it meets table rows, fp32 ``[..., H, M, 16·n]``; None without a centre."""
        pairs = self.pairs[layer]
        if pairs is None:
            return None
        (c1, c2), (first, second) = pairs, self.channels[layer]
        q1, q2 = q.index_select(-1, first).float(), q.index_select(-1, second).float()
        rows = (q1 * c1).addcmul_(q2, c2), (q2 * c1).addcmul_(q1, c2, value=-1)
        return torch.stack([row.unflatten(-1, (-1, ROTARY_PAIRS)) for row in rows], -2).flatten(-3)


def on_one_table(
    centers: Sequence[Center | None], device: torch.device | str, dtype: torch.dtype
) -> tuple[Center | None, ...]:
    """Centres of the groups of a pool on its device, all with one table of no more blocks than they use.

    A group that uses none has no centre.
    """
    used = [center for center in centers if center is not None and center.used]
    if not used:
        return (None,) * len(centers)
    table = used[0].rotary.keep(_held_blocks(used)).on(device, dtype)
    # A copy: what is filled later is the device's alone.
    return tuple(
        Center(center.vector.to(device, copy=True), center.blocks, table, center.whole)
        if center is not None and center.used
        else None
        for center in centers
    )


def center_bytes(centers: Sequence[Center | None], tokens: int | None = None) -> int:
    """Bytes on the device of what ``on_one_table`` makes: centres, and the table at 16 bits.

    Args:
        tokens: of the longest sequence that the table must serve; None is all that it has.
    """
    used = [center for center in centers if center is not None and center.used]
    if not used:
        return 0
    table = used[0].rotary
    rows = table.positions if tokens is None else table.rows_for(tokens)
    return sum(center.nbytes for center in used) + len(_held_blocks(used)) * rows * ROTARY_COLUMNS * 2


def _held_blocks(used: Sequence[Center]) -> list[int]:
    """Blocks of the table that centres share."""
    if any(center.whole for center in used):
        return list(used[0].rotary.blocks)
    return sorted({block for center in used for block in center.used})


@dataclass(frozen=True)
class ModelKeys:
    """What a model says of the keys of its layers, on this rank.

    Attributes:
        rotary: all pairs of its rotary table, or None.
        bias: per layer, fp32 ``[H, D]`` before the rotary embedding, or None where keys have none.
        spread: per layer, fp32 ``[H]`` energy of what varies as ``chosen_blocks`` takes it, or None where unknown.
        problem: why there is no table.
    """

    rotary: RotaryTable | None = None
    bias: tuple[torch.Tensor | None, ...] = ()
    spread: tuple[torch.Tensor | None, ...] = ()
    problem: str = "nothing is known of the model's keys"

    @cached_property
    def center_rotary(self) -> RotaryTable | None:
        """What turns centres. Where keys have no bias these are means, which are no centre of the first keys.

        The key of a first token lies far from all others, and most queries look at it: coded around the mean it would
        be off by more than with no centre. A bias is part of it as of any other.
        """
        biased = any(bias is not None for bias in self.bias)
        return self.rotary if self.rotary is None or biased else self.rotary.without_start()

    def has_bias(self, layers: Sequence[int]) -> bool:
        """Whether the keys of some of these layers have a bias."""
        return any(self.bias[layer] is not None for layer in layers if layer < len(self.bias))

    def large_bias(self, layers: Sequence[int]) -> bool:
        """Whether a bias is large enough, against what varies, to stretch ranges."""
        for layer in layers:
            bias = self.bias[layer] if layer < len(self.bias) else None
            if bias is not None:
                spread = self.spread[layer]
                energy = bias.double().square().sum(-1)
                if bool((energy > CENTER_TOLERANCE[2] * (0.0 if spread is None else spread)).any()):
                    return True
        return False


def default_center(keys: ModelKeys, layers: Sequence[int], heads: int, choice: str, k_final: int) -> Center | str:
    """The centre of a layer group without a calibration, or why it has none.

    Args:
        heads: KV heads of this rank.
        choice: ``bias``, what the weights say; ``auto``, that where they say it, else means that the pool measures
            before its first shrink; ``none``.
        k_final: final width of the keys; those that stay at 16 bits have no centre.
    """
    if k_final == 16:
        return "keys stay at 16 bits"
    if choice == "none":
        return "switched off"
    rotary = keys.center_rotary
    if rotary is None:
        return keys.problem
    if not keys.has_bias(layers):
        if choice == "bias":
            return "no bias in the weights"
        return Center.to_come(len(layers), heads, rotary, MEASURED_BLOCKS)
    zero, none = torch.zeros(heads, 2 * rotary.first.numel()), torch.zeros(heads)
    bias, spread = ([of[layer] for layer in layers] for of in (keys.bias, keys.spread))
    vector = torch.stack([zero if b is None else b for b in bias])
    varies = torch.stack([none if s is None else s for s in spread])
    blocks = chosen_blocks(vector, varies, rotary, CENTER_TOLERANCE[k_final])
    return Center.of(vector, blocks, rotary) if any(blocks) else "the bias is small against what varies"
