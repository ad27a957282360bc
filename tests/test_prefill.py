"""Prompts of unequal lengths read together leave what each leaves alone: state, histories, caches and logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.variants import PAPER_MODELS, model_config
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute
from gdn_jax.model import init_model

FP32 = Compute(dtype=jnp.float32, impl="chunked", chunk=64)
WIDTH = 4  # of the short convolutions
LENGTHS = (1, WIDTH - 1, WIDTH, 63, 64, 65)
PIECE = 64


@functools.cache
def tiny(name):
    return jax.jit(init_model, static_argnums=0)(model_config(name, "tiny"), jax.random.key(0))


@functools.partial(jax.jit, static_argnames="room")
def read(model, tokens, lengths=None, cache=None, room=None):
    """(logits behind each row's last token, the new cache)."""
    hidden, cache = model(tokens, compute=FP32, cache=cache, lengths=lengths, room=room)
    last = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    return model.logits(hidden[jnp.arange(len(tokens)), jnp.maximum(last - 1, 0)]), cache


def prompts(lengths, width):
    """One prompt a row, and behind it tokens that must not matter."""
    return jax.random.randint(jax.random.key(1), (len(lengths), width), 0, 256)


def one_by_one(model, tokens, lengths, room):
    """(logits, cache row) of each prompt at its own end, token after token."""
    _, empty = jax.eval_shape(lambda: read(model, tokens[:, :1], room=room))
    cache = model.init_cache(len(lengths), room, FP32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(lambda x: (x.shape, x.dtype), empty)
    found = {}
    for t in range(max(lengths)):
        logits, cache = read(model, tokens[:, t : t + 1], cache=cache)
        for row in np.flatnonzero(np.array(lengths) == t + 1):
            found[row] = jax.tree.map(np.asarray, (logits[row], jax.tree.map(lambda x, row=row: x[:, row], cache)))
    return [found[row] for row in range(len(lengths))]


def together(model, tokens, lengths, room, piece):
    """The same in pieces that all rows share, each row with as many tokens of a piece as it has left."""
    lengths, logits, cache = np.array(lengths), None, None
    for start in range(0, tokens.shape[1], piece):
        count = jnp.asarray(np.clip(lengths - start, 0, piece), jnp.int32)
        part, past = tokens[:, start : start + piece], {"cache": cache} if start else {"room": room}
        new, cache = read(model, part, count, **past)
        logits = new if logits is None else jnp.where(count[:, None] > 0, new, logits)
    return [
        jax.tree.map(np.asarray, (logits[row], jax.tree.map(lambda x, row=row: x[:, row], cache)))
        for row in range(len(lengths))
    ]


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        size = np.abs(b).max(initial=0)
        assert np.abs(a - b).max(initial=0) <= 1e-5 * max(size, 1), "more than 1e-5 apart"


QUICK = (
    "gated-deltanet",
    "mamba",
    "mamba2",
    "transformer",
    "gated-deltanet-h1",
)  # every kind of cache; the rest is slow


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAPER_MODELS],
)
def test_unequal_prompts_read_together_equal_each_alone(name):
    """The window of the hybrids is 64: rows within it, at its end and beyond it."""
    lm, tokens, room = tiny(name), prompts(LENGTHS, 2 * PIECE), 96
    expected = one_by_one(lm, tokens, LENGTHS, room)
    assert_close(together(lm, tokens, LENGTHS, room, PIECE), expected)
    assert np.abs(expected[3][0] - expected[4][0]).max() > 1e-2, "every token matters"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER_MODELS)
def test_a_long_prompt_beside_short_ones_equals_itself_alone(name):
    lm, lengths = tiny(name), (1000, 65, 1)
    tokens = prompts(lengths, 1024)
    assert_close(together(lm, tokens, lengths, 1024, 256), one_by_one(lm, tokens, lengths, 1024))
    assert_close(together(lm, tokens, lengths, 1024, 1024), together(lm, tokens, lengths, 1024, 256))


def test_rows_in_turn_give_the_numbers_of_all_rows_at_once(monkeypatch):
    from gdn_jax.mixers import attention

    lm, tokens = tiny("transformer"), prompts(LENGTHS, 2 * PIECE)
    expected = together(lm, tokens, LENGTHS, 96, PIECE)
    read.clear_cache()
    monkeypatch.setattr(attention, "SCORES", 4 * PIECE * (PIECE + 96) * 4)  # four rows, then the other two
    assert_close(together(lm, tokens, LENGTHS, 96, PIECE), expected)
    read.clear_cache()


def test_what_does_not_go_together_is_refused():
    lm, tokens = tiny("transformer"), prompts((4, 4), 4)
    cache = lm.init_cache(2, 8, FP32)
    with pytest.raises(UserError, match="a cache and a room for a new one"):
        lm(tokens, compute=FP32, cache=cache, room=8)
    with pytest.raises(UserError, match="segment_ids and a cache"):
        lm(tokens, compute=FP32, segment_ids=tokens, room=8)
    with pytest.raises(UserError, match="4 tokens do not fit a cache of max_len 3"):
        lm(tokens, compute=FP32, room=3)
