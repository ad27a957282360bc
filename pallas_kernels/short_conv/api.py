"""Short causal convolution of every channel: signature, equation, argument rules, choice of an implementation."""

from typing import Literal

import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas_kernels import dispatch
from pallas_kernels.short_conv import chunked, reference

NAME = "short_conv"
IMPLS = dispatch.PLAIN
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def resolve(impl: str = "auto") -> dispatch.Choice:
    """Which implementation `impl` means, and why a faster one was refused."""
    return dispatch.choose_plain(NAME, impl)


@jaxtyped(typechecker=beartype)
def short_conv(
    x: Float[Array, "B T C"],
    weight: Float[Array, "W C"],
    bias: Float[Array, "C"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial_state: Float[Array, "B W-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: dispatch.Impl = "auto",
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
    """Depthwise causal convolution with a short filter for each channel, and the inputs that a continuation needs.

        z_t = bias + sum_{0 <= j < W} weight_{W-1-j} * x_{t-j}
        y_t = SiLU(z_t), or z_t without activation            (the short convolutions of paper section 3.4)

    x              [B, T, C]
    weight         [W, C], W >= 1; its last row multiplies the current token
    bias           [C] or absent
    initial_state  [B, W-1, C], the inputs before the first token, oldest first; zero when absent
    segment_ids    [B, T], any values: no tap reaches over a change; the first segment continues initial_state
    impl           "auto" takes the fastest for this device; a named one never falls back

    Returns y [B, T, C] and the final state [B, W-1, C], the last W-1 inputs of the last segment with zeros where it is
    shorter; both in x's dtype. Inside at least fp32, float64 for float64 inputs. For one token at a time call it with
    T = 1. The gradient reaches x, weight, bias and initial_state.
    Raises ValueError for arguments outside these rules and NotImplementedError for an impl that cannot run here.
    Source: arXiv 2412.06464, section 3.4; with bias: Mamba, arXiv 2312.00752.
    """
    if x.shape[1] == 0:
        raise ValueError("T is 0; the convolution needs at least one token.")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; it must be bfloat16, float32 or float64.")
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), x.dtype)
    op = {"chunked": chunked, "reference": reference}[dispatch.taken(resolve(impl))]
    return op.short_conv(x, weight, bias, initial_state.astype(x.dtype), segment_ids, activation)


__all__ = ["IMPLS", "resolve", "short_conv"]
