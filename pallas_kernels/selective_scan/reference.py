"""Mamba's selective scan, token by token: the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import document_starts


def step(x, dt, A, B, C, D, state):
    """One token of the recurrence: decay, write, read out.

    x, dt [B, D]  A [D, N]  B, C [B, N]  D [D]  state [B, D, N], all of one dtype.
    """
    state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None, :]
    return (state * C[:, None, :]).sum(-1) + D * x, state


def selective_scan(x, dt, A, B, C, D, initial_state, segment_ids):
    """lax.scan of `step` over T in max(fp32, input dtype); arguments as in api.selective_scan, all present.

    Memory of its gradient grows with T x D x N: for tests, not for training.
    """
    compute = jnp.promote_types(jnp.float32, x.dtype)
    by_token = lambda y: jnp.moveaxis(y.astype(compute), 1, 0)  # noqa: E731
    A, D = A.astype(compute), D.astype(compute)
    starts = jnp.moveaxis(document_starts(segment_ids), 1, 0)

    def scan_step(state, token):
        x, dt, B, C, start = token
        state = jnp.where(start[:, None, None], 0, state)
        y, state = step(x, dt, A, B, C, D, state)
        return state, y

    tokens = (*(by_token(y) for y in (x, dt, B, C)), starts)
    state, y = jax.lax.scan(scan_step, initial_state.astype(compute), tokens)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state
