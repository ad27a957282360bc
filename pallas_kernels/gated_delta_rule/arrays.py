"""The arrays that move between the kernels: which one makes them, their shapes, dtypes and meaning.

B rows (where rows are cut into pieces, B counts the pieces), T tokens, a multiple of 128, H key heads, Hv value heads,
K and V their dimensions, N = T / 64 chunks, M = T / block states kept. Arrays [B,Hv,T] are fp32, all others are bf16
unless a field's comment names another dtype. It also says when a field that may be None is.
"""

from typing import NamedTuple

import jax

CHUNK = 64  # tokens that are solved at once
BLOCK = 128  # tokens of one program of outputs and gradients where states are kept that far apart


class Documents(NamedTuple):
    """Which document each token belongs to, for packed rows; both None where a row is one document."""

    numbers: jax.Array | None = None  # [B,T] int32: of every token
    entering: jax.Array | None = None  # [B,N] int32: of the token before each chunk, 0 before the first


class Tokens(NamedTuple):
    """What the op is given token by token; with the gradients in their places, what its backward returns."""

    q: jax.Array  # [B,T,H,K]
    k: jax.Array  # [B,T,H,K]
    v: jax.Array | None  # [B,T,Hv,V]; None for zeros with V = K, and once the backward needs it no more
    g: jax.Array | None  # [B,Hv,T] log decays; None once the backward needs them no more
    beta: jax.Array  # [B,Hv,T] write strengths
    documents: Documents


class Prepared(NamedTuple):
    """What the tokens of a chunk do to each other: made by triton_prepare.py, whose text has the equations."""

    inverse: jax.Array  # [B,Hv,N,64,64] (I + strict(D . K K^T) diag(beta))^-1
    attention: jax.Array  # [B,Hv,N,64,64] scale D . (Q K^T) diag(beta)
    total: jax.Array  # [B,Hv,T] the chunk's log decays up to a token
    gamma: jax.Array  # [B,Hv,T] the fraction of the state entering the chunk that is left at a token
    leaving: jax.Array  # [B,Hv,T] the fraction of what a token writes that the leaving state still has
    write: jax.Array  # [B,Hv,T] leaving beta


class Scanned(NamedTuple):
    """Results of the serial pass forward: triton_state.py."""

    o: jax.Array | None  # [B,T,Hv,V]; None where triton_output.py makes it, or nobody asks
    rho: jax.Array | None  # [B,T,Hv,V] prediction errors; None where nothing is kept
    states: jax.Array | None  # [B,Hv,M,V,K] entering each block; None where nothing is kept
    final: jax.Array  # [B,Hv,K,V] fp32: the state after the last token


class Kept(NamedTuple):
    """What the forward keeps for the backward."""

    tokens: Tokens  # without v and g
    prepared: Prepared
    rho: jax.Array  # as in Scanned
    states: jax.Array  # as in Scanned
    maps: jax.Array | None  # [B,Hv,K,K] fp32: what each piece does to a state; None where rows are whole


class Reversed(NamedTuple):
    """Results of the serial pass in reverse: triton_state.py."""

    dv: jax.Array | None  # [B,T,Hv,V]; None where nothing is kept
    d_states: jax.Array | None  # [B,Hv,M,V,K] of the state leaving each block; None where nothing is kept
    d_initial: jax.Array  # [B,Hv,K,V] fp32


class Pairs(NamedTuple):
    """The gradients of a block's pairs of tokens, with beta in them: triton_gradients.py."""

    m1: jax.Array  # [B,Hv,T/128,128,128]
    m2: jax.Array  # [B,Hv,T/128,128,128]


class Sums(NamedTuple):
    """dq and dk, and what each tile of key columns adds to the sums behind dg and dbeta: triton_gradients.py."""

    dq: jax.Array  # [B,T,Hv,K], fp32 where several value heads share a key head
    dk: jax.Array  # like dq
    d_total: jax.Array  # [tiles,B,Hv,T] fp32, of the block's log decays up to a token
    d_log_beta: jax.Array  # [tiles,B,Hv,T] fp32: beta dbeta
    d_last: jax.Array  # [tiles,B,Hv,T/128] fp32, of all of the block's log decays


class Gradients(NamedTuple):
    """The gradients that the pass in reverse does not make."""

    dq: jax.Array  # [B,T,Hv,K], one a value head, fp32 where several value heads share a key head
    dk: jax.Array  # like dq
    dg: jax.Array  # [B,Hv,T]
    dbeta: jax.Array  # [B,Hv,T]
