"""``pmkvq doctor``: what is installed, what it runs on, and whether ``--kv-quant pmkvq`` can serve here.

Heavy packages are imported only where a check needs them, and a failing import is a finding, never a
traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

DISTRIBUTIONS = (
    ("sglang-pmkvq", "sglang-pmkvq"),
    ("sglang", "sglang"),
    ("torch", "torch"),
    ("triton", "triton"),
    ("flashinfer", "flashinfer-python"),
    ("transformers", "transformers"),
    ("numpy", "numpy"),
)
ENTRY_POINT_GROUP = "sglang.srt.plugins"
ENTRY_POINT_NAME = "pmkvq"
PYTHON_RANGE = ((3, 10), (3, 14))


@dataclass(frozen=True)
class Check:
    """One finding; ``ok`` False means that serving is not possible."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class TargetCheck:
    """One place where SGLang is hooked; ``problem`` None means that it is the code we know."""

    path: str
    kind: str
    why: str
    problem: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor found."""

    versions: dict[str, str]
    hardware: dict[str, Any]
    checks: list[Check]
    targets: list[TargetCheck]
    refusals: list[dict[str, str]]

    @property
    def usable(self) -> bool:
        return all(check.ok for check in self.checks) and all(t.problem is None for t in self.targets)

    def to_json(self) -> dict[str, Any]:
        return {"usable": self.usable, **asdict(self)}

    def text(self) -> str:
        lines = ["Versions"]
        lines += [f"  {name:<14} {version}" for name, version in self.versions.items()]
        lines += ["", "Hardware"]
        hw = self.hardware
        lines += [
            f"  {'CPU':<14} {hw['cpu']}, {hw['cores']} cores usable",
            f"  {'memory':<14} {hw['memory_bytes'] / 2**30:.1f} GiB",
        ]
        lines += [
            f"  {'GPU':<14} {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, sm_{gpu['capability']}"
            for gpu in hw["gpus"]
        ] or [f"  {'GPU':<14} none; the CPU path serves"]
        lines += ["", "Checks"]
        lines += [f"  [{_mark(check.ok)}] {check.name}: {check.detail}" for check in self.checks]
        lines += ["", "Patch targets in SGLang"]
        lines += [
            f"  [{_mark(t.problem is None)}] {t.path} ({t.kind}): {t.problem or t.why}" for t in self.targets
        ] or ["  none could be read"]
        lines += ["", "Refused together with --kv-quant pmkvq"]
        lines += [f"  {r['flag']}: {r['reason']}; {r['way_out']}" for r in self.refusals]
        lines += [
            "",
            "--kv-quant pmkvq " + ("can serve here" if self.usable else "CANNOT serve here, see above"),
        ]
        return "\n".join(lines)


def _mark(ok: bool) -> str:
    return "ok  " if ok else "FAIL"


def diagnose() -> Diagnosis:
    """Run every check; takes some seconds, as SGLang and torch are imported.

    What those imports print goes to stderr, so that stdout stays the answer (``--json``).
    """
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _diagnose()


def _diagnose() -> Diagnosis:
    checks = [
        _attempt("python", _check_python),
        _attempt("entry point", _check_entry_point),
        _attempt("kernels package", _check_kernels_package),
        _attempt("SGLang version", _check_sglang_version),
        _attempt("environment", _check_environment),
    ]
    targets: list[TargetCheck] = []
    try:
        targets = _targets()
        checks.append(Check("patch targets", bool(targets), f"{len(targets)} known"))
    except Exception as error:  # noqa: BLE001 - a finding: SGLang cannot be imported as we know it
        checks.append(Check("patch targets", False, _describe(error)))
    return Diagnosis(_versions(), _hardware(), checks, targets, _refusals())


def _attempt(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        return Check(name, False, _describe(error))


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hardware() -> dict[str, Any]:
    gpus: list[dict[str, Any]] = []
    try:
        import torch

        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append(
                {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}{gpu.minor}"}
            )
    except Exception:  # noqa: BLE001 - without a working torch the version list says why
        pass
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _check_python() -> tuple[bool, str]:
    low, high = PYTHON_RANGE
    ok = low <= sys.version_info[:2] < high
    return ok, f"{platform.python_version()}, expected >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}"


def _check_entry_point() -> tuple[bool, str]:
    names = [point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP)]
    if ENTRY_POINT_NAME not in names:
        return False, f"no {ENTRY_POINT_NAME!r} in group {ENTRY_POINT_GROUP!r}; install the package with pip"
    # SGLang loads only the plugins named here, if the variable is set.
    chosen = os.environ.get("SGLANG_PLUGINS")
    if chosen and ENTRY_POINT_NAME not in [name.strip() for name in chosen.split(",")]:
        return False, f"SGLANG_PLUGINS={chosen} leaves {ENTRY_POINT_NAME!r} out; add it or unset the variable"
    return True, f"{ENTRY_POINT_NAME!r} is registered in {ENTRY_POINT_GROUP!r}"


def _check_kernels_package() -> tuple[bool, str]:
    kernels = importlib.import_module("kernels")
    if getattr(kernels, "__file__", None) is None or not hasattr(kernels, "get_kernel"):
        return False, f"`import kernels` gives {kernels!r}, not the Hugging Face package that SGLang imports"
    return True, f"Hugging Face kernels {getattr(kernels, '__version__', '')}".rstrip()


def _check_sglang_version() -> tuple[bool, str]:
    from sglang_pmkvq.serving.versions import supported_versions

    installed, supported = metadata.version("sglang"), supported_versions()
    return installed in supported, f"{installed}, tested with {', '.join(supported)}"


def _check_environment() -> tuple[bool, str]:
    from sglang_pmkvq.serving.refusals import REFUSALS

    # Without server arguments only what the environment alone triggers is left.
    active = [refusal.sentence() for refusal in REFUSALS if refusal.applies(SimpleNamespace())]
    return not active, " ".join(active) or "no variable set that is refused"


def _targets() -> list[TargetCheck]:
    from sglang_pmkvq.patches.base import check
    from sglang_pmkvq.serving.versions import patch_set

    known = patch_set()
    return [
        *(TargetCheck(t.path, t.kind, t.why, check(t)) for t in known.targets),
        *(
            TargetCheck(
                o.path, "override", f"{o.ours} overrides {len(o.methods)} of its methods", "; ".join(o.broken()) or None
            )
            for o in known.overrides
        ),
    ]


def _refusals() -> list[dict[str, str]]:
    from sglang_pmkvq.serving.refusals import LAYER_REFUSALS, MODEL_REFUSALS, REFUSALS

    models = {r.what: r.reason for r in (*MODEL_REFUSALS, *LAYER_REFUSALS)}
    return [
        *({"flag": r.flag, "reason": r.reason, "way_out": r.way_out} for r in REFUSALS),
        *(
            {"flag": f"a model with {what}", "reason": reason, "way_out": "use --kv-quant none"}
            for what, reason in models.items()
        ),
    ]
