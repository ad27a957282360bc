"""Linear attention with decay, token by token: the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import document_starts


def step(q, k, v, g, state, scale):
    """One token of the recurrence: decay, write, read out.

    q, k [B, Hv, K]  v [B, Hv, V]  g [B, Hv, 1 or K]  state [B, Hv, K, V], all of one dtype.
    """
    state = jnp.exp(g)[..., None] * state + k[..., :, None] * v[..., None, :]
    return scale * jnp.einsum("bhkv,bhk->bhv", state, q, precision=jax.lax.Precision.HIGHEST), state


def linear_attention(q, k, v, g, initial_state, segment_ids, scale):
    """lax.scan of `step` over T in max(fp32, input dtype); g [B, T, Hv, 1 or K], the rest as in api, all present.

    Memory of its gradient grows with T x K x V: for tests, not for training.
    """
    compute = jnp.promote_types(jnp.float32, v.dtype)
    group = v.shape[2] // q.shape[2]
    by_token = lambda x: jnp.moveaxis(x.astype(compute), 1, 0)  # noqa: E731
    q, k = (jnp.repeat(x, group, axis=2) for x in (q, k))
    starts = jnp.moveaxis(document_starts(segment_ids), 1, 0)

    def scan_step(state, token):
        q, k, v, g, start = token
        state = jnp.where(start[:, None, None, None], 0, state)
        o, state = step(q, k, v, g, state, scale)
        return state, o

    tokens = (*(by_token(x) for x in (q, k, v, g)), starts)
    state, o = jax.lax.scan(scan_step, initial_state.astype(compute), tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
