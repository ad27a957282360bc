"""Calling a model from Python: NumPy tokens, ids outside the vocabulary, full caches, picked rows, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdn_jax
from experiments import get
from gdn_jax.config import AttentionConfig, GatedDeltaNetConfig, Model
from gdn_jax.errors import UserError
from gdn_jax.evaluate.length import length_extrapolation
from gdn_jax.layers import Compute, rope
from gdn_jax.loss import next_token_loss
from gdn_jax.model import init_model, reorder_cache
from gdn_jax.prefill import read_prompts
from gdn_jax.progress import SILENT

FP32 = Compute(dtype=jnp.float32, impl="reference")  # the smallest program to compile
SMOKE = ("retnet", "hgrn2", "mamba", "mamba2", "deltanet", "gated-deltanet", "transformer", "samba")
call = jax.jit(lambda model, tokens, compute, **options: model(tokens, compute=compute, **options), static_argnums=2)


@functools.cache
def smoke(name):
    return jax.jit(init_model, static_argnums=0)(get(f"smoke/{name}").model, jax.random.key(0))


@functools.cache
def attention(name, window=6):
    mixer = GatedDeltaNetConfig(heads=2, key_dim=8, value_dim=8)
    cfg = Model(
        pattern=("gated_deltanet", name), repeats=2, d_model=32, d_ff=0, vocab=64, gated_deltanet=mixer,
        attention=AttentionConfig(heads=2, head_dim=16, window=window),
    )  # fmt: skip
    return jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(0))


def ids(B=2, T=9, vocab=64):
    return np.random.default_rng(0).integers(0, vocab, (B, T))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_numpy_tokens_are_taken(dtype):
    lm, tokens = attention("swa"), ids()
    hidden, _ = lm(tokens.astype(dtype), compute=FP32)
    np.testing.assert_array_equal(hidden, lm(jnp.asarray(tokens), compute=FP32)[0])
    batch = {"tokens": tokens.astype(dtype), "weights": np.array([1.0, 0.0]), "segment_ids": np.zeros((2, 9), np.int32)}
    expected = next_token_loss(lm, {"tokens": jnp.asarray(tokens[:1])}, FP32)
    np.testing.assert_allclose(next_token_loss(lm, batch, FP32), expected, rtol=1e-6)


def test_tokens_of_a_type_that_counts_less_than_the_vocabulary():
    lm, tokens = init_model(get("smoke/transformer").model, jax.random.key(0)), ids(vocab=100)
    assert lm.config.vocab > 127
    hidden, _ = lm(tokens.astype(np.int8), compute=FP32)
    np.testing.assert_array_equal(hidden, lm(tokens, compute=FP32)[0])


@pytest.mark.parametrize("strange", [-1, -100, 64])
def test_a_token_outside_the_vocabulary_is_refused(strange):
    lm, tokens = attention("swa"), ids()
    tokens[1, -1] = strange
    calls = [
        lambda: lm(tokens, compute=FP32),
        lambda: lm(jnp.asarray(tokens), compute=FP32),
        lambda: next_token_loss(lm, {"tokens": tokens}, FP32),  # a target alone
        lambda: length_extrapolation(lm, [tokens[1]], eos=0, lengths=(9,), compute=FP32, progress=SILENT),
        lambda: read_prompts(lm, [tokens[1]], rows=1, room=9, compute=FP32, say=lambda count: None),
    ]
    for call in calls:
        with pytest.raises(UserError, match=rf"Token {strange} is not in the model's vocabulary: ids lie in \[0, 64\)"):
            call()


def test_tokens_known_inside_a_jitted_function():
    """A constant of the function is looked at without making it part of the program."""
    lm, tokens = attention("attention"), jnp.asarray(ids())
    strange = tokens + 64
    jaxpr = str(jax.make_jaxpr(lambda lm: next_token_loss(lm, {"tokens": tokens}, FP32))(lm))
    assert "reduce_min" not in jaxpr
    with pytest.raises(UserError, match=r"Token \d+ is not in"):
        jax.make_jaxpr(lambda lm: next_token_loss(lm, {"tokens": strange}, FP32))(lm)


@pytest.mark.parametrize("name", ["attention", "swa"])
def test_a_cache_is_outgrown_token_by_token_as_by_a_piece(name):
    """A ring of 4: full attention, or a window of 6."""
    lm, tokens = attention(name), ids(T=5)
    says = pytest.raises(UserError, match="5 tokens do not fit a cache of max_len 4; make it with a larger max_len")
    with says:
        lm(tokens, compute=FP32, cache=lm.init_cache(2, 4, FP32))
    with says:
        lm(tokens, compute=FP32, room=4)
    _, full = lm(tokens[:, :4], compute=FP32, cache=lm.init_cache(2, 4, FP32))
    with says:
        lm(tokens[:, 4:], compute=FP32, cache=full)
    mixer = jax.tree.map(lambda leaf: leaf[0], lm.groups.blocks[1].mixer)
    with says:
        mixer(jnp.ones((2, 1, 32)), compute=FP32, cache=jax.tree.map(lambda leaf: leaf[0], full[1]))
    # one row has room for two more
    _, cache = lm(tokens[:, :4], compute=FP32, cache=lm.init_cache(2, 4, FP32), lengths=jnp.array([2, 4]))
    hidden, _ = lm(tokens[:, 4:], compute=FP32, cache=cache, lengths=jnp.array([1, 0]))
    assert np.isfinite(hidden[0]).all()
    with says:
        lm(tokens[:, 4:], compute=FP32, cache=cache, lengths=jnp.array([1, 1]))
    jitted, _ = call(lm, tokens[:, 4:], FP32, cache=cache)
    assert np.isfinite(jitted[0]).all() and np.isnan(jitted[1]).all()


def test_a_ring_as_long_as_the_window_goes_on_for_ever():
    lm, tokens = attention("swa"), ids(T=15)
    cache, parts = lm.init_cache(2, 6, FP32), []
    for t in range(15):
        hidden, cache = call(lm, tokens[:, t : t + 1], FP32, cache=cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), lm(tokens, compute=FP32)[0], atol=1e-4)


@pytest.mark.parametrize("name", SMOKE)
def test_picked_rows_of_a_cache_go_on_as_their_sequences(name):
    lm, tokens, rows = smoke(name), ids(3, 7, 256), np.array([2, 0, 2, 1])
    _, cache = call(lm, tokens[:, :5], FP32, cache=lm.init_cache(3, 7, FP32))
    picked = reorder_cache(cache, rows)
    hidden, _ = call(lm, tokens[rows, 5:], FP32, cache=picked)
    np.testing.assert_allclose(hidden, call(lm, tokens[rows], FP32)[0][:, 5:], atol=1e-4)
    fewer = jax.jit(gdn_jax.reorder_cache)(cache, jnp.array([1]))
    hidden, _ = call(lm, tokens[1:2, 5:], FP32, cache=fewer)
    np.testing.assert_allclose(hidden, call(lm, tokens[1:2], FP32)[0][:, 5:], atol=1e-4)


@pytest.mark.parametrize("strange", [-1, 3])
def test_rows_that_a_cache_does_not_have(strange):
    cache = attention("attention").init_cache(3, 4, FP32)
    with pytest.raises(UserError, match=rf"rows is \[0, {strange}\]; the cache has rows 0 to 2"):
        reorder_cache(cache, [0, strange])


@pytest.mark.parametrize("name", SMOKE)
def test_float64_is_exact(name):
    """Chunks, the reference and single tokens agree to float64, with fp32 parameters and with the same in float64."""
    with jax.enable_x64(True):
        lm, tokens, exact = smoke(name), ids(2, 41, 256), Compute(dtype=jnp.float64, impl="chunked", chunk=16)
        double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), lm)
        whole, _ = call(lm, tokens, exact)
        assert whole.dtype == lm.logits(whole).dtype == jnp.float64
        cache = lm.init_cache(2, 41, exact)
        first, cache = call(lm, tokens[:, :40], exact, cache=cache)
        last, _ = call(lm, tokens[:, 40:], exact, cache=cache)
        others = [
            jnp.concatenate([first, last], axis=1),
            call(double, tokens, exact)[0],
            call(double, tokens, Compute(dtype="float64", impl="reference"))[0],
        ]
        for other in others:
            assert np.abs(other - whole).max() < 1e-12 * np.abs(whole).max()
        np.testing.assert_allclose(
            lm.logits(whole), np.asarray(whole) @ np.asarray(lm.head_kernel(), np.float64), atol=1e-12
        )
        loss = next_token_loss(lm, {"tokens": tokens}, exact)
        log_p = jax.nn.log_softmax(lm.logits(whole[:, :-1]))
        expected = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], -1).mean()
        assert loss.dtype == jnp.float64 and abs(loss / expected - 1) < 1e-14


def test_rope_of_float64_is_exact():
    x = np.random.default_rng(0).standard_normal((1, 50, 1, 8))
    angle = np.arange(50)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[0, :, 0, :4] + 1j * x[0, :, 0, 4:]) * np.exp(1j * angle)
    with jax.enable_x64(True):
        y = np.asarray(rope(jnp.asarray(x)))[0, :, 0]
    np.testing.assert_allclose(y[:, :4] + 1j * y[:, 4:], turned, rtol=1e-13)


def test_dtypes_that_cannot_be_computed_in():
    with pytest.raises(UserError, match="dtype is float64, which JAX rounds to float32 by itself; set jax_enable_x64"):
        Compute(dtype=jnp.float64)
    for strange in (jnp.float16, "int32"):
        with pytest.raises(UserError, match=r"dtype is (float16|int32); it must be bfloat16, float32 or float64"):
            Compute(dtype=strange)
    with pytest.raises(UserError, match="dtype is 'fp8'; it must be bfloat16"):
        Compute(dtype="fp8")
    assert Compute(dtype="float32") == Compute(dtype=jnp.float32) == Compute(dtype=np.dtype("float32"))
