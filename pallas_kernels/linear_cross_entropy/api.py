"""Linear head and cross entropy in one op: signature, checks, choice of implementation."""

from functools import partial

import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_range, check_tokens
from pallas_kernels.linear_cross_entropy import chunked, reference

NAME = "linear_cross_entropy"
IMPLS = dispatch.PLAIN
TOKEN = ("batch", "tokens")
LAYOUTS = (*TOKEN, None), (None, None), TOKEN  # of x, kernel and targets
IGNORED = -100  # the target of a token that is left out, as in PyTorch and Hugging Face


def resolve(impl: str = "auto") -> dispatch.Choice:
    """Which implementation `impl` means, and why a faster one was refused."""
    return dispatch.choose_plain(NAME, impl)


@jaxtyped(typechecker=beartype)
def linear_cross_entropy(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = 512,
    impl: dispatch.Impl = "auto",
) -> Float[Array, ""]:
    """Weighted cross entropy of a linear head: sum_bt weights_bt * -log softmax(x_bt kernel)[targets_bt].

    targets lie in [0, vocab), or are -100: such a token is left out, as if its weight were 0, and so are its
    gradients, that of its weight included. For a mean over the others divide by the sum of their weights.
    "chunked" makes the logits of `chunk` tokens of every row at a time, never [B, T, vocab]; T need not be a
    multiple of chunk. Operands of the GEMMs have x's dtype (kernel is cast to it), statistics, loss and the
    sum of the kernel's gradient are fp32. Differentiable once in x, kernel and weights. "auto" is "chunked";
    "reference" makes all logits and is the oracle. Raises ValueError for chunk < 1, T = 0, another dtype of x
    or, outside of jit, which cannot look for them, other targets, and NotImplementedError for an impl that
    cannot run here.
    """
    _check(x, kernel, targets, chunk)
    kept = targets != IGNORED
    arrays = x, kernel, _columns(targets), jnp.where(kept, weights, 0)
    run = partial(_on_one_device, impl=impl, chunk=chunk)
    if not dispatch.splits_tokens(x.shape[1]):  # else the slices would be cut across devices
        return run(*arrays)
    arrays = x, kernel.astype(x.dtype), *arrays[2:]
    (parts,) = dispatch.shard(lambda *arrays: (run(*arrays)[None, None],), arrays, (*LAYOUTS, TOKEN), (TOKEN,))
    return parts.sum()


def _on_one_device(x, kernel, targets, weights, *, impl, chunk):
    """The implementation, for the part of the tokens that one device has."""
    if dispatch.taken(resolve(impl)) == "reference":
        return reference.linear_cross_entropy(x, kernel, targets, weights)
    return chunked.linear_cross_entropy(x, kernel, targets, weights, chunk)


@jaxtyped(typechecker=beartype)
def token_nll(
    x: Float[Array, "B T D"], kernel: Float[Array, "D vocab"], targets: Int[Array, "B T"], *, chunk: int = 512
) -> Float[Array, "B T"]:
    """Each token's -log softmax(x_bt kernel)[targets_bt], fp32, 0 where the target is -100; else as there."""
    _check(x, kernel, targets, chunk)
    kept = targets != IGNORED
    arrays, nll = (x, kernel, _columns(targets)), partial(chunked.token_nll, chunk=chunk)
    if not dispatch.splits_tokens(x.shape[1]):
        return jnp.where(kept, nll(*arrays), 0)
    (found,) = dispatch.shard(lambda *arrays: (nll(*arrays),), arrays, LAYOUTS, (TOKEN,))
    return jnp.where(kept, found, 0)


def _columns(targets):
    """Where each target's logit stands; in 32 bits, since 8 or 16 may not hold the number of columns."""
    return jnp.where(targets == IGNORED, 0, targets).astype(jnp.int32)


def _check(x, kernel, targets, chunk: int) -> None:
    check_tokens(x.shape[1], "the cross entropy")
    check_range("targets", jnp.where(targets == IGNORED, 0, targets), kernel.shape[1], f", or be {IGNORED}")
    check_dtypes(x=x)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it counts tokens per slice and must be at least 1.")
