"""The gated delta rule as Triton kernels: which sizes, which configuration, and the stages put together.

forward   prepare (chunks of 64, parallel) -> state (serial) -> output (blocks of 128, parallel)
backward  reverse (serial) -> pairs, gradients (blocks of 128, parallel)
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule import triton_gradients, triton_output, triton_prepare, triton_state
from pallas_kernels.gated_delta_rule.reference import document_starts
from pallas_kernels.gated_delta_rule.triton_prepare import CHUNK
from pallas_kernels.gated_delta_rule.triton_state import BLOCK

SIZES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (192, 384), (200, 400), (256, 256), (256, 512))

CONFIG = {
    "prepare": {"key_tile": 64, "warps": 4, "stages": 1},
    "state": {"block_v": 64, "key_tile": 64, "warps": 4, "stages": 2},
    "output": {"block_v": 64, "key_tile": 256, "warps": 8, "stages": 3},
    "reverse": {"block_v": 128, "key_tile": 256, "warps": 8, "stages": 2},
    "pairs": {"block_v": 64, "key_tile": 64, "warps": 8, "stages": 2},
    "queries": {"block_v": 64, "key_tile": 256, "warps": 8, "stages": 3},
    "keys": {"block_v": 64, "key_tile": 128, "warps": 8, "stages": 3},
}


def why_not(key_dim: int, value_dim: int, chunk: int, *, interpret: bool) -> str | None:
    """The reason the kernels cannot run, or None."""
    if (key_dim, value_dim) not in SIZES:
        known = ", ".join(f"{k}x{v}" for k, v in SIZES)
        return f"there is no kernel for key x value dimensions {key_dim}x{value_dim} (there is for {known})"
    if chunk != CHUNK:
        return f"the kernels solve {CHUNK} tokens at once, not {chunk}"
    return None if interpret else triton.why_not_here()


def _heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def _before(runs, size):
    """The document that enters each tile of `size` tokens; the first tile is entered by document 0."""
    return jnp.pad(runs, ((0, 0), (1, 0)))[:, : runs.shape[1] : size]


def _states(q, k, v, g, beta, initial_state, runs, scale, interpret):
    """What a token's outputs and gradients are made of: rho, states kept and final, and the chunks' preparation."""
    before = None if runs is None else _before(runs, CHUNK)
    inverse, attention, gamma, write = triton_prepare.prepare(
        q, k, g, beta, runs, before, scale=scale, interpret=interpret, **CONFIG["prepare"]
    )
    rho, kept, final = triton_state.forward(
        k, v, gamma, write, inverse, initial_state, interpret=interpret, **CONFIG["state"]
    )
    return rho, kept, final, (inverse, attention, gamma, write)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _op(q, k, v, g, beta, initial_state, runs, scale, residuals, interpret):
    return _op_fwd(q, k, v, g, beta, initial_state, runs, scale, residuals, interpret)[0]


def _op_fwd(q, k, v, g, beta, initial_state, runs, scale, residuals, interpret):
    g, beta = _heads_first(g), _heads_first(beta)
    rho, kept, final, prepared = _states(q, k, v, g, beta, initial_state, runs, scale, interpret)
    before = None if runs is None else _before(runs, BLOCK)
    o = triton_output.output(
        q, k, g, beta, runs, before, rho, kept, scale=scale, interpret=interpret, **CONFIG["output"]
    )
    if residuals == "saved":
        return (o, final), (q, k, None, g, beta, None, runs, (rho, kept, prepared))
    return (o, final), (q, k, v, g, beta, initial_state, runs, None)


def _op_bwd(scale, residuals, interpret, saved, cotangents):
    q, k, v, g, beta, initial_state, runs, states = saved
    if states is None:
        rho, kept, _, prepared = _states(q, k, v, g, beta, initial_state, runs, scale, interpret)
    else:
        rho, kept, prepared = states
    inverse, attention, gamma, write = prepared
    do, d_final = cotangents
    before = None if runs is None else _before(runs, BLOCK)
    dv, d_kept, d_initial = triton_state.reverse(
        q, k, do, gamma, write, inverse, attention, d_final, scale=scale, interpret=interpret, **CONFIG["reverse"]
    )
    m1, m2, dg, dbeta = triton_gradients.pairs(
        q, k, g, beta, runs, before, do, dv, rho, scale=scale, interpret=interpret, **CONFIG["pairs"]
    )
    group = dv.shape[2] // q.shape[2]
    dtype = jnp.bfloat16 if group == 1 else jnp.float32
    dq, dg = triton_gradients.queries(
        q, k, g, runs, before, do, kept, m1, dg, scale=scale, dtype=dtype, interpret=interpret, **CONFIG["queries"]
    )
    dk, dg, dbeta = triton_gradients.keys(
        q, k, g, beta, runs, before, dv, rho, kept, d_kept, m1, m2, dg, dbeta,
        dtype=dtype, interpret=interpret, **CONFIG["keys"],
    )  # fmt: skip
    if group > 1:
        dq, dk = (x.reshape(*q.shape[:3], group, -1).sum(3).astype(jnp.bfloat16) for x in (dq, dk))
    dg, dbeta = _heads_first(dg), _heads_first(dbeta)
    return dq, dk, dv, dg, dbeta, d_initial, None


_op.defvjp(_op_fwd, _op_bwd)


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, scale, residuals, interpret):
    """Arguments as in api.gated_delta_rule; initial_state and segment_ids may be None. Any T."""
    T = q.shape[1]
    dtype, padding = v.dtype, -T % BLOCK
    runs = None
    if segment_ids is not None:
        runs = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
        runs = jnp.pad(runs, ((0, 0), (0, padding)), mode="edge")
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    g, beta = (x.astype(jnp.float32) for x in (g, beta))
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    if padding:  # k = v = beta = g = 0 writes nothing and keeps the state
        q, k, v, g, beta = (jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) for x in (q, k, v, g, beta))
    o, state = _op(q, k, v, g, beta, initial_state, runs, scale, residuals, interpret)
    return o[:, :T].astype(dtype), state
