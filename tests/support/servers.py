"""What tests ask of servers: several at the same time, their metrics, and whether they are sound."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

import requests
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.servers import Server


def start_together(stack: ExitStack, *servers: AbstractContextManager[Server]) -> list[Server]:
    """Enter all at once, in threads: while one waits for its processes, another imports. ``stack`` stops them."""
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(stack.enter_context, servers))


def metrics(server: Server) -> dict[str, float]:
    """Prometheus samples by ``name{labels}`` without SGLang's own labels."""
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    out: dict[str, float] = {}
    for sample in (s for family in text_string_to_metric_families(text) for s in family.samples):
        labels = [f"{k}={v}" for k, v in sample.labels.items() if k in ("tier", "from", "to", "kind", "group")]
        out[sample.name + ("{" + ",".join(labels) + "}" if labels else "")] = sample.value
    return out


def sound(server: Server) -> None:
    """Raises:
    RuntimeError: something was lost on the device, an error was logged, or an empty server holds pages (ours only)."""
    pool = server.pool()
    if lost := {name: pool[name] for name in ("dropped_rows", "unmapped_reads") if pool[name]}:
        raise RuntimeError(f"lost on the device: {lost}")
    server.flush()
    if mapped := server.pool()["mapped_pages"]:
        raise RuntimeError(f"an empty server holds {mapped} pages")
    if errors := server.errors():
        raise RuntimeError(f"the server logged {errors[:3]}")
