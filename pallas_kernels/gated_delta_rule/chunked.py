"""The chunkwise gated delta rule in plain JAX, forward and backward: read it beside the paper's section 3.

One head, one chunk of C tokens, rows q_i, k_i [K] and v_i [V], state S [K, V] entering the chunk:

    total_i = g_1 + ... + g_i      gamma_i = exp(total_i)
    D_ij = exp(total_i - total_j) for i >= j, else 0      leaving_j = D_Cj
    inverse = (I + strict(D . K K^T) diag(beta))^-1
    rho = inverse (V - gamma (K S))                    rho_i = v_i - alpha_i S_{i-1}^T k_i, the prediction error
    O   = scale gamma (Q S) + scale (D . Q K^T) (beta rho)
    S' = gamma_C S + K^T (leaving beta rho)

The paper's WY form writes the same with W and U; the residual form needs neither, and its backward (below) never
differentiates the inverse. What the forward keeps for the backward is rho and the state every BLOCK tokens.

Documents: `numbers` counts them along the sequence. A pair (i, j) interacts when both are of one document; gamma_i
counts when token i still belongs to the document that entered the chunk; leaving_j when it belongs to the last one.

Axes in einsum strings: b batch, h key head, r value heads of a key head, i j tokens, k key dim, v value dim.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.chunkwise import cut, document_numbers, dot, operand_dtype, pad_tokens, put, reverse_cumsum

BLOCK = 128  # tokens between kept states, and in one step of the backward's scan


def _decays(g, numbers):
    """D [b h r i j], gamma [b h r i], leaving [b h r j] and gamma_C [b h r] of one tile; numbers [b, 1 + tile] or None.

    total_i - total_j is summed over its own tokens: as a difference of two cumulative sums it would lose the digits
    that a strongly decaying token elsewhere in the tile has used up. Exponents are masked before exp.
    """
    tokens = jnp.arange(g.shape[-1])
    log_decay = jnp.cumsum(jnp.where(tokens[:, None] > tokens, g[..., :, None], 0), axis=-2)
    pairs, entered = tokens[:, None] >= tokens, True
    if numbers is not None:
        number = numbers[:, None, None, 1:]
        pairs = pairs & (number[..., :, None] == number[..., None, :])
        entered = number == numbers[:, None, None, :1]
    decay = jnp.exp(jnp.where(pairs, log_decay, -jnp.inf))
    gamma = jnp.exp(jnp.where(entered, jnp.cumsum(g, axis=-1), -jnp.inf))
    return decay, gamma, decay[..., -1, :], gamma[..., -1]


def _invert(lower):
    """(I + lower)^-1 for strictly lower triangular `lower` [..., C, C], C a power of two, by halves.

    The corner of the inverse is -X1 L X0 with X0, X1 the halves' inverses: substitution by blocks, as stable as
    substitution by rows. A power series of `lower` is not: with correlated keys its terms grow without bound.
    """
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    half = size // 2
    first, second = lower[..., :half, :half], lower[..., half:, half:]
    halves = _invert(jnp.stack([first, second], axis=-3))
    first, second = halves[..., 0, :, :], halves[..., 1, :, :]
    highest = jax.lax.Precision.HIGHEST
    corner = -jnp.matmul(jnp.matmul(second, lower[..., half:, :half], precision=highest), first, precision=highest)
    top = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _prepare(q, k, g, beta, numbers, scale, operand):
    """(gamma, leaving, gamma_C, inverse, scale D . (Q K^T) diag(beta)) of a chunk: none depends on the state."""
    decay, gamma, leaving, gamma_end = _decays(g, numbers)
    strict = jnp.tril(dot("bhik,bhjk->bhij", k, k, operand), -1)[:, :, None]
    lower = decay * strict * beta[..., None, :]
    inverse = _invert(lower)
    attention = scale * decay * dot("bhik,bhjk->bhij", q, k, operand)[:, :, None] * beta[..., None, :]
    return gamma, leaving, gamma_end, inverse, attention


def _prepare_chunks(q, k, g, beta, numbers, scale, operand, chunk):
    """A block cut into chunks: per chunk its span and (k, q, beta, *_prepare), made for all of them at once."""
    spans = [slice(start, start + chunk) for start in range(0, g.shape[-1], chunk)]
    stack = lambda cut: jnp.stack([cut(span) for span in spans])  # noqa: E731
    q, k = stack(lambda span: q[:, :, span]), stack(lambda span: k[:, :, span])
    g, beta = stack(lambda span: g[..., span]), stack(lambda span: beta[..., span])
    if numbers is not None:
        numbers = stack(lambda span: numbers[:, span.start : span.stop + 1])
    prepare = partial(_prepare, scale=scale, operand=operand)
    prepared = jax.vmap(prepare, in_axes=(0, 0, 0, 0, None if numbers is None else 0))(q, k, g, beta, numbers)
    return [(span, q[n], k[n], beta[n], *(x[n] for x in prepared)) for n, span in enumerate(spans)]


def _forward(q, k, v, g, beta, initial_state, numbers, scale, chunk, *, read=True, keep=False):
    """((o if `read`, final state), (rho [B,T,Hv,V], state entering each block [N,b,h,r,K,V]) if `keep`)."""
    batch, length, heads, key_dim = q.shape
    block, operand = min(BLOCK, length), operand_dtype(q, k, v)

    def step(carry, start):
        state, o, kept_rho = carry
        kept_state = state.astype(operand) if keep else None
        qb, kb, vb, gb, betab, numbers_b = cut((q, k, v, g, beta), numbers, start, block)
        o_parts, rho_parts = [], []
        chunks = _prepare_chunks(qb, kb, gb, betab, numbers_b, scale, operand, chunk)
        for span, qc, kc, bc, gamma, leaving, gamma_end, inverse, attention in chunks:
            error = vb[..., span, :] - gamma[..., None] * dot("bhik,bhrkv->bhriv", kc, state, operand)
            rho = dot("bhrij,bhrjv->bhriv", inverse, error, operand)
            if read:
                carried = scale * gamma[..., None] * dot("bhik,bhrkv->bhriv", qc, state, operand)
                o_parts.append(carried + dot("bhrij,bhrjv->bhriv", attention, rho, operand))
            added = dot("bhik,bhriv->bhrkv", kc, (leaving * bc)[..., None] * rho, operand)
            state = gamma_end[..., None, None] * state + added
            rho_parts.append(rho)
        if read:
            o = put(o, jnp.concatenate(o_parts, axis=3), start)
        if keep:
            kept_rho = put(kept_rho, jnp.concatenate(rho_parts, axis=3), start)
        return (state, o, kept_rho), kept_state

    state = initial_state.reshape(batch, heads, v.shape[2] // heads, key_dim, v.shape[-1])
    o = jnp.zeros_like(v) if read else None
    kept_rho = jnp.zeros(v.shape, operand) if keep else None
    starts = jnp.arange(0, length, block)
    (state, o, kept_rho), kept_states = jax.lax.scan(step, (state, o, kept_rho), starts)
    return (o, state.reshape(initial_state.shape)), (kept_rho, kept_states)


def _backward(q, k, v, g, beta, numbers, kept_rho, kept_states, do, d_final, scale, chunk):
    """All gradients in one reverse scan over blocks: the serial part chunk by chunk, then the block's gradients.

    serial, reverse:  drho = attention^T dO + leaving beta (K dS'),   dV = inverse^T drho,
                      dS = gamma_C dS' + Q^T (scale gamma dO) - K^T (gamma dV)
    per block:        M1 = scale D . (dO rho^T),  M2 = -strict(D . (dV rho^T)),  H = M1 . QK^T + M2 . KK^T
                      dQ = scale gamma (dO S^T) + (M1 beta) K
                      dK = -(gamma dV) S^T + beta leaving (rho dS'^T) + (M2 beta) K + (M1 beta)^T Q + (M2 beta)^T K
                      dbeta_j = sum_i H_ij + k_j . (leaving rho dS'^T)_j
                      dg_m = sum_{i >= m > j} H_ij beta_j + (reads of S by i >= m) + (writes by j < m that leave)
                             + gamma_C <S, dS'>
    g_m scales every pair it lies between. As a cumulative sum of row sums less column sums the same number would
    cancel to rounding noise where decay is strong, and the chain rule multiplies that noise by g.
    """
    batch, length, heads, key_dim = q.shape
    block, operand = min(BLOCK, length), operand_dtype(q, k, v)
    product = partial(dot, operand=operand)

    def step(carry, x):
        d_state, dq, dk, dv, dg, dbeta = carry
        start, state = x
        arrays = (q, k, g, beta, do, kept_rho)
        qb, kb, gb, betab, dob, rho, numbers_b = cut(arrays, numbers, start, block)
        d_left = d_state  # gradient of the state that leaves the block
        dv_parts = []
        chunks = _prepare_chunks(qb, kb, gb, betab, numbers_b, scale, operand, chunk)
        for span, qc, kc, bc, gamma, leaving, gamma_end, inverse, attention in reversed(chunks):
            doc = dob[..., span, :]
            drho = product("bhrji,bhrjv->bhriv", attention, doc)
            drho += (leaving * bc)[..., None] * product("bhik,bhrkv->bhriv", kc, d_state)
            dvc = product("bhrji,bhrjv->bhriv", inverse, drho)
            d_state = gamma_end[..., None, None] * d_state
            d_state += product("bhik,bhriv->bhrkv", qc, (scale * gamma)[..., None] * doc)
            d_state -= product("bhik,bhriv->bhrkv", kc, gamma[..., None] * dvc)
            dv_parts.append(dvc)
        dvb = jnp.concatenate(dv_parts[::-1], axis=3)

        decay, gamma, leaving, gamma_end = _decays(gb, numbers_b)
        m1 = scale * decay * product("bhriv,bhrjv->bhrij", dob, rho)
        m2 = -decay * jnp.tril(product("bhriv,bhrjv->bhrij", dvb, rho), -1)
        h = m1 * product("bhik,bhjk->bhij", qb, kb)[:, :, None] + m2 * product("bhik,bhjk->bhij", kb, kb)[:, :, None]
        m1, m2 = m1 * betab[..., None, :], m2 * betab[..., None, :]
        dq_read = scale * gamma[..., None] * product("bhriv,bhrkv->bhrik", dob, state)
        dk_read = -product("bhriv,bhrkv->bhrik", gamma[..., None] * dvb, state)
        dk_write = product("bhriv,bhrkv->bhrik", leaving[..., None] * rho, d_left)
        # dq and dk of a key head are summed over its value heads before they leave fp32
        dqb = dq_read.sum(2) + product("bhrij,bhjk->bhik", m1, kb)
        dkb = (dk_read + betab[..., None] * dk_write).sum(2) + product("bhrij,bhjk->bhik", m2, kb)
        dkb += product("bhrji,bhjk->bhik", m1, qb) + product("bhrji,bhjk->bhik", m2, kb)

        kw = (kb[:, :, None] * dk_write).sum(-1)
        between = jnp.tril(reverse_cumsum(h * betab[..., None, :], axis=-2), -1).sum(-1)
        read = reverse_cumsum((qb[:, :, None] * dq_read).sum(-1) + (kb[:, :, None] * dk_read).sum(-1), axis=-1)
        written = jnp.cumsum(betab * kw, axis=-1) - betab * kw
        through = gamma_end * (state * d_left).sum((-2, -1))
        dgb = between + read + written + through[..., None]

        put_key = lambda buffer, tile: put(buffer, tile[:, :, None], start)  # noqa: E731
        new = (put_key(dq, dqb), put_key(dk, dkb), put(dv, dvb, start), put(dg, dgb, start))
        return (d_state, *new, put(dbeta, h.sum(-2) + kw, start)), None

    by_value_head = d_final.shape
    d_final = d_final.reshape(batch, heads, v.shape[2] // heads, key_dim, v.shape[-1])
    carry = (d_final, *(jnp.zeros_like(x) for x in (q, k, v, g, beta)))
    (d_state, *grads), _ = jax.lax.scan(step, carry, (jnp.arange(0, length, block), kept_states), reverse=True)
    return *grads, d_state.reshape(by_value_head)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _op(q, k, v, g, beta, initial_state, numbers, scale, chunk, residuals):
    return _forward(q, k, v, g, beta, initial_state, numbers, scale, chunk)[0]


def _op_fwd(q, k, v, g, beta, initial_state, numbers, scale, chunk, residuals):
    keep = residuals == "saved"
    outputs, kept = _forward(q, k, v, g, beta, initial_state, numbers, scale, chunk, keep=keep)
    # the initial state is needed only to run the forward again
    return outputs, (q, k, v, g, beta, numbers, *(kept if keep else (initial_state, None)))


def _op_bwd(scale, chunk, residuals, kept, cotangents):
    q, k, v, g, beta, numbers, rho, states = kept
    if residuals == "inputs":
        _, (rho, states) = _forward(q, k, v, g, beta, rho, numbers, scale, chunk, read=False, keep=True)
    do, d_final = cotangents
    grads = _backward(q, k, v, g, beta, numbers, rho, states, do, d_final, scale, chunk)
    return *grads, None


_op.defvjp(_op_fwd, _op_bwd)


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, scale, chunk, residuals):
    """Arguments as in api.gated_delta_rule; segment_ids may be None. Any T: the tail is padded with empty tokens."""
    length = q.shape[1]
    block = min(BLOCK, -(-length // chunk) * chunk)
    padding = -length % block
    numbers = document_numbers(segment_ids, padding)
    # k = v = beta = g = 0 writes nothing and keeps the state
    q, k, v, g, beta = (pad_tokens(x, padding) for x in (q, k, v, g, beta))
    o, state = _op(q, k, v, g, beta, initial_state, numbers, scale, chunk, residuals)
    return o[:, :length], state
