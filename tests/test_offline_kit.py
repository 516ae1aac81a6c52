"""The kit for GPU machines without a registry: what is in it, that its wheels are whole, that it installs offline."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.offline_kit import build, imports, install

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TAG = "cp310-abi3-manylinux2014_x86_64"


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], requires: tuple[str, ...] = (),
               tag: str = "py3-none-any") -> Path:  # fmt: skip
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    headers = "".join(f"Requires-Dist: {r}\n" for r in requires)
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{headers}".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    text = io.StringIO()
    rows = [build.record_line(n, data) for n, data in files.items()]
    csv.writer(text, lineterminator="\n").writerows([*rows, [f"{info}/RECORD", "", ""]])
    path = folder / f"{name.replace('-', '_')}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for n, data in {**files, f"{info}/RECORD": text.getvalue().encode()}.items():
            wheel.writestr(n, data)
    return path


@pytest.fixture
def kernels_wheel(tmp_path: Path) -> Path:
    """A wheel with the file names of the real one."""
    record = metadata.distribution("sglang-kernel").files
    assert record is not None
    names = [
        str(f) for f in record if str(f).startswith(("sgl_kernel/", "triton_kernels/")) and "__pycache__" not in str(f)
    ]
    assert sum(name.endswith("common_ops.abi3.so") for name in names) == len(build.ARCHITECTURES)
    files = {name: name.encode() for name in names}
    return make_wheel(tmp_path, "sglang-kernel", "0.4.4", files, tag=KERNEL_TAG)


@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_trimmed_kernels_are_a_whole_wheel_of_one_architecture(arch: str, kernels_wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    trimmed = build.trim_kernels(kernels_wheel, out, arch)
    build.check_wheel(trimmed)
    with zipfile.ZipFile(kernels_wheel) as before, zipfile.ZipFile(trimmed) as after:
        lost = set(before.namelist()) - set(after.namelist())
        kept = [n for n in after.namelist() if n.endswith(".so")]
    (other,) = set(build.ARCHITECTURES) - {arch}
    assert lost == {
        "sgl_kernel/flash_ops.abi3.so", "sgl_kernel/flashmla_ops.abi3.so", f"sgl_kernel/{other}/common_ops.abi3.so"
    }  # fmt: skip
    assert sorted(kept) == [f"sgl_kernel/{arch}/common_ops.abi3.so", "sgl_kernel/spatial_ops.abi3.so"]
    # pip takes it, and its metadata is the original's.
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*command, str(trimmed)], check=True, capture_output=True, text=True)
    (found,) = metadata.distributions(path=[str(site)])
    assert (found.metadata["Name"], found.version) == ("sglang-kernel", "0.4.4")
    assert build.trim_kernels(kernels_wheel, out, arch) == trimmed


def test_an_architecture_that_the_wheel_lacks_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "sglang-kernel", "0.4.4", {"sgl_kernel/sm90/common_ops.abi3.so": b"x"}, tag=KERNEL_TAG)
    with pytest.raises(SystemExit, match="no operators for sm100"):
        build.trim_kernels(wheel, tmp_path, "sm100")


@pytest.mark.parametrize("harm", ["changed", "added", "lost"])
def test_a_wheel_that_is_not_its_record_is_found(harm: str, tmp_path: Path) -> None:
    good = make_wheel(tmp_path, "good", "1", {"good.py": b"a = 1\n", "more.py": b""})
    build.check_wheel(good)
    bad = tmp_path / "bad-1-py3-none-any.whl"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as out:
        for name in source.namelist():
            if not (harm == "lost" and name == "more.py"):
                changed = harm == "changed" and name == "good.py"
                out.writestr(name, b"a = 2\n" if changed else source.read(name))
        if harm == "added":
            out.writestr("extra.py", b"")
    with pytest.raises(
        ValueError,
        match={"changed": "good.py is not what", "added": "extra.py is not in", "lost": "names more.py"}[harm],
    ):
        build.check_wheel(bad)


def test_what_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requirements with extras and markers; not what the image has in a good version, nor what is left out."""
    monkeypatch.setattr(build, "LEFT_OUT", {"huge": "is never imported"})
    root = make_wheel(tmp_path, "root", "1", {}, (
        "a[fast]>=1", "huge", "torch>=2", "old==2", 'b; python_version >= "3.13"', 'c; extra == "test"'
    ))  # fmt: skip
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "a", "1.5", {}, ('d; extra == "fast"', 'e; extra == "slow"'))
    make_wheel(wheels, "d", "3", {}, ("a", "torch"))
    make_wheel(wheels, "old", "2", {})
    lock = {"a": "1.5", "b": "1", "c": "1", "d": "3", "e": "1", "old": "2", "huge": "1", "torch": "2.1"}
    image = {"torch": "2.11.0+cu130", "old": "3", "numpy": ""}
    assert set(build.collect([root], wheels, lock, image)) == {"a", "d", "old"}
    with pytest.raises(SystemExit, match=r"a\[fast\]>=1 is needed and requirements.lock has no version of it"):
        build.collect([root], wheels, {}, image)


def make_kit(folder: Path, part_bytes: int = 700) -> dict[str, object]:
    """A tiny kit for the Python that runs the tests; kit.json and parts in `folder`."""
    work = folder.parent / "work"
    work.mkdir()
    wheels = [
        make_wheel(work, name, "1.0", {f"{name}.py": f"NAME = {name!r}\n".encode() * 20}) for name in ("one", "two")
    ]
    source = work / "source.tar.gz"
    source.write_bytes(b"not read here")
    folder.mkdir()
    digest, parts = build.pack([*wheels, source], folder, part_bytes)
    kit = {
        "kit": 1, "python": ".".join(map(str, sys.version_info[:2])), "arch": "sm90", "commit": "none",
        "tar_sha256": digest, "parts": parts, "source": source.name,
        "wheels": [{"file": w.name, "bytes": w.stat().st_size, "sha256": build.sha256(w)} for w in wheels],
    }  # fmt: skip
    (folder / "kit.json").write_text(json.dumps(kit))
    return kit


def test_parts_fit_and_join_to_what_was_packed(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit")
    parts = install.find_parts(kit, [tmp_path / "kit"])
    assert len(parts) > 2 and all(p.stat().st_size <= 700 for p in parts)
    assert not list((tmp_path / "kit").glob("kit.tar"))
    # Parts may come in several folders.
    (tmp_path / "more").mkdir()
    parts[1].rename(tmp_path / "more" / parts[1].name)
    parts = install.find_parts(kit, [tmp_path / "kit", tmp_path / "more"])
    install.unpack(kit, parts, tmp_path / "out")
    for name in ("one-1.0-py3-none-any.whl", "two-1.0-py3-none-any.whl", "source.tar.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "work" / name).read_bytes()
    install.install(kit, tmp_path / "out", tmp_path / "site")
    assert (tmp_path / "site" / "one.py").exists() and (tmp_path / "site" / "two-1.0.dist-info").is_dir()


def test_a_kit_is_the_same_for_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert make_kit(tmp_path / "a" / "kit")["tar_sha256"] == make_kit(tmp_path / "b" / "kit")["tar_sha256"]


def test_missing_and_damaged_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_kit(tmp_path / "kit")
    run = ["--kit", str(tmp_path / "kit"), "--target", str(tmp_path / "target")]
    part = tmp_path / "kit" / "kit.tar.001"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SystemExit, match="1"):
        install.main(run)
    assert "kit.tar.001 is damaged" in capsys.readouterr().err
    part.unlink()
    with pytest.raises(SystemExit, match="3"):
        install.main(run)
    assert "missing in" in (err := capsys.readouterr().err) and "kit.tar.001" in err
    assert not (tmp_path / "target" / ".unpacked").exists()


def test_another_python_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_kit(tmp_path / "kit")
    manifest = tmp_path / "kit" / "kit.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "python": "3.7"}))
    with pytest.raises(SystemExit):
        install.main(["--kit", str(tmp_path / "kit"), "--target", str(tmp_path / "target")])
    assert "the kit is for Python 3.7" in capsys.readouterr().err


def test_steps_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    calls: list[int] = []
    for digest in ("x", "x", "y"):
        install.once(tmp_path / ".done", digest, "a step", calls.append, 1)
    assert len(calls) == 2
    with pytest.raises(ZeroDivisionError):
        install.once(tmp_path / ".fails", "x", "a step", lambda: 1 // 0)
    assert not (tmp_path / ".fails").exists()


# -- what is in the kit --------------------------------------------------------------------------------------


def closure() -> set[str]:
    """Names that the installed SGLang and what it requires ask for, as on the target."""
    found, left = set(), [Requirement(name) for name in ("sglang", *build.IMPORTED)]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name in build.LEFT_OUT:
            found.add(name)
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in map(Requirement, lines):
            extras = ("", *requirement.extras)
            if line.marker is None or any(line.marker.evaluate({**build.MARKERS, "extra": e}) for e in extras):
                left.append(line)
    return found


def test_only_what_something_requires_is_left_out() -> None:
    assert set(build.LEFT_OUT) <= closure()
    assert not set(build.LEFT_OUT) & set(build.pins(build.IMAGE))


def test_the_lock_has_a_version_of_everything_else() -> None:
    lock, image = build.pins(ROOT / "requirements.lock"), build.pins(build.IMAGE)
    assert closure() - set(build.LEFT_OUT) - set(image) <= set(lock)


def test_the_image_has_what_the_kit_is_built_for() -> None:
    image = build.pins(build.IMAGE)
    for text in ("torch==2.11.0", "triton>=3.6,<3.7"):
        assert build.in_image(Requirement(text), image)
    # In another version there than SGLang takes: it travels.
    required = {Requirement(r).name: Requirement(r) for r in metadata.requires("sglang") or [] if "extra" not in r}
    assert not build.in_image(required["transformers"], image)


def test_the_page_names_everything_that_is_left_out() -> None:
    text = (ROOT / "scripts" / "offline_kit" / "README.md").read_text()
    assert [name for name in build.LEFT_OUT if f"`{name}`" not in text] == []
    assert f"{build.PART_MIB} MiB" in text


def test_the_plugin_is_found_by_its_entry_point() -> None:
    assert imports.entry_point_found() is None


def python_312() -> str | None:
    for name in ("python3.12", *map(str, Path.home().glob(".pyenv/versions/3.12.*/bin/python"))):
        path = shutil.which(name)
        check = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))"
        if path and not subprocess.run([path, "-c", check], capture_output=True).returncode:
            return path
    return None


@pytest.mark.full
def test_the_kit_builds_fits_and_installs_offline(tmp_path: Path) -> None:
    """With real wheels, into a Python 3.12 that has nothing else: all but what needs the image's torch."""
    command = [sys.executable, "-m", "scripts.offline_kit.build", "--out", str(tmp_path / "kit")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kit = json.loads((tmp_path / "kit" / "kit.json").read_text())
    sizes = [(tmp_path / "kit" / part["file"]).stat().st_size for part in kit["parts"]]
    assert sizes and max(sizes) <= build.PART_MIB << 20
    names = {canonicalize_name(wheel["file"].split("-")[0]) for wheel in kit["wheels"]}
    assert {"sglang", "sglang-pmkvq", "sglang-kernel", "flashinfer-python", "transformers"} <= names
    assert not names & {"torch", "triton", *build.LEFT_OUT}
    python = python_312()
    if python is None:
        pytest.skip("no Python 3.12 with pip to install into")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [python, str(tmp_path / "kit" / "install.py"), "--target", str(tmp_path / "target"), "--without-gpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    installed = {
        canonicalize_name(d.metadata["Name"]) for d in metadata.distributions(path=[str(tmp_path / "target/site")])
    }
    assert installed == names, done.stdout + done.stderr
    assert (tmp_path / "target" / "source" / "benchmarks" / "gpu" / "__main__.py").exists()
    assert "entry point of the plugin" in done.stdout or "No module named 'torch'" in done.stdout + done.stderr
