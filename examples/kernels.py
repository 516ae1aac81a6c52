"""The attention kernels without SGLang: a pool of two requests, pages at 16, 8, 4 and 2 bits, and one decode step.

    .venv/bin/python examples/kernels.py

torch runs it on the CPU, Triton on a GPU. Every page starts at 16 bits; then the older ones shrink, as the ledger
would command it. The output is compared with plain fp32 attention, over what the pages hold now, and over the keys
and values as they were written.
"""

from __future__ import annotations

import numpy as np
import torch

from sglang_pmkvq.commands import ArenaCopies, CommandBatch, TableUpdate
from sglang_pmkvq.formats import (
    STEP_BITS,
    UNITS_PER_SUPERBLOCK,
    K,
    LayerGroup,
    PageShape,
    V,
    geometry_for_pages,
)
from sglang_pmkvq.kernels.choose import kernels_for
from sglang_pmkvq.kernels.coding import Coding
from sglang_pmkvq.kernels.reference.attention import attention, read_sequence
from sglang_pmkvq.kernels.storage import allocate_pool
from sglang_pmkvq.kernels.transforms import Hadamard

HEADS, QUERY_HEADS, HEAD_DIM, PAGE = 2, 8, 128, 16
PAGES_EACH = 6


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = PageShape(PAGE, HEADS, HEAD_DIM, group_size=HEAD_DIM)
    group = LayerGroup(layers=(0,), k_final=2, v_final=2)  # a page's steps: 16, 8, 4, 2 bits
    pages = 2 * PAGES_EACH
    geometry = geometry_for_pages(shape, (group,), num_pages=2 * pages, hard_pages=2 * pages)
    (storage,) = allocate_pool(geometry, torch.bfloat16, device, [Coding(Hadamard(HEAD_DIM))])
    kernels = kernels_for(storage.device)

    # Logical pages 1 .. 12, each a whole superblock: page p in superblock p, at step 0.
    page = np.arange(1, pages + 1, dtype=np.int32)
    whole = page * UNITS_PER_SUPERBLOCK
    kernels.update_table(storage, TableUpdate(group=0, arena=0, page=page, entry=whole << STEP_BITS))

    # The first request has pages 1 .. 6, the second 7 .. 12 and five tokens less.
    req_pages = torch.from_numpy(page.reshape(2, PAGES_EACH)).to(device)
    lengths = torch.tensor([PAGES_EACH * PAGE, PAGES_EACH * PAGE - 5], device=device)
    slots = torch.arange(PAGE, (pages + 1) * PAGE, device=device)  # slot = page · P + offset
    k, v = torch.randn(2, slots.numel(), HEADS, HEAD_DIM, device=device).bfloat16()
    kernels.store(storage, 0, slots, k, v)

    # Of each request the first page goes to 2 bits, the next to 4, the next to 8; the others stay.
    steps = np.tile([3, 2, 1, 0, 0, 0], 2)
    moved = np.flatnonzero(steps)
    tier = np.array([group.steps[step][0] for step in steps[moved]], dtype=np.uint8)
    # Into blocks behind the pages' own; each is at the start of a superblock here, the ledger packs them.
    target = ((pages + 1 + np.arange(moved.size)) * UNITS_PER_SUPERBLOCK).astype(np.int32)
    copies = ArenaCopies(0, 0, page[moved], whole[moved], target, np.full_like(tier, 16), tier)
    entry = (target << STEP_BITS | steps[moved]).astype(np.int32)
    kernels.execute([storage], CommandBatch(((copies,),), (TableUpdate(0, 0, page[moved], entry),)))

    decode = kernels.decode()
    decode.plan(storage, req_pages, lengths)  # once per forward and layer group
    q = torch.randn(2, QUERY_HEADS, HEAD_DIM, device=device).bfloat16()
    out = decode.run(q, layer=0, scale=HEAD_DIM**-0.5)  # once per layer
    assert isinstance(out, torch.Tensor)

    print(f"kernels: {kernels.name}")
    scale = HEAD_DIM**-0.5
    for request, length in enumerate(lengths.tolist()):
        query, got = q[request : request + 1].cpu(), out[request].cpu().float()
        own = req_pages[request].tolist()
        held, _ = attention(query, *(read_sequence(storage, side, 0, own, length) for side in (K, V)), scale)
        first = request * PAGES_EACH * PAGE
        written, _ = attention(query, *(x[first : first + length].cpu() for x in (k, v)), scale)
        kernel_error, coding_error = (float((got - want[0]).norm() / want.norm()) for want in (held, written))
        bits = [group.steps[step][0] for step in steps[request * PAGES_EACH : (request + 1) * PAGES_EACH]]
        print(f"request {request}: {length} tokens in pages of {bits} bits")
        print(f"  error of the kernels {kernel_error:.4f}, of shrinking random keys and values {coding_error:.2f}")


if __name__ == "__main__":
    main()
