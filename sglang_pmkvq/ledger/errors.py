"""What can go wrong in the ledger, named."""

from __future__ import annotations


class LedgerError(RuntimeError):
    """The caller broke the allocator's contract: double free, page out of range, R exceeded, …"""


class IntegrityError(LedgerError):
    """Books that must agree do not; the message carries the numbers."""


class ReplayError(LedgerError):
    """A command batch broke a rule of its waves, or its table names a block with other content."""
