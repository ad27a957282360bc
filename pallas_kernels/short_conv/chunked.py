"""Short causal convolution as W shifted multiply-adds in plain JAX, forward and backward.

With x extended to the left by the state, p_s the extended input at place s = t + W - 1 and taps within a document:

    z_t = bias + sum_i weight_i p_{t+i}      i = 0 ... W-1      y_t = SiLU(z_t)
    dz_t = dy_t SiLU'(z_t)      dp_s = sum_i weight_i dz_{s-i}
    dweight_i = sum_t dz_t p_{t+i}      dbias = sum_t dz_t

Shifts of one array are elementwise work, which XLA fuses into one pass over x; a general convolution would not be fused
with what stands around it. Autodiff of these lines would keep z and every shifted copy in fp32; the backward makes them
again from the inputs, which is all that is kept.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import document_starts


def _within(x, documents, tap, width):
    """x [B, T, C] where the input that `tap` meets is of the token's own document, else 0."""
    if documents is None:
        return x
    same = documents[:, tap : tap + x.shape[1]] == documents[:, width - 1 :]
    return jnp.where(same[..., None], x, 0)


def _taps(inputs, documents, width):
    """For each row of the weight the input it meets at every token, [B, T, C]."""
    length = inputs.shape[1] - width + 1
    for tap in range(width):
        yield _within(inputs[:, tap : tap + length], documents, tap, width)


def _convolved(inputs, weight, bias, documents):
    """z [B, T, C] of the extended inputs [B, W-1 + T, C], all of one dtype."""
    z = sum(row * met for row, met in zip(weight, _taps(inputs, documents, len(weight)), strict=True))
    return z if bias is None else z + bias


def _left(last, documents, length):
    """The state's places `last` [B, W-1, C], zero where they are not of the last document."""
    if documents is None:
        return last
    return jnp.where((documents[:, length:] == documents[:, -1:])[..., None], last, 0)


def _extended(x, state):
    return jnp.concatenate([state, x], axis=1).astype(jnp.promote_types(jnp.float32, x.dtype))


def _exactly(x, *parameters):
    """Parameters in the dtype of the arithmetic for x."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    return (None if y is None else y.astype(dtype) for y in parameters)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _op(x, weight, bias, state, documents, activation):
    weight, bias = _exactly(x, weight, bias)
    y = _convolved(_extended(x, state), weight, bias, documents)
    if activation == "silu":
        y = jax.nn.silu(y)
    length = x.shape[1]
    return y.astype(x.dtype), _left(jnp.concatenate([state, x], axis=1)[:, length:], documents, length)


def _op_fwd(x, weight, bias, state, documents, activation):
    return _op(x, weight, bias, state, documents, activation), (x, weight, bias, state, documents)


def _op_bwd(activation, kept, cotangents):
    x, weight, bias, state, documents = kept
    (dy, d_left), (rows, shift) = cotangents, _exactly(x, weight, bias)
    width, length = len(rows), x.shape[1]
    inputs = _extended(x, state)
    dz = dy.astype(inputs.dtype)
    if activation == "silu":
        z = _convolved(inputs, rows, shift, documents)
        opening = jax.nn.sigmoid(z)
        dz = dz * opening * (1 + z * (1 - opening))
    d_rows = jnp.stack([(dz * met).sum((0, 1)) for met in _taps(inputs, documents, width)])
    d_inputs = jnp.zeros_like(inputs)
    for tap, row in enumerate(rows):
        part = row * _within(dz, documents, tap, width)
        d_inputs = d_inputs + jnp.pad(part, ((0, 0), (tap, width - 1 - tap), (0, 0)))
    d_inputs = d_inputs + jnp.pad(_left(d_left, documents, length), ((0, 0), (length, 0), (0, 0)))
    d_bias = None if bias is None else dz.sum((0, 1)).astype(bias.dtype)
    d_state, dx = (y.astype(x.dtype) for y in jnp.split(d_inputs, [width - 1], axis=1))
    return dx, d_rows.astype(weight.dtype), d_bias, d_state, None


_op.defvjp(_op_fwd, _op_bwd)


def short_conv(x, weight, bias, initial_state, segment_ids, activation):
    """Arguments as in api.short_conv; bias and segment_ids may be None."""
    documents = None
    if segment_ids is not None:  # what came before the first token is of its document
        documents = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
        documents = jnp.pad(documents, ((0, 0), (len(weight) - 1, 0)))
    return _op(x, weight, bias, initial_state, documents, activation)
