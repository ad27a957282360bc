"""Layers against direct numpy, and the two families' initial distributions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import get
from gdn_jax.config import AttentionConfig, GatedDeltaNetConfig, Model
from gdn_jax.errors import UserError
from gdn_jax.layers import (
    Compute,
    Linear,
    RMSNorm,
    ShortConv,
    compute_for,
    dt_bias_init,
    for_single_tokens,
    linear_init,
    log_decay_rate_init,
    normal,
    product,
    rope,
    segment_index,
)
from gdn_jax.model import abstract_model
from gdn_jax.model import init_model as eager_init_model

init_model = jax.jit(eager_init_model, static_argnums=0)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def test_rope_is_a_rotation_of_complex_numbers():
    x = draw(2, 7, 3, 8)
    pairs = np.asarray(x[..., :4], np.complex128) + 1j * np.asarray(x[..., 4:])
    angle = (5 + np.arange(7))[:, None] * 100.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * angle)[None, :, None, :]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rope(x, 5, 100.0), expected, atol=2e-6)


def test_rope_of_bf16_uses_fp32_angles():
    x = jnp.ones((1, 1, 1, 128), jnp.bfloat16)
    far = rope(x, 4001).astype(jnp.float32)
    exact = np.cos(4001.0) - np.sin(4001.0)  # the fastest pair of (1, 1)
    assert rope(x, 4001).dtype == jnp.bfloat16
    assert abs(far[0, 0, 0, 0] - exact) < 6e-3  # one bf16 rounding; bf16 angles would be off by radians


def test_rmsnorm_with_and_without_gate():
    norm = RMSNorm(6, 1e-5)
    norm.weight[...] = jnp.arange(1.0, 7.0)
    x, gate = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * np.arange(1, 7)
    np.testing.assert_allclose(norm(x, Compute()), exact, rtol=1e-5, atol=1e-6)
    silu = np.asarray(gate, np.float64) / (1 + np.exp(-np.asarray(gate, np.float64)))
    np.testing.assert_allclose(norm(x, Compute(), gate), exact * silu, rtol=1e-5, atol=1e-6)
    assert norm(x.astype(jnp.bfloat16), Compute()).dtype == jnp.bfloat16


def test_linear_accumulates_in_fp32_and_can_return_it():
    linear = Linear(256, 1, normal(1.0), rngs=nnx.Rngs(0), bias=True)
    linear.kernel[...], linear.bias[...] = jnp.full((256, 1), 1.0), jnp.full(1, 0.25)
    x = jnp.ones((1, 256), jnp.float32)
    assert linear(x, Compute(), exact=True)[0, 0] == 256.25  # bf16 would give 256
    assert linear(x[0], Compute(), exact=True)[0] == 256.25
    assert linear(x, Compute()).dtype == jnp.bfloat16
    assert linear.kernel.dtype == linear.bias.dtype == jnp.float32


class Own(nnx.Module):
    """A mixer from outside that reads the kernel of its Linear itself."""

    def __init__(self):
        self.proj = Linear(6, 5, normal(1.0), rngs=nnx.Rngs(0))


def test_single_tokens_leave_the_kernels_of_mixers_from_outside_alone():
    block = nnx.Module()
    block.mixer, block.mlp = Own(), None
    for_single_tokens(block)
    assert block.mixer.proj.kernel.shape == (6, 5)


def direct_conv(x, weight, segments=None):
    y = np.zeros_like(x)
    B, T, _ = x.shape
    W = weight.shape[0]
    for b in range(B):
        for t in range(T):
            for j in range(W):
                inside = t - j >= 0 and (segments is None or len(set(segments[b, t - j : t + 1])) == 1)
                if inside:
                    y[b, t] += weight[W - 1 - j] * x[b, t - j]
    return y


@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_conv_against_loops(width):
    conv = ShortConv(5, width, normal(1.0), rngs=nnx.Rngs(0))
    x = draw(2, 9, 5)
    weight = np.asarray(conv.weight[...])
    np.testing.assert_allclose(conv(x, Compute())[0], direct_conv(np.asarray(x), weight), atol=2e-6)
    # an id that comes back after one token is another document
    ids = np.array([[7, 7, 3, 7, 7, 7, 7, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 5]])
    packed = conv(x, Compute(), segment_ids=jnp.asarray(ids))[0]
    np.testing.assert_allclose(packed, direct_conv(np.asarray(x), weight, ids), atol=2e-6)


def test_segment_index_counts_changes():
    ids = jnp.array([[5, 5, -1, -1, 5, 0]])
    np.testing.assert_array_equal(segment_index(ids), [[0, 0, 1, 1, 2, 3]])


def check_uniform(x, bound):
    x = np.asarray(x)
    assert bound * 0.99 < np.abs(x).max() <= bound * (1 + 1e-6)
    np.testing.assert_allclose(x.std(), bound / np.sqrt(3), rtol=0.03)


def check_normal(x, std):
    x = np.asarray(x)
    np.testing.assert_allclose(x.std(), std, rtol=0.05)
    assert np.abs(x).max() > 3 * std  # a normal has tails, a uniform has none


def hybrid(**changes):
    base = dict(
        pattern=("gated_deltanet", "swa"),
        repeats=2,
        d_model=128,
        d_ff=192,
        vocab=320,
        tied=False,
        gated_deltanet=GatedDeltaNetConfig(heads=3, key_dim=32, value_dim=64),
        attention=AttentionConfig(heads=4, head_dim=32),
    )
    return Model(**(base | changes))


def test_initialisation_of_the_lit_family():
    model = init_model(hybrid(), jax.random.key(0))
    delta, swa = model.groups.blocks
    check_normal(model.embed[...], 0.02)
    check_uniform(model.head.kernel[...], 128**-0.5)
    for linear in (
        delta.mixer.q_proj,
        delta.mixer.g_proj,
        swa.mixer.k_proj,
        delta.mlp.gate_proj,
        swa.mlp.up_proj,
    ):
        check_uniform(linear.kernel[...], 128**-0.5)
    writes = np.sqrt(2 * 4)
    check_uniform(delta.mlp.down_proj.kernel[...], 192**-0.5 / writes)
    check_uniform(swa.mixer.o_proj.kernel[...], 128**-0.5 / writes)
    check_uniform(delta.mixer.o_proj.kernel[...], 192**-0.5)  # the released code leaves it alone
    check_uniform(delta.mixer.q_conv.weight[...], 0.5)
    assert not np.any(delta.mixer.b_proj.bias[...])
    assert np.all(np.asarray(delta.mixer.o_norm.weight[...]) == 1)
    kernels = np.asarray(delta.mixer.q_proj.kernel[...])
    assert not np.any(kernels[0] == kernels[1]), "repeats must start differently"

    rescaled = init_model(hybrid(rescale_o_proj=True), jax.random.key(0)).groups.blocks[0].mixer
    check_uniform(rescaled.o_proj.kernel[...], 192**-0.5 / writes)
    without_mlp = linear_init(hybrid(d_ff=0), 128, residual=True)
    check_uniform(without_mlp(jax.random.key(0), (128, 128)), 128**-0.5 / 2)
    assert abstract_model(hybrid(d_ff=0)).groups.blocks[1].mlp is None


def test_initialisation_of_the_fla_family():
    model = init_model(hybrid(init="fla"), jax.random.key(0))
    delta, swa = model.groups.blocks
    linears = delta.mixer.o_proj, swa.mixer.o_proj, swa.mlp.down_proj, delta.mixer.v_proj, model.head
    for linear in linears:
        check_normal(linear.kernel[...], 0.02)
    check_normal(delta.mixer.v_conv.weight[...], 0.02)
    check_normal(model.embed[...], 0.02)


def test_initialisation_of_models_without_a_recurrence():
    cfg, key = hybrid(init="lit-normal"), jax.random.key(0)
    check_normal(linear_init(cfg, 999)(key, (128, 256)), np.sqrt(2 / (5 * 128)))
    check_normal(linear_init(cfg, 999, residual=True)(key, (128, 256)), 1 / (np.sqrt(128) * 4))
    check_normal(init_model(cfg, key).embed[...], np.sqrt(2 / (5 * 128)))


def test_initialisation_of_the_gates():
    A = np.exp(np.asarray(log_decay_rate_init(jax.random.key(0), 20000)))
    assert A.min() >= 0.99e-4 and 15.9 < A.max() <= 16
    np.testing.assert_allclose([A.mean(), A.std()], [8, 16 / np.sqrt(12)], rtol=0.02)
    dt = np.log1p(np.exp(np.asarray(dt_bias_init(jax.random.key(1), 20000), np.float64)))
    assert 0.99e-3 < dt.min() < 1.1e-3 and 0.095 < dt.max() < 0.101
    np.testing.assert_allclose(np.log(dt).mean(), np.log(1e-2), rtol=0.01)
    np.testing.assert_allclose(np.log(dt).std(), np.log(100) / np.sqrt(12), rtol=0.02)


@pytest.mark.parametrize("field", ["impl", "chunk", "residuals", "remat"])
def test_compute_takes_no_unknown_word(field):
    with pytest.raises(UserError, match=f"{field} is 'foo'; it must be one of "):
        Compute(**{field: "foo"})


def test_compute_follows_the_experiment():
    assert compute_for(get("smoke/transformer")) == Compute(dtype=jnp.float32)
    large = get("table3/gated-deltanet/1.3b")
    assert compute_for(large) == Compute(dtype=jnp.bfloat16, remat="products+kernels")
    assert compute_for(large, training=True) == replace(compute_for(large), scan_layers=False)


def test_a_single_row_of_bf16_is_multiplied_as_a_product():
    x, kernel = jax.random.normal(jax.random.key(0), (1, 1, 96)), jax.random.normal(jax.random.key(1), (96, 40))
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    y = product(x, kernel)
    assert y.shape == (1, 1, 40) and y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=1e-2, atol=5e-2)
    assert product(x[0], kernel, jnp.float32).dtype == jnp.float32
    shapes = [
        [v.aval.shape for v in eqn.invars]
        for eqn in jax.make_jaxpr(product)(x, kernel).eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert shapes == [[(8, 96), (96, 40)]]
    np.testing.assert_array_equal(product(jnp.tile(x, (3, 1, 1)), kernel)[1], y[0])
