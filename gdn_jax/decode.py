"""Sequences on the device, and the one program that writes their next tokens."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from gdn_jax.layers import Compute, at_least_fp32, for_single_tokens
from gdn_jax.model import LM, by_repeat
from gdn_jax.prefill import ReadPrompts
from gdn_jax.sampling import Sampling, sample


class Rows(NamedTuple):
    """Sequences that grow together, each with a cache and random numbers of its own."""

    cache: list[PyTree]  # of each repeat, [B, ...] each
    logits: Float[Array, "B vocab"]  # of the next token
    seed: Int[Array, "B"]
    count: Int[Array, "B"]  # tokens written


@functools.partial(jax.jit, static_argnames=("batch_size", "room", "compute"))
def idle_rows(model: LM, *, batch_size: int, room: int, compute: Compute) -> Rows:
    """Rows that hold no sequence yet."""
    zero = jnp.zeros(batch_size, jnp.int32)
    logits = jnp.zeros((batch_size, model.config.vocab), at_least_fp32(compute.dtype))
    cache = by_repeat(model.init_cache(batch_size, room, compute), model.config.repeats)
    return Rows(cache, logits, zero, zero)


@jax.jit
def layers_of(model: LM) -> list[tuple]:
    """A copy of the layers, each in memory of its own and laid out for single tokens, as `decode` reads them."""
    layers = model.layers()
    for group, _ in layers:
        for block in group.blocks:
            for_single_tokens(block)
    return layers


@functools.partial(jax.jit, donate_argnames="rows")
def place(
    model: LM, rows: Rows, read: ReadPrompts, sources: Int[Array, "N"], targets: Int[Array, "N"], seeds: Int[Array, "N"]
) -> Rows:
    """Starts the sequence sources[n] of `read` in row targets[n]; a target beyond the last row is ignored."""

    def put(into: Array, new: Array) -> Array:
        return into.at[targets].set(new, mode="drop")

    waiting = by_repeat(jax.tree.map(lambda new: new[:, sources], read.cache), len(rows.cache))
    cache = jax.tree.map(put, rows.cache, waiting)
    logits = model.logits(read.hidden)[sources]
    return Rows(cache, put(rows.logits, logits), put(rows.seed, seeds), put(rows.count, jnp.zeros_like(seeds)))


@functools.partial(jax.jit, static_argnames=("steps", "compute", "sampling", "vocab"), donate_argnames="rows")
def decode(
    model: LM, layers: list[tuple], rows: Rows, *, steps: int, compute: Compute, sampling: Sampling, vocab: int
) -> tuple[Rows, Int[Array, "B steps"], Bool[Array, "B steps"]]:
    """(rows, the next tokens of each, whether the logits that each was drawn from were finite).

    layers: `layers_of(model)`, made once: they are written out, which a scan over layers would copy one by one. The
    number of steps is fixed, so that the device goes from token to token without asking the host. Rows that hold no
    sequence, or one that has ended, write tokens too, which the host leaves out.
    """

    def draw(logits: Array, seed: Array, count: Array) -> Array:
        return sample(logits[:vocab], jax.random.fold_in(jax.random.key(seed), count), sampling)

    def step(rows: Rows, _: None) -> tuple[Rows, tuple[Array, Array]]:
        token = jax.vmap(draw)(rows.logits, rows.seed, rows.count)
        finite = jnp.isfinite(rows.logits).all(axis=-1)
        hidden, cache = model(token[:, None], compute=compute, cache=rows.cache, layers=layers)
        return Rows(cache, model.logits(hidden[:, 0]), rows.seed, rows.count + 1), (token, finite)

    rows, (tokens, finite) = jax.lax.scan(step, rows, length=steps)
    return rows, tokens.T, finite.T
