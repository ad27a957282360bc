"""Checksums of arrays, computed where the arrays are: one changed bit anywhere gives another one."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

SEEDS = (0x2545F491, 0x9E3779B9)  # two sums of 32 bits
BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """name -> 16 hex digits of an array's bits and places, the same on any mesh.

    sum over i of f(bits_i xor f(i + seed)) mod 2^32 for two seeds, with f a bijection of 32 bits (MurmurHash3's
    finaliser) and i the index in C order: integer sums do not depend on their order, nor on how the array is split.
    """
    # one after another: simulated devices of few cores wait for each other for ever in two sums at once
    found = {name: jax.device_get(_checksum(array)) for name, array in arrays.items()}
    return {name: "".join(f"{int(part):08x}" for part in parts) for name, parts in found.items()}


@jax.jit
def _checksum(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, BITS[x.dtype.itemsize])
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    bits = bits.astype(jnp.uint32)
    return jnp.stack([jnp.sum(_mixed(bits ^ _mixed(index + jnp.uint32(s))), dtype=jnp.uint32) for s in SEEDS])


def _mixed(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
