"""Mixers against direct numpy, every switch of the ablations, and the dtype policy."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdn_jax.config import (
    AttentionConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    HGRN2Config,
    Mamba2Config,
    MambaConfig,
    Model,
    RetNetConfig,
)
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute
from gdn_jax.mixers import MIXERS
from gdn_jax.mixers.attention import ring_slots

FP32 = Compute(dtype=jnp.float32, impl="reference")  # the smallest program; implementations have their own tests
D = 24
DELTA = GatedDeltaNetConfig(heads=2, key_dim=6, value_dim=8)
ATTENTION = AttentionConfig(heads=3, head_dim=8, window=5)


def config(delta=DELTA, attention=ATTENTION):
    others = dict(
        deltanet=DeltaNetConfig(heads=2, key_dim=6, value_dim=8),
        retnet=RetNetConfig(heads=3, key_dim=8, value_dim=10),
        hgrn2=HGRN2Config(heads=3, head_dim=8),
        mamba=MambaConfig(inner=20, dt_rank=3, state=4),
        mamba2=Mamba2Config(heads=4, head_dim=6, state=5, groups=2),
    )
    return Model(
        pattern=("gated_deltanet", "swa"), repeats=1, d_model=D, d_ff=32, vocab=64, gated_deltanet=delta,
        attention=attention, **others,
    )  # fmt: skip


@functools.cache
def make(name="gated_deltanet", **switches):
    cfg = config(replace(DELTA, **switches))
    return jax.jit(lambda key: MIXERS[name](cfg, rngs=nnx.Rngs(key)))(jax.random.key(0))


@functools.partial(jax.jit, static_argnames="compute")
def run(mixer, x, compute=FP32, **options):
    return mixer(x, compute=compute, **options)


def inputs(T, B=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (B, T, D), jnp.float32)


def names(mixer):
    paths = jax.tree_util.tree_leaves_with_path(mixer)
    return {jax.tree_util.keystr(path).removesuffix(".value").removeprefix(".") for path, _ in paths}


def parameters(mixer):
    leaves = jax.tree_util.tree_leaves_with_path(mixer)
    return {
        jax.tree_util.keystr(path).removesuffix(".value").removeprefix("."): np.asarray(leaf, np.float64)
        for path, leaf in leaves
    }


def silu(x):
    return x / (1 + np.exp(-x))


def direct_gated_deltanet(mixer, x):
    """The layer once more: float64, one token and one head at a time, state [V, K] as in the paper."""
    p, cfg, x = parameters(mixer), mixer.config, np.asarray(x, np.float64)
    B, T, _ = x.shape
    Hv, K, V = cfg.num_value_heads, cfg.key_dim, cfg.value_dim

    def conv(y, w):
        padded = np.concatenate([np.zeros((B, len(w) - 1, y.shape[-1])), y], axis=1)
        return silu(sum(w[j] * padded[:, j : j + T] for j in range(len(w))))

    q, k, v = (conv(x @ p[f"{n}_proj.kernel"], p[f"{n}_conv.weight"]) for n in "qkv")
    q, k = (y.reshape(B, T, cfg.heads, K) for y in (q, k))
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    v, gate = v.reshape(B, T, Hv, V), np.ones((B, T, Hv, V))
    if "g_proj.kernel" in p:
        gate = silu(x @ p["g_proj.kernel"]).reshape(B, T, Hv, V)
    beta = 1 / (1 + np.exp(-(x @ p["b_proj.kernel"] + p.get("b_proj.bias", 0))))
    alpha = np.ones((B, T, Hv))
    if "A_log" in p:
        alpha = np.exp(-np.exp(p["A_log"]) * np.log1p(np.exp(x @ p["a_proj.kernel"] + p["dt_bias"])))
    o = np.zeros((B, T, Hv, V))
    for b in range(B):
        for h in range(Hv):
            S, source = np.zeros((V, K)), h // (Hv // cfg.heads)
            for t in range(T):
                key = k[b, t, source]
                S = alpha[b, t, h] * S @ (np.eye(K) - beta[b, t, h] * np.outer(key, key))
                S += beta[b, t, h] * np.outer(v[b, t, h], key)
                o[b, t, h] = S @ q[b, t, source] / np.sqrt(K)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * p["o_norm.weight"] * gate
    return o.reshape(B, T, -1) @ p["o_proj.kernel"]


@pytest.mark.parametrize("name, value_heads", [("gated_deltanet", None), ("gated_deltanet", 4), ("deltanet", None)])
def test_gated_deltanet_against_a_direct_float64_layer(name, value_heads):
    mixer, x = make(name, value_heads=value_heads), inputs(37)
    exact = direct_gated_deltanet(mixer, x)
    assert np.abs(exact).max() > 0.3
    for impl in ("reference", "chunked"):
        y, cache = run(mixer, x, Compute(dtype=jnp.float32, impl=impl, chunk=16))
        np.testing.assert_allclose(y, exact, atol=2e-5)
        assert cache is None


def test_gates_follow_their_equations():
    mixer, x = make(), inputs(5)
    p, exact = parameters(mixer), np.asarray(x, np.float64)
    op, *_ = mixer.op_inputs(x, compute=FP32)
    decay = -np.exp(p["A_log"]) * np.log1p(np.exp(exact @ p["a_proj.kernel"] + p["dt_bias"]))
    np.testing.assert_allclose(op.g, decay, rtol=1e-5)
    np.testing.assert_allclose(op.beta, 1 / (1 + np.exp(-(exact @ p["b_proj.kernel"]))), rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(op.k, axis=-1), 1.0, atol=1e-3)
    doubled, *_ = make(negative_eigenvalues=True).op_inputs(x, compute=FP32)
    np.testing.assert_allclose(doubled.beta, 2 * op.beta, rtol=1e-6)


ALL = {f"{n}_proj.kernel" for n in "qkvgabo"} | {f"{n}_conv.weight" for n in "qkv"}
ALL |= {"A_log", "dt_bias", "o_norm.weight", "b_proj.bias"}


@pytest.mark.parametrize(
    "switches, dropped",
    [
        ({}, set()),
        ({"conv_width": 0}, {"q_conv.weight", "k_conv.weight", "v_conv.weight"}),
        ({"decay": False}, {"a_proj.kernel", "A_log", "dt_bias"}),
        ({"output_gate": False}, {"g_proj.kernel"}),
        ({"output_norm": False}, {"o_norm.weight"}),
        ({"output_norm": False, "output_gate": False}, {"o_norm.weight", "g_proj.kernel"}),
        ({"beta_bias": False}, {"b_proj.bias"}),
        ({"feature_map": "relu"}, set()),
        ({"feature_map": "elu1", "qk_norm": "l1"}, set()),
        ({"feature_map": "relu", "qk_norm": "l1"}, set()),
        ({"qk_norm": "l1"}, set()),
        ({"negative_eigenvalues": True}, set()),
        ({"value_heads": 4}, set()),
    ],
)
def test_a_switch_drops_its_parameters_and_changes_the_output(switches, dropped):
    mixer, x = make(**switches), inputs(20)
    assert names(mixer) == ALL - dropped
    y, _ = run(mixer, x)
    assert y.shape == x.shape and np.all(np.isfinite(y)) and np.abs(y).max() > 1e-2
    if switches and switches != {"beta_bias": False}:
        # the same draws where a part is only reinterpreted; other draws where one is missing
        assert np.abs(y - run(make(), x)[0]).max() > 1e-3
    cache, steps = mixer.init_cache(2, 20, jnp.float32), []
    for t in range(20):
        step, cache = run(mixer, x[:, t : t + 1], cache=cache)
        steps.append(step)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), y, atol=2e-5)


def test_deltanet_is_the_ungated_layer():
    mixer = make("deltanet")
    assert names(mixer) == ALL - {"a_proj.kernel", "A_log", "dt_bias", "g_proj.kernel", "b_proj.bias"}
    assert np.all(np.asarray(mixer.op_inputs(inputs(5), compute=FP32)[0].g) == 0)


def test_feature_maps_and_norms():
    x = inputs(6)
    for feature_map, function in {"relu": jax.nn.relu, "elu1": lambda y: jax.nn.elu(y) + 1}.items():
        for width in (0, 4):
            mixer = make(feature_map=feature_map, qk_norm="l1", conv_width=width)
            op, *_ = mixer.op_inputs(x, compute=FP32)
            raw = jnp.dot(x, mixer.k_proj.kernel[...], precision="highest")
            raw = function(mixer.k_conv(raw, FP32)[0] if width else raw).reshape(2, 6, 2, 6)
            np.testing.assert_allclose(op.k, raw / (raw.sum(-1, keepdims=True) + 1e-6), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jnp.abs(make(qk_norm="l1").op_inputs(x, compute=FP32)[0].q).sum(-1), 1.0, atol=1e-3)
    assert np.all(np.asarray(make(decay=False).op_inputs(x, compute=FP32)[0].g) == 0)


def test_dtype_policy():
    mixer, x = make(), inputs(8).astype(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(mixer)} == {jnp.dtype("float32")}
    op, _, past = mixer.op_inputs(x, compute=Compute())
    assert [y.dtype for y in op[:3]] == [jnp.bfloat16] * 3
    assert op.g.dtype == op.beta.dtype == jnp.float32
    assert past.dtype == jnp.bfloat16
    y, cache = run(mixer, x, Compute(impl="reference"), cache=mixer.init_cache(2, 8, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and cache.state.dtype == jnp.float32
    # the logits themselves are not rounded: fp32 accumulation of bf16 products is nearly exact
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    a, b = (exact @ np.asarray(p.kernel[...].astype(jnp.bfloat16), np.float64) for p in (mixer.a_proj, mixer.b_proj))
    np.testing.assert_allclose(op.beta, 1 / (1 + np.exp(-b)), rtol=1e-5)
    rate, bias = np.exp(np.asarray(mixer.A_log[...])), np.asarray(mixer.dt_bias[...])
    np.testing.assert_allclose(op.g, -rate * np.log1p(np.exp(a + bias)), rtol=1e-5)
    for name in ("attention", "swa"):
        mixer = make(name)
        assert {leaf.dtype for leaf in jax.tree.leaves(mixer)} == {jnp.dtype("float32")}
        assert run(mixer, x, Compute())[0].dtype == jnp.bfloat16


def direct_attention(mixer, x, visible):
    """Every score of every pair, with RoPE as complex numbers, masked by visible [T, T]."""
    p, x = parameters(mixer), np.asarray(x, np.float64)
    B, T, _ = x.shape
    q, k, v = ((x @ p[f"{n}_proj.kernel"]).reshape(B, T, 3, 8) for n in "qkv")
    turn = np.exp(1j * np.arange(T)[:, None] * 10000.0 ** (-np.arange(4) / 4))[None, :, None]
    q, k = ((y[..., :4] + 1j * y[..., 4:]) * turn for y in (q, k))
    scores = np.einsum("bthk,bshk->bhts", q, k.conj()).real / np.sqrt(8)
    weights = np.where(visible, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", weights, v).reshape(B, T, D) @ p["o_proj.kernel"]


@pytest.mark.parametrize("name, window", [("attention", 10**6), ("swa", 5)])
def test_attention_against_an_explicit_mask(name, window):
    mixer, x = make(name), inputs(13)
    t, s = np.arange(13)[:, None], np.arange(13)[None]
    visible = (s <= t) & (t - s < window)
    np.testing.assert_allclose(run(mixer, x)[0], direct_attention(mixer, x, visible), atol=2e-5)
    ids = np.array([4] * 3 + [2] + [4] * 9)
    packed, _ = run(mixer, x, segment_ids=jnp.tile(jnp.asarray(ids), (2, 1)))
    document = np.cumsum(np.diff(ids, prepend=ids[0]) != 0)
    expected = direct_attention(mixer, x, visible & (document[:, None] == document[None]))
    np.testing.assert_allclose(packed, expected, atol=2e-5)


@pytest.mark.parametrize("name", list(MIXERS))
@pytest.mark.parametrize("pieces", [[1] * 17, [3, 1, 13], [13, 3, 1], [17], [1, 3, 13]])
def test_a_cache_continues_from_any_prefix(name, pieces):
    """The window is 5: pieces shorter and longer than the ring occur, and it wraps more than once."""
    mixer, x = make(name), inputs(17)
    whole, _ = run(mixer, x)
    cache, parts, start = mixer.init_cache(2, 17, jnp.float32), [], 0
    shapes = jax.tree.map(jnp.shape, cache)
    for length in pieces:
        y, cache = run(mixer, x[:, start : start + length], cache=cache)
        parts.append(y)
        start += length
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
    assert jax.tree.map(jnp.shape, cache) == shapes, "memory must not grow"


def test_cache_sizes_are_bounded():
    assert make("swa").init_cache(2, 1000, jnp.float32).keys.shape == (2, 5, 3, 8)
    assert make("swa").init_cache(2, 3, jnp.float32).keys.shape == (2, 3, 3, 8)
    assert make("attention").init_cache(2, 1000, jnp.float32).keys.shape == (2, 1000, 3, 8)
    delta = make().init_cache(2, 10**9, jnp.float32)
    assert delta.state.shape == (2, 2, 6, 8) and delta.conv.shape == (2, 3, 2 * 12 + 16)


def test_no_two_tokens_of_a_piece_share_a_slot():
    """A device may write them in any order. Rows from 0 and from 7 on, of 13 tokens all and 4 count, a ring of 5."""
    positions = jnp.asarray([[0], [7]]) + jnp.arange(13)
    slots = np.asarray(ring_slots(positions, jnp.asarray([13, 4]), 5))
    assert all(len(set(row)) == 13 for row in slots.tolist())
    assert slots[0, 8:].tolist() == [3, 4, 0, 1, 2] and slots[1, :4].tolist() == [2, 3, 4, 0]
    assert slots[0, :8].min() >= 5 and slots[1, 4:].min() >= 5


def test_mistakes_with_attention_caches():
    mixer = make("attention")
    with pytest.raises(UserError, match="9 tokens do not fit a cache of max_len 8"):
        run(mixer, inputs(9), cache=mixer.init_cache(2, 8, jnp.float32))
    with pytest.raises(UserError, match="segment_ids and a cache"):
        ids = jnp.zeros((2, 4), jnp.int32)
        run(mixer, inputs(4), cache=mixer.init_cache(2, 8, jnp.float32), segment_ids=ids)
