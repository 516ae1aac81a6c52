"""Every flag of ours with values that make no sense, through SGLang's own parser: one sentence that names flag,
value and what is allowed; and files that a flag must not touch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass
from sglang.srt.server_args import ServerArgs

from benchmarks.harness.results import ROOT
from benchmarks.harness.servers import REASONER
from sglang_pmkvq.formats import groups_from_finals
from sglang_pmkvq.ledger import PolicyConfig
from sglang_pmkvq.serving.config import PmkvqConfigError, check_flags, parse_final_bits, parse_size
from sglang_pmkvq.serving.server_args import PmkvqServerArgs
from sglang_pmkvq.serving.sizing import choose_geometry, limits_for, page_shape
from sglang_pmkvq.timeline import TimelineWriter, rank_path

CONTEXT = json.loads((REASONER / "config.json").read_text())["max_position_embeddings"]
HUGE = str(10**30)
NONSENSE = ("", "abc", "1e99GiB", "-1", "0x10", "4,", "nan", "\N{ROMAN NUMERAL FOUR}", HUGE)

# Flag: (values that must be refused, a word of what the message says is allowed).
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "--pmkvq-pool-bytes": (("0", "-1", "1e99GiB", "abc", "", "0MiB", "9" * 400, "5 XiB", "-5MiB", "inf"), "512MiB"),
    "--pmkvq-final-bits": ((*NONSENSE, "3", "k4", "k4v", "v4k4", "9" * 5000, "0-1:4", "0-9:4", "5-0:4"), "0-|16, 8"),
    "--pmkvq-window": ((*NONSENSE, "1.5", str(CONTEXT + 1)), "expected 0|int"),
    "--pmkvq-sink-tokens": ((*NONSENSE, "1.5", str(CONTEXT + 1)), "expected 0|int"),
    "--pmkvq-policy": (("0", "abc", "", "Age"), "uniform"),
    "--pmkvq-protect": (("0", "abc", "", "Hard"), "soft"),
    "--pmkvq-group-size": (("0", "-1", "abc", "48", "256", HUGE, ""), "32|int"),
    "--pmkvq-min-active-bits": (("0", "-1", "abc", "3", "32", HUGE, ""), "16|int"),
    "--pmkvq-key-transform": (("0", "abc", "", "scale", "Hadamard"), "hadamard"),
    "--pmkvq-key-center": (("0", "abc", "", "mean", "Bias"), "bias"),
    "--pmkvq-calibration": (("", "/nonexistent/x", "/dev/null", "."), "calibrat"),
    "--pmkvq-timeline": (("", "/nonexistent/x", ".", "/proc/version/x"), "expected a file"),
    "--kv-quant": (("0", "abc", "", "PMKVQ"), "none"),
}


def arguments(*line: str) -> PmkvqServerArgs:
    """``line`` as ``sglang.launch_server`` parses it; exits with argparse's message, or raises ours."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_cli_args_from_dataclass(parser, PmkvqServerArgs)
    common = ["--model-path", str(REASONER), "--device", "cpu", "--kv-quant", "pmkvq"]
    return PmkvqServerArgs.from_cli_args(parser.parse_args([*common, *line]))


def test_every_flag_of_ours_is_tried() -> None:
    names = {f.name for f in dataclasses.fields(PmkvqServerArgs)} - {f.name for f in dataclasses.fields(ServerArgs)}
    flags = {"--" + n.replace("_", "-") for n in names if not n.startswith("pmkvq_default")}
    assert flags - set(BAD) == {"--pmkvq-allow-untested-sglang"}  # takes no value


@pytest.mark.parametrize("flag", BAD)
def test_bad_values_name_flag_value_and_what_is_allowed(flag: str) -> None:
    values, allowed = BAD[flag]
    for value in values:
        with pytest.raises((PmkvqConfigError, argparse.ArgumentError)) as error:
            arguments(f"{flag}={value}")
        text = str(error.value)
        assert flag in text, (value, text)
        assert value in text, (value, text)
        assert "\n" not in text
        assert any(word in text for word in allowed.split("|")), (value, text)


def test_good_values_at_the_edges_are_taken(tmp_path: Path) -> None:
    """What the messages say is allowed is."""
    for line in (
        ("--pmkvq-window=0",),
        (f"--pmkvq-window={CONTEXT}",),
        ("--pmkvq-sink-tokens=0",),
        (f"--pmkvq-sink-tokens={CONTEXT}",),
        ("--context-length=64",),  # shorter than the default window
        ("--pmkvq-final-bits=0-5:2",),
        ("--pmkvq-group-size=128",),
        (f"--pmkvq-timeline={tmp_path / 'new'}",),
        ("--pmkvq-timeline=/dev/full",),
    ):
        assert arguments(*line).kv_quant == "pmkvq"


@given(text=st.text(max_size=24) | st.from_regex(r"[0-9.]{1,8} ?[kKmMgGtT]?i?[bB]?", fullmatch=True))
def test_any_text_as_a_size(text: str) -> None:
    try:
        assert 1 <= parse_size(text) < 1 << 62
    except PmkvqConfigError as error:
        assert f"--pmkvq-pool-bytes {text}" in str(error)  # noqa: PT017


@given(text=st.text(max_size=24) | st.from_regex(r"([0-9]{1,2}(-[0-9]{1,2})?:k?[0-9]v?[0-9]?,?){1,3}", fullmatch=True))
def test_any_text_as_final_bits(text: str) -> None:
    try:
        assert len(parse_final_bits(text, 6)) == 6
    except PmkvqConfigError as error:
        assert f"--pmkvq-final-bits {text}" in str(error)  # noqa: PT017


@given(
    window=st.integers(), sinks=st.integers(), group=st.none() | st.integers(), floor=st.integers(),
    policy=st.text(max_size=8), protect=st.text(max_size=8),
)  # fmt: skip
def test_any_numbers_in_our_flags(
    window: int, sinks: int, group: int | None, floor: int, policy: str, protect: str
) -> None:
    args = SimpleNamespace(
        pmkvq_pool_bytes=None, pmkvq_window=window, pmkvq_sink_tokens=sinks, pmkvq_policy=policy, pmkvq_timeline=None,
        pmkvq_protect=protect, pmkvq_min_active_bits=floor, pmkvq_group_size=group, pmkvq_final_bits=None,
        pmkvq_key_transform=None, pmkvq_key_center=None,
    )  # fmt: skip
    try:
        check_flags(args)
    except PmkvqConfigError as error:
        assert str(error).startswith("--pmkvq-")  # noqa: PT017


@pytest.mark.parametrize("budget", [1, 1000, 1 << 20])
def test_pool_smaller_than_one_request(budget: int) -> None:
    """Also when it is the window that does not fit: then the message names that flag too."""
    shape = page_shape(16, 1, 128, None)
    groups = groups_from_finals([(4, 4)] * 6)
    soft = PolicyConfig(window_tokens=128, sink_tokens=1, protect="soft")
    hard = PolicyConfig(window_tokens=4096, sink_tokens=1, protect="hard")
    for policy in (soft, hard):
        limits = limits_for(8, 256, 16, policy)
        with pytest.raises(PmkvqConfigError, match="--pmkvq-pool-bytes: .*the smallest pool that works is") as error:
            choose_geometry(shape, groups, budget, limits)
        assert ("--pmkvq-window" in str(error.value)) == (policy is hard)


# -- files ---------------------------------------------------------------------------------------------------


def test_timeline_does_not_follow_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "timeline"
    target.write_text("precious")
    link.symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        TimelineWriter(link, {})
    with pytest.raises(PmkvqConfigError, match="it is a link"):
        arguments(f"--pmkvq-timeline={link}")
    assert target.read_text() == "precious"


def test_timeline_does_not_empty_the_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "theirs"
    path.write_text("theirs")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        TimelineWriter(path, {})
    with pytest.raises(PmkvqConfigError, match="belongs to another user"):
        arguments(f"--pmkvq-timeline={path}")
    assert path.read_text() == "theirs"


def test_schedulers_do_not_share_a_timeline() -> None:
    assert rank_path("t", 0, None) == rank_path("t", 0, 0) == "t"
    assert rank_path("t", 1, None) is None
    assert rank_path("t", 0, 2) == "t.dp2"
    assert rank_path(None, 0, 1) is None


def limited(code: str, folder: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Python ``code`` in a process that cannot write a file beyond ``size`` bytes, as on a full disk.

    -B: or Python would leave compiled modules behind that are cut off at ``size``, and later imports would fail.
    """
    return subprocess.run(
        [sys.executable, "-B", "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),  # noqa: PLW1509
    )


def test_full_disk_leaves_no_part_of_a_calibration(tmp_path: Path) -> None:
    """An old file stays whole, and the command ends with one sentence."""
    code = (
        "import sys; from pathlib import Path; from sglang_pmkvq import artifact; from sglang_pmkvq.tools import cli\n"
        "from tests.test_artifact import example\n"
        "cli._inspect = lambda args, extra: artifact.save(example(), Path(args.file))\n"
        "sys.exit(cli.main(['inspect', sys.argv[1] + '/a.safetensors']))"
    )
    (tmp_path / "a.safetensors").write_text("old")
    done = limited(code, tmp_path, 1024)
    assert done.returncode == 2, done.stderr
    assert "a.safetensors could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.safetensors", "old")]


def test_full_disk_in_a_report(tmp_path: Path) -> None:
    writer = TimelineWriter(tmp_path / "t", {})
    for tick in range(3):
        tiers = {"16": 1 << 20, "8": 0, "4": 0, "2": 0}
        writer.record({"tick": tick, "bytes": tiers, "arena_bytes": 2 << 20, "used_bytes": 1 << 20})
    writer.close()
    code = (
        "import sys; from sglang_pmkvq.tools import cli\n"
        "sys.exit(cli.main(['report', sys.argv[1] + '/t', '--out', sys.argv[1] + '/t.png']))"
    )
    done = limited(code, tmp_path, 4096)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("pmkvq report: ")
    assert "Traceback" not in done.stderr
