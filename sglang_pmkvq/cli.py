"""The ``pmkvq`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from sglang_pmkvq import __version__


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

    report = commands.add_parser("report", help="draw a file written by --pmkvq-timeline")
    report.add_argument("file", help="the timeline, JSON lines")
    report.add_argument("--out", metavar="PICTURE", help="PNG, SVG or PDF (default: FILE with .png)")
    report.set_defaults(run=_report)

    demo = commands.add_parser(
        "serve-demo",
        help="an SGLang server with a small mixed-precision pool, and requests to paste",
        description="Arguments after -- go to sglang.launch_server as they are.",
    )
    demo.add_argument("--model", help="model folder (default: the reasoning model of the repository)")
    demo.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    demo.add_argument("--port", type=int, default=30000, help="default %(default)s")
    demo.add_argument("--pool-bytes", metavar="SIZE", help="default: 16-bit KV of little more than one example problem")
    demo.set_defaults(run=_serve_demo)
    return parser


def _doctor(args: argparse.Namespace, extra: list[str]) -> int:
    from sglang_pmkvq.doctor import diagnose

    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_json(), indent=2) if args.json else diagnosis.text())
    return 0 if diagnosis.usable else 1


def _report(args: argparse.Namespace, extra: list[str]) -> int:
    from sglang_pmkvq.report import write_report

    path, summary = write_report(args.file, args.out)
    print(summary.text())
    print(f"picture         {path}")
    return 0


def _serve_demo(args: argparse.Namespace, extra: list[str]) -> int:
    from sglang_pmkvq.demo import serve_demo

    return serve_demo(args.model, args.host, args.port, args.pool_bytes, extra)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it succeeded, 1 if it found a problem, 2 for wrong arguments or files.
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
    except (OSError, ValueError) as error:
        print(f"pmkvq {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
