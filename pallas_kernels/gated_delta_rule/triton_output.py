"""The outputs of 128 tokens from the state that entered them and their prediction errors, all blocks at once.

o = scale gamma (Q S) + scale D . (Q K^T) (beta rho)
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule.triton_prepare import pair_decay
from pallas_kernels.gated_delta_rule.triton_state import BLOCK
from pallas_kernels.triton_dialect import BlockSpec


def value_tiles(V, block_v):
    """(columns of a tile, how many of them a loop takes, tiles of what is left)."""
    block_v = min(block_v, V)
    loop = V // block_v
    rest = triton.tiles(V - loop * block_v, block_v) if V % block_v else ()
    return block_v, loop, tuple((loop * block_v + start, width, fresh) for start, width, fresh in rest)


def gates(g_ref, run_refs, size):
    """(D, gamma, r, gamma_C) of the `size` tokens of a program, fp32."""
    runs = None if not run_refs else run_refs[0][...]
    g = g_ref[...]
    total, decay = pair_decay(g, runs, size)
    last = jnp.sum(g)
    gamma, leaving, through = jnp.exp(total), jnp.exp(last - total), jnp.exp(last)
    if runs is not None:
        before = run_refs[1][0]
        gamma = jnp.where(runs == before, gamma, 0.0)
        leaving = jnp.where(runs == jnp.max(runs), leaving, 0.0)
        through = jnp.where(jnp.max(runs) == before, through, 0.0)
    return decay, gamma, leaving, through


def run_specs(runs):
    """Block specs of (runs, before) over grid (block, head, batch)."""
    if runs is None:
        return ()
    return BlockSpec((None, BLOCK), lambda n, h, b: (b, n)), BlockSpec((None, 1), lambda n, h, b: (b, n))


def output(q, k, g, beta, runs, before, rho, kept, *, scale, block_v, key_tile, warps, stages, interpret):
    """o [B,T,Hv,V] bf16.

    q, k [B,T,H,K], rho [B,T,Hv,V] bf16; g, beta [B,Hv,T]; kept [B,Hv,T/128,V,K] the state entering each block; runs
    [B,T] and before [B,T/128] number documents as in prepare, at blocks of 128.
    """
    B, T, H, K = q.shape
    Hv, V = rho.shape[2:]
    group = Hv // H
    columns = triton.tiles(K, key_tile)
    block_v, loop, rest = value_tiles(V, block_v)

    def gdn_output(q_ref, k_ref, g_ref, beta_ref, rho_ref, kept_ref, *others):
        *run_refs, o_ref = others
        rows = triton.ds(0, BLOCK)
        decay, gamma, _, _ = gates(g_ref, run_refs, BLOCK)
        queries = [triton.load_own(q_ref, rows, tile) for tile in columns]
        pairs = jnp.zeros((BLOCK, BLOCK), jnp.float32)
        for query, tile in zip(queries, columns, strict=True):
            pairs += triton.dot(query, triton.load_own(k_ref, rows, tile).T)
        attention = (scale * decay * pairs * beta_ref[...][None, :]).astype(jnp.bfloat16)
        read = (scale * gamma)[:, None]

        def part(values):
            own = jnp.zeros((BLOCK, values.size), jnp.float32)
            for query, (start, width, _) in zip(queries, columns, strict=True):
                own += triton.dot(query, kept_ref[values, start : start + width].T)
            o_ref[rows, values] = (read * own + triton.dot(attention, rho_ref[rows, values])).astype(jnp.bfloat16)

        jax.lax.fori_loop(0, loop, lambda i, _: part(triton.ds(i * block_v, block_v)), None)
        for start, width, _ in rest:
            part(triton.ds(start, width))

    key = BlockSpec((None, BLOCK, None, K), lambda n, h, b: (b, n, h // group, 0))
    value = BlockSpec((None, BLOCK, None, V), lambda n, h, b: (b, n, h, 0))
    gate = BlockSpec((None, None, BLOCK), lambda n, h, b: (b, h, n))
    state = BlockSpec((None, None, None, V, K), lambda n, h, b: (b, h, n, 0, 0))
    documents = () if runs is None else (runs, before)
    (o,) = triton.call(
        gdn_output, q, k, g, beta, rho, kept, *documents,
        grid=(T // BLOCK, Hv, B), in_specs=[key, key, gate, gate, value, state, *run_specs(runs)], out_specs=[value],
        out_shape=[jax.ShapeDtypeStruct(rho.shape, jnp.bfloat16)], warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip
    return o
