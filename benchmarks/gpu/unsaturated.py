"""Time per output token while nothing shrinks, against stock, both servers up and measured in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.checks.pool import compare_times as compare
from benchmarks.gpu.cells import CHUNK, GIB, MODELS, START_S, Cell, CheckFailed, Context, dummy_server
from benchmarks.harness.methods import bytes_per_token, model_facts
from benchmarks.harness.results import Row

# (model, [(batch, prompt tokens)]): the goals are at most 1.02 times stock's, and batch 1 at 32K not above it.
PAIRS = {
    "r1-distill-qwen-7b": [(1, 512), (8, 512), (1, 32512)],
    "r1-distill-llama-8b": [(1, 512), (8, 512), (1, 32512)],
}
REPEATS = 5
DRY_PAIRS = {"tiny": [(1, 32)]}


def run(context: Context, model: str, shapes: Sequence[tuple[int, int]], values: Row) -> None:
    new = 8 if context.dry else 256
    # Twice what is held at once, so that ours has no reason to shrink.
    held = max(batch * (prompt + new + CHUNK) for batch, prompt in shapes) * bytes_per_token(MODELS / model)
    kv_bytes = max(2 * held, 4 << 20 if context.dry else 2 * GIB)
    size = (kv_bytes, max(batch for batch, _ in shapes), max(prompt for _, prompt in shapes) + new)
    with (
        dummy_server(context, values, f"unsaturated-{model}-ours", "age-4", model, *size) as ours,
        dummy_server(context, values, f"unsaturated-{model}-stock", "stock", model, *size) as stock,
    ):
        values["rows"] = []
        for batch, prompt in shapes:
            # On a GPU the two have different kernels, and dummy weights nearly equal logits: no equal answers.
            vocab, repeats = model_facts(MODELS / model)["vocab_size"], 1 if context.dry else REPEATS
            row = compare(ours, stock, vocab, batch, repeats, new, prompt, exact=context.dry)
            if row["shrinks"]:
                raise CheckFailed(f"{row['shrinks']} pages shrank in a pool that holds everything twice")
            values["rows"].append(row)


def cells(context: Context) -> Iterator[Cell]:
    for model, shapes in (DRY_PAIRS if context.dry else PAIRS).items():
        yield Cell({"model": model}, partial(run, context, model, shapes), 2 * START_S + 60)
