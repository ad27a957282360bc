"""What is tuned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from pallas_kernels.toy.api import KINDS, Configuration, Scale, in_tiles
from pallas_kernels.toy.conformance import CASES

KERNELS = ("scale",)


class Work(NamedTuple):
    """The arrays of one call, as far as they are made."""

    x: jax.Array | None = None
    y: jax.Array | None = None

    def with_made(self, made):
        return Work(*(old if new is None else new for old, new in zip(self, made, strict=True)))


def why_not(shape):
    return None if shape.tokens > 1 else "there is no kernel for one token"


def as_run(shape):
    return shape


def entry_name(shape):
    return "all"


def admits(name):
    return True


def in_force(shape, device_kind):
    return Configuration()


def wholes(shape):
    return [Configuration()]


def checks(shape):
    return list(CASES)


def inputs(shape):
    return Work(jax.random.normal(jax.random.key(0), shape))


def run(work, config, whole, *, interpret):
    return Work(y=in_tiles(work.x, jnp.float32(2), config.tile))


def candidates(default, shape):
    return [default, Scale(tile=8)]


__all__ = ["KERNELS", "KINDS", "admits", "as_run", "candidates", "checks", "entry_name", "in_force", "inputs", "run"]
