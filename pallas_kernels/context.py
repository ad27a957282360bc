"""Rows whose tokens are split over devices, part by part along a mesh axis: what the parts tell each other.

All functions run inside shard_map, on a device's own part [B, T, ...] of a row, and give what the whole row would.

A recurrence is affine in the state that enters a part, S' = M S + F: F is the part's final state from zero, M a matrix
or a factor for each element. Each device makes its own M and F, all gather them (as many numbers for any T), chain them
to the state that enters their part, and run the op from there. Gradients go the same way back: dS = M^T dS' + dF, with
dF that of the part alone. Where a document begins inside a part, nothing passes through it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.chunkwise import document_starts


class Map(NamedTuple):
    """A kind of M."""

    apply: Callable[[Array, Array], Array]  # (M, S) -> M S
    transposed: Callable[[Array, Array], Array]  # (M, dS) -> M^T dS


def _product(spec: str) -> Callable[[Array, Array], Array]:
    return lambda m, s: jnp.einsum(spec, m, s, precision=lax.Precision.HIGHEST)


FACTOR = Map(jnp.multiply, jnp.multiply)  # of each element of the state, or broadcast to it
MATRIX = Map(_product("bhij,bhjv->bhiv"), _product("bhji,bhjv->bhiv"))  # [B, H, K, K] of states [B, H, K, V]


class _Documents(NamedTuple):
    """Of every part of each row [parts, B]."""

    continues: Array  # its first token is of the document of the token before it
    breaks: Array  # a document begins after its first token


def _documents(segment_ids: Array | None, axis: str) -> _Documents | None:
    if segment_ids is None:
        return None
    first, last = lax.all_gather((segment_ids[:, 0], segment_ids[:, -1]), axis)
    before = jnp.concatenate([first[:1], last[:-1]])  # the row's first document continues what came before it
    return _Documents(before == first, lax.all_gather(document_starts(segment_ids).any(1), axis))


def _where(rows: Array, x: Array) -> Array:
    """x [B, ...], 0 where rows [B] is False, whatever stands there."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def recurrence(
    op: Callable[..., tuple[Array, Array]],
    part: Callable[..., tuple[Array, Array]],
    kind: Map,
    inputs: tuple[Array, ...],
    initial_state: Array,
    segment_ids: Array | None,
    *,
    axis: str,
) -> tuple[Array, Array]:
    """(outputs of this part, final state of the row) of op(inputs, state, segment_ids) -> (outputs, final state).

    part           (inputs, segment_ids) -> (M, F) of a part, of a `kind`; no gradient goes through it
    initial_state  the row's, the same on every device; so is the final state
    """
    parts = lax.axis_size(axis)

    @jax.custom_vjp
    def run(inputs, initial_state, segment_ids):
        return forward(inputs, initial_state, segment_ids)[0]

    def forward(inputs, initial_state, segment_ids):
        here, documents = lax.axis_index(axis), _documents(segment_ids, axis)
        maps, added = lax.all_gather(part(inputs, segment_ids), axis)
        state, entering = initial_state, jnp.zeros_like(initial_state)
        for i in range(parts):
            if documents is not None:
                state = _where(documents.continues[i], state)
            entering = jnp.where(here == i, state, entering)
            passed = kind.apply(maps[i], state)
            if documents is not None:
                passed = _where(~documents.breaks[i], passed)
            state = passed + added[i]
        (o, _), pull = jax.vjp(lambda inputs, state: op(inputs, state, segment_ids), inputs, entering)
        return (o, state), (pull, maps, documents)

    def backward(kept, cotangents):
        (pull, maps, documents), (do, d_final) = kept, cotangents
        here, d_state = lax.axis_index(axis), lax.psum(d_final, axis)  # each device has its share
        _, added = pull((do, jnp.zeros_like(d_state)))
        added, leaving = lax.all_gather(added, axis), jnp.zeros_like(d_state)
        for i in reversed(range(parts)):
            leaving = jnp.where(here == i, d_state, leaving)
            passed = kind.transposed(maps[i], d_state)
            if documents is not None:
                passed = _where(~documents.breaks[i], passed)
            d_state = passed + added[i]
            if documents is not None:
                d_state = _where(documents.continues[i], d_state)
        d_inputs, _ = pull((do, leaving))
        return d_inputs, jnp.where(here == 0, d_state, 0), None  # summed over the devices by shard_map

    run.defvjp(forward, backward)
    return run(inputs, initial_state, segment_ids)


def last_inputs(x: Array, count: int, initial: Array | None, segment_ids: Array | None, *, axis: str) -> Array:
    """The `count` inputs before this part [B, count, C], zero where another document has them.

    initial: those before the row, None for zeros. Raises ValueError for parts of fewer tokens.
    """
    if x.shape[1] < count:
        raise ValueError(
            f"Each device has {x.shape[1]} tokens of a row and a convolution reads {count} before its own; split rows "
            f"over fewer devices."
        )
    tail = x[:, x.shape[1] - count :]
    if segment_ids is not None:
        ends = jnp.cumsum(document_starts(segment_ids), axis=1)
        tail = jnp.where((ends[:, x.shape[1] - count :] == ends[:, -1:])[..., None], tail, 0)
    following = [(part, part + 1) for part in range(lax.axis_size(axis) - 1)]
    before = lax.ppermute(tail, axis, following)
    if segment_ids is not None:
        before = _where(lax.ppermute(segment_ids[:, -1], axis, following) == segment_ids[:, 0], before)
    return jnp.where(lax.axis_index(axis) == 0, jnp.zeros_like(tail) if initial is None else initial, before)


def of_last(x: Array, *, axis: str) -> Array:
    """The last part's x, on every device."""
    return lax.psum(jnp.where(lax.axis_index(axis) == lax.axis_size(axis) - 1, x, 0), axis)


def by_heads(op: Callable[..., Array], q: Array, k: Array, v: Array, segment_ids: Array | None, *, axis: str) -> Array:
    """op(q, k, v, segment_ids) -> [B, T, H, K] of arrays [B, T, H, K] whose heads do not see each other.

    Parts of tokens become parts of heads, op runs on whole rows, and its output goes back: each device sends and gets
    four arrays of its part's size, less its own share. Heads that do not divide are filled up with zeros.
    """
    heads, parts = q.shape[2], lax.axis_size(axis)
    missing = -heads % parts

    def whole_rows(x: Array) -> Array:
        return lax.all_to_all(jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))), axis, 2, 1, tiled=True)

    ids = None if segment_ids is None else lax.all_gather(segment_ids, axis, axis=1, tiled=True)
    o = op(*map(whole_rows, (q, k, v)), ids)
    return lax.all_to_all(o, axis, 1, 2, tiled=True)[:, :, :heads]
