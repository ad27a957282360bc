"""Every implementation that claims CUDA lowers to it, without a GPU: real shapes, forward and backward."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from pallas_kernels import triton_step
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_delta_rule.benchmark import SHAPES
from pallas_kernels.gated_norm import triton_norm
from pallas_kernels.linear_attention import triton_channel, triton_head
from pallas_kernels.selective_scan import triton_scan
from pallas_kernels.short_conv import triton_conv


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


def _lowered(gradient, *arguments):
    with hopper():
        return jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "C,head,bias", [(1800, 200, False), (3600, None, False), (2048, 128, False), (4352, None, True)]
)
def test_convolution_kernels_lower_to_cuda(C, head, bias):
    """Two launches: forward, and everything of the backward but the sum over programs."""
    array = jax.ShapeDtypeStruct
    x, weight, shift = array((8, 4096, C), jnp.bfloat16), array((4, C), jnp.float32), array((C,), jnp.float32)

    def gradient(x, weight, bias, dy):
        def op(x, weight, bias):
            return triton_conv.short_conv(x, weight, bias, None, None, "silu", head, interpret=False)[0]

        y, vjp = jax.vjp(op, x, weight, bias)
        return y, vjp(dy)

    text = _lowered(gradient, x, weight, shift if bias else None, x)
    assert text.count("xla.gpu.triton") == 2 and "f64" not in text


@pytest.mark.parametrize("shape,first", [((8, 4096, 9, 400), False), ((8, 4096, 4096), True)])
def test_norm_kernels_lower_to_cuda(shape, first):
    array = jax.ShapeDtypeStruct
    x, weight = array(shape, jnp.bfloat16), array(shape[-1:], jnp.float32)

    def gradient(x, weight, gate, dy):
        def op(x, weight, gate):
            return triton_norm.gated_norm(x, weight, gate, 1e-5, first, 1, interpret=False)

        y, vjp = jax.vjp(op, x, weight, gate)
        return y, vjp(dy)

    text = _lowered(gradient, x, weight, x, x)
    assert text.count("xla.gpu.triton") == 2 and "f64" not in text


@pytest.mark.parametrize("H,Hv,K,V,launches", [(8, 8, 256, 512, 6), (1, 72, 128, 64, 4), (1, 3, 24, 40, 4)])
def test_linear_attention_kernels_lower_to_cuda(H, Hv, K, V, launches):
    """States and outputs forward; states, dv, dq and dk backward; of narrow heads outputs and dv with their states."""
    array, T = jax.ShapeDtypeStruct, 4096
    key, value = array((8, T, H, K), jnp.bfloat16), array((8, T, Hv, V), jnp.bfloat16)
    gate, state = array((8, T, Hv), jnp.float32), array((8, Hv, K, V), jnp.float32)

    def gradient(q, k, v, g, segments, do, d_state):
        def op(q, k, v, g):
            return triton_head.linear_attention(
                q, k, v, g, None, segment_ids=segments, scale=1.0, residuals="saved", interpret=False,
                configuration=triton_head.configuration_for(K, V),
            )  # fmt: skip

        outputs, vjp = jax.vjp(op, q, k, v, g)
        return outputs, vjp((do, d_state))

    text = _lowered(gradient, key, key, value, gate, array((8, T), jnp.int32), value, state)
    assert text.count("xla.gpu.triton") == launches and "f64" not in text


@pytest.mark.parametrize("H,Hv,K,V", [(16, 16, 128, 128), (1, 3, 24, 40)])
def test_linear_attention_kernels_per_channel_lower_to_cuda(H, Hv, K, V):
    """Six launches: sums, states and outputs forward; states, dv, and dq with dk and dg backward."""
    array, T = jax.ShapeDtypeStruct, 4096
    key, value = array((8, T, H, K), jnp.bfloat16), array((8, T, Hv, V), jnp.bfloat16)
    gate, state = array((8, T, Hv, K), jnp.float32), array((8, Hv, K, V), jnp.float32)

    def gradient(q, k, v, g, segments, do, d_state):
        def op(q, k, v, g):
            return triton_channel.linear_attention(
                q, k, v, g, None, segment_ids=segments, scale=1.0, residuals="saved", interpret=False,
                configuration=triton_channel.configuration_for(K, V, Hv // H),
            )  # fmt: skip

        outputs, vjp = jax.vjp(op, q, k, v, g)
        return outputs, vjp((do, d_state))

    text = _lowered(gradient, key, key, value, gate, array((8, T), jnp.int32), value, state)
    assert text.count("xla.gpu.triton") == 6 and "f64" not in text


@pytest.mark.parametrize("B,T,D,N", [(8, 4096, 4608, 16), (4, 500, 200, 5)])
@pytest.mark.parametrize("residuals,launches", [("saved", 2), ("inputs", 3)])
def test_selective_scan_kernels_lower_to_cuda(B, T, D, N, residuals, launches):
    """One launch forward and one backward; where the states are not kept, the forward again."""
    array = jax.ShapeDtypeStruct
    x, shared, state = array((B, T, D), jnp.bfloat16), array((B, T, N), jnp.bfloat16), array((B, D, N), jnp.float32)

    def gradient(x, dt, A, B, C, D, state, segments, dy, d_state):
        def op(*arrays):
            return triton_scan.selective_scan(*arrays, segments, residuals, interpret=False)

        outputs, vjp = jax.vjp(op, x, dt, A, B, C, D, state)
        return outputs, vjp((dy, d_state))

    exact = (array(x.shape, jnp.float32), array((D, N), jnp.float32))
    segments = array((B, T), jnp.int32)
    with jax.enable_x64(True):
        text = _lowered(gradient, x, *exact, shared, shared, array((D,), jnp.float32), state, segments, x, state)
    assert text.count("xla.gpu.triton") == launches and "f64" not in text


# (H, Hv, K, V, decays of a head) of every model at desk, 400m and 1.3b, and sizes that no tile divides
STEPS = [
    *((9, 9, K, V, 1) for K, V in ((128, 256), (192, 384), (200, 400))),
    *((heads, heads, 256, 512, 1) for heads in (2, 6, 8)),
    *((1, heads, 128, 64, 1) for heads in (16, 48, 72)),
    *((heads, heads, 128, 128, decays) for heads in (4, 12, 16) for decays in (1, 128)),
    (1, 3, 24, 40, 24),
]


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("rule", ["gated delta rule", "linear attention"])
@pytest.mark.parametrize("H,Hv,K,V,decays", STEPS)
def test_the_kernel_of_one_token_lowers_to_cuda(H, Hv, K, V, decays, rule, batch):
    """One launch, whose new state takes the memory of the old one."""
    array, strength = jax.ShapeDtypeStruct, None
    if rule == "gated delta rule":
        strength, decays = array((batch, Hv), jnp.float32), 1
    key, value = array((batch, H, K), jnp.bfloat16), array((batch, Hv, V), jnp.bfloat16)
    gate, state = array((batch, Hv, decays), jnp.float32), array((batch, Hv, K, V), jnp.float32)

    def step(q, k, v, g, beta, state):
        return triton_step.advance_state(q, k, v, g, beta, state, scale=1.0, interpret=False)

    with jax.enable_x64(True):
        text = _lowered(step, key, key, value, gate, strength, state)
    assert text.count("xla.gpu.triton") == 1 and "f64" not in text
    assert "output_tuple_indices = [1], operand_index = 1" in text
