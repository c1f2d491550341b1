"""Ending a run early and in order: signals, and the clock of `--max_train_time`.

The first signal is a request: the current update is finished, a checkpoint is written, and the command ends with
`support.errors.STOPPED_STATUS`. A second one ends it at once.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from ..support.errors import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
LONGEST_PUSH = 6.0  # seconds after a request until a push is given up
LONGEST_END = 4.0  # seconds that the process then takes to end, whatever its threads do
ONE_REQUEST = 2.0  # seconds in which signals count as one: launchers pass on what a terminal or Slurm sends to all


class StopRequest:
    """Whether the run shall end, and why. `max_minutes` are counted from `began`, a reading of time.monotonic."""

    def __init__(self, max_minutes: float | None, began: float):
        self.max_minutes, self.began = max_minutes, began
        self._signal: signal.Signals | None = None
        self._asked_at = 0.0
        self._patience = math.inf  # a reading of time.monotonic, until which `waits_for` does

    @property
    def reason(self) -> str | None:
        """What asked this process to stop; None if nothing did."""
        if self._signal is not None:
            return self._signal.name
        late = self.max_minutes is not None and time.monotonic() >= self.began + 60 * self.max_minutes
        return f"--max_train_time {self.max_minutes:g}" if late else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are requests. Earlier handlers are restored at the end. A hang-up that is ignored, as by `nohup`,
        still is.
        """
        heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()  # Python allows no other
        ignored = [each for each in heard if each.name == "SIGHUP" and signal.getsignal(each) == signal.SIG_IGN]
        before = {each: signal.signal(each, self._on_signal) for each in heard if each not in ignored}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._asked_at = signal.Signals(number), time.monotonic()
            what = "finishing this update and writing a checkpoint; a second signal ends at once"
            with contextlib.suppress(OSError):  # of a terminal that has gone, or a `tee` that Ctrl-C has ended
                os.write(2, f"\n{self._signal.name}: {what}\n".encode())  # print is unsafe: it may be what was interrupted
        elif time.monotonic() - self._asked_at > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def waits_for(self, future: Future, urgent: bool = False) -> bool:
        """Wait until it is done or, after a signal or if `urgent`, for LONGEST_PUSH; returns whether it is done. That
        `--max_train_time` is over does not matter for what follows the last update.
        """
        while not future.done() and time.monotonic() < self._patience:
            if urgent or self._signal is not None:
                self._patience = min(self._patience, time.monotonic() + LONGEST_PUSH)
            wait([future], timeout=0.1)
        return future.done()

    @contextlib.contextmanager
    def interrupts(self, network: torch.nn.Module) -> Iterator[None]:
        """Within, the next call of the network after a request raises Stopped: for long work that can be repeated."""

        def check(*_: object) -> None:
            if (reason := self.reason) is not None:
                raise Stopped(reason)

        hook = network.register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()


def in_background(function: Callable[..., Any], *arguments: Any) -> Future:
    """The function's result to come. Unlike a pool's, its thread does not keep the process from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def end_soon(status: int) -> None:
    """End this process with the status in LONGEST_END, if it does not end by itself: Python waits for the threads of libraries,
    which a connection that stalls may hold for minutes.
    """
    timer = threading.Timer(LONGEST_END, os._exit, (status,))
    timer.daemon = True
    timer.start()


def in_any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Each flag, true in all processes if it is true in one; a collective call if there are several."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(counts, "sum") > 0).tolist()


def ignore_signals_in_worker() -> None:
    """For data loader workers: the process that reads from them decides when to stop, and they end with it."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
