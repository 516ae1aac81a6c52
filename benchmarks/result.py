"""Writes a benchmark's result file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(result: dict[str, Any], path: Path | None) -> None:
    """``result`` as JSON; the file appears whole or not at all, so that a run killed while writing can be resumed.

    None writes nothing.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
