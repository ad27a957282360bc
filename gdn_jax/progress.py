"""How long work shows its progress: a line that changes on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.live import Live

LINE_SECONDS = 10.0  # between plain lines of `show` where there is no terminal


class Progress:
    """Shows on stderr how far a piece of work has come; a context manager around the work.

    `show` gives the state of the work: it replaces the live line of a terminal, and elsewhere is a line of its own, at
    most one every `seconds`. `say` is a line that stays.

    seconds   0 where every state is to be kept, as the logged steps of a training run are
    live      False where the work itself writes to the terminal: `show` then keeps to its plain lines
    say       receives all lines instead of stderr; `lambda line: None` silences the work
    """

    def __init__(self, *, seconds: float = LINE_SECONDS, live: bool = True, say: Callable[[str], None] | None = None):
        console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._say = say or (lambda line: console.print(line, markup=False))
        terminal = live and say is None and console.is_terminal
        self._live = Live(console=console, transient=True, refresh_per_second=4) if terminal else None
        self._seconds, self._said, self._depth = seconds, time.monotonic(), 0
        self._shown, self._unsaid = False, ""  # whether a state was said; the newest one, if it came too soon after

    def __enter__(self) -> Self:
        self._depth += 1  # work that was handed a display that is open already enters it once more
        if self._live and self._depth == 1:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._live:
            self._live.stop()
        elif self._unsaid and kind is None:  # the last state, where earlier ones were said
            self._say(self._unsaid)
        self._shown, self._unsaid = False, ""

    def show(self, text: str) -> None:
        """The state of the work now."""
        if self._live:
            self._live.update(text)
        elif time.monotonic() - self._said >= self._seconds:
            self._said, self._shown, self._unsaid = time.monotonic(), True, ""
            self._say(text)
        elif self._shown:
            self._unsaid = text

    def say(self, text: str) -> None:
        """A line that stays."""
        self._say(text)


SILENT = Progress(say=lambda line: None)
