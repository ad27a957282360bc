"""`gdn`: the process around experiments.run.main, which takes SIGINT from its first import on.

Python's own handler raises KeyboardInterrupt wherever the main thread is: in half an import, where extension modules
crash or report something else, or in a destructor or callback, which drop it.
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
    """SIGINT ends an import and the process with it; elsewhere it is a KeyboardInterrupt that is not lost."""
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable


def leave() -> typing.NoReturn:
    """The end of a process that was interrupted."""
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
