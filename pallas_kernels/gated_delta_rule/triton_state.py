"""The serial passes over a sequence's chunks: states and prediction errors forward, their gradients in reverse.

A program owns one head's `block_v` value columns and keeps their state, transposed, [block_v, K] in fp32 registers, so
that the state and the errors are the register operand of every product and the keys come from shared memory. Forward:

    rho = inverse (V - gamma (K S))           S' = gamma_C S + K^T (write rho)

reverse, with dO and the gradient dS' of the leaving state:

    drho = attention^T dO + write (K dS')     dV = inverse^T drho
    dS   = gamma_C dS' + Q^T (scale gamma dO) - K^T (gamma dV)

Both keep what the gradient stage needs: the state entering, and the gradient of the state leaving, every 128 tokens.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule.triton_prepare import CHUNK
from pallas_kernels.triton_dialect import BlockSpec

BLOCK = 128
PER_BLOCK = BLOCK // CHUNK


def _specs(T, K, V, group, block_v):
    """Block specs over grid (value block, head, batch): key, value, gate, pair, kept state, fp32 state."""
    key = BlockSpec((None, T, None, K), lambda i, h, b: (b, 0, h // group, 0))
    value = BlockSpec((None, T, None, V), lambda i, h, b: (b, 0, h, 0))
    gate = BlockSpec((None, None, T), lambda i, h, b: (b, h, 0))
    pair = BlockSpec((None, None, T // CHUNK, CHUNK, CHUNK), lambda i, h, b: (b, h, 0, 0, 0))
    kept = BlockSpec((None, None, T // BLOCK, V, K), lambda i, h, b: (b, h, 0, 0, 0))
    state = BlockSpec((None, None, K, V), lambda i, h, b: (b, h, 0, 0))
    return key, value, gate, pair, kept, state


def _own_columns(V, block_v, interpret):
    """The program's value columns; the last program's overlap its neighbour's where block_v does not divide V."""
    start = triton.program_id(0) * block_v
    if V % block_v:
        start = triton.aligned(jnp.minimum(start, V - block_v), 16, interpret)
    return triton.ds(start, block_v)


def _read_state(ref, columns, tiles, block_v):
    """The transposed fp32 state of these value columns, tile by tile along the keys."""
    if ref is None:
        return tuple(jnp.zeros((block_v, width), jnp.float32) for _, width, _ in tiles)
    return tuple(triton.load_own_rows(ref, tile, columns).T for tile in tiles)


def forward(k, v, gamma, write, inverse, initial_state, *, block_v, key_tile, warps, stages, interpret):
    """(rho [B,T,Hv,V] bf16, state entering each block [B,Hv,T/128,V,K] bf16, final state [B,Hv,K,V] fp32).

    k [B,T,H,K], v [B,T,Hv,V] bf16; gamma, write [B,Hv,T]; inverse [B,Hv,T/64,64,64]; initial_state or None for zeros.
    T is a multiple of 128.
    """
    B, T, H, K = k.shape
    Hv, V = v.shape[2:]
    block_v = min(block_v, V)
    tiles = triton.tiles(K, key_tile)

    def gdn_state(*refs):
        k_ref, v_ref, gamma_ref, write_ref, inverse_ref = refs[:5]
        rho_ref, kept_ref, final_ref = refs[-3:]
        columns = _own_columns(V, block_v, interpret)

        def step(chunk, states):
            @triton.when(jax.lax.rem(chunk, PER_BLOCK) == 0)
            def keep():
                for tile, state in zip(tiles, states, strict=True):
                    triton.store_own(kept_ref, columns, tile, state, (jax.lax.div(chunk, PER_BLOCK),))

            rows = triton.ds(chunk * CHUNK, CHUNK)
            keys = [triton.load_own(k_ref, rows, tile) for tile in tiles]
            seen = jnp.zeros((block_v, CHUNK), jnp.float32)
            for state, key in zip(states, keys, strict=True):
                seen += triton.dot(state.astype(jnp.bfloat16), key.T)
            error = v_ref[rows, columns].T.astype(jnp.float32) - gamma_ref[rows][None, :] * seen
            rho = triton.dot(error.astype(jnp.bfloat16), inverse_ref[chunk].T)
            rho_ref[rows, columns] = rho.T.astype(jnp.bfloat16)
            written = (rho * write_ref[rows][None, :]).astype(jnp.bfloat16)
            left = gamma_ref[chunk * CHUNK + CHUNK - 1]
            return tuple(left * state + triton.dot(written, key) for state, key in zip(states, keys, strict=True))

        states = _read_state(None if initial_state is None else refs[5], columns, tiles, block_v)
        states = jax.lax.fori_loop(0, T // CHUNK, step, states)
        for tile, state in zip(tiles, states, strict=True):
            triton.store_own_rows(final_ref, tile, columns, state.T)

    key, value, gate, pair, kept, state = _specs(T, K, V, Hv // H, block_v)
    carried = () if initial_state is None else (initial_state,)
    return triton.call(
        gdn_state, k, v, gamma, write, inverse, *carried,
        grid=(-(-V // block_v), Hv, B), in_specs=[key, value, gate, gate, pair, *(state for _ in carried)],
        out_specs=[value, kept, state],
        out_shape=[
            jax.ShapeDtypeStruct(v.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((B, Hv, T // BLOCK, V, K), jnp.bfloat16),
            jax.ShapeDtypeStruct((B, Hv, K, V), jnp.float32),
        ],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip


def reverse(q, k, do, gamma, write, inverse, attention, d_final, *, scale, block_v, key_tile, warps, stages, interpret):
    """(dv [B,T,Hv,V] bf16, gradient of the state leaving each block [B,Hv,T/128,V,K] bf16, dinitial [B,Hv,K,V] fp32).

    do like v, bf16; the rest as in `forward`; d_final [B,Hv,K,V] fp32.
    """
    B, T, H, K = k.shape
    Hv, V = do.shape[2:]
    block_v = min(block_v, V)
    tiles = triton.tiles(K, key_tile)
    chunks = T // CHUNK

    def gdn_reverse(q_ref, k_ref, do_ref, gamma_ref, write_ref, inverse_ref, attention_ref, *rest):
        final_ref, dv_ref, kept_ref, initial_ref = rest
        columns = _own_columns(V, block_v, interpret)

        def step(i, states):
            chunk = chunks - 1 - i

            @triton.when(jax.lax.rem(chunk, PER_BLOCK) == PER_BLOCK - 1)
            def keep():
                for tile, state in zip(tiles, states, strict=True):
                    triton.store_own(kept_ref, columns, tile, state, (jax.lax.div(chunk, PER_BLOCK),))

            rows = triton.ds(chunk * CHUNK, CHUNK)
            keys = [triton.load_own(k_ref, rows, tile) for tile in tiles]
            do_t = do_ref[rows, columns].T
            gamma = gamma_ref[rows][None, :]
            reached = jnp.zeros((block_v, CHUNK), jnp.float32)
            for state, key in zip(states, keys, strict=True):
                reached += triton.dot(state.astype(jnp.bfloat16), key.T)
            drho = triton.dot(do_t, attention_ref[chunk]) + write_ref[rows][None, :] * reached
            dv = triton.dot(drho.astype(jnp.bfloat16), inverse_ref[chunk])
            dv_ref[rows, columns] = dv.T.astype(jnp.bfloat16)
            read = (scale * gamma * do_t.astype(jnp.float32)).astype(jnp.bfloat16)
            error = (-gamma * dv).astype(jnp.bfloat16)
            left = gamma_ref[chunk * CHUNK + CHUNK - 1]
            return tuple(
                left * state + triton.dot(read, triton.load_own(q_ref, rows, tile)) + triton.dot(error, key)
                for state, key, tile in zip(states, keys, tiles, strict=True)
            )

        states = _read_state(final_ref, columns, tiles, block_v)
        states = jax.lax.fori_loop(0, chunks, step, states)
        for tile, state in zip(tiles, states, strict=True):
            triton.store_own_rows(initial_ref, tile, columns, state.T)

    key, value, gate, pair, kept, state = _specs(T, K, V, Hv // H, block_v)
    return triton.call(
        gdn_reverse, q, k, do, gamma, write, inverse, attention, d_final,
        grid=(-(-V // block_v), Hv, B), in_specs=[key, key, value, gate, gate, pair, pair, state],
        out_specs=[value, kept, state],
        out_shape=[
            jax.ShapeDtypeStruct(do.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((B, Hv, T // BLOCK, V, K), jnp.bfloat16),
            jax.ShapeDtypeStruct((B, Hv, K, V), jnp.float32),
        ],
        warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip
