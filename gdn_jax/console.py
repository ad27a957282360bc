"""`gdn`: the process around experiments.run.main, which handles Ctrl-C (SIGINT) from its first import on.

Python's own handler raises KeyboardInterrupt wherever the main thread happens to be. In the middle of an import,
extension modules then crash or report another error; in a destructor or a callback the exception is lost.
"""

import os
import signal
import sys
import threading
import typing
from types import FrameType

STOPPED = "Stopped; what was finished before is kept."
CODE = 128 + signal.SIGINT
AGAIN_SECONDS = 0.05


def console() -> typing.NoReturn:
    """Runs a command and ends the process."""
    take_interrupts()
    from experiments.run import main

    code = main()
    if code == CODE:  # a thread may still compile, and crash when Python ends under it
        leave()
    sys.exit(code)


def take_interrupts() -> None:
    """Installs the handler: during an import SIGINT ends the process, elsewhere it raises KeyboardInterrupt."""
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable


def leave() -> typing.NoReturn:
    """Says that the command was stopped and ends the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(CODE)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            print(STOPPED, file=sys.__stderr__, flush=True)  # sys.stderr may be caught by who imports
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python dropped an exception; an interrupt comes again a moment later."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)
