"""Trains the reasoner from nothing on a CPU: ``pmkvq bench reasoner``.

Writes ``train_log.jsonl`` beside this file and, every few minutes, a checkpoint (under ``--work``; the
same command resumes from it) and the exported model (bfloat16, Hugging Face layout, in ``model/``).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast as Tokenizer

from benchmarks.reasoner import task
from benchmarks.reasoner.evaluate import Quantizer, whole_chain_right
from benchmarks.reasoner.model import Config, Llama, initialize
from benchmarks.reasoner.tokenizer import ASSISTANT, END, USER, build, save

HERE = Path(__file__).parent

LINES = 130
WARMUP = 100
PEAK_RATE = 2e-3


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, up to step ``end``.

    Attributes:
        horizon: the cosine decay and the curriculum are those of a run of this many steps; 0: linear decay.
        ramp: share of ``horizon`` at which programs are longest (cosine phases).
        start_rate: learning rate that a linear phase starts from; it ends at 0.
    """

    end: int
    horizon: int = 0
    ramp: float = 0.0
    start_rate: float = 0.0


# The shipped weights' run: planned for 3,000 steps, shortened at 1,290 when short chains were right, and
# continued twice at full length from a higher rate, which is what removed the last wrong lookups.
PHASES = (
    Phase(1290, horizon=3000, ramp=0.65),
    Phase(2200, horizon=2200, ramp=0.62),
    Phase(2500, start_rate=4e-4),
    Phase(2950, start_rate=8e-4),
)
STEPS = PHASES[-1].end
# Share of a cosine phase's horizon before programs grow.
SHORT = 0.1


def encode(tokenizer: Tokenizer, problems: Sequence[task.Problem]) -> list[tuple[list[int], list[int]]]:
    """For each problem its prompt tokens (template included) and chain tokens (end included)."""
    prompts = tokenizer([f"{USER}{p.prompt}{END}{ASSISTANT}" for p in problems])["input_ids"]
    chains = tokenizer([p.chain + END for p in problems])["input_ids"]
    return list(zip(prompts, chains, strict=True))


def phase_of(step: int) -> tuple[Phase, int]:
    """The phase that ``step`` belongs to and the step at which it starts."""
    start = 0
    for phase in PHASES:
        if step < phase.end:
            break
        start = phase.end
    return phase, start


def longest(step: int) -> int:
    """Curriculum: the largest number of lines at this step."""
    phase, _ = phase_of(step)
    if not phase.horizon:
        return LINES
    reach = min(1.0, max(0.0, (step / phase.horizon - SHORT) / (phase.ramp - SHORT)))
    return round(8 + (LINES - 8) * reach)


def batch_shape(step: int, seed: int, batch_tokens: int) -> tuple[random.Random, int, int, int]:
    """The generator of step ``step`` (advanced), and its batch's program lines, constants and problems."""
    rng = random.Random(seed * 10**6 + step)
    top = longest(step)
    # Mostly long programs, but never only: short ones keep every decision of a chain well trained.
    low = 3 if rng.random() < 0.3 else max(3, top // 2)
    lines = rng.randint(low, top)
    constants = min(lines - 1, 3 + sum(rng.random() < 1 / 16 for _ in range(lines - 3)))
    return rng, lines, constants, max(1, round(batch_tokens / (15 * lines + 10)))


def batches(args: argparse.Namespace, start: int) -> Iterator[tuple[Tensor, int]]:
    """Batches ``(tokens [B, T], prompt length)`` from step ``start`` on; all rows equally long.

    Batch ``s`` depends on ``s`` and the seed alone, so a resumed run sees what an unbroken one would.
    """
    tokenizer = build()
    for step in range(start, args.steps):
        rng, lines, constants, count = batch_shape(step, args.seed, args.batch_tokens)
        base = rng.randrange(task.EVAL_SEED_START - count)
        rows = encode(tokenizer, [task.make_problem(base + i, lines, constants) for i in range(count)])
        yield torch.tensor([prompt + chain for prompt, chain in rows]), len(rows[0][0])


def rate(step: int) -> float:
    """Learning rate: linear warm-up, cosine to 3 %, then the linear phases down to 0."""
    phase, start = phase_of(step)
    if not phase.horizon:
        return phase.start_rate * (phase.end - step) / (phase.end - start)
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    share = (step - WARMUP) / (phase.horizon - WARMUP)
    return PEAK_RATE * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))


def export(model: Llama, directory: Path) -> None:
    """Write config, bfloat16 weights, tokenizer and generation config in Hugging Face layout."""
    tokenizer = build()
    save(tokenizer, directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.config),
        # transformers 5 reads rope_parameters, transformers 4 the plain rope_theta above.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "bfloat16",
    }
    generation = {name: config[name] for name in ("eos_token_id", "pad_token_id")} | {"do_sample": False}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: value.detach().bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, resume, log, export."""
    parser = argparse.ArgumentParser(prog="pmkvq bench reasoner", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"stop earlier than after {STEPS}")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per step, about")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--work", type=Path, default=Path("results/tmp/reasoner"))
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--log", type=Path, default=HERE / "train_log.jsonl")
    args = parser.parse_args(argv)
    if not 1 <= args.steps <= STEPS:
        parser.error(f"--steps must be in 1..{STEPS}, got {args.steps}")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = Llama(Config())
    initialize(model, args.seed)
    decays = {2: 0.01, 1: 0.0}  # of matrices and of scales
    groups = [{"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": w} for n, w in decays.items()]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = args.work / "checkpoint.pt"
    step, tokens_seen, seconds = 0, 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens_seen, seconds = state["step"], state["tokens"], state["seconds"]
    else:
        args.log.write_text("")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {step}")

    tokenizer = build()
    began = last_save = time.monotonic()
    window: list[tuple[float, float]] = []
    bar = tqdm(total=args.steps, initial=step, mininterval=5)
    for tokens, prompt_length in batches(args, step):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        target = tokens[:, prompt_length:]
        hidden = model.hidden(tokens[:, :-1])[:, prompt_length - 1 :]
        logits = model.lm_head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            window.append((loss.item(), (logits.argmax(-1) == target).float().mean().item()))
        step += 1
        tokens_seen += tokens.numel()
        bar.update()
        now = time.monotonic()
        if step % 25 == 0:
            loss_mean, right = np.mean(window, axis=0)
            window.clear()
            record = {
                "step": step,
                "tokens": tokens_seen,
                "seconds": round(seconds + now - began, 1),
                "lines": longest(step),
                "lr": round(rate(step), 7),
                "loss": round(float(loss_mean), 5),
                "next_token": round(float(right), 5),
                "grad_norm": round(float(norm), 3),
                "threads": args.threads,
            }
            if step % 250 == 0:
                sizes = {f"chain_{n}": [task.eval_problem(i, n, n) for i in range(16)] for n in (8, 40, 100)}
                for name, problems in sizes.items():
                    whole = [whole_chain_right(model, *row, Quantizer()) for row in encode(tokenizer, problems)]
                    record[name] = sum(whole) / len(whole)
            with args.log.open("a") as log:
                log.write(json.dumps(record) + "\n")
            bar.set_postfix(loss=record["loss"], right=record["next_token"])
        if now - last_save > 60 * args.save_minutes or step == args.steps:
            last_save = now
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state | {"tokens": tokens_seen, "seconds": seconds + now - began}, checkpoint)
            export(model, args.out)
    bar.close()
    return 0
