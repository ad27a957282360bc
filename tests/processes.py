"""Commands as several processes of this machine: real processes, gloo between them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from gdn_jax import distributed

FLAGS = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1")
PROGRAM = (sys.executable, "-m", "experiments.run")


def by_hand(port, count, index):
    return dict(zip(distributed.VARIABLES, (f"localhost:{port}", str(count), str(index)), strict=True))


def by_slurm(port, count, index):
    """What `srun` sets; jax makes the port of the job's number."""
    names = {"NTASKS": count, "STEP_NUM_TASKS": count, "PROCID": index, "LOCALID": index, "STEP_NUM_NODES": 1}
    names |= {"JOB_ID": port, "STEP_NODELIST": "localhost"}
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def started(tmp_path, commands, launched=by_hand, program=PROGRAM, before=(), port=None):
    """A process of each command, in one group of them, the last of them through the program `before`."""
    port, found = port or free_port(), []
    for index, command in enumerate(commands):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS} | launched(port, len(commands), index)
        through = before if index == len(commands) - 1 else ()
        with (tmp_path / f"{index}.out").open("wb") as out, (tmp_path / f"{index}.err").open("wb") as err:
            process = subprocess.Popen(
                [*through, *map(str, program), *command],
                env=env, stdout=out, stderr=err, cwd=Path(__file__).parent.parent,
            )  # fmt: skip
        found.append(process)
    return found


def ended(tmp_path, processes):
    """The exit code and the last line of stderr of each, or "" where it said nothing."""
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [["", *(tmp_path / f"{i}.err").read_text().splitlines()][-1] for i in range(len(processes))]


def reach(tmp_path, text, processes):
    """Returns once process 0 has said the text."""
    while text not in (tmp_path / "0.err").read_text():
        assert all(process.poll() is None for process in processes), (tmp_path / "0.err").read_text()
        time.sleep(0.05)
