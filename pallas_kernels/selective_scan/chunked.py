"""Mamba's selective scan a chunk at a time in plain JAX, forward and backward.

One chunk of C tokens, state h_0 [D, N] entering it, all products elementwise on [D, N]:

    h_t = a_t h_{t-1} + u_t B_t       a_t = exp(dt_t A), 0 where a document starts      u_t = dt_t x_t
    y_t = sum_n C_t h_t + D x_t

The C states of a chunk are found in three passes. The first goes through all runs of RUN tokens side by side, token
after token, as if each run began with an empty state. The second goes from run to run and gives the state that enters
each. The third adds that state, times the product of the decays since, to every token. Decays only ever multiply, never
divide. States exist for the tokens of one chunk at a time: the forward keeps the state that enters each chunk, and the
backward makes a chunk's states again.

Backward, with dh'_C the gradient of the state that leaves the chunk:
    dh_t = C_t dy_t + a_{t+1} dh_{t+1}      the same three passes from the right
    dl_t = dh_t a_t h_{t-1}, the gradient of the exponent dt_t A;  du_t = sum_n dh_t B_t
    dx = dt du + D dy    ddt = x du + sum_n A dl    dA = sum_t dt dl    dB = sum_d u dh    dC = sum_d h dy
    dD = sum_t x dy
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import document_numbers, pad_tokens

RUN = 8  # tokens of a chunk that follow one another; C / RUN such runs go side by side


def _runs(x):
    """[B, C, ...] -> [RUN, B, C / RUN, ...]: the tokens of a run first."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // RUN, RUN, *x.shape[2:]), 2, 0)


def _tokens(x):
    """The inverse of _runs."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], x.shape[1] * RUN, *x.shape[3:])


def _across(state, written, product, reverse=False):
    """What enters every run [B, R, D, N], and what leaves the last; run r turns s into product s + written."""

    def step(state, run):
        written, product = run
        return product * state + written, state

    by_run = [jnp.moveaxis(x, 1, 0) for x in (written, product)]
    state, entering = jax.lax.scan(step, state, by_run, reverse=reverse)
    return jnp.moveaxis(entering, 0, 1), state


def _chunk(arrays, numbers, start, size, dtype):
    """A chunk of x, dt, B, C, ... by runs, and by runs whether a token goes on from the one before it."""
    slices = [jax.lax.dynamic_slice_in_dim(x, start, size, axis=1).astype(dtype) for x in arrays]
    goes_on = jnp.ones(slices[0].shape[:2], bool)
    if numbers is not None:
        number = jax.lax.dynamic_slice_in_dim(numbers, start, size + 1, axis=1)
        goes_on = number[:, 1:] == number[:, :-1]
    return *(_runs(x) for x in slices), _runs(goes_on)


def _states(u, dt, B, goes_on, A, state, keep_decay=False):
    """(h of every token [RUN, B, R, D, N], state entering each run, state after the last token, decays if kept)."""

    def step(carry, token):
        (written, product), (u, dt, B, goes_on) = carry, token
        decay = jnp.where(goes_on[..., None, None], jnp.exp(dt[..., None] * A), 0)
        carry = (decay * written + u[..., None] * B[:, :, None], decay * product)
        return carry, (*carry, decay if keep_decay else None)

    empty = jnp.zeros((*u.shape[1:], A.shape[-1]), A.dtype)
    _, (written, product, decay) = jax.lax.scan(step, (empty, empty + 1), (u, dt, B, goes_on))
    entering, state = _across(state, written[-1], product[-1])
    return written + product * entering, entering, state, decay


def _gradients_of_states(dy, C, decay, d_left):
    """dh of every token [RUN, B, R, D, N] and the gradient of the state before the first."""

    def step(carry, token):
        (passed, product), (dy, C, decay) = carry, token  # passed: gradient that the next token hands back
        dh = dy[..., None] * C[:, :, None] + passed
        return (decay * dh, decay * product), (dh, product)

    empty = jnp.zeros_like(decay[0])
    last, (dh, product) = jax.lax.scan(step, (empty, empty + 1), (dy, C, decay), reverse=True)
    entering, d_state = _across(d_left, *last, reverse=True)
    return dh + product * entering, d_state


def _put(buffer, tile, start):
    return jax.lax.dynamic_update_slice_in_dim(buffer, _tokens(tile).astype(buffer.dtype), start, axis=1)


def _forward(x, dt, A, B, C, D, initial_state, numbers, chunk, *, read=True, keep=False):
    """((y if `read`, final state), state entering each chunk [N, B, D, N] if `keep`)."""

    def step(carry, start):
        state, y = carry
        xc, dtc, Bc, Cc, goes_on = _chunk((x, dt, B, C), numbers, start, chunk, A.dtype)
        h, _, left, _ = _states(dtc * xc, dtc, Bc, goes_on, A, state)
        if read:
            y = _put(y, (h * Cc[..., None, :]).sum(-1) + D * xc, start)
        return (left, y), state if keep else None

    starts = jnp.arange(0, x.shape[1], chunk)
    (state, y), kept = jax.lax.scan(step, (initial_state, jnp.zeros_like(x) if read else None), starts)
    return (y, state), kept


def _backward(x, dt, A, B, C, D, numbers, kept, dy, d_final, chunk):
    def step(carry, scanned):
        d_left, dx, ddt, dB, dC, dA, dD = carry
        start, state = scanned
        xc, dtc, Bc, Cc, dyc, goes_on = _chunk((x, dt, B, C, dy), numbers, start, chunk, A.dtype)
        u = dtc * xc
        h, entering, _, decay = _states(u, dtc, Bc, goes_on, A, state, keep_decay=True)
        dh, d_state = _gradients_of_states(dyc, Cc, decay, d_left)
        before = jnp.concatenate([entering[None], h[:-1]], axis=0)
        d_exponent = dh * decay * before
        du = (dh * Bc[..., None, :]).sum(-1)
        new = (
            _put(dx, dtc * du + D * dyc, start),
            _put(ddt, xc * du + (d_exponent * A).sum(-1), start),
            _put(dB, (u[..., None] * dh).sum(-2), start),
            _put(dC, (dyc[..., None] * h).sum(-2), start),
            dA + (d_exponent * dtc[..., None]).sum((0, 1, 2)),
            dD + (xc * dyc).sum((0, 1, 2)),
        )
        return (d_state, *new), None

    carry = (d_final, *(jnp.zeros_like(y) for y in (x, dt, B, C, A, D)))
    scanned = (jnp.arange(0, x.shape[1], chunk), kept)
    (d_initial, dx, ddt, dB, dC, dA, dD), _ = jax.lax.scan(step, carry, scanned, reverse=True)
    return dx, ddt, dA, dB, dC, dD, d_initial


@partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _op(x, dt, A, B, C, D, initial_state, numbers, chunk, residuals):
    return _forward(x, dt, A, B, C, D, initial_state, numbers, chunk)[0]


def _op_fwd(x, dt, A, B, C, D, initial_state, numbers, chunk, residuals):
    keep = residuals == "saved"
    outputs, kept = _forward(x, dt, A, B, C, D, initial_state, numbers, chunk, keep=keep)
    # the initial state is needed only to run the forward again
    return outputs, (x, dt, A, B, C, D, numbers, kept if keep else initial_state)


def _op_bwd(chunk, residuals, kept, cotangents):
    x, dt, A, B, C, D, numbers, states = kept
    if residuals == "inputs":
        _, states = _forward(x, dt, A, B, C, D, states, numbers, chunk, read=False, keep=True)
    return *_backward(x, dt, A, B, C, D, numbers, states, *cotangents, chunk), None


_op.defvjp(_op_fwd, _op_bwd)


def selective_scan(x, dt, A, B, C, D, initial_state, segment_ids, chunk, residuals):
    """Arguments as in api.selective_scan; segment_ids may be None. Any T: the tail is padded with empty tokens."""
    length = x.shape[1]
    padding = -length % chunk
    numbers = document_numbers(segment_ids, padding)
    # dt = 0 writes nothing and keeps the state
    x, dt, B, C = (pad_tokens(y, padding) for y in (x, dt, B, C))
    y, state = _op(x, dt, A, B, C, D, initial_state, numbers, chunk, residuals)
    return y[:, :length], state
