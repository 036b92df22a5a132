"""Progress bars: on a terminal, on the main process, and only for work that lasts longer than two seconds."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 2.0


@contextmanager
def progress_bar(title: str, total: float, wanted: bool | None = None) -> Iterator[Callable[[float], None]]:
    """Gives advance(amount). wanted: True always shows, False never, None when it is worth it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    visible = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" if wanted is None else wanted
    if not visible:
        yield lambda amount: None
        return
    from rich.console import Console

    bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True)
    task, started, shown = bar.add_task(title, total=total), time.monotonic(), False

    def advance(amount: float) -> None:
        nonlocal shown
        if not shown and (wanted or time.monotonic() - started > PATIENCE_SECONDS):
            bar.start()
            shown = True
        bar.update(task, advance=amount)

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
