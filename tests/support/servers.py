"""Several servers at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

from benchmarks.harness.servers import Server


def start_together(stack: ExitStack, *servers: AbstractContextManager[Server]) -> list[Server]:
    """Enter all at once, in threads: while one waits for its processes, another imports. ``stack`` stops them."""
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(stack.enter_context, servers))
