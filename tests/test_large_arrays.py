"""Arrays of more than 2^31 elements: nothing refuses them, and no kernel's offsets into them overflow."""

from functools import partial

import addresses
import jax
import jax.numpy as jnp
import pytest
from test_cuda_lowering import hopper

from pallas_kernels import dispatch, triton_step
from pallas_kernels import triton_calls as triton
from pallas_kernels.gated_delta_rule import configurations, gated_delta_rule, triton_op
from pallas_kernels.gated_norm import triton_norm
from pallas_kernels.linear_attention import linear_attention, triton_channel, triton_head
from pallas_kernels.selective_scan import selective_scan, triton_scan
from pallas_kernels.short_conv import triton_conv

ROW = 1 << 18  # tokens
array = jax.ShapeDtypeStruct


def bf16(*shape):
    return array(shape, jnp.bfloat16)


def fp32(*shape):
    return array(shape, jnp.float32)


def linear(B, T, H, Hv, K, V, channels=False):
    """(the kernels of linear attention, their arrays)."""
    kind = triton_channel if channels else triton_head
    configuration = kind.configuration_for(K, V, *((Hv // H,) if channels else ()))

    def op(q, k, v, g, state):
        return kind.linear_attention(
            q, k, v, g, state, segment_ids=jnp.zeros((B, T), jnp.int32),
            scale=1.0, residuals="saved", interpret=False, configuration=configuration,
        )  # fmt: skip

    g = fp32(B, T, Hv, K) if channels else fp32(B, T, Hv)
    return op, (bf16(B, T, H, K), bf16(B, T, H, K), bf16(B, T, Hv, V), g, fp32(B, Hv, K, V))


def delta(B, T, H, Hv, K, V, configuration=None):
    """The same of the gated delta rule."""

    def op(q, k, v, g, beta, state):
        segments = jnp.zeros((B, T), jnp.int32)
        return triton_op.gated_delta_rule(q, k, v, g, beta, state, segments, 1.0, "saved", configuration, False)

    gate = fp32(B, T, Hv)
    return op, (bf16(B, T, H, K), bf16(B, T, H, K), bf16(B, T, Hv, V), gate, gate, fp32(B, Hv, K, V))


def scan(B, T, D, N):
    """Of the selective scan."""

    def op(*arrays):
        return triton_scan.selective_scan(*arrays, jnp.zeros((B, T), jnp.int32), "saved", interpret=False)

    return op, (bf16(B, T, D), fp32(B, T, D), fp32(D, N), bf16(B, T, N), bf16(B, T, N), fp32(D), fp32(B, D, N))


def convolution(B, T, C):
    """Of the short convolution."""

    def op(x, weight):
        segments = jnp.zeros((B, T), jnp.int32)
        return triton_conv.short_conv(x, weight, None, None, segments, "silu", 200, interpret=False)[0]

    return op, (bf16(B, T, C), fp32(4, C))


def norm(*shape):
    """Of the gated norm."""
    op = partial(triton_norm.gated_norm, eps=1e-5, gate_first=False, groups=1, interpret=False)
    return op, (bf16(*shape), fp32(shape[-1]), bf16(*shape))


def gradients(op, arrays):
    """What `op` gives and the gradients of all its arrays."""
    results, vjp = jax.vjp(op, *arrays)
    return results, vjp(jax.tree.map(jnp.ones_like, results))


LARGE = {
    "retnet, one row": linear(1, ROW, 8, 8, 256, 512),
    "mamba2, one row": linear(1, ROW, 1, 72, 128, 64),
    "hgrn2, a row of 1M": linear(1, 4 * ROW, 16, 16, 128, 128, channels=True),
    "states every 64 tokens, one row": delta(1, ROW, 9, 9, 200, 400, configurations.Every64()),
    "states every 128 tokens": delta(8, ROW, 16, 16, 128, 128, configurations.Every128()),
    "convolution": convolution(8, ROW, 1800),
    "norm": norm(4, ROW, 9, 400),
}
LONG_TO_LOWER = {
    "a group, tiles that overlap": linear(3, ROW, 3, 6, 200, 400),
    "gated-deltanet, two rows": delta(2, ROW, 9, 9, 200, 400),
    "rows in pieces": delta(1, 32 * ROW, 1, 1, 256, 512),
    "mamba, one row": scan(1, ROW, 4608, 16),
}
# said of (t | (b - 1)) - b / 2, the middle of a block of b tokens: never negative, which bounds alone do not tell
UNSEEN = "from -32 on for unsigned"


def check(lowered):
    found = {kernel: addresses.offsets(kernel) for kernel in addresses.kernels(lowered)}
    assert any(64 in bits for bits, _ in found.values())
    assert [(kernel.name, said) for kernel, (_, wrong) in found.items() for said in wrong if UNSEEN not in said] == []


@pytest.mark.parametrize("name", [*LARGE, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG_TO_LOWER)])
def test_offsets_past_2_to_the_31_fit_their_integers(name):
    op, arrays = (LARGE | LONG_TO_LOWER)[name]
    with hopper():
        check(jax.jit(partial(gradients, op)).trace(arrays).lower(lowering_platforms=("cuda",)))


def test_offsets_into_the_states_of_one_token_fit_their_integers():
    """A state has 2^17 numbers, all of them 2^32."""
    B, H, K, V = 4096, 8, 256, 512
    arrays = bf16(B, H, K), bf16(B, H, K), bf16(B, H, V), fp32(B, H, 1), fp32(B, H), fp32(B, H, K, V)
    step = partial(triton_step.advance_state, scale=1.0, interpret=False)
    with hopper():
        check(jax.jit(step).trace(*arrays).lower(lowering_platforms=("cuda",)))


def test_an_overflow_is_found():
    """An index that is past 32 bits by itself, and negative where it begins."""

    def kernel(refs):
        start = triton.program_id(0) * (1 << 16) - 1
        refs.y[triton.ds(start, 64)] = refs.x[triton.ds(triton.program_id(0) * 64, 64)]

    x = fp32(1 << 31)
    whole = triton.BlockSpec(x.shape, lambda i: (0,))

    def run(x):
        return triton.call(
            kernel, {"x": (x, whole)}, {"y": (x, whole)}, grid=(1 << 16,), warps=1, num_stages=1, interpret=False
        )

    with hopper():
        (kernel,) = addresses.kernels(jax.jit(run).trace(x).lower(lowering_platforms=("cuda",)))
    bits, wrong = addresses.offsets(kernel)
    assert bits == {64}
    assert "[0, 4294901760] is too much for" in wrong[0] and "from -1 on for unsigned" in wrong[-1]


KEYS = {"retnet": (8, 8, 256, 512), "mamba2": (1, 72, 128, 64), "gated-deltanet": (9, 9, 200, 400)}


@pytest.mark.parametrize("model", [*KEYS, "mamba"])
def test_kernels_take_a_row_of_256k_tokens(model):
    if model == "mamba":
        op, (_, given) = selective_scan, scan(1, ROW, 4608, 16)
    else:
        op = gated_delta_rule if model == "gated-deltanet" else linear_attention
        given = (delta if model == "gated-deltanet" else linear)(1, ROW, *KEYS[model])[1]
    *arrays, state = given

    def call(*arrays):
        return op(*arrays, initial_state=jnp.zeros(state.shape), impl="triton_interpret")

    with dispatch.record() as choices:
        (_, last), grads = jax.eval_shape(partial(gradients, call), arrays)
    assert [choice.impl for choice in choices] == ["triton_interpret"]
    assert last.shape == state.shape and [x.shape for x in grads] == [x.shape for x in arrays]
