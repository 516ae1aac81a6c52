"""Whether servers on this GPU answer as they should, with the bundled model: graphs on and off, against stock, forced.

Stock itself answers with two attention backends: two kernels that are both right differ in rounding, so a chain may
differ here and there. Ours with and without CUDA graphs runs the same kernels on the same shapes, alone: not one token
may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.equality import answers, differing
from benchmarks.gpu.cells import BACKENDS, Cell, CheckFailed, Context, command_of
from benchmarks.methods import bytes_per_token
from benchmarks.pressure import Row, end_tokens, measure, ours, problem_set, prompt_ids, row_args
from benchmarks.reasoner.task import Problem, check
from benchmarks.result import Results
from benchmarks.serving import REASONER, STRICT, serve, sound

NO_GRAPHS = ("--disable-cuda-graph",)
BIG_POOL = 256 << 20
# Right answers that ours may lack against stock's: chains differ by rounding, and a chain that differs may go wrong.
SLACK = 1


def problems(context: Context) -> tuple[list[Problem], list[list[int]]]:
    """Greedy problems of the bundled task that the model answers nearly all right, and their token ids."""
    found = problem_set(3 if context.dry else 24, 10 if context.dry else 60, 12 if context.dry else 90, first=100)
    return found, prompt_ids(REASONER, found)[0]


def variants(context: Context) -> dict[str, tuple[bool, tuple[str, ...]]]:
    """Servers whose answers are compared: (ours, flags) by name."""
    big = ("--pmkvq-pool-bytes", str(BIG_POOL))
    # Or stock would take most of the machine's memory.
    most = ("--max-total-tokens", str(BIG_POOL // bytes_per_token(REASONER)))
    out: dict[str, tuple[bool, tuple[str, ...]]] = {
        "ours": (True, big),
        "stock": (False, (*most, *context.stock_args())),
    }
    if not context.dry:
        out["ours, no graphs"] = (True, (*big, *NO_GRAPHS))
        out["stock, other backend"] = (False, (*most, *context.stock_args(BACKENDS[1])))
    return out


def compare(got: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Differing answers and right ones of each server.

    Raises:
        CheckFailed: graphs changed a token, something shrank, or ours has fewer right answers than stock allows.
    """
    ids = {name: row["output_ids"] for name, row in got.items()}
    out: dict[str, Any] = {
        "answers": len(ids["ours"]),
        "right": {name: row["right"] for name, row in got.items()},
        "ours_against_stock": differing(ids["ours"], ids["stock"]),
    }
    if "stock, other backend" in ids:
        out["stock_against_stock"] = differing(ids["stock"], ids["stock, other backend"])
    if "ours, no graphs" in ids:
        out["graphs_against_none"] = differing(ids["ours"], ids["ours, no graphs"])
        if out["graphs_against_none"]:
            raise CheckFailed(f"CUDA graphs change answers: {out}")
    elif out["ours_against_stock"]:
        raise CheckFailed(f"on the CPU ours must be stock's token for token: {out}")
    if any(row.get("shrinks") for row in got.values()):
        raise CheckFailed("pages shrank in a pool that holds everything")
    if min(out["right"][n] for n in out["right"] if n.startswith("ours")) < out["right"]["stock"] - SLACK:
        raise CheckFailed(f"ours has fewer right answers than stock: {out}")
    return out


def forced(context: Context) -> dict[str, tuple[Row, tuple[str, ...]]]:
    """Servers whose pool is far too small for 16 bits."""
    rows = {"final 4, 15 %": ours("final 4, 15 %", 0.15, "4")}
    if not context.dry:
        static = ("--pmkvq-policy", "static", "--pmkvq-window", "16", "--enable-mixed-chunk")
        rows["static 8 and k4v2"] = ours("static 8 and k4v2", 0.5, "0-2:8,3-5:k4v2", *static)
    out = {name: (row, ()) for name, row in rows.items()}
    if not context.dry:
        out |= {f"{name}, no graphs": (row, NO_GRAPHS) for name, row in rows.items()}
    return out


def cells(context: Context, results: Results) -> Iterator[Cell]:
    found, ids = problems(context)
    longest = max(p.chain_tokens for p in found) + 64
    common = ("--max-running-requests", "16", "--random-seed", "0", "--grammar-backend", "none")

    for name, (quant, args) in variants(context).items():

        def answer(values: dict[str, Any], name: str = name, quant: bool = quant, args: Sequence[str] = args) -> None:
            flags = [*common, "--chunked-prefill-size", "2048", "--disable-radix-cache", *args]
            log = context.log("smoke", name)
            with serve(REASONER, flags, quant=quant, device=context.device, env=STRICT, log_path=log) as server:
                values["server"] = command_of(server)
                got = answers(server, ids, longest, 1)
                values["output_ids"] = got
                values["right"] = right(found, got)
                if quant:
                    values["shrinks"] = sum(server.pool()["shrinks"].values())
                    sound(server)
                elif errors := server.errors():
                    raise CheckFailed(f"stock logged {errors[:3]}")

        yield Cell({"answers of": name}, answer)

    def compared(values: dict[str, Any]) -> None:
        got = {row["key"]["answers of"]: row for row in results.rows if "answers of" in row["key"]}
        missing = [name for name in variants(context) if "output_ids" not in got.get(name, {}) or "failed" in got[name]]
        if missing:
            raise CheckFailed(f"no answers of {', '.join(missing)} to compare")
        values |= compare(got)

    yield Cell({"compared": "answers"}, compared, needs_s=0.0)

    for name, (row, args) in forced(context).items():

        def press(values: dict[str, Any], name: str = name, row: Row = row, args: Sequence[str] = args) -> None:
            token_bytes = bytes_per_token(REASONER)
            assert row.share is not None
            # A share of the few short chains of a dry run would not hold two chunks.
            pool = 1 << 20 if context.dry else int(end_tokens(found, ids) * token_bytes * row.share)
            chunk = 64 if context.dry else 256
            flags = [*row_args(row, pool, len(found), chunk, token_bytes), *args, "--grammar-backend", "none"]
            log = context.log("smoke", name)
            with serve(REASONER, flags, device=context.device, env=STRICT, log_path=log) as server:
                values["server"] = command_of(server)
                got = measure(server, row, found, ids, len(found), pool)
                values |= {k: v for k, v in got.items() if k not in ("row", "output_ids")}
                sound(server)
            if got["finished"] != len(found):
                raise CheckFailed(f"{got['finished']} of {len(found)} answers came to their end")
            if not sum(got["pool"]["shrinks"].values()):
                raise CheckFailed("nothing shrank")

        yield Cell({"forced": name}, press)


def right(found: Sequence[Problem], got: Sequence[list[int]]) -> int:
    """Right answers among token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in got]
    return sum(check(p, text) for p, text in zip(found, texts, strict=True))
