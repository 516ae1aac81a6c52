"""Page-table entries on the device: ``unit << STEP_BITS | step``, all bits set where a page has no block."""

import triton
import triton.language as tl
from sglang_pmkvq import formats

STEP_BITS = tl.constexpr(formats.STEP_BITS)
STEP_MASK = tl.constexpr(formats.STEP_MASK)
SUPERBLOCK_SHIFT = tl.constexpr(formats.STEP_BITS + formats.block_order(16))
assert formats.UNMAPPED == -1, "the kernels take a negative entry for a page without a block"


@triton.jit
def step_of(entry):
    """Step of an entry; 0 where there is no block."""
    return tl.where(entry < 0, 0, entry & STEP_MASK)


@triton.jit
def unit_of(entry):
    """First unit of an entry's block; 0 where there is no block."""
    return tl.where(entry < 0, 0, entry >> STEP_BITS)
