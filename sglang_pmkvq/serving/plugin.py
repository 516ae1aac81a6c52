"""Entry point ``sglang.srt.plugins``: registers the hooks of the installed SGLang version."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_pmkvq.serving import engine, hooks
from sglang_pmkvq.serving.versions import check_installed, patch_set


def register() -> None:
    """Install the hooks. SGLang calls this in every process, before it parses arguments.

    Raises:
        RuntimeError: the server-arguments class cannot be extended (SGLang logs it and serves without us, but
            then ``--kv-quant`` is an unknown flag).
    """
    ensure_cpu_engine()
    from sglang_pmkvq.serving.server_args import BACKEND, PmkvqServerArgs

    check_installed()
    ours = {"PmkvqServerArgs": PmkvqServerArgs}
    for target in patch_set().targets:
        hook = ours.get(target.hook) or getattr(hooks, target.hook)
        engine.HookRegistry.register(target.path, hook, engine.HookType(target.kind))
    # A class attribute of Engine: the registry rebinds module globals only.
    engine.Engine.server_args_class = PmkvqServerArgs
    engine.add_attention_backend_choices([BACKEND])

    @engine.register_attention_backend(BACKEND)
    def create(runner: object) -> object:
        from sglang_pmkvq.serving.attention import PmkvqAttnBackend

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
