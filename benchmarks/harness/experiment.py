"""The command line of an experiment: options, its result file, and its rows, one after the other."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from benchmarks.harness.methods import Method
from benchmarks.harness.results import ROOT, Key, Result, Results
from benchmarks.harness.servers import REASONER, Server, Unmeasurable, serve
from sglang_pmkvq.serving.config import parse_size

# Options that say how rows are shown.
SHOWN = ("title", "note", "timed", "baseline")


class Parser(argparse.ArgumentParser):
    """Reports wrong options as ValueError, so that they end like all others: with one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@dataclass(frozen=True)
class Job:
    """Rows that are measured together, on the same servers.

    Attributes:
        measure: yields the values of each of the given keys, in order; the keys are those that the file lacks.
        label: for the progress bar.
    """

    keys: Sequence[Key]
    measure: Callable[[Sequence[Key]], Iterator[dict[str, Any]]]
    label: str = ""

    @staticmethod
    def row(key: Key, measure: Callable[[], dict[str, Any]], label: str = "") -> Job:
        """One row by itself."""
        return Job([key], lambda keys: (measure() for _ in keys), label)


@dataclass(frozen=True)
class Experiment:
    """What ``pmkvq bench NAME`` runs.

    Attributes:
        name: as ``pmkvq bench`` takes it.
        about: of ``--help``.
        plan: all rows of the options. It refuses wrong options at once, by ValueError or OSError; the jobs may be made
            one after the other, from what the ones before have measured.
        table: a result as Markdown.
        arguments: adds the experiment's own options.
        methods: default of ``--methods``; None for an experiment that has no such option.
        out: default result file.
        free: options that decide no figure, so that a file may hold rows of several values.
        failed: whether the rows say that a check failed: exit status 1.
    """

    name: str
    about: str
    plan: Callable[[argparse.Namespace, Results], Iterable[Job]]
    table: Callable[[Result], str]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    methods: str | None = None
    out: str | None = None
    free: tuple[str, ...] = ()
    failed: Callable[[Result], bool] = lambda result: False

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Options of the command.

        Raises:
            ValueError: one is wrong.
        """
        raw = argparse.RawDescriptionHelpFormatter
        parser = Parser(prog=f"pmkvq bench {self.name}", description=self.about, formatter_class=raw)
        parser.add_argument("--model", type=Path, default=REASONER, help="model folder (default: the bundled reasoner)")
        if self.methods is not None:
            listed = "default %(default)s; see docs/benchmarks.md"
            parser.add_argument("--methods", default=self.methods, help=listed)
        out = Path(self.out) if self.out else None
        parser.add_argument("--out", type=Path, default=out, help="result file, default %(default)s; a run goes on")
        parser.add_argument("--title", help="heading of a new file on the page")
        parser.add_argument("--note", help="a sentence under that heading")
        self.arguments(parser)
        return parser.parse_args(argv)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Measure the rows that the file lacks, and print all of them.

        Returns:
            0; 1 if a check failed or no row can be measured here; 2 for wrong options.
        """
        try:
            options = self.parse(argv)
            page = {name: value for name in SHOWN if (value := getattr(options, name, None))}
            results = Results(options.out, self.name, config(options, self.free), argv, page)
            jobs = self.plan(options, results)
            results.save()
        except (OSError, ValueError) as error:
            print(f"pmkvq bench {self.name}: {error}", file=sys.stderr)
            return 2
        try:
            measure(results, jobs)
        except Unmeasurable as error:
            print(f"pmkvq bench {self.name}: {error.reason}", file=sys.stderr)
            return 1
        result = {**results.head, **page, "rows": results.rows}
        print(self.table(result))
        return int(self.failed(result))


def measure(results: Results, jobs: Iterable[Job]) -> None:
    """Measure what the file lacks, then sort it as planned."""
    keys: list[Key] = []
    with tqdm(unit="row", disable=None) as bar:
        for job in jobs:
            keys += job.keys
            bar.set_description(job.label)
            with results.claim(job.keys) as left:
                bar.update(len(job.keys) - len(left))
                try:
                    with closing(job.measure(left)) if left else nullcontext(()) as rows:
                        for key, values in zip(left, rows, strict=True):
                            results.add(key, **values)
                            bar.update()
                except Unmeasurable as error:
                    for key in left:
                        if not results.has(key):
                            results.add(key, missing=error.reason)
    results.order(keys)


def config(options: argparse.Namespace, free: Sequence[str] = ()) -> dict[str, Any]:
    """The options that decide the figures, as JSON values; paths inside the repository relative to it."""
    return {
        name: str(value).removeprefix(f"{ROOT}/") if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("out", "methods", *SHOWN, *free)
    }


# -- options that several experiments have ------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive whole number")
    return int(text)


def numbers(parser: argparse.ArgumentParser, **options: tuple[int, str]) -> None:
    """Add options that take a whole number above zero: its default, and what it is."""
    for name, (default, told) in options.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=positive, default=default, help=f"{told}, default %(default)s")


def number_list(flag: str, text: str) -> list[int]:
    """Numbers of a comma-separated list.

    Raises:
        ValueError: one is not a positive whole number.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{flag} {text}: expected positive whole numbers such as 1,4,16")
    return list(map(int, parts))


def shell_words(text: str) -> str:
    """``text``, if a shell could split it; for argparse."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return text


def server_arguments(parser: argparse.ArgumentParser, chunk: int, pool: str = "") -> None:
    """Add options of every server; with ``pool``, ``--pool-bytes``: one number of bytes for all methods."""
    parser.add_argument("--seed", type=int, default=0)
    numbers(parser, chunk=(chunk, "--chunked-prefill-size of every server"))
    more = "further flags for every server, in one string, quoted as for a shell"
    parser.add_argument("--server-args", default="", type=shell_words, help=more)
    if pool:
        told = "KV bytes of every method, default %(default)s"
        parser.add_argument("--pool-bytes", dest="budget_bytes", default=pool, help=told)


def serve_method(
    options: argparse.Namespace, method: Method, budget: int | None, running: int, *more: str
) -> AbstractContextManager[Server]:
    """A server of that method with the flags of ``server_arguments``.

    Args:
        budget: bytes for KV, everything included; None: what the server takes by itself.
        running: ``--max-running-requests``.
        more: further flags.
    """
    args = method.server_args(options.model, budget, running, options.chunk)
    args += ["--random-seed", str(options.seed), *more, *shlex.split(options.server_args)]
    return serve(options.model, args, quant=method.quant)


def problem_arguments(parser: argparse.ArgumentParser, problems: int, lines: str = "64-128") -> None:
    """Add options that choose problems of the bundled task."""
    numbers(parser, problems=(problems, "how many"))
    parser.add_argument("--first", type=int, default=0, help="index of the first problem")
    parser.add_argument("--lines", default=lines, help="program lines of the bundled task, default %(default)s")


def budgets_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two ways to say how many bytes there are, several values each."""
    parser.add_argument("--share", default="", help="budget as a share of 16-bit bytes, several with commas")
    told = "budget of every method, such as 8GiB, several with commas"
    parser.add_argument("--pool-bytes", dest="budget_bytes", default="", help=told)


def budgets(options: argparse.Namespace, held_bytes: int) -> list[int]:
    """Bytes that the options of ``budgets_arguments`` name; shares are of ``held_bytes``.

    Raises:
        ValueError: neither ``--share`` nor ``--pool-bytes``, both, or a size that is none.
    """
    if bool(options.share) == bool(options.budget_bytes):
        raise ValueError("give either --share (of the 16-bit bytes of the running problems) or --pool-bytes")
    if options.budget_bytes:
        return [parse_size(text) for text in options.budget_bytes.split(",")]
    try:
        shares = [float(share) for share in options.share.split(",")]
    except ValueError as error:
        raise ValueError(f"--share {options.share}: expected numbers such as 0.22,0.35") from error
    if not all(0 < share <= 4 for share in shares):
        raise ValueError(f"--share {options.share}: expected numbers between 0 and 4")
    return [int(held_bytes * share) for share in shares]
