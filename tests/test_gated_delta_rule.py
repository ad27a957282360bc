"""The gated delta rule against the float64 token recurrence, its invariants, its memory and its argument rules."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.conformance import reached
from pallas_kernels.gated_delta_rule import (
    chunked,
    conformance,
    gated_delta_rule,
    gated_delta_rule_step,
)
from pallas_kernels.gated_delta_rule.conformance import CASES, STEPS, Case

BF16 = {"T=1", "T=65", "T=500", "inputs kept", "group value", "documents"}
BF16_CASES = [c for c in CASES if c.T == 200 or c.name in BF16]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32_matches_float64_recurrence(case):
    assert conformance.failures(case, "chunked") == []


@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_bf16_matches_float64_recurrence(case):
    assert conformance.failures(dataclasses.replace(case, dtype="bfloat16"), "chunked") == []


def test_limits_can_fail():
    """The measure itself: a rule without decay must be far outside its limits."""
    case = Case(name="wrong", T=65)
    arrays, segments, cotangents = conformance.inputs(case)
    wrong = [*arrays[:3], 0 * arrays[3], *arrays[4:]]
    got = conformance.oracle(case, wrong, segments, cotangents)
    want = conformance.oracle(case, arrays, segments, cotangents)
    assert np.linalg.norm(got["o"] - want["o"]) / np.linalg.norm(want["o"]) > 0.1


def test_float64_is_exact_and_satisfies_the_invariants():
    case = Case(name="invariants", T=200, Hv=4, dtype="float64", cosine=0.5)
    arrays, segments, (do, d_state) = conformance.inputs(case)
    with jax.enable_x64(True):
        got = conformance.outputs_and_gradients(
            case, arrays, segments, (do, d_state), impl="chunked", dtype=jnp.float64
        )
    want = conformance.oracle(case, arrays, segments, (do, d_state))
    for name in conformance.OUTPUTS:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-12 * np.linalg.norm(want[name]), name

    q, k, v, _, beta, _ = arrays
    group = lambda x: x.reshape(*x.shape[:2], case.H, -1)  # noqa: E731  value heads of a key head
    dot = lambda x, y: (x * y).sum(-1)  # noqa: E731
    do_o = dot(do, got["o"])
    np.testing.assert_allclose(dot(q, got["dq"]), group(do_o).sum(-1), atol=1e-11)
    both = dot(k, got["dk"]) + group(dot(v, got["dv"])).sum(-1)
    np.testing.assert_allclose(2 * group(beta * got["dbeta"]).sum(-1), both, atol=1e-11)
    following = np.concatenate([got["dg"][:, 1:], (got["state"] * d_state).sum((-2, -1))[:, None]], axis=1)
    np.testing.assert_allclose(got["dg"] - following, do_o - dot(got["dv"], v), atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_packed_documents_equal_separate_calls_at_every_boundary(impl):
    """Row b is split at token b + 1: every offset modulo 64 and 128, outputs and gradients of both documents."""
    case = Case(name="boundaries", T=200, B=128, H=1, Hv=1, K=16, V=16)
    arrays, _, cotangents = conformance.inputs(case)
    offset = np.arange(1, case.B + 1)[:, None]
    position = np.arange(case.T)[None]
    segments = np.where(position < offset, 7, 3)
    run = lambda arrays, segments, cotangents: conformance.outputs_and_gradients(  # noqa: E731
        case, arrays, segments, cotangents, impl=impl, dtype=jnp.float32
    )
    packed = run(arrays, segments, cotangents)

    def mask(x, keep):
        return np.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - 2)), x, 0)

    do, d_state = cotangents
    *tokens, state = arrays
    left = position < offset
    first = run([*(mask(x, left) for x in tokens), state], None, [mask(do, left), 0 * d_state])
    order = (position + offset) % case.T  # the second document moved to the front
    front = position < case.T - offset
    move = lambda x: mask(np.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1), front)  # noqa: E731
    second = run([*map(move, tokens), 0 * state], None, [move(do), d_state])

    scale = max(np.abs(packed[name]).max() for name in ("o", "dq", "dk", "dv"))
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        np.testing.assert_allclose(mask(packed[name], left), mask(first[name], left), atol=2e-6 * scale, err_msg=name)
        np.testing.assert_allclose(move(packed[name]), mask(second[name], front), atol=2e-6 * scale, err_msg=name)
    np.testing.assert_allclose(packed["state"], second["state"], atol=2e-6 * scale)
    np.testing.assert_allclose(packed["dinitial"], first["dinitial"], atol=2e-6 * scale)


def test_two_halves_equal_the_whole_with_gradients():
    case = Case(name="halves", T=200)
    arrays, _, (do, d_state) = conformance.inputs(case)
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]

    def loss(arrays, cuts):
        *tokens, state = arrays
        parts = []
        for start, stop in itertools.pairwise(cuts):
            o, state = gated_delta_rule(*(x[:, start:stop] for x in tokens), initial_state=state, impl="chunked")
            parts.append(o)
        return (jnp.concatenate(parts, axis=1) * do).sum() + (state * d_state).sum()

    whole = jax.jit(jax.grad(loss), static_argnums=1)(arrays, (0, 200))
    halves = jax.jit(jax.grad(loss), static_argnums=1)(arrays, (0, 77, 200))
    for x, y in zip(whole, halves, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


def test_steps_equal_the_parallel_form():
    case = Case(name="steps", T=33, Hv=4)
    arrays, _, _ = conformance.inputs(case)
    *tokens, state = [jnp.asarray(x, jnp.float32) for x in arrays]
    o, final = gated_delta_rule(*tokens, initial_state=state, impl="chunked")
    step = jax.jit(gated_delta_rule_step)
    for t in range(case.T):
        o_t, state = step(*(x[:, t] for x in tokens), state)
        np.testing.assert_allclose(o_t, o[:, t], atol=2e-6)
    np.testing.assert_allclose(state, final, atol=5e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_a_step_and_its_gradients_match_float64(case, impl, dtype):
    assert conformance.STEP_SUITE.failures(dataclasses.replace(case, dtype=dtype), impl) == []


@pytest.mark.parametrize("K,V", [(128, 128), (128, 256), (192, 384), (200, 400), (256, 512), (3, 5)])
def test_a_step_of_the_kernel_matches_float64_at_model_sizes(K, V):
    case = Case(name="size", T=1, H=1, Hv=2, K=K, V=V)
    with jax.enable_x64(True):  # integers of 64 bits must not reach the kernel's indices
        assert conformance.STEP_SUITE.failures(case, "triton_interpret", seed=1) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_a_step_brings_q_and_k_to_norm_1(impl, dtype):
    """Of any length in fp32, beside values of another dtype; a key of zeros stays zero."""
    (q, k, v, g, beta, state), _, _ = conformance.inputs(Case(name="long", T=1, B=3, Hv=4, K=20, V=40))
    lengths = np.random.default_rng(1).uniform(0.1, 30, size=(2, *q[:, 0, :, :1].shape))
    lengths[:, 1, 1] = 0
    unit = lambda x, length: length * x / np.sqrt(length**2 + 1e-6)  # noqa: E731
    rest = [jnp.asarray(x[:, 0], jnp.float32) for x in (v, g, beta)]
    rest = [rest[0].astype(dtype), *rest[1:], jnp.asarray(state, jnp.float32)]
    given = [jnp.asarray(x[:, 0] * length, jnp.float32) for x, length in zip((q, k), lengths, strict=True)]
    normal = [jnp.asarray(unit(x[:, 0], length), jnp.float32) for x, length in zip((q, k), lengths, strict=True)]
    got = gated_delta_rule_step(*given, *rest, l2norm=True, impl=impl)
    want = gated_delta_rule_step(*normal, *rest, impl="chunked")
    for x, y in zip(got, want, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.linalg.norm(x - y) <= (1e-6 if dtype == jnp.float32 else 5e-3) * np.linalg.norm(y)


@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_a_step_keeps_what_is_not_finite_in_its_value_column(impl):
    (q, k, v, g, beta, state), _, _ = conformance.inputs(Case(name="broken", T=1, Hv=4, K=20, V=40))
    token = [jnp.asarray(x[:, 0], jnp.float32) for x in (q, k, v, g, beta)]
    assert reached(lambda state: gated_delta_rule_step(*token, state, impl=impl), state) == []


def test_a_named_step_never_falls_back():
    arrays, _, _ = conformance.inputs(Case(name="refused", T=1))
    with jax.enable_x64(True):
        *token, state = (jnp.asarray(x) for x in arrays)
        token = [x[:, 0] for x in token]
        with pytest.raises(NotImplementedError, match="it would round float64 to float32"):
            gated_delta_rule_step(*token, state, impl="triton_interpret")
    with pytest.raises(NotImplementedError, match="K is 600; the kernel of one token holds at most 512 keys"):
        wide = jnp.zeros((1, 1, 600))
        gated_delta_rule_step(
            wide, wide, jnp.zeros((1, 1, 4)), jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.zeros((1, 1, 600, 4)),
            impl="triton_interpret",
        )  # fmt: skip


def test_gate_gradients_through_the_parameterisation():
    """g = -exp(A_log) softplus(a + dt_bias), many gates saturated: gradients of the raw values by token."""
    case = Case(name="gates", T=200, dtype="float64")
    arrays, _, (do, _) = conformance.inputs(case)
    random = np.random.default_rng(1)
    gates = (case.B, case.T, case.Hv)
    raw = [
        np.log(random.uniform(0.01, 16, gates)),
        random.uniform(-7, -2, gates),
        4 * random.standard_normal(gates),
    ]
    raw = [x.astype(np.float32).astype(np.float64) for x in raw]

    def loss(raw, arrays, impl):
        a_log, dt_bias, a = raw
        q, k, v, _, beta, state = arrays
        g = -jnp.exp(a_log) * jax.nn.softplus(a + dt_bias)
        o, _ = gated_delta_rule(q, k, v, g, beta, initial_state=state, impl=impl)
        return (o * do.astype(o.dtype)).sum()

    single = [jnp.asarray(x, jnp.float32) for x in arrays]
    got = jax.grad(loss)([jnp.asarray(x, jnp.float32) for x in raw], single, "chunked")
    with jax.enable_x64(True):
        want = jax.grad(loss)([jnp.asarray(x) for x in raw], [jnp.asarray(x) for x in arrays], "reference")
        want = [np.asarray(x) for x in want]
    for name, x, y in zip(("A_log", "dt_bias", "a"), got, want, strict=True):
        error = np.linalg.norm(np.asarray(x) - y) / np.linalg.norm(y)
        assert error <= 1e-5, f"{name}: {error:.1e}"


def test_runs_are_bitwise_equal():
    case = Case(name="again", T=200, documents=0.05)
    arrays, segments, cotangents = conformance.inputs(case)
    first, second = (
        conformance.outputs_and_gradients(case, arrays, segments, cotangents, impl="chunked", dtype=jnp.float32)
        for _ in range(2)
    )
    for name in conformance.OUTPUTS:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("residuals", ["saved", "inputs"])
def test_what_the_forward_keeps(residuals):
    """Besides its inputs: rho and the state every 128 tokens, or nothing but the inputs."""
    B, T, H, K, V = 2, 512, 2, 16, 32
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H), (B, H, K, V)]
    arrays = [jnp.ones(shape, jnp.bfloat16 if len(shape) == 4 and shape[1] == T else jnp.float32) for shape in shapes]

    def op(*arrays):
        *tokens, state = arrays
        return gated_delta_rule(*tokens, initial_state=state, impl="chunked", residuals=residuals)

    _, vjp = jax.vjp(op, *arrays)
    kept = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(vjp) if x.ndim)
    inputs = [(x.shape, x.dtype.name) for x in arrays]
    if residuals == "saved":
        rho, states = ((B, T, H, V), "bfloat16"), ((T // 128, B, H, 1, K, V), "bfloat16")
        assert kept == sorted([*inputs[:5], rho, states])
    else:
        assert kept == sorted(inputs)


def _abstract(T, *, dtype=jnp.float32, B=1, H=6, K=256, V=512):
    shape = jax.ShapeDtypeStruct
    key, value, gate = shape((B, T, H, K), dtype), shape((B, T, H, V), dtype), shape((B, T, H), jnp.float32)
    state = shape((B, H, K, V), jnp.float32)
    return (key, key, value, gate, gate, state), (value, state)


def _with_gradients(op):
    def run(arrays, cotangents):
        outputs, vjp = jax.vjp(op, *arrays)
        return outputs, vjp(cotangents)

    return run


def test_memory_of_the_gradient_by_xla():
    """Temporary memory at T = 16384, H = 6, K = 256, V = 512, fp32, against autodiff of the same scan."""

    def ours(*arrays, residuals="saved"):
        *tokens, state = arrays
        return gated_delta_rule(*tokens, initial_state=state, impl="chunked", residuals=residuals)

    def autodiff(*arrays):
        return chunked._forward(*arrays, None, 1 / 16, 64)[0]

    def mebibytes(op):
        compiled = jax.jit(_with_gradients(op)).lower(*_abstract(16384)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    kept = mebibytes(ours)
    assert kept <= 760
    assert mebibytes(autodiff) >= 4 * kept


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_program_size_depends_neither_on_length_nor_on_documents(impl):
    def equations(T):
        arrays, cotangents = _abstract(T, K=16, V=16)

        def op(*arrays):
            *tokens, state, segments = arrays
            return gated_delta_rule(*tokens, initial_state=state, segment_ids=segments, impl=impl)

        def run(arrays, segments, cotangents):
            outputs, vjp = jax.vjp(lambda *arrays: op(*arrays, segments), *arrays)
            return outputs, vjp(cotangents)

        segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
        return str(jax.make_jaxpr(run)(arrays, segments, cotangents)).count(" = ")

    assert equations(128) == equations(65536) < 2000


def test_works_under_jit_vmap_remat_and_scan():
    case = Case(name="transforms", T=65, B=2)
    arrays, _, (do, _) = conformance.inputs(case)
    tokens = [jnp.asarray(x, jnp.float32) for x in arrays[:5]]

    def loss(tokens):
        return (gated_delta_rule(*tokens, impl="chunked")[0] * do).sum()

    plain = jax.jit(jax.grad(loss))(tokens)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(tokens)
    scanned = jax.jit(lambda t: jax.lax.scan(lambda c, _: (c, jax.grad(loss)(t)), 0, length=1)[1])(tokens)

    def by_row(tokens):
        return jax.vmap(lambda *row: gated_delta_rule(*(x[None] for x in row), impl="chunked")[0][0])(*tokens)

    mapped = jax.jit(jax.grad(lambda tokens: (by_row(tokens) * do).sum()))(tokens)
    for x, y, z, w in zip(plain, remat, scanned, mapped, strict=True):
        limit = 1e-5 * float(jnp.abs(x).max())
        np.testing.assert_allclose(x, y, atol=limit)
        np.testing.assert_allclose(x, z[0], atol=limit)
        np.testing.assert_allclose(x, w, atol=limit)


def test_dtypes_and_default_scale():
    case = Case(name="dtypes", T=20)
    arrays, _, _ = conformance.inputs(case)
    tokens = [jnp.asarray(x, jnp.bfloat16 if i < 3 else jnp.float32) for i, x in enumerate(arrays[:5])]
    for impl in ("reference", "chunked"):
        o, state = gated_delta_rule(*tokens, impl=impl)
        assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
        explicit, _ = gated_delta_rule(*tokens, impl=impl, scale=1 / math.sqrt(case.K))
        np.testing.assert_array_equal(np.asarray(o, np.float32), np.asarray(explicit, np.float32))


def _tokens(T=8, H=2, Hv=2, K=4, V=4, dtype=jnp.float32):
    key, value = jnp.ones((1, T, H, K), dtype), jnp.ones((1, T, Hv, V), dtype)
    gate = jnp.zeros((1, T, Hv))
    return key, key, value, gate, gate


@pytest.mark.parametrize(
    ("tokens", "options", "error", "words"),
    [
        (_tokens(Hv=3), {}, ValueError, "v has 3 heads, not a multiple of the 2"),
        (_tokens(T=0), {}, ValueError, "at least one token"),
        (_tokens(), {"chunk": 48}, ValueError, "chunk is 48"),
        (_tokens(dtype=jnp.float16), {}, ValueError, "q is float16"),
        (_tokens(), {"impl": "triton"}, NotImplementedError, "'triton' cannot run"),
        (
            _tokens(),
            {"impl": "triton_interpret"},
            NotImplementedError,
            "interpret' cannot run: there is no kernel",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(tokens, options, error, words):
    with pytest.raises(error, match=words):
        gated_delta_rule(*tokens, **options)


def test_wrong_shapes_and_names_are_refused_by_type():
    q, k, v, g, beta = _tokens()
    with pytest.raises(Exception, match="beta"):
        gated_delta_rule(q, k, v, g, beta[:, 1:])
    with pytest.raises(Exception, match="impl"):
        gated_delta_rule(q, k, v, g, beta, impl="fast")


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "state"])
@pytest.mark.parametrize("l2norm", [False, True])
def test_a_step_can_be_differentiated_by_each_input_alone(name, l2norm):
    random = np.random.default_rng(3)
    shapes = {"q": (1, 1, 4), "k": (1, 1, 4), "v": (1, 2, 4), "g": (1, 2), "beta": (1, 2), "state": (1, 2, 4, 4)}
    given = {key: jnp.asarray(random.standard_normal(shape), jnp.float32) for key, shape in shapes.items()}
    given["g"] = -jnp.abs(given["g"])

    def loss(values):
        o, after = gated_delta_rule_step(**values, l2norm=l2norm)
        return (o**2).sum() + (after**2).sum()

    alone = jax.grad(lambda x: loss(given | {name: x}))(given[name])
    np.testing.assert_allclose(alone, jax.grad(loss)(given)[name], rtol=1e-5, atol=1e-6)


def test_a_step_refuses_what_the_whole_op_refuses():
    zeros = lambda *shape, dtype=jnp.float32: jnp.zeros(shape, dtype)  # noqa: E731
    with pytest.raises(ValueError, match="K is 0; it must be at least 1"):
        gated_delta_rule_step(
            zeros(1, 1, 0), zeros(1, 1, 0), zeros(1, 1, 4), zeros(1, 1), zeros(1, 1), zeros(1, 1, 0, 4)
        )
    half = zeros(1, 1, 4, dtype=jnp.float16)
    with pytest.raises(ValueError, match="q is float16; it must be bfloat16, float32 or float64"):
        gated_delta_rule_step(half, half, half, zeros(1, 1), zeros(1, 1), zeros(1, 1, 4, 4))
