"""The gradients of every chunk of 64 tokens in one kernel, for heads of at most 128 key columns.

With S the state entering the chunk and dS' the gradient of the one leaving it,

    M1 = scale D . (dO rho^T)          M2 = -strict(D . (dV rho^T))          H = M1 . Q K^T + M2 . K K^T
    dQ = scale gamma (dO S^T) + (M1 beta) K
    dK = -gamma (dV S^T) + beta r (rho dS'^T) + (M2 beta) K + (M1 beta)^T Q + (M2 beta)^T K
    dbeta_j = sum_i H_ij + k_j . (r rho dS'^T)_j
    dg_m = sum_{i >= m} dG_i,  dG_i = sum_j H_ij beta_j - beta_i sum_j H_ji + q_i . (scale gamma dO S^T)_i
                                      - k_i . (gamma dV S^T)_i - beta_i k_i . (r rho dS'^T)_i,
    and the chunk's last dG takes sum_j beta_j k_j . (r rho dS'^T)_j + gamma_C <S, dS'> besides

The diagonal of H is in dbeta alone: in dG its row and column cancel. M1^T and M2^T are products of their own: a
transposed accumulator must not feed a product (some Triton releases miscompile it on Hopper).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule.triton_prepare import CHUNK, pair_decay, square
from pallas_kernels.triton_dialect import BlockSpec


def over_values(V, block_v, step, carry):
    """carry after step(carry, columns) for every tile of value columns."""
    width, count, rest = triton.full_and_rest(V, block_v)
    carry = jax.lax.fori_loop(0, count, lambda i, carry: step(carry, triton.ds(i * width, width)), carry)
    for start, wide, _ in rest:
        carry = step(carry, triton.ds(start, wide))
    return carry


def chunks(
    q, k, g, beta, runs, do, dv, rho, kept, d_kept, *, scale, dtype, block_v, key_tile, warps, stages, interpret
):  # fmt: skip
    """(dq, dk [B,T,Hv,K] of `dtype`, per value head; dg, dbeta [B,Hv,T] fp32).

    q, k [B,T,H,K], do, dv, rho [B,T,Hv,V] bf16; g, beta [B,Hv,T]; runs ([B,T], [B,T/64]) or None; kept, d_kept
    [B,Hv,T/64,V,K] bf16: the state entering each chunk and the gradient of the one leaving it. K is a power of two.
    """
    B, T, H, K = q.shape
    Hv, V = rho.shape[2:]

    def gdn_chunks(q_ref, k_ref, g_ref, beta_ref, do_ref, dv_ref, rho_ref, kept_ref, d_kept_ref, *others):
        *run_refs, dq_ref, dk_ref, dg_ref, dbeta_ref = others
        rows, keys = triton.ds(0, CHUNK), triton.ds(0, K)
        g, b = g_ref[...], beta_ref[...]
        total = jnp.cumsum(g)
        last = jnp.sum(g)
        gamma, leaving, through = triton.exp(total, interpret), triton.exp(last - total, interpret), jnp.exp(last)
        same = None
        if runs is not None:
            here, before = run_refs[0][...], run_refs[1][0]
            newest, same = jnp.max(here), here[:, None] == here[None, :]
            gamma = jnp.where(here == before, gamma, 0.0)
            leaving = jnp.where(here == newest, leaving, 0.0)
            through = jnp.where(newest == before, through, 0.0)
        after = square(0) - square(1)  # rows after columns
        lower, upper = after >= 0, after <= 0
        if same is not None:
            lower, upper = lower & same, upper & same

        def products(late_do, values):
            do, dv, rho = do_ref[rows, values], dv_ref[rows, values], rho_ref[rows, values]
            if late_do:
                return triton.dot(do, rho.T), triton.dot(dv, rho.T)
            return triton.dot(rho, do.T), triton.dot(rho, dv.T)

        def pairs(late_do):
            def step(sums, values):
                return tuple(x + y for x, y in zip(sums, products(late_do, values), strict=True))

            return over_values(V, block_v, step, (jnp.zeros((CHUNK, CHUNK), jnp.float32),) * 2)

        m1_t, m2_t = pairs(False)
        decay = pair_decay(-total, -total, upper, interpret) * b[:, None]
        m1_t = (scale * decay * m1_t).astype(jnp.bfloat16)
        m2_t = (jnp.where(after < 0, -decay, 0.0) * m2_t).astype(jnp.bfloat16)
        m1, m2 = pairs(True)
        decay = pair_decay(total, total, lower, interpret)
        m1, m2 = scale * decay * m1, jnp.where(after > 0, -decay, 0.0) * m2
        h = m1 * triton.dot(q_ref[rows, keys], k_ref[rows, keys].T)
        m1 = (m1 * b[None, :]).astype(jnp.bfloat16)
        h += m2 * triton.dot(k_ref[rows, keys], k_ref[rows, keys].T)
        m2 = (m2 * b[None, :]).astype(jnp.bfloat16)
        d_beta = jnp.sum(h, axis=0)
        h = jnp.where(after > 0, h, 0.0)
        d_total = jnp.sum(h * b[None, :], axis=1) - b * jnp.sum(h, axis=0)

        d_written, inner = jnp.zeros((CHUNK,), jnp.float32), jnp.zeros((), jnp.float32)
        for start, width, _ in triton.tiles(K, key_tile):
            columns = triton.ds(start, width)

            def states(sums, values, columns=columns):
                asked, read, written, inner = sums
                state, d_state = kept_ref[values, columns], d_kept_ref[values, columns]
                both = state.astype(jnp.float32) * d_state.astype(jnp.float32)
                asked, read = (
                    asked + triton.dot(do_ref[rows, values], state),
                    read + triton.dot(dv_ref[rows, values], state),
                )
                return asked, read, written + triton.dot(rho_ref[rows, values], d_state), inner + jnp.sum(both, axis=0)

            zero, none = jnp.zeros((CHUNK, width), jnp.float32), jnp.zeros((width,), jnp.float32)
            asked, read, written, own_inner = over_values(V, block_v, states, (zero, zero, zero, none))
            inner += jnp.sum(own_inner)
            query, key = q_ref[rows, columns], k_ref[rows, columns]
            asked, read = (scale * gamma)[:, None] * asked, -gamma[:, None] * read
            d_total += jnp.sum(query.astype(jnp.float32) * asked, axis=1)
            dq_ref[rows, columns] = (asked + triton.dot(m1, key)).astype(dq_ref.dtype)
            d_total += jnp.sum(key.astype(jnp.float32) * read, axis=1)
            written = leaving[:, None] * written
            d_written += jnp.sum(key.astype(jnp.float32) * written, axis=1)
            dk = read + b[:, None] * written + triton.dot(m2, key)
            dk_ref[rows, columns] = (dk + triton.dot(m2_t, key) + triton.dot(m1_t, query)).astype(dk_ref.dtype)
        d_total -= b * d_written
        dbeta_ref[...] = d_beta + d_written
        ends = jnp.sum(b * d_written) + through * inner
        dg_ref[...] = jnp.sum(jnp.where(after >= 0, d_total[:, None], 0.0), axis=0) + ends

    key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, jax.lax.div(h, Hv // H), 0))
    d_key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, h, 0))
    value = BlockSpec((None, CHUNK, None, V), lambda n, h, b: (b, n, h, 0))
    gate = BlockSpec((None, None, CHUNK), lambda n, h, b: (b, h, n))
    state = BlockSpec((None, None, None, V, K), lambda n, h, b: (b, h, n, 0, 0))
    documents, document_specs = () if runs is None else runs, ()
    if runs is not None:
        document_specs = (
            BlockSpec((None, CHUNK), lambda n, h, b: (b, n)),
            BlockSpec((None, 1), lambda n, h, b: (b, n)),
        )
    key_shape, gate_shape = jax.ShapeDtypeStruct((B, T, Hv, K), dtype), jax.ShapeDtypeStruct((B, Hv, T), jnp.float32)
    return triton.call(
        gdn_chunks, q, k, g, beta, do, dv, rho, kept, d_kept, *documents,
        grid=(T // CHUNK, Hv, B),
        in_specs=[key, key, gate, gate, value, value, value, state, state, *document_specs],
        out_specs=[d_key, d_key, gate, gate], out_shape=[key_shape, key_shape, gate_shape, gate_shape],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip
