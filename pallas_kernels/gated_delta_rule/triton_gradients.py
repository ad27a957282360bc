"""The gradients of every block of 128 tokens, all blocks at once, for heads of any size: half as many blocks as in
triton_chunks.py keep half as many states.

    M1 = scale D . (dO rho^T)          M2 = -strict(D . (dV rho^T))          H = M1 . Q K^T + M2 . K K^T
    dQ = scale gamma (dO S^T) + (M1 beta) K
    dK = -gamma (dV S^T) + beta r (rho dS'^T) + (M2 beta) K + (M1 beta)^T Q + (M2 beta)^T K
    dbeta_j = sum_i H_ij + k_j . (r rho dS'^T)_j
    dg_m = sum_{i >= m} dG_i,  dG_i = sum_j H_ij beta_j - beta_i sum_j H_ji + q_i . (scale gamma dO S^T)_i
                                      - k_i . (gamma dV S^T)_i - beta_i k_i . (r rho dS'^T)_i,
    and the block's last dG takes sum_j beta_j k_j . (r rho dS'^T)_j + gamma_C <S, dS'> besides

The diagonal of H is in dbeta alone: in dG its row and column cancel. A block has two halves, and pairs of tokens are in
one of three tiles: both in the first half, late in the second and early in the first, both in the second. M1 beta and
M2 beta go through memory, since a transposed accumulator must not feed a product (some Triton releases miscompile it on
Hopper).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule.triton_chunks import over_values
from pallas_kernels.gated_delta_rule.triton_prepare import CHUNK, pair_decay, square
from pallas_kernels.triton_dialect import BlockSpec

BLOCK = 128
TILES = 3  # of pairs, numbered late half + early half


def pairs(q, k, g, beta, runs, do, dv, rho, *, scale, block_v, key_tile, warps, stages, interpret):
    """(M1 beta, M2 beta [B,Hv,N,128,128] bf16, what pairs add to dG of late tokens and dbeta of early ones
    [B,Hv,N,3,64] fp32); the middle tile's part of dG of early tokens is -beta times its part of dbeta.

    q, k [B,T,H,K], do, dv, rho [B,T,Hv,V] bf16; g, beta [B,Hv,T]; runs ([B,T], [B,N]) or None; N = T/128.
    """
    B, T, H, K = q.shape
    Hv, V = rho.shape[2:]
    width, count, rest = triton.full_and_rest(K, key_tile)
    wide, value_count, value_rest = triton.full_and_rest(V, block_v)

    def gdn_pairs(
        q_ref, late_k_ref, k_ref, late_g_ref, g_ref, late_beta_ref, beta_ref, do_ref, dv_ref, rho_ref, *others
    ):
        *run_refs, m1_ref, m2_ref, dg_ref, dbeta_ref = others
        rows = triton.ds(0, CHUNK)
        same = jax.lax.rem(triton.program_id(0), TILES) != 1
        order = square(0) - square(1)  # how many tokens i is after j, in one half
        allowed = jnp.logical_not(same) | (order >= 0)
        if runs is not None:
            allowed = allowed & (run_refs[0][...][:, None] == run_refs[1][...][None, :])
        early_g, b = g_ref[...], beta_ref[...]
        since = jnp.cumsum(late_g_ref[...])
        until = jnp.cumsum(early_g) - jnp.where(same, 0.0, jnp.sum(early_g))

        def over_value_tile(sums, values):
            early = rho_ref[rows, values].T
            return sums[0] + triton.dot(do_ref[rows, values], early), sums[1] + triton.dot(dv_ref[rows, values], early)

        def over_keys(sums, tile):
            early = triton.load_own(k_ref, rows, tile).T
            qk = sums[0] + triton.dot(triton.load_own(q_ref, rows, tile), early)
            return qk, sums[1] + triton.dot(triton.load_own(late_k_ref, rows, tile), early)

        def over_both(i, sums):
            values, keys = triton.ds(i * wide, wide), (i * width, width, width)
            return *over_value_tile(sums[:2], values), *over_keys(sums[2:], keys)

        zero = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        both = min(count, value_count)
        m1, m2, qk, kk = jax.lax.fori_loop(0, both, over_both, (zero,) * 4)
        sums = m1, m2
        sums = jax.lax.fori_loop(both, value_count, lambda i, x: over_value_tile(x, triton.ds(i * wide, wide)), sums)
        for start, own_width, _ in value_rest:
            sums = over_value_tile(sums, triton.ds(start, own_width))
        m1, m2 = sums
        sums = qk, kk
        sums = jax.lax.fori_loop(both, count, lambda i, x: over_keys(x, (i * width, width, width)), sums)
        for tile in rest:
            sums = over_keys(sums, tile)
        qk, kk = sums
        decay = pair_decay(since, until, allowed, interpret)
        strict = jnp.logical_not(same) | (order > 0)
        m1 = scale * decay * m1
        m2 = jnp.where(strict, -decay * m2, 0.0)
        number = jax.lax.rem(triton.program_id(0), TILES)
        late = triton.ds(jax.lax.div(number + 1, 2) * CHUNK, CHUNK)
        early = triton.ds(jax.lax.div(number, 2) * CHUNK, CHUNK)
        m1_ref[late, early] = (m1 * b[None, :]).astype(jnp.bfloat16)
        m2_ref[late, early] = (m2 * b[None, :]).astype(jnp.bfloat16)

        @triton.when(number == 1)
        def future():
            for m_ref in (m1_ref, m2_ref):
                m_ref[triton.ds(0, CHUNK), triton.ds(CHUNK, CHUNK)] = jnp.zeros((CHUNK, CHUNK), jnp.bfloat16)

        h = m1 * qk + m2 * kk
        dbeta_ref[...] = jnp.sum(h, axis=0)
        h = jnp.where(strict, h, 0.0)
        own = jnp.where(same, late_beta_ref[...] * jnp.sum(h, axis=0), 0.0)
        dg_ref[...] = jnp.sum(h * b[None, :], axis=1) - own

    block = lambda x: jax.lax.div(x, TILES)  # noqa: E731
    late = lambda x: 2 * block(x) + jax.lax.div(jax.lax.rem(x, TILES) + 1, 2)  # noqa: E731
    early = lambda x: 2 * block(x) + jax.lax.div(jax.lax.rem(x, TILES), 2)  # noqa: E731
    key = lambda at: BlockSpec((None, CHUNK, None, K), lambda x, h, b: (b, at(x), jax.lax.div(h, Hv // H), 0))  # noqa: E731
    value = lambda at: BlockSpec((None, CHUNK, None, V), lambda x, h, b: (b, at(x), h, 0))  # noqa: E731
    gate = lambda at: BlockSpec((None, None, CHUNK), lambda x, h, b: (b, h, at(x)))  # noqa: E731
    run = lambda at: BlockSpec((None, CHUNK), lambda x, h, b: (b, at(x)))  # noqa: E731
    documents, document_specs = (), ()
    if runs is not None:
        documents, document_specs = (runs[0], runs[0]), (run(late), run(early))
    tile = lambda x: jax.lax.rem(x, TILES)  # noqa: E731
    pair = BlockSpec((None, None, None, BLOCK, BLOCK), lambda x, h, b: (b, h, block(x), 0, 0))
    sums = BlockSpec((None, None, None, None, CHUNK), lambda x, h, b: (b, h, block(x), tile(x), 0))
    pair_shape = jax.ShapeDtypeStruct((B, Hv, T // BLOCK, BLOCK, BLOCK), jnp.bfloat16)
    sum_shape = jax.ShapeDtypeStruct((B, Hv, T // BLOCK, TILES, CHUNK), jnp.float32)
    return triton.call(
        gdn_pairs, q, k, k, g, g, beta, beta, do, dv, rho, *documents,
        grid=(TILES * (T // BLOCK), Hv, B),
        in_specs=[key(late), key(late), key(early), gate(late), gate(early), gate(late), gate(early), value(late),
                  value(late), value(early), *document_specs],
        out_specs=[pair, pair, sums, sums], out_shape=[pair_shape, pair_shape, sum_shape, sum_shape],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip


def tokens(
    q, k, g, beta, runs, do, dv, rho, kept, d_kept, m1, m2,
    *, scale, dtype, block_v, key_tile, pair_tile, warps, stages, interpret,
):  # fmt: skip
    """(dq, dk [B,T,Hv,K] of `dtype`, per value head; what reads of the state add to dG and k . (r rho dS'^T)
    [tiles,B,Hv,T] and gamma_C <S, dS'> [tiles,B,Hv,N] fp32, each sum over its own tile of key columns).

    A program makes a tile of key columns for a block. kept and d_kept [B,Hv,N,V,K]: the state entering each block and
    the gradient of the one leaving it; m1, m2 and runs as in `pairs`.
    """
    B, T, H, K = q.shape
    Hv, V = rho.shape[2:]
    _, count, rest = triton.full_and_rest(K, key_tile)
    tiles = count + len(rest)

    def gdn_tokens(
        q_ref, k_ref, g_ref, beta_ref, do_ref, dv_ref, rho_ref, kept_ref, d_kept_ref, m1_ref, m2_ref, *others
    ):  # fmt: skip
        *run_refs, dq_ref, dk_ref, read_ref, written_ref, inner_ref = others
        rows = triton.ds(0, BLOCK)

        def body(tile):
            start, width, fresh = tile
            columns = triton.ds(start, width)
            zero = jnp.zeros((BLOCK, width), jnp.float32)

            def states(sums, values):
                read, written, inner = sums
                state, d_state = kept_ref[values, columns], d_kept_ref[values, columns]
                both = state.astype(jnp.float32) * d_state.astype(jnp.float32)
                if fresh != width:
                    column = jax.lax.broadcasted_iota(jnp.int32, both.shape, 1)
                    both = jnp.where(column >= width - fresh, both, 0.0)
                read = read + triton.dot(dv_ref[rows, values], state)
                return read, written + triton.dot(rho_ref[rows, values], d_state), inner + jnp.sum(both, axis=0)

            read, written, inner = over_values(V, block_v, states, (zero, zero, jnp.zeros((width,), jnp.float32)))
            g = g_ref[...]
            since, last = jnp.cumsum(g), jnp.sum(g)
            gamma, leaving, through = triton.exp(since, interpret), triton.exp(last - since, interpret), jnp.exp(last)
            if runs is not None:
                here, before = run_refs[0][...], run_refs[1][0]
                newest = jnp.max(here)
                gamma = jnp.where(here == before, gamma, 0.0)
                leaving = jnp.where(here == newest, leaving, 0.0)
                through = jnp.where(newest == before, through, 0.0)
            inner_ref[0] = through * jnp.sum(inner)
            key = triton.load_own(k_ref, rows, tile).astype(jnp.float32)
            read, written = -gamma[:, None] * read, leaving[:, None] * written
            keys_read = jnp.sum(key * read, axis=1)
            written_ref[...] = jnp.sum(key * written, axis=1)

            def over_pairs(i, sums):
                dk, dq = sums
                part = triton.ds(i * pair_tile, pair_tile)
                key = triton.load_own(k_ref, part, tile)
                dk = dk + triton.dot(m2_ref[rows, part], key) + triton.dot(m2_ref[part, rows].T, key)
                dk = dk + triton.dot(m1_ref[part, rows].T, triton.load_own(q_ref, part, tile))
                return dk, dq + triton.dot(m1_ref[rows, part], key)

            sums = read + beta_ref[...][:, None] * written, zero
            dk, dq = jax.lax.fori_loop(0, BLOCK // pair_tile, over_pairs, sums)
            triton.store_own(dk_ref, rows, tile, dk)

            def over_outputs(total, values):
                return total + triton.dot(do_ref[rows, values], kept_ref[values, columns])

            asked = (scale * gamma)[:, None] * over_values(V, block_v, over_outputs, zero)
            query = triton.load_own(q_ref, rows, tile).astype(jnp.float32)
            read_ref[...] = keys_read + jnp.sum(query * asked, axis=1)
            triton.store_own(dq_ref, rows, tile, dq + asked)

        triton.for_tile(jax.lax.rem(triton.program_id(0), tiles), K, key_tile, body)

    block = lambda x: jax.lax.div(x, tiles)  # noqa: E731
    key = BlockSpec((None, BLOCK, None, K), lambda x, h, b: (b, block(x), jax.lax.div(h, Hv // H), 0))
    gate = BlockSpec((None, None, BLOCK), lambda x, h, b: (b, h, block(x)))
    value = BlockSpec((None, BLOCK, None, V), lambda x, h, b: (b, block(x), h, 0))
    state = BlockSpec((None, None, None, V, K), lambda x, h, b: (b, h, block(x), 0, 0))
    pair = BlockSpec((None, None, None, BLOCK, BLOCK), lambda x, h, b: (b, h, block(x), 0, 0))
    d_key = BlockSpec((None, BLOCK, None, K), lambda x, h, b: (b, block(x), h, 0))
    tile = lambda x: jax.lax.rem(x, tiles)  # noqa: E731
    sums = BlockSpec((None, None, None, BLOCK), lambda x, h, b: (tile(x), b, h, block(x)))
    inner = BlockSpec((None, None, None, 1), lambda x, h, b: (tile(x), b, h, block(x)))
    key_shape = jax.ShapeDtypeStruct((B, T, Hv, K), dtype)
    sum_shape = jax.ShapeDtypeStruct((tiles, B, Hv, T), jnp.float32)
    documents, document_specs = _documents(runs, block)
    return triton.call(
        gdn_tokens, q, k, g, beta, do, dv, rho, kept, d_kept, m1, m2, *documents,
        grid=(T // BLOCK * tiles, Hv, B),
        in_specs=[key, key, gate, gate, value, value, value, state, state, pair, pair, *document_specs],
        out_specs=[d_key, d_key, sums, sums, inner],
        out_shape=[key_shape, key_shape, sum_shape, sum_shape,
                   jax.ShapeDtypeStruct((tiles, B, Hv, T // BLOCK), jnp.float32)],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip


def _documents(runs, block):
    """The arrays (runs, before), if any, and their block specs over grid (x, head, batch); block(x) is the block."""
    if runs is None:
        return (), ()
    return runs, (
        BlockSpec((None, BLOCK), lambda x, h, b: (b, block(x))),
        BlockSpec((None, 1), lambda x, h, b: (b, block(x))),
    )


def gates(beta, dg_pairs, dbeta_pairs, read, written, inner):
    """(dg, dbeta) [B,Hv,T] fp32 from what `pairs` and `tokens` found."""
    B, Hv, T = beta.shape
    halves, blocks = (B, Hv, T // BLOCK, 2, CHUNK), (B, Hv, T // BLOCK, BLOCK)
    late = [dg_pairs[..., 0, :], dg_pairs[..., 1, :] + dg_pairs[..., 2, :]]
    early = [dbeta_pairs[..., 0, :] + dbeta_pairs[..., 1, :], dbeta_pairs[..., 2, :]]
    late[0] -= beta.reshape(halves)[..., 0, :] * dbeta_pairs[..., 1, :]
    written = written.sum(0)
    dbeta = jnp.stack(early, axis=-2).reshape(beta.shape) + written
    d_total = jnp.stack(late, axis=-2).reshape(beta.shape) + read.sum(0) - beta * written
    last = (beta * written).reshape(blocks).sum(-1) + inner.sum(0)
    token = jnp.arange(BLOCK)
    later = (token[:, None] >= token).astype(jnp.float32)  # dg_m takes every dG_i with i >= m
    dg = jnp.einsum("bhni,im->bhnm", d_total.reshape(blocks), later, precision=jax.lax.Precision.HIGHEST)
    return (dg + last[..., None]).reshape(beta.shape), dbeta
