"""KV-cache methods by name, and the server flags that run each in the same bytes. One list for all benchmarks.

What each name means: docs/benchmarks.md, "Methods".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_pmkvq.tools.demo import kv_bytes_per_token as bytes_per_token

PAGE = 16
# What stands behind a slash: how keys and values become codes. Without one, what the server takes by itself.
CODINGS = {
    "plain": {"key-transform": "none", "key-center": "none"},
    "hadamard": {"key-transform": "hadamard", "key-center": "none"},
    "centre": {"key-transform": "none"},
}
_OURS = re.compile(
    r"(age|uniform|static)-(.+?\.safetensors|[^/]+?)((?:-(?:hard|soft|nowindow|hadamard))*)"
    rf"((?:/(?:{'|'.join(CODINGS)}|[a-z-]+=[^/=]+))*)"
)


@dataclass(frozen=True)
class Method:
    """How one server keeps its KV cache.

    Attributes:
        name: as ``--methods`` takes it.
        quant: our pool, else stock.
        unbounded: gets all the bytes it needs, whatever the others get; the caller says how many.
        args: flags beyond those of the size.
    """

    name: str
    quant: bool
    unbounded: bool = False
    args: tuple[str, ...] = ()

    @staticmethod
    def parse(name: str) -> Method:
        """The method of that name.

        Raises:
            ValueError: there is none.
        """
        if name == "16bit":
            return Method(name, False, unbounded=True)
        if name == "stock":
            return Method(name, False)
        if name == "stock-fp8":
            return Method(name, False, args=("--kv-cache-dtype", "fp8_e4m3"))
        match = _OURS.fullmatch(name)
        if match is None:
            raise ValueError(
                f"unknown method {name!r}: expected 16bit, stock, stock-fp8, or age-, uniform- or static- and then "
                f"final bits or a calibration file, then perhaps /{', /'.join(CODINGS)} or /FLAG=VALUE"
            )
        policy, final, words, flags = match.groups()
        protect = "hard" if policy == "static" else "soft"
        more: tuple[str, ...] = ()
        for word in words.split("-")[1:]:
            if word == "nowindow":
                more += ("--pmkvq-window", "0", "--pmkvq-sink-tokens", "0")
            elif word == "hadamard":
                more += ("--pmkvq-key-transform", "hadamard")
            else:
                protect = word
        for flag in flags.split("/")[1:]:
            given = CODINGS.get(flag) or dict([flag.split("=")])
            for key, value in given.items():
                more += (f"--pmkvq-{key}", value)
        bits = "--pmkvq-calibration" if final.endswith(".safetensors") else "--pmkvq-final-bits"
        return Method(name, True, args=("--pmkvq-policy", policy, "--pmkvq-protect", protect, bits, final, *more))

    def server_args(self, model: Path, budget_bytes: int | None, running: int, chunk: int | None = None) -> list[str]:
        """Flags of a server that runs this method.

        Args:
            model: model folder; its config gives the bytes of a token.
            budget_bytes: bytes for KV, everything included; None: what the server takes by itself.
            running: ``--max-running-requests``.
            chunk: ``--chunked-prefill-size``; None: SGLang's default.
        """
        args = ["--max-running-requests", str(running), "--decode-log-interval", "8"]
        args += ["--chunked-prefill-size", str(chunk)] if chunk else []
        if self.quant:
            args += ["--page-size", str(PAGE)]
        if budget_bytes is not None:
            if self.quant:
                args += ["--pmkvq-pool-bytes", str(budget_bytes)]
            else:
                args += ["--max-total-tokens", str(budget_bytes // self.stock_token_bytes(model))]
        return [*args, *self.args]

    def stock_token_bytes(self, model: Path) -> int:
        """Bytes of a token in stock's own cache."""
        return bytes_per_token(model) // (2 if "fp8_e4m3" in self.args else 1)


def model_facts(model: Path) -> dict[str, Any]:
    """The model's ``config.json``."""
    return json.loads((model / "config.json").read_text())


def held_bytes(model: Path, lengths: Iterable[int]) -> int:
    """16-bit KV bytes of sequences of so many tokens, in whole pages."""
    return sum(math.ceil(n / PAGE) * PAGE for n in lengths) * bytes_per_token(model)


def label(name: str) -> str:
    """A method's name for tables and pictures: a calibration file without its folder and ending."""
    match = re.fullmatch(r"(\w+)-(.+)\.safetensors(.*)", name)
    return f"{match[1]}-{Path(match[2]).name.removesuffix('.pmkvq')}{match[3]}" if match else name


def names(text: str) -> list[str]:
    """Names of a comma- or space-separated list, each once.

    A comma inside widths per layer (``0-2:8,3-5:k4v2``) belongs to the widths.

    Raises:
        ValueError: there are none.
    """
    parts: list[str] = []
    for part in text.replace(" ", ",").split(","):
        if part and part[0].isdigit() and ":" in part and parts:
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    if not parts:
        raise ValueError("--methods is empty; expected names such as stock,age-2,static-2")
    return list(dict.fromkeys(parts))


def methods(text: str) -> list[Method]:
    """Methods of such a list.

    Raises:
        ValueError: one is unknown.
    """
    return [Method.parse(name) for name in names(text)]
