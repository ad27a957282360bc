"""Linear attention against the float64 token recurrence, its invariants, what it keeps and its argument rules."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels import admission, triton_calls
from pallas_kernels.conformance import reached
from pallas_kernels.linear_attention import (
    conformance,
    linear_attention,
    linear_attention_step,
    resolve,
    triton_channel,
)
from pallas_kernels.linear_attention.conformance import CASES, STEPS, Case
from pallas_kernels.linear_attention.triton_head import Back, Carry, Configuration, Read


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32_matches_float64_recurrence(case):
    assert conformance.failures(case, "chunked") == []


@pytest.mark.parametrize("case", [c for c in CASES if c.T == 200], ids=lambda case: case.name)
def test_bf16_matches_float64_recurrence(case):
    assert conformance.failures(dataclasses.replace(case, dtype="bfloat16"), "chunked") == []


KERNELS = [case for case in CASES if case.chunk == 64]


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_interpreted_kernels_match_float64(case):
    """With one decay a head dg too is within 1 %, since what cancels in it was not rounded before."""
    found = conformance.errors(dataclasses.replace(case, B=1), "triton_interpret", seed=1)
    limits = conformance.limits(case, "triton_interpret") | ({} if case.channels else {"dg": 1e-2})
    assert {name: error for name, error in found.items() if not error <= limits[name]} == {}


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("x64", [False, True])
def test_interpreted_kernels_match_float64_in_bf16_with_tiles_that_overlap(x64, channels):
    """K in tiles of 64 and 8 more, V of three times 64 and 8; heads of two groups."""
    case = Case(name="odd", T=70, B=1, H=2, Hv=4, K=72, V=200, dtype="bfloat16", documents=0.05, channels=channels)
    with jax.enable_x64(x64):
        assert conformance.failures(case, "triton_interpret", seed=2) == []


@pytest.mark.parametrize("channels", [False, True])
def test_two_tokens_by_hand(channels):
    """q = k = (1, 0, ...), v = 1 and 10, decays 1/2 and 1/4, a state of 16 before them, scale 1."""
    key = jnp.zeros((1, 2, 1, 16)).at[..., 0].set(1.0)
    value = jnp.ones((1, 2, 1, 16)) * jnp.asarray([1.0, 10.0])[None, :, None, None]
    g = jnp.log(jnp.asarray([0.5, 0.25]))[None, :, None]
    if channels:  # the others have no part in it
        g = jnp.full((1, 2, 1, 16), -3.0).at[..., 0].set(g)
    state = jnp.zeros((1, 1, 16, 16)).at[0, 0, 0].set(16.0)
    o, last = linear_attention(key, key, value, g, scale=1.0, initial_state=state, impl="triton_interpret")
    np.testing.assert_allclose(o[0, :, 0, 0], [16 / 2 + 1, (16 / 2 + 1) / 4 + 10], rtol=1e-6)
    np.testing.assert_allclose(last[0, 0, 0], (16 / 2 + 1) / 4 + 10, rtol=1e-6)


@pytest.mark.parametrize("tiles", [{"key_tile": 32}, {"value_tile": 32}])
def test_interpreted_kernels_with_several_tiles(tiles):
    """A last chunk that is not full, columns that tiles leave over, heads that share keys, a row of one short chunk."""
    configuration = Configuration(
        chunk=128, forward=Carry(token_tile=128), reverse=Carry(**tiles), read=Read(**tiles), back=Back(**tiles)
    )
    for T in (300, 60):
        case = Case(name="tiles", T=T, H=1, Hv=2, K=40, B=1, dtype="bfloat16", documents=0.01, strong=0.02)
        assert conformance.failures(case, "triton_interpret", seed=3, configuration=configuration) == []


@pytest.mark.parametrize("joined", [False, True])
def test_interpreted_carries_that_make_outputs_and_that_leave_them_to_reads(joined):
    """Keys in tiles of 32 and 8, products of 32 tokens where the carry makes none, states kept and made again."""
    carry = Carry(joined=joined, key_tile=32, token_tile=32)
    configuration = Configuration(chunk=64, forward=carry, reverse=carry, back=Back(key_tile=32))
    for residuals in ("saved", "inputs"):
        case = Case(name="carry", T=130, H=1, Hv=2, K=40, B=1, dtype="bfloat16", documents=0.02, residuals=residuals)
        assert conformance.failures(case, "triton_interpret", seed=4, configuration=configuration) == []


def test_without_dg_the_other_gradients_are_the_same():
    """g that is not differentiated, as RetNet's, spares the kernels its sums and changes nothing else."""
    (*tokens, state), (do, d_state) = _inputs(T=64, K=16, V=16)

    def loss(q, k, v, state, g):
        o, last = linear_attention(q, k, v, g, initial_state=state, impl="triton_interpret")
        return (o * do).sum() + (last * d_state).sum()

    q, k, v, g = tokens
    without = jax.grad(loss, argnums=(0, 1, 2, 3))
    both = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    for x, y in zip(without(q, k, v, state, g), both(q, k, v, state, g), strict=False):
        np.testing.assert_array_equal(x, y)
    launches = [str(jax.make_jaxpr(f)(q, k, v, state, g)).count("reduce_sum") for f in (without, both)]
    assert launches[0] < launches[1]


def test_auto_takes_the_kernels_for_bf16(monkeypatch):
    assert resolve().impl == "chunked" and "not a CUDA device" in resolve().reason
    monkeypatch.setattr(triton_calls, "why_not_here", lambda: None)
    monkeypatch.setattr(admission, "here", lambda: ("NVIDIA H200", "0.11"))
    assert resolve().impl == resolve(channels=True).impl == "triton"
    assert resolve(dtype=jnp.float32).impl == "chunked" and "would round float32" in resolve(dtype=jnp.float32).reason


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_sharded_kernels_equal_the_plain_ones(impl, channels):
    """Value heads of one group on one device: two groups, over two devices of a tensor axis, and rows over two."""
    arrays, (do, d_state) = _inputs(T=64, K=16, V=16, H=2, Hv=4, channels=channels)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def run(arrays):
        def loss(arrays):
            *tokens, state = arrays
            o, last = linear_attention(*tokens, initial_state=state, impl=impl)
            return (o * do).sum() + (last * d_state).sum()

        return jax.grad(loss)(arrays)

    plain = jax.jit(run)(arrays)
    with jax.set_mesh(mesh):
        sharded = jax.jit(run)(arrays)
    for x, y in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


@pytest.mark.parametrize("channels", [False, True])
def test_float64_is_exact_and_satisfies_the_invariants(channels):
    case = Case(name="invariants", T=150, Hv=4, dtype="float64", channels=channels)
    arrays, segments, (do, d_state) = conformance.inputs(case)
    with jax.enable_x64(True):
        got = conformance.outputs_and_gradients(
            case, arrays, segments, (do, d_state), impl="chunked", dtype=jnp.float64
        )
    want = conformance.oracle(case, arrays, segments, (do, d_state))
    for name in conformance.OUTPUTS:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-12 * np.linalg.norm(want[name]), name
    # the limits can fail: without decay the outputs are far away
    wrong = conformance.oracle(case, [*arrays[:3], 0 * arrays[3], arrays[4]], segments, (do, d_state))
    assert np.linalg.norm(wrong["o"] - want["o"]) > 0.1 * np.linalg.norm(want["o"])

    # o is linear in q, and in (v, S0) together
    q, _, v, _, state = arrays
    np.testing.assert_allclose((q * got["dq"]).sum(), (do * got["o"]).sum(), rtol=1e-11)
    both = (v * got["dv"]).sum() + (state * got["dinitial"]).sum()
    np.testing.assert_allclose(both, (do * got["o"]).sum() + (d_state * got["state"]).sum(), rtol=1e-11)


def _inputs(**changes):
    case = Case(**dict(name="here", T=100) | changes)
    arrays, _, cotangents = conformance.inputs(case)
    return [jnp.asarray(x, jnp.float32) for x in arrays], [jnp.asarray(x, jnp.float32) for x in cotangents]


def test_one_decay_for_all_channels_is_the_scalar_decay():
    """Two algorithms for the pairs of a chunk, one number."""
    (q, k, v, g, state), (do, _) = _inputs(strong=0.1)

    def loss(arrays, channels):
        q, k, v, g, state = arrays
        g = jnp.repeat(g[..., None], q.shape[-1], -1) if channels else g
        return (linear_attention(q, k, v, g, initial_state=state, impl="chunked")[0] * do).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    arrays = (q, k, v, g, state)
    for x, y in zip(gradient(arrays, False), gradient(arrays, True), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


@pytest.mark.parametrize("channels", [False, True])
def test_two_parts_equal_the_whole_with_gradients(channels):
    arrays, (do, d_state) = _inputs(channels=channels)

    def loss(arrays, cuts):
        *tokens, state = arrays
        parts = []
        for start, stop in itertools.pairwise(cuts):
            o, state = linear_attention(*(x[:, start:stop] for x in tokens), initial_state=state, impl="chunked")
            parts.append(o)
        return (jnp.concatenate(parts, axis=1) * do).sum() + (state * d_state).sum()

    whole = jax.jit(jax.grad(loss), static_argnums=1)(arrays, (0, 100))
    parts = jax.jit(jax.grad(loss), static_argnums=1)(arrays, (0, 37, 100))
    for x, y in zip(whole, parts, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


@pytest.mark.parametrize("channels", [False, True])
def test_single_tokens_equal_the_parallel_form(channels):
    (*tokens, state), _ = _inputs(channels=channels, T=20, Hv=4)
    whole, last = linear_attention(*tokens, initial_state=state, impl="chunked", scale=0.7)
    step = jax.jit(lambda state, *token: linear_attention_step(*token, state, scale=0.7))
    for t in range(20):
        o, state = step(state, *(x[:, t] for x in tokens))
        np.testing.assert_allclose(o, whole[:, t], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_a_step_and_its_gradients_match_float64(case, impl, dtype):
    assert conformance.STEP_SUITE.failures(dataclasses.replace(case, dtype=dtype), impl) == []


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("K,V", [(128, 128), (128, 64), (256, 512), (3, 5)])
def test_a_step_of_the_kernel_matches_float64_at_model_sizes(K, V, channels):
    case = Case(name="size", T=1, H=1, Hv=2, K=K, V=V, channels=channels)
    with jax.enable_x64(True):  # integers of 64 bits must not reach the kernel's indices
        assert conformance.STEP_SUITE.failures(case, "triton_interpret", seed=1) == []


@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_a_step_keeps_what_is_not_finite_in_its_value_column(impl):
    (q, k, v, g, state), _, _ = conformance.inputs(Case(name="broken", T=1, Hv=4, K=20, V=40))
    token = [jnp.asarray(x[:, 0], jnp.float32) for x in (q, k, v, g)]
    assert reached(lambda state: linear_attention_step(*token, state, impl=impl), state) == []


@pytest.mark.parametrize("channels", [False, True])
def test_packed_documents_equal_separate_calls_at_every_boundary(channels):
    """Row b is split at token b + 1: every offset modulo 16 and 32."""
    case = Case(name="boundaries", T=64, B=48, H=1, Hv=1, K=8, V=8, channels=channels)
    (q, k, v, g, state), _, _ = conformance.inputs(case)
    offset, position = np.arange(1, case.B + 1)[:, None], np.arange(case.T)[None]
    segments = jnp.asarray(np.where(position < offset, 7, 3))
    tokens = [jnp.asarray(x, jnp.float32) for x in (q, k, v, g)]
    op = jax.jit(lambda tokens, state, segments: linear_attention(
        *tokens, initial_state=state, segment_ids=segments, impl="chunked", chunk=16
    ))  # fmt: skip
    packed, last = op(tokens, jnp.asarray(state, jnp.float32), segments)
    first, _ = op(tokens, jnp.asarray(state, jnp.float32), 0 * segments)
    np.testing.assert_allclose(
        np.where((position < offset)[..., None, None], packed - first, 0), np.zeros_like(packed), atol=1e-5
    )
    order = (position + offset) % case.T  # the second document moved to the front
    moved = [np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1) for x in tokens]
    left = (position < case.T - offset).reshape(*order.shape, 1, 1)
    moved = [
        jnp.asarray(np.where(left[..., : x.ndim - 2].reshape(*order.shape, *(1,) * (x.ndim - 2)), x, 0)) for x in moved
    ]
    second, state = op(moved, jnp.zeros_like(last), 0 * segments)
    shifted = np.take_along_axis(np.asarray(packed), order[..., None, None], 1)
    np.testing.assert_allclose(np.where(left, shifted - second, 0), np.zeros_like(packed), atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.parametrize("residuals", ["saved", "inputs"])
def test_what_the_forward_keeps(residuals):
    """Besides its inputs the state every chunk, or nothing."""
    B, T, H, K, V = 2, 256, 2, 16, 32
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, H, K, V)]
    arrays = [jnp.ones(shape, jnp.bfloat16 if len(shape) == 4 and shape[1] == T else jnp.float32) for shape in shapes]

    def op(*arrays):
        *tokens, state = arrays
        return linear_attention(*tokens, initial_state=state, impl="chunked", residuals=residuals)

    _, vjp = jax.vjp(op, *arrays)
    kept = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(vjp) if x.ndim)
    inputs = [(x.shape, x.dtype.name) for x in arrays]
    inputs[3] = ((B, T, H, 1), "float32")
    states = ((T // 64, B, H, 1, K, V), "bfloat16")
    assert kept == sorted([*inputs[:4], states] if residuals == "saved" else inputs)


@pytest.mark.parametrize("channels", [False, True])
def test_program_size_does_not_depend_on_length(channels):
    def equations(T):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
        key, value = shape(1, T, 2, 16), shape(1, T, 2, 16)
        gate = shape(1, T, 2, 16) if channels else shape(1, T, 2)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def run(arrays, ids, do):
            outputs, vjp = jax.vjp(lambda *a: linear_attention(*a, segment_ids=ids, impl="chunked")[0], *arrays)
            return outputs, vjp(do)

        return str(jax.make_jaxpr(run)((key, key, value, gate), ids, value)).count(" = ")

    assert equations(128) == equations(65536) < 2000


def _tokens(T=8, H=2, Hv=2, K=4, V=4, dtype=jnp.float32):
    key, value = jnp.ones((1, T, H, K), dtype), jnp.ones((1, T, Hv, V), dtype)
    return key, key, value, jnp.zeros((1, T, Hv))


@pytest.mark.parametrize(
    ("tokens", "options", "error", "words"),
    [
        (_tokens(Hv=3), {}, ValueError, "v has 3 heads, not a multiple of the 2"),
        (_tokens(T=0), {}, ValueError, "at least one token"),
        (_tokens(K=0), {}, ValueError, "K is 0; it must be at least 1"),
        (_tokens(), {"chunk": 48}, ValueError, "chunk is 48"),
        (_tokens(dtype=jnp.float16), {}, ValueError, "q is float16"),
        (
            _tokens(),
            {"impl": "triton_interpret"},
            NotImplementedError,
            "K is 4; the kernels take 16 to 512",
        ),
        (_tokens(K=16, V=520), {"impl": "triton_interpret"}, NotImplementedError, "V is 520"),
        (_tokens(K=16, V=16), {"impl": "triton"}, NotImplementedError, "the device is cpu"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(tokens, options, error, words):
    with pytest.raises(error, match=words):
        linear_attention(*tokens, **options)


def test_a_wrong_shape_is_refused_by_type():
    q, k, v, g = _tokens()
    with pytest.raises(Exception, match="type"):
        linear_attention(q, k, v, g[:, 1:])
    o, state = linear_attention(*_tokens(dtype=jnp.bfloat16))
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(("g", "log_block"), [(-0.1, 6), (-3.0, 4), (-10.0, 0)])
def test_blocks_are_one_product_where_decays_allow_it(g, log_block):
    """31 or 32 tokens from the middle of 64, 7 or 8 from that of 16; right in each case, documents included."""
    total = jnp.tile(g * jnp.arange(1.0, 65.0)[:, None], (1, 16))
    assert triton_channel._largest_blocks(total, total, (slice(None),)) == log_block
    case = Case(name="blocks", T=130, B=1, H=1, Hv=1, K=16, V=32, dtype="bfloat16", documents=0.02, channels=True)
    arrays, segments, cotangents = conformance.inputs(case)
    arrays[3] = np.full_like(arrays[3], g)
    got = conformance.outputs_and_gradients(
        case, arrays, segments, cotangents, impl="triton_interpret", dtype=jnp.bfloat16
    )
    want = conformance.oracle(case, arrays, segments, cotangents)
    for name, limit in conformance.limits(case, "triton_interpret").items():
        assert np.linalg.norm(got[name] - want[name]) <= limit * np.linalg.norm(want[name]), name


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_a_sum_of_the_output_in_the_same_program(channels, impl):
    """XLA on a CPU: a product with a constant state, summed in the same program, was wrong by any factor."""
    arrays = _inputs(T=64, H=1, Hv=1, K=64, V=64, channels=channels)[0][:4]
    got = jax.jit(lambda *arrays: linear_attention(*arrays, impl=impl)[0].sum())(*arrays)
    o = linear_attention(*arrays, impl="reference")[0]
    np.testing.assert_allclose(got, o.sum(), atol=0.01 * float(jnp.linalg.norm(o)))


def test_a_configuration_of_the_other_kernels_is_refused():
    (q, k, v, g, _), _ = _inputs(T=64, K=16, V=16)
    with pytest.raises(ValueError, match="one decay a head takes a pallas_kernels"):
        linear_attention(q, k, v, g, impl="triton_interpret", configuration=triton_channel.Configuration())
    with pytest.raises(ValueError, match="chunk is 192; the kernels take chunks of 64 or 128 tokens"):
        Configuration(chunk=192)
