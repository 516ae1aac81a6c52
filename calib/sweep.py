"""Sums over samples that survive an interruption: accumulators in a work folder, written as the sweep goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

SAVE_EVERY_S = 20.0

State = dict[str, torch.Tensor]


class Workspace:
    """Partial results of one calibration. Results of other settings or data in the folder are not used."""

    def __init__(self, folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.key = key

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def load(self, name: str) -> tuple[int, State] | None:
        """(samples done, accumulators), or None if there are none for this key."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
                return int(metadata["done"]), state
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, name: str, done: int, state: State) -> None:
        partial = self._path(name).with_suffix(".part")
        tensors = {key: t.contiguous() for key, t in state.items()}
        save_file(tensors, partial, metadata={"key": self.key, "done": str(done)})
        os.replace(partial, self._path(name))


def sweep(
    workspace: Workspace,
    name: str,
    count: int,
    state: State,
    step: Callable[[int, State], None],
    label: str = "",
    quiet: bool = False,
) -> State:
    """``step(i, state)`` for i = 0 .. count − 1, which adds to ``state`` in place; resumes where it stopped.

    The accumulators live on the CPU in float64 (sums) or float32 (maxima), so a resumed sweep ends with the
    bits of an unbroken one.
    """
    saved = workspace.load(name)
    done = 0
    if saved is not None and {k: t.shape for k, t in saved[1].items()} == {k: t.shape for k, t in state.items()}:
        done, state = saved
    last = time.monotonic()
    with tqdm(total=count, initial=done, desc=label or name, unit="sample", disable=quiet) as bar:
        for index in range(done, count):
            step(index, state)
            bar.update()
            if time.monotonic() - last > SAVE_EVERY_S:
                workspace.save(name, index + 1, state)
                last = time.monotonic()
    if done < count:
        workspace.save(name, count, state)
    return state
