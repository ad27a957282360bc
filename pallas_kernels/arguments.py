"""Rules that the arguments of several ops keep. Each raises ValueError with one sentence: the value and the rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CHUNKS = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def check_tokens(tokens: int, op: str) -> None:
    """Raises ValueError where there is no token; a batch of 0 rows is fine, its result is empty."""
    if tokens == 0:
        raise ValueError(f"T is 0; {op} needs at least one token.")


def check_sizes(**sizes: int) -> None:
    """Raises ValueError where an axis is empty that must not be."""
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"{name} is 0; it must be at least 1.")


def check_chunk(chunk: int) -> None:
    """Raises ValueError unless `chunk`, the tokens that a chunkwise op takes at once, is one of the sizes it knows."""
    if chunk not in CHUNKS:
        raise ValueError(f"chunk is {chunk}; it must be one of {', '.join(map(str, CHUNKS))}.")


def check_heads(heads: int, value_heads: int) -> None:
    """Raises ValueError unless the value heads divide into equal groups, one for each key head."""
    if heads == 0 or value_heads % heads:
        raise ValueError(f"v has {value_heads} heads, not a multiple of the {heads} heads of q and k.")


def is_known(x: jax.Array | np.ndarray) -> bool:
    """Whether the values of x can be asked here: it is neither traced nor on other processes' devices."""
    return isinstance(x, np.ndarray) or (not isinstance(x, jax.core.Tracer) and x.is_fully_addressable)


def outside(ids: jax.Array | np.ndarray, stop: int) -> int | None:
    """An integer of `ids` that is not in [0, stop), or None where there is none or the values are not known."""
    if not is_known(ids) or not ids.size:
        return None
    values = np.asarray(ids)
    return next((int(end) for end in (values.min(), values.max()) if not 0 <= end < stop), None)


def check_range(name: str, ids: Any, stop: int, more: str = "") -> None:
    """Raises ValueError where integers, if their values are known, lie outside [0, stop)."""
    strange = outside(ids, stop)
    if strange is not None:
        raise ValueError(f"{name} holds {strange}; they must lie in [0, {stop}){more}.")


def check_dtypes(**arrays: Any) -> None:
    """Raises ValueError for dtypes that the arithmetic is not defined for; None stands for an absent array."""
    given = {name: x.dtype for name, x in arrays.items() if x is not None}
    for name, dtype in given.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}; it must be bfloat16, float32 or float64.")
    exact = [name for name, dtype in given.items() if dtype == jnp.float64]
    if exact and len(exact) < len(given):
        other = next(name for name in given if name not in exact)
        raise ValueError(f"{exact[0]} is float64 and {other} {given[other]}; pass all in float64, or none.")
