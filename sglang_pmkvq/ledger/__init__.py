"""The host ledger: decides where every page of the pool lives and how wide it is stored."""

from sglang_pmkvq.ledger.errors import IntegrityError, LedgerError, ReplayError
from sglang_pmkvq.ledger.ledger import Ledger
from sglang_pmkvq.ledger.policy import PolicyConfig
from sglang_pmkvq.ledger.replay import Replay
from sglang_pmkvq.ledger.stats import LedgerStats

__all__ = [
    "IntegrityError",
    "Ledger",
    "LedgerError",
    "LedgerStats",
    "PolicyConfig",
    "Replay",
    "ReplayError",
]
