"""Time per output token while nothing shrinks, against stock, both servers up and measured in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.cells import MODELS, Cell, Context, command_of, probe
from benchmarks.gpu.throughput import CHUNK, GIB, START_S
from benchmarks.methods import Method, bytes_per_token, model_facts
from benchmarks.serve import word_tokenizer
from benchmarks.serving import serve
from benchmarks.tpot import compare

# (model, [(batch, prompt tokens)]): the goals are at most 1.02 times stock's, and batch 1 at 32K not above it.
PAIRS = {
    "r1-distill-qwen-7b": [(1, 512), (8, 512), (1, 32512)],
    "r1-distill-llama-8b": [(1, 512), (8, 512), (1, 32512)],
}
DRY_PAIRS = {"tiny": [(1, 32)]}


def cells(context: Context) -> Iterator[Cell]:
    for name, shapes in (DRY_PAIRS if context.dry else PAIRS).items():

        def run(values: dict[str, Any], name: str = name, shapes: list[tuple[int, int]] = shapes) -> None:
            model, new = MODELS / name, 8 if context.dry else 256
            facts = model_facts(model)
            vocab = facts["vocab_size"]
            tokenizer = context.out / "tokenizers" / str(vocab)
            if not (tokenizer / "tokenizer_config.json").exists():
                word_tokenizer(tokenizer, vocab)
            # Twice what is held at once, so that ours has no reason to shrink.
            kv_bytes = 2 * max(batch * (prompt + new + CHUNK) for batch, prompt in shapes) * bytes_per_token(model)
            kv_bytes = max(kv_bytes, (4 << 20) if context.dry else 2 * GIB)
            running = max(batch for batch, _ in shapes)
            args = ["--load-format", "dummy", "--tokenizer-path", str(tokenizer), "--grammar-backend", "none"]
            args += ["--random-seed", "0", "--context-length", str(max(p for _, p in shapes) + new + 64)]

            def flags(method: Method) -> list[str]:
                chunk = 64 if context.dry else CHUNK
                extra = [] if method.quant else context.stock_args()
                return [*method.server_args(model, kv_bytes, running, chunk), *args, *extra]

            ours, stock = Method.parse("age-4"), Method.parse("stock")
            kind: dict[str, Any] = {"device": context.device}
            with (
                serve(model, flags(ours), log_path=context.log("unsaturated", name, "ours"), **kind) as a,
                serve(
                    model, flags(stock), quant=False, log_path=context.log("unsaturated", name, "stock"), **kind
                ) as b,
            ):
                values["server"], values["stock_server"] = command_of(a), command_of(b)
                for server in (a, b):
                    probe(server, vocab)
                values["rows"] = []
                for batch, prompt in shapes:
                    # On a GPU the two have different kernels, and dummy weights nearly equal logits: no equal answers.
                    row = compare(a, b, vocab, batch, context.options.repeats, new, prompt, exact=context.dry)
                    if row["shrinks"]:
                        raise RuntimeError(f"{row['shrinks']} pages shrank in a pool that holds everything twice")
                    values["rows"].append(row)

        yield Cell({"model": name}, run, 2 * START_S + 60)
