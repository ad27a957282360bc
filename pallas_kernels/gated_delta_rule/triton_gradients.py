"""The gradients of every block of 128 tokens, all blocks at once: half as many states as triton_chunks.py takes.

The equations are those of triton_chunks.py, of a block for a chunk. A block has two halves, and pairs of tokens are in
one of three tiles: both in the first half, late in the second and early in the first, both in the second. M1 and M2 go
through memory, since a transposed accumulator must not feed a product (some Triton releases miscompile it on Hopper).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule.triton_chunks import nonzero, over_values, shared, where_written
from pallas_kernels.gated_delta_rule.triton_prepare import CHUNK, pair_decay, square
from pallas_kernels.triton_dialect import BlockSpec

BLOCK = 128
TILES = 3  # of pairs, numbered late half + early half


def pairs(total, beta, runs, do, dv, rho, *, scale, block_v, warps, stages, interpret):
    """(M1, M2 [B,Hv,T/128,128,128] bf16).

    total [B,Hv,T] from prepare; beta [B,Hv,T]; runs ([B,T], [B,T/64]) or None; do, dv, rho [B,T,Hv,V] bf16.
    """
    B, T, Hv, V = rho.shape

    def gdn_pairs(refs):
        rows = triton.ds(0, CHUNK)
        number = triton.remainder(triton.program_id(0), TILES)
        same = number != 1
        order = square(0) - square(1)  # how many tokens i is after j, in one half
        allowed = jnp.logical_not(same) | (order >= 0)
        if runs is not None:
            allowed = allowed & (refs.late_runs[...][:, None] == refs.early_runs[...][None, :])

        def products(sums, tile):
            values = triton.ds(tile[0], tile[1])
            early = refs.rho[rows, values].T
            m1, m2 = sums
            return m1 + triton.dot(refs.do[rows, values], early), m2 + triton.dot(refs.dv[rows, values], early)

        m1, m2 = triton.over_tiles(V, block_v, products, (jnp.zeros((CHUNK, CHUNK), jnp.float32),) * 2)
        until = refs.early_total[...] - jnp.where(same, 0.0, refs.early_total[CHUNK - 1])
        decay = pair_decay(refs.late_total[...], until, allowed, interpret) * nonzero(refs.beta[...])[None, :]
        late = triton.ds(triton.quotient(number + 1, 2) * CHUNK, CHUNK)
        early = triton.ds(triton.quotient(number, 2) * CHUNK, CHUNK)
        refs.m1[late, early] = (scale * decay * m1).astype(jnp.bfloat16)
        refs.m2[late, early] = jnp.where(same & (order == 0), 0.0, -decay * m2).astype(jnp.bfloat16)

        @triton.when(number == 1)
        def future():
            for m in (refs.m1, refs.m2):
                m[triton.ds(0, CHUNK), triton.ds(CHUNK, CHUNK)] = jnp.zeros((CHUNK, CHUNK), jnp.bfloat16)

    block = lambda x: triton.quotient(x, TILES)  # noqa: E731
    late = lambda x: 2 * block(x) + triton.quotient(triton.remainder(x, TILES) + 1, 2)  # noqa: E731
    early = lambda x: 2 * block(x) + triton.quotient(triton.remainder(x, TILES), 2)  # noqa: E731
    value = lambda at: BlockSpec((None, CHUNK, None, V), lambda x, h, b: (b, at(x), h, 0))  # noqa: E731
    gate = lambda at: BlockSpec((None, None, CHUNK), lambda x, h, b: (b, h, at(x)))  # noqa: E731
    run = lambda at: BlockSpec((None, CHUNK), lambda x, h, b: (b, at(x)))  # noqa: E731
    numbers = None if runs is None else runs[0]
    pair = BlockSpec((None, None, None, BLOCK, BLOCK), lambda x, h, b: (b, h, block(x), 0, 0))
    pair_shape = jax.ShapeDtypeStruct((B, Hv, T // BLOCK, BLOCK, BLOCK), jnp.bfloat16)
    made = triton.call(
        gdn_pairs,
        {
            "late_total": (total, gate(late)), "early_total": (total, gate(early)), "beta": (beta, gate(early)),
            "do": (do, value(late)), "dv": (dv, value(late)), "rho": (rho, value(early)),
            "late_runs": (numbers, run(late)), "early_runs": (numbers, run(early)),
        },
        {"m1": (pair_shape, pair), "m2": (pair_shape, pair)},
        grid=(TILES * (T // BLOCK), Hv, B), warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip
    return tuple(made.values())


def tokens(
    q, k, gamma, leaving, beta, do, dv, rho, kept, d_kept, m1, m2,
    *, scale, dtype, block_v, key_tile, pair_tile, warps, stages, interpret,
):  # fmt: skip
    """(dq, dk [B,T,Hv,K] of `dtype`, per value head; q . dQ + k . dR - k . dW, k . dW [tiles,B,Hv,T] and
    <S', dS'> [tiles,B,Hv,T/128] fp32, each sum over its own tile of key columns).

    A program makes a tile of key columns for a block. q, k [B,T,H,K], do, dv, rho [B,T,Hv,V] bf16; gamma, leaving
    [B,Hv,T] from prepare; beta [B,Hv,T]; kept, d_kept [B,Hv,T/128,V,K]: the state entering each block and the gradient
    of the one leaving it; m1, m2 from `pairs`. Where what is left of K takes several narrow tiles, there is one as wide
    as the others instead, over columns of its neighbour, whose results it makes once more. dQ is first: what it reads
    of S is then still in the L2 cache when dK reads it.
    """
    B, T, H, K = q.shape
    Hv, V = rho.shape[2:]
    full, _, rest = triton.full_and_rest(K, key_tile)
    overlapping, tiles = len(rest) > 1, -(-K // full)

    def gdn_tokens(refs):
        rows = triton.ds(0, BLOCK)

        def over_pairs(step, *sums):
            def with_part(i, sums):
                return step(triton.ds(i * pair_tile, pair_tile), *sums)

            return jax.lax.fori_loop(0, BLOCK // pair_tile, with_part, sums)

        def body(tile):
            start, width, _ = tile
            columns = triton.ds(start, width)
            zero = jnp.zeros((BLOCK, width), jnp.float32)

            def states(values, read, written, inner):
                state, d_state = refs.kept[values, columns], refs.d_kept[values, columns]
                read = read + triton.dot(refs.dv[rows, values], state)
                inner = inner + shared(state, d_state, tile, inner.size)
                written = written + triton.dot(refs.rho[rows, values], d_state)
                return read, triton.finished(written, interpret), inner

            def store(ref, x):
                if overlapping:
                    ref[rows, columns] = x.astype(ref.dtype)
                else:
                    triton.store_own(ref, rows, tile, x)

            def key_pairs(part, read, written):
                key = refs.k[part, columns]
                written = written + triton.dot(refs.m2[part, rows].T, key)
                written = written + triton.dot(refs.m1[part, rows].T, refs.q[part, columns])
                return read + triton.dot(refs.m2[rows, part], key), written

            def asked_states(values, asked):
                return (asked + triton.dot(refs.do[rows, values], refs.kept[values, columns]),)

            def query_pairs(part, dq):
                return (dq + triton.dot(refs.m1[rows, part], refs.k[part, columns]),)

            late = jax.lax.broadcasted_iota(jnp.int32, (BLOCK,), 0) >= CHUNK
            first, last = refs.gamma[CHUNK - 1], refs.gamma[BLOCK - 1]  # what each half leaves
            gamma = refs.gamma[...] * jnp.where(late, first, 1.0)
            (asked,) = over_values(V, block_v, asked_states, zero)
            (dq,) = over_pairs(query_pairs, (scale * gamma)[:, None] * asked)
            query = triton.own(refs.q[rows, columns].astype(jnp.float32), tile)
            moved = jnp.sum(query * dq, axis=1)
            store(refs.dq, dq)

            none = jnp.zeros((triton.full_and_rest(V, block_v)[0],), jnp.float32)
            read, written, inner = over_values(V, block_v, states, zero, zero, none)
            written *= (nonzero(refs.beta[...]) * refs.leaving[...] * jnp.where(late, 1.0, last))[:, None]
            key = triton.own(refs.k[rows, columns].astype(jnp.float32), tile)
            refs.ends[0] = jnp.sum(jnp.sum(key * written, axis=1)) + first * last * jnp.sum(inner)
            read, written = over_pairs(key_pairs, -gamma[:, None] * read, written)
            written_sum = jnp.sum(key * written, axis=1)
            refs.written[...] = written_sum
            refs.moved[...] = moved + jnp.sum(key * read, axis=1) - written_sum
            store(refs.dk, read + where_written(refs.beta[...], written))

        index = triton.remainder(triton.program_id(0), tiles)
        if overlapping:
            start = triton.aligned(jnp.minimum(index * full, K - full), 8, interpret)
            body((start, full, full + start - index * full))
        else:
            triton.for_tile(index, K, key_tile, body)

    block = lambda x: triton.quotient(x, tiles)  # noqa: E731
    key = BlockSpec((None, BLOCK, None, K), lambda x, h, b: (b, block(x), triton.quotient(h, Hv // H), 0))
    gate = BlockSpec((None, None, BLOCK), lambda x, h, b: (b, h, block(x)))
    value = BlockSpec((None, BLOCK, None, V), lambda x, h, b: (b, block(x), h, 0))
    state = BlockSpec((None, None, None, V, K), lambda x, h, b: (b, h, block(x), 0, 0))
    pair = BlockSpec((None, None, None, BLOCK, BLOCK), lambda x, h, b: (b, h, block(x), 0, 0))
    d_key = BlockSpec((None, BLOCK, None, K), lambda x, h, b: (b, block(x), h, 0))
    tile = lambda x: triton.remainder(x, tiles)  # noqa: E731
    sums = BlockSpec((None, None, None, BLOCK), lambda x, h, b: (tile(x), b, h, block(x)))
    ends = BlockSpec((None, None, None, 1), lambda x, h, b: (tile(x), b, h, block(x)))
    key_shape = jax.ShapeDtypeStruct((B, T, Hv, K), dtype)
    sum_shape = jax.ShapeDtypeStruct((tiles, B, Hv, T), jnp.float32)
    ends_shape = jax.ShapeDtypeStruct((tiles, B, Hv, T // BLOCK), jnp.float32)
    made = triton.call(
        gdn_tokens,
        {
            "q": (q, key), "k": (k, key), "gamma": (gamma, gate), "leaving": (leaving, gate), "beta": (beta, gate),
            "do": (do, value), "dv": (dv, value), "rho": (rho, value), "kept": (kept, state),
            "d_kept": (d_kept, state), "m1": (m1, pair), "m2": (m2, pair),
        },
        {
            "dq": (key_shape, d_key), "dk": (key_shape, d_key),
            "moved": (sum_shape, sums), "written": (sum_shape, sums), "ends": (ends_shape, ends),
        },
        grid=(T // BLOCK * tiles, Hv, B), warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip
    return tuple(made.values())


def gates(beta, moved, written, ends):
    """(dg, dbeta) [B,Hv,T] fp32 from the sums that `tokens` found."""
    blocks = (*beta.shape[:2], -1, BLOCK)
    later = jax.lax.cumsum(moved.sum(0).reshape(blocks), axis=3, reverse=True)
    return (later + ends.sum(0)[..., None]).reshape(beta.shape), written.sum(0) / nonzero(beta)
