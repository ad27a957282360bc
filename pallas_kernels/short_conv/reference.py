"""Short causal convolution, token by token: the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import document_starts


def step(x, weight, bias, activation, l2norm, state):
    """One token: x [B, C], weight [W, C], state [B, W-1, C] of the inputs before it; (y, the state after it)."""
    window = jnp.concatenate([state, x[:, None]], axis=1)
    z = (weight * window).sum(axis=1)
    if bias is not None:
        z = z + bias
    a = jax.nn.silu(z) if activation == "silu" else z
    if l2norm is not None:
        parts = a.reshape(len(a), a.shape[-1] // l2norm, l2norm)
        a = (parts / jnp.sqrt((parts * parts).sum(-1, keepdims=True) + 1e-6)).reshape(a.shape)
    return a, window[:, 1:]


def short_conv(x, weight, bias, initial_state, segment_ids, activation, l2norm):
    """lax.scan of `step` over T in max(fp32, x's dtype); arguments as in api.short_conv.

    bias, segment_ids and l2norm may be None.
    Memory of its gradient grows with T x W x C: for tests, not for training.
    """
    compute = jnp.promote_types(jnp.float32, x.dtype)
    weight, bias = weight.astype(compute), None if bias is None else bias.astype(compute)
    starts = jnp.zeros(x.shape[:2], bool) if segment_ids is None else document_starts(segment_ids)

    def scan_step(state, token):
        x, start = token
        y, state = step(x, weight, bias, activation, l2norm, jnp.where(start[:, None, None], 0, state))
        return state, y

    tokens = jnp.moveaxis(x.astype(compute), 1, 0), jnp.moveaxis(starts, 1, 0)
    state, y = jax.lax.scan(scan_step, initial_state.astype(compute), tokens)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), state.astype(x.dtype)
