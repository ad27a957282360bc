"""RMS norm with a SiLU gate, one vector at a time: the oracle every other implementation is tested against."""

import jax
import jax.numpy as jnp


def _vector(x, weight, gate, eps, gate_first, groups):
    """x, weight, gate [D], all of one dtype."""
    opened = 1.0 if gate is None else jax.nn.silu(gate)
    if gate_first:
        x = x * opened
    normed = jnp.concatenate([part / jnp.sqrt((part * part).mean() + eps) for part in jnp.split(x, groups)])
    return weight * normed * (1.0 if gate_first else opened)


def gated_norm(x, weight, gate, eps, gate_first, groups):
    """_vector for every place of x in max(fp32, x's dtype), with JAX's gradient; arguments as in api.gated_norm."""
    compute = jnp.promote_types(jnp.float32, x.dtype)
    x_, weight, gate = (None if y is None else y.astype(compute) for y in (x, weight, gate))
    rows = [None if y is None else y.reshape(-1, x.shape[-1]) for y in (x_, gate)]
    vector = lambda x, gate: _vector(x, weight, gate, eps, gate_first, groups)  # noqa: E731
    return jax.vmap(vector)(*rows).reshape(x.shape).astype(x.dtype)
