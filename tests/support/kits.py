"""Runs SGLang's shipped test kits against a server of ours and looks after what they leave behind."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import requests

from benchmarks.harness.servers import Server


class KitCase(unittest.TestCase):
    """What the kits' mixins read from the class they are mixed into; ``bind`` fills it."""

    base_url: str
    model: str
    process: Popen[bytes]
    server: Server


def bind(case: Any, server: Server, model: Path) -> None:
    case.server, case.base_url, case.process, case.model = server, server.url, server.process, str(model)


@contextmanager
def clean(server: Server) -> Iterator[None]:
    """Start from an empty pool; afterwards nothing may be left, on the server's side or in its log.

    Raises:
        AssertionError: the server ended, wrote an error, keeps requests or pages, or no longer answers.
    """
    server.flush()
    server.mark()
    yield
    left_behind(server)


def left_behind(server: Server) -> None:
    assert server.process.poll() is None, server.log()[-4000:]
    server.flush()
    pool = server.pool()
    assert pool["mapped_pages"] == 0, pool
    assert pool["running_requests"] == 0, pool
    assert not any(pool["bytes"].values()), pool
    assert requests.get(f"{server.url}/health_generate", timeout=120).status_code == 200
    assert server.process.poll() is None
    assert not server.errors(since_mark=True), server.errors(since_mark=True)


def shrinks(server: Server) -> int:
    """Shrinks of a page's K or V in one layer group since the server started."""
    return sum(server.pool()["shrinks"].values())
