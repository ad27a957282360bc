"""What the chunkwise ops share: products of a stated precision, cuts of [B, T, H, ...] arrays, documents by number."""

import jax
import jax.numpy as jnp

# The exponential of anything below is 0 in fp32, so that raising g to it changes no decay. It keeps the sums of a
# chunk's log decays, whose differences are exponents there, small enough for fp32: a reset may be -1e9 or -inf.
LEAST_LOG_DECAY = -104.0


def document_starts(segment_ids):
    """[B, T] bool: True where a token's segment differs from the one before; the first token continues."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def document_numbers(segment_ids, padding):
    """[B, 1 + T + padding] int32: the documents counted along the sequence; entry 0 is the one that came before.

    None without segment_ids. The padding belongs to the last document.
    """
    if segment_ids is None:
        return None
    numbers = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
    return jnp.pad(jnp.pad(numbers, ((0, 0), (1, 0))), ((0, 0), (0, padding)), mode="edge")


def confine(op, initial_state, segment_ids, bad, axis):
    """op(state) -> (o [B, T, ...], final state) with a state whose `bad` numbers reach the first document alone.

    A chunkwise form masks decays at a document's border, and 0 times inf or NaN is NaN. So the op runs with zeros for
    them, and what they reach is made NaN: the final state, where the whole row is one document, and before it each
    output that reads one along the state's `axis` of keys. No gradient passes there; all others are exact.
    """
    first = ~jnp.cumsum(document_starts(segment_ids), axis=1).astype(bool)
    o, state = op(jnp.where(bad, 0, initial_state))
    by_token = lambda x, rank: x.reshape(*x.shape, *(1,) * (rank - x.ndim))  # noqa: E731
    o = jnp.where(by_token(first, o.ndim) & bad.any(axis)[:, None], jnp.nan, o)
    return o, jnp.where(by_token(first[:, -1], state.ndim) & bad, jnp.nan, state)


def pad_tokens(x, padding):
    """Zeros after the last token of [B, T, ...]."""
    return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) if padding else x


def operand_dtype(*arrays):
    """Dtype of dot operands: bf16 when all inputs are, else exact."""
    dtype = jnp.result_type(*arrays)
    return dtype if dtype == jnp.bfloat16 else jnp.promote_types(jnp.float32, dtype)


def dot(spec, x, y, operand):
    """einsum with operands rounded to `operand` and accumulation in at least fp32."""
    exact = operand != jnp.bfloat16
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    accumulate = jnp.promote_types(jnp.float32, operand)
    return jnp.einsum(
        spec, x.astype(operand), y.astype(operand), precision=precision, preferred_element_type=accumulate
    )


def reverse_cumsum(x, axis):
    """Sum of each entry and all after it."""
    return jax.lax.cumsum(x, axis=axis % x.ndim, reverse=True)


def cut(arrays, numbers, start, size):
    """Tokens [start, start + size) of q k v ..., heads before tokens, value heads as [h, r]; `numbers` of
    documents from one token before."""
    q, k, *by_value_head = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in arrays)
    heads = q.shape[2]
    q, k = (jnp.swapaxes(x, 1, 2) for x in (q, k))
    split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], heads, x.shape[2] // heads, *x.shape[3:]), 1, 3)  # noqa: E731
    numbers = None if numbers is None else jax.lax.dynamic_slice_in_dim(numbers, start, size + 1, axis=1)
    return q, k, *(split(x) for x in by_value_head), numbers


def put(buffer, tile, start):
    """Write a heads-first tile of a value-head array back at its tokens."""
    tile = jnp.moveaxis(tile, 3, 1)
    tile = tile.reshape(*tile.shape[:2], *buffer.shape[2:]).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, tile, start, axis=1)
