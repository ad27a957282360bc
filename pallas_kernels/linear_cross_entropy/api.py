"""Linear head and cross entropy in one op: signature, checks, choice of implementation."""

from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas_kernels import dispatch
from pallas_kernels.arguments import check_dtypes, check_tokens
from pallas_kernels.linear_cross_entropy.chunked import linear_cross_entropy_chunked, token_nll_chunked
from pallas_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

NAME = "linear_cross_entropy"
IMPLS = dispatch.PLAIN


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

    targets lie in [0, vocab) (not checked). The logits exist for `chunk` tokens of every row at a time, never
    as [B, T, vocab]; T need not be a multiple of chunk. Operands of the GEMMs have x's dtype (kernel is cast
    to it), statistics, loss and the sum of the kernel's gradient are fp32. Differentiable once in x, kernel
    and weights. "auto" is "chunked"; "reference" makes all logits and is the oracle. Raises ValueError for
    chunk < 1, T = 0 or another dtype of x, and NotImplementedError for an impl that cannot run here.
    """
    _check(x, chunk)
    if dispatch.taken(resolve(impl)) == "reference":
        return linear_cross_entropy_reference(x, kernel, targets, weights)
    return linear_cross_entropy_chunked(x, kernel, targets, weights, chunk)


@jaxtyped(typechecker=beartype)
def token_nll(
    x: Float[Array, "B T D"], kernel: Float[Array, "D vocab"], targets: Int[Array, "B T"], *, chunk: int = 512
) -> Float[Array, "B T"]:
    """Each token's -log softmax(x_bt kernel)[targets_bt], fp32; arguments as of linear_cross_entropy."""
    _check(x, chunk)
    return token_nll_chunked(x, kernel, targets, chunk)


def _check(x, chunk: int) -> None:
    check_tokens(x.shape[1], "the cross entropy")
    check_dtypes(x=x)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it counts tokens per slice and must be at least 1.")
