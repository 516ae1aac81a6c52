#!/usr/bin/env python3
"""Installs a kit of wheels (``build.py``) on a machine without a registry, and runs the GPU suite.

    python3 install.py --target /opt/pmkvq                          join, check, install, check the imports
    python3 install.py --target /opt/pmkvq --suite --out /tmp/out   the same, then the suite
    python3 install.py --target /opt/pmkvq --without-gpu            check the imports on a machine without a GPU

Needs the Python and the packages of the image, and pip; nothing else, and no network. What follows ``--suite`` goes to
``benchmarks.gpu``. Steps that are done are not done again. Exits with 3 if parts of the kit are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def step(text: str) -> None:
    print(f"install: {text}", flush=True)


def fail(text: str, code: int = 1) -> SystemExit:
    print(f"install: {text}", file=sys.stderr, flush=True)
    return SystemExit(code)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def find_parts(kit: dict[str, Any], folders: Sequence[Path]) -> list[Path]:
    """The parts in order, each with the SHA-256 that the kit names.

    Raises:
        SystemExit: parts are missing (3) or damaged (1).
    """
    found, missing = [], []
    for part in kit["parts"]:
        path = next((f / part["file"] for f in folders if (f / part["file"]).is_file()), None)
        if path is None:
            missing.append(part["file"])
        elif sha256(path) != part["sha256"]:
            raise fail(f"{path} is damaged: its SHA-256 is not what kit.json says; copy it again")
        else:
            found.append(path)
    if missing:
        raise fail(f"missing in {', '.join(map(str, folders))}: {', '.join(missing)}; copy them and run again", 3)
    return found


def unpack(kit: dict[str, Any], parts: Sequence[Path], folder: Path) -> None:
    """Join the parts and unpack them; the whole and every wheel must have the SHA-256 that the kit names.

    Raises:
        SystemExit: one has not.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = folder / "kit.tar"
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, CHUNK)
    if sha256(whole) != kit["tar_sha256"]:
        raise fail("the joined parts are not the kit that kit.json describes")
    with tarfile.open(whole) as tar:
        tar.extractall(folder, filter="data")
    whole.unlink()
    for wheel in kit["wheels"]:
        if sha256(folder / wheel["file"]) != wheel["sha256"]:
            raise fail(f"{wheel['file']} is damaged: its SHA-256 is not what kit.json says")


def install(kit: dict[str, Any], folder: Path, site: Path) -> None:
    """Install the wheels into `site` with pip, without a registry.

    Raises:
        SystemExit: pip failed; it has said why.
    """
    shutil.rmtree(site, ignore_errors=True)  # of a run that was stopped
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--target", str(site)]
    command += [str(folder / wheel["file"]) for wheel in kit["wheels"]]
    if subprocess.run(command).returncode:
        raise fail("pip could not install the wheels")
    # On all cores at once; else the first server compiles thousands of modules one after another. Examples that come
    # with FlashInfer's sources do not all compile, and nothing imports them.
    command = [sys.executable, "-m", "compileall", "-q", "-j", "0", "-x", "flashinfer/data/", str(site)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def once(marker: Path, digest: str, what: str, body: Any, *args: Any) -> None:
    """Run `body` unless `marker` says that it was done for this kit."""
    if marker.is_file() and marker.read_text() == digest:
        step(f"{what}: done before")
        return
    start = time.monotonic()
    step(what)
    body(*args)
    marker.write_text(digest)
    step(f"{what}: {time.monotonic() - start:.0f} s")


def unpack_source(kit: dict[str, Any], folder: Path, source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    with tarfile.open(folder / kit["source"]) as tar:
        tar.extractall(source, filter="data")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kit", type=Path, nargs="+", default=[Path(__file__).resolve().parent], help="folders with kit.json and parts"
    )
    parser.add_argument("--target", type=Path, required=True, help="folder to install into")
    parser.add_argument(
        "--without-gpu", action="store_true", help="check the imports as far as the driver's first call"
    )
    parser.add_argument("--suite", nargs=argparse.REMAINDER, help="run benchmarks.gpu with what follows")
    options = parser.parse_args(argv)
    manifest = next((f / "kit.json" for f in options.kit if (f / "kit.json").is_file()), None)
    if manifest is None:
        raise fail(f"no kit.json in {', '.join(map(str, options.kit))}", 3)
    kit = json.loads(manifest.read_text())
    version = ".".join(map(str, sys.version_info[:2]))
    if version != kit["python"]:
        raise fail(
            f"the kit is for Python {kit['python']}, this is {version}: run it with the image's python{kit['python']}"
        )
    target = options.target.resolve()
    folder, site, source = target / "wheels", target / "site", target / "source"
    target.mkdir(parents=True, exist_ok=True)
    digest = kit["tar_sha256"]
    step(f"kit of {len(kit['wheels'])} wheels for {kit['arch']}, commit {kit['commit']}")
    once(target / ".unpacked", digest, "1/4 join and check", lambda: unpack(kit, find_parts(kit, options.kit), folder))
    once(target / ".installed", digest, "2/4 install", install, kit, folder, site)
    once(target / ".source", digest, "3/4 this project's files", unpack_source, kit, folder, source)

    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PMKVQ_COMMIT": kit["commit"]}
    # FlashInfer calls ninja by name; the image may have it beside its Python only.
    programs = [str(Path(sys.executable).parent), str(site / "bin"), os.environ.get("PATH", os.defpath)]
    environment["PATH"] = os.pathsep.join(programs)
    # A server's three processes import thousands of modules: compiled again each time, they take a minute longer.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    step("4/4 imports")
    check = [sys.executable, "-m", "scripts.offline_kit.imports", *(["--without-gpu"] if options.without_gpu else [])]
    if subprocess.run(check, cwd=source, env=environment).returncode:
        raise fail("imports failed, see above")
    step(f"ready; to use it by hand: cd {source} && export PYTHONPATH={path}")
    if options.suite is None:
        return 0
    step(f"suite {' '.join(options.suite)}")
    arguments = ["--out", str(target / "results"), *options.suite]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=source, env=environment
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
