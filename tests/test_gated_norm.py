"""The gated norm against its equation in float64, what it keeps, its invariants and argument rules."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.dispatch import Choice
from pallas_kernels.gated_norm import conformance, gated_norm, resolve
from pallas_kernels.gated_norm.conformance import CASES, Case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_equation_in_float64(case, dtype):
    assert conformance.failures(dataclasses.replace(case, dtype=dtype), "chunked") == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted_kernels_match_the_equation(case):
    assert conformance.failures(case, "triton_interpret", seed=1) == []


@pytest.mark.parametrize("name", ["gate after", "gate first, groups"])
@pytest.mark.parametrize("x64", [False, True])
def test_interpreted_kernels_match_the_equation_in_bf16(name, x64):
    case = dataclasses.replace(next(c for c in CASES if c.name == name), dtype="bfloat16")
    with jax.enable_x64(x64):
        assert conformance.failures(case, "triton_interpret", seed=2) == []


@pytest.mark.parametrize("gate_first", [False, True])
def test_float64_is_exact_and_the_limits_can_fail(gate_first):
    case = Case(name="exact", dtype="float64", groups=2, gate_first=gate_first)
    given = conformance.inputs(case)
    with jax.enable_x64(True):
        got = conformance.outputs_and_gradients(case, *given, impl="chunked", dtype=jnp.float64)
    want = conformance.oracle(case, *given)
    for name in conformance.OUTPUTS:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-12 * np.linalg.norm(want[name]), name
    for change in ({"gate_first": not gate_first}, {"groups": 1}):
        wrong = conformance.oracle(dataclasses.replace(case, **change), *given)
        assert np.linalg.norm(wrong["y"] - want["y"]) > 0.02 * np.linalg.norm(want["y"]), change


def test_numbers_by_hand():
    """x = (3, 4): mean square 12.5. A gate of 0 closes; SiLU(1) = 0.731059."""
    x, weight, gate = jnp.asarray([3.0, 4.0]), jnp.asarray([1.0, 10.0]), jnp.asarray([1.0, 0.0])
    for impl in ("reference", "chunked"):
        options = {"eps": 1e-12, "impl": impl}
        np.testing.assert_allclose(gated_norm(x, weight, **options), [0.848528, 11.313708], rtol=1e-6)
        np.testing.assert_allclose(gated_norm(x, weight, gate, **options), [0.620324, 0], rtol=1e-6)
        # the gate first leaves (2.19, 0), whose norm is (sqrt 2, 0) whatever is left
        np.testing.assert_allclose(gated_norm(x, weight, gate, gate_first=True, **options), [2**0.5, 0], rtol=1e-6)
        np.testing.assert_allclose(gated_norm(x, weight, groups=2, **options), [1, 10], rtol=1e-6)


@pytest.mark.parametrize("gate_first", [False, True])
def test_the_size_of_x_does_not_matter(gate_first):
    """norm(c x) = norm(x) without eps, so the gradient in x has no part along x in any group."""
    (x, weight, gate), _, (dy,) = conformance.inputs(Case(name="here"))
    x, weight, gate, dy = (jnp.asarray(y, jnp.float32) for y in (x, weight, gate, dy))

    def loss(x):
        return (gated_norm(x, weight, gate, eps=1e-12, gate_first=gate_first, groups=3) * dy).sum()

    np.testing.assert_allclose(loss(x), loss(8 * x), rtol=1e-6)
    along = (x * jax.grad(loss)(x)).reshape(*x.shape[:-1], 3, -1).sum(-1)
    assert np.abs(along).max() < 1e-4 < 1 < np.abs(jax.grad(loss)(x)[1]).max()


@pytest.mark.parametrize("gate_first", [False, True])
def test_the_forward_keeps_its_inputs_and_one_number_a_group(gate_first):
    x, weight, gate = jnp.ones((2, 30, 6), jnp.bfloat16), jnp.ones(6), jnp.ones((2, 30, 6))
    _, vjp = jax.vjp(lambda *a: gated_norm(*a, eps=1e-5, gate_first=gate_first, groups=2), x, weight, gate)
    kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(vjp) if leaf.ndim)
    inputs = [(y.shape, y.dtype.name) for y in (x, weight, gate)]
    assert kept == sorted([*inputs, ((2, 30, 2, 1), "float32")])


def test_the_kernels_keep_their_inputs_alone():
    x, weight, gate = jnp.ones((2, 30, 6), jnp.bfloat16), jnp.ones(6), jnp.ones((2, 30, 6), jnp.bfloat16)
    _, vjp = jax.vjp(lambda *a: gated_norm(*a, eps=1e-5, impl="triton_interpret"), x, weight, gate)
    kept = sorted(leaf.size for leaf in jax.tree.leaves(vjp) if leaf.ndim)
    assert kept == [6, 360, 360]


def test_what_auto_takes():
    assert resolve(gated=False) == resolve(shape=(127, 256)) == Choice("gated_norm", "chunked")  # nothing is refused
    assert resolve().impl == "chunked" and "not a CUDA device" in resolve().reason


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton_interpret"])
def test_no_vectors_give_empty_results_and_no_gradient(impl):
    x = jnp.ones((0, 5, 6))
    run = jax.grad(lambda *a: gated_norm(*a, eps=1e-5, impl=impl).sum(), argnums=(0, 1, 2))
    dx, d_weight, d_gate = run(x, jnp.ones(6), x)
    assert dx.shape == d_gate.shape == x.shape and not d_weight.any()


@pytest.mark.parametrize("impl", ["chunked", "triton_interpret"])
def test_sharded_calls_equal_the_plain_one(impl):
    """The weight's gradient is summed over the devices."""
    (x, weight, gate), _, (dy,) = conformance.inputs(Case(name="here", shape=(2, 50, 4, 24)))
    x, weight, gate, dy = (jnp.asarray(y, jnp.float32) for y in (x, weight, gate, dy))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def gradient(*arrays):
        return jax.grad(lambda *a: (gated_norm(*a, eps=1e-5, impl=impl) * dy).sum(), argnums=(0, 1, 2))(*arrays)

    plain = jax.jit(gradient)(x, weight, gate)
    with jax.set_mesh(mesh):
        sharded = jax.jit(gradient)(x, weight, gate)
        assert "shard_map" in str(jax.make_jaxpr(gradient)(x, weight, gate))
    for one, other in zip(plain, sharded, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * float(jnp.abs(one).max()))


X, W = jnp.ones((2, 6)), jnp.ones(6)


@pytest.mark.parametrize(
    ("arrays", "options", "error", "words"),
    [
        ((X, W), {"groups": 4}, ValueError, "groups is 4; it must divide D, 6"),
        ((X, W), {"groups": 0}, ValueError, "groups is 0"),
        ((X, W), {"eps": 0.0}, ValueError, "eps is 0.0"),
        ((X.astype(jnp.float16), W), {}, ValueError, "x is float16"),
        ((X, W, X.astype(jnp.float16)), {}, ValueError, "gate is float16"),
        ((X, W), {"impl": "triton"}, NotImplementedError, "gated_norm: impl 'triton' cannot run"),
        ((jnp.ones((2, 9000)), jnp.ones(9000)), {"impl": "triton_interpret"}, NotImplementedError, "has 9000 elements"),
        ((X, W[1:]), {}, Exception, "type"),
        ((X, W, X[1:]), {}, Exception, "type"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(arrays, options, error, words):
    with pytest.raises(error, match=words):
        gated_norm(*arrays, **({"eps": 1e-5} | options))


@pytest.mark.parametrize("gate_first", [False, True])
def test_the_oracle_has_gradients_of_gates_far_below_zero(gate_first):
    x, weight, gate = jnp.ones((1, 2, 4)), jnp.ones(4), jnp.full((1, 2, 4), -200.0)
    norm = partial(gated_norm, eps=1e-5, gate_first=gate_first, impl="reference")
    assert np.all(np.isfinite(jax.grad(lambda gate: norm(x, weight, gate).sum())(gate)))
