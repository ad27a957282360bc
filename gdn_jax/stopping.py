"""Signals that ask a training run to stop: it finishes its step, saves and ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last one when a terminal closes


class Interrupted(Exception):
    """Asked to stop by a signal; everything up to `step` is saved."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, which is saved")
        self.step, self.signal = step, number


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGNALS add to: the loop stops after its step. A second SIGINT stops at once, others change nothing.

    What the process was started to ignore, as by nohup, it ignores.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may handle signals
        return

    def ask(number, _frame):
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not caught:
            os.write(2, b"Stopping: the step in hand is finished and saved first.\n")
        caught.append(number)

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heeded}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
