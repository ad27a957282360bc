"""Short causal convolution of every channel: signature, equation, argument rules, choice of an implementation."""

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas_kernels import admission, context, dispatch
from pallas_kernels.arguments import check_dtypes, check_sizes, check_tokens
from pallas_kernels.short_conv import chunked, reference, triton_conv
from pallas_kernels.short_conv.triton_conv import LEAST_TOKENS

NAME = "short_conv"
IMPLS = dispatch.WITH_KERNELS


def resolve(
    impl: str = "auto",
    *,
    shape: tuple[int, int, int] = (1, 4096, 256),
    width: int = 4,
    l2norm: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> dispatch.Choice:
    """Which implementation `impl` means on this machine, and why a faster one was refused.

    shape: [B, T, C] of x
    width: W, the rows of the filter
    l2norm: the channels of a head that is brought to norm 1, or None
    dtype: that of x

    For fewer than LEAST_TOKENS tokens "auto" takes "chunked". Raises dispatch.CannotRun for a named one that cannot
    run.
    """
    if impl == "auto" and shape[1] < LEAST_TOKENS:
        return dispatch.Choice(NAME, "chunked")

    def why_not(interpret):
        return triton_conv.why_not(shape[1], width, l2norm, interpret=interpret)

    admits = partial(admission.refusal, NAME, W=width, l2norm=l2norm)
    return dispatch.choose(NAME, impl, why_not, admits, dtype=dtype)


@jaxtyped(typechecker=beartype)
def short_conv(
    x: Float[Array, "B T C"],
    weight: Float[Array, "W C"],
    bias: Float[Array, "C"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    l2norm: int | None = None,
    initial_state: Float[Array, "B W-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: dispatch.Impl = "auto",
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
    """Depthwise causal convolution with a short filter for each channel, and the inputs that a continuation needs.

        z_t = bias + sum_{0 <= j < W} weight_{W-1-j} * x_{t-j}
        a_t = SiLU(z_t), or z_t without activation            (the short convolutions of paper section 3.4)
        y_t = a_t / sqrt(|a_t|^2 + 1e-6) of every head, or a_t without l2norm

    x              [B, T, C]
    weight         [W, C], W >= 1; its last row multiplies the current token
    bias           [C] or absent
    l2norm         the size of a head, which divides C: every `l2norm` neighbouring channels are brought to norm 1, as
                   the q and k of Gated DeltaNet are
    initial_state  [B, W-1, C], the inputs before the first token, oldest first; zero when absent
    segment_ids    [B, T], any values: no tap reaches over a change; the first segment continues initial_state
    impl           "auto" takes the fastest for this device and these sizes; a named one never falls back. The kernels
                   compute in fp32 and refuse float64; they take at least 16 tokens, W up to 8 and l2norm up to 512

    Returns y [B, T, C] and the final state [B, W-1, C], the last W-1 inputs of the last segment with zeros where it is
    shorter; both in x's dtype. Inside at least fp32, float64 for float64 inputs. For one token at a time call it with
    T = 1. The gradient reaches x, weight, bias and initial_state.
    Raises ValueError for sizes or dtypes outside these rules, jaxtyping's TypeCheckError for other shapes and types,
    NotImplementedError for an impl that cannot run here.
    Source: arXiv 2412.06464, section 3.4; with bias: Mamba, arXiv 2312.00752.
    """
    check_tokens(x.shape[1], "the convolution")
    check_sizes(W=weight.shape[0])
    check_dtypes(x=x)
    if l2norm is not None and (l2norm < 1 or x.shape[2] % l2norm):
        raise ValueError(f"l2norm is {l2norm}; it must divide the number of channels, {x.shape[2]}.")
    if initial_state is not None:
        initial_state = initial_state.astype(x.dtype)
    token, state, channel = ("batch", "tokens", "heads"), ("batch", None, "heads"), (None, "heads")
    arrays = (x, weight, bias, initial_state, segment_ids)
    layouts = (token, channel, channel[1:], state, token[:2])
    if l2norm is not None:  # a head stays whole
        layouts = tuple(tuple(None if axis == "heads" else axis for axis in layout) for layout in layouts)
    static = {"activation": activation, "l2norm": l2norm, "impl": impl}
    run = partial(_on_one_device, **static)
    return dispatch.shard(run, arrays, layouts, (layouts[0], layouts[3]), across=partial(_across_devices, **static))


def _across_devices(x, weight, bias, initial_state, segment_ids, *, axis, **static):
    """`_on_one_device` where each device has a part of every row's tokens."""
    before = context.last_inputs(x, weight.shape[0] - 1, initial_state, segment_ids, axis=axis)
    y, last = _on_one_device(x, weight, bias, before, segment_ids, **static)
    return y, context.of_last(last, axis=axis)


def _on_one_device(x, weight, bias, initial_state, segment_ids, *, activation, l2norm, impl):
    """The implementation that is right for the part of the arrays that one device has."""
    choice = resolve(impl, shape=x.shape, width=weight.shape[0], l2norm=l2norm, dtype=x.dtype)
    impl = dispatch.taken(choice)
    if x.size and impl in dispatch.KERNELS:
        return triton_conv.short_conv(
            x, weight, bias, initial_state, segment_ids, activation, l2norm, interpret=impl == "triton_interpret"
        )
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), x.dtype)
    op = reference if impl == "reference" else chunked
    return op.short_conv(x, weight, bias, initial_state, segment_ids, activation, l2norm)
