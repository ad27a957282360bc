"""On two CUDA devices: the kernels under shard_map.

    XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu2 tests/test_gpu2.py -n 8 --dist load

A row's oracle takes gigabytes: more workers run out of memory.
"""

import jax
import jax.numpy as jnp
import pytest
from test_context import mesh_of
from test_dispatch import sharded_and_plain

from pallas_kernels.accuracy import outside, relative_errors
from pallas_kernels.gated_delta_rule import conformance as delta_conformance
from pallas_kernels.gated_delta_rule import triton_op
from pallas_kernels.gated_delta_rule.conformance import Case
from pallas_kernels.linear_attention import conformance as linear_conformance
from pallas_kernels.selective_scan import conformance as scan_conformance
from pallas_kernels.short_conv import conformance as conv_conformance

pytestmark = pytest.mark.gpu2


@pytest.mark.parametrize("axes", [{"data": 2}, {"tensor": 2}])
def test_sharded_kernels_equal_the_plain_ones_and_gather_nothing(axes):
    case = Case(name="sharded", T=500, K=128, V=128, documents=0.02, dtype="bfloat16")
    sharded, plain, program = sharded_and_plain(axes, case, "triton")
    if "tensor" not in axes:
        assert "all-gather" not in program
    for x, y in zip(plain, sharded, strict=True):
        assert jnp.array_equal(x, y)


# op, sizes; half of a row's tokens on each device
SPLIT = [
    *((delta_conformance, {"K": K, "V": V, "B": 1, "T": 400}) for K, V in ((128, 128), (200, 400), (256, 512))),
    (delta_conformance, {"K": 128, "V": 128, "Hv": 4}),
    *((linear_conformance, {"K": K, "V": V, "H": 1, "Hv": 4}) for K, V in ((128, 64), (256, 512))),
    (linear_conformance, {"K": 128, "V": 128, "channels": True}),
    (scan_conformance, {}),
]


@pytest.mark.parametrize("documents", [0.0, 0.01])
@pytest.mark.parametrize(("suite", "sizes"), SPLIT, ids=str)
def test_rows_split_over_two_devices_match_float64(monkeypatch, suite, sizes, documents):
    """Of one row each part is cut into pieces again."""
    monkeypatch.setattr(triton_op, "SHORTEST_PIECE", 100)
    case = suite.Case(**{"name": "split", "T": 1000, "dtype": "bfloat16", "documents": documents} | sizes)
    given = suite.inputs(case, seed=5)
    with jax.set_mesh(mesh_of({"context": 2})):
        got = suite.outputs_and_gradients(case, *given, impl="triton", dtype=jnp.bfloat16)
    assert outside(relative_errors(got, suite.oracle(case, *given)), suite.limits(case, "triton")) == []


def test_a_convolution_split_over_two_devices_matches_float64():
    case = conv_conformance.Case(name="split", T=1000, C=800, l2norm=200, documents=0.01, dtype="bfloat16")
    given = conv_conformance.inputs(case, seed=5)
    with jax.set_mesh(mesh_of({"context": 2})):
        got = conv_conformance.outputs_and_gradients(case, *given, impl="triton", dtype=jnp.bfloat16)
    errors = relative_errors(got, conv_conformance.oracle(case, *given))
    assert outside(errors, conv_conformance.limits(case, "triton")) == []
