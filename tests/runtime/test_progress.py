"""Lines in a log file: soon, then often enough whatever the work is busy with, and none where nobody asked for a log.
"""

import logging
import subprocess
import sys
import time

import numpy as np
import pytest

from sgpt.runtime import progress
from sgpt.runtime.embed import embed_blocks


@pytest.fixture
def quick(monkeypatch, caplog) -> pytest.LogCaptureFixture:
    """The same in less time: work is told of after 0.1 seconds, and every 0.5."""
    caplog.set_level(logging.INFO, logger="sgpt")
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.1)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.5)
    monkeypatch.setattr(progress, "_last_line", 0.0)
    return caplog


def test_work_that_reports_nothing_is_told_of_at_once_and_then_often_enough(quick):
    started = time.time()
    with progress.progress_bar("encoding 10 texts", 10):
        time.sleep(1.9)
    times = [record.created - started for record in quick.records]
    assert times[0] < 0.4
    assert all(later - earlier < 0.9 for earlier, later in zip(times, [*times[1:], 1.9], strict=True))
    assert 3 <= len(times) <= 5  # and no oftener
    assert quick.messages[0] == "encoding 10 texts, 0:00 so far"


def test_a_line_says_what_share_is_done_and_how_long_the_rest_takes(monkeypatch):
    work = progress.Work("tokenising", total=200)
    work.started = 1000.0  # a sum with a whole number does not round
    work.done = 50
    monkeypatch.setattr(time, "monotonic", lambda: work.started + 100)
    assert work.line() == "tokenising: 25%, about 5:00 left"  # a quarter took 100 seconds
    work.done = 250  # who reports too much
    assert work.line() == "tokenising: 100%, about 0:00 left"


def test_what_an_earlier_start_did_took_no_time_of_this_one(monkeypatch):
    work = progress.Work("training", total=200, done_before=90)
    work.started = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: work.started + 100)
    assert work.line() == "training, 1:40 so far"
    work.done = 100
    assert work.line() == "training: 50%, about 16:40 left"  # ten steps took 100 seconds, and a hundred are left


def test_work_inside_of_work_is_one_line(quick):
    with progress.log_progress("evaluating on toy"), progress.progress_bar("encoding 4 texts", 4) as advance:
        advance(2)
        time.sleep(0.3)
    assert quick.messages == ["evaluating on toy, 0:00 so far; encoding 4 texts: 50%, about 0:00 left"]


def test_a_large_block_reports_while_it_is_made(quick):
    def embed(rows: slice, advance: progress.Advance) -> np.ndarray:
        advance(2)
        if rows.start:
            time.sleep(0.3)
        advance(2)
        return np.zeros((4, 1), dtype=np.float32)

    embed_blocks(embed, lambda block, rows, embeddings: None, [0, 1], 4, "encoding 8 documents", alone=True)
    assert quick.messages == ["encoding 8 documents: 75%, about 0:00 left"]


def test_short_blocks_of_one_job_do_not_fill_the_log(quick):
    with progress.log_progress("mining"):
        for _ in range(8):
            with progress.progress_bar("encoding 4,096 texts", 4096):
                time.sleep(0.1)
    assert 1 <= len(quick.messages) <= 4


def test_what_was_said_otherwise_counts(quick):
    with progress.log_progress("training"):
        for _ in range(10):
            progress.note_line_written()
            time.sleep(0.06)
    assert quick.messages == []


def test_other_processes_are_silent(quick, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress.progress_bar("encoding 10 texts", 10):
        time.sleep(0.15)
    assert quick.messages == []


@pytest.mark.parametrize("wanted", [None, False])
def test_a_program_that_set_up_no_log_sees_nothing(wanted):
    program = f"""
import time
from sgpt.runtime import progress
progress.PATIENCE_SECONDS = progress.FIRST_LINE_SECONDS = progress.LINE_EVERY_SECONDS = 0.02
with progress.progress_bar("encoding", 10, {wanted}) as advance:
    advance(1)
    time.sleep(0.2)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_a_terminal_has_bars_and_no_lines(quick, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.log_progress("evaluating on toy"), progress.progress_bar("encoding 10 texts", 10) as advance:
        for _ in range(4):
            advance(1)
            time.sleep(0.05)
    assert quick.messages == []


def test_works_one_after_the_other_have_one_writer(quick):
    for _ in range(20):
        with progress.log_progress("short"):
            time.sleep(0.001)
    with progress.progress_bar("encoding 10 texts", 10):
        time.sleep(0.3)
    assert len(quick.messages) == 1


def test_what_has_no_end_gets_no_lines(quick):
    """A server: what it was part of is told of again afterwards."""
    with progress.log_progress("serve"):
        with progress.no_progress():
            time.sleep(0.8)
        assert quick.messages == []
        with progress.progress_bar("encoding 4 texts", 4):
            time.sleep(0.3)
    assert {message.split(",")[0] for message in quick.messages} == {"serve"}
