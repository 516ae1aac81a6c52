"""What the package's own code may not do: open ports, run shells or text as code, read pickles."""

from __future__ import annotations

import ast

import pytest

from tests.test_imports import ALL

# Modules that run, load or connect; and calls by their last name.
FORBIDDEN_IMPORTS = {
    *("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    *("socket", "socketserver", "http", "asyncio", "zmq", "xmlrpc", "ftplib", "telnetlib", "smtplib"),
    *("subprocess", "pty", "ctypes"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "system", "popen", "execv", "execve", "spawnv", "__import__", "urlopen"}
# The demo starts a server and looks at it; a server command without a GPU starts itself again (no shell in either).
ALLOWED = {
    ("sglang_pmkvq.tools.demo", "socket"),
    ("sglang_pmkvq.tools.demo", "subprocess"),
    ("sglang_pmkvq.tools.demo", "urlopen"),
    ("sglang_pmkvq.tools.models", "subprocess"),
    ("sglang_pmkvq.serving.plugin", "execve"),
}


def found() -> set[tuple[str, str]]:
    out = set()
    for module, path in ALL:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            out |= {(module, name) for name in names if name in FORBIDDEN_IMPORTS}
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                # `re.compile` and `model.eval` are no text run as code.
                plain = isinstance(called, ast.Name) or name not in ("compile", "eval")
                out |= {(module, name)} if name in FORBIDDEN_CALLS and plain else set()
                if name == "load" and isinstance(called, ast.Attribute) and ast.unparse(called.value) == "torch":
                    out.add((module, "torch.load"))
                if any(k.arg == "shell" for k in node.keywords):
                    out.add((module, "shell"))
                if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                    out.add((module, "allow_pickle"))
    return out


def test_no_ports_shells_pickles() -> None:
    assert found() == ALLOWED


@pytest.mark.parametrize("key", ["pickle", "eval"])
def test_the_search_can_find(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    path = type(ALL[0][1])(str(tmp_path)) / "bad.py"
    path.write_text("import pickle\neval('1')\n")
    monkeypatch.setattr("tests.test_isolation.ALL", [("bad", path)])
    assert ("bad", key) in found()
