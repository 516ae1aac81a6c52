"""A hook target: where SGLang is changed, how, why, and how to tell that it is still the code we know."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

HookKind = Literal["before", "after", "around", "replace"]


@dataclass(frozen=True)
class Target:
    """One hook.

    Attributes:
        path: dotted path of the function, method or class in SGLang.
        kind: how it is hooked, in the words of SGLang's ``HookType``.
        hook: our callable or class.
        parameters: names of the target's parameters in the supported version; its fingerprint. Empty for
            classes.
        why: what would be wrong without it.
    """

    path: str
    kind: HookKind
    hook: Callable[..., Any]
    parameters: tuple[str, ...]
    why: str


def check(target: Target) -> str | None:
    """None if the installed SGLang has ``target`` with the parameters we know, else the reason."""
    owner_path, _, name = target.path.rpartition(".")
    try:
        owner = pkgutil.resolve_name(owner_path)
        found = inspect.getattr_static(owner, name)
    except Exception as error:  # noqa: BLE001 - any import failure is an answer here
        return f"not found: {error}"
    if isinstance(found, type):
        return None if target.kind == "replace" else "is a class, but the hook expects a function"
    found = inspect.unwrap(getattr(found, "__func__", found))
    parameters = tuple(inspect.signature(found).parameters)
    if parameters != target.parameters:
        return f"parameters changed: expected {target.parameters}, found {parameters}"
    return None
