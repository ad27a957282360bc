"""RMS norm with a SiLU gate in plain JAX, forward and backward; each is one pass that XLA fuses.

With s = SiLU(gate), r = 1 / sqrt(mean(u^2) + eps) and n = r u, means over a group:

    gate after    u = x        y = weight n s      dn = dy weight s      ds = dy weight n
    gate first    u = x s      y = weight n        dn = dy weight        ds = x du          dx = s du
    both          du = r (dn - n mean(dn n))       dgate = ds SiLU'(gate)

Kept between the passes are the inputs and r, one number a group, where autodiff would keep n, s and more in fp32.
"""

from functools import partial

import jax
import jax.numpy as jnp


def _mean(x, groups):
    """The mean of every group, [..., groups, 1]."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups).mean(-1, keepdims=True)


def _by_group(x, factor):
    """x [..., D] times its group's factor [..., groups, 1]."""
    return (x.reshape(*factor.shape[:-1], x.shape[-1] // factor.shape[-2]) * factor).reshape(x.shape)


def _exact(x, *others):
    """All arrays in the dtype of the arithmetic for x."""
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    return (None if y is None else y.astype(dtype) for y in (x, *others))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def gated_norm(x, weight, gate, eps, gate_first, groups):
    """Arguments as in api.gated_norm."""
    return _forward(x, weight, gate, eps, gate_first, groups)[0]


def _forward(x, weight, gate, eps, gate_first, groups):
    dtype = x.dtype
    u, w, z = _exact(x, weight, gate)
    opened = None if gate is None else jax.nn.silu(z)
    if gate is not None and gate_first:
        u = u * opened
    r = jax.lax.rsqrt(_mean(jnp.square(u), groups) + eps)
    y = _by_group(u, r) * w
    if gate is not None and not gate_first:
        y = y * opened
    return y.astype(dtype), (x, weight, gate, r)


def _backward(eps, gate_first, groups, kept, dy):
    x, weight, gate, r = kept
    u, w, z, dy = _exact(x, weight, gate, dy)
    if gate is None:
        sigmoid = opened = None
    else:
        sigmoid = jax.nn.sigmoid(z)
        opened = z * sigmoid
    if gate is not None and gate_first:
        u = u * opened
    n = _by_group(u, r)
    d_scaled = dy if gate is None or gate_first else dy * opened  # of weight n
    dn = d_scaled * w
    du = _by_group(dn - _by_group(n, _mean(dn * n, groups)), r)
    d_weight = (d_scaled * n).sum(range(x.ndim - 1)).astype(weight.dtype)
    if gate is None:
        return du.astype(x.dtype), d_weight, None
    d_opened = x.astype(u.dtype) * du if gate_first else dy * w * n
    d_gate = d_opened * sigmoid * (1 + z * (1 - sigmoid))
    dx = du * opened if gate_first else du
    return dx.astype(x.dtype), d_weight, d_gate.astype(gate.dtype)


gated_norm.defvjp(_forward, _backward)
