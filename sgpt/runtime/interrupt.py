"""Ctrl-C, SIGTERM and SIGUSR1: a training loop ends its step and saves it, anything else ends where it is.

A second press ends both at once. SIGUSR1 is what schedulers send some time before they take the machine away.

Files are written whole or not at all, and the part files of a job are cut back to their last whole line, so that work
may end anywhere; a loop that keeps its state in memory asks
`Stop.requested_anywhere` after each step. Exit codes are the shell's: 130 after Ctrl-C, 143 after SIGTERM, 138 after
SIGUSR1.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

SAME_PRESS_SECONDS = 1.5  # torchrun passes Ctrl-C on to processes that have had it from the terminal already
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")  # as a script, or as `python -m`
Result = TypeVar("Result")


class Interrupted(KeyboardInterrupt):
    """The work ended as asked, in good order. The text says what was saved."""


class _BrokenOff(KeyboardInterrupt):
    """Work of several processes ended on all of them, one of which was asked to."""


class _Asked:
    """Whether this process was asked to end, and how.

    signum: of the first signal, None before it. at: when it came, by the monotonic clock. lost: ranks that had ended by
    then, for which launchers end the others. waits: a step is to be finished first. command: as it was typed.
    stop: of the training loop under way.
    """

    signum: int | None = None
    at = 0.0
    lost: Sequence[int] = ()
    waits = False
    command: Sequence[str] = ()
    stop: "Stop | None" = None


_asked = _Asked()


@contextmanager
def handling_signals() -> Iterator[None]:
    """Signals are heard as above while this lasts. Only a main thread can listen; elsewhere nothing changes."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    if threading.current_thread() is not threading.main_thread() or _hear in handlers.values():
        yield
        return
    # A shell lets what a script starts in the background ignore Ctrl-C: that stays, and the others end it.
    heard = [signum for signum, handler in handlers.items() if handler != signal.SIG_IGN]
    before = {signum: signal.signal(signum, _hear) for signum in heard}
    _asked.signum, _asked.lost = None, ()
    _asked.command = typed_command()  # while the launcher is alive: it ends at a signal too
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside, signals end this process as if nobody had listened: for waiting in C++, where Python hears none of them
    until it is over, before there is anything to save.
    """
    heard = [signum for signum in SIGNALS if signal.getsignal(signum) is _hear]
    for signum in heard:
        signal.signal(signum, signal.SIG_DFL)
    try:
        yield
    finally:
        for signum in heard:
            signal.signal(signum, _hear)


def _hear(signum: int, frame: object) -> None:
    if _asked.signum is None:
        _asked.signum, _asked.at, _asked.lost = signum, time.monotonic(), _lost_processes()
        if not _asked.waits:
            raise KeyboardInterrupt
        _write("interrupted: the step under way is being finished and will be saved; Ctrl-C again ends at once")
    elif time.monotonic() - _asked.at > SAME_PRESS_SECONDS:
        _write("interrupted again: ended at once; what was saved before is kept")
        os._exit(exit_code())


def _write(sentence: str) -> None:
    """To stderr, not by print: the signal may have come in the middle of one."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{sentence}\n".encode())


def stop_requested() -> bool:
    return _asked.signum is not None


def lost_before() -> Sequence[int]:
    """Ranks of other processes of this machine that had ended before this one was asked to."""
    return _asked.lost


def _lost_processes() -> Sequence[int]:
    distributed = sys.modules.get("sgpt.runtime.distributed")  # which imports torch
    return distributed.lost_processes() if distributed else ()


def exit_code() -> int:
    return 128 + (_asked.signum or signal.SIGINT)


class Stop:
    """Whether a training loop is to end after its step. Of several processes all end when one was asked.

    They ask each other once a step, of a number in CPU memory: a few tens of microseconds between processes of one
    machine, and no GPU waits for it.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        from sgpt.runtime.distributed import world

        self.group = None
        if world()[1] > 1:
            self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def __enter__(self) -> "Stop":
        self._listening = handling_signals()
        self._listening.__enter__()
        _asked.waits = True
        _asked.stop = self
        return self

    def __exit__(self, *error) -> None:
        _asked.waits = False
        _asked.stop = None
        self._listening.__exit__(*error)

    def requested_anywhere(self) -> bool:
        """All processes call it at the same place, and get the same answer."""
        if self.group is None:
            return stop_requested()
        import torch
        import torch.distributed as dist

        asked = torch.tensor(int(stop_requested()))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        return bool(asked)

    def unless_requested(self, work: Callable[[], Result]) -> Result | None:
        """The result of `work`; None when the loop is to end, and `work`, which can be done again, was not finished.

        Of several processes none may leave the others waiting in it, so there it ends where it calls `break_off`.
        """
        try:
            _asked.waits = self.group is not None
            return None if self.requested_anywhere() else work()
        except _BrokenOff:
            return None
        except KeyboardInterrupt:
            if not stop_requested():
                raise  # of somebody else's handler
            return None
        finally:
            _asked.waits = True


def break_off() -> None:
    """Ends the work of `Stop.unless_requested` on all processes where one was asked to end; all call it."""
    if _asked.stop is not None and _asked.stop.requested_anywhere():
        raise _BrokenOff


@contextmanager
def interrupt_message(what: str) -> Iterator[None]:
    """Says what is kept when the work inside is interrupted."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise interrupt if isinstance(interrupt, Interrupted) else Interrupted(what) from None


def command_again(*, resume: bool) -> str:
    """The command that was typed, quoted for the shell. resume: with `resume=true` in it."""
    command = list(_asked.command or typed_command())
    if resume:
        command = [argument for argument in command if not argument.startswith("resume=")] + ["resume=true"]
    return shlex.join(command)


def typed_command() -> Sequence[str]:
    """This process's own command line, or that of the launcher that started it with the same script and arguments."""
    import psutil

    own = sys.orig_argv
    launcher = psutil.Process().parent()
    line = launcher.cmdline() if launcher else []
    same_arguments = line[-len(sys.argv) :] == own[-len(sys.argv) :]
    if not same_arguments or not any(Path(part).name.startswith(LAUNCHERS) for part in line[:4]):
        return own
    is_script = len(line) > 1 and os.path.isfile(line[1]) and os.access(line[1], os.X_OK)
    return line[1:] if is_script else line  # accelerate and torchrun are scripts with an interpreter before them
