"""Several processes that train or measure one model together: how they find each other, agree, and when they stop.

jax.distributed is the engine. Process 0 owns the run: its lock, configuration, metrics and words. All write the
checkpoints, so all must see one run directory.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize reads of a launcher has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdn_jax import coordinator
from gdn_jax.errors import Damaged, UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # of `srun` and `mpirun`, whose rest jax reads itself
PATIENCE = 300  # seconds in which processes must find each other
SILENCE = 60  # seconds without a sign of life after which a process counts as dead, and the others end (alive.py)
SILENCE_VARIABLE, SHORTEST = "GDN_SILENCE", 5  # another number of seconds than SILENCE, SHORTEST at least
# what another start then does
GO_ON, BEGIN, ANSWERS = "they go on from the last checkpoint", "they begin again", "kept answers are not made again"

T = TypeVar("T")


def start(environment: Mapping[str, str]) -> None:
    """Joins the processes that the environment's variables name; returns at once where they name none.

    Either the three VARIABLES are set (by hand, by Kubernetes), or `srun` or `mpirun` started several tasks.
    Must come before any other use of JAX. Raises UserError for variables that make no sense.
    """
    if any(name in environment for name in VARIABLES):
        asked = _named(environment)
    elif any(environment.get(name, "1") not in ("", "1") for name in LAUNCHERS):
        asked = _detected()
    else:
        return
    later = 2 * silence(environment)  # jax aborts with words of its own, so it comes after alive.py
    if asked["process_id"]:
        _wait_for_first(asked["coordinator_address"])
    else:
        coordinator.begin(asked["coordinator_address"], asked["num_processes"], later)
        asked["coordinator_bind_address"] = "localhost:0"  # of the service that jax starts in process 0; nobody asks it
    jax.config.update("jax_enable_preemption_service", False)  # nothing asks it, and it has a page for every death
    try:
        jax.distributed.initialize(**asked, initialization_timeout=PATIENCE, heartbeat_timeout_seconds=later)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"The processes did not find each other ({reason}); look at {', '.join(VARIABLES)}, which must name one "
            f"reachable address and a number of its own for each process."
        ) from error


def _detected() -> dict[str, Any]:
    """What jax reads of the launcher's own variables."""
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, PATIENCE)[:3]
    if None in found:
        raise UserError(
            f"The launcher does not say all of where the processes meet, how many there are and which this is; set "
            f"{', '.join(VARIABLES)}."
        )
    return dict(zip(("coordinator_address", "num_processes", "process_id"), found, strict=True))


def silence(environment: Mapping[str, str]) -> int:
    """Seconds after which a process that gives no sign of life ends the others."""
    value = environment.get(SILENCE_VARIABLE, str(SILENCE))
    if not value.isdecimal() or int(value) < SHORTEST:
        raise UserError(f"{SILENCE_VARIABLE} is {value!r}; it must be a whole number of seconds, {SHORTEST} at least.")
    return int(value)


def _named(environment: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not set; several processes need all of {', '.join(VARIABLES)}, one process none."
        )
    address, *counts = (environment[name] for name in VARIABLES)
    for name, value in zip(VARIABLES[1:], counts, strict=True):
        if not value.isdecimal():
            raise UserError(f"{name} is {value!r}; it must be a whole number.")
    count, index = map(int, counts)
    if index >= count:
        raise UserError(f"JAX_PROCESS_ID is {index} and JAX_NUM_PROCESSES {count}; processes count from 0.")
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be host:port, of process 0.")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _wait_for_first(address: str) -> None:
    """Returns once something listens at process 0's address. Without it jax would abort instead of raising an error."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"Process 0 was not found at JAX_COORDINATOR_ADDRESS {address} within {PATIENCE} seconds "
                    f"({error}); start it, or name its host and a port that is open."
                ) from None
        time.sleep(0.2)


def first() -> bool:
    """Whether this process owns the run."""
    return jax.process_index() == 0


def alone() -> bool:
    return jax.process_count() == 1


def described() -> str:
    """What this process sees, in words."""
    here, devices = jax.local_devices(), jax.device_count()
    kind = here[0].device_kind
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{len(here)} of {devices} devices ({kind})"
    )


def on_every(make: Callable[[], T]) -> T:
    """Calls make() in every process and returns its value; where it raises UserError or Damaged in one, all raise it.

    make() must wait for no other process: it may be refused before they come.
    """
    if alone():
        return make()
    value, mine = None, ("", False)
    try:
        value = make()
    except UserError as error:
        mine = str(error), isinstance(error, Damaged)
    for index, text in enumerate(gathered(json.dumps(mine))):
        sentence, damaged = json.loads(text)
        if sentence:
            raise (Damaged if damaged else UserError)(mine[0] or f"Process {index} was refused: {sentence}")
    return value


@contextlib.contextmanager
def clear_stdout() -> Iterator[None]:
    """What libraries print in here, as gloo does of its connections, goes to stderr: stdout is for the result."""
    if alone():
        yield
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def agree(facts: dict[str, Any]) -> None:
    """Raises UserError, naming the first difference, unless all processes have the same facts."""
    if alone():
        return
    every = [json.loads(text) for text in gathered(json.dumps(facts))]
    for index, other in enumerate(every):
        for name, value in every[0].items():
            if other[name] != value:
                raise UserError(
                    f"Process {index} has {name} {other[name]!r} and process 0 has {value!r}; start all processes with "
                    f"the same code, packages, options and data."
                )


def gathered(text: str) -> list[str]:
    """The text of every process, in their order."""
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([content.size])))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded).reshape(sizes.size, -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def any_process(mesh: Mesh) -> Callable[[bool], bool]:
    """A function said(value) that tells whether any process has passed True.

    With several processes the answer to one call comes from the next call, the same in all of them: no step waits for
    it, and all stop after the same step.
    """
    if alone():
        return bool
    over_all = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    sent: list[jax.Array] = []

    def said(value: bool) -> bool:
        mine = jax.make_array_from_callback((mesh.size,), over_all, lambda _: np.array([value], np.int32))
        sent.append(largest(mine))
        return bool(sent.pop(0)) if len(sent) > 1 else False

    return said
