"""A state that is inf or NaN reaches the document that it belongs to, and no later one: outputs, states, gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.accuracy import relative_errors
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.selective_scan import selective_scan

B, T, BORDER = 3, 100, 41  # rows 0 and 1 begin another document at BORDER, row 2 is one document


def normal(seed, *size):
    return jax.random.normal(jax.random.key(seed), size)


def inputs(op, size):
    """(arrays before the state, the state) of a call with heads or channels of this size."""
    if op == "selective_scan":
        dt, A = jax.nn.softplus(normal(1, B, T, size)), -jnp.exp(normal(2, size, 4))
        x, Bs, C, D = normal(0, B, T, size), normal(3, B, T, 4), normal(4, B, T, 4), normal(5, size)
        return (x, dt, A, Bs, C, D), normal(6, B, size, 4)
    q, k, v = normal(0, B, T, 1, size), normal(1, B, T, 1, size), normal(2, B, T, 2, size)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    g = -jnp.exp(normal(3, B, T, 2, *((size,) if op == "linear_attention, channels" else ())) - 3)
    more = (jax.nn.sigmoid(normal(4, B, T, 2)),) if op == "gated_delta_rule" else ()
    return (q, k, v, g, *more), normal(6, B, 2, size, size)


OPS = {
    "gated_delta_rule": gated_delta_rule,
    "linear_attention": linear_attention,
    "linear_attention, channels": linear_attention,
    "selective_scan": selective_scan,
}
CASES = [(op, "chunked", 16) for op in OPS]
CASES += [("gated_delta_rule", "triton_interpret", 64), ("linear_attention", "triton_interpret", 16)]
CASES += [("selective_scan", "triton_interpret", 16)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def ran(request):
    """(what the reference and the impl make of a state with inf and NaN, of that state with zeros there)."""
    op, impl, size = request.param
    arrays, state = inputs(op, size)
    segments = jnp.where((jnp.arange(T) >= BORDER) & (jnp.arange(B)[:, None] < 2), 7, 3).astype(jnp.int32)
    bad = state
    for row, place, value in ((0, (0, 1, 2), jnp.inf), (1, (0, 3, 1), jnp.nan), (2, (1, 0, 3), -jnp.inf)):
        bad = bad.at[(row, *place[-state.ndim + 1 :])].set(value)
    weight = normal(9, B, T)  # of the later documents' outputs in the loss

    @partial(jax.jit, static_argnames="impl")
    def run(arrays, state, impl):
        outputs = OPS[op](*arrays, initial_state=state, segment_ids=segments, impl=impl)

        def loss(arrays, state):
            o, final = OPS[op](*arrays, initial_state=state, segment_ids=segments, impl=impl)
            later, weights = (x.reshape(B, T, *(1,) * (o.ndim - 2)) for x in (segments == 7, weight))
            return jnp.where(later, weights * o, 0).sum() + final[:2].sum()

        return outputs, jax.grad(loss, argnums=(0, 1))(arrays, state)

    good = jnp.where(jnp.isfinite(bad), bad, 0)
    return run(arrays, bad, "reference"), run(arrays, bad, impl), run(arrays, good, impl)


def test_outputs_and_states_are_finite_where_the_recurrences_are(ran):
    for wanted, got in zip(ran[0][0], ran[1][0], strict=True):
        finite = np.isfinite(wanted)
        assert np.array_equal(np.isfinite(got), finite) and 0 < (~finite).sum() < finite.sum()
        errors = relative_errors({"": np.where(finite, got, 0)}, {"": np.where(finite, wanted, 0)})
        assert errors[""] < 1e-2


def test_later_documents_are_those_of_a_finite_state_bit_by_bit(ran):
    (o, state), gradients = ran[1]
    (same_o, same_state), same_gradients = ran[2]
    assert np.array_equal(o[:2, BORDER:], same_o[:2, BORDER:]) and np.array_equal(state[:2], same_state[:2])
    assert not np.isfinite(o[:2, :BORDER]).all() and not np.isfinite(state[2]).all()
    for gradient, same in zip(jax.tree.leaves(gradients), jax.tree.leaves(same_gradients), strict=True):
        assert np.isfinite(same).all() and np.array_equal(gradient, same)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(gradients))
