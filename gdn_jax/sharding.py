"""Where every array lives: one mesh, one rule for parameters, one for batches.

The mesh has the axes `data` and `fsdp`; a batch is split over both, a parameter over `fsdp` alone. Layers carry no
annotations: the rule reads a leaf's name and shape, and the optimizer's moments, named like their parameters, follow.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gdn_jax.errors import UserError
from gdn_jax.tree import named_leaves, with_leaves

BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 2**14  # elements; smaller arrays are copied to every device, where a gather would cost more than it saves


def make_mesh(fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh of all devices, [devices / fsdp, fsdp], with Auto axes: the partitioner places what no rule names."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise UserError(f"run.fsdp is {fsdp}; it must divide the number of devices here, {len(devices)}.")
    grid = np.asarray(devices).reshape(-1, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


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
    """This process's rows of a batch as global arrays, split over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def place_whole(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch of which every process has all rows, as global arrays split over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}
