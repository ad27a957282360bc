"""Measurements in processes of their own: each has the device's memory to itself, and its crash costs one row.

A worker is `python -m MODULE worker JOB PARENT_PID`: a job as JSON in, one row as JSON out, whatever libraries print.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Row = dict[str, Any]
T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it would otherwise end this process and leave the worker running."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Here SIGTERM raises Terminated."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def stop(*_: Any) -> typing.NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ask(module: str, job: Any, timeout: float, environment: Mapping[str, str] | None = None) -> dict[str, Any] | str:
    """The row that a worker of `module` answers to `job`, or how it failed, in words.

    `environment` is added to this process's own. Nothing in the current directory is taken for a module (-P).
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, "worker", json.dumps(job), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | dict(environment or {}),
        start_new_session=True,  # compilers that it starts go with it
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"failed: no result within {timeout} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    try:
        return json.loads(out)
    except json.JSONDecodeError:
        code = process.returncode
        end = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"failed: {end}, {(err.strip().splitlines() or ['without a word'])[-1]}"


def each(todo: Sequence[T], measure: Callable[[T], tuple[Row, str]], not_reached: Callable[[T], Row]) -> dict[str, Any]:
    """Measures one point after the other; measure(point) is its row and what to say of it, a line each to stderr.

    Returns {"rows", "stopped"}: `stopped` is the signal that ended the measuring or 0; points not reached then have the
    row not_reached(point).
    """
    rows: list[Row] = []
    stopped = 0
    try:
        with terminable():
            for point in todo:
                row, said = measure(point)
                rows.append(row)
                print(f"[{len(rows)}/{len(todo)}] {said}", file=sys.stderr, flush=True)
    except KeyboardInterrupt as stop:
        stopped = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    return {"rows": rows + [not_reached(point) for point in todo[len(rows) :]], "stopped": int(stopped)}


def answer(work: Callable[[Any], dict[str, Any]], module: str) -> None:
    """The worker's own main: `work` on the job in the command line, its row to stdout."""
    if len(sys.argv) != 4 or sys.argv[1] != "worker":
        sys.exit(f"usage: python -m {module} worker JOB PARENT_PID; for a benchmark: gdn bench")
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)  # what libraries print is no part of the answer
        stdout.write(json.dumps(work(json.loads(sys.argv[2]))) + "\n")


def _end_with(parent: int) -> None:
    """However the process that waits for the answer ends, this one does not keep the device."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
