"""The gated delta rule: signature, equation, argument rules, and the choice of an implementation."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from beartype import beartype
from jaxtyping import Array, Float, Int, jaxtyped

from pallas_kernels import admission, context, dispatch, triton_step
from pallas_kernels.arguments import check_chunk, check_dtypes, check_heads, check_sizes, check_tokens
from pallas_kernels.chunkwise import confine
from pallas_kernels.gated_delta_rule import chunked, configurations, reference, triton_op

NAME = "gated_delta_rule"
IMPLS = dispatch.WITH_KERNELS


def resolve(
    impl: str = "auto",
    *,
    key_dim: int,
    value_dim: int,
    chunk: int = 64,
    dtype: Any = jnp.bfloat16,
) -> dispatch.Choice:
    """Which implementation `impl` means on this machine at these sizes, and why a faster one was refused.

    dtype: the widest of q, k and v

    "auto" takes the kernels for bfloat16 alone, since they round wider inputs to it, and only where their configuration
    passed the float64 check on this kind of device. Raises dispatch.CannotRun for a named one that cannot run.
    """

    def why_not(interpret):
        return triton_op.why_not(key_dim, value_dim, chunk, interpret=interpret)

    def admits():
        listed = configurations.admitted(key_dim, value_dim, *admission.here())
        return admission.refusal(NAME, listed=listed, K=key_dim, V=value_dim)

    return dispatch.choose(NAME, impl, why_not, admits, dtype=dtype, rounds_to=jnp.bfloat16)


@jaxtyped(typechecker=beartype)
def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hv"],
    beta: Float[Array, "B T Hv"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B Hv K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: dispatch.Impl = "auto",
    chunk: int = 64,
    residuals: Literal["saved", "inputs"] = "saved",
    configuration: configurations.Configuration | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """Gated delta rule of every token and head, and the state after the last one.

        S_t = alpha_t S_{t-1} + beta_t k_t (v_t - alpha_t S_{t-1}^T k_t)^T,    alpha_t = exp(g_t)
        o_t = scale S_t^T q_t                                        (paper eq. 10; S is its transpose)

    q, k           [B, T, H, K], k of unit norm (a longer k makes the recurrence, and the chunk's inverse, grow)
    v              [B, T, Hv, V], Hv a multiple of H; value head h reads key head h // (Hv // H)
    g              [B, T, Hv] log decay, <= 0; g = 0 is DeltaNet
    beta           [B, T, Hv] write strength in [0, 2]
    scale          defaults to K^-1/2
    initial_state  [B, Hv, K, V], zero when absent; what is inf or NaN in it reaches the first segment alone
    segment_ids    [B, T], any values: the state resets where they change; the first segment continues initial_state
    impl           "reference", "chunked", "triton", "triton_interpret", or "auto": the fastest that was tested for this
                   device, these sizes and bf16. A named one never falls back; the kernels ("triton" and its
                   interpreter) have the sizes of triton_op.SIZES, chunk 64 alone, and refuse float64
    chunk          16, 32, 64 or 128 tokens solved at once
    residuals      what the forward keeps for the backward. "saved": besides the inputs, the prediction errors
                   [B, T, Hv, V] and the state every 128 tokens. The kernels keep the state every 64 or 128 tokens, and
                   instead of v and g what each chunk prepared: 272 bytes a token and value head. "inputs": the inputs
                   alone; that part of the forward runs again
    configuration  of the kernels: absent, the table's for this device and these sizes; no other implementation reads it

    Returns o [B, T, Hv, V] in v's dtype and the final state [B, Hv, K, V] in fp32 (float64 for float64 inputs).
    q, k, v are bfloat16 (bf16 operands at the large dots, fp32 elsewhere), float32 or float64 (exact throughout, but
    the kernels round float32 to bf16 operands).
    bf16 operands lose accuracy where keys repeat and nothing decays. With one key for all tokens and g = 0, a chunk's
    inverse has the entries -beta (1 - beta)^(i - j - 1). Towards beta = 2 they alternate in sign without getting
    smaller, so that sums of them cancel, only their rounding errors are left, and the state keeps those. The relative
    L2 error of o is then 1 % at beta = 1 (of dbeta 20 %) and 20 to 80 % at beta = 1.9. At beta = 1.9 it is 10 % with
    chunk 16, 2 % with g = -0.05, and 1e-5 for float32 in "chunked".
    Raises ValueError for sizes, chunk or dtypes outside these rules, jaxtyping's TypeCheckError for other shapes and
    types, NotImplementedError for an impl that cannot run here. The numbers in the arrays are not looked at.
    Source: arXiv 2412.06464, section 3.
    """
    check_heads(q.shape[2], v.shape[2])
    check_tokens(q.shape[1], "the gated delta rule")
    check_sizes(K=q.shape[3], V=v.shape[3])
    check_chunk(chunk)
    check_dtypes(q=q, k=k, v=v)
    exact = jnp.promote_types(jnp.float32, v.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    static = {"scale": scale, "impl": impl, "chunk": chunk, "residuals": residuals, "configuration": configuration}
    run = partial(_on_one_device, **static)
    token, state = ("batch", "tokens", "heads", None), ("batch", "heads", None, None)
    return dispatch.shard(
        run,
        (q, k, v, g.astype(exact), beta.astype(exact), initial_state, segment_ids),
        (token, token, token, token[:3], token[:3], state, token[:2]),
        (token, state),
        across=partial(_across_devices, **static),
    )


def _across_devices(q, k, v, g, beta, initial_state, segment_ids, *, axis, **static):
    """`_on_one_device` where each device has a part of every row's tokens."""
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], v.shape[2], q.shape[3], v.shape[3]), g.dtype)

    def op(inputs, state, segment_ids):
        return _on_one_device(*inputs, state, segment_ids, **static)

    inputs, state = (q, k, v, g, beta), initial_state.astype(g.dtype)
    return context.recurrence(op, partial(_part, **static), context.MATRIX, inputs, state, segment_ids, axis=axis)


def _part(inputs, segment_ids, *, scale, impl, chunk, residuals, configuration):
    """(M [B, Hv, K, K], F [B, Hv, K, V]) of S_T = M S_0 + F, for a part of the tokens.

    Without kernels the op runs once with K more value columns, whose values are zeros and whose initial state is the
    identity: their final state is M. That of the others, from zero, is F.
    """
    q, k, v, g, beta = inputs
    (batch, tokens, _, K), Hv = q.shape, v.shape[2]
    impl = _choice(impl, q, k, v, chunk).impl
    if impl in dispatch.KERNELS and batch:
        interpret = impl == "triton_interpret"
        return triton_op.part(k, v, g, beta, segment_ids, configuration, interpret=interpret)
    values = jnp.concatenate([jnp.zeros((batch, tokens, Hv, K), v.dtype), v], axis=3)
    identity = jnp.broadcast_to(jnp.eye(K, values.shape[3], dtype=g.dtype), (batch, Hv, K, values.shape[3]))
    static = {"scale": scale, "chunk": chunk, "residuals": residuals, "configuration": configuration}
    _, state = _run(impl, q, k, values, g, beta, identity, segment_ids=segment_ids, **static)
    return state[..., :K], state[..., K:]


def _choice(impl, q, k, v, chunk):
    """`resolve` for these arrays."""
    return resolve(impl, key_dim=q.shape[3], value_dim=v.shape[3], chunk=chunk, dtype=jnp.result_type(q, k, v))


def _on_one_device(q, k, v, g, beta, initial_state, segment_ids, *, scale, impl, chunk, residuals, configuration):
    """The implementation that is right for the part of the arrays that one device has."""
    impl = dispatch.taken(_choice(impl, q, k, v, chunk))
    static = {"scale": scale, "chunk": chunk, "residuals": residuals, "configuration": configuration}
    if initial_state is not None and segment_ids is not None and impl != "reference":
        bad = ~jnp.isfinite(initial_state).all(2, keepdims=True)  # one reaches its whole value column
        op = partial(_run, impl, q, k, v, g, beta, segment_ids=segment_ids, **static)
        return confine(op, initial_state, segment_ids, bad, axis=2)
    return _run(impl, q, k, v, g, beta, initial_state, segment_ids=segment_ids, **static)


def _run(impl, q, k, v, g, beta, initial_state, *, segment_ids, scale, chunk, residuals, configuration):
    (batch, tokens, _, K), (Hv, V) = q.shape, v.shape[2:]
    if impl in dispatch.KERNELS and batch:  # a grid of no programs cannot be launched
        return triton_op.gated_delta_rule(
            q, k, v, g, beta, initial_state, segment_ids, scale, residuals, configuration,
            interpret=impl == "triton_interpret",
        )  # fmt: skip
    initial_state = jnp.zeros((batch, Hv, K, V)) if initial_state is None else initial_state
    initial_state = initial_state.astype(g.dtype)
    if impl == "reference":
        segments = jnp.zeros((batch, tokens), jnp.int32) if segment_ids is None else segment_ids
        return reference.gated_delta_rule(q, k, v, g, beta, initial_state, segments, scale)
    return chunked.gated_delta_rule(
        q, k, v, g, beta, initial_state, segment_ids, scale=scale, chunk=chunk, residuals=residuals
    )


def resolve_step(
    impl: str = "auto", *, shape: tuple[int, int, int, int] = (1, 16, 128, 128), dtype: Any = jnp.bfloat16
) -> dispatch.Choice:
    """What `impl` means for one token, as `resolve` says it of many. The kernel multiplies in fp32, so that "auto"
    takes it for float32 inputs too.

    shape: of the state, [B, Hv, K, V]
    dtype: the widest of q, k and v
    """
    return triton_step.choose(NAME, impl, shape, dtype)


@jaxtyped(typechecker=beartype)
def gated_delta_rule_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hv"],
    beta: Float[Array, "B Hv"],
    state: Float[Array, "B Hv K V"],
    *,
    scale: float | None = None,
    l2norm: bool = False,
    impl: dispatch.Impl = "auto",
) -> tuple[Float[Array, "B Hv V"], Float[Array, "B Hv K V"]]:
    """One token of `gated_delta_rule`: (o in v's dtype, state in fp32 or float64). Ranges and errors as there.

        u = beta (v - alpha S^T k)      S' = alpha S + k u^T      o = scale S'^T q = scale (alpha S^T q + (q . k) u)

    S is the state before the token, S' the one after it.

    l2norm  whether q and k are first brought to norm 1, x / sqrt(|x|^2 + 1e-6), as short_conv's l2norm does it. They
            are then rounded to v's dtype, but not by the kernel, for which this is no extra work
    impl    as there. The kernel ("triton") reads S once and writes S' in its place (triton_step.py); it takes K up to
            512, computes in fp32 and refuses float64. All others are the same plain JAX: one pass over S makes S^T k
            and S^T q together, a second one writes S'

    Gradients are those of plain JAX, which keep what a step was given; the kernel has no second ones.
    """
    check_heads(q.shape[1], v.shape[1])
    check_sizes(K=q.shape[2], V=v.shape[2])
    check_dtypes(q=q, k=k, v=v)
    exact = jnp.promote_types(jnp.float32, v.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    head, whole = ("batch", "heads", None), ("batch", "heads", None, None)
    return dispatch.shard(
        partial(_step_on_one_device, scale=scale, l2norm=l2norm, impl=impl),
        (q, k, v, *(x.astype(exact) for x in (g, beta, state))),
        (head, head, head, head[:2], head[:2], whole),
        (head, whole),
    )


def _step_on_one_device(q, k, v, g, beta, state, *, scale, l2norm, impl):
    """The implementation of a step that is right for the part of the arrays that one device has."""
    impl = dispatch.taken(resolve_step(impl, shape=state.shape, dtype=jnp.result_type(q, k, v)))
    plain = partial(_plain_step, scale=scale, l2norm=l2norm)
    if impl not in dispatch.KERNELS or not state.size:
        return plain(q, k, v, g, beta, state)

    def kernel(q, k, v, g, beta, state):
        static = {"scale": scale, "l2norm": l2norm, "interpret": impl == "triton_interpret"}
        return triton_step.advance_state(q, k, v, g[..., None], beta, state, **static)

    return triton_step.with_gradients_of(plain, kernel, q, k, v, g, beta, state)


def _plain_step(q, k, v, g, beta, state, *, scale, l2norm):
    """A step in JAX. The recurrence's o = scale S'^T q would read S' in a third pass."""
    dtype, exact = v.dtype, state.dtype
    if l2norm:
        q, k = (x.astype(exact) for x in (q, k))
        q, k = (x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + triton_step.NORM_EPS) for x in (q, k))
        q, k = (x.astype(dtype) for x in (q, k))
    q, k = (jnp.repeat(x.astype(exact), v.shape[1] // q.shape[1], axis=1) for x in (q, k))
    q, k = jax.lax.optimization_barrier((q, k))  # so that both have derivatives or none: a sum of pairs needs both
    v, alpha = v.astype(exact), jnp.exp(g)
    read_k, read_q = jax.lax.reduce(
        tuple(state * x[..., None] for x in (k, q)), (jnp.zeros((), exact),) * 2,
        lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)), (state.ndim - 2,),
    )  # fmt: skip
    update = beta[..., None] * (v - alpha[..., None] * read_k)
    o = scale * (alpha[..., None] * read_q + (q * k).sum(axis=-1)[..., None] * update)
    state = alpha[..., None, None] * state + k[..., None] * update[..., None, :]
    return o.astype(dtype), state
