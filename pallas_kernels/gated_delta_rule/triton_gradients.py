"""The gradients of every block of 128 tokens, all blocks at once, from half as many states as triton_chunks.py takes.

The equations are those of triton_chunks.py with a block in a chunk's place. A block has two halves of 64. A pair of
tokens, one later than the other, lies in one of three tiles: both in the first half, the later one in the second half
and the earlier one in the first, or both in the second. M1 and M2 go through memory, since a transposed accumulator
must not feed a product (some Triton releases miscompile it on Hopper).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.gated_delta_rule import configurations
from pallas_kernels.gated_delta_rule import triton_terms as terms
from pallas_kernels.gated_delta_rule.arrays import BLOCK, CHUNK, Gradients, Kept, Pairs, Reversed, Sums
from pallas_kernels.tiles import Tile, Tiling
from pallas_kernels.triton_calls import BlockSpec

TILES = 3  # of pairs; a tile's number is the half (0 or 1) of its later tokens plus that of its earlier ones


def pair_tokens(
    kept: Kept, do: jax.Array, dv: jax.Array, *, scale: float, config: configurations.Pairs, interpret: bool
) -> Pairs:
    """M1 and M2 of every block, from do and dv [B,T,Hv,V] bf16."""
    B, T, Hv, V = kept.rho.shape

    def gdn_pairs(refs):
        rows = triton.ds(0, CHUNK)
        number = triton.remainder(triton.program_id(0), TILES)
        same = number != 1
        order = terms.square(0) - terms.square(1)  # how many tokens i is after j, in one half
        allowed = jnp.logical_not(same) | (order >= 0)
        if refs.late_numbers is not None:
            allowed = allowed & (refs.late_numbers[...][:, None] == refs.early_numbers[...][None, :])

        def add_products(at, m1, m2):
            early = refs.rho[rows, at].T
            return m1 + triton.dot(refs.do[rows, at], early), m2 + triton.dot(refs.dv[rows, at], early)

        m1, m2 = terms.over_values(
            Tiling(V, config.value_tile), add_products, *(jnp.zeros((CHUNK, CHUNK), jnp.float32),) * 2
        )
        until = refs.early_total[...] - jnp.where(same, 0.0, refs.early_total[CHUNK - 1])
        decay = (
            terms.pair_decay(refs.late_total[...], until, allowed, interpret) * terms.nonzero(refs.beta[...])[None, :]
        )
        late = triton.ds(triton.quotient(number + 1, 2) * CHUNK, CHUNK)
        early = triton.ds(triton.quotient(number, 2) * CHUNK, CHUNK)
        refs.m1[late, early] = (scale * decay * m1).astype(jnp.bfloat16)
        refs.m2[late, early] = jnp.where(same & (order == 0), 0.0, -decay * m2).astype(jnp.bfloat16)

        @triton.when(number == 1)
        def clear_future():
            for m in (refs.m1, refs.m2):
                m[triton.ds(0, CHUNK), triton.ds(CHUNK, CHUNK)] = jnp.zeros((CHUNK, CHUNK), jnp.bfloat16)

    block = lambda x: triton.quotient(x, TILES)  # noqa: E731
    late = lambda x: 2 * block(x) + triton.quotient(triton.remainder(x, TILES) + 1, 2)  # noqa: E731
    early = lambda x: 2 * block(x) + triton.quotient(triton.remainder(x, TILES), 2)  # noqa: E731
    value = lambda at: BlockSpec((None, CHUNK, None, V), lambda x, h, b: (b, at(x), h, 0))  # noqa: E731
    gate = lambda at: BlockSpec((None, None, CHUNK), lambda x, h, b: (b, h, at(x)))  # noqa: E731
    number = lambda at: BlockSpec((None, CHUNK), lambda x, h, b: (b, at(x)))  # noqa: E731
    beta, total, numbers = kept.tokens.beta, kept.prepared.total, kept.tokens.documents.numbers
    pair = BlockSpec((None, None, None, BLOCK, BLOCK), lambda x, h, b: (b, h, block(x), 0, 0))
    pair_shape = jax.ShapeDtypeStruct((B, Hv, T // BLOCK, BLOCK, BLOCK), jnp.bfloat16)
    made = triton.call(
        gdn_pairs,
        {
            "late_total": (total, gate(late)), "early_total": (total, gate(early)), "beta": (beta, gate(early)),
            "do": (do, value(late)), "dv": (dv, value(late)), "rho": (kept.rho, value(early)),
            "late_numbers": (numbers, number(late)), "early_numbers": (numbers, number(early)),
        },
        {"m1": (pair_shape, pair), "m2": (pair_shape, pair)},
        grid=(TILES * (T // BLOCK), Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return Pairs(**made)


def sum_gradients(
    kept: Kept, do: jax.Array, backward: Reversed, paired: Pairs,
    *, scale: float, config: configurations.Tokens, interpret: bool,
) -> Sums:  # fmt: skip
    """dQ, dK and the sums that dg and dbeta are made of: q . dQ + k . dR - k . dW, k . dW and <S', dS'>, each over its
    own tile of key columns.

    A program makes a tile of key columns of one block. Where the columns that full tiles leave would take several
    narrow tiles, one full tile takes them instead: it overlaps its neighbour and makes some of its columns a second
    time. dQ comes first, so that the states it reads are still in the L2 cache when dK reads them.
    """
    B, T, H, K = kept.tokens.q.shape
    Hv, V = kept.rho.shape[2:]
    dtype = jnp.bfloat16 if Hv == H else jnp.float32  # one a value head, until they are summed
    pair_tile = config.pair_tile
    key_tiles, value_tiles = Tiling(K, config.key_tile), Tiling(V, config.value_tile)
    full, overlapping, tiles = key_tiles.width, len(key_tiles.rest) > 1, -(-K // key_tiles.width)

    def gdn_tokens(refs):
        rows = triton.ds(0, BLOCK)

        def over_pairs(step, *sums):
            def with_part(i, sums):
                return step(triton.ds(i * pair_tile, pair_tile), *sums)

            return jax.lax.fori_loop(0, BLOCK // pair_tile, with_part, sums)

        def body(tile):
            columns, zero = tile.place, jnp.zeros((BLOCK, tile.width), jnp.float32)

            def add_states(at, read, d_write, inner):
                state, d_state = refs.states[at, columns], refs.d_states[at, columns]
                read = read + triton.dot(refs.dv[rows, at], state)
                inner = inner + terms.inner_product(state, d_state, tile, inner.size)
                d_write = d_write + triton.dot(refs.rho[rows, at], d_state)
                return read, triton.finished(d_write, interpret), inner

            def store(ref, x):
                if overlapping:
                    ref[rows, columns] = x.astype(ref.dtype)
                else:
                    tile.store_columns(ref, rows, x)

            def add_key_pairs(part, read, d_write):
                key = refs.k[part, columns]
                d_write = d_write + triton.dot(refs.m2[part, rows].T, key)
                d_write = d_write + triton.dot(refs.m1[part, rows].T, refs.q[part, columns])
                return read + triton.dot(refs.m2[rows, part], key), d_write

            def add_asked(at, asked):
                return (asked + triton.dot(refs.do[rows, at], refs.states[at, columns]),)

            def add_query_pairs(part, dq):
                return (dq + triton.dot(refs.m1[rows, part], refs.k[part, columns]),)

            late = jax.lax.broadcasted_iota(jnp.int32, (BLOCK,), 0) >= CHUNK
            first, last = refs.gamma[CHUNK - 1], refs.gamma[BLOCK - 1]  # what each half leaves
            gamma = refs.gamma[...] * jnp.where(late, first, 1.0)
            (asked,) = terms.over_values(value_tiles, add_asked, zero)
            (dq,) = over_pairs(add_query_pairs, (scale * gamma)[:, None] * asked)
            query = tile.own(refs.q[rows, columns].astype(jnp.float32))
            of_queries = jnp.sum(query * dq, axis=1)
            store(refs.dq, dq)

            none = jnp.zeros((value_tiles.width,), jnp.float32)
            read, d_write, inner = terms.over_values(value_tiles, add_states, zero, zero, none)
            d_write *= (terms.nonzero(refs.beta[...]) * refs.leaving[...] * jnp.where(late, 1.0, last))[:, None]
            key = tile.own(refs.k[rows, columns].astype(jnp.float32))
            refs.d_last[0] = jnp.sum(jnp.sum(key * d_write, axis=1)) + first * last * jnp.sum(inner)
            read, d_write = over_pairs(add_key_pairs, -gamma[:, None] * read, d_write)
            d_log_beta = jnp.sum(key * d_write, axis=1)
            refs.d_log_beta[...] = d_log_beta
            refs.d_total[...] = of_queries + jnp.sum(key * read, axis=1) - d_log_beta
            store(refs.dk, read + terms.where_nonzero(refs.beta[...], d_write))

        index = triton.remainder(triton.program_id(0), tiles)
        if overlapping:
            start = triton.aligned(jnp.minimum(index * full, K - full), 8, interpret)
            body(Tile(start, full, full + start - index * full))
        else:
            key_tiles.at(index, body)

    block = lambda x: triton.quotient(x, tiles)  # noqa: E731
    key = BlockSpec((None, BLOCK, None, K), lambda x, h, b: (b, block(x), triton.quotient(h, Hv // H), 0))
    gate = BlockSpec((None, None, BLOCK), lambda x, h, b: (b, h, block(x)))
    value = BlockSpec((None, BLOCK, None, V), lambda x, h, b: (b, block(x), h, 0))
    state = BlockSpec((None, None, None, V, K), lambda x, h, b: (b, h, block(x), 0, 0))
    pair = BlockSpec((None, None, None, BLOCK, BLOCK), lambda x, h, b: (b, h, block(x), 0, 0))
    d_key = BlockSpec((None, BLOCK, None, K), lambda x, h, b: (b, block(x), h, 0))
    tile = lambda x: triton.remainder(x, tiles)  # noqa: E731
    sums = BlockSpec((None, None, None, BLOCK), lambda x, h, b: (tile(x), b, h, block(x)))
    last = BlockSpec((None, None, None, 1), lambda x, h, b: (tile(x), b, h, block(x)))
    key_shape = jax.ShapeDtypeStruct((B, T, Hv, K), dtype)
    sum_shape = jax.ShapeDtypeStruct((tiles, B, Hv, T), jnp.float32)
    last_shape = jax.ShapeDtypeStruct((tiles, B, Hv, T // BLOCK), jnp.float32)
    given, prepared = kept.tokens, kept.prepared
    made = triton.call(
        gdn_tokens,
        {
            "q": (given.q, key), "k": (given.k, key), "gamma": (prepared.gamma, gate),
            "leaving": (prepared.leaving, gate), "beta": (given.beta, gate), "do": (do, value),
            "dv": (backward.dv, value), "rho": (kept.rho, value), "states": (kept.states, state),
            "d_states": (backward.d_states, state), "m1": (paired.m1, pair), "m2": (paired.m2, pair),
        },
        {
            "dq": (key_shape, d_key), "dk": (key_shape, d_key),
            "d_total": (sum_shape, sums), "d_log_beta": (sum_shape, sums), "d_last": (last_shape, last),
        },
        grid=(T // BLOCK * tiles, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return Sums(**made)


def gate_gradients(beta: jax.Array, sums: Sums) -> Gradients:
    """dg and dbeta from the sums over tiles, beside dq and dk."""
    blocks = (*beta.shape[:2], -1, BLOCK)
    later = jax.lax.cumsum(sums.d_total.sum(0).reshape(blocks), axis=3, reverse=True)
    dg = (later + sums.d_last.sum(0)[..., None]).reshape(beta.shape)
    return Gradients(sums.dq, sums.dk, dg, sums.d_log_beta.sum(0) / terms.nonzero(beta))
