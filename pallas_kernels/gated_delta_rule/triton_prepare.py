"""What the 64 tokens of a chunk do to each other, for every chunk and head at once: the first of the kernels.

    inverse   = (I + strict(D . K K^T) diag(beta))^-1        rho = inverse (V - gamma (K S))
    attention = scale D . (Q K^T) diag(beta)                 O   = scale gamma (Q S) + attention rho
    total_i   = g_1 + ... + g_i
    gamma_i   = exp(total_i)                                 the fraction of the entering state left at token i
    leaving_j = exp(g_j+1 + ... + g_C)                       the fraction of token j's write left at the chunk's end
    write_j   = leaving_j beta_j                             the factor of k_j rho_j^T in the leaving state

with D_ij = exp(total_i - total_j) for i >= j in one document, else 0. gamma is 0 outside the document that enters the
chunk, leaving outside the one that leaves it. S is the entering state, rho the prediction errors (triton_state.py).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.gated_delta_rule import configurations
from pallas_kernels.gated_delta_rule.arrays import CHUNK, Prepared, Tokens
from pallas_kernels.gated_delta_rule.triton_terms import pair_decay, square
from pallas_kernels.tiles import Tiling
from pallas_kernels.triton_calls import BlockSpec


def invert(lower):
    """(I + lower)^-1 of a strictly lower triangular 64 x 64 tile, by blocks: substitution, where a power series would
    diverge for correlated keys.

    X holds the inverses of the diagonal blocks. Two of them join through the corner L between them: the new corner is
    that of -X L X. Products take fp16 operands, whose 11 bits are TF32's, at half the traffic; for keys of unit norm
    and beta <= 2 the entries stay far from its range.
    """
    apart = square(0) ^ square(1)  # in [size, 2 size) where i and j are in the two halves of a block of 2 size
    x = jnp.where(apart == 0, 1.0, 0.0) - jnp.where(apart == 1, lower, 0.0)
    lower = lower.astype(jnp.float16)
    for level in (1, 2, 3, 4, 5):  # blocks of 2 ** level
        block = x.astype(jnp.float16)
        corner = triton.dot(triton.dot(block, lower).astype(jnp.float16), block)
        x = x - jnp.where((apart >> level) == 1, corner, 0.0)
    return x


def solve_chunks(tokens: Tokens, *, scale: float, config: configurations.Prepare, interpret: bool) -> Prepared:
    """Every chunk's pairs and decays, all at once."""
    B, T, H, K = tokens.q.shape
    Hv, N = tokens.g.shape[1], T // CHUNK
    group = Hv // H

    def gdn_prepare(refs):
        rows = triton.ds(0, CHUNK)
        g, b = refs.g[...], refs.beta[...]
        total = jnp.cumsum(g)
        gamma, leaving = triton.exp(total, interpret), triton.exp(jnp.sum(g) - total, interpret)
        allowed = square(0) >= square(1)
        if refs.numbers is not None:
            numbers = refs.numbers[...]
            allowed = allowed & (numbers[:, None] == numbers[None, :])
            gamma = jnp.where(numbers == refs.entering[0], gamma, 0.0)
            leaving = jnp.where(numbers == jnp.max(numbers), leaving, 0.0)
        refs.total[...] = total
        refs.gamma[...] = gamma
        refs.leaving[...] = leaving
        refs.write[...] = leaving * b

        def add_products(sums, tile):
            kk, qk = sums
            query, key = tile.load_columns(refs.q, rows), tile.load_columns(refs.k, rows)
            return kk + triton.dot(key, key.T), qk + triton.dot(query, key.T)

        kk, qk = Tiling(K, config.key_tile).over(add_products, (jnp.zeros((CHUNK, CHUNK), jnp.float32),) * 2)
        decay = pair_decay(total, total, allowed, interpret)
        refs.attention[...] = (scale * decay * qk * b[None, :]).astype(jnp.bfloat16)
        lower = jnp.where(square(0) > square(1), decay * kk * b[None, :], 0.0)
        refs.inverse[...] = invert(lower).astype(jnp.bfloat16)

    key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, triton.quotient(h, group), 0))
    gate = BlockSpec((None, None, CHUNK), lambda n, h, b: (b, h, n))
    pair = BlockSpec((None, None, None, CHUNK, CHUNK), lambda n, h, b: (b, h, n, 0, 0))
    number, entered = BlockSpec((None, CHUNK), lambda n, h, b: (b, n)), BlockSpec((None, 1), lambda n, h, b: (b, n))
    documents = tokens.documents
    pair_shape = jax.ShapeDtypeStruct((B, Hv, N, CHUNK, CHUNK), jnp.bfloat16)
    gate_shape = jax.ShapeDtypeStruct((B, Hv, T), jnp.float32)
    made = triton.call(
        gdn_prepare,
        {
            "q": (tokens.q, key), "k": (tokens.k, key), "g": (tokens.g, gate), "beta": (tokens.beta, gate),
            "numbers": (documents.numbers, number), "entering": (documents.entering, entered),
        },
        {"inverse": (pair_shape, pair), "attention": (pair_shape, pair)}
        | dict.fromkeys(("total", "gamma", "leaving", "write"), (gate_shape, gate)),
        grid=(N, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return Prepared(**made)
