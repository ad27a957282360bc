"""On a CUDA device: kernels on rows of 256K tokens, whose states are past 2^31 elements, against float64.

    XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu tests/test_gpu_large_arrays.py -n 3 --dist load

A model's arrays are tens of gigabytes; all three at once need a device of 141 GB.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.accuracy import outside, relative_errors
from pallas_kernels.gated_delta_rule import conformance as delta_conformance
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.linear_attention import conformance as linear_conformance
from pallas_kernels.linear_attention import linear_attention

pytestmark = pytest.mark.gpu

ROW = 1 << 18  # tokens
WINDOW = 4096  # tokens after which nothing is left of a state: its decay is e^-80, or less
JUDGED = 1024  # the last tokens of a window, whose outputs and gradients are compared
ENDS = (ROW // 2, ROW)  # of windows

# op, its suite, rows, H, Hv, K, V; the delta rule keeps states half as often, so that one row's are below 2^31 elements
HEADS = {
    "retnet": (linear_attention, linear_conformance, 1, 8, 8, 256, 512),
    "mamba2": (linear_attention, linear_conformance, 1, 1, 72, 128, 64),
    "gated-deltanet": (gated_delta_rule, delta_conformance, 2, 9, 9, 200, 400),
}


@pytest.fixture(autouse=True)
def on_the_device():
    assert jax.default_backend() == "gpu", "these tests need a CUDA device"


def before(x, end, tokens):
    """The last `tokens` tokens of x before token `end`."""
    return x[:, end - tokens : end]


def drawn(gates, B, H, Hv, K, V):
    """(q, k, v and the gates; gradients of o, which judged tokens alone have, and of the final state)."""
    keys, token = jax.random.split(jax.random.key(7), 7), jnp.arange(ROW)
    judged = sum((token < end) & (token >= end - JUDGED) for end in ENDS)[:, None, None]

    def normal(key, heads, size):
        return jax.random.normal(key, (B, ROW, heads, size), jnp.bfloat16)

    def unit(x):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True))).astype(x.dtype)

    q, k = (unit(normal(key, H, K)) for key in keys[:2])
    g = jax.random.uniform(keys[2], (B, ROW, Hv), minval=-0.03, maxval=-0.01)
    beta = jax.random.uniform(keys[3], (B, ROW, Hv))
    do = normal(keys[4], Hv, V) * judged.astype(jnp.bfloat16)
    return (q, k, normal(keys[5], Hv, V), g, beta)[: 3 + gates], do, jax.random.normal(keys[6], (B, Hv, K, V))


def found(op, impl, ends, tokens, do, d_state):
    """(o and the gradients of `tokens` at the judged tokens before each of `ends`, the final state)."""
    (o, state), vjp = jax.vjp(partial(op, impl=impl), *tokens)
    arrays = (o, *vjp((do, d_state)))
    return [[before(x, end, JUDGED) for x in arrays] for end in ends], state


@pytest.mark.parametrize("model", HEADS)
def test_rows_of_256k_tokens_match_float64(model):
    """Of every head the last tokens, where addresses are greatest, and as many in the middle. A window by itself, from
    an empty state, gives the same in float64."""
    op, suite, *sizes = HEADS[model]
    names = suite.SUITE.arrays[:-1]  # without the initial state
    tokens, do, d_state = jax.jit(partial(drawn, len(names) - 3, *sizes))()
    each, last = jax.jit(partial(found, op, "triton", ENDS))(tokens, do, d_state)
    limits = suite.limits(suite.Case(name=model, T=ROW, dtype="bfloat16"), "triton")
    wrong = []
    for end, got in zip(ENDS, each, strict=True):
        with jax.enable_x64(True):
            window = [before(x, end, WINDOW).astype(jnp.float64) for x in (*tokens, do)]
            d_last = d_state.astype(jnp.float64) * (end == ROW)
            oracle = jax.jit(partial(found, op, "chunked", (WINDOW,)))
            (want,), want_last = oracle(window[:-1], window[-1], d_last)
        got, want = (dict(zip(("o", *(f"d{name}" for name in names)), x, strict=True)) for x in (got, want))
        if end == ROW:
            got, want = got | {"state": last}, want | {"state": want_last}
        got, want = ({name: np.asarray(x).astype(np.float64) for name, x in side.items()} for side in (got, want))
        floor = np.linalg.norm((np.asarray(before(do, end, JUDGED)).astype(np.float64) * want["o"]).sum(-1))
        wrong += [f"before {end}: {x}" for x in outside(relative_errors(got, want, {"dg": float(floor)}), limits)]
    assert wrong == []
