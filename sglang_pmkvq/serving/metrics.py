"""What the pool is doing: Prometheus metrics, SGLang's decode log, timeline rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sglang_pmkvq.formats import TIERS
from sglang_pmkvq.timeline import TimelineWriter

if TYPE_CHECKING:
    from sglang_pmkvq.ledger import Ledger, LedgerStats
    from sglang_pmkvq.serving.first_shrink import WorstLayer
    from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
    from sglang_pmkvq.serving.pool_setup import PoolSetup

PREFIX = "sglang:pmkvq_"

# name, documentation, extra labels; docs/metrics.md explains the units.
GAUGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "pages",
        "Pages per tier, in page equivalents: each (layer, side) counts its share of a page.",
        ("tier",),
    ),
    ("bytes", "Bytes of the blocks of mapped pages per tier.", ("tier",)),
    ("storage_bytes", "Bytes of all pool tensors: arenas, scales and zeros, page tables.", ()),
    ("used_bytes", "Bytes of blocks of mapped pages, plus scales and zeros of pages below 16 bits.", ()),
    ("used_bytes_avg", "Mean of used_bytes over forwards.", ()),
    ("used_bytes_peak", "Highest used_bytes at a forward.", ()),
    ("logical_tokens", "Tokens that SGLang may hand out.", ()),
    ("protected_pages", "Pages that may not shrink (hard) or shrink last (soft).", ("kind",)),
    ("effective_bits", "Bits per KV element of mapped pages, scales and zeros included, now.", ()),
    ("effective_bits_avg", "Mean effective bits over forwards, weighted by mapped tokens.", ()),
    ("effective_bits_peak", "Highest effective bits at a forward.", ()),
    (
        "retractions_since_finish",
        "Requests retracted since one last ended; only a livelock lets it grow without end.",
        (),
    ),
    ("key_error", "Relative error of attention logits by coded keys, measured at a group's first shrink.", ("group",)),
)
COUNTERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("shrinks", "Shrinks of a page's K or V in one layer group.", ("from", "to")),
    ("shrunk_bytes", "Bytes freed by shrinking.", ("from", "to")),
    ("overflow_groups", "Groups of channels with values beyond fp16, clamped at their first shrink.", ()),
    ("dropped_rows", "New rows (a token in a layer) not stored, their page being unmapped or shrunk; must be 0.", ()),
    ("unmapped_reads", "Pages without a block that attention met; must be 0.", ()),
    (
        "evict_requests",
        "Times cached pages were evicted to keep running requests at --pmkvq-min-active-bits.",
        (),
    ),
    ("shrink_seconds", "Host time of the allocations that shrank pages and of issuing their commands.", ()),
)


class MetricsReporter:
    """Reads the ledger's counters; costs nothing per token."""

    def __init__(self, setup: PoolSetup, ledger: Ledger, pool: MixedPrecisionTokenPool) -> None:
        self._setup = setup
        self._ledger = ledger
        self._pool = pool
        self._labels: dict[str, str] | None = None
        self._metrics: dict[str, Any] = {}
        self._exported: dict[tuple[str, tuple[str, ...]], float] = {}
        self._retractions_since_finish = 0
        self._shrink_seconds = 0.0
        self._timeline = TimelineWriter(setup.timeline, setup.summary()) if setup.timeline else None

    def attach(self, labels: dict[str, str]) -> None:
        """Create the metrics with SGLang's own labels; call where SGLang creates its own."""
        from prometheus_client import Counter, Gauge

        self._labels = labels
        for name, text, extra in GAUGES:
            self._metrics[name] = Gauge(
                PREFIX + name, text, [*labels, *extra], multiprocess_mode="mostrecent"
            )
        for name, text, extra in COUNTERS:
            self._metrics[name] = Counter(PREFIX + name, text, [*labels, *extra])
        self.export()

    def export(self) -> None:
        """Bring the Prometheus metrics up to date."""
        if self._labels is None:
            return
        stats = self._ledger.stats()
        for tier in TIERS:
            self._set("pages", stats.pages[tier], str(tier))
            self._set("bytes", stats.block_bytes[tier], str(tier))
        self._set("storage_bytes", self._pool.storage_bytes())
        self._set("used_bytes", stats.used_bytes)
        self._set("used_bytes_avg", stats.used_bytes_avg)
        self._set("used_bytes_peak", stats.used_bytes_peak)
        self._set("logical_tokens", self._setup.tokens)
        self._set("protected_pages", stats.hard_pages, "hard")
        self._set("protected_pages", stats.soft_pages, "soft")
        self._set("effective_bits", stats.effective_bits)
        self._set("effective_bits_avg", stats.effective_bits_avg)
        self._set("effective_bits_peak", stats.effective_bits_peak)
        self._set("retractions_since_finish", self._retractions_since_finish)
        for name, worst in self._key_errors().items():
            self._set("key_error", worst.key_error, name)
        for (old, new), count in stats.shrinks.items():
            self._count("shrinks", count, str(old), str(new))
            self._count("shrunk_bytes", stats.shrunk_bytes[old, new], str(old), str(new))
        for name, count in asdict(self._pool.counters.read()).items():
            self._count(name, count)
        self._count("evict_requests", stats.evict_requests)
        self._count("shrink_seconds", self._shrink_seconds)

    def _key_errors(self) -> dict[str, WorstLayer]:
        """By the name of the layer group, as far as measured."""
        found = self._pool.first_shrink
        return {} if found is None else {self._setup.groups[g].name(): worst for g, worst in found.errors.items()}

    def _child(self, name: str, extra: tuple[str, ...]) -> Any:
        assert self._labels is not None
        return self._metrics[name].labels(*self._labels.values(), *extra)

    def _set(self, name: str, value: float, *extra: str) -> None:
        self._child(name, extra).set(value)

    def _count(self, name: str, value: float, *extra: str) -> None:
        key = (name, extra)
        self._child(name, extra).inc(value - self._exported.get(key, 0.0))
        self._exported[key] = value

    def log_part(self) -> str:
        """``#pages 16/8/4/2: 40.0/12.5/3.0/0.0, eff bits: 11.20`` for SGLang's periodic decode line."""
        stats = self._ledger.stats()
        pages = "/".join(f"{stats.pages[tier]:.1f}" for tier in TIERS)
        return f"#pages 16/8/4/2: {pages}, eff bits: {stats.effective_bits:.2f}"

    def on_forward(self) -> None:
        """One timeline row per forward; the writer thins them out and keeps the last."""
        if self._timeline is not None:
            self._timeline.record(self._row(self._ledger.stats()))

    def on_shrinks(self, seconds: float) -> None:
        """Deciding on and issuing the copies of a forward took so much host time."""
        self._shrink_seconds += seconds

    def on_retract(self, requests: int) -> None:
        self._retractions_since_finish += requests
        self.event("retract", requests=requests)

    def on_finish(self) -> None:
        """A request ended, so the server gets on."""
        self._retractions_since_finish = 0

    def event(self, name: str, **fields: object) -> None:
        if self._timeline is not None:
            self._timeline.event(name, **fields)

    def _row(self, stats: LedgerStats) -> dict[str, object]:
        return {
            "tick": stats.tick,
            "bytes": {str(tier): stats.block_bytes[tier] for tier in TIERS},
            "arena_bytes": self._setup.geometry.arena_bytes,
            "used_bytes": stats.used_bytes,
            "effective_bits": stats.effective_bits,
            "pages_mapped": stats.mapped_pages,
            "running": stats.running_requests,
            "shrinks": sum(stats.shrinks.values()),
        }

    def state(self) -> dict[str, object]:
        """For ``/server_info``: the numbers of the metrics, without needing ``--enable-metrics``."""
        stats = self._ledger.stats()
        measured = None if self._pool.first_shrink is None else self._pool.first_shrink.measured
        return {
            "storage_bytes": self._pool.storage_bytes(),
            "used_bytes": stats.used_bytes,
            "used_bytes_avg": stats.used_bytes_avg,
            "used_bytes_peak": stats.used_bytes_peak,
            "mapped_pages": stats.mapped_pages,
            "running_requests": stats.running_requests,
            "pages": {str(t): stats.pages[t] for t in TIERS},
            "bytes": {str(t): stats.block_bytes[t] for t in TIERS},
            "shrinks": {f"{a}->{b}": n for (a, b), n in stats.shrinks.items()},
            "evict_requests": stats.evict_requests,
            "shrink_seconds": self._shrink_seconds,
            "decode_read_bytes": self._ledger.running_bytes,
            "key_error": {name: asdict(worst) for name, worst in self._key_errors().items()},
            "measured_centers": None if measured is None else asdict(measured),
            **asdict(self._pool.counters.read()),
            "effective_bits": stats.effective_bits,
            "effective_bits_avg": stats.effective_bits_avg,
            "effective_bits_peak": stats.effective_bits_peak,
            "retractions_since_finish": self._retractions_since_finish,
        }
