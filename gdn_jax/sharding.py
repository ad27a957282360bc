"""Where every array lives: one mesh, one rule for parameters, one for batches.

The mesh has the axes `data`, `fsdp` and `context`. The rows of a batch are split over the first two, the tokens of each
row over the last, a parameter over `fsdp` alone. Layers carry no annotations: the rule reads a leaf's name and shape,
and the optimizer's moments, named like their parameters, follow.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gdn_jax.errors import UserError
from gdn_jax.tree import named_leaves, with_leaves

BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 2**14  # elements; smaller arrays are copied to every device, where a gather would cost more than it saves


def make_mesh(fsdp: int, devices: list[jax.Device] | None = None, *, context: int = 1) -> Mesh:
    """Mesh of all devices, [devices / (fsdp context), fsdp, context], with Auto axes: the partitioner places what no
    rule names. Neighbours in a row's tokens are neighbours among the devices."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise UserError(f"run.fsdp is {fsdp}; it must divide the number of devices here, {len(devices)}.")
    if len(devices) // fsdp % context:
        over = f" over run.fsdp {fsdp}" if fsdp > 1 else ""
        raise UserError(f"run.context is {context}; it must divide the number of devices here, {len(devices)}{over}.")
    grid = np.asarray(devices).reshape(-1, fsdp, context)
    return Mesh(grid, ("data", "fsdp", "context"), axis_types=(AxisType.Auto,) * 3)


def shared_rows(context: int, seq_len: int) -> Mesh:
    """Mesh of `context` devices of this process that share the tokens of all rows; UserError where they cannot."""
    devices = jax.local_devices()
    if context > len(devices):
        raise UserError(f"run.context is {context}; this process has {len(devices)} devices, name no more.")
    if seq_len % context:
        raise UserError(f"run.context is {context}; it must divide the {seq_len} tokens of a window.")
    return make_mesh(1, devices[:context], context=context)


def copied(mesh: Mesh, arrays: Any) -> Any:
    """The arrays on every device of a mesh."""
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the mesh splits the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_rows(mesh: Mesh) -> tuple[int, int]:
    """(number, count): this process reads the rows of part `number` of `count`, and so does each process with which it
    shares their tokens. UserError where two processes would share only some of their rows."""
    grid = mesh.devices.reshape(row_parts(mesh), -1)
    owners = [frozenset(device.process_index for device in row) for row in grid]
    parts = list(dict.fromkeys(owners))
    here = jax.process_index()
    mine = [number for number, processes in enumerate(parts) if here in processes]
    if len(mine) != 1:
        raise UserError(
            f"run.context is {mesh.shape['context']}; it must divide the devices of a process or be a multiple of them."
        )
    return mine[0], len(parts)


def split_tokens(x: jax.Array) -> jax.Array:
    """x [B, T] split under the mesh in force, so that each device has its own tokens of its own rows. Unchanged without
    a mesh, or where the tokens do not divide evenly."""
    parts = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    if parts == 1 or x.shape[1] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH, "context"))


def parameter_spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the first axis that fsdp divides, never that of the model's repeats; without one, each device has a copy.

    The parts of the first axis follow each other in memory, so that a gathered parameter need not be transposed.
    """
    axes = range(1 if "groups/" in name else 0, len(shape))
    axes = [axis for axis in axes if shape[axis] % fsdp == 0]
    if fsdp == 1 or not axes or int(np.prod(shape)) < SMALL:
        return PartitionSpec()
    return PartitionSpec(*(None,) * axes[0], "fsdp")


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A NamedSharding for every leaf of a training state (arrays or shapes)."""
    fsdp = mesh.shape["fsdp"]
    specs = {name: parameter_spec(name, leaf.shape, fsdp) for name, leaf in named_leaves(state).items()}
    return with_leaves(state, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch (`own_rows`) as global arrays, split over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def place_whole(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch of which every process has all rows, as global arrays split over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}
