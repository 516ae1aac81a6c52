"""What is built and installed: contents of wheel and sdist, the lock, and whose package ``kernels`` is."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "patches", "calib")


def source_tree(target: Path) -> Path:
    """What a build needs, links as links: a build must not read or leave anything in the checkout."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target / name)
    for name in ("sglang_pmkvq", "benchmarks", "tests", *LINKED):
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "model")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=skip)
    return target


def package_files() -> set[str]:
    """Every source file of the package, through the links, as the wheel should name it."""
    found = set()
    for folder, folders, files in os.walk(ROOT / "sglang_pmkvq", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {
            str(Path(folder, name).relative_to(ROOT)) for name in files if name.endswith((".py", ".json", "py.typed"))
        }
    return found


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = source_tree(folder / "source")
    out = folder / "dist"
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == package_files()
        for name in names:
            mode = wheel.getinfo(name).external_attr >> 16
            assert mode & 0o170000 in (0, 0o100000), f"{name} is not a regular file"
            assert wheel.read(name) == (ROOT / name).read_bytes()
    assert any(name.startswith("sglang_pmkvq/kernels/cpu/") for name in names)
    assert any(name.startswith("sglang_pmkvq/patches/") for name in names)
    assert "sglang_pmkvq/kernels/__init__.py" not in names


def test_sdist_holds_real_files(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        members = sdist.getmembers()
    assert all(member.isreg() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert package_files() <= names
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "kernels/", "patches/")) for name in names)


def test_wheel_metadata(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
        text = wheel.read(f"{info}/METADATA").decode()
        points = configparser.ConfigParser()
        points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert wheel.read(f"{info}/licenses/NOTICE") == (ROOT / "NOTICE").read_bytes()
    assert "Requires-Dist: sglang==0.5.15.post1" in text
    assert "License-Expression: Apache-2.0" in text
    assert re.search(r"^Requires-Python: .*>=3\.10", text, re.MULTILINE)
    assert dict(points["sglang.srt.plugins"]) == {"pmkvq": "sglang_pmkvq.serving.plugin:register"}
    assert dict(points["console_scripts"]) == {"pmkvq": "sglang_pmkvq.tools.cli:main"}


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- names ---


def python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["repository root", "elsewhere"])
def test_kernels_is_the_hugging_face_package(cwd: Path) -> None:
    code = "import kernels, sys; assert hasattr(kernels, 'get_kernel'); print(kernels.__file__)"
    assert "site-packages" in python(code, cwd)


def test_top_level_folders_are_no_packages() -> None:
    for name in LINKED:
        if any((ROOT / name).glob("**/*.py")):
            link = ROOT / "sglang_pmkvq" / name
            assert link.is_symlink(), f"sglang_pmkvq/{name} is a link to {name}/"
            assert os.readlink(link) == f"../{name}"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["repository root", "elsewhere"])
def test_editable_install_finds_every_module(cwd: Path) -> None:
    names = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in package_files()
        if name.endswith(".py")
    )
    code = (
        "import importlib.util\n"
        f"for name in {names!r}:\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    assert spec is not None and spec.origin, name\n"
        "import sglang_pmkvq; print(sglang_pmkvq.__file__)"
    )
    assert python(code, cwd) == str(ROOT / "sglang_pmkvq" / "__init__.py")


# --- lock and setup ---


def lock() -> Iterator[tuple[str, str]]:
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            yield canonicalize_name(name.split("[")[0]), version


def test_lock_is_exact_and_names_no_host() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?==\S+", line), line


def test_lock_satisfies_pyproject_and_is_installed() -> None:
    pins = dict(lock())
    required = [Requirement(line) for line in metadata.requires("sglang-pmkvq") or []]
    wanted = [r for r in required if r.name != "sglang-pmkvq"]  # an extra may ask for another one of ours
    assert any(requirement.name == "sglang" for requirement in wanted)
    assert any("test" in str(requirement.marker) for requirement in wanted)
    for requirement in wanted:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: locked {version}"
    different = {
        name: (version, metadata.version(name)) for name, version in pins.items() if metadata.version(name) != version
    }
    assert different == {}, "run `make setup`: (locked, installed)"


@pytest.mark.parametrize("path", ["requirements.lock", "pyproject.toml", "Makefile", ".ci/run", "README.md"])
def test_no_registry_and_no_machine_is_named(path: str) -> None:
    """Addresses are those of this machine's own server and of the paper; options of an index and home folders none."""
    text = (ROOT / path).read_text()
    hosts = set(re.findall(r"\w+://([^/:\s)\"']+)", text))
    assert hosts <= {"127.0.0.1", "arxiv.org"}, f"{path} names {hosts}"
    for option in ("--index", "--extra-index", "--find", "-i ", "-f "):
        assert not re.search(rf"(pip|uv)[^\n]* {option}", text), f"{path} uses {option}"
    assert not re.search(r"(?<![\w.])/(root|home|work|Users)/", text), f"{path} names a folder of a machine"


def test_setup_without_any_python_says_what_is_missing(tmp_path: Path) -> None:
    """scripts/setup.sh on a PATH with neither python nor uv: one sentence, no half-made .venv."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    done = subprocess.run(
        [str(tools / "bash"), "scripts/setup.sh"],
        cwd=tmp_path,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "needs python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_does_not_touch_a_foreign_venv(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "precious").write_text("x")
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "remove it and run again" in done.stderr
    assert (tmp_path / ".venv" / "precious").read_text() == "x"


def ci_run(folder: Path, check: str, test: str) -> subprocess.CompletedProcess[str]:
    """.ci/run over a Makefile whose targets are these shell lines."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "Makefile").write_text(f"check:\n\t@{check}\ntest:\n\t@{test}\n")
    return subprocess.run([str(folder / ".ci" / "run")], capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize(
    ("tail", "status", "closing"),
    [
        ("==== 3 passed, 1 skipped in 0.10s ====", 0, "==== 3 passed, 1 skipped in 0.10s ===="),
        ("== 1 failed, 2 passed in 61.00s (0:01:01) ==", 2, "== 1 failed, 2 passed in 61.00s (0:01:01) =="),
        ("gcc: not found", 2, "no closing line: make test did not run to its end (status 2)"),
    ],
)
def test_ci_run_passes_status_and_closing_line_on(tmp_path: Path, tail: str, status: int, closing: str) -> None:
    done = ci_run(tmp_path, "echo '9 passed in 1.00s'", f"echo '{tail}'; echo later; exit {status}")
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == closing


@pytest.mark.parametrize(
    ("tail", "closing"),
    [
        ("Found 2 errors.", "Found 2 errors."),
        ("Found 1 error in 1 file (checked 50 source files)", "Found 1 error in 1 file (checked 50 source files)"),
        ("1 failed, 2 passed in 61.00s (0:01:01)", "1 failed, 2 passed in 61.00s (0:01:01)"),
        ("gcc: not found", "no closing line: make check did not run to its end (status 2)"),
    ],
)
def test_ci_run_ends_with_a_check_that_fails(tmp_path: Path, tail: str, closing: str) -> None:
    done = ci_run(tmp_path, f"echo '{tail}'; exit 1", "echo 'the suite ran'; echo '3 passed in 0.10s'")
    assert done.returncode == 2
    assert "the suite ran" not in done.stdout
    assert done.stdout.splitlines()[-1] == closing
