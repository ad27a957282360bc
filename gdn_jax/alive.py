"""Which of several processes stopped giving signs of life: each writes one now and then, and reads the others'.

They go through the key-value store of jax.distributed, whose own heartbeats end a process with pages of C++ and do not
name the one that is gone; these stay behind ours, with twice the time. A stopped process (SIGSTOP, a frozen host) gives
no sign, nor does a lost one; the store itself (coordinator.py) ends with the host of process 0 alone.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax._src.distributed import global_state  # the client that jax.distributed.initialize made has no public name

from gdn_jax import distributed
from gdn_jax.errors import UserError
from gdn_jax.files import explained

KEY, VERDICT = "gdn_jax/alive/", "gdn_jax/ended"
DONE, REFUSED = "done", "refused "  # signs of a process that works no more; the latter with its sentence
STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
OF_ANOTHER = re.compile("gloo|nccl|connection|peer|heartbeat|coordination", re.IGNORECASE)


class Alive:
    """Ends this process once another has been silent for `seconds`; set `step` as training goes on.

    then    what another start of all processes does
    """

    def __init__(self, seconds: float, then: str):
        self.seconds, self.then = seconds, then
        self.step: int | None = None
        self._every = _every(seconds)
        self._index, self._count = jax.process_index(), jax.process_count()
        self._left, self._ended = threading.Event(), threading.Lock()
        self._heard = dict.fromkeys(range(self._count), time.monotonic())  # process -> when its sign last changed
        self._signs: dict[int, str] = {}

    def start(self) -> None:
        self._exchanging = threading.Thread(target=self._exchange, daemon=True)
        self._exchanging.start()
        threading.Thread(target=self._judge, daemon=True).start()

    def leave(self, sign: str = DONE) -> None:
        """The work is done: silence from now on means nothing."""
        self._left.set()
        self._exchanging.join(timeout=self._every)  # its sign must not come after this one
        with contextlib.suppress(RuntimeError):
            self._write(sign)

    def refuse(self, sentence: str) -> None:
        """This process cannot go on. Returns where all others have left too, of themselves; else ends it, and they end.

        An orderly end would wait for them, and they for this process.
        """
        self.leave(REFUSED + sentence)
        until = time.monotonic() + 4 * self._every + 2
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until:
                if sum(sign.startswith((DONE, REFUSED)) for sign in _signs().values()) == self._count:
                    return
                time.sleep(0.1)
        print(sentence, file=sys.stderr, flush=True)
        os._exit(2)

    def _write(self, sign: str) -> None:
        global_state.client.key_value_set(f"{KEY}{self._index}", sign, allow_overwrite=True)

    def _exchange(self) -> None:
        number = 0
        while not self._left.wait(self._every if number else 0):
            number += 1
            with contextlib.suppress(RuntimeError):  # process 0 does not answer: _judge sees it
                self._write(json.dumps([socket.gethostname(), self.step, number]))
                found = _signs()
                if sentence := dict(global_state.client.key_value_dir_get(VERDICT)).get(f"{VERDICT}/sentence"):
                    self._end(sentence)
                now = time.monotonic()
                for index, sign in found.items():
                    if sign != self._signs.get(index) or sign == DONE:
                        self._heard[index] = now
                    elif sign.startswith(REFUSED) and now - self._heard[index] > 2 * self._every:
                        self._end(f"Process {index} was refused: {sign.removeprefix(REFUSED)}")
                self._signs |= found
                self._heard[self._index] = now

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(1.0):
            now = time.monotonic()
            if now - looked > self.seconds / 2:  # this process was stopped itself
                self._heard = dict.fromkeys(self._heard, now)
            looked = now
            if now - self._heard[self._index] > self.seconds:  # nothing comes back from the store
                self._end(self._sentence(0, now))
            silent = [index for index, heard in self._heard.items() if now - heard > self.seconds]
            if silent:
                sentence = self._sentence(silent[0], now)
                with contextlib.suppress(RuntimeError):
                    global_state.client.key_value_set(f"{VERDICT}/sentence", sentence, allow_overwrite=True)
                self._end(sentence)

    def _sentence(self, index: int, now: float) -> str:
        who, step = _named(index, self._signs.get(index, DONE))
        return (
            f"{who} was last heard of {now - self._heard[index]:.0f} seconds ago{step}; end it, and start all again "
            f"with the same command: {self.then}."
        )

    def _end(self, sentence: str) -> None:
        """At once: an orderly end would wait for the process that is silent."""
        if self._left.is_set() or not self._ended.acquire(blocking=False):
            return
        print(sentence, file=sys.__stderr__, flush=True)  # sys.stderr may be held back: reading.silent
        os._exit(1)


@contextlib.contextmanager
def watched(seconds: float, then: str = distributed.GO_ON) -> Iterator[Alive]:
    """An Alive that works while several processes do, and nothing where there is one."""
    alive = Alive(seconds, then)
    if jax.process_count() > 1:
        alive.start()
    try:
        yield alive
    except (UserError, OSError) as error:
        if jax.process_count() > 1:
            alive.refuse(explained(error) if isinstance(error, OSError) else str(error))
        raise
    except (ValueError, RuntimeError) as error:
        end_if_left(error, then)
        raise
    finally:
        if jax.process_count() > 1:
            alive.leave()


def end_if_left(error: Exception, then: str = distributed.GO_ON) -> None:
    """Ends this process with one sentence where `error` means that another process is gone; else returns.

    It says which as soon as that can be known, and exits without jax's orderly shutdown, which would wait for the
    missing process and then abort.
    """
    text = str(error)
    if distributed.alone() or not (STATUS.match(text) and OF_ANOTHER.search(text)):
        return
    reason = text.partition("\n")[0][:120]
    who, step = _gone(distributed.silence(os.environ)) or ("Another process", "")
    last = f", last heard of{step[1:]}" if step else ""
    print(
        f"{who} has ended or cannot be reached{last} ({reason}); start all of them again with the same command: "
        f"{then}.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _gone(seconds: float) -> tuple[str, str] | None:
    """A process that gives no new sign while all others do."""
    with contextlib.suppress(RuntimeError):
        before = _signs()
        time.sleep(2 * _every(seconds) + 1)
        now = _signs()
        for index, sign in now.items():
            if sign == before.get(index) and not sign.startswith((DONE, REFUSED)):
                return _named(index, sign)
    return None


def _every(seconds: float) -> float:
    """Seconds between two signs."""
    return min(5.0, seconds / 10)


def _signs() -> dict[int, str]:
    """The last sign of each process that has begun."""
    return {int(key.rpartition("/")[2]): sign for key, sign in global_state.client.key_value_dir_get(KEY)}


def _named(index: int, sign: str) -> tuple[str, str]:
    """("Process 1 of 2 on node2", ", at step 12"), as much as its sign tells."""
    host, step = "", ""
    if not sign.startswith((DONE, REFUSED)):
        name, reached, _ = json.loads(sign)
        host, step = f" on {name}", "" if reached is None else f", at step {reached}"
    return f"Process {index} of {jax.process_count()}{host}", step
