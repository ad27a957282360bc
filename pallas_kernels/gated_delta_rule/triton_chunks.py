"""The gradients of every chunk of 64 tokens, all chunks at once, in one kernel.

With S the state entering the chunk, dS' the gradient of the state S' leaving it, and D, gamma and leaving as in
triton_prepare.py,

    M1 = scale D . (dO rho^T) diag(beta)       M2 = -strict(D . (dV rho^T)) diag(beta)
    dQ = scale gamma (dO S^T) + M1 K
    dK = dR + dW,    dR = -gamma (dV S^T) + M2 K,    dW = beta leaving (rho dS'^T) + M2^T K + M1^T Q
    dbeta_j = k_j . dW_j / beta_j
    dg_m = sum_{i >= m} (q_i . dQ_i + k_i . dR_i - k_i . dW_i) + <S', dS'>
    <S', dS'> = gamma_C <S, dS'> + sum_j k_j . (beta leaving rho dS'^T)_j

dR is the part of dK from a token's own reads of the state, dW the part from what later tokens read of its write. A pair
of tokens that both come after m contributes to both and cancels in dg_m, which under strong decay is small beside it.
So both take it from the same rounded entry of M1 or M2, with beta already in it, and |beta| is at least triton_terms'
LEAST. M1 and M2 go through memory, since a transposed accumulator must not feed a product (some Triton releases
miscompile it on Hopper): they lie in the outputs dQ and dK until those are written.

Heads of at most `value_tile` value columns have dO, dV and rho in shared memory from the start, and the loop over key
tiles is the one whose loads the compiler pipelines. Wider ones run over value columns within each key tile.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.gated_delta_rule import configurations
from pallas_kernels.gated_delta_rule import triton_terms as terms
from pallas_kernels.gated_delta_rule.arrays import CHUNK, Gradients, Kept, Reversed
from pallas_kernels.tiles import Tiling
from pallas_kernels.triton_calls import BlockSpec


def make_gradients(
    kept: Kept, do: jax.Array, backward: Reversed, *, scale: float, config: configurations.Chunks, interpret: bool
) -> Gradients:
    """Every chunk's gradients, from do [B,T,Hv,V] bf16 and states and their gradients every 64 tokens."""
    tokens, prepared = kept.tokens, kept.prepared
    B, T, H, K = tokens.q.shape
    Hv, V = kept.rho.shape[2:]
    value_tiles = Tiling(V, config.value_tile)
    dtype = jnp.bfloat16 if Hv == H else jnp.float32  # one a value head, until they are summed

    def gdn_chunks(refs):
        rows = triton.ds(0, CHUNK)
        total, gamma, leaving, b = (ref[...] for ref in (refs.total, refs.gamma, refs.leaving, refs.beta))
        b = terms.nonzero(b)
        sources = {"do": refs.do, "dv": refs.dv, "rho": refs.rho}
        loaded = {name: ref[...] for name, ref in sources.items()} if config.value_tile >= V else {}
        after = terms.square(0) - terms.square(1)  # rows after columns
        allowed = after >= 0
        if refs.numbers is not None:
            allowed = allowed & (refs.numbers[...][:, None] == refs.numbers[...][None, :])

        def values(name, columns):
            return loaded[name] if loaded else sources[name][rows, columns]

        def add_pairs(columns, m1, m2):
            rho = values("rho", columns).T
            return m1 + triton.dot(values("do", columns), rho), m2 + triton.dot(values("dv", columns), rho)

        m1, m2 = terms.over_values(value_tiles, add_pairs, *(jnp.zeros((CHUNK, CHUNK), jnp.float32),) * 2)
        decay = terms.pair_decay(total, total, allowed, interpret) * b[None, :]
        for ref, m in ((refs.dq, scale * decay * m1), (refs.dk, jnp.where(after == 0, 0.0, -decay * m2))):
            ref[rows, rows] = m.astype(jnp.bfloat16).astype(dtype)
        triton.barrier(interpret)
        m1, m2 = (ref[rows, rows].astype(jnp.bfloat16) for ref in (refs.dq, refs.dk))

        def make_key_columns(sums, tile):
            columns = tile.place
            d_total, d_log_beta, d_last, inner = sums

            def add_states(values_at, asked, read, d_write, inner):
                state, d_state = refs.states[values_at, columns], refs.d_states[values_at, columns]
                inner = inner + terms.inner_product(state, d_state, tile, inner.size)
                asked = asked + triton.dot(values("do", values_at), state)
                read = read + triton.dot(values("dv", values_at), state)
                d_write = d_write + triton.dot(values("rho", values_at), d_state)
                return asked, read, triton.finished(d_write, interpret), inner

            key, query = tile.load_columns(refs.k, rows), tile.load_columns(refs.q, rows)
            zero = jnp.zeros((CHUNK, tile.width), jnp.float32)
            asked, read, d_write, inner = terms.over_values(value_tiles, add_states, zero, zero, zero, inner)
            dq = (scale * gamma)[:, None] * asked + triton.dot(m1, key)
            tile.store_columns(refs.dq, rows, dq)
            read = -gamma[:, None] * read + triton.dot(m2, key)
            d_total += jnp.sum(query.astype(jnp.float32) * dq + key.astype(jnp.float32) * read, axis=1)
            d_write = (b * leaving)[:, None] * d_write
            d_last += jnp.sum(key.astype(jnp.float32) * d_write, axis=1)
            d_write = d_write + triton.dot(m2.T, key) + triton.dot(m1.T, query)
            d_log_beta += jnp.sum(key.astype(jnp.float32) * d_write, axis=1)
            tile.store_columns(refs.dk, rows, read + terms.where_nonzero(b, d_write))
            return d_total, d_log_beta, d_last, inner

        none = jnp.zeros((CHUNK,), jnp.float32)
        sums = none, none, none, jnp.zeros((value_tiles.width,), jnp.float32)
        d_total, d_log_beta, d_last, inner = Tiling(K, config.key_tile).over(make_key_columns, sums)
        refs.dbeta[...] = d_log_beta / b
        d_total -= d_log_beta
        d_last = jnp.sum(d_last) + refs.gamma[CHUNK - 1] * jnp.sum(inner)
        refs.dg[...] = jnp.sum(jnp.where(after >= 0, d_total[:, None], 0.0), axis=0) + d_last

    key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, triton.quotient(h, Hv // H), 0))
    d_key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, h, 0))
    value = BlockSpec((None, CHUNK, None, V), lambda n, h, b: (b, n, h, 0))
    gate = BlockSpec((None, None, CHUNK), lambda n, h, b: (b, h, n))
    state = BlockSpec((None, None, None, V, K), lambda n, h, b: (b, h, n, 0, 0))
    number, entered = BlockSpec((None, CHUNK), lambda n, h, b: (b, n)), BlockSpec((None, 1), lambda n, h, b: (b, n))
    documents = tokens.documents
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
