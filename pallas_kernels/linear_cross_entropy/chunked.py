"""Linear cross entropy, one slice of tokens at a time, with the gradient made in the forward pass.

With logits Z = X W, P = softmax(Z) and the one-hot targets Y, the loss sum_t w_t nll_t has dZ = diag(w) (P -
Y). All of dZ is known as soon as a slice's logits are, so the forward makes dX = dZ W^T and dW += X^T dZ on
the spot: three GEMMs a slice, logits neither stored nor recomputed. The backward multiplies by the incoming
scalar. Slices are cut along T, so a batch axis sharded over devices stays sharded.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def _dot(a: Array, b: Array, dimensions: tuple) -> Array:
    """Contract the given dimensions: fp32 exactly, bf16 with fp32 accumulation."""
    precision = jax.lax.Precision.DEFAULT if a.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
    accumulator = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (dimensions, ((), ())), precision=precision, preferred_element_type=accumulator)


def _slice_nll(x: Array, kernel: Array, targets: Array) -> tuple[Array, Array, Array]:
    """nll [B, c], softmax [B, c, vocab] and the one-hot mask of a slice."""
    logits = _dot(x, kernel, ((2,), (0,)))
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    nll = jnp.log(total[..., 0]) - jnp.sum(jnp.where(hit, shifted, 0.0), axis=-1)
    return nll, exponentials / total, hit


def _over_slices(body, carry, T: int, chunk: int):
    """Scan body(carry, start, length) over slices of `chunk` tokens, then the ragged rest."""
    whole = T // chunk
    if whole:
        starts = chunk * jnp.arange(whole)
        carry, _ = jax.lax.scan(lambda carry, start: (body(carry, start, chunk), None), carry, starts)
    return body(carry, whole * chunk, T - whole * chunk) if T % chunk else carry


def token_nll(x: Array, kernel: Array, targets: Array, chunk: int) -> Array:
    """nll [B, T]."""
    kernel = kernel.astype(x.dtype)

    def body(nll: Array, start, length: int) -> Array:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(nll, _slice_nll(cut(x), kernel, cut(targets))[0], start, axis=1)

    nll = jnp.zeros(targets.shape, jnp.promote_types(x.dtype, jnp.float32))
    return _over_slices(body, nll, x.shape[1], chunk)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(x: Array, kernel: Array, targets: Array, weights: Array, chunk: int) -> Array:
    """sum_bt weights_bt nll_bt; called without a gradient it makes none."""
    return jnp.sum(weights * token_nll(x, kernel, targets, chunk))


def _forward(x: Array, kernel: Array, targets: Array, weights: Array, chunk: int):
    operand = kernel.astype(x.dtype)
    accumulator = jnp.promote_types(x.dtype, jnp.float32)

    def body(carry, start, length: int):
        nll, dx, dkernel = carry
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length, axis=1)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        slice_nll, softmax, hit = _slice_nll(cut(x), operand, cut(targets))
        dlogits = (jnp.where(hit, softmax - 1.0, softmax) * cut(weights)[..., None]).astype(x.dtype)
        slice_dx = _dot(dlogits, operand, ((2,), (1,))).astype(x.dtype)
        dkernel = dkernel + _dot(cut(x), dlogits, ((0, 1), (0, 1)))
        return put(nll, slice_nll), put(dx, slice_dx), dkernel

    carry = jnp.zeros(targets.shape, accumulator), jnp.zeros_like(x), jnp.zeros(kernel.shape, accumulator)
    nll, dx, dkernel = _over_slices(body, carry, x.shape[1], chunk)
    return jnp.sum(weights * nll), (dx, dkernel.astype(kernel.dtype), nll.astype(weights.dtype))


def _backward(chunk: int, residuals: tuple, cotangent: Array):
    dx, dkernel, nll = residuals
    scaled = [(cotangent * array).astype(array.dtype) for array in (dx, dkernel, nll)]
    return scaled[0], scaled[1], None, scaled[2]


linear_cross_entropy.defvjp(_forward, _backward)
