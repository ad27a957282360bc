"""The short convolution against the float64 token recurrence, what it keeps, its invariants and argument rules."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Choice
from pallas_kernels.short_conv import conformance, resolve, short_conv
from pallas_kernels.short_conv.conformance import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32_matches_float64_recurrence(case):
    assert conformance.failures(case, "chunked") == []


@pytest.mark.parametrize("case", [c for c in CASES if c.T == 90 and c.W == 4], ids=lambda case: case.name)
def test_bf16_matches_float64_recurrence(case):
    assert conformance.failures(dataclasses.replace(case, dtype="bfloat16"), "chunked") == []


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


def test_the_forward_keeps_its_inputs_alone():
    x, weight, bias = jnp.ones((2, 30, 6), jnp.bfloat16), jnp.ones((4, 6)), jnp.ones(6)
    state, segments = jnp.ones((2, 3, 6), jnp.bfloat16), jnp.zeros((2, 30), jnp.int32)

    def op(x, weight, bias, state):
        return short_conv(x, weight, bias, initial_state=state, segment_ids=segments, activation="silu")

    _, vjp = jax.vjp(op, x, weight, bias, state)
    kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp) if leaf.ndim)
    documents = ((2, 33), "int32")
    assert kept == sorted([*((y.shape, y.dtype.name) for y in (x, weight, bias, state)), documents])


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
    assert resolve() == Choice("short_conv", "chunked")


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (jnp.ones((1, 0, 2)), {}, ValueError, "at least one token"),
        (jnp.ones((1, 4, 2), jnp.float16), {}, ValueError, "x is float16"),
        (jnp.ones((1, 4, 2)), {"impl": "triton"}, NotImplementedError, "short_conv: impl 'triton' cannot run"),
        (jnp.ones((1, 4, 3)), {}, Exception, "type"),
        (jnp.ones((1, 4, 2)), {"initial_state": jnp.ones((1, 3, 2))}, Exception, "type"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(x, options, error, words):
    with pytest.raises(error, match=words):
        short_conv(x, jnp.ones((3, 2)), **options)
