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

# A room is a folder; the files at the top of the package are one room, of leaves. A room imports from rooms of lower
# rank and from itself; rooms of one rank do not know each other.
RANK = {
    "": 0,  # formats, commands, artifact, timeline: what the package's other rooms talk in
    "patches": 0,
    "ledger": 1,
    "kernels": 1,
    "calib": 2,  # and of the kernels only the reference, the coding and rotary tables: see CALIB_MAY
    "serving": 2,
    "tools": 3,
}
NO_TORCH_ROOMS = {"", "patches", "ledger"}
NO_TORCH_FILES = {
    "sglang_pmkvq.serving.calibration",
    "sglang_pmkvq.serving.config",
    "sglang_pmkvq.serving.engine",
    "sglang_pmkvq.serving.refusals",
    "sglang_pmkvq.serving.sizing",
    "sglang_pmkvq.serving.versions",
    "sglang_pmkvq.tools.report",
    "sglang_pmkvq.tools.cli",
}
CALIB_MAY = (
    "sglang_pmkvq.kernels.reference.",
    "sglang_pmkvq.kernels.coding",
    "sglang_pmkvq.kernels.rotary",
    "sglang_pmkvq.kernels.transforms",
)
DOOR = "sglang_pmkvq.serving.engine"
# They need the extra ``models``.
FOR_MODELS = ("sglang_pmkvq.tools.models", "sglang_pmkvq.tools.from_gguf")


def room_of(module: str) -> str:
    """``sglang_pmkvq.ledger.arena`` → ``ledger``; ``sglang_pmkvq.formats`` → the room of leaves, ``""``."""
    parts = module.split(".")
    assert parts[0] == "sglang_pmkvq"
    return parts[1] if len(parts) > 1 and parts[1] in RANK else ""


def no_torch(module: str) -> bool:
    return room_of(module) in NO_TORCH_ROOMS or module in NO_TORCH_FILES


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
            # `from sglang_pmkvq.serving import runtime` names a module, not an attribute of the package.
            folder = ROOT / base.replace(".", "/")
            named = [alias.name for alias in node.names if (folder / f"{alias.name}.py").exists()]
            yield from ((node.lineno, f"{base}.{name}") for name in named)
            if len(named) < len(node.names):
                yield node.lineno, base


ALL = sorted(modules())


def violations(module: str, path: Path) -> list[str]:
    room = room_of(module)
    found = []
    for line, name in imports(module, path):
        top = name.split(".")[0]
        where = f"{module}:{line}"
        if top == "sglang_pmkvq":
            other = room_of(name)
            if other != room and RANK[other] >= RANK[room]:
                found.append(f"{where}: {room or 'the package'} must not import {other}")
            elif room == "calib" and other and other != "calib" and not name.startswith(CALIB_MAY):
                found.append(f"{where}: calib must not import {name}")
        elif top in ("benchmarks", "tests", "scripts", "patches", "calib"):
            found.append(f"{where}: the package must not import {name}")
        elif top == "kernels":
            found.append(f"{where}: `kernels` is another package; ours is sglang_pmkvq.kernels")
        elif top == "sglang" and module != DOOR:
            found.append(f"{where}: only {DOOR} imports sglang")
        elif top in ("torch", "triton") and no_torch(module):
            found.append(f"{where}: {module} must not import {top}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach themselves, by repeatedly leaving out those that import nothing or that nobody imports."""
    left = {module: {name for name in names if name in graph} for module, names in graph.items()}
    while True:
        imported = set().union(*left.values()) if left else set()
        done = {module for module, names in left.items() if not names or module not in imported}
        if not done:
            return [sorted(left)] if left else []
        left = {module: names - done for module, names in left.items() if module not in done}


def test_every_module_is_looked_at() -> None:
    names = [module for module, _ in ALL]
    assert {"sglang_pmkvq", "sglang_pmkvq.formats", "sglang_pmkvq.commands", "sglang_pmkvq.tools.cli"} <= set(names)
    assert {module.split(".")[1] for module in names if module.count(".") > 1} == set(RANK) - {""}


@pytest.mark.parametrize("module", [module for module, _ in ALL])
def test_imports_run_one_way(module: str) -> None:
    assert violations(module, dict(ALL)[module]) == []


def test_no_module_reaches_itself() -> None:
    """Inside rooms too; imports in functions and for annotations count."""
    known = {module for module, _ in ALL}
    graph = {module: {name for _, name in imports(module, path) if name in known - {module}} for module, path in ALL}
    assert len(graph["sglang_pmkvq.serving.plugin"]) > 2
    assert circles(graph) == []


def test_circles_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("sglang_pmkvq.formats", "from sglang_pmkvq.ledger import X", "the package must not import ledger"),
        ("sglang_pmkvq.ledger.a", "def f():\n    import torch.nn", "must not import torch"),
        ("sglang_pmkvq.ledger.a", "from ..kernels import plan", "ledger must not import kernels"),
        ("sglang_pmkvq.kernels.a", "import sglang.srt", "only sglang_pmkvq.serving.engine imports sglang"),
        ("sglang_pmkvq.serving.a", "def f():\n    from sglang.srt import x", "only sglang_pmkvq.serving.engine"),
        ("sglang_pmkvq.kernels.a", "from sglang_pmkvq.serving import pool", "kernels must not import serving"),
        ("sglang_pmkvq.calib.a", "from sglang_pmkvq.kernels import plan", "calib must not import sglang_pmkvq.kernels"),
        ("sglang_pmkvq.patches.a", "from sglang_pmkvq.serving import hooks", "patches must not import serving"),
        ("sglang_pmkvq.serving.a", "from ..tools import cli", "serving must not import tools"),
        ("sglang_pmkvq.serving.config", "import torch", "must not import torch"),
        ("sglang_pmkvq.serving.plugin", "import benchmarks.reasoner.task", "must not import benchmarks"),
        ("sglang_pmkvq.serving.plugin", "from kernels import plan", "is another package"),
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
    light = [module for module, _ in ALL if no_torch(module) and module != "sglang_pmkvq.tools.report"]
    code = (
        f"import importlib, sys\nfor m in {light!r}: importlib.import_module(m)\n"
        "heavy = {'torch', 'sglang', 'triton', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_third_party_imports_are_declared() -> None:
    """What the package imports is in pyproject's dependencies, not merely there by accident."""

    def declared(extra: str) -> set[str]:
        wanted = [Requirement(line) for line in metadata.requires("sglang-pmkvq") or []]
        asked = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]
        return {requirement.name.lower().replace("_", "-") for requirement in asked}

    always, for_models = declared(""), declared("models")
    distributions = metadata.packages_distributions()
    missing = set()
    for module, path in ALL:
        for line, name in imports(module, path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "sglang_pmkvq":
                continue
            providers = {d.lower().replace("_", "-") for d in distributions.get(top, [])}
            if not providers & (for_models if module in FOR_MODELS else always):
                missing.add(f"{module}:{line}: {top}")
    assert missing == set()
