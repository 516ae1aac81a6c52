"""The design page and the recipes name tests, classes and functions that exist (``test_docs.py`` looks at files)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/design.md", "docs/extending.md")


def code(page: str) -> list[str]:
    """What stands in single backticks."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def test_tests_exist() -> None:
    named = [text.split("::") for text in code("docs/design.md") if "::" in text]
    assert len(named) > 12
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    """Classes and constants that the pages name are somewhere in the package."""
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("sglang_pmkvq", "kernels", "patches", "calib")
        for path in (ROOT / folder).rglob("*.py")
    )
    named = {text for text in code(page) if re.fullmatch(r"[A-Z]\w+|\w+\.\w+", text)} - {"ModelRunner.forward"}
    named = {name for name in named if not name.endswith((".py", ".md"))}
    assert named
    assert [name for name in named if not re.search(rf"\b{name.split('.')[-1]}\b", source)] == []
