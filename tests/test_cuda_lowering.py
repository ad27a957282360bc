"""Every implementation that claims CUDA lowers to it, without a GPU: real shapes, forward and backward."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule.benchmark import SHAPES


def hopper():
    """The mesh that tells the lowering which device it is for."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("one",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_chunked_gated_delta_rule_lowers_to_cuda(name, dtype):
    B, T, H, K, V = SHAPES[name]
    array = jax.ShapeDtypeStruct
    key, value, gate = array((B, T, H, K), dtype), array((B, T, H, V), dtype), array((B, T, H), jnp.float32)
    state = array((B, H, K, V), jnp.float32)

    def run(tokens, state, segments, cotangents):
        def op(tokens, state):
            return gated_delta_rule(*tokens, initial_state=state, segment_ids=segments, impl="chunked")

        outputs, vjp = jax.vjp(op, tokens, state)
        return outputs, vjp(cotangents)

    arguments = ((key, key, value, gate, gate), state, array((B, T), jnp.int32), (value, state))
    with hopper():
        lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("stablehlo.while") == 2  # one scan forward, one reverse scan backward
    assert "stablehlo.custom_call" not in text  # no library solve inside the loops
