"""The gradients of 128 tokens, all blocks at once: first what pairs of tokens share, then q, k, g and beta.

    M1 = scale D . (dO rho^T)          M2 = -strict(D . (dV rho^T))          H = M1 . Q K^T + M2 . K K^T
    dQ = scale gamma (dO S^T) + (M1 beta) K
    dK = -gamma (dV S^T) + beta r (rho dS'^T) + (M2 beta) K + (M1 beta)^T Q + (M2 beta)^T K
    dbeta_j = sum_i H_ij + k_j . (r rho dS'^T)_j
    dg_m = sum_{i >= m} dG_i,  dG_i = sum_j H_ij beta_j - beta_i sum_j H_ji + q_i . (scale gamma dO S^T)_i
                                      - k_i . (gamma dV S^T)_i - beta_i k_i . (r rho dS'^T)_i,
    and the block's last dG takes sum_j beta_j k_j . (r rho dS'^T)_j + gamma_C <S, dS'> besides

The diagonal of H is in dbeta alone: in dG its row and column cancel. M1 beta and M2 beta go through memory, since a
transposed accumulator must not feed a product (some Triton releases miscompile it on Hopper).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule.triton_output import gates, run_specs, value_tiles
from pallas_kernels.gated_delta_rule.triton_state import BLOCK
from pallas_kernels.triton_dialect import BlockSpec


def _specs(K, V, group):
    """Block specs over grid (block, head, batch): key head, value head, gate, pair, state."""
    return (
        BlockSpec((None, BLOCK, None, K), lambda n, h, b: (b, n, h // group, 0)),
        BlockSpec((None, BLOCK, None, V), lambda n, h, b: (b, n, h, 0)),
        BlockSpec((None, None, BLOCK), lambda n, h, b: (b, h, n)),
        BlockSpec((None, None, None, BLOCK, BLOCK), lambda n, h, b: (b, h, n, 0, 0)),
        BlockSpec((None, None, None, V, K), lambda n, h, b: (b, h, n, 0, 0)),
    )


def _over_values(x_ref, y_ref, V, block_v, width, product):
    """Sum over tiles of value columns of product(x_ref, y_ref, columns) [128, width]."""
    block_v, loop, rest = value_tiles(V, block_v)
    total = jnp.zeros((BLOCK, width), jnp.float32)
    step = lambda i, sum_: sum_ + product(x_ref, y_ref, triton.ds(i * block_v, block_v))  # noqa: E731
    total = jax.lax.fori_loop(0, loop, step, total)
    for start, tile_width, _ in rest:
        total += product(x_ref, y_ref, triton.ds(start, tile_width))
    return total


def pairs(q, k, g, beta, runs, before, do, dv, rho, *, scale, block_v, key_tile, warps, stages, interpret):
    """(M1 beta, M2 beta [B,Hv,N,128,128] bf16, the pairs' part of dG and of dbeta [B,Hv,T] fp32).

    q, k [B,T,H,K], do, dv, rho [B,T,Hv,V] bf16; g, beta [B,Hv,T]; runs [B,T] and before [B,N] as in prepare, per 128.
    """
    B, T, H, K = q.shape
    Hv, V = rho.shape[2:]
    columns = triton.tiles(K, key_tile)

    def outer(x_ref, y_ref, values):
        rows = triton.ds(0, BLOCK)
        return triton.dot(x_ref[rows, values], y_ref[rows, values].T)

    def gdn_pairs(q_ref, k_ref, g_ref, beta_ref, do_ref, dv_ref, rho_ref, *others):
        *run_refs, m1_ref, m2_ref, dg_ref, dbeta_ref = others
        rows = triton.ds(0, BLOCK)

        def between(x_ref):
            total = jnp.zeros((BLOCK, BLOCK), jnp.float32)
            for tile in columns:
                total += triton.dot(triton.load_own(x_ref, rows, tile), triton.load_own(k_ref, rows, tile).T)
            return total

        decay, *_ = gates(g_ref, run_refs, BLOCK)
        i = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1)
        b = beta_ref[...]
        m1 = scale * decay * _over_values(do_ref, rho_ref, V, block_v, BLOCK, outer)
        m1_ref[...] = (m1 * b[None, :]).astype(jnp.bfloat16)
        h = m1 * between(q_ref)
        m2 = jnp.where(i > j, -decay, 0.0) * _over_values(dv_ref, rho_ref, V, block_v, BLOCK, outer)
        m2_ref[...] = (m2 * b[None, :]).astype(jnp.bfloat16)
        h += m2 * between(k_ref)
        dbeta_ref[...] = jnp.sum(h, axis=0)
        h = jnp.where(i > j, h, 0.0)
        dg_ref[...] = jnp.sum(h * b[None, :], axis=1) - b * jnp.sum(h, axis=0)

    key, value, gate, pair, _ = _specs(K, V, Hv // H)
    documents = () if runs is None else (runs, before)
    pair_shape = jax.ShapeDtypeStruct((B, Hv, T // BLOCK, BLOCK, BLOCK), jnp.bfloat16)
    gate_shape = jax.ShapeDtypeStruct((B, Hv, T), jnp.float32)
    return triton.call(
        gdn_pairs, q, k, g, beta, do, dv, rho, *documents,
        grid=(T // BLOCK, Hv, B), in_specs=[key, key, gate, gate, value, value, value, *run_specs(runs)],
        out_specs=[pair, pair, gate, gate], out_shape=[pair_shape, pair_shape, gate_shape, gate_shape],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip


def queries(
    q, k, g, runs, before, do, kept, m1, dg_pairs, *, scale, dtype, block_v, key_tile, warps, stages, interpret
):
    """(dq [B,T,Hv,K] of `dtype`, per value head, dG of pairs and reads [B,Hv,T] fp32).

    kept [B,Hv,N,V,K]: the state entering each block; m1 and dg_pairs from `pairs`.
    """
    B, T, H, K = q.shape
    Hv, V = do.shape[2:]
    columns = triton.tiles(K, key_tile)

    def gdn_queries(q_ref, k_ref, g_ref, do_ref, kept_ref, m1_ref, dg_pairs_ref, *others):
        *run_refs, dq_ref, dg_ref = others
        rows = triton.ds(0, BLOCK)
        _, gamma, *_ = gates(g_ref, run_refs, BLOCK)
        dg = dg_pairs_ref[...]
        for tile in columns:
            read = (scale * gamma)[:, None] * _over_values(do_ref, kept_ref, V, block_v, tile[1], _through(tile))
            dg += jnp.sum(triton.load_own(q_ref, rows, tile).astype(jnp.float32) * read, axis=1)
            dq = read + triton.dot(m1_ref[...], triton.load_own(k_ref, rows, tile))
            triton.store_own(dq_ref, rows, tile, dq)
        dg_ref[...] = dg

    key, value, gate, pair, state = _specs(K, V, Hv // H)
    d_key = BlockSpec((None, BLOCK, None, K), lambda n, h, b: (b, n, h, 0))
    documents = () if runs is None else (runs, before)
    return triton.call(
        gdn_queries, q, k, g, do, kept, m1, dg_pairs, *documents,
        grid=(T // BLOCK, Hv, B), in_specs=[key, key, gate, value, state, pair, gate, *run_specs(runs)],
        out_specs=[d_key, gate],
        out_shape=[jax.ShapeDtypeStruct((B, T, Hv, K), dtype), jax.ShapeDtypeStruct((B, Hv, T), jnp.float32)],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip


def keys(
    q, k, g, beta, runs, before, dv, rho, kept, d_kept, m1, m2, dg_read, dbeta_pairs,
    *, dtype, block_v, key_tile, warps, stages, interpret,
):  # fmt: skip
    """(dk [B,T,Hv,K] of `dtype`, per value head, dg, dbeta [B,Hv,T] fp32).

    d_kept [B,Hv,N,V,K]: the gradient of the state leaving each block; dg_read from `queries`, the rest as there.
    """
    B, T, H, K = q.shape
    Hv, V = rho.shape[2:]
    columns = triton.tiles(K, key_tile)

    def gdn_keys(q_ref, k_ref, g_ref, beta_ref, dv_ref, rho_ref, kept_ref, d_kept_ref, m1_ref, m2_ref, dg_read_ref,
                 dbeta_pairs_ref, *others):  # fmt: skip
        *run_refs, dk_ref, dg_ref, dbeta_ref = others
        rows = triton.ds(0, BLOCK)
        _, gamma, leaving, through = gates(g_ref, run_refs, BLOCK)
        b = beta_ref[...]
        d_total = dg_read_ref[...]
        d_written = jnp.zeros((BLOCK,), jnp.float32)
        inner = jnp.zeros((), jnp.float32)
        for tile in columns:
            written = leaving[:, None] * _over_values(rho_ref, d_kept_ref, V, block_v, tile[1], _through(tile))
            read = -gamma[:, None] * _over_values(dv_ref, kept_ref, V, block_v, tile[1], _through(tile))
            key = triton.load_own(k_ref, rows, tile)
            d_written += jnp.sum(key.astype(jnp.float32) * written, axis=1)
            d_total += jnp.sum(key.astype(jnp.float32) * read, axis=1)
            dk = b[:, None] * written + read
            dk = dk + triton.dot(m2_ref[...], key)
            dk = dk + triton.dot(m2_ref[...].T, key)
            dk = dk + triton.dot(m1_ref[...].T, triton.load_own(q_ref, rows, tile))
            triton.store_own(dk_ref, rows, tile, dk)
            inner += _inner(kept_ref, d_kept_ref, V, block_v, tile)
        dbeta_ref[...] = dbeta_pairs_ref[...] + d_written
        i = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1)
        d_total -= b * d_written
        last = jnp.sum(b * d_written) + through * inner
        dg_ref[...] = jnp.sum(jnp.where(i >= j, d_total[:, None], 0.0), axis=0) + last

    key, value, gate, pair, state = _specs(K, V, Hv // H)
    d_key = BlockSpec((None, BLOCK, None, K), lambda n, h, b: (b, n, h, 0))
    documents = () if runs is None else (runs, before)
    gate_shape = jax.ShapeDtypeStruct((B, Hv, T), jnp.float32)
    return triton.call(
        gdn_keys, q, k, g, beta, dv, rho, kept, d_kept, m1, m2, dg_read, dbeta_pairs, *documents,
        grid=(T // BLOCK, Hv, B),
        in_specs=[key, key, gate, gate, value, value, state, state, pair, pair, gate, gate, *run_specs(runs)],
        out_specs=[d_key, gate, gate], out_shape=[jax.ShapeDtypeStruct((B, T, Hv, K), dtype), gate_shape, gate_shape],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip


def _through(tile):
    """x S^T for the key columns of `tile`."""
    start, width, _ = tile
    rows = triton.ds(0, BLOCK)
    return lambda x_ref, state_ref, values: triton.dot(x_ref[rows, values], state_ref[values, start : start + width])


def _inner(x_ref, y_ref, V, block_v, tile):
    """<x, y> over the tile's own columns."""

    def product(x_ref, y_ref, values):
        x = triton.load_own(x_ref, values, tile).astype(jnp.float32)
        start, width, _ = tile
        return jnp.sum(x * y_ref[values, start : start + width].astype(jnp.float32))

    block_v, loop, rest = value_tiles(V, block_v)
    step = lambda i, sum_: sum_ + product(x_ref, y_ref, triton.ds(i * block_v, block_v))  # noqa: E731
    total = jax.lax.fori_loop(0, loop, step, jnp.zeros((), jnp.float32))
    for start, width, _ in rest:
        total += product(x_ref, y_ref, triton.ds(start, width))
    return total
