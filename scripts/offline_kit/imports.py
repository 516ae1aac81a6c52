"""Checks that an environment has all that a server of a dense model imports, and that the plugin is found.

    python -m scripts.offline_kit.imports                 on a machine with a GPU
    python -m scripts.offline_kit.imports --without-gpu   imports as on a GPU, as far as the first call of the driver

``--without-gpu`` answers SGLang's and FlashInfer's questions about the device itself and gives the operators of
``sglang-kernel`` a driver library whose functions end the process: what loads there has everything but the driver. It
needs gcc and binutils.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

# In the order of a server's start; the client and this project last.
MODULES = (
    "torch",
    "triton",
    "transformers",
    "sgl_kernel",
    "flashinfer",
    "sglang.srt.server_args",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.llama",
    "sglang.srt.models.qwen2",
    "sglang.srt.models.qwen3",
    "sglang.srt.layers.attention.flashinfer_backend",
    "sglang.srt.layers.attention.triton_backend",
    "sglang.srt.layers.sampler",
    "sglang.launch_server",
    "sglang.benchmark.serving",
    "sglang_pmkvq.serving.plugin",
    "sglang_pmkvq.serving.attention",
    "sglang_pmkvq.kernels.warm_up",
    "benchmarks.gpu.__main__",
    "tests.test_gpu_smoke",
)
DISTRIBUTIONS = ("torch", "triton", "transformers", "sglang", "sglang-kernel", "flashinfer-python", "sglang-pmkvq")


def dead_driver(library: Path, folder: Path) -> Path:
    """A ``libcuda.so.1`` with every driver function that `library` asks for; each ends the process when called."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    names = sorted(set(re.findall(r"\bU (cu[A-Z]\w*)", listing)))
    source = folder / "driver.c"
    source.write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n"
        + "".join(
            f'int {n}(void) {{ fprintf(stderr, "first call of the driver: {n}\\n"); _Exit(70); }}\n' for n in names
        )
    )
    target = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", target, source], check=True)
    return target


def pretend_gpu(major: int) -> None:
    """Answer what SGLang, FlashInfer and sglang-kernel ask torch about the device while they are imported."""
    import torch

    facts = SimpleNamespace(major=major, minor=0, multi_processor_count=132, total_memory=80 << 30, name="no GPU")
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (major, 0),
        "get_device_name": facts.name,
        "get_device_properties": facts,
        "is_initialized": False,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)


def entry_point_found() -> str | None:
    """None if SGLang will find this project's plugin, else why not."""
    points = [p for p in metadata.entry_points(group="sglang.srt.plugins") if p.name == "pmkvq"]
    if not points:
        return "no entry point pmkvq in group sglang.srt.plugins; is the project's wheel installed?"
    if not callable(points[0].load()):
        return f"entry point pmkvq is {points[0].value}, which is no function"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-gpu", action="store_true", help="pretend a GPU, stop at the driver")
    options = parser.parse_args(argv)
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.without_gpu:
            spec = importlib.util.find_spec("sgl_kernel")
            assert spec is not None and spec.origin is not None
            # A kit has one of them; of the whole wheel, Hopper's.
            operators = max(Path(spec.origin).parent.glob("sm*/common_ops.*"))
            pretend_gpu(9 if operators.parent.name == "sm90" else 10)
            # Found by its name when the operators ask for it.
            ctypes.CDLL(str(dead_driver(operators, Path(folder))), mode=ctypes.RTLD_GLOBAL)
        for name in MODULES:
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever it is, the rest is checked too
                wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  {name}: {wrong.get(name, 'ok')}", flush=True)
    problem = entry_point_found()
    if problem is not None:
        wrong["plugin"] = problem
    print(f"  entry point of the plugin: {problem or 'ok'}")
    for name in DISTRIBUTIONS:
        try:
            print(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            wrong[name] = "not installed"
            print(f"  {name}: not installed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
