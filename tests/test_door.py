"""The door to SGLang: every name it gives, every hook and every override that the installed version must have."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pkgutil
from typing import Any

import pytest
import torch

from sglang_pmkvq import serving
from sglang_pmkvq.patches import base
from sglang_pmkvq.patches.v0_5_15 import PATCH_SET
from sglang_pmkvq.serving import engine, hooks, versions
from sglang_pmkvq.serving.allocator import PmkvqAllocator
from sglang_pmkvq.serving.attention import PmkvqAttnBackend
from sglang_pmkvq.serving.configurator import PmkvqPoolConfigurator
from sglang_pmkvq.serving.pool import MixedPrecisionTokenPool
from sglang_pmkvq.serving.server_args import PmkvqServerArgs

OURS = (PmkvqServerArgs, PmkvqPoolConfigurator, MixedPrecisionTokenPool, PmkvqAllocator, PmkvqAttnBackend)
# Made by ``dataclasses``, from fields that are SGLang's own and ours.
GENERATED = {"PmkvqServerArgs": {"__init__", "__repr__", "__eq__"}}
METHODS = (staticmethod, classmethod, property)


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", engine._NAMES)
def test_every_name_is_there(name: str) -> None:
    assert torch.cuda.is_available() or os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    found = getattr(engine, name)
    assert found is pkgutil.resolve_name(engine._NAMES[name])
    assert found is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="takes no 'HiRadixCache' from SGLang"):
        _ = engine.HiRadixCache
    assert not hasattr(engine, "anything")
    with pytest.raises(ImportError):
        exec("from sglang_pmkvq.serving.engine import Scheduler")


def test_classes_that_stand_in_while_pools_are_built() -> None:
    """In whose globals SGLang looks them up."""
    module = engine.pool_module()
    for name in (engine.POOL_CLASS, engine.ALLOCATOR_CLASS):
        assert inspect.isclass(getattr(module, name)), name


def test_the_installed_version_is_known() -> None:
    assert engine.version() in versions.supported_versions()
    assert versions.patch_set() is PATCH_SET
    assert versions.PATCH_SETS[-1] is PATCH_SET


# -- hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", PATCH_SET.targets, ids=lambda t: t.path.rpartition("sglang.srt.")[2])
def test_every_target_has_its_hook(target: base.Target) -> None:
    """It is there, and takes what SGLang's registry hands over: the original or the result, then the arguments."""
    assert target.why
    assert engine.HookType(target.kind).value == target.kind
    if target.kind == "replace":
        assert target.hook == PmkvqServerArgs.__name__ and not hasattr(hooks, target.hook)
        assert issubclass(PmkvqServerArgs, pkgutil.resolve_name(target.path))
        return
    hook = getattr(hooks, target.hook)
    assert inspect.isfunction(hook) and hook.__module__ == hooks.__name__
    first = () if target.kind == "before" else (object(),)
    inspect.signature(hook).bind(*first, *target.parameters)


def test_hooks_and_targets_are_the_same_set() -> None:
    paths = [target.path for target in PATCH_SET.targets]
    assert len(set(paths)) == len(paths)
    own = {name for name, f in vars(hooks).items() if inspect.isfunction(f) and f.__module__ == hooks.__name__}
    assert own == {target.hook for target in PATCH_SET.targets if target.kind != "replace"}


# -- overrides -----------------------------------------------------------------------------------------------


def overridden(cls: type) -> dict[str, Any]:
    """Methods in the body of a class of ours that a class of SGLang above it has, as SGLang has them."""
    above = [c for c in cls.__mro__[1:] if c.__module__.startswith("sglang.")]
    found = {}
    for name, value in vars(cls).items():
        if not (inspect.isfunction(value) or isinstance(value, METHODS)):
            continue
        if name in GENERATED.get(cls.__name__, ()):
            continue
        theirs = next((vars(c)[name] for c in above if name in vars(c)), None)
        if theirs is not None:
            found[name] = theirs
    return found


def parameters(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(getattr(method, "__func__", method))).parameters)


@pytest.mark.parametrize("cls", OURS, ids=lambda c: c.__name__)
def test_overrides_are_listed_with_sglangs_parameters(cls: type) -> None:
    """All that there are, and no other."""
    (listed,) = [o for o in PATCH_SET.overrides if o.ours == cls.__name__]
    theirs = pkgutil.resolve_name(listed.path)
    assert cls.__bases__[0] is theirs
    assert {name: parameters(method) for name, method in overridden(cls).items()} == listed.methods
    assert not list(listed.broken())


def test_no_other_class_of_ours_overrides_sglang() -> None:
    assert [o.ours for o in PATCH_SET.overrides] == [cls.__name__ for cls in OURS]
    for module in pkgutil.iter_modules(serving.__path__, "sglang_pmkvq.serving."):
        for value in vars(pkgutil.resolve_name(module.name)).values():
            if inspect.isclass(value) and value.__module__ == module.name and value not in OURS:
                assert not any(c.__module__.startswith("sglang.") for c in value.__mro__), value


def with_methods(ours: str, **changes: tuple[str, ...]) -> base.PatchSet:
    """The patch set, with other parameters for some methods that one class of ours overrides."""
    overrides = tuple(
        dataclasses.replace(o, methods={**o.methods, **changes}) if o.ours == ours else o
        for o in PATCH_SET.overrides
    )
    return dataclasses.replace(PATCH_SET, overrides=overrides)


def test_nothing_is_broken() -> None:
    assert list(PATCH_SET.broken()) == []


def test_a_changed_parameter_of_an_override_is_reported() -> None:
    changed = with_methods("PmkvqAllocator", free=("self", "free_index", "new"))
    (report,) = changed.broken()
    assert report.startswith("sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free (parameters changed")
    assert "'new'" in report


def test_a_missing_override_is_reported() -> None:
    (report,) = with_methods("PmkvqAttnBackend", forward_sideways=("self",)).broken()
    assert "AttentionBackend.forward_sideways (not found" in report


def test_a_changed_target_is_reported() -> None:
    first, *rest = PATCH_SET.targets
    changed = dataclasses.replace(rest[0], parameters=("other",))
    (report,) = dataclasses.replace(PATCH_SET, targets=(first, changed, *rest[1:])).broken()
    assert report.startswith(f"{changed.path} (parameters changed")


def test_a_changed_override_refuses_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a changed target does, whatever consent there is to an unknown version."""
    from sglang_pmkvq.serving.config import PmkvqConfigError

    changed = with_methods("MixedPrecisionTokenPool", set_kv_buffer=("self", "layer"))
    monkeypatch.setattr(versions, "patch_set", lambda: changed)
    versions.check_installed.cache_clear()
    try:
        with pytest.raises(PmkvqConfigError, match="KVCache.set_kv_buffer .*parameters changed"):
            PmkvqServerArgs(
                model_path="/nonexistent/model", device="cpu", kv_quant="pmkvq", pmkvq_allow_untested_sglang=True
            )
    finally:
        versions.check_installed.cache_clear()
