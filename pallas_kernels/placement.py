"""The device that what is traced now will run on, which decides what "auto" takes."""

import contextlib

import jax


def device() -> jax.Device:
    """A device of the mesh in force, else jax's default one: `jax.default_device`, or the first of `jax.devices()`."""
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    if of_mesh is not None:
        with contextlib.suppress(RuntimeError):  # a mesh of devices that this machine lacks, for lowering alone
            for one in jax.devices(of_mesh.platform):
                if one.device_kind == of_mesh.device_kind:
                    return one
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.devices(default)[0]
    return default or jax.devices()[0]


def on_gpu() -> bool:
    """Whether it is a CUDA device."""
    return device().platform in ("gpu", "cuda")
