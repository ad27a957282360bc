"""On two CUDA devices: the kernels under shard_map."""

import jax.numpy as jnp
import pytest
from test_dispatch import sharded_and_plain

from pallas_kernels.gated_delta_rule.conformance import Case

pytestmark = pytest.mark.gpu2


@pytest.mark.parametrize("axes", [{"data": 2}, {"tensor": 2}])
def test_sharded_kernels_equal_the_plain_ones_and_gather_nothing(axes):
    case = Case(name="sharded", T=500, K=128, V=128, documents=0.02, dtype="bfloat16")
    sharded, plain, program = sharded_and_plain(axes, case, "triton")
    if "tensor" not in axes:
        assert "all-gather" not in program
    for x, y in zip(plain, sharded, strict=True):
        assert jnp.array_equal(x, y)
