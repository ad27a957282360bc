"""RMS norm with a SiLU gate after or before it: signature, equation, argument rules, choice of an implementation."""

import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

from pallas_kernels import dispatch
from pallas_kernels.gated_norm import chunked, reference

NAME = "gated_norm"
IMPLS = dispatch.PLAIN
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def resolve(impl: str = "auto") -> dispatch.Choice:
    """Which implementation `impl` means, and why a faster one was refused."""
    return dispatch.choose_plain(NAME, impl)


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
    impl    "auto" takes the fastest for this device; a named one never falls back

    Returns y like x, in x's dtype; inside at least fp32, float64 for float64 inputs. The gradient reaches x, weight and
    gate.
    Raises ValueError for arguments outside these rules and NotImplementedError for an impl that cannot run here.
    Source: arXiv 2412.06464, section 3.4; gate first, groups: Mamba2, arXiv 2405.21060.
    """
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups is {groups}; it must divide D, {x.shape[-1]}.")
    if eps <= 0:
        raise ValueError(f"eps is {eps}; it must be positive.")
    for name, y in (("x", x), ("gate", gate)):
        if y is not None and y.dtype not in DTYPES:
            raise ValueError(f"{name} is {y.dtype}; it must be bfloat16, float32 or float64.")
    op = {"chunked": chunked, "reference": reference}[dispatch.taken(resolve(impl))]
    return op.gated_norm(x, weight, gate, float(eps), gate_first, groups)


__all__ = ["IMPLS", "gated_norm", "resolve"]
