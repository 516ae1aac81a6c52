"""Environment that SGLang reads while it is imported, and servers shared by the tests of a configuration."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
