"""Entry point ``sglang.srt.plugins``: registers the hooks of the installed SGLang version."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sglang_pmkvq.patches import base, v0_5_15

PATCH_SETS = (v0_5_15,)


@dataclass(frozen=True)
class Problem:
    """Why this SGLang cannot be served.

    Attributes:
        text: one sentence.
        version_only: the hook targets look right, only the version is unknown.
    """

    text: str
    version_only: bool


def supported_versions() -> tuple[str, ...]:
    return tuple(v for patch_set in PATCH_SETS for v in patch_set.SUPPORTED)


@lru_cache(maxsize=1)
def hook_targets() -> tuple[base.Target, ...]:
    """Hook targets for the installed SGLang; the newest patch set where the version is unknown."""
    import sglang

    for patch_set in PATCH_SETS:
        if sglang.__version__ in patch_set.SUPPORTED:
            return patch_set.targets()
    return PATCH_SETS[-1].targets()


@lru_cache(maxsize=1)
def check_installed() -> Problem | None:
    """None if the installed SGLang is one we know, else the problem; call before the hooks are applied or after."""
    import sglang

    broken = [f"{t.path} ({reason})" for t in hook_targets() if (reason := base.check(t))]
    if broken:
        return Problem(f"SGLang's code differs from what is patched: {'; '.join(broken)}", False)
    if sglang.__version__ not in supported_versions():
        return Problem(
            f"untested SGLang version; tested are {', '.join(supported_versions())}, try "
            "--pmkvq-allow-untested-sglang at your own risk",
            True,
        )
    return None


def register() -> None:
    """Install the hooks. SGLang calls this in every process, before it parses arguments.

    Raises:
        RuntimeError: the server-arguments class cannot be extended (SGLang logs it and serves without us, but
            then ``--kv-quant`` is an unknown flag).
    """
    ensure_cpu_engine()
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices

    from sglang_pmkvq.server_args import BACKEND, PmkvqServerArgs

    check_installed()
    for target in hook_targets():
        HookRegistry.register(target.path, target.hook, HookType(target.kind))
    # A class attribute of Engine: the registry rebinds module globals only.
    Engine.server_args_class = PmkvqServerArgs
    add_attention_backend_choices([BACKEND])

    @register_attention_backend(BACKEND)
    def create(runner: object) -> object:
        from sglang_pmkvq.attention.backend import PmkvqAttnBackend

        return PmkvqAttnBackend(runner)  # type: ignore[arg-type]


def ensure_cpu_engine() -> None:
    """On a machine without a GPU, restart a ``--kv-quant pmkvq`` server command with SGLANG_USE_CPU_ENGINE=1.

    SGLang reads the variable while it is imported, so setting it here is too late for this process. Only server
    commands are restarted; a Python program that uses ``sglang.Engine`` gets an error that names the variable.
    """
    arguments = " ".join(sys.argv)
    if "--kv-quant pmkvq" not in arguments and "--kv-quant=pmkvq" not in arguments:
        return
    if not _is_server_command(sys.argv, sys.orig_argv):
        return
    if os.environ.get("SGLANG_USE_CPU_ENGINE") is not None:
        return
    import multiprocessing

    import torch

    if torch.cuda.is_available() or multiprocessing.parent_process() is not None:
        return
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"}
    print("pmkvq: no GPU found, starting again with SGLANG_USE_CPU_ENGINE=1", file=sys.stderr, flush=True)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_server_command(argv: Sequence[str], orig_argv: Sequence[str]) -> bool:
    """``sglang serve`` or ``python -m sglang.launch_server``: there a restart repeats nothing."""
    program = Path(argv[0])
    if program.stem == "sglang":
        return argv[1:2] == ["serve"]
    if (program.parent.name, program.name) == ("sglang", "launch_server.py"):
        return True
    # While Python still looks the module up, argv[0] is "-m".
    return argv[0] == "-m" and "sglang.launch_server" in orig_argv
