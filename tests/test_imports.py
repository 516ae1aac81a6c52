"""Imports run one way, heavy packages stay out of the rooms that must not need them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sglang_pmkvq"

# A room imports from rooms of lower rank and from itself. Rooms of one rank do not know each other,
# except on the plugin side, which is one room in several files.
RANK = {
    "": 0,  # the package's own __init__
    "formats": 0,
    "commands": 1,
    "timeline": 1,
    "config": 2,
    "artifact": 2,
    "ledger": 2,
    "kernels": 2,
    "calib": 3,  # and of the kernels only the reference: see CALIB_MAY
    "refusals": 3,
    "report": 3,
    "pool": 3,
    "attention": 4,
    "allocator": 4,
    "metrics": 4,
    "plugin": 5,
    "cli": 6,
    "demo": 6,
    "doctor": 6,
}
PLUGIN_SIDE = {"runtime", "calibration", "sizing", "install", "server_args", "patches", "plugin"}
TOOLS = {"cli", "demo", "doctor", "report"}
NO_TORCH = {"", "formats", "commands", "timeline", "config", "refusals", "ledger", "report", "cli"}
CALIB_MAY = {"formats", "artifact", "calib"}
SGLANG_ALLOWED = {"pool", "attention", "allocator", "metrics", "plugin"}


def room_of(module: str) -> str:
    """``sglang_pmkvq.ledger.arena`` → ``ledger``; all of the plugin side is one room."""
    parts = module.split(".")
    assert parts[0] == "sglang_pmkvq"
    room = parts[1] if len(parts) > 1 else ""
    return "plugin" if room in PLUGIN_SIDE else room


def modules() -> Iterator[tuple[str, Path]]:
    """(module name, file) of everything in the package, through the links to the top-level folders."""
    for folder, folders, files in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            # `from sglang_pmkvq import runtime` names a module, not an attribute of the package.
            names = [alias.name for alias in node.names] if base == "sglang_pmkvq" else [""]
            for name in names:
                is_module = name and ((PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir())
                yield node.lineno, f"{base}.{name}" if is_module else base


ALL = sorted(modules())


def violations(module: str, path: Path) -> list[str]:
    room = room_of(module)
    found = []
    for line, name in imports(module, path):
        top = name.split(".")[0]
        where = f"{module}:{line}"
        if top == "sglang_pmkvq":
            other = room_of(name)
            if other not in RANK:
                found.append(f"{where}: room {other!r} has no rank")
            elif other != room and RANK[other] >= RANK[room] and not (room == "cli" and other in TOOLS):
                found.append(f"{where}: {room or 'the package'} must not import {other}")
            elif room == "calib" and other and other not in CALIB_MAY and ".kernels.reference" not in name:
                found.append(f"{where}: calib must not import {name}")
        elif top in ("benchmarks", "tests", "scripts", "patches", "calib"):
            found.append(f"{where}: the package must not import {name}")
        elif top == "kernels":
            found.append(f"{where}: `kernels` is another package; ours is sglang_pmkvq.kernels")
        elif top == "sglang" and room not in SGLANG_ALLOWED:
            found.append(f"{where}: {room} must not import sglang")
        elif top in ("torch", "triton") and room in NO_TORCH:
            found.append(f"{where}: {room or 'the package'} must not import {top}")
    return found


def test_every_module_is_looked_at() -> None:
    names = [module for module, _ in ALL]
    assert {"sglang_pmkvq", "sglang_pmkvq.formats", "sglang_pmkvq.commands", "sglang_pmkvq.cli"} <= set(names)
    assert any(name.startswith("sglang_pmkvq.kernels.") for name in names)
    assert any(name.startswith("sglang_pmkvq.patches.") for name in names)


@pytest.mark.parametrize("module", [module for module, _ in ALL])
def test_imports_run_one_way(module: str) -> None:
    assert room_of(module) in RANK, f"give {module} a rank in this file"
    assert violations(module, dict(ALL)[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("sglang_pmkvq.formats", "from sglang_pmkvq.commands import X", "formats must not import commands"),
        ("sglang_pmkvq.ledger.a", "def f():\n    import torch.nn", "ledger must not import torch"),
        ("sglang_pmkvq.ledger.a", "from ..kernels import plan", "ledger must not import kernels"),
        ("sglang_pmkvq.kernels.a", "import sglang.srt", "kernels must not import sglang"),
        ("sglang_pmkvq.kernels.a", "from sglang_pmkvq import pool", "kernels must not import pool"),
        ("sglang_pmkvq.calib.a", "from sglang_pmkvq.kernels import plan", "calib must not import sglang_pmkvq.kernels"),
        ("sglang_pmkvq.pool", "from sglang_pmkvq.attention import backend", "pool must not import attention"),
        ("sglang_pmkvq.attention.a", "from .. import runtime", "attention must not import plugin"),
        ("sglang_pmkvq.plugin", "import benchmarks.reasoner.task", "must not import benchmarks"),
        ("sglang_pmkvq.doctor", "import sglang", "doctor must not import sglang"),
        ("sglang_pmkvq.plugin", "from kernels import plan", "is another package"),
    ],
)
def test_the_rule_sees_violations(tmp_path: Path, module: str, source: str, expected: str) -> None:
    path = tmp_path / "a.py"
    path.write_text(source)
    found = violations(module, path)
    assert len(found) == 1
    assert expected in found[0]


def test_jit_kernels_live_in_their_own_folder() -> None:
    """Device code apart from launch code: ``@triton.jit`` below kernels/triton only."""
    for module, path in ALL:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any("triton.jit" in d or d == "jit" for d in decorators):
                    assert module.startswith("sglang_pmkvq.kernels.triton."), f"{module}:{node.lineno}"


def test_light_rooms_run_without_torch_and_sglang() -> None:
    """Not only by their own imports: nothing heavy comes in behind them either."""
    light = [module for module, _ in ALL if room_of(module) in NO_TORCH - {"report"}]
    code = (
        f"import importlib, sys\nfor m in {light!r}: importlib.import_module(m)\n"
        "heavy = {'torch', 'sglang', 'triton', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_third_party_imports_are_declared() -> None:
    """What the package imports is in pyproject's dependencies, not merely there by accident."""
    declared = {
        Requirement(line).name.lower().replace("_", "-")
        for line in metadata.requires("sglang-pmkvq") or []
        if "extra ==" not in line
    }
    distributions = metadata.packages_distributions()
    missing = set()
    for module, path in ALL:
        for line, name in imports(module, path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "sglang_pmkvq":
                continue
            providers = {d.lower().replace("_", "-") for d in distributions.get(top, [])}
            if not providers & declared:
                missing.add(f"{module}:{line}: {top}")
    assert missing == set()
