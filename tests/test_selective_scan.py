"""The selective scan against the float64 token recurrence, its invariants, what it keeps and its argument rules."""

import dataclasses
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels import admission, triton_calls
from pallas_kernels.selective_scan import conformance, selective_scan, selective_scan_step, triton_scan
from pallas_kernels.selective_scan.api import resolve
from pallas_kernels.selective_scan.conformance import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp32_matches_float64_recurrence(case):
    assert conformance.failures(case, "chunked") == []


@pytest.mark.parametrize("case", [c for c in CASES if c.T == 200], ids=lambda case: case.name)
def test_bf16_matches_float64_recurrence(case):
    assert conformance.failures(dataclasses.replace(case, dtype="bfloat16"), "chunked") == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted_kernels_match_float64(case):
    assert conformance.failures(dataclasses.replace(case, B=1), "triton_interpret", seed=1) == []


@pytest.mark.parametrize("x64", [False, True])
def test_interpreted_kernels_match_float64_in_bf16(x64):
    """Two tiles of channels, the second not full; two rows; a last run that is not full."""
    case = Case(name="odd", T=42, D=40, dtype="bfloat16", documents=0.05)
    with jax.enable_x64(x64):
        assert conformance.failures(case, "triton_interpret", seed=2) == []


@pytest.mark.parametrize("channels,lanes,N", [(1, 1, 2), (2, 1, 3), (2, 8, 32), (1, 4, 1), (4, 2, 4)])
def test_interpreted_kernels_agree_however_channels_lie_in_lanes(channels, lanes, N):
    """More or fewer lanes a channel than channels a lane, and than sums over channels."""
    case = Case(name="tiling", T=9, D=70, B=1, N=N)
    arrays, _, cotangents = conformance.inputs(case)
    arrays, cotangents = ([jnp.asarray(x, jnp.float32) for x in given] for given in (arrays, cotangents))
    config = triton_scan.Config(channels_per_lane=channels, lanes_per_channel=lanes, run=2)

    def kernels(*arrays):
        return triton_scan.selective_scan(*arrays, None, "saved", interpret=True, config=config)

    def plain(*arrays):
        return selective_scan(*arrays[:6], initial_state=arrays[6], impl="reference")

    def run(op, arrays):
        outputs, vjp = jax.vjp(op, *arrays)
        return *outputs, *vjp(tuple(cotangents))

    for name, x, y in zip(
        conformance.OUTPUTS, *(jax.jit(run, static_argnums=0)(op, arrays) for op in (kernels, plain)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=2e-6 * float(jnp.abs(y).max()), err_msg=name)


def test_two_tokens_by_hand():
    """dt ln 2 A = log 1/2 and log 1/4, x = B = C = 1, D = 3, a state of 16 before them."""
    ones = jnp.ones((1, 2, 1))
    dt = jnp.asarray([1.0, 2.0]).reshape(1, 2, 1)
    A, D, state = jnp.full((1, 1), -jnp.log(2.0)), jnp.full(1, 3.0), jnp.full((1, 1, 1), 16.0)
    y, last = selective_scan(ones, dt, A, ones, ones, D, initial_state=state, impl="triton_interpret")
    np.testing.assert_allclose(y[0, :, 0], [16 / 2 + 1 + 3, (16 / 2 + 1) / 4 + 2 + 3], rtol=1e-6)
    np.testing.assert_allclose(last, (16 / 2 + 1) / 4 + 2, rtol=1e-6)


def test_auto_takes_the_kernels_where_they_run(monkeypatch):
    assert resolve().impl == "chunked" and "not a CUDA device" in resolve().reason
    monkeypatch.setattr(triton_calls, "why_not_here", lambda: None)
    monkeypatch.setattr(admission, "here", lambda: ("NVIDIA H200", "0.11"))
    assert resolve().impl == resolve(dtype=jnp.float32).impl == "triton"
    refused = {"N is 64": {"shape": (1, 64, 64, 64)}, "would round float64": {"dtype": jnp.float64}}
    for reason, asked in refused.items():
        assert resolve(**asked).impl == "chunked" and reason in resolve(**asked).reason


def test_sharded_kernels_equal_the_plain_ones():
    """Channels over two devices of a tensor axis, rows over two of a data axis."""
    arrays, (dy, d_state) = _inputs(T=10, D=64)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def run(arrays):
        def loss(arrays):
            *inputs, state = arrays
            y, last = selective_scan(*inputs, initial_state=state, impl="triton_interpret")
            return (y * dy).sum() + (last * d_state).sum()

        return jax.grad(loss)(arrays)

    plain = jax.jit(run)(arrays)
    with jax.set_mesh(mesh):
        sharded = jax.jit(run)(arrays)
    for x, y in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


def test_float64_is_exact_and_satisfies_the_invariants():
    case = Case(name="invariants", T=150, dtype="float64")
    arrays, segments, (dy, d_state) = conformance.inputs(case)
    with jax.enable_x64(True):
        got = conformance.outputs_and_gradients(
            case, arrays, segments, (dy, d_state), impl="chunked", dtype=jnp.float64
        )
    want = conformance.oracle(case, arrays, segments, (dy, d_state))
    for name in conformance.OUTPUTS:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-12 * np.linalg.norm(want[name]), name
    # the limits can fail: a tenth more decay is far away
    wrong = conformance.oracle(case, [*arrays[:2], 1.1 * arrays[2], *arrays[3:]], segments, (dy, d_state))
    assert np.linalg.norm(wrong["y"] - want["y"]) > 1e-3 * np.linalg.norm(want["y"])
    # y is linear in (x, h0) together, and in (C, D) together
    x, _, _, _, C, D, state = arrays
    both = (x * got["dx"]).sum() + (state * got["dinitial"]).sum()
    np.testing.assert_allclose(both, (dy * got["y"]).sum() + (d_state * got["state"]).sum(), rtol=1e-11)
    np.testing.assert_allclose((C * got["dC"]).sum() + (D * got["dD"]).sum(), (dy * got["y"]).sum(), rtol=1e-11)


def _inputs(**changes):
    case = Case(**dict(name="here", T=100) | changes)
    arrays, _, cotangents = conformance.inputs(case)
    return [jnp.asarray(x, jnp.float32) for x in arrays], [jnp.asarray(x, jnp.float32) for x in cotangents]


def test_two_parts_equal_the_whole_with_gradients():
    arrays, (dy, d_state) = _inputs()

    def loss(arrays, cuts):
        x, dt, A, B, C, D, state = arrays
        parts = []
        for start, stop in itertools.pairwise(cuts):
            here = slice(start, stop)
            y, state = selective_scan(
                x[:, here], dt[:, here], A, B[:, here], C[:, here], D, initial_state=state, impl="chunked"
            )
            parts.append(y)
        return (jnp.concatenate(parts, axis=1) * dy).sum() + (state * d_state).sum()

    whole = jax.jit(jax.grad(loss), static_argnums=1)(arrays, (0, 100))
    parts = jax.jit(jax.grad(loss), static_argnums=1)(arrays, (0, 37, 100))
    for x, y in zip(whole, parts, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


def test_single_tokens_equal_the_parallel_form():
    (x, dt, A, B, C, D, state), _ = _inputs(T=20)
    whole, last = selective_scan(x, dt, A, B, C, D, initial_state=state, impl="chunked")
    step = jax.jit(selective_scan_step)
    for t in range(20):
        y, state = step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        np.testing.assert_allclose(y, whole[:, t], atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


@pytest.mark.parametrize("residuals", ["saved", "inputs"])
def test_what_the_forward_keeps(residuals):
    """Besides its inputs the state every chunk, or nothing; never an array of T, D and N."""
    B, T, D, N = 2, 256, 24, 16
    shapes = [(B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), (D,), (B, D, N)]
    arrays = [jnp.ones(shape, jnp.float32) for shape in shapes]

    def op(*arrays):
        *inputs, state = arrays
        return selective_scan(*inputs, initial_state=state, impl="chunked", residuals=residuals)

    _, vjp = jax.vjp(op, *arrays)
    kept = sorted(x.shape for x in jax.tree.leaves(vjp) if x.ndim)
    assert kept == sorted([*shapes[:6], (T // 64, B, D, N)] if residuals == "saved" else shapes)


def test_no_array_of_the_program_spans_tokens_and_states():
    """T = 4096: neither pass makes anything near T x D x N, and the program's size does not depend on T."""

    def program(T):
        D, N = 32, 16
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
        arrays = (shape(1, T, D), shape(1, T, D), shape(D, N), shape(1, T, N), shape(1, T, N), shape(D))
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def run(arrays, ids, dy):
            outputs, vjp = jax.vjp(lambda *a: selective_scan(*a, segment_ids=ids, impl="chunked")[0], *arrays)
            return outputs, vjp(dy)

        return jax.make_jaxpr(run)(arrays, ids, arrays[0])

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (out.aval.size for out in equation.outvars if hasattr(out.aval, "size"))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert max(sizes(program(4096).jaxpr)) <= 4096 * 32
    assert str(program(128)).count(" = ") == str(program(65536)).count(" = ") < 1000


def _tokens(T=8, D=4, N=3, dtype=jnp.float32):
    x, shared = jnp.ones((1, T, D), dtype), jnp.ones((1, T, N), dtype)
    return x, x.astype(jnp.float32), -jnp.ones((D, N)), shared, shared, jnp.ones(D)


@pytest.mark.parametrize(
    ("tokens", "options", "error", "words"),
    [
        (_tokens(T=0), {}, ValueError, "at least one token"),
        (_tokens(), {"chunk": 48}, ValueError, "chunk is 48"),
        (_tokens(dtype=jnp.float16), {}, ValueError, "x is float16"),
        (_tokens(), {"impl": "triton"}, NotImplementedError, "selective_scan: impl 'triton' cannot run: the device is"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(tokens, options, error, words):
    with pytest.raises(error, match=words):
        selective_scan(*tokens, **options)


def test_a_wrong_shape_is_refused_by_type():
    x, dt, A, B, C, D = _tokens()
    with pytest.raises(Exception, match="type"):
        selective_scan(x, dt, A[1:], B, C, D)
    y, state = selective_scan(*_tokens(dtype=jnp.bfloat16))
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_step_refuses_what_the_whole_op_refuses():
    half = jnp.zeros((1, 4), jnp.float16)
    with pytest.raises(ValueError, match="x is float16; it must be bfloat16, float32 or float64"):
        selective_scan_step(
            half, half, jnp.zeros((4, 3)), *(jnp.zeros((1, 3)),) * 2, jnp.zeros(4), jnp.zeros((1, 4, 3))
        )
