"""Lowest and mean bits of a request's KV in its ``meta_info``, for requests that ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_pmkvq.ledger import Ledger

REQUEST_PARAM = "pmkvq_kv_bits"


class _AtEnd(list[Any]):
    """A per-token list whose every slice is the one value that describes the whole request.

    SGLang sends ``customized_info`` as slices along the output tokens; this value exists once, at the end. A client
    that streams increments is shown its list from the tokens on that it has already, so ``padded`` puts Nones there.
    """

    def __init__(self, value: Any, padded: bool) -> None:
        super().__init__([value])
        self._padded = padded

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return list.__getitem__(self, index)
        return [None] * (index.start or 0 if self._padded else 0) + [list.__getitem__(self, 0)]


def has_request_bits(req: Any) -> bool:
    """True once ``attach_request_bits`` gave this request its figures."""
    return REQUEST_PARAM in (req.customized_info or {})


def attach_request_bits(ledger: Ledger, req: Any, slot: int, incremental_streaming: bool = False) -> None:
    """Put lowest and mean bits of the request's KV into ``meta_info``, for requests that asked.

    Opt in by ``"sampling_params": {"custom_params": {"pmkvq_kv_bits": true}}``.

    Args:
        slot: row of the request, which the ledger knows it by.
        incremental_streaming: the server streams increments (``--incremental-streaming-output``).
    """
    wanted = getattr(req.sampling_params, "custom_params", None) or {}
    if not (isinstance(wanted, dict) and wanted.get(REQUEST_PARAM)) or not req.finished():
        return
    lowest, mean = ledger.request_bits(slot)
    info = req.customized_info if req.customized_info is not None else {}
    info[REQUEST_PARAM] = _AtEnd({"lowest": lowest, "mean": round(mean, 3)}, incremental_streaming and req.stream)
    req.customized_info = info
