"""Where SGLang is changed, how, why, and how to tell that it is still the code we know. Imports nothing of ours."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

HookKind = Literal["before", "after", "around", "replace"]


@dataclass(frozen=True)
class Target:
    """One hook.

    Attributes:
        path: dotted path of the function, method or class in SGLang.
        kind: how it is hooked, in the words of SGLang's ``HookType``.
        hook: name of our function in ``serving/hooks.py``, or of our class where ``kind`` is ``replace``.
        parameters: names of the target's parameters in the supported version; its fingerprint. Empty for
            classes.
        why: what would be wrong without it.
    """

    path: str
    kind: HookKind
    hook: str
    parameters: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Overrides:
    """Methods of a class of SGLang's that a class of ours overrides: SGLang calls ours as it would call its own.

    Attributes:
        path: dotted path of SGLang's class.
        ours: our class.
        methods: fingerprint, names of the parameters of each overridden method.
    """

    path: str
    ours: str
    methods: dict[str, tuple[str, ...]]

    def broken(self) -> Iterator[str]:
        """``path (reason)`` of every method that the installed SGLang has otherwise."""
        for method, parameters in self.methods.items():
            reason = _check(f"{self.path}.{method}", parameters)
            if reason is not None:
                yield f"{self.path}.{method} ({reason})"


@dataclass(frozen=True)
class PatchSet:
    """Everything about one version of SGLang.

    Attributes:
        versions: of SGLang that it was tested with.
        targets: the hooks.
        overrides: the methods that our classes override.
    """

    versions: tuple[str, ...]
    targets: tuple[Target, ...]
    overrides: tuple[Overrides, ...]

    def broken(self) -> Iterator[str]:
        """``path (reason)`` of everything that the installed SGLang has otherwise."""
        for target in self.targets:
            reason = check(target)
            if reason is not None:
                yield f"{target.path} ({reason})"
        for overrides in self.overrides:
            yield from overrides.broken()


def check(target: Target) -> str | None:
    """None if the installed SGLang has ``target`` with the parameters we know, else the reason."""
    return _check(target.path, target.parameters, target.kind == "replace")


def _check(path: str, parameters: tuple[str, ...], class_expected: bool = False) -> str | None:
    owner_path, _, name = path.rpartition(".")
    try:
        owner = pkgutil.resolve_name(owner_path)
        found = inspect.getattr_static(owner, name)
    except Exception as error:  # noqa: BLE001 - any import failure is an answer here
        return f"not found: {error}"
    if isinstance(found, type):
        return None if class_expected else "is a class, but the hook expects a function"
    found = inspect.unwrap(getattr(found, "__func__", found))
    have = tuple(inspect.signature(found).parameters)
    if have != parameters:
        return f"parameters changed: expected {parameters}, found {have}"
    return None
