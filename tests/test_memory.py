"""What the chunked recurrences need at T = 4096, forward and backward, by XLA's own memory analysis of the program."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.selective_scan import selective_scan

T, D = 4096, 512


def shape(*sizes):
    return jax.ShapeDtypeStruct((1, T, *sizes), jnp.float32)


def temporaries(op, inputs, cotangent):
    """Bytes besides arguments and results."""

    def run(inputs, cotangent):
        y, vjp = jax.vjp(lambda *arrays: op(*arrays, impl="chunked")[0], *inputs)
        return y, vjp(cotangent)

    return jax.jit(run).lower(inputs, cotangent).compile().memory_analysis().temp_size_in_bytes


heads = D // 128
KEY, GATE = shape(heads, 128), shape(heads)
MATRIX = jax.ShapeDtypeStruct((2 * D, 16), jnp.float32)
OTHERS = {  # each mixer's call at model width D
    "retnet": (linear_attention, (shape(2, 256), shape(2, 256), shape(2, 512), shape(2)), shape(2, 512)),
    "hgrn2": (linear_attention, (KEY, KEY, KEY, KEY), KEY),
    "mamba2": (linear_attention, (shape(1, 128), shape(1, 128), shape(2 * D // 64, 64), shape(2 * D // 64)), None),
    "mamba": (
        selective_scan,
        (shape(2 * D), shape(2 * D), MATRIX, shape(16), shape(16), jax.ShapeDtypeStruct((2 * D,), jnp.float32)),
        shape(2 * D),
    ),
}


@pytest.fixture(scope="module")
def delta_rule():
    """The gated delta rule of the same width with the smaller heads, 128 and 128: the smaller of its two needs."""
    return temporaries(gated_delta_rule, (KEY, KEY, KEY, GATE, GATE), KEY)


@pytest.mark.parametrize("name", OTHERS)
def test_no_op_needs_more_than_three_times_the_gated_delta_rule(name, delta_rule):
    op, inputs, cotangent = OTHERS[name]
    if name == "retnet":  # heads of 256 and 512: as Gated DeltaNet's fla configuration has them
        wide = (shape(2, 256), shape(2, 256), shape(2, 512), shape(2), shape(2))
        delta_rule = temporaries(gated_delta_rule, wide, shape(2, 512))
    assert 0 < temporaries(op, inputs, cotangent or inputs[2]) < 3 * delta_rule
