"""Mamba's selective scan: signature, equation, argument rules, and the choice of an implementation."""

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas_kernels import admission, context, dispatch
from pallas_kernels.arguments import check_chunk, check_dtypes, check_tokens
from pallas_kernels.chunkwise import confine
from pallas_kernels.selective_scan import chunked, reference, triton_scan

NAME = "selective_scan"
IMPLS = dispatch.WITH_KERNELS


def resolve(
    impl: str = "auto", *, shape: tuple[int, int, int, int] = (1, 4096, 4096, 16), dtype: Any = jnp.bfloat16
) -> dispatch.Choice:
    """Which implementation `impl` means on this machine, and why a faster one was refused.

    shape: [B, T, D, N]
    dtype: the widest of x, B and C

    Raises dispatch.CannotRun for a named one that cannot run.
    """

    def why_not(interpret):
        return triton_scan.why_not(shape[3], interpret=interpret)

    return dispatch.choose(NAME, impl, why_not, partial(admission.refusal, NAME, N=shape[3]), dtype=dtype)


@jaxtyped(typechecker=beartype)
def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "D"],
    *,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: dispatch.Impl = "auto",
    chunk: int = 64,
    residuals: Literal["saved", "inputs"] = "saved",
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Selective state space scan of every channel, and the state after the last token.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,    y_t = sum_n C_t h_t + D x_t    (each channel has its own h [N])

    x              [B, T, D]
    dt             [B, T, D] step sizes, >= 0 (after softplus)
    A              [D, N] rates, <= 0
    B, C           [B, T, N], shared by all channels
    D              [D] weight of the direct path
    initial_state  [B, D, N], zero when absent; what is inf or NaN in it reaches the first segment alone
    segment_ids    [B, T], any values: the state resets where they change; the first segment continues initial_state
    impl           "auto" takes the fastest that runs here, a named one never falls back; the kernels ("triton") take N
                   up to 32 and bfloat16 or float32
    chunk          16, 32, 64 or 128 tokens whose [D, N] states exist at once in "chunked"; the kernels do not read it
    residuals      what the forward keeps for the backward. "saved": besides the inputs, the state that enters each
                   chunk, or in the kernels each 4 tokens. "inputs": the inputs alone; the forward runs again

    Returns y [B, T, D] in x's dtype and the final state [B, D, N] in fp32 (float64 for float64 inputs). x, B and C are
    bfloat16, float32 or float64; all arithmetic is at least fp32.
    Raises ValueError for sizes, chunk or dtypes outside these rules, jaxtyping's TypeCheckError for other shapes and
    types, NotImplementedError for an impl that cannot run here. The numbers in the arrays are not looked at.
    Source: Mamba, arXiv 2312.00752, section 3.2 with the simplified discretisation of B.
    """
    check_tokens(x.shape[1], "the selective scan")
    check_chunk(chunk)
    check_dtypes(x=x, B=B, C=C)
    exact = jnp.promote_types(jnp.float32, x.dtype)
    dt, A, D = (y.astype(exact) for y in (dt, A, D))
    carried = initial_state is not None
    if not carried:
        initial_state = jnp.zeros((x.shape[0], *A.shape))
    initial_state = initial_state.astype(exact)
    static = {"impl": impl, "chunk": chunk, "residuals": residuals}
    token, of_all, state = ("batch", "tokens", "heads"), ("batch", "tokens", None), ("batch", "heads", None)
    return dispatch.shard(
        partial(_on_one_device, carried=carried, **static),
        (x, dt, A, B, C, D, initial_state, segment_ids),
        (token, token, ("heads", None), of_all, of_all, ("heads",), state, of_all[:2]),
        (token, state),
        across=partial(_across_devices, **static),
    )


def _across_devices(x, dt, A, B, C, D, initial_state, segment_ids, *, axis, **static):
    """`_on_one_device` where each device has a part of every row's tokens."""

    def op(inputs, state, segment_ids):
        return _on_one_device(*inputs, state, segment_ids, carried=True, **static)

    def part(inputs, segment_ids):
        decays = jnp.exp(inputs[1].sum(1)[..., None] * inputs[2])
        return decays, op(inputs, jnp.zeros_like(initial_state), segment_ids)[1]

    return context.recurrence(op, part, context.FACTOR, (x, dt, A, B, C, D), initial_state, segment_ids, axis=axis)


def _on_one_device(x, dt, A, B, C, D, initial_state, segment_ids, *, impl, carried, chunk, residuals):
    """The implementation that is right for the part of the arrays that one device has."""
    impl = dispatch.taken(resolve(impl, shape=(*x.shape, A.shape[1]), dtype=jnp.result_type(x, B, C)))
    if impl == "reference":
        segments = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        return reference.selective_scan(x, dt, A, B, C, D, initial_state, segments)
    op = partial(chunked.selective_scan, x, dt, A, B, C, D, segment_ids=segment_ids, chunk=chunk, residuals=residuals)
    if impl in dispatch.KERNELS and x.size and A.size:
        op = partial(
            triton_scan.selective_scan, x, dt, A, B, C, D,
            segment_ids=segment_ids, residuals=residuals, interpret=impl == "triton_interpret",
        )  # fmt: skip
    if carried and segment_ids is not None:
        return confine(op, initial_state, segment_ids, ~jnp.isfinite(initial_state), axis=2)
    return op(initial_state)


@jaxtyped(typechecker=beartype)
def selective_scan_step(
    x: Float[Array, "B D"],
    dt: Float[Array, "B D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B N"],
    C: Float[Array, "B N"],
    D: Float[Array, "D"],
    state: Float[Array, "B D N"],
) -> tuple[Float[Array, "B D"], Float[Array, "B D N"]]:
    """One token of `selective_scan`: (y in x's dtype, state in fp32 or float64). Ranges as there."""
    check_dtypes(x=x)
    exact = jnp.promote_types(jnp.float32, x.dtype)
    y, state = reference.step(*(array.astype(exact) for array in (x, dt, A, B, C, D, state)))
    return y.astype(x.dtype), state
