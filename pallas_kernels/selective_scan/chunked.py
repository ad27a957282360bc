"""Mamba's selective scan a chunk at a time in plain JAX, forward and backward.

One chunk of C tokens, state h_0 [D, N] entering it, all products elementwise on [D, N]:

    h_t = a_t h_{t-1} + u_t B_t       a_t = exp(dt_t A), 0 where a document starts      u_t = dt_t x_t
    y_t = sum_n C_t h_t + D x_t

The C states of a chunk are found by doubling: after the pass of distance s a token holds what the 2s tokens up to it
have written, so log2 C passes suffice, and decays only ever multiply, never divide. Outside the current chunk no
[T, D, N] array exists: the forward keeps the state entering each chunk, and the backward makes a chunk's states again.

Backward, with dh'_C the gradient of the state that leaves the chunk:
    dh_t = C_t dy_t + a_{t+1} dh_{t+1}      the same doubling from the right
    dl_t = dh_t a_t h_{t-1}, the gradient of the exponent dt_t A;  du_t = sum_n dh_t B_t
    dx = dt du + D dy    ddt = x du + sum_n A dl    dA = sum_t dt dl    dB = sum_d u dh    dC = sum_d h dy
    dD = sum_t x dy
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import document_numbers, pad_tokens


def _states(decay, write, state):
    """h [B, C, D, N] of every token from decay, write [B, C, D, N] and the state [B, D, N] before the first."""
    write = write.at[:, 0].add(decay[:, 0] * state)
    distance = 1
    while distance < decay.shape[1]:
        before = lambda x: jnp.pad(x[:, :-distance], ((0, 0), (distance, 0), (0, 0), (0, 0)))  # noqa: B023, E731
        write = write + decay * before(write)
        decay = decay * before(decay)
        distance *= 2
    return write


def _chunk(arrays, runs, start, size, A):
    """A chunk of x, dt, B, C, ... in the compute dtype, and its decays [B, C, D, N]; runs start one token earlier."""
    slices = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1).astype(A.dtype) for x in arrays)
    x, dt, *rest = slices
    decay = jnp.exp(dt[..., None] * A)
    if runs is not None:
        run = jax.lax.dynamic_slice_in_dim(runs, start, size + 1, axis=1)
        decay = jnp.where((run[:, 1:] == run[:, :-1])[..., None, None], decay, 0)
    return x, dt, *rest, decay


def _put(buffer, tile, start):
    return jax.lax.dynamic_update_slice_in_dim(buffer, tile.astype(buffer.dtype), start, axis=1)


def _forward(x, dt, A, B, C, D, initial_state, runs, chunk, *, read=True, keep=False):
    """((y if `read`, final state), state entering each chunk [N, B, D, N] if `keep`)."""

    def step(carry, start):
        state, y = carry
        xc, dtc, Bc, Cc, decay = _chunk((x, dt, B, C), runs, start, chunk, A)
        h = _states(decay, (dtc * xc)[..., None] * Bc[:, :, None], state)
        if read:
            y = _put(y, (h * Cc[:, :, None]).sum(-1) + D * xc, start)
        return (h[:, -1], y), state if keep else None

    starts = jnp.arange(0, x.shape[1], chunk)
    (state, y), kept = jax.lax.scan(step, (initial_state, jnp.zeros_like(x) if read else None), starts)
    return (y, state), kept


def _backward(x, dt, A, B, C, D, runs, kept, dy, d_final, chunk):
    def step(carry, scanned):
        d_left, dx, ddt, dB, dC, dA, dD = carry
        start, state = scanned
        xc, dtc, Bc, Cc, dyc, decay = _chunk((x, dt, B, C, dy), runs, start, chunk, A)
        u = dtc * xc
        h = _states(decay, u[..., None] * Bc[:, :, None], state)
        before = jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
        following = jnp.concatenate([decay[:, 1:], jnp.ones_like(decay[:, :1])], axis=1)
        reverse = lambda y: jnp.flip(y, axis=1)  # noqa: E731
        dh = reverse(_states(reverse(following), reverse(dyc[..., None] * Cc[:, :, None]), d_left))
        d_exponent = dh * decay * before
        du = (dh * Bc[:, :, None]).sum(-1)
        new = (
            _put(dx, dtc * du + D * dyc, start),
            _put(ddt, xc * du + (d_exponent * A).sum(-1), start),
            _put(dB, (u[..., None] * dh).sum(2), start),
            _put(dC, (dyc[..., None] * h).sum(2), start),
            dA + (d_exponent * dtc[..., None]).sum((0, 1)),
            dD + (xc * dyc).sum((0, 1)),
        )
        return (decay[:, 0] * dh[:, 0], *new), None

    carry = (d_final, *(jnp.zeros_like(y) for y in (x, dt, B, C, A, D)))
    scanned = (jnp.arange(0, x.shape[1], chunk), kept)
    (d_initial, dx, ddt, dB, dC, dA, dD), _ = jax.lax.scan(step, carry, scanned, reverse=True)
    return dx, ddt, dA, dB, dC, dD, d_initial


@partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _op(x, dt, A, B, C, D, initial_state, runs, chunk, residuals):
    return _forward(x, dt, A, B, C, D, initial_state, runs, chunk)[0]


def _op_fwd(x, dt, A, B, C, D, initial_state, runs, chunk, residuals):
    keep = residuals == "saved"
    outputs, kept = _forward(x, dt, A, B, C, D, initial_state, runs, chunk, keep=keep)
    # the initial state is needed only to run the forward again
    return outputs, (x, dt, A, B, C, D, runs, kept if keep else initial_state)


def _op_bwd(chunk, residuals, kept, cotangents):
    x, dt, A, B, C, D, runs, states = kept
    if residuals == "inputs":
        _, states = _forward(x, dt, A, B, C, D, states, runs, chunk, read=False, keep=True)
    return *_backward(x, dt, A, B, C, D, runs, states, *cotangents, chunk), None


_op.defvjp(_op_fwd, _op_bwd)


def selective_scan(x, dt, A, B, C, D, initial_state, segment_ids, chunk, residuals):
    """Arguments as in api.selective_scan; segment_ids may be None. Any T: the tail is padded with empty tokens."""
    length = x.shape[1]
    padding = -length % chunk
    runs = document_numbers(segment_ids, padding)
    if padding:  # dt = 0 writes nothing and keeps the state
        x, dt, B, C = (pad_tokens(y, padding) for y in (x, dt, B, C))
    y, state = _op(x, dt, A, B, C, D, initial_state, runs, chunk, residuals)
    return y[:, :length], state
