"""The gated delta rule, token by token: the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import document_starts


def step(q, k, v, g, beta, state, scale):
    """One token of the recurrence (paper eq. 10): decay, read the error, write, read out.

    q, k [B, Hv, K]  v [B, Hv, V]  g, beta [B, Hv]  state [B, Hv, K, V], all of one dtype.
    """
    highest = jax.lax.Precision.HIGHEST
    state = jnp.exp(g)[..., None, None] * state
    error = v - jnp.einsum("bhkv,bhk->bhv", state, k, precision=highest)
    state = state + k[..., :, None] * (beta[..., None] * error)[..., None, :]
    return scale * jnp.einsum("bhkv,bhk->bhv", state, q, precision=highest), state


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, scale):
    """lax.scan of `step` over T in max(fp32, input dtype); arguments as in api.gated_delta_rule, all present.

    Memory of its gradient grows with T x K x V: for tests, not for training.
    """
    compute = jnp.promote_types(jnp.float32, v.dtype)
    group = v.shape[2] // q.shape[2]
    by_token = lambda x: jnp.moveaxis(x.astype(compute), 1, 0)  # noqa: E731
    q, k = (jnp.repeat(x, group, axis=2) for x in (q, k))
    starts = jnp.moveaxis(document_starts(segment_ids), 1, 0)

    def scan_step(state, token):
        q, k, v, g, beta, start = token
        state = jnp.where(start[:, None, None, None], 0, state)
        o, state = step(q, k, v, g, beta, state, scale)
        return state, o

    tokens = (*(by_token(x) for x in (q, k, v, g, beta)), starts)
    state, o = jax.lax.scan(scan_step, initial_state.astype(compute), tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
