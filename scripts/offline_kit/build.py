#!/usr/bin/env python3
"""Builds a kit of wheels for GPU machines that can download nothing.

    python -m scripts.offline_kit.build --out /tmp/kit               for Hopper (sm90), parts of at most 60 MiB
    python -m scripts.offline_kit.build --out /tmp/kit --image FILE  for an image with other packages

The kit holds what SGLang needs to serve a dense model and what the image (``image.txt``, or FILE, as ``python -m pip
list --format freeze`` writes it there) lacks or has in a version that SGLang does not take; this project's wheel; and
the committed files of this repository. Versions are those of ``requirements.lock``; wheels are for Python 3.12 on
Linux x86-64. ``sglang-kernel`` is cut down to one architecture, without FlashAttention-3 and FlashMLA. What is left
out, and why, is `LEFT_OUT`.

A second run goes on where the first stopped: wheels that are there are not fetched again.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
MARKERS = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
    "os_name": "posix",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
    "extra": "",
}
# pip matches every manylinux tag literally; 2_39 is Ubuntu 24.04's glibc.
PLATFORMS = [*(f"manylinux_2_{n}_x86_64" for n in range(39, 4, -1)), "manylinux2014_x86_64", "manylinux1_x86_64"]
IMAGE = Path(__file__).with_name("image.txt")
PART_MIB = 60
ARCHITECTURES = ("sm90", "sm100")
KERNELS = "sglang-kernel"
# Of that wheel: FlashAttention-3, FlashMLA, and the operators of the other architectures.
KERNELS_LEFT_OUT = re.compile(r"sgl_kernel/(flash_ops|flashmla_ops)\.|sgl_kernel/sm\d+/")

# What SGLang imports without requiring it; it comes with packages that are left out.
IMPORTED = ("jsonschema",)

# What SGLang or FlashInfer require and a dense model on one GPU never imports, each with why. Found by importing the
# server's modules in an empty environment (`scripts.offline_kit.imports`) until nothing was missing.
LEFT_OUT = {
    "anthropic": "another API than the client speaks",
    "blobfile": "reads vocabularies of harmony models",
    "build": "builds packages",
    "cuda-python": "a list of other packages; what is used of them (cuda-bindings) comes with torch",
    "cuda-tile": "FlashInfer kernels for Blackwell",
    "easydict": "multimodal models",
    "flash-attn-4": "attention for Blackwell",
    "flashinfer-cubin": "1.8 GB of binaries for TensorRT-LLM kernels; FlashInfer compiles what it uses with nvcc",
    "interegular": "grammars (outlines)",
    "kernels": "kernels from a hub",
    "llguidance": "grammars; servers run with --grammar-backend none",
    "mistral-common": "Mistral's own tokenizers",
    "modelscope": "a hub",
    "nvidia-cudnn-frontend": "FlashInfer's cuDNN attention",
    "nvidia-cutlass-dsl": "365 MB; kernels in CuTe DSL, for Blackwell and mixture of experts",
    "nvidia-mathdx": "kernels of multimodal models",
    "outlines": "grammars",
    "py-spy": "a profiler from outside",
    "quack-kernels": "kernels in CuTe DSL",
    "sgl-deep-gemm": "fp8 matrix products; without it SGLang switches them off",
    "smg-grpc-servicer": "a gRPC server",
    "tilelang": "177 MB and z3; kernels for sparse attention",
    "timm": "multimodal models",
    "tokenspeed-mla": "MLA for Blackwell, with a second Triton of 287 MB",
    "torch-memory-saver": "releases memory while a server sleeps",
    "torchao": "quantized weights",
    "torchcodec": "video",
    "watchfiles": "reloads certificates",
    "xgrammar": "113 MB; grammars",
}


def step(text: str) -> None:
    print(f"build: {text}", flush=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pins(path: Path) -> dict[str, str]:
    """``name==version`` lines by canonical name; a name without a version is any version."""
    out = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "-")):
            name, _, version = line.partition("==")
            out[canonicalize_name(name.strip())] = version.strip()
    return out


def requirements(wheel: Path, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """What a wheel requires on the target, with these extras of its own."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = HeaderParser().parsestr(file.read(name).decode())
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None or any(
            requirement.marker.evaluate({**MARKERS, "extra": extra}) for extra in ("", *extras)
        ):
            yield requirement


def in_image(requirement: Requirement, image: dict[str, str]) -> bool:
    """Whether the image has the package, in a version that is allowed or unknown."""
    version = image.get(canonicalize_name(requirement.name))
    return version is not None and (not version or requirement.specifier.contains(version, prereleases=True))


def find_wheel(folder: Path, name: str, version: str) -> Path | None:
    for path in folder.glob("*.whl"):
        found, found_version, *_ = parse_wheel_filename(path.name)
        if found == canonicalize_name(name) and str(found_version) == version:
            return path
    return None


def download(names: dict[str, str], folder: Path) -> None:
    """Fetch wheels of exact versions for the target, without what they require.

    Raises:
        SystemExit: the registry has no such wheel; pip has said which.
    """
    if not names:
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", PYTHON, "--dest", str(folder)]
    command += [f"--platform={p}" for p in PLATFORMS]
    command += [f"{name}=={version}" for name, version in names.items()]
    if subprocess.run(command).returncode:
        raise SystemExit(f"build: no wheel for Python {PYTHON} on Linux x86-64 among: {', '.join(sorted(names))}")


def collect(
    roots: Sequence[Path], folder: Path, lock: dict[str, str], image: dict[str, str], also: Sequence[str] = ()
) -> dict[str, Path]:
    """Download everything that the wheels `roots` and the packages `also` need and the image lacks, level by level.

    Returns:
        Wheel by canonical name, without the roots.

    Raises:
        SystemExit: a package is not pinned in the lock file, or has no wheel.
    """
    found: dict[str, Path] = {}
    level = [requirement for root in roots for requirement in requirements(root)] + [Requirement(n) for n in also]
    seen: set[str] = set()
    while level:
        wanted: dict[str, str] = {}
        for requirement in level:
            name = canonicalize_name(requirement.name)
            if name in found or name in LEFT_OUT or in_image(requirement, image):
                continue
            if name not in lock:
                raise SystemExit(f"build: {requirement} is needed and requirements.lock has no version of it")
            wanted[name] = lock[name]
        missing = {n: v for n, v in wanted.items() if find_wheel(folder, n, v) is None}
        step(f"level of {len(wanted)} packages, {len(missing)} to download")
        download(missing, folder)
        new = []
        for name, version in wanted.items():
            wheel = find_wheel(folder, name, version)
            assert wheel is not None, name
            found[name] = wheel
        for requirement in level:
            name = canonicalize_name(requirement.name)
            key = str(requirement)
            if name in found and key not in seen:
                seen.add(key)
                new += list(requirements(found[name], requirement.extras))
        level = new
    return found


def record_line(name: str, data: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(data))]


def check_wheel(path: Path) -> None:
    """Every file of the wheel is in its RECORD with its hash and size, and nothing else is.

    Raises:
        ValueError: names the file.
    """
    with zipfile.ZipFile(path) as wheel:
        (record,) = (n for n in wheel.namelist() if n.endswith(".dist-info/RECORD"))
        rows = {row[0]: row for row in csv.reader(io.StringIO(wheel.read(record).decode())) if row}
        for name in wheel.namelist():
            if name.endswith("/"):
                continue
            if name not in rows:
                raise ValueError(f"{path.name}: {name} is not in RECORD")
            if name != record and rows[name] != record_line(name, wheel.read(name)):
                raise ValueError(f"{path.name}: {name} is not what RECORD says")
        missing = rows.keys() - set(wheel.namelist())
    if missing:
        raise ValueError(f"{path.name}: RECORD names {', '.join(sorted(missing))}, which the wheel lacks")


def trim_kernels(wheel: Path, folder: Path, arch: str) -> Path:
    """The ``sglang-kernel`` wheel with the operators of one architecture, without FlashAttention-3 and FlashMLA.

    Version and files are the original's; the file name has a build tag (``1sm90``), so that the two are told apart.

    Raises:
        SystemExit: the wheel has no operators for ``arch``.
    """
    name, version, _, tags = parse_wheel_filename(wheel.name)
    build = f"1{arch}"
    target = folder / f"{name.replace('-', '_')}-{version}-{build}-{wheel.stem.split('-', 2)[2]}.whl"
    if target.exists():
        return target
    partial = target.with_suffix(".part")
    with zipfile.ZipFile(wheel) as source:
        kept = [n for n in source.namelist() if n.startswith(f"sgl_kernel/{arch}/") or not KERNELS_LEFT_OUT.match(n)]
        if not any(n.startswith(f"sgl_kernel/{arch}/common_ops.") for n in kept):
            raise SystemExit(f"build: {wheel.name} has no operators for {arch}")
        rows = []
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as out:
            for item in (source.getinfo(n) for n in kept):
                if item.filename.endswith(".dist-info/RECORD"):
                    record = item
                    continue
                data = source.read(item)
                if item.filename.endswith(".dist-info/WHEEL"):
                    data = data.rstrip() + f"\nBuild: {build}\n".encode()
                out.writestr(item, data, zipfile.ZIP_DEFLATED)
                if not item.is_dir():
                    rows.append(record_line(item.filename, data))
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([*rows, [record.filename, "", ""]])
            out.writestr(record, text.getvalue(), zipfile.ZIP_DEFLATED)
    partial.rename(target)
    check_wheel(target)
    return target


def source_archive(path: Path) -> str:
    """The committed files of this repository as ``path`` (a tar); returns the commit."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    git("archive", "--format=tar.gz", "--output", str(path), "HEAD")
    if git("status", "--porcelain", "--untracked-files=no"):
        step("there are uncommitted changes, which the kit lacks")
    return git("rev-parse", "HEAD")


def project_wheel(source: Path, folder: Path) -> Path:
    """This project's wheel, built from the archive `source` in `folder`.

    Raises:
        SystemExit: it did not build.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(source) as tar:
        tar.extractall(folder / "source", filter="data")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder)]
    done = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"build: the project's wheel did not build\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def pack(files: Sequence[Path], out: Path, part_bytes: int) -> tuple[str, list[dict[str, Any]]]:
    """One tar of `files`, the same for the same files, cut into as few equal parts as fit: ``kit.tar.000``, …

    Returns:
        Its SHA-256, and name, bytes and SHA-256 of each part.
    """
    whole = out / "kit.tar"
    with tarfile.open(whole, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(files, key=lambda p: p.name):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(info, file)
    for old in out.glob("kit.tar.[0-9][0-9][0-9]"):
        old.unlink()
    size = whole.stat().st_size
    part_bytes = math.ceil(size / math.ceil(size / part_bytes))
    digest, parts = hashlib.sha256(), []
    with whole.open("rb") as file:
        while chunk := file.read(part_bytes):
            digest.update(chunk)
            part = out / f"kit.tar.{len(parts):03d}"
            part.write_bytes(chunk)
            parts.append({"file": part.name, "bytes": len(chunk), "sha256": hashlib.sha256(chunk).hexdigest()})
    whole.unlink()
    return digest.hexdigest(), parts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the kit")
    parser.add_argument("--work", type=Path, help="folder of downloaded wheels (default: OUT/../kit-work)")
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm90", help="sm90: H100, H200; sm100: all others")
    parser.add_argument(
        "--image", type=Path, default=IMAGE, help="packages of the target, as `pip list --format freeze`"
    )
    parser.add_argument("--part-mib", type=int, default=PART_MIB, help="largest part")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    work = (options.work or out.parent / "kit-work").resolve()
    wheels = work / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    lock, image = pins(ROOT / "requirements.lock"), pins(options.image)

    step("1/4 this project's files and wheel")
    source = work / "source.tar.gz"
    commit = source_archive(source)
    project = project_wheel(source, work / "project")

    step(f"2/4 wheels for Python {PYTHON}; the image has {len(image)} packages, {len(LEFT_OUT)} are left out")
    found = collect([project], wheels, lock, image, IMPORTED)

    step(f"3/4 {KERNELS} for {options.arch}")
    full = found[KERNELS]
    found[KERNELS] = trim_kernels(full, work, options.arch)
    step(f"{full.stat().st_size / 2**20:.0f} MiB became {found[KERNELS].stat().st_size / 2**20:.1f} MiB")

    step("4/4 parts")
    files = [project, source, *found.values()]
    digest, parts = pack(files, out, options.part_mib << 20)
    packages = [project, *found.values()]
    kit = {
        "kit": 1,
        "python": PYTHON,
        "arch": options.arch,
        "commit": commit,
        "tar_sha256": digest,
        "parts": parts,
        "source": source.name,
        "wheels": [
            {"file": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)}
            for p in sorted(packages, key=lambda p: p.name)
        ],
        "left_out": LEFT_OUT,
    }
    (out / "kit.json").write_text(json.dumps(kit, indent=1) + "\n")
    shutil.copy(Path(__file__).with_name("install.py"), out)
    for path in sorted(packages, key=lambda p: -p.stat().st_size)[:12]:
        print(f"  {path.stat().st_size / 2**20:8.1f} MiB  {path.name}")
    total = sum(p["bytes"] for p in parts)
    step(f"{len(packages)} wheels, {total / 2**20:.1f} MiB in {len(parts)} parts, commit {commit}")
    step(f"copy {out} to the GPU machine and run there: python3 install.py --target FOLDER")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
