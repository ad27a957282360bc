"""The gradients of every chunk of 64 tokens, all chunks at once, in one kernel.

With S the state entering the chunk, dS' the gradient of the one leaving it, D the decays between its tokens and r_j
what the leaving state has of token j,

    M1 = scale D . (dO rho^T) diag(beta)       M2 = -strict(D . (dV rho^T)) diag(beta)
    dQ = scale gamma (dO S^T) + M1 K
    dK = dR + dW,    dR = -gamma (dV S^T) + M2 K,    dW = beta r (rho dS'^T) + M2^T K + M1^T Q
    dbeta_j = k_j . dW_j / beta_j
    dg_m = sum_{i >= m} (q_i . dQ_i + k_i . dR_i - k_i . dW_i) + <S', dS'>
    <S', dS'> = gamma_C <S, dS'> + sum_j k_j . (beta r rho dS'^T)_j

dR is what token i reads of keys before it, dW what it wrote for those after. A pair after m is in both and cancels in
dg, which under strong decay is small beside it: so both have it from one rounded entry of M1 or M2, with beta in it,
and no beta is smaller than LEAST. M1 and M2 go through memory, since a transposed accumulator must not feed a product
(some Triton releases miscompile it on Hopper): they lie where dQ and dK will be until those take their place.

Heads of at most `value_tile` value columns have dO, dV and rho in shared memory from the start, and the loop over key
tiles is the one whose loads the compiler pipelines. Wider ones run over value columns within each key tile.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule import configurations
from pallas_kernels.gated_delta_rule.arrays import CHUNK, Documents, Gradients, Kept, Reversed
from pallas_kernels.gated_delta_rule.triton_prepare import pair_decay, square
from pallas_kernels.triton_dialect import BlockSpec

LEAST = 2.0**-40  # of beta here: far below what fp32 sees in a sum, far above what a quotient could not bear


def nonzero(beta):
    """beta, or LEAST where it is nearer to 0."""
    return jnp.where(jnp.abs(beta) < LEAST, LEAST, beta)


def where_written(beta, written):
    """dW of every token, or 0 where beta is: there it stands for LEAST."""
    return jnp.where(jnp.abs(beta) <= LEAST, 0.0, 1.0)[:, None] * written


def shared(state, d_state, tile, size):
    """[size] that adds up to S . dS' over the key columns that a tile owns: by value columns, which needs no exchange
    between warps, where there are `size` of them."""
    sums = jnp.sum(triton.own(state.astype(jnp.float32) * d_state.astype(jnp.float32), tile), axis=1)
    if sums.size == size:
        return sums
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (size,), 0) == 0, jnp.sum(sums), 0.0)


def over_values(V, value_tile, step, *zeros):
    """The sums that step(columns, *sums) returns, over all tiles of value columns."""

    def with_columns(sums, tile):
        return step(triton.ds(tile[0], tile[1]), *sums)

    return triton.over_tiles(V, value_tile, with_columns, zeros)


def chunks(
    kept: Kept, do: jax.Array, backward: Reversed, *, scale: float, config: configurations.Chunks, interpret: bool
) -> Gradients:
    """Every chunk's gradients, from do [B,T,Hv,V] bf16 and states and their gradients every 64 tokens."""
    tokens, prepared = kept.tokens, kept.prepared
    B, T, H, K = tokens.q.shape
    Hv, V = kept.rho.shape[2:]
    dtype = jnp.bfloat16 if Hv == H else jnp.float32  # one a value head, until they are summed

    def gdn_chunks(refs):
        rows = triton.ds(0, CHUNK)
        total, gamma, leaving, b = (ref[...] for ref in (refs.total, refs.gamma, refs.leaving, refs.beta))
        b = nonzero(b)
        sources = {"do": refs.do, "dv": refs.dv, "rho": refs.rho}
        held = {name: ref[...] for name, ref in sources.items()} if config.value_tile >= V else {}
        after = square(0) - square(1)  # rows after columns
        allowed = after >= 0
        if refs.numbers is not None:
            allowed = allowed & (refs.numbers[...][:, None] == refs.numbers[...][None, :])

        def values(name, columns):
            return held[name] if held else sources[name][rows, columns]

        def pairs(columns, m1, m2):
            rho = values("rho", columns).T
            return m1 + triton.dot(values("do", columns), rho), m2 + triton.dot(values("dv", columns), rho)

        m1, m2 = over_values(V, config.value_tile, pairs, *(jnp.zeros((CHUNK, CHUNK), jnp.float32),) * 2)
        decay = pair_decay(total, total, allowed, interpret) * b[None, :]
        for ref, m in ((refs.dq, scale * decay * m1), (refs.dk, jnp.where(after == 0, 0.0, -decay * m2))):
            ref[rows, rows] = m.astype(jnp.bfloat16).astype(dtype)
        triton.barrier(interpret)
        m1, m2 = (ref[rows, rows].astype(jnp.bfloat16) for ref in (refs.dq, refs.dk))

        def key_columns(sums, tile):
            start, width, _ = tile
            columns = triton.ds(start, width)
            moved, written_sum, ends, inner = sums

            def states(values_at, asked, read, written, inner):
                state, d_state = refs.states[values_at, columns], refs.d_states[values_at, columns]
                inner = inner + shared(state, d_state, tile, inner.size)
                asked = asked + triton.dot(values("do", values_at), state)
                read = read + triton.dot(values("dv", values_at), state)
                written = written + triton.dot(values("rho", values_at), d_state)
                return asked, read, triton.finished(written, interpret), inner

            key, query = triton.load_own(refs.k, rows, tile), triton.load_own(refs.q, rows, tile)
            zero = jnp.zeros((CHUNK, width), jnp.float32)
            asked, read, written, inner = over_values(V, config.value_tile, states, zero, zero, zero, inner)
            dq = (scale * gamma)[:, None] * asked + triton.dot(m1, key)
            triton.store_own(refs.dq, rows, tile, dq)
            read = -gamma[:, None] * read + triton.dot(m2, key)
            moved += jnp.sum(query.astype(jnp.float32) * dq + key.astype(jnp.float32) * read, axis=1)
            written = (b * leaving)[:, None] * written
            ends += jnp.sum(key.astype(jnp.float32) * written, axis=1)
            written = written + triton.dot(m2.T, key) + triton.dot(m1.T, query)
            written_sum += jnp.sum(key.astype(jnp.float32) * written, axis=1)
            triton.store_own(refs.dk, rows, tile, read + where_written(b, written))
            return moved, written_sum, ends, inner

        none = jnp.zeros((CHUNK,), jnp.float32)
        sums = none, none, none, jnp.zeros((triton.full_and_rest(V, config.value_tile)[0],), jnp.float32)
        moved, written_sum, ends, inner = triton.over_tiles(K, config.key_tile, key_columns, sums)
        refs.dbeta[...] = written_sum / b
        moved -= written_sum
        ends = jnp.sum(ends) + refs.gamma[CHUNK - 1] * jnp.sum(inner)
        refs.dg[...] = jnp.sum(jnp.where(after >= 0, moved[:, None], 0.0), axis=0) + ends

    key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, triton.quotient(h, Hv // H), 0))
    d_key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, h, 0))
    value = BlockSpec((None, CHUNK, None, V), lambda n, h, b: (b, n, h, 0))
    gate = BlockSpec((None, None, CHUNK), lambda n, h, b: (b, h, n))
    state = BlockSpec((None, None, None, V, K), lambda n, h, b: (b, h, n, 0, 0))
    number, entered = BlockSpec((None, CHUNK), lambda n, h, b: (b, n)), BlockSpec((None, 1), lambda n, h, b: (b, n))
    documents = tokens.documents or Documents(None, None)
    key_shape, gate_shape = jax.ShapeDtypeStruct((B, T, Hv, K), dtype), jax.ShapeDtypeStruct((B, Hv, T), jnp.float32)
    made = triton.call(
        gdn_chunks,
        {
            "q": (tokens.q, key), "k": (tokens.k, key), "total": (prepared.total, gate),
            "gamma": (prepared.gamma, gate), "leaving": (prepared.leaving, gate), "beta": (tokens.beta, gate),
            "do": (do, value),
            "dv": (backward.dv, value), "rho": (kept.rho, value), "states": (kept.states, state),
            "d_states": (backward.d_states, state),
            "numbers": (documents.numbers, number), "entering": (documents.entering, entered),
        },
        {
            "dq": (key_shape, d_key), "dk": (key_shape, d_key),
            "dg": (gate_shape, gate), "dbeta": (gate_shape, gate),
        },
        grid=(T // CHUNK, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return Gradients(**made)
