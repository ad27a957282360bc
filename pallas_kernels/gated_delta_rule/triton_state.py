"""The serial passes over a sequence's chunks: states and prediction errors forward, their gradients in reverse.

A program owns one head's `value_tile` value columns and keeps their state in fp32 registers. Forward:

    rho = inverse (V - gamma (K S))           S' = gamma_C S + K^T (write rho)
    O   = scale gamma (Q S) + attention rho

reverse, with dO and the gradient dS' of the leaving state:

    drho = attention^T dO + write (K dS')     dV = inverse^T drho
    dS   = gamma_C dS' + Q^T (scale gamma dO) - K^T (gamma dV)

For the kernels that make the gradients, the first keeps the state that enters every block of 64 or 128 tokens, the
second the gradient of the state that leaves it. Outputs of wide heads come from triton_output.py instead, for want of
registers here.

State, errors and outputs are held in registers as they stand in memory, or transposed. Transposed, state and errors
are operands in registers of every product and only keys and pairs go through shared memory: fewer barriers. As they
stand, they go through shared memory themselves: fewer registers, which matters once the state takes half of them. The
last columns of a V that tiles of 64 do not divide are always held as they stand: a product has at least 64 rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.gated_delta_rule import configurations
from pallas_kernels.gated_delta_rule.arrays import CHUNK, Prepared, Reversed, Scanned, Tokens
from pallas_kernels.tiles import Tiling
from pallas_kernels.triton_calls import BlockSpec


class _Held(NamedTuple):
    """How arrays with value columns are held: `flip` takes them from memory and back."""

    flip: Callable[[Any], Any]
    along_tokens: Callable[[Any], Any]  # [C] -> to be multiplied with what is held
    product: Callable[[Any, Any], Any]  # (loaded a, held x) -> a x, held


PLAIN = _Held(lambda x: x, lambda x: x[:, None], triton.dot)
TRANSPOSED = _Held(lambda x: x.T, lambda x: x[None, :], lambda a, x: triton.dot(x, a.T))


def _specs(T, K, V, group, block):
    """Block specs over grid (value block, head, batch): key, value, gate, pair, kept states, fp32 state."""
    key = BlockSpec((None, T, None, K), lambda i, h, b: (b, 0, triton.quotient(h, group), 0))
    value = BlockSpec((None, T, None, V), lambda i, h, b: (b, 0, h, 0))
    gate = BlockSpec((None, None, T), lambda i, h, b: (b, h, 0))
    pair = BlockSpec((None, None, T // CHUNK, CHUNK, CHUNK), lambda i, h, b: (b, h, 0, 0, 0))
    kept = BlockSpec((None, None, T // block, V, K), lambda i, h, b: (b, h, 0, 0, 0))
    state = BlockSpec((None, None, K, V), lambda i, h, b: (b, h, 0, 0))
    return key, value, gate, pair, kept, state


def _read_state(ref, columns, key_tiles, held):
    """The fp32 state of these value columns, held tile by tile along the keys."""
    if ref is None:
        return tuple(held.flip(jnp.zeros((tile.width, columns.size), jnp.float32)) for tile in key_tiles)
    return tuple(held.flip(tile.load_rows(ref, columns)) for tile in key_tiles)


def _keep(ref, number, columns, key_tiles, states, held):
    """Store the state [V, K] of block `number`."""
    for tile, state in zip(key_tiles, states, strict=True):
        transposed = state if held is TRANSPOSED else state.T
        tile.store_columns(ref, columns, transposed, number)


def scan_forward(
    tokens: Tokens, prepared: Prepared, initial_state: jax.Array | None,
    *, read: bool, keep: bool, scale: float, block: int, config: configurations.Scan, interpret: bool,
) -> Scanned:  # fmt: skip
    """The states of all chunks in a row from initial_state [B,Hv,K,V] fp32, or None for zeros: outputs where `read`,
    prediction errors and the state every `block` tokens where `keep`."""
    B, T, H, K = tokens.k.shape
    Hv, V = tokens.beta.shape[1], K if tokens.v is None else tokens.v.shape[3]
    key_tiles, value_tiles, chunks = Tiling(K, config.key_tile).tiles(), Tiling(V, config.value_tile), T // CHUNK

    def gdn_state(refs):
        def body(tile):
            columns = tile.place
            held = TRANSPOSED if config.transposed and columns.size >= CHUNK else PLAIN

            def step(chunk, carry):
                gamma_end, states = carry
                # on its way while this chunk computes
                next_end = refs.gamma[jnp.minimum(chunk + 2, chunks) * CHUNK - 1]
                if keep:
                    boundary = triton.remainder(chunk, block // CHUNK) == 0
                    number = triton.quotient(chunk, block // CHUNK)
                    triton.when(boundary)(lambda: _keep(refs.states, number, columns, key_tiles, states, held))
                rows = triton.ds(chunk * CHUNK, CHUNK)
                keys = [tile.load_columns(refs.k, rows) for tile in key_tiles]
                rounded = [state.astype(jnp.bfloat16) for state in states]
                seen = asked = held.flip(jnp.zeros((CHUNK, columns.size), jnp.float32))
                for state, key in zip(rounded, keys, strict=True):
                    seen += held.product(key, state)
                gamma = held.along_tokens(refs.gamma[rows])
                error = -gamma * seen
                if refs.v is not None:
                    error += held.flip(refs.v[rows, columns]).astype(jnp.float32)
                rho = held.product(refs.inverse[chunk], error.astype(jnp.bfloat16))
                if keep:
                    refs.rho[rows, columns] = held.flip(rho).astype(jnp.bfloat16)
                if refs.q is not None:
                    for state, tile in zip(rounded, key_tiles, strict=True):
                        asked += held.product(tile.load_columns(refs.q, rows), state)
                    o = scale * gamma * asked + held.product(refs.attention[chunk], rho.astype(jnp.bfloat16))
                    refs.o[rows, columns] = held.flip(o).astype(jnp.bfloat16)
                added = (rho * held.along_tokens(refs.write[rows])).astype(jnp.bfloat16)
                new = (gamma_end * state + held.product(key.T, added) for state, key in zip(states, keys, strict=True))
                return next_end, tuple(new)

            states = _read_state(refs.initial_state, columns, key_tiles, held)
            _, states = jax.lax.fori_loop(0, chunks, step, (refs.gamma[CHUNK - 1], states))
            for tile, state in zip(key_tiles, states, strict=True):
                tile.store_rows(refs.final, columns, held.flip(state))

        value_tiles.at(triton.program_id(0), body)

    key, value, gate, pair, kept, state = _specs(T, K, V, Hv // H, block)
    value_shape = jax.ShapeDtypeStruct((B, T, Hv, V), jnp.bfloat16)
    kept_shape = jax.ShapeDtypeStruct((B, Hv, T // block, V, K), jnp.bfloat16)
    made = triton.call(
        gdn_state,
        {
            "k": (tokens.k, key), "gamma": (prepared.gamma, gate), "write": (prepared.write, gate),
            "inverse": (prepared.inverse, pair), "q": (tokens.q if read else None, key),
            "attention": (prepared.attention if read else None, pair), "v": (tokens.v, value),
            "initial_state": (initial_state, state),
        },
        {
            "o": (value_shape if read else None, value),
            "rho": (value_shape if keep else None, value),
            "states": (kept_shape if keep else None, kept),
            "final": (jax.ShapeDtypeStruct((B, Hv, K, V), jnp.float32), state),
        },
        grid=(value_tiles.number, Hv, B),
        warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return Scanned(**made)


def scan_reverse(
    tokens: Tokens, prepared: Prepared, do: jax.Array, d_final: jax.Array | None,
    *, keep: bool, scale: float, block: int, config: configurations.Reverse, interpret: bool,
) -> Reversed:  # fmt: skip
    """The gradients of all chunks' states in a row, from do [B,T,Hv,V] bf16 and d_final [B,Hv,K,V] fp32, or None for
    zeros; dv and the gradient of the state leaving every block where `keep`."""
    B, T, H, K = tokens.k.shape
    Hv, V = do.shape[2:]
    key_tiles, value_tiles, chunks = Tiling(K, config.key_tile).tiles(), Tiling(V, config.value_tile), T // CHUNK

    def gdn_reverse(refs):
        def body(tile):
            columns = tile.place
            held = TRANSPOSED if config.transposed and columns.size >= CHUNK else PLAIN

            def step(i, carry):
                gamma_end, states = carry
                chunk = chunks - 1 - i
                next_end = refs.gamma[jnp.maximum(chunk, 1) * CHUNK - 1]
                if keep:
                    boundary = triton.remainder(chunk, block // CHUNK) == block // CHUNK - 1
                    number = triton.quotient(chunk, block // CHUNK)
                    triton.when(boundary)(lambda: _keep(refs.d_states, number, columns, key_tiles, states, held))
                rows = triton.ds(chunk * CHUNK, CHUNK)
                keys = [tile.load_columns(refs.k, rows) for tile in key_tiles]
                do = triton.as_made(held.flip(refs.do[rows, columns]), interpret)
                reached = held.flip(jnp.zeros((CHUNK, columns.size), jnp.float32))
                for state, key in zip(states, keys, strict=True):
                    reached += held.product(key, state.astype(jnp.bfloat16))
                gamma = refs.gamma[rows]
                drho = held.product(refs.attention[chunk].T, do)
                if config.ahead:
                    drho = triton.summand(drho, interpret)
                drho += held.along_tokens(refs.write[rows]) * reached
                dv = held.product(refs.inverse[chunk].T, drho.astype(jnp.bfloat16))
                if keep:
                    refs.dv[rows, columns] = held.flip(dv).astype(jnp.bfloat16)
                error = (-held.along_tokens(gamma) * dv).astype(jnp.bfloat16)
                asked = (held.along_tokens(scale * gamma) * do.astype(jnp.float32)).astype(jnp.bfloat16)
                new = []
                for state, key, tile in zip(states, keys, key_tiles, strict=True):
                    entered = gamma_end * state + held.product(tile.load_columns(refs.q, rows).T, asked)
                    new.append(entered + held.product(key.T, error))
                return next_end, tuple(new)

            states = _read_state(refs.d_final, columns, key_tiles, held)
            _, states = jax.lax.fori_loop(0, chunks, step, (refs.gamma[chunks * CHUNK - 1], states))
            for tile, state in zip(key_tiles, states, strict=True):
                tile.store_rows(refs.d_initial, columns, held.flip(state))

        value_tiles.at(triton.program_id(0), body)

    key, value, gate, pair, kept, state = _specs(T, K, V, Hv // H, block)
    value_shape = jax.ShapeDtypeStruct(do.shape, jnp.bfloat16)
    kept_shape = jax.ShapeDtypeStruct((B, Hv, T // block, V, K), jnp.bfloat16)
    made = triton.call(
        gdn_reverse,
        {
            "q": (tokens.q, key), "k": (tokens.k, key), "do": (do, value), "gamma": (prepared.gamma, gate),
            "write": (prepared.write, gate), "inverse": (prepared.inverse, pair),
            "attention": (prepared.attention, pair), "d_final": (d_final, state),
        },
        {
            "dv": (value_shape if keep else None, value),
            "d_states": (kept_shape if keep else None, kept),
            "d_initial": (jax.ShapeDtypeStruct((B, Hv, K, V), jnp.float32), state),
        },
        grid=(value_tiles.number, Hv, B),
        warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return Reversed(**made)
