"""Where several processes meet: jax's coordination service, in a process of its own beside process 0.

jax keeps it in process 0. When that is killed, its connections close, and a C++ thread of jax ends all others at once,
with pages in place of a sentence. Here the service goes on until they have left, and process 0 is missed as any other.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from jaxlib import _jax  # jax itself gives the service no public name

from gdn_jax.errors import UserError

READY = "ready\n"
FORMER = 5  # seconds in which the service of a run that was killed notices that all have left
ESTABLISHED = "01"  # in Linux's tables of connections


def begin(address: str, count: int, heartbeat: int) -> None:
    """Starts the service of `count` processes at host:port; called by process 0. Returns once it listens.

    heartbeat   seconds without one after which jax gives a process up, and as long the service outlives process 0 where
                others stay connected, as a host that is lost does
    """
    port = int(address.rpartition(":")[2])
    _check_free(port, address)
    command = [sys.executable, "-m", "gdn_jax.coordinator", *map(str, (port, count, heartbeat, os.getpid()))]
    service = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    said = service.stdout.readline()
    if said != READY:
        reason = (said + service.stdout.read()).strip().rpartition("\n")[2]
        raise UserError(f"Process 0 cannot listen at {address} ({reason}); name another port of its host.")
    service.stdout.close()  # of what it says later the processes have sentences of their own


def _check_free(port: int, address: str) -> None:
    """A UserError where another program listens: the service would share the port with it, and its callers."""
    deadline = time.monotonic() + FORMER
    while True:
        try:
            socket.create_server(("", port)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"Process 0 cannot listen at {address} ({os.strerror(error.errno)}); end what is left of a former "
                    f"run, or name another port of its host."
                ) from None
        time.sleep(0.2)


def _serve(port: int, count: int, heartbeat: int, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the processes, which save first
        signal.signal(number, signal.SIG_IGN)
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{port}")
    _service = _jax.get_distributed_runtime_service(bind, count, heartbeat_timeout=heartbeat)
    sys.stdout.write(READY)
    sys.stdout.flush()
    while os.getppid() == parent:
        time.sleep(0.2)
    until = time.monotonic() + heartbeat
    while time.monotonic() < until and _connected(port):
        time.sleep(0.2)
    os._exit(0)  # an orderly end would wait for those that hang


def _connected(port: int) -> bool:
    """Whether anything is connected to this port of the host."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            rows = [line.split() for line in lines][1:]
        if any(int(row[1].rpartition(":")[2], 16) == port and row[3] == ESTABLISHED for row in rows):
            return True
    return False


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
