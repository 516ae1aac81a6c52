"""The built wheel, installed in an environment of its own and started from another directory, serves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.servers import free_port
from benchmarks.reasoner import task
from sglang_pmkvq.tools.demo import kv_bytes_per_token

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "benchmarks" / "reasoner" / "model"
START_TIMEOUT_S = 600

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    for name in ("sglang_pmkvq", "kernels", "patches", "calib"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def borrowed_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with only our wheel; SGLang and the rest are seen in this environment.

    A folder that a .pth file adds has its own .pth files ignored, so this environment's editable
    install of the project stays unseen; those of other packages are copied.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    ours = Path(sysconfig.get_paths()["purelib"])
    lines = [str(ours)]
    for pth in ours.glob("*.pth"):
        if "editable" not in pth.name and "sglang_pmkvq" not in pth.name:
            for line in pth.read_text().splitlines():
                folder_line = line and not line.startswith(("import ", "#"))
                lines += [str(ours / line)] if folder_line else []
    (site / "borrowed.pth").write_text("\n".join(lines) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        install = ["uv", "pip", "install", "--python", str(folder / "bin" / "python")]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    (folder / "bin" / "sglang").write_text(
        # The guard is what an installer writes too: schedulers are spawned and import this file.
        f"#!{folder}/bin/python\nimport sys\nfrom sglang.cli.main import main\n"
        'if __name__ == "__main__":\n    sys.exit(main())\n'
    )
    (folder / "bin" / "sglang").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def fresh_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with every dependency installed from the registry: minutes and 11 GB."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    constraints = ["--constraint", str(ROOT / "requirements.lock")]
    if shutil.which("uv"):
        subprocess.run(["uv", "venv", "--python", sys.executable, str(folder)], check=True)
        install = ["uv", "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
    else:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *constraints, str(wheel)], check=True)
    return folder


def get(url: str, body: dict[str, Any] | None = None, timeout: float = 300) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return response.read()


@contextmanager
def serving(environment: Path, cwd: Path) -> Iterator[str]:
    """``sglang serve`` of ``environment``, run in ``cwd``; gives the base URL."""
    port = free_port()
    command = [str(environment / "bin" / "sglang"), "serve", "--model-path", str(MODEL), "--port", str(port)]
    command += ["--kv-quant", "pmkvq", "--pmkvq-pool-bytes", str(4096 * kv_bytes_per_token(MODEL))]
    command += ["--enable-metrics"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "SGLANG_"))}
    log = cwd / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(command, cwd=cwd, env=kept, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert server.poll() is None, f"the server died:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not healthy:\n{log.read_text()[-3000:]}"
            try:
                get(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        server.wait()


@pytest.mark.parametrize(
    "environment",
    ["borrowed_environment", pytest.param("fresh_environment", marks=pytest.mark.full)],
)
def test_installed_wheel_serves_from_another_directory(
    environment: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(environment)
    where = subprocess.run(
        [str(folder / "bin" / "python"), "-c", "import sglang_pmkvq as p; print(p.__file__, p.__path__[0])"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(folder) in where
    assert str(ROOT) not in where
    assert (folder / "bin" / "pmkvq").is_file()
    problem = task.make_problem(task.EVAL_SEED_START, 30)
    body = {
        "model": "default",
        "messages": task.messages(problem),
        "temperature": 0,
        "max_tokens": problem.chain_tokens + 50,
    }
    with serving(folder, tmp_path) as url:
        info = json.loads(get(f"{url}/server_info"))
        assert info["kv_quant"] == "pmkvq"
        answer = json.loads(get(f"{url}/v1/chat/completions", body))["choices"][0]["message"]["content"]
        assert task.check(problem, answer), answer
        metrics = get(f"{url}/metrics").decode()
    assert "sglang:pmkvq_storage_bytes{" in metrics
