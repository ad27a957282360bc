"""The outputs of every block of 128 tokens, all at once, from the state S that entered it.

    first 64          O = scale gamma (Q S) + attention rho
    last 64           O = scale gamma (gamma_64 Q S + (Q K_1^T) diag(write_1) rho_1) + attention rho

where K_1, write_1 and rho_1 are those of the first 64 tokens, which write to the state that the last 64 read, and
gamma_64 is the fraction of S that is left after them.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.gated_delta_rule import configurations
from pallas_kernels.gated_delta_rule.arrays import BLOCK, CHUNK, Prepared, Scanned, Tokens
from pallas_kernels.tiles import Tiling
from pallas_kernels.triton_calls import BlockSpec


def make_outputs(
    tokens: Tokens, prepared: Prepared, scanned: Scanned,
    *, scale: float, config: configurations.Output, interpret: bool,
) -> jax.Array:  # fmt: skip
    """o [B,T,Hv,V] bf16, from prediction errors and the state that enters each block of 128."""
    B, T, H, K = tokens.k.shape
    Hv, V = scanned.rho.shape[2:]
    columns = Tiling(K, config.key_tile).tiles()
    first, last = triton.ds(0, CHUNK), triton.ds(CHUNK, CHUNK)

    def gdn_output(refs):
        queries = [[tile.load_columns(refs.q, rows) for tile in columns] for rows in (first, last)]
        pairs = [refs.attention[number] for number in (0, 1)]
        reads = [scale * refs.gamma[rows] for rows in (first, last)]
        crossing = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for query, tile in zip(queries[1], columns, strict=True):
            crossing += triton.dot(query, tile.load_columns(refs.k, first).T)
        crossing = (reads[1][:, None] * crossing * refs.write[first][None, :]).astype(jnp.bfloat16)
        gamma_end = refs.gamma[CHUNK - 1]

        def store_values(_, tile):
            values = tile.place
            states = [refs.states[values, tile.place].T for tile in columns]

            def asked(half):
                total = jnp.zeros((CHUNK, values.size), jnp.float32)
                for query, state in zip(queries[half], states, strict=True):
                    total += triton.dot(query, state)
                return reads[half][:, None] * total

            early = refs.rho[first, values]
            refs.o[first, values] = (asked(0) + triton.dot(pairs[0], early)).astype(jnp.bfloat16)
            late = gamma_end * asked(1) + triton.dot(pairs[1], refs.rho[last, values])
            refs.o[last, values] = (late + triton.dot(crossing, early)).astype(jnp.bfloat16)

        Tiling(V, config.value_tile).over(store_values, None)

    key = BlockSpec((None, BLOCK, None, K), lambda n, h, b: (b, n, triton.quotient(h, Hv // H), 0))
    value = BlockSpec((None, BLOCK, None, V), lambda n, h, b: (b, n, h, 0))
    gate = BlockSpec((None, None, BLOCK), lambda n, h, b: (b, h, n))
    state = BlockSpec((None, None, None, V, K), lambda n, h, b: (b, h, n, 0, 0))
    pair = BlockSpec((None, None, BLOCK // CHUNK, CHUNK, CHUNK), lambda n, h, b: (b, h, n, 0, 0))
    made = triton.call(
        gdn_output,
        {
            "q": (tokens.q, key), "k": (tokens.k, key), "gamma": (prepared.gamma, gate),
            "write": (prepared.write, gate), "rho": (scanned.rho, value), "states": (scanned.states, state),
            "attention": (prepared.attention, pair),
        },
        {"o": (jax.ShapeDtypeStruct(scanned.rho.shape, jnp.bfloat16), value)},
        grid=(T // BLOCK, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return made["o"]
