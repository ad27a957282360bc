"""Chunkwise linear attention with decay in plain JAX, forward and backward.

One head, one chunk of C tokens, rows q_i, k_i [K] and v_i [V], state S [K, V] entering the chunk; the decay is one
number a token (RetNet, Mamba2) or one for each key channel (HGRN2), all products with it are per channel:

    total_i = g_1 + ... + g_i     gamma_i = exp(total_i)     leaving_j = exp(g_{j+1} + ... + g_C)
    P_ij = sum_k q_ik k_jk exp(g_{j+1} + ... + g_i)_k for i >= j, else 0
    O   = scale (gamma Q) S + scale P V
    S'  = gamma_C S + (leaving K)^T V

Every exponent is a sum of log decays, so none is ever positive, however strong the decay. With one decay a token, P is
(Q K^T) . D with D_ij = exp(g_{j+1} + ... + g_i). With one a channel, the decay stands inside the sum over k. P is then
built by halves. Let m be the last token of a block's first half. A pair with j <= m < i has the decay exp(g_{m+1} + ...
+ g_i) exp(g_{j+1} + ... + g_m): one factor belongs to q_i, the other to k_j, and an ordinary product has all such
pairs. Pairs within a half are the same problem at half the size. So there are log2 C levels of products, no [C, C, K]
array, and no division by a decay.

The backward differentiates these lines by hand. dg_m sums over the pairs i >= m > j that g_m lies between, rows of one
sign at a time: as a cumulative sum of q dq - k dk it would cancel to rounding noise where decay is strong.

Documents: a pair interacts when both are of one document; gamma_i counts when token i still belongs to the document
that entered the chunk; leaving_j when it belongs to the last one.

Axes in einsum strings: b batch, h key head, r value heads of a key head, i j tokens, k key dim, v value dim.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import cut, document_numbers, dot, operand_dtype, pad_tokens, put, reverse_cumsum


def _later(x):
    """For each token the sum over the tokens after it, [..., C, G]; not a difference, which would lose digits."""
    return reverse_cumsum(jnp.pad(x[..., 1:, :], ((0, 0),) * (x.ndim - 2) + ((0, 1), (0, 0))), axis=-2)


def _earlier(x):
    """For each token the sum over the tokens before it, [..., C, G]."""
    return jnp.cumsum(jnp.pad(x[..., :-1, :], ((0, 0),) * (x.ndim - 2) + ((1, 0), (0, 0))), axis=-2)


def _decays(g, numbers):
    """gamma, leaving [b h r i G] and gamma_C [b h r 1 G] of a chunk, and which pairs interact [b 1 1 i j]."""
    tokens = jnp.arange(g.shape[-2])
    pairs = (tokens[:, None] >= tokens)[None, None, None]
    entered = leaves = jnp.ones((), bool)
    if numbers is not None:
        number = numbers[:, None, None, 1:]
        pairs = pairs & (number[..., :, None] == number[..., None, :])
        entered = (number == numbers[:, None, None, :1])[..., None]
        leaves = (number == number[..., -1:])[..., None]
    gamma = jnp.exp(jnp.where(entered, jnp.cumsum(g, axis=-2), -jnp.inf))
    leaving = jnp.exp(jnp.where(leaves, _later(g), -jnp.inf))
    return gamma, leaving, gamma[..., -1:, :], pairs


# --- the pairs of a chunk, scalar decay ---


def _scalar_decay(g, pairs):
    """D [b h r i j]; exponents are masked before exp."""
    tokens = jnp.arange(g.shape[-2])
    between = jnp.cumsum(jnp.where(tokens[:, None] > tokens, g, 0), axis=-2)
    return jnp.exp(jnp.where(pairs, between, -jnp.inf))


def _scalar_pairs(q, k, g, pairs, operand):
    return _scalar_decay(g, pairs) * dot("bhik,bhjk->bhij", q, k, operand)[:, :, None]


def _scalar_pairs_backward(q, k, g, pairs, d_pairs, operand):
    """dq, dk [b h i k] and dg [b h r i 1] of _scalar_pairs for the gradient d_pairs [b h r i j]."""
    weighted = d_pairs * _scalar_decay(g, pairs)
    h = weighted * dot("bhik,bhjk->bhij", q, k, operand)[:, :, None]
    dg = jnp.tril(reverse_cumsum(h, axis=-2), -1).sum(-1)[..., None]
    dq = dot("bhrij,bhjk->bhik", weighted, k, operand)
    dk = dot("bhrij,bhik->bhjk", weighted, q, operand)
    return dq, dk, dg


# --- the pairs of a chunk, a decay for each key channel ---


def _halves(*arrays):
    half = arrays[0].shape[1] // 2
    return [(x[:, :half], x[:, half:]) for x in arrays]


def _stacked(pairs):
    return [jnp.concatenate(pair, axis=0) for pair in pairs]


def _channel_pairs(q, k, g, operand):
    """P [n, C, C], zero above the diagonal, of q, k, g [n, C, K]; C a power of two."""
    n, size, _ = q.shape
    if size == 1:
        return (q * k).sum(-1, keepdims=True)
    halves = _halves(q, k, g)
    (_, q2), (k1, _), (g1, g2) = halves
    within = _channel_pairs(*_stacked(halves), operand)
    after, before = jnp.exp(jnp.cumsum(g2, axis=1)), jnp.exp(_later(g1))
    corner = dot("nik,njk->nij", q2 * after, k1 * before, operand)
    top = jnp.concatenate([within[:n], jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, within[n:]], axis=-1)], axis=1)


def _channel_pairs_backward(q, k, g, d_pairs, operand):
    """dq, dk, dg [n, C, K] of _channel_pairs; d_pairs above the diagonal is not read."""
    n, size, _ = q.shape
    if size == 1:
        return d_pairs * k, d_pairs * q, jnp.zeros_like(g)
    half = size // 2
    halves = _halves(q, k, g)
    (_, q2), (k1, _), (g1, g2) = halves
    diagonal = jnp.concatenate([d_pairs[:, :half, :half], d_pairs[:, half:, half:]], axis=0)
    within = _channel_pairs_backward(*_stacked(halves), diagonal, operand)
    after, before = jnp.exp(jnp.cumsum(g2, axis=1)), jnp.exp(_later(g1))
    corner = d_pairs[:, half:, :half]
    dq2 = after * dot("nij,njk->nik", corner, k1 * before, operand)
    dk1 = before * dot("nij,nik->njk", corner, q2 * after, operand)
    zeros = jnp.zeros_like(dq2)
    # every pair of the corner spans the middle: g_m of the second half lies below rows i >= m, of the first above j < m
    across = ((zeros, dq2), (dk1, zeros), (_earlier(k1 * dk1), reverse_cumsum(q2 * dq2, axis=1)))
    join = lambda first, second: jnp.concatenate([first, second], axis=1)  # noqa: E731
    return [join(x[:n], x[n:]) + join(*y) for x, y in zip(within, across, strict=True)]


# --- both ---


def _exact(*arrays):
    """In at least fp32: what is multiplied by decays before it is rounded for a dot."""
    return (x.astype(jnp.promote_types(jnp.float32, x.dtype)) for x in arrays)


def _per_head(q, k, g):
    """q, k [b h i k] and g [b h r i k] as one batch of value heads, [b*h*r, i, k] each."""
    q, k = (jnp.broadcast_to(x[:, :, None], g.shape) for x in (q, k))
    return [x.reshape(-1, *g.shape[3:]) for x in (q, k, g)]


def _pairs(q, k, g, pairs, operand):
    if g.shape[-1] == 1:
        return _scalar_pairs(q, k, g, pairs, operand)
    p = _channel_pairs(*_per_head(q, k, g), operand)
    return jnp.where(pairs, p.reshape(*g.shape[:4], g.shape[3]), 0)


def _pairs_backward(q, k, g, pairs, d_pairs, operand):
    if g.shape[-1] == 1:
        return _scalar_pairs_backward(q, k, g, pairs, d_pairs, operand)
    d_pairs = jnp.where(pairs, d_pairs, 0).reshape(-1, *d_pairs.shape[3:])
    dq, dk, dg = (x.reshape(g.shape) for x in _channel_pairs_backward(*_per_head(q, k, g), d_pairs, operand))
    return dq.sum(2), dk.sum(2), dg


def _forward(q, k, v, g, initial_state, numbers, scale, chunk, *, read=True, keep=False):
    """((o if `read`, final state), state entering each chunk [N, b, h, r, K, V] if `keep`)."""
    batch, length, heads, key_dim = q.shape
    operand = operand_dtype(q, k, v)

    def step(carry, start):
        state, o = carry
        kept = state.astype(operand) if keep else None
        qc, kc, vc, gc, numbers_c = cut((q, k, v, g), numbers, start, chunk)
        qc, kc = _exact(qc, kc)
        gamma, leaving, gamma_end, pairs = _decays(gc, numbers_c)
        if read:
            oc = dot("bhrik,bhrkv->bhriv", gamma * qc[:, :, None], state, operand)
            oc += dot("bhrij,bhrjv->bhriv", _pairs(qc, kc, gc, pairs, operand), vc, operand)
            o = put(o, scale * oc, start)
        written = dot("bhrik,bhriv->bhrkv", leaving * kc[:, :, None], vc, operand)
        return (jnp.swapaxes(gamma_end, -1, -2) * state + written, o), kept

    state = initial_state.reshape(batch, heads, v.shape[2] // heads, key_dim, v.shape[-1])
    o = jnp.zeros_like(v) if read else None
    (state, o), kept = jax.lax.scan(step, (state, o), jnp.arange(0, length, chunk))
    return (o, state.reshape(initial_state.shape)), kept


def _backward(q, k, v, g, numbers, kept, do, d_final, scale, chunk):
    """All gradients in one reverse scan over chunks; S entered the chunk, dS' is the gradient of the state it left.

    dV = P^T dO + (leaving K) dS'       dP = tril(dO V^T)        dS = gamma_C dS' + (gamma Q)^T dO
    dQ = gamma (dO S^T) + pairs   dK = leaving (V dS'^T) + pairs
    dg_m = pairs + (reads of S by i >= m) + (writes by j < m that leave) + gamma_C <S, dS'>
    """
    batch, length, heads, key_dim = q.shape
    operand = operand_dtype(q, k, v)
    product = partial(dot, operand=operand)
    reduce = (lambda x: x.sum(-1, keepdims=True)) if g.shape[-1] == 1 else (lambda x: x)

    def step(carry, x):
        d_left, dq, dk, dv, dg = carry
        start, state = x
        qc, kc, vc, gc, doc, numbers_c = cut((q, k, v, g, do), numbers, start, chunk)
        qc, kc, doc = _exact(qc, kc, doc)
        doc = scale * doc
        gamma, leaving, gamma_end, pairs = _decays(gc, numbers_c)
        dvc = product("bhrij,bhriv->bhrjv", _pairs(qc, kc, gc, pairs, operand), doc)
        dvc += product("bhrik,bhrkv->bhriv", leaving * kc[:, :, None], d_left)
        d_pairs = product("bhriv,bhrjv->bhrij", doc, vc)
        dqc, dkc, dgc = _pairs_backward(qc, kc, gc, pairs, d_pairs, operand)
        dq_read = gamma * product("bhriv,bhrkv->bhrik", doc, state)
        dk_write = leaving * product("bhriv,bhrkv->bhrik", vc, d_left)
        dgc += reverse_cumsum(reduce(qc[:, :, None] * dq_read), axis=-2)
        dgc += _earlier(reduce(kc[:, :, None] * dk_write))
        dgc += gamma_end * reduce((state * d_left).sum(-1))[..., None, :]
        d_state = jnp.swapaxes(gamma_end, -1, -2) * d_left
        d_state += product("bhrik,bhriv->bhrkv", gamma * qc[:, :, None], doc)
        put_key = lambda buffer, tile: put(buffer, tile[:, :, None], start)  # noqa: E731
        new = put_key(dq, dqc + dq_read.sum(2)), put_key(dk, dkc + dk_write.sum(2)), put(dv, dvc, start)
        return (d_state, *new, put(dg, dgc, start)), None

    by_value_head = d_final.shape
    d_final = d_final.reshape(batch, heads, v.shape[2] // heads, key_dim, v.shape[-1])
    carry = (d_final, *(jnp.zeros_like(x) for x in (q, k, v, g)))
    (d_state, *grads), _ = jax.lax.scan(step, carry, (jnp.arange(0, length, chunk), kept), reverse=True)
    return *grads, d_state.reshape(by_value_head)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _op(q, k, v, g, initial_state, numbers, scale, chunk, residuals):
    return _forward(q, k, v, g, initial_state, numbers, scale, chunk)[0]


def _op_fwd(q, k, v, g, initial_state, numbers, scale, chunk, residuals):
    keep = residuals == "saved"
    outputs, kept = _forward(q, k, v, g, initial_state, numbers, scale, chunk, keep=keep)
    # the initial state is needed only to run the forward again
    return outputs, (q, k, v, g, numbers, kept if keep else initial_state)


def _op_bwd(scale, chunk, residuals, kept, cotangents):
    q, k, v, g, numbers, states = kept
    if residuals == "inputs":
        _, states = _forward(q, k, v, g, states, numbers, scale, chunk, read=False, keep=True)
    return *_backward(q, k, v, g, numbers, states, *cotangents, scale, chunk), None


_op.defvjp(_op_fwd, _op_bwd)


def linear_attention(q, k, v, g, initial_state, segment_ids, scale, chunk, residuals):
    """g [B, T, Hv, 1 or K], the rest as in api; segment_ids may be None. Any T: the tail is empty tokens."""
    length = q.shape[1]
    padding = -length % chunk
    numbers = document_numbers(segment_ids, padding)
    # k = v = g = 0 writes nothing and keeps the state
    q, k, v, g = (pad_tokens(x, padding) for x in (q, k, v, g))
    o, state = _op(q, k, v, g, initial_state, numbers, scale, chunk, residuals)
    return o[:, :length], state
