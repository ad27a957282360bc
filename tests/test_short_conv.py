"""The short convolution against the float64 token recurrence, what it keeps, its invariants and argument rules."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.dispatch import Choice
from pallas_kernels.short_conv import LEAST_TOKENS, conformance, resolve, short_conv
from pallas_kernels.short_conv.conformance import CASES, Case

OFTEN = ("W=7", "documents", "heads to norm 1", "many small heads", "pieces of a row")  # of the others' kernels: slow
KERNEL_CASES = [
    pytest.param(case, marks=() if case.name in OFTEN else pytest.mark.slow) for case in CASES if case.T >= LEAST_TOKENS
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32_matches_float64_recurrence(case):
    assert conformance.failures(case, "chunked") == []


@pytest.mark.parametrize("case", [c for c in CASES if c.T == 90 and c.W == 4], ids=lambda case: case.name)
def test_bf16_matches_float64_recurrence(case):
    assert conformance.failures(dataclasses.replace(case, dtype="bfloat16"), "chunked") == []


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_interpreted_kernels_match_float64(case):
    assert conformance.failures(case, "triton_interpret", seed=1) == []


@pytest.mark.parametrize("name", ["heads to norm 1", "documents"])
@pytest.mark.parametrize("x64", [False, True])
def test_interpreted_kernels_match_float64_in_bf16(name, x64):
    case = dataclasses.replace(next(c for c in CASES if c.name == name), dtype="bfloat16")
    with jax.enable_x64(x64):
        assert conformance.failures(case, "triton_interpret", seed=2) == []


def test_float64_is_exact_and_the_limits_can_fail():
    case = Case(name="exact", dtype="float64", documents=0.1)
    arrays, segments, cotangents = conformance.inputs(case)
    with jax.enable_x64(True):
        got = conformance.outputs_and_gradients(case, arrays, segments, cotangents, impl="chunked", dtype=jnp.float64)
    want = conformance.oracle(case, arrays, segments, cotangents)
    for name in conformance.OUTPUTS:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-12 * np.linalg.norm(want[name]), name
    for wrong in (  # without documents; without the activation
        conformance.oracle(case, arrays, None, cotangents),
        conformance.oracle(dataclasses.replace(case, activation=None), arrays, segments, cotangents),
    ):
        assert np.linalg.norm(wrong["y"] - want["y"]) > 0.1 * np.linalg.norm(want["y"])


def test_the_filter_by_hand():
    """Two channels, width 3: the last row meets the current token; -1, -2 came before the first."""
    x = jnp.asarray([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    weight = jnp.asarray([[100.0, 1.0], [10.0, 0.0], [1.0, 0.0]])
    before = jnp.asarray([[[-2.0, 0.0], [-1.0, 5.0]]])
    for impl in ("reference", "chunked"):
        norm, _ = short_conv(x, weight, initial_state=before, l2norm=2, impl=impl)
        np.testing.assert_allclose((norm**2).sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(norm[0, 1], [-88 / (88**2 + 25) ** 0.5, 5 / (88**2 + 25) ** 0.5], rtol=1e-6)
        y, state = short_conv(x, weight, jnp.asarray([0.5, 0.0]), initial_state=before, impl=impl)
        np.testing.assert_array_equal(y[0], [[-208.5, 0.0], [-87.5, 5.0], [123.5, 10.0]])
        np.testing.assert_array_equal(state, x[:, 1:])
        _, state = short_conv(x, weight, segment_ids=jnp.asarray([[4, 4, 9]]), impl=impl)
        np.testing.assert_array_equal(state[0], [[0, 0], [3, 30]])  # the last document has one token


def _inputs(**changes):
    case = Case(**dict(name="here") | changes)
    arrays, _, cotangents = conformance.inputs(case)
    return [jnp.asarray(x, jnp.float32) for x in arrays], [jnp.asarray(x, jnp.float32) for x in cotangents]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_parts_and_single_tokens_equal_the_whole_with_gradients(width):
    """Parts shorter than the filter occur: their state still holds inputs from before the part."""
    arrays, (dy, d_state) = _inputs(W=width, T=12)

    def loss(arrays, cuts):
        x, weight, bias, state = arrays
        parts = []
        for start, stop in itertools.pairwise(cuts):
            y, state = short_conv(x[:, start:stop], weight, bias, activation="silu", initial_state=state)
            parts.append(y)
        return (jnp.concatenate(parts, axis=1) * dy).sum() + (state * d_state).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, whole = gradient(arrays, (0, 12))
    for cuts in ((0, 1, 3, 12), tuple(range(13))):
        part_value, parts = gradient(arrays, cuts)
        np.testing.assert_allclose(part_value, value, rtol=1e-5)
        for x, y in zip(whole, parts, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max(initial=1.0)))


def test_a_packed_row_goes_on_like_its_last_document():
    (x, weight, bias, state), _ = _inputs(T=20)
    segments = jnp.asarray([[1] * 18 + [0] * 2, [1] * 7 + [0] * 13])
    y, left = short_conv(x, weight, bias, initial_state=state, segment_ids=segments)
    for row, start in ((0, 18), (1, 7)):
        first, _ = short_conv(x[row : row + 1, :start], weight, bias, initial_state=state[row : row + 1])
        second, alone = short_conv(x[row : row + 1, start:], weight, bias)
        np.testing.assert_allclose(y[row], jnp.concatenate([first, second], 1)[0], atol=1e-6)
        np.testing.assert_array_equal(left[row], alone[0])


@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_the_forward_keeps_its_inputs_alone(impl):
    x, weight, bias = jnp.ones((2, 30, 6), jnp.bfloat16), jnp.ones((4, 6)), jnp.ones(6)
    state, segments = jnp.ones((2, 3, 6), jnp.bfloat16), jnp.zeros((2, 30), jnp.int32)

    def op(x, weight, bias, state):
        return short_conv(
            x, weight, bias, initial_state=state, segment_ids=segments, activation="silu", l2norm=3, impl=impl
        )

    _, vjp = jax.vjp(op, x, weight, bias, state)
    kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp) if leaf.ndim)
    documents = ((2, 33), "int32")
    of_final_state = [] if impl == "chunked" else [((2, 3, 6), "bfloat16"), ((2, 3, 6), "bool")]  # where it is zero
    assert kept == sorted([*((y.shape, y.dtype.name) for y in (x, weight, bias, state)), documents, *of_final_state])


def test_no_general_convolution_is_left_to_xla():
    (x, weight, bias, state), _ = _inputs()
    text = str(jax.make_jaxpr(jax.grad(lambda *a: short_conv(*a[:3], initial_state=a[3])[0].sum()))(
        x, weight, bias, state
    ))  # fmt: skip
    assert "mul" in text and "conv_general" not in text and "scan" not in text


def test_dtypes_and_what_auto_takes():
    x, weight = jnp.ones((1, 5, 2), jnp.bfloat16), jnp.ones((3, 2))
    y, state = short_conv(x, weight, initial_state=jnp.zeros((1, 2, 2)))
    assert y.dtype == state.dtype == jnp.bfloat16
    assert resolve(shape=(1, LEAST_TOKENS - 1, 256)) == Choice("short_conv", "chunked")  # nothing is refused there
    assert resolve().impl == "chunked" and "not a CUDA device" in resolve().reason
    assert resolve(dtype=jnp.float64).reason == "triton: it would round float64 to float32"


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton_interpret"])
def test_an_empty_batch_gives_empty_results_and_no_gradient(impl):
    x, weight, bias = jnp.ones((0, 20, 6)), jnp.ones((4, 6)), jnp.ones(6)

    def loss(x, weight, bias):
        y, state = short_conv(x, weight, bias, activation="silu", l2norm=3, impl=impl)
        assert y.shape == (0, 20, 6) and state.shape == (0, 3, 6)
        return y.sum() + state.sum()

    dx, d_weight, d_bias = jax.grad(loss, argnums=(0, 1, 2))(x, weight, bias)
    assert dx.shape == x.shape and not d_weight.any() and not d_bias.any()


@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
@pytest.mark.parametrize("l2norm", [None, 6])
def test_sharded_calls_equal_the_plain_one(l2norm, impl):
    """Gradients of weight and bias are summed over the devices; a head is not split among them."""
    (x, weight, bias, state), (dy, d_state) = _inputs(T=20)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def loss(x, weight, bias, state):
        y, last = short_conv(x, weight, bias, activation="silu", l2norm=l2norm, initial_state=state, impl=impl)
        return (y * dy).sum() + (last * d_state).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    plain = gradient(x, weight, bias, state)
    with jax.set_mesh(mesh):
        sharded = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, weight, bias, state)
    for one, other in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * float(jnp.abs(one).max()))


def test_a_filter_needs_a_row():
    with pytest.raises(ValueError, match="W is 0; it must be at least 1"):
        short_conv(jnp.ones((1, 20, 4)), jnp.ones((0, 4)))


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (jnp.ones((1, 0, 2)), {}, ValueError, "at least one token"),
        (jnp.ones((1, 4, 2), jnp.float16), {}, ValueError, "x is float16"),
        (jnp.ones((1, 20, 2)), {"impl": "triton"}, NotImplementedError, "short_conv: impl 'triton' cannot run"),
        (
            jnp.ones((1, 4, 2)),
            {"impl": "triton_interpret"},
            NotImplementedError,
            "T is 4; the kernels read at least 16",
        ),
        (jnp.ones((1, 4, 2)), {"l2norm": 3}, ValueError, "l2norm is 3; it must divide the number of channels, 2"),
        (jnp.ones((1, 4, 2)), {"l2norm": 0}, ValueError, "l2norm is 0"),
        (jnp.ones((1, 4, 3)), {}, Exception, "type"),
        (jnp.ones((1, 4, 2)), {"initial_state": jnp.ones((1, 3, 2))}, Exception, "type"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(x, options, error, words):
    with pytest.raises(error, match=words):
        short_conv(x, jnp.ones((3, 2)), **options)
