"""Long rows in pieces: the state that enters each, from what every piece does to a state.

A piece is an affine map of the state S that enters it: S' = M S + B. For gradients it is dS = M^T dS' + B', with dS' of
the state that leaves it. M is the final state of a pass that starts from the identity with v = 0, B that of a pass that
starts from zero; all pieces make theirs side by side. This kernel chains the maps, one program a head and tile of value
columns. Its products are right to 2^-16: each operand is the sum of two bf16 tiles, its leading bits and the rest.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.tiles import Tiling
from pallas_kernels.triton_calls import BlockSpec

VALUE_TILE, KEY_TILE = 32, 64


def _halves(x):
    """fp32 x as bf16 tiles (leading, rest) with x = leading + rest to 2^-16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return leading.astype(jnp.bfloat16), (x - leading).astype(jnp.bfloat16)


def chain_pieces(maps, local, outer, *, count, reverse, interpret):
    """The state entering each piece, or with `reverse` the gradient of the one leaving it [B count,Hv,K,V] fp32.

    maps [B count,Hv,K,K] and local [B count,Hv,K,V]: M and B of `count` pieces a row; outer [B,Hv,K,V]: the state
    before the first piece, or the gradient of the one after the last. All fp32.
    """
    B, Hv, K, V = outer.shape
    tiles = Tiling(K, KEY_TILE).tiles()

    def gdn_chain(refs):
        start = triton.program_id(0) * VALUE_TILE
        if V % VALUE_TILE:  # the last program's columns overlap its neighbour's
            start = triton.aligned(jnp.minimum(start, V - VALUE_TILE), 16, interpret)
        columns = triton.ds(start, VALUE_TILE)

        def map_tile(piece, out, into):
            if not reverse:
                return out.load_rows(refs.maps, into.place, piece)
            return out.load_columns(refs.maps, into.place, piece).T

        def step(i, states):
            piece = count - 1 - i if reverse else i
            new, operands = [], [_halves(state) for state in states]
            for tile, state in zip(tiles, states, strict=True):
                tile.store_rows(refs.entering, columns, state, piece)
                total = tile.load_rows(refs.local, columns, piece)
                for into, (leading, rest) in zip(tiles, operands, strict=True):
                    map_leading, map_rest = _halves(map_tile(piece, tile, into))
                    total += triton.dot(map_leading, leading)
                    total += triton.dot(map_leading, rest) + triton.dot(map_rest, leading)
                new.append(total)
            return tuple(new)

        states = tuple(tile.load_rows(refs.outer, columns) for tile in tiles)
        jax.lax.fori_loop(0, count, step, states)

    rows = lambda columns: BlockSpec((None, count, None, K, columns), lambda i, h, b: (b, 0, h, 0, 0))  # noqa: E731
    state = BlockSpec((None, None, K, V), lambda i, h, b: (b, h, 0, 0))
    split = lambda x: x.reshape(B, count, *x.shape[1:])  # noqa: E731
    made = triton.call(
        gdn_chain,
        {"maps": (split(maps), rows(K)), "local": (split(local), rows(V)), "outer": (outer, state)},
        {"entering": (jax.ShapeDtypeStruct((B, count, Hv, K, V), jnp.float32), rows(V))},
        grid=(-(-V // VALUE_TILE), Hv, B), warps=4, num_stages=2 if K <= 128 else 1, interpret=interpret,
    )  # fmt: skip
    return made["entering"].reshape(local.shape)
