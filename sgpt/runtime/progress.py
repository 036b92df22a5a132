"""The progress of long work: bars on a terminal, plain lines in a log file, on the main process only.

A bar appears at the first progress after two seconds. Where the output is no terminal, a thread writes a line after two
seconds of new work, after ten where nothing was written yet, and after 30 seconds of silence; for this the work need
not report often.

A library that is imported stays quiet: lines come only where the log of `sgpt` is on, as it is in every script.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PATIENCE_SECONDS = 2.0
FIRST_LINE_SECONDS = 10.0  # of a script that has written nothing yet: it still imports, opens a model or reads
LINE_EVERY_SECONDS = 30.0
Advance = Callable[[float], object]  # is told how much more is done
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Work:
    """Work that takes a while. total: of whatever `done` counts, None when it is not known. done_before: by an earlier
    start, in no time of this one.
    """

    title: str
    total: float | None = None
    done_before: float = 0.0
    done: float = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.done = self.done_before

    def line(self) -> str:
        seconds = time.monotonic() - self.started
        now_done = self.done - self.done_before
        if not self.total or not now_done:
            return f"{self.title}, {clock(seconds)} so far"
        share = min(1.0, self.done / self.total)
        seconds_left = max(0.0, self.total - self.done) / now_done * seconds
        return f"{self.title}: {share:.0%}, about {clock(seconds_left)} left"


def start_log() -> None:
    """Scripts write the log of `sgpt` to stderr, the main process alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sgpt").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def announce(line: str) -> None:
    """The first line of a script, before anything slow: what will be done, and on what. How long it takes, the lines of
    `log_progress` say once it is known.
    """
    log.info("%s", line)
    note_line_written()


_under_way: list[Work] = []  # the outermost first
_writer: threading.Thread | None = None
_lock = threading.Lock()
_last_line = 0.0


def note_line_written() -> None:
    """Notes that a line was just written: the next one can wait."""
    global _last_line
    _last_line = time.monotonic()


@contextmanager
def log_progress(title: str, total: float | None = None, done_before: float = 0.0) -> Iterator[Work]:
    """Writes lines about this work into the log while it lasts, together with the work that it is part of."""
    global _writer
    work = Work(title, total, done_before)
    with _lock:
        _under_way.append(work)
        if _writer is None and not sys.stderr.isatty():
            _writer = threading.Thread(target=_write_lines, name="progress", daemon=True)
            _writer.start()
    try:
        yield work
    finally:
        with _lock:
            _under_way.remove(work)


@contextmanager
def no_progress() -> Iterator[None]:
    """No lines about the work under way while this lasts: a server has no end that it comes nearer to."""
    with _lock:
        hidden = list(_under_way)
        _under_way.clear()
    try:
        yield
    finally:
        with _lock:
            _under_way[:0] = hidden


def _write_lines() -> None:
    """Until nothing is under way. Wakes ten times in each interval, so that no work is kept waiting for this thread."""
    global _writer
    written: set[str] = set()  # titles
    while True:
        time.sleep(min(PATIENCE_SECONDS, LINE_EVERY_SECONDS) / 10)
        with _lock:
            if not _under_way:
                _writer = None
                return
            works = list(_under_way)
        now, newest = time.monotonic(), works[-1]
        is_new = newest.title not in written and newest.total is not None
        is_long = now - newest.started > PATIENCE_SECONDS
        no_line_yet = _last_line <= works[0].started
        allowed = min(FIRST_LINE_SECONDS, LINE_EVERY_SECONDS) if no_line_yet else LINE_EVERY_SECONDS
        silence = now - max(_last_line, works[0].started)
        if (is_new and is_long) or silence > allowed:
            written.add(newest.title)  # the blocks of one job get one line, and then one every 30 seconds
            note_line_written()
            log.info("%s", "; ".join(work.line() for work in works))


@contextmanager
def progress_bar(title: str, total: float, wanted: bool | Advance | None = None) -> Iterator[Advance]:
    """Yields advance(amount). wanted: True shows a bar, False nothing, None a bar or lines when the work is long; a
    function is what is yielded: the bar is that of the work this is a part of.
    """
    if callable(wanted):
        yield wanted
        return
    is_main, is_terminal = os.environ.get("RANK", "0") == "0", sys.stderr.isatty()
    if wanted or (wanted is None and is_main and is_terminal):
        with _bar(title, total, at_once=bool(wanted)) as advance:
            yield advance
    elif wanted is None and is_main and log.isEnabledFor(logging.INFO):
        with log_progress(title, total) as work:
            yield lambda amount: setattr(work, "done", work.done + amount)
    else:
        yield lambda amount: None


@contextmanager
def _bar(title: str, total: float, *, at_once: bool) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    percentage = TextColumn("{task.percentage:>3.0f} %")
    columns = TextColumn("{task.description}"), BarColumn(), percentage, TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, started = bar.add_task(title, total=total), time.monotonic()
    shown = False

    def advance(amount: float) -> None:
        nonlocal shown
        if not shown and (at_once or time.monotonic() - started > PATIENCE_SECONDS):
            bar.start()
            shown = True
        bar.update(task, advance=amount)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
