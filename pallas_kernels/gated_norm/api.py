"""RMS norm with a SiLU gate after or before it: signature, equation, argument rules, choice of an implementation."""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

from pallas_kernels import admission, dispatch
from pallas_kernels.arguments import check_dtypes
from pallas_kernels.gated_norm import chunked, reference, triton_norm

NAME = "gated_norm"
IMPLS = dispatch.WITH_KERNELS
FEW_VECTORS = 128


def resolve(
    impl: str = "auto",
    *,
    shape: tuple[int, ...] = (4096, 256),
    gated: bool = True,
    groups: int = 1,
    dtype: Any = jnp.bfloat16,
) -> dispatch.Choice:
    """Which implementation `impl` means on this machine, and why a faster one was refused.

    shape: that of x
    gated: whether there is a gate
    groups: equal parts of a vector that are normalised by themselves
    dtype: the widest of x and gate

    Without a gate, and for fewer than FEW_VECTORS vectors, "auto" takes "chunked", which XLA joins with the operations
    around it. Raises dispatch.CannotRun for a named one that cannot run.
    """
    if impl == "auto" and (not gated or math.prod(shape[:-1]) < FEW_VECTORS):
        return dispatch.Choice(NAME, "chunked")

    def why_not(interpret):
        return triton_norm.why_not(shape[-1] // groups, interpret=interpret)

    admits = partial(admission.refusal, NAME, D=shape[-1], groups=groups)
    return dispatch.choose(NAME, impl, why_not, admits, dtype=dtype)


@jaxtyped(typechecker=beartype)
def gated_norm(
    x: Float[Array, "*N D"],
    weight: Float[Array, "D"],
    gate: Float[Array, "*N D"] | None = None,
    *,
    eps: float,
    gate_first: bool = False,
    groups: int = 1,
    impl: dispatch.Impl = "auto",
) -> Float[Array, "*N D"]:
    """RMS norm of the last axis, gated after it or before it.

        y = weight * norm(x) * SiLU(gate)        gate after the norm: Gated DeltaNet, RetNet
        y = weight * norm(x * SiLU(gate))        gate_first: Mamba2
        norm(u) = u / sqrt(mean(u^2) + eps)      the mean over each of `groups` equal parts of D on its own

    x       [..., D]; on [B, T, H, V] one weight [V] serves all heads
    weight  [D]
    gate    like x, of any of its dtypes; absent: a plain RMS norm
    eps     > 0
    groups  divides D
    impl    "auto" takes the fastest for this device and this use; a named one never falls back. The kernels compute in
            fp32, refuse float64, and take groups of at most 8,192 elements

    Returns y like x, in x's dtype; inside at least fp32, float64 for float64 inputs. The gradient reaches x, weight and
    gate.
    Raises ValueError for sizes or dtypes outside these rules, jaxtyping's TypeCheckError for other shapes and types,
    NotImplementedError for an impl that cannot run here.
    Source: arXiv 2412.06464, section 3.4; gate first, groups: Mamba2, arXiv 2405.21060.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups is {groups}; it must divide D, {x.shape[-1]}.")
    if eps <= 0:
        raise ValueError(f"eps is {eps}; it must be positive.")
    check_dtypes(x=x, gate=gate)
    run = partial(_on_one_device, eps=float(eps), gate_first=gate_first, groups=groups, impl=impl)
    if x.ndim < 3:
        return run(x, weight, gate)
    token = ("batch", "tokens", *["heads" if x.ndim == 4 else None] * (x.ndim - 3), None)
    (y,) = dispatch.shard(lambda *arrays: (run(*arrays),), (x, weight, gate), (token, (None,), token), (token,))
    return y


def _on_one_device(x, weight, gate, *, eps, gate_first, groups, impl):
    """The implementation that is right for the part of the arrays that one device has."""
    widest = x.dtype if gate is None else jnp.promote_types(x.dtype, gate.dtype)
    impl = dispatch.taken(resolve(impl, shape=x.shape, gated=gate is not None, groups=groups, dtype=widest))
    if x.size and impl in dispatch.KERNELS:
        return triton_norm.gated_norm(x, weight, gate, eps, gate_first, groups, interpret=impl == "triton_interpret")
    op = reference if impl == "reference" else chunked
    return op.gated_norm(x, weight, gate, eps, gate_first, groups)
