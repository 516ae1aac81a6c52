"""Makes a server write given tokens and records what it would have said: a logit processor, and its record files.

A request carries the tokens and the path of a file, which the client makes beforehand with ``create``. At every step
the processor writes log-probabilities of the untouched logits into the file, then leaves only the given token. The
module is imported by the server's scheduler (``dill`` pickles classes of modules by name), so it must be importable
there: servers run in the repository's root.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

NOT_WRITTEN = -1


def create(path: Path, steps: int, top: int, *, ids: bool = False) -> None:
    """An empty record of ``steps`` steps.

    Fields of a step: ``best`` int32, the most likely token; ``logprobs`` float32 [top]; ``rest`` float32, the
    logarithm of what all other tokens have together, −inf if there are none; with ``ids`` int32 [top], the tokens of
    ``logprobs``, most likely first. Without ids of its own a record has those of another one, or, where there is
    none either, of all tokens in order.
    """
    fields: list[Any] = [("best", "<i4"), ("rest", "<f4"), ("logprobs", "<f4", (top,))]
    if ids:
        fields.append(("ids", "<i4", (top,)))
    record = np.lib.format.open_memmap(path, "w+", np.dtype(fields), (steps,))
    record["best"] = NOT_WRITTEN
    record.flush()


def is_complete(path: Path, steps: int) -> bool:
    """Whether there is a record with all steps written; False too for a file that was cut short."""
    try:
        record = np.load(path, mmap_mode="r")
    except (FileNotFoundError, EOFError, ValueError):
        return False
    return len(record) == steps and bool((record["best"] != NOT_WRITTEN).all())


def request(tokens: list[int], record: Path, reference: Path | None = None) -> dict[str, Any]:
    """Fields of a ``/generate`` body that answers with ``tokens`` and fills ``record``.

    Args:
        reference: the record that says of which tokens, where the vocabulary is larger than a record.
    """
    params = {"forced_tokens": tokens, "record": str(record), "reference": str(reference) if reference else None}
    sampling = {"temperature": 0, "max_new_tokens": len(tokens), "ignore_eos": True, "custom_params": params}
    return {"sampling_params": sampling, "custom_logit_processor": ForceAndRecord.to_str()}


def step_of(request: Any) -> int:
    """Output tokens before the one that the request's present forward makes; negative while its prompt is prefilled.

    SGLang counts a token as committed when it prepares the forward that writes its KV, so this holds whether or not
    the results of the last forward were processed already (overlap scheduling), and after a retraction too, which
    prefills the prompt and the output so far.
    """
    return int(request.kv_committed_len) - len(request.origin_input_ids)


class ForceAndRecord(CustomLogitProcessor):
    """Records a step's log-probabilities, then makes the given token the only one."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """Logits [B, vocab] of requests and their parameters; writes ``logits`` in place and returns them."""
        for row, params in zip(logits, custom_param_list or (), strict=True):
            step, tokens = step_of(params["__req__"]), params["forced_tokens"]
            # Chunks of a prompt but the last, and the step that overlap scheduling runs beyond the end.
            if not 0 <= step < len(tokens):
                continue
            self._record(row, step, params)
            row.fill_(-math.inf)
            row[tokens[step]] = 0.0
        return logits

    @staticmethod
    def _record(logits: torch.Tensor, step: int, params: dict[str, Any]) -> None:
        # The parameters live as long as the request, and so do its open files.
        if "_record" not in params:
            params["_record"] = np.load(params["record"], mmap_mode="r+")
            params["_reference"] = np.load(params["reference"], mmap_mode="r") if params["reference"] else None
        record, reference = params["_record"], params["_reference"]
        logprobs = logits.float().log_softmax(-1)
        names = record.dtype.names
        rest = -math.inf
        if "ids" in names or reference is not None:
            if reference is None:
                ids = logprobs.topk(record.dtype["logprobs"].shape[0]).indices
                record["ids"][step] = ids.cpu().numpy()
            else:
                ids = torch.from_numpy(reference["ids"][step].astype(np.int64)).to(logits.device)
            rest = logprobs.index_fill(0, ids, -math.inf).logsumexp(0).item()
            values = logprobs[ids]
        else:
            values = logprobs
        record["logprobs"][step] = values.cpu().numpy()
        record["rest"][step] = rest
        record["best"][step] = logits.argmax().item()
