"""SGLang's own engine with the mixed-precision KV cache, in one Python program, on a GPU or without one.

    .venv/bin/python examples/engine.py

Asks the bundled model two problems at once in a pool that is too small for both at 16 bits, prints the answers, and
then what the pool did. The model traces a program of additions and subtractions of digits line by line; it ends with
`#:` and the value that the last line asks for.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

# SGLang reads this while it is imported, so it comes before the import.
if not torch.cuda.is_available():
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import sglang

MODEL = Path(__file__).resolve().parent.parent / "benchmarks" / "reasoner" / "model"
PROGRAMS = (
    "t1=:2;t2=:3;t3=t1+t2;t4=t3?",
    "t34=:2;t35=:0;t36=:0;t37=t36+t36;t38=t37-t37;t39=t38+t36;t40=t39-t35;t41=t40+t40;t42=t41+t41;t43=t42+t34;"
    "t44=t43-t43;t45=t42+t44;t46=t45-t34;t47=t46+t40;t48=t47-t47;t49=t47+t48;t50=t40-t49;t51=t50-t50;t52=t51-t51;"
    "t53=t38+t52;t54=t53?",
)


def main() -> None:
    engine = sglang.Engine(
        model_path=str(MODEL),
        kv_quant="pmkvq",
        pmkvq_pool_bytes="1MiB",  # 341 tokens of this model at 16 bits
        pmkvq_final_bits="4",
        context_length=1024,
        max_running_requests=2,
        chunked_prefill_size=128,
    )
    try:
        prompts = [f"<|user|>{program}<|end|><|assistant|>" for program in PROGRAMS]
        answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 512})
        for program, answer in zip(PROGRAMS, answers, strict=True):
            print(f"{program}\n  {answer['text']}")
        # One entry per scheduler; the names are those of /server_info, see docs/metrics.md.
        pool = engine.get_server_info()["internal_states"][0]["pmkvq"]
        shrinks = ", ".join(f"{pair} {count}" for pair, count in pool["shrinks"].items() if count)
        print(f"pool: {pool['storage_bytes']} bytes for {pool['logical_tokens']} tokens")
        print(f"pages shrunk (bits): {shrinks}")
        print(f"bits per element of KV, mean over forwards: {pool['effective_bits_avg']:.1f}")
    finally:
        engine.shutdown()


# The guard is needed: the engine's processes import this file.
if __name__ == "__main__":
    main()
