"""Terms that several kernels make: decays of pairs, beta where it divides, <S, dS'>, sums over value columns."""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.gated_delta_rule.arrays import CHUNK

# The least |beta| here, where it divides: too small to show in a sum in fp32, and its quotients are far from overflow.
LEAST = 2.0**-40


def square(axis):
    """The token number along `axis` of a 64 x 64 tile."""
    return jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)


def pair_decay(rows, columns, allowed, interpret):
    """exp(rows_i - columns_j) where allowed, else 0; the exponent is masked first."""
    return triton.exp(jnp.where(allowed, rows[:, None] - columns[None, :], -jnp.inf), interpret)


def nonzero(beta):
    """beta, or LEAST where it is nearer to 0."""
    return jnp.where(jnp.abs(beta) < LEAST, LEAST, beta)


def where_nonzero(beta, d_write):
    """dW of every token, or 0 where beta is 0, for which LEAST stands."""
    return jnp.where(jnp.abs(beta) <= LEAST, 0.0, 1.0)[:, None] * d_write


def inner_product(state, d_state, tile, size):
    """[size] numbers whose sum is <S, dS'> over a tile's own key columns: one for each value column, which needs no
    exchange between warps, where there are `size` of them; else the whole sum and zeros."""
    sums = jnp.sum(tile.own(state.astype(jnp.float32) * d_state.astype(jnp.float32)), axis=1)
    if sums.size == size:
        return sums
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (size,), 0) == 0, jnp.sum(sums), 0.0)


def over_values(tiles, step, *zeros):
    """The sums that step(columns, *sums) returns, over all tiles of value columns."""
    return tiles.over(lambda sums, tile: step(tile.place, *sums), zeros)
