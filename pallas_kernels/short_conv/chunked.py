"""Short causal convolution as W shifted multiply-adds in plain JAX, forward and backward.

With x extended to the left by the state, p_s the extended input at place s = t + W - 1 and taps within a document:

    z_t = bias + sum_i weight_i p_{t+i}      i = 0 ... W-1      a_t = SiLU(z_t)
    y_t = r a_t      r = (|a_t|^2 + eps)^-1/2 of each part that l2norm says, else 1
    da_t = r (dy_t - y_t (dy_t . y_t))      dz_t = da_t SiLU'(z_t)      dp_s = sum_i weight_i dz_{s-i}
    dweight_i = sum_t dz_t p_{t+i}      dbias = sum_t dz_t

Shifts of one array are elementwise work, which XLA fuses into one pass over x; a general convolution would not be fused
with what stands around it. Autodiff of these lines would keep z and every shifted copy in fp32; the backward makes them
again from the inputs, which is all that is kept.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import document_starts

NORM_EPS = 1e-6


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


def final_state(last, documents, length):
    """The extended inputs' last places `last` [B, W-1, C], zero where they are not of the last document."""
    if documents is None:
        return last
    return jnp.where((documents[:, length:] == documents[:, -1:])[..., None], last, 0)


def _extended(x, state):
    return jnp.concatenate([state, x], axis=1).astype(jnp.promote_types(jnp.float32, x.dtype))


def _exactly(x, *parameters):
    """Parameters in the dtype of the arithmetic for x."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    return (None if y is None else y.astype(dtype) for y in parameters)


def _inverse_norm(a, size):
    """r of each part of `size` channels, for each of its channels: like a [B, T, C]."""
    parts = a.reshape(*a.shape[:-1], a.shape[-1] // size, size)
    r = jax.lax.rsqrt(jnp.square(parts).sum(-1, keepdims=True) + NORM_EPS)
    return jnp.broadcast_to(r, parts.shape).reshape(a.shape)


def _along(dy, y, size):
    """dy . y of each part of `size` channels, for each of its channels."""
    parts = (dy * y).reshape(*y.shape[:-1], y.shape[-1] // size, size)
    return jnp.broadcast_to(parts.sum(-1, keepdims=True), parts.shape).reshape(y.shape)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def op(x, weight, bias, state, documents, activation, l2norm):
    """Arguments as in api.short_conv, but for `documents` of `documents_of`."""
    weight, bias = _exactly(x, weight, bias)
    y = _convolved(_extended(x, state), weight, bias, documents)
    if activation == "silu":
        y = jax.nn.silu(y)
    if l2norm is not None:
        y = y * _inverse_norm(y, l2norm)
    length = x.shape[1]
    return y.astype(x.dtype), final_state(jnp.concatenate([state, x], axis=1)[:, length:], documents, length)


def _op_fwd(x, weight, bias, state, documents, activation, l2norm):
    return op(x, weight, bias, state, documents, activation, l2norm), (x, weight, bias, state, documents)


def _op_bwd(activation, l2norm, kept, cotangents):
    x, weight, bias, state, documents = kept
    (dy, d_final), (rows, shift) = cotangents, _exactly(x, weight, bias)
    width, length = len(rows), x.shape[1]
    inputs = _extended(x, state)
    dz = dy.astype(inputs.dtype)
    if activation == "silu" or l2norm is not None:
        a = z = _convolved(inputs, rows, shift, documents)
        if activation == "silu":
            opening = jax.nn.sigmoid(z)
            a = z * opening
        if l2norm is not None:
            r = _inverse_norm(a, l2norm)
            dz = r * (dz - a * r * _along(dz, a * r, l2norm))
        if activation == "silu":
            dz = dz * opening * (1 + z * (1 - opening))
    d_rows = jnp.stack([(dz * met).sum((0, 1)) for met in _taps(inputs, documents, width)])
    d_inputs = jnp.zeros_like(inputs)
    for tap, row in enumerate(rows):
        part = row * _within(dz, documents, tap, width)
        d_inputs = d_inputs + jnp.pad(part, ((0, 0), (tap, width - 1 - tap), (0, 0)))
    d_inputs = d_inputs + jnp.pad(final_state(d_final, documents, length), ((0, 0), (length, 0), (0, 0)))
    d_bias = None if bias is None else dz.sum((0, 1)).astype(bias.dtype)
    d_state, dx = (y.astype(x.dtype) for y in jnp.split(d_inputs, [width - 1], axis=1))
    return dx, d_rows.astype(weight.dtype), d_bias, d_state, None


op.defvjp(_op_fwd, _op_bwd)


def documents_of(segment_ids, width):
    """The number of its document for each extended input [B, W-1 + T]: what came before the first token is of its."""
    if segment_ids is None:
        return None
    documents = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
    return jnp.pad(documents, ((0, 0), (width - 1, 0)))


def short_conv(x, weight, bias, initial_state, segment_ids, activation, l2norm):
    """Arguments as in api.short_conv; bias, segment_ids and l2norm may be None."""
    return op(x, weight, bias, initial_state, documents_of(segment_ids, len(weight)), activation, l2norm)
