"""Which SGLang is installed, and whether it is one that we know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sglang_pmkvq.patches import v0_5_15
from sglang_pmkvq.patches.base import PatchSet
from sglang_pmkvq.serving import engine

# Oldest first.
PATCH_SETS: tuple[PatchSet, ...] = (v0_5_15.PATCH_SET,)


@dataclass(frozen=True)
class Problem:
    """Why this SGLang cannot be served.

    Attributes:
        text: one sentence.
        version_only: the code that we hook and override looks right, only the version is unknown.
    """

    text: str
    version_only: bool


def supported_versions() -> tuple[str, ...]:
    return tuple(v for patch_set in PATCH_SETS for v in patch_set.versions)


@lru_cache(maxsize=1)
def patch_set() -> PatchSet:
    """Of the installed SGLang; the newest where the version is unknown."""
    for known in PATCH_SETS:
        if engine.version() in known.versions:
            return known
    return PATCH_SETS[-1]


@lru_cache(maxsize=1)
def check_installed() -> Problem | None:
    """None if the installed SGLang is one we know, else the problem; call before the hooks are applied or after."""
    broken = list(patch_set().broken())
    if broken:
        return Problem(f"SGLang's code differs from what is patched: {'; '.join(broken)}", False)
    if engine.version() not in supported_versions():
        return Problem(
            f"untested SGLang version; tested are {', '.join(supported_versions())}, try "
            "--pmkvq-allow-untested-sglang at your own risk",
            True,
        )
    return None
