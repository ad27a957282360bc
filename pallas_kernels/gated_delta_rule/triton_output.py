"""The outputs of every block of tokens, all at once, from the state S that entered it.

    64 tokens         O = read S + attention rho
    64 more           O = gamma_64 (read S) + attention rho + (read K_1^T) diag(write_1) rho_1

with K_1, write_1 and rho_1 of the first 64: what they add to the state that the others read. gamma_64 is what they
leave of S.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule.triton_prepare import CHUNK
from pallas_kernels.triton_dialect import BlockSpec


def output(k, gamma, write, rho, kept, attention, read, *, block, block_v, key_tile, warps, stages, interpret):
    """o [B,T,Hv,V] bf16.

    k [B,T,H,K]; gamma, write [B,Hv,T], attention [B,Hv,T/64,64,64] and read [B,T,Hv,K] from prepare; rho [B,T,Hv,V] and
    kept [B,Hv,T/block,V,K], the state that enters each block of 64 or 128, from state. T is a multiple of `block`.
    """
    B, T, H, K = k.shape
    Hv, V = rho.shape[2:]
    columns = triton.tiles(K, key_tile)
    halves = [triton.ds(start, CHUNK) for start in range(0, block, CHUNK)]

    def gdn_output(k_ref, gamma_ref, write_ref, rho_ref, kept_ref, attention_ref, read_ref, o_ref):
        reads = [[triton.load_own(read_ref, rows, tile) for tile in columns] for rows in halves]
        pairs = [attention_ref[number] for number in range(len(halves))]
        if len(halves) == 2:
            crossing = jnp.zeros((CHUNK, CHUNK), jnp.float32)
            for tile_read, tile in zip(reads[1], columns, strict=True):
                crossing += triton.dot(tile_read, triton.load_own(k_ref, halves[0], tile).T)
            crossing = (crossing * write_ref[halves[0]][None, :]).astype(jnp.bfloat16)
            left = gamma_ref[CHUNK - 1]

        def part(_, tile):
            values = triton.ds(tile[0], tile[1])
            states = [kept_ref[values, triton.ds(start, width)].T for start, width, _ in columns]

            def carried(half):
                total = jnp.zeros((CHUNK, values.size), jnp.float32)
                for tile_read, state in zip(reads[half], states, strict=True):
                    total += triton.dot(tile_read, state)
                return total

            early = rho_ref[halves[0], values]
            o_ref[halves[0], values] = (carried(0) + triton.dot(pairs[0], early)).astype(jnp.bfloat16)
            if len(halves) == 2:
                late = left * carried(1) + triton.dot(pairs[1], rho_ref[halves[1], values])
                o_ref[halves[1], values] = (late + triton.dot(crossing, early)).astype(jnp.bfloat16)

        triton.over_tiles(V, block_v, part, None)

    key = BlockSpec((None, block, None, K), lambda n, h, b: (b, n, jax.lax.div(h, Hv // H), 0))
    read_spec = BlockSpec((None, block, None, K), lambda n, h, b: (b, n, h, 0))
    value = BlockSpec((None, block, None, V), lambda n, h, b: (b, n, h, 0))
    gate = BlockSpec((None, None, block), lambda n, h, b: (b, h, n))
    state = BlockSpec((None, None, None, V, K), lambda n, h, b: (b, h, n, 0, 0))
    pair = BlockSpec((None, None, len(halves), CHUNK, CHUNK), lambda n, h, b: (b, h, n, 0, 0))
    (o,) = triton.call(
        gdn_output, k, gamma, write, rho, kept, attention, read,
        grid=(T // block, Hv, B), in_specs=[key, gate, gate, value, state, pair, read_spec], out_specs=[value],
        out_shape=[jax.ShapeDtypeStruct(rho.shape, jnp.bfloat16)], warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip
    return o
