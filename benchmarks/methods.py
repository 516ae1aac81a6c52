"""KV-cache methods by name, and the server flags that run each in the same bytes. One list for all benchmarks.

Names:

* ``16bit``: stock SGLang with memory for everything: the ceiling of accuracy.
* ``stock``: stock SGLang in the given bytes. ``stock-fp8``: the same with an fp8 KV cache.
* ``age-FINAL``, ``uniform-FINAL``, ``static-FINAL``: our pool under that policy. FINAL is what ``--pmkvq-final-bits``
  takes (``2``, ``k4v2``, ``0-2:8,3-5:k4v2``) or a calibration file. ``static`` protects sinks and window hard, as
  KIVI-like systems do; with widths per layer it is the KVTuner-like mix.
* ``-hard`` or ``-soft`` at the end chooses the protection; ``-nowindow`` leaves sinks and window unprotected;
  ``-hadamard`` rotates keys (``--pmkvq-key-transform hadamard``).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.result import ROOT

PAGE = 16
POLICIES = ("age", "uniform", "static")


@dataclass(frozen=True)
class Method:
    """How one server keeps its KV cache.

    Attributes:
        name: as above.
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
        policy, _, rest = name.partition("-")
        if policy not in POLICIES or not rest:
            raise ValueError(
                f"unknown method {name!r}: expected 16bit, stock, stock-fp8, or age-, uniform- or static- and then "
                f"final bits or a calibration file"
            )
        protect = "hard" if policy == "static" else "soft"
        more: tuple[str, ...] = ()
        while rest.endswith(("-hard", "-soft", "-nowindow", "-hadamard")):
            rest, _, end = rest.rpartition("-")
            if end == "nowindow":
                more += ("--pmkvq-window", "0", "--pmkvq-sink-tokens", "0")
            elif end == "hadamard":
                more += ("--pmkvq-key-transform", "hadamard")
            else:
                protect = end
        flag = "--pmkvq-calibration" if rest.endswith(".safetensors") else "--pmkvq-final-bits"
        return Method(name, True, args=("--pmkvq-policy", policy, "--pmkvq-protect", protect, flag, rest, *more))

    def server_args(self, model: Path, pool_bytes: int | None, running: int, chunk: int | None = None) -> list[str]:
        """Flags of a server that runs this method.

        Args:
            model: model folder; its config gives the bytes of a token.
            pool_bytes: bytes for KV, everything included; None: what the server takes by itself.
            running: ``--max-running-requests``.
            chunk: ``--chunked-prefill-size``; None: SGLang's default.
        """
        args = ["--max-running-requests", str(running), "--decode-log-interval", "8"]
        args += ["--chunked-prefill-size", str(chunk)] if chunk else []
        if self.quant:
            args += ["--page-size", str(PAGE)]
        if pool_bytes is not None:
            if self.quant:
                args += ["--pmkvq-pool-bytes", str(pool_bytes)]
            else:
                width = 1 if "fp8_e4m3" in self.args else 2
                args += ["--max-total-tokens", str(pool_bytes * 2 // (bytes_per_token(model) * width))]
        return [*args, *self.args]


def model_facts(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text())


def bytes_per_token(model: Path) -> int:
    """16-bit KV bytes of a token over all layers."""
    c = model_facts(model)
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return 2 * 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * head_dim


def held_bytes(model: Path, lengths: Iterable[int]) -> int:
    """16-bit KV bytes of sequences of so many tokens, in whole pages."""
    return sum(math.ceil(n / PAGE) * PAGE for n in lengths) * bytes_per_token(model)


def label(name: str) -> str:
    """A method's name for tables and pictures: a calibration file without its folder and ending."""
    if not name.endswith(".safetensors"):
        return name
    policy, _, path = name.partition("-")
    return f"{policy}-{Path(path).name.removesuffix('.safetensors').removesuffix('.pmkvq')}"


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


def arguments(parser: argparse.ArgumentParser, default: str, out: str, *, servers: bool = True) -> None:
    """Add the options that all benchmarks share; without ``servers`` only those that need none."""
    from benchmarks.serving import REASONER

    parser.add_argument("--model", type=Path, default=REASONER, help="model folder (default: the bundled reasoner)")
    listed = "; see benchmarks/methods.py" if servers else ""
    parser.add_argument("--methods", default=default, help=f"default %(default)s{listed}")
    parser.add_argument("--out", type=Path, default=Path(out), help="result file, default %(default)s; a run goes on")
    if servers:
        parser.add_argument("--seed", type=int, default=0)
        more = "further flags for every server, in one string, quoted as for a shell"
        parser.add_argument("--server-args", default="", type=_shell_words, help=more)


def extra_args(options: argparse.Namespace) -> list[str]:
    """``--server-args`` as a shell would split it."""
    return shlex.split(options.server_args)


def _shell_words(text: str) -> str:
    """``text``, if a shell could split it."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return text


def size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two ways to say how many bytes there are."""
    parser.add_argument("--share", default="", help="pool as a share of 16-bit bytes, several with commas")
    parser.add_argument("--pool-bytes", default="", help="pool of every method, such as 8GiB, several with commas")


def pool_sizes(options: argparse.Namespace, held_bytes: int) -> list[int]:
    """Bytes that the options of ``size_arguments`` name; shares are of ``held_bytes``.

    Raises:
        ValueError: neither ``--share`` nor ``--pool-bytes``, both, or a size that is none.
    """
    from sglang_pmkvq.serving.config import parse_size

    if bool(options.share) == bool(options.pool_bytes):
        raise ValueError("give either --share (of the 16-bit bytes of the running problems) or --pool-bytes")
    if options.pool_bytes:
        return [parse_size(size) for size in options.pool_bytes.split(",")]
    try:
        shares = [float(s) for s in options.share.split(",")]
    except ValueError as error:
        raise ValueError(f"--share {options.share}: expected numbers such as 0.22,0.35") from error
    if not all(0 < s <= 4 for s in shares):
        raise ValueError(f"--share {options.share}: expected numbers between 0 and 4")
    return [int(held_bytes * share) for share in shares]


def config(options: argparse.Namespace, *, drop: Sequence[str] = ()) -> dict[str, Any]:
    """The options that decide the figures, as JSON values; paths inside the repository relative to it."""
    out = {}
    for name, value in vars(options).items():
        if name in ("out", "methods", *drop):
            continue
        out[name] = str(value).removeprefix(f"{ROOT}/") if isinstance(value, Path) else value
    return out
