"""The timeline file: throttling, write errors, damaged files, and the picture drawn from it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_pmkvq.serving.request_bits import _AtEnd
from sglang_pmkvq.timeline import SCHEMA, SCHEMA_KEY, TIER_KEYS, TimelineWriter, read_timeline
from sglang_pmkvq.tools.report import draw, format_bytes, summarize, write_report

MIB = 2**20


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(tick: int, blocks: tuple[int, int, int, int] = (4, 0, 0, 0), bits: float | None = 16.0) -> dict[str, Any]:
    tiers = {key: count * MIB for key, count in zip(TIER_KEYS, blocks, strict=True)}
    return {
        "tick": tick,
        "bytes": tiers,
        "arena_bytes": 8 * MIB,
        "used_bytes": sum(tiers.values()),
        "effective_bits": bits,
        "pages_mapped": 7,
        "running": tick % 5,
        "shrinks": 2 * tick,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_header_rows_and_events_come_back(tmp_path: Path) -> None:
    clock = Clock()
    writer = TimelineWriter(tmp_path / "t", {"model": "m"}, max_rows_per_s=1, clock=clock)
    writer.record(row(1))
    clock.now += 2.5
    writer.event("retract", requests=np.int64(3))
    writer.record(row(2, (0, 0, 0, 1), bits=np.float32(2.25)))
    writer.close()
    timeline = read_timeline(tmp_path / "t")
    assert timeline.header["model"] == "m"
    assert [(r["t"], r["tick"]) for r in timeline.rows] == [(0.0, 1), (2.5, 2)]
    assert timeline.rows[1]["bytes"] == {"16": 0, "8": 0, "4": 0, "2": MIB}
    assert timeline.rows[1]["effective_bits"] == 2.25
    assert timeline.events == [{"t": 2.5, "event": "retract", "count": 1, "requests": 3}]


def test_rows_are_throttled_and_the_last_is_kept(tmp_path: Path) -> None:
    clock = Clock()
    writer = TimelineWriter(tmp_path / "t", {}, max_rows_per_s=10, clock=clock)
    for tick in range(1000):  # 10 s of forwards, 10 ms each
        writer.record(row(tick))
        clock.now += 0.01
    writer.close()
    ticks = [r["tick"] for r in read_timeline(tmp_path / "t").rows]
    assert 90 <= len(ticks) <= 101
    assert ticks[0] == 0
    assert ticks[-1] == 999
    assert ticks == sorted(ticks)


def test_events_of_one_name_are_counted_within_an_interval(tmp_path: Path) -> None:
    clock = Clock()
    writer = TimelineWriter(tmp_path / "t", {}, max_rows_per_s=10, clock=clock)
    writer.record(row(0))
    for _ in range(50):
        writer.event("evict", pages=4, reason="logical")
        clock.now += 0.001
    writer.event("flush")
    writer.close()
    events = read_timeline(tmp_path / "t").events
    evicts = [e for e in events if e["event"] == "evict"]
    assert [e["count"] for e in evicts] == [1, 49]
    assert sum(e["pages"] for e in evicts) == 200
    assert evicts[1]["reason"] == "logical"
    assert [e["count"] for e in events if e["event"] == "flush"] == [1]


def test_every_line_reaches_the_file_at_once(tmp_path: Path) -> None:
    """A scheduler that is killed leaves everything up to its last written row."""
    writer = TimelineWriter(tmp_path / "t", {})
    writer.record(row(1))
    assert [entry.get("tick") for entry in lines(tmp_path / "t")] == [None, 1]
    writer.close()


def test_full_disk_is_reported_once_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        writer = TimelineWriter("/dev/full", {})
        for tick in range(20):
            writer.record(row(tick))
            writer.event("retract")
        writer.flush()
        writer.close()
    assert writer.failed
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert "serving goes on" in caplog.text


def test_full_disk_with_buffering(caplog: pytest.LogCaptureFixture) -> None:
    """The error may come only when Python's buffer is written, at the end."""
    clock = Clock()
    with caplog.at_level(logging.ERROR):
        writer = TimelineWriter("/dev/full", {}, flush_every_s=3600, clock=clock)
        writer.record(row(1))
        writer.close()
        writer.close()
    assert len(caplog.records) == 1


def test_a_value_that_is_no_json_stops_writing_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = TimelineWriter(tmp_path / "t", {})
    writer.event("odd", what=object())
    writer.record(row(1))
    assert writer.failed
    assert len(caplog.records) == 1


def test_unwritable_path_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TimelineWriter(tmp_path / "absent" / "t", {})
    with pytest.raises(ValueError, match="max_rows_per_s > 0"):
        TimelineWriter(tmp_path / "t", {}, max_rows_per_s=0)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    clock = Clock()
    writer = TimelineWriter(tmp_path / "run.jsonl", {"model": "a/b", "final_bits": "2"}, clock=clock)
    writer.record(row(0, (0, 0, 0, 0), bits=None))
    for tick, (blocks, bits) in enumerate(
        [((4, 0, 0, 0), 16.0), ((4, 3, 0, 0), 12.0), ((2, 2, 2, 1), 6.0), ((1, 1, 1, 1), 4.0)], start=1
    ):
        clock.now += 1.0
        writer.record(row(tick, blocks, bits))
    writer.event("retract", requests=2)
    clock.now += 1.0
    writer.event("retract", requests=2)
    writer.close()
    return tmp_path / "run.jsonl"


def test_a_file_of_schema_1_reads_alike(tmp_path: Path) -> None:
    """It said ``pool_bytes`` for what rows call ``arena_bytes`` and the header ``storage_bytes``."""
    clock = Clock()
    writer = TimelineWriter(tmp_path / "new", {"model": "m", "storage_bytes": 9 * MIB}, clock=clock)
    for tick, blocks in enumerate([(4, 0, 0, 0), (1, 2, 3, 0)]):
        writer.record(row(tick, blocks))
        clock.now += 1.0
    writer.event("retract", requests=2)
    writer.close()
    header, *entries = lines(tmp_path / "new")
    assert header[SCHEMA_KEY] == SCHEMA == 2
    assert [entry["arena_bytes"] for entry in entries[:2]] == [8 * MIB] * 2

    def renamed(entry: dict[str, Any]) -> dict[str, Any]:
        return {"pool_bytes" if key in ("arena_bytes", "storage_bytes") else key: x for key, x in entry.items()}

    old = [{**renamed(header), SCHEMA_KEY: 1}, *map(renamed, entries)]
    (tmp_path / "old").write_text("".join(json.dumps(entry) + "\n" for entry in old))
    now, then = read_timeline(tmp_path / "new"), read_timeline(tmp_path / "old")
    assert then.rows == now.rows and len(then.rows) == 2
    assert then.events == now.events and then.events
    assert {**then.header, SCHEMA_KEY: SCHEMA} == now.header
    assert summarize(then) == summarize(now)
    mixed = [{**header, SCHEMA_KEY: SCHEMA}, *map(renamed, entries)]
    (tmp_path / "mixed").write_text("".join(json.dumps(entry) + "\n" for entry in mixed))
    with pytest.raises(ValueError, match=r"mixed:2: neither a row nor an event"):
        read_timeline(tmp_path / "mixed")


def test_last_line_cut_short_is_left_out_at_any_byte(recorded: Path) -> None:
    """Wherever a kill cuts the last line, the rest is read, and the cut never makes a wrong row."""
    whole = recorded.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    everything = read_timeline(recorded)
    for cut in range(start, len(whole) - 1):
        recorded.write_bytes(whole[:cut])
        timeline = read_timeline(recorded)
        assert timeline.rows == everything.rows
        assert timeline.events == everything.events[:-1]


def test_damage_before_the_end_names_the_line(recorded: Path) -> None:
    parts = recorded.read_bytes().split(b"\n")
    parts[2] = parts[2][:20]
    recorded.write_bytes(b"\n".join(parts))
    with pytest.raises(ValueError, match=r"run\.jsonl:3: neither a row nor an event"):
        read_timeline(recorded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a timeline"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not a timeline"),
        (b'{"a": 1}\n', "not a timeline"),
        (b"[1, 2]\n", "not a timeline"),
        (b'{"pmkvq_timeline": 99}\n', "expected timeline schema 1 or 2, got 99"),
        (b'{"pmkvq_timeline": 2}\n', "no rows"),
        (b'{"pmkvq_timeline": 1}\n', "no rows"),
        (b'{"pmkvq_timeline": 2}\n{"t": 1, "bytes": {"16": 1}}\n', "neither a row nor an event"),
        (b'{"pmkvq_timeline": 1}\n{"t": 1, "bytes": {"16": 1}}\n', "neither a row nor an event"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_timeline(tmp_path / "x")


def test_summary_figures(recorded: Path) -> None:
    summary = summarize(read_timeline(recorded))
    assert summary.seconds == 4.0
    assert summary.rows == 5
    assert summary.arena_bytes == 8 * MIB
    assert summary.peak_block_bytes == 7 * MIB
    assert summary.effective_bits_min == 4.0
    # Rows at 16, 12 and 6 bits hold one second each; the last has no width, the empty pool no bits.
    assert summary.effective_bits_avg == pytest.approx((16 + 12 + 6) / 3)
    assert summary.shrinks == 8
    assert summary.peak_running == 4
    assert summary.events == {"retract": 2}


def test_picture_shows_tiers_pool_bits_and_events(recorded: Path) -> None:
    figure = draw(read_timeline(recorded))
    blocks, bits, events = figure.axes
    legend = blocks.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["16 bits", "8 bits", "4 bits", "2 bits", "pool"]
    top = max(path.vertices[:, 1].max() for area in blocks.collections for path in area.get_paths())
    assert top == pytest.approx(7.0)  # MiB, the highest stack
    assert blocks.get_ylim()[1] > 8.0  # the pool line is inside
    drawn = np.asarray(bits.lines[0].get_ydata(), dtype=float)
    assert np.isnan(drawn[0])
    assert drawn[1:].tolist() == [16.0, 12.0, 6.0, 4.0]
    assert [label.get_text() for label in events.get_yticklabels()] == ["retract"]
    assert list(np.asarray(events.lines[0].get_xdata(), dtype=float)) == [4.0, 5.0]
    assert blocks.get_xlim() == (0.0, 5.0)


def test_subtitle_names_what_the_flags_resolved_to(tmp_path: Path) -> None:
    groups = [{"layers": [0], "k_final": 8, "v_final": 8}, {"layers": [1], "k_final": 4, "v_final": 2}]
    header = {"groups": groups, "policy": "age", "window": 128, "logical_tokens": 4544}
    writer = TimelineWriter(tmp_path / "t", header)
    writer.record(row(1))
    writer.close()
    (subtitle,) = [text.get_text() for text in draw(read_timeline(tmp_path / "t")).axes[0].texts]
    assert subtitle == "final bits k8v8+k4v2  ·  policy age  ·  window 128 tokens  ·  4,544 logical tokens"


def test_tiers_that_never_occur_are_not_in_the_legend(tmp_path: Path) -> None:
    writer = TimelineWriter(tmp_path / "t", {})
    writer.record(row(1))
    writer.close()
    figure = draw(read_timeline(tmp_path / "t"))
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["16 bits", "pool"]
    assert len(figure.axes) == 2  # no events, no panel


def test_report_writes_a_png_beside_the_file(recorded: Path) -> None:
    path, summary = write_report(str(recorded))
    assert path == str(recorded.with_suffix(".png"))
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert "peak blocks     7.00 MiB (88 %)" in summary.text()
    assert "events          2 retract" in summary.text()


def test_report_does_not_overwrite_the_timeline(recorded: Path) -> None:
    before = recorded.read_bytes()
    with pytest.raises(ValueError, match="would overwrite"):
        write_report(str(recorded), str(recorded))
    assert recorded.read_bytes() == before


def test_report_of_very_many_rows_keeps_the_last(tmp_path: Path) -> None:
    path = tmp_path / "long"
    with open(path, "w") as file:
        file.write(json.dumps({SCHEMA_KEY: SCHEMA}) + "\n")
        for tick in range(20_000):
            file.write(json.dumps({"t": tick / 10, **row(tick)}) + "\n")
    figure = draw(read_timeline(path))
    x = np.asarray(figure.axes[1].lines[0].get_xdata(), dtype=float)
    assert len(x) <= 4000
    assert x[-1] == 1999.9


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1.5 * 2**30, "1.50 GiB"), (2**40, "1.00 TiB")],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_a_value_of_the_whole_request_survives_any_slice_of_the_tokens() -> None:
    """SGLang slices what it sends, and clients of increments are shown ``list[tokens seen:]``."""
    whole = _AtEnd({"lowest": 4}, padded=False)
    assert whole[0:70] == whole[50:70] == whole[:] == [{"lowest": 4}]
    increments = _AtEnd({"lowest": 4}, padded=True)
    assert increments[50:70][50:] == [{"lowest": 4}]
    assert increments[0:70] == [{"lowest": 4}]
    assert increments[0] == {"lowest": 4}
