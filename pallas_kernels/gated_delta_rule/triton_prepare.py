"""What the 64 tokens of a chunk do to each other, for every chunk and head at once: stage 1 of the Triton kernels.

    inverse   = (I + strict(K K^T) diag(beta))^-1 . D        rho = inverse (V - gamma (K S))
    attention = scale D . (Q K^T) diag(beta)                 o   = scale gamma (Q S) + attention rho
    gamma_i   = exp(g_1 + ... + g_i)                         what the entering state has left at token i
    write_j   = exp(g_j+1 + ... + g_C) beta_j                what token j's error adds to the leaving state

The decay D is a similarity (D_ij = gamma_i / gamma_j), so the inverse is taken without it. Inverses of diagonal blocks
are joined pair by pair, X - X L X with L the corner between them: substitution by blocks, where a power series would
diverge for correlated keys.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.triton_dialect import BlockSpec

CHUNK = 64


def pair_decay(g, runs, size):
    """(cumulative sum of g, D) of `size` tokens: D_ij = exp(g_j+1 + ... + g_i), 0 for i < j or across documents."""
    total = jnp.cumsum(g)
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    allowed = i >= j
    if runs is not None:
        allowed = allowed & (runs[:, None] == runs[None, :])
    return total, jnp.exp(jnp.where(allowed, total[:, None] - total[None, :], -jnp.inf))


def invert(lower, interpret):
    """(I + lower)^-1 of a strictly lower triangular 64 x 64 tile."""
    i = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    apart = i ^ j  # in [size, 2 size) where i and j are in the two halves of a block of 2 size
    x = jnp.where(i == j, 1.0, 0.0) - jnp.where(apart == 1, lower, 0.0)
    for size in (2, 4, 8, 16, 32):  # x holds the inverses of the diagonal blocks of this size
        corner = (apart >= size) & (apart < 2 * size)
        left = triton.dot_tf32(x, jnp.where(corner, lower, 0.0), interpret)
        x = x - triton.dot_tf32(left, x, interpret)
    return x


def prepare(q, k, g, beta, runs, before, *, scale, key_tile, warps, stages, interpret):
    """(inverse, attention [B,Hv,N,64,64] bf16, gamma, write [B,Hv,T] fp32).

    q, k [B,T,H,K] bf16; g, beta [B,Hv,T]; runs [B,T] numbers the documents and before [B,N] is the document that
    entered each chunk (both None without documents). T is a multiple of 64.
    """
    B, T, H, K = q.shape
    Hv, N = g.shape[1], T // CHUNK
    group = Hv // H
    columns = triton.tiles(K, key_tile)

    def gdn_prepare(*refs):
        q_ref, k_ref, g_ref, beta_ref = refs[:4]
        inverse_ref, attention_ref, gamma_ref, write_ref = refs[-4:]
        rows = triton.ds(0, CHUNK)
        kk = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for tile in columns:
            k_tile = triton.load_own(k_ref, rows, tile)
            kk += triton.dot(k_tile, k_tile.T)
        runs_here = None if runs is None else refs[4][...]
        b = beta_ref[...]
        total, decay = pair_decay(g_ref[...], runs_here, CHUNK)
        gamma, leaving = jnp.exp(total), jnp.exp(jnp.sum(g_ref[...]) - total)
        i = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
        pairs = i > j
        if runs_here is not None:
            pairs = pairs & (runs_here[:, None] == runs_here[None, :])
            gamma = jnp.where(runs_here == refs[5][0], gamma, 0.0)
            leaving = jnp.where(runs_here == jnp.max(runs_here), leaving, 0.0)
        x = invert(jnp.where(pairs, kk * b[None, :], 0.0), interpret)
        inverse_ref[...] = (x * decay).astype(jnp.bfloat16)
        qk = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for tile in columns:
            qk += triton.dot(triton.load_own(q_ref, rows, tile), triton.load_own(k_ref, rows, tile).T)
        attention_ref[...] = (scale * decay * qk * b[None, :]).astype(jnp.bfloat16)
        gamma_ref[...] = gamma
        write_ref[...] = leaving * b

    key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, h // group, 0))
    gate = BlockSpec((None, None, CHUNK), lambda n, h, b: (b, h, n))
    pair = BlockSpec((None, None, None, CHUNK, CHUNK), lambda n, h, b: (b, h, n, 0, 0))
    documents, document_specs = (), ()
    if runs is not None:
        documents = (runs, before)
        document_specs = (
            BlockSpec((None, CHUNK), lambda n, h, b: (b, n)),
            BlockSpec((None, 1), lambda n, h, b: (b, n)),
        )
    pair_shape = jax.ShapeDtypeStruct((B, Hv, N, CHUNK, CHUNK), jnp.bfloat16)
    gate_shape = jax.ShapeDtypeStruct((B, Hv, T), jnp.float32)
    return triton.call(
        gdn_prepare, q, k, g, beta, *documents,
        grid=(N, Hv, B), in_specs=[key, key, gate, gate, *document_specs], out_specs=[pair, pair, gate, gate],
        out_shape=[pair_shape, pair_shape, gate_shape, gate_shape], warps=warps, stages=stages, interpret=interpret,
    )  # fmt: skip
