"""Linear attention with decay: signature, equation, argument rules, and the choice of an implementation."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas_kernels import admission, context, dispatch, placement, triton_step
from pallas_kernels.arguments import check_chunk, check_dtypes, check_heads, check_sizes, check_tokens
from pallas_kernels.chunkwise import confine
from pallas_kernels.linear_attention import chunked, reference, triton_channel, triton_head

NAME = "linear_attention"
IMPLS = dispatch.WITH_KERNELS


def resolve(
    impl: str = "auto",
    *,
    shape: tuple[int, int, int, int, int] = (1, 4096, 16, 128, 128),
    channels: bool = False,
    dtype: Any = jnp.bfloat16,
) -> dispatch.Choice:
    """Which implementation `impl` means on this machine for these sizes, and why a faster one was refused.

    shape: [B, T, Hv, K, V]
    channels: whether g has a decay for each key channel
    dtype: the widest of q, k and v

    "auto" takes the kernels for bfloat16 alone, since they round wider inputs to it. Raises dispatch.CannotRun for a
    named one that cannot run.
    """

    def why_not(interpret):
        return triton_head.why_not(*shape[3:], interpret=interpret)

    admits = partial(admission.refusal, NAME, K=shape[3], V=shape[4], channels=channels)
    return dispatch.choose(NAME, impl, why_not, admits, dtype=dtype, rounds_to=jnp.bfloat16)


@jaxtyped(typechecker=beartype)
def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hv"] | Float[Array, "B T Hv K"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B Hv K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: dispatch.Impl = "auto",
    chunk: int = 64,
    residuals: Literal["saved", "inputs"] = "saved",
    configuration: triton_head.Configuration | triton_channel.Configuration | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """Decayed linear attention of every token and head, and the state after the last one.

        S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,    alpha_t = exp(g_t)
        o_t = scale S_t^T q_t                    (paper section 2.1 and Table 1, Mamba2's row; S is its transpose)

    q, k           [B, T, H, K]
    v              [B, T, Hv, V], Hv a multiple of H; value head h reads key head h // (Hv // H)
    g              [B, T, Hv] one log decay a head (RetNet, Mamba2) or [B, T, Hv, K] one a key channel (HGRN2), <= 0
    scale          defaults to K^-1/2
    initial_state  [B, Hv, K, V], zero when absent; what is inf or NaN in it reaches the first segment alone
    segment_ids    [B, T], any values: the state resets where they change; the first segment continues initial_state
    impl           "auto" takes the fastest for this device, these sizes and dtypes; a named one never falls back. The
                   kernels ("triton") take K and V from 16 to 512, round operands to bf16 and refuse float64
    chunk          16, 32, 64 or 128 tokens at once in "chunked"; the kernels have their own
    residuals      what the forward keeps for the backward. "saved": besides the inputs, the state entering each chunk
                   (and in g's place, with decays a channel in the kernels, the sums of g in each chunk). "inputs": the
                   inputs alone; the forward runs again
    configuration  of the kernels: triton_head's, or triton_channel's for decays a channel; when absent, the one for
                   these sizes. Other implementations do not read it

    Returns o [B, T, Hv, V] in v's dtype and the final state [B, Hv, K, V] in fp32 (float64 for float64 inputs).
    q, k, v are bfloat16 (bf16 operands at the dots, fp32 elsewhere), float32 or float64 (exact throughout, but
    the kernels round float32 to bf16 operands). g = -inf, a decay of 0, is allowed; no exponent is ever positive.
    The kernels' dg is what is left of numbers as large as do . o, summed over a chunk: its error is up to 2.5 % of
    those of its chunk, also where they belong to another document.
    Raises ValueError for sizes, chunk or dtypes outside these rules, jaxtyping's TypeCheckError for other shapes and
    types, NotImplementedError for an impl that cannot run here. The numbers in the arrays are not looked at.
    Source: arXiv 2412.06464, section 2; per channel: HGRN2, arXiv 2404.07904.
    """
    check_heads(q.shape[2], v.shape[2])
    check_tokens(q.shape[1], "linear attention")
    check_sizes(K=q.shape[3], V=v.shape[3])
    check_chunk(chunk)
    check_dtypes(q=q, k=k, v=v)
    exact = jnp.promote_types(jnp.float32, v.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    g = (g[..., None] if g.ndim == 3 else g).astype(exact)
    if initial_state is not None:
        initial_state = initial_state.astype(exact)
    static = {"scale": scale, "impl": impl, "chunk": chunk, "residuals": residuals, "configuration": configuration}
    token, state = ("batch", "tokens", "heads", None), ("batch", "heads", None, None)
    return dispatch.shard(
        partial(_on_one_device, **static),
        (q, k, v, g, initial_state, segment_ids),
        (token, token, token, token, state, token[:2]),
        (token, state),
        across=partial(_across_devices, **static),
    )


def _across_devices(q, k, v, g, initial_state, segment_ids, *, axis, **static):
    """`_on_one_device` where each device has a part of every row's tokens."""
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], v.shape[2], q.shape[3], v.shape[3]), g.dtype)

    def op(inputs, state, segment_ids):
        return _on_one_device(*inputs, state, segment_ids, **static)

    def part(inputs, segment_ids):
        return jnp.exp(inputs[3].sum(1))[..., None], op(inputs, jnp.zeros_like(initial_state), segment_ids)[1]

    return context.recurrence(op, part, context.FACTOR, (q, k, v, g), initial_state, segment_ids, axis=axis)


def _on_one_device(q, k, v, g, initial_state, segment_ids, *, impl, scale, chunk, residuals, configuration):
    """The implementation that is right for the part of the arrays that one device has."""
    (B, T, _, K), (Hv, V), carried = q.shape, v.shape[2:], initial_state is not None
    shape, channels = (B, T, Hv, K, V), g.shape[3] > 1
    choice = resolve(impl, shape=shape, channels=channels, dtype=jnp.result_type(q, k, v))
    impl = dispatch.taken(choice)
    kernels = impl in dispatch.KERNELS and v.size
    if not carried and not kernels:
        initial_state = jnp.zeros((B, Hv, K, V), g.dtype)
    if impl == "reference":
        segments = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        return reference.linear_attention(q, k, v, g, initial_state, segments, scale)
    if kernels:
        kind = triton_channel.Configuration if channels else triton_head.Configuration
        if configuration is not None and not isinstance(configuration, kind):
            decays = "a key channel" if channels else "a head"
            raise ValueError(
                f"configuration is {configuration}; one decay {decays} takes a {kind.__module__}.Configuration."
            )
        if channels:
            configuration = configuration or triton_channel.configuration_for(K, V, Hv // q.shape[2])
            op = partial(triton_channel.linear_attention, q, k, v, g, configuration=configuration)
        else:
            configuration = configuration or triton_head.configuration_for(K, V)
            op = partial(triton_head.linear_attention, q, k, v, g[..., 0], configuration=configuration)
        interpret = impl == "triton_interpret"
        op = partial(op, segment_ids=segment_ids, scale=scale, residuals=residuals, interpret=interpret)
    else:
        initial_state = _no_constant(initial_state, q, v)
        op = partial(
            chunked.linear_attention, q, k, v, g,
            segment_ids=segment_ids, scale=scale, chunk=chunk, residuals=residuals,
        )  # fmt: skip
    if carried and segment_ids is not None:
        return confine(op, initial_state, segment_ids, ~jnp.isfinite(initial_state), axis=2)
    return op(initial_state)


def _no_constant(state, q, v):
    """`state`, which XLA cannot take for a constant. In jaxlib 0.10 to 0.12 a product with one on a CPU, reduced in the
    same program, is wrong by any factor: where a row is one chunk, the sum of an output would be."""
    if placement.on_gpu() or not q.size:
        return state
    q, v = (jax.lax.stop_gradient(x) for x in (q, v))
    never = q[:, 0].min(1)[:, None, :, None] + v[:, 0, :, None, :] < -jnp.inf
    return state + jnp.where(never, 1, 0).astype(state.dtype)


def resolve_step(
    impl: str = "auto",
    *,
    shape: tuple[int, int, int, int] = (1, 16, 128, 128),
    channels: bool = False,
    dtype: Any = jnp.bfloat16,
) -> dispatch.Choice:
    """What `impl` means for one token, as `resolve` says it of many. The kernel multiplies in fp32, so that "auto"
    takes it for float32 inputs too.

    shape: of the state, [B, Hv, K, V]
    channels: whether g has a decay for each key channel
    dtype: the widest of q, k and v
    """
    return triton_step.choose(NAME, impl, shape, dtype, channels=channels)


@jaxtyped(typechecker=beartype)
def linear_attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hv"] | Float[Array, "B Hv K"],
    state: Float[Array, "B Hv K V"],
    *,
    scale: float | None = None,
    impl: dispatch.Impl = "auto",
) -> tuple[Float[Array, "B Hv V"], Float[Array, "B Hv K V"]]:
    """One token of `linear_attention`: (o in v's dtype, state in fp32 or float64). Ranges and errors as there.

        S' = Diag(alpha) S + k v^T      o = scale S'^T q

    impl    as there. The kernel ("triton") reads S once and writes S' in its place (triton_step.py); it takes K up to
            512, computes in fp32 and refuses float64. All others are the same plain JAX

    Gradients are those of plain JAX, which keep what a step was given; the kernel has no second ones.
    """
    check_heads(q.shape[1], v.shape[1])
    check_sizes(K=q.shape[2], V=v.shape[2])
    check_dtypes(q=q, k=k, v=v)
    exact = jnp.promote_types(jnp.float32, v.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    g = g[..., None] if g.ndim == 2 else g
    head, whole = ("batch", "heads", None), ("batch", "heads", None, None)
    return dispatch.shard(
        partial(_step_on_one_device, scale=scale, impl=impl),
        (q, k, v, g.astype(exact), state.astype(exact)),
        (head, head, head, head, whole),
        (head, whole),
    )


def _step_on_one_device(q, k, v, g, state, *, scale, impl):
    """The implementation of a step that is right for the part of the arrays that one device has."""
    channels = g.shape[2] > 1
    choice = resolve_step(impl, shape=state.shape, channels=channels, dtype=jnp.result_type(q, k, v))
    impl, plain = dispatch.taken(choice), partial(_plain_step, scale=scale)
    if impl not in dispatch.KERNELS or not state.size:
        return plain(q, k, v, g, state)

    def kernel(q, k, v, g, state):
        interpret = impl == "triton_interpret"
        return triton_step.advance_state(q, k, v, g, None, state, scale=scale, interpret=interpret)

    return triton_step.with_gradients_of(plain, kernel, q, k, v, g, state)


def _plain_step(q, k, v, g, state, *, scale):
    """A step in JAX."""
    q, k = (jnp.repeat(x.astype(state.dtype), v.shape[1] // q.shape[1], axis=1) for x in (q, k))
    o, state = reference.step(q, k, v.astype(state.dtype), g, state, scale)
    return o.astype(v.dtype), state
