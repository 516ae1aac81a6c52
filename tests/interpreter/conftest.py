"""These tests need ``TRITON_INTERPRET=1`` before triton is imported, so they run in a process of their own.

Triton reads the variable when its own library is decorated, at import; a process that has imported
triton without it can never interpret, and one that has it can never compile. In the ordinary suite this
folder is therefore not collected; ``tests/test_triton_interpreter.py`` runs it. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreter
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _really_interpreted() -> None:
    from sglang_pmkvq.kernels.launch import interpreted

    assert interpreted()
