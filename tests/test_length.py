"""Length extrapolation: against one pass and hand computation, joined documents, memory that does not grow."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn_jax.config import AttentionConfig, GatedDeltaNetConfig, Model
from gdn_jax.errors import UserError
from gdn_jax.evaluate import length as module
from gdn_jax.evaluate.length import length_extrapolation
from gdn_jax.layers import Compute
from gdn_jax.model import init_model
from gdn_jax.progress import SILENT

FP32 = Compute(dtype=jnp.float32, impl="chunked", chunk=16)
VOCAB, EOS = 64, 63
PATTERNS = [("gated_deltanet",), ("gated_deltanet", "swa"), ("attention",)]
HYBRID_FIRST = [PATTERNS[1], *(pytest.param(one, marks=pytest.mark.slow) for one in (PATTERNS[0], PATTERNS[2]))]


@functools.cache
def model(*pattern):
    cfg = Model(
        pattern=pattern,
        repeats=1,
        d_model=32,
        d_ff=48,
        vocab=VOCAB,
        tied=False,
        gated_deltanet=GatedDeltaNetConfig(heads=2, key_dim=8, value_dim=12),
        attention=AttentionConfig(heads=2, head_dim=16, window=20),
    )
    lm = jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(0))
    lm.embed[...] = 10 * lm.embed[...]
    return lm


def documents(*sizes):
    rng = np.random.default_rng(1)
    return [rng.integers(0, EOS, size) for size in sizes]


def measure(lm, docs, **options):
    options = dict(lengths=(24, 60, 100), bucket=32, piece=16, eos=EOS, compute=FP32, progress=SILENT) | options
    return length_extrapolation(lm, docs, **options)


@functools.partial(jax.jit, static_argnums=2)
def log_p(lm, tokens, compute):
    return jax.nn.log_softmax(lm.logits(lm(tokens, compute=compute)[0]), axis=-1)


def nll(lm, sequence):
    """-log p of each token given EOS and all before it, in one pass without a cache."""
    inputs = np.concatenate([[EOS], sequence[:-1]]).astype(np.int32)
    return -np.asarray(log_p(lm, inputs[None], FP32), np.float64)[0, np.arange(len(sequence)), sequence]


@pytest.mark.parametrize("pattern", HYBRID_FIRST)
def test_pieces_give_what_one_pass_gives(pattern):
    lm, docs = model(*pattern), documents(100, 130)
    whole = np.stack([nll(lm, doc[:100]) for doc in docs])
    for piece, batch_size in [(16, 1), (7, 2), (100, 3), (128, 1)]:
        found = measure(lm, docs, piece=piece, batch_size=batch_size)
        for row, length in zip(found["lengths"], (24, 60, 100), strict=True):
            assert (row["start"], row["stop"]) == (0, length)
            assert row["nll"] == pytest.approx(whole[:, :length].mean(), abs=1e-5)
            assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        buckets = [(0, 32), (32, 64), (64, 96), (96, 100)]
        assert [(row["start"], row["stop"]) for row in found["buckets"]] == buckets
        for row, (start, stop) in zip(found["buckets"], buckets, strict=True):
            assert row["nll"] == pytest.approx(whole[:, start:stop].mean(), abs=1e-5)
        assert (found["sequences"], found["documents"], found["joined"], found["piece"]) == (2, 2, 0, piece)


def test_a_uniform_model_has_the_closed_form():
    lm = jax.tree.map(jnp.zeros_like, model("gated_deltanet"))
    found = measure(lm, documents(100))
    assert all(row["perplexity"] == pytest.approx(VOCAB, rel=1e-5) for row in found["lengths"] + found["buckets"])


def test_short_documents_are_joined_with_eos_and_that_is_recorded():
    lm, docs = model("gated_deltanet"), documents(40, 120, 0, 30, 50, 90, 20)
    joined = np.concatenate([docs[0], [EOS], docs[3], [EOS], docs[4]])[:100]
    expected = np.stack(
        [nll(lm, docs[1][:100]), nll(lm, joined), nll(lm, np.concatenate([docs[5], [EOS], docs[6]])[:100])]
    )
    found = measure(lm, docs)
    assert found["lengths"][-1]["nll"] == pytest.approx(expected.mean(), abs=1e-5)
    assert (found["sequences"], found["documents"], found["joined"], found["left_out"]) == (3, 6, 5, 1)
    part = measure(lm, docs, limit=1)
    assert part["lengths"][-1]["nll"] == pytest.approx(expected[0].mean(), abs=1e-5)
    assert (part["sequences"], part["documents"], part["joined"], part["left_out"]) == (1, 1, 0, 0)
    rest = measure(lm, [*docs, *documents(99)])  # 99 tokens that nothing follows
    assert (rest["sequences"], rest["documents"], rest["left_out"]) == (3, 6, 2)
    assert measure(lm, [*docs, *documents(99)], limit=1000) == rest, "a limit above the set is none"


def test_a_document_is_read_piece_by_piece():
    """No more of it than a piece is in memory at once, and nothing behind the longest length is read."""

    class Slow:
        slices = ()

        def __len__(self):
            return 10**9

        def __getitem__(self, where):
            self.slices += (where,)
            return np.ones(where.stop - where.start, np.int64)

    slow = Slow()
    measure(model("gated_deltanet"), [slow])
    assert [(s.start, s.stop) for s in slow.slices] == [*itertools.pairwise(range(0, 97, 16)), (96, 100)]


def test_memory_does_not_grow_with_the_length():
    """Recurrent models and windows: one program and caches of one size serve any length; attention's cache grows."""

    def memory(pattern, length):
        lm = model(*pattern)
        cache = jax.eval_shape(lambda: lm.init_cache(1, length, FP32))
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        program = module._read.lower(lm, tokens, tokens, cache, compute=FP32).compile().memory_analysis()
        return program.argument_size_in_bytes + program.temp_size_in_bytes + program.output_size_in_bytes

    for pattern in PATTERNS[:2]:
        assert memory(pattern, 64) == memory(pattern, 2**20)
    assert memory(PATTERNS[2], 4096) > 8 * memory(PATTERNS[2], 64)
    lm = model("gated_deltanet")
    measure(lm, documents(40), lengths=(40,))
    before, live = module._read._cache_size(), sum(array.nbytes for array in jax.live_arrays())
    measure(lm, documents(1000), lengths=(40, 1000))
    assert module._read._cache_size() == before, "one program for all lengths"
    assert sum(array.nbytes for array in jax.live_arrays()) <= live + 4096, "nothing of the document stays"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lengths": ()}, r"lengths are \[\]; give one at least"),
        ({"lengths": (0, 5)}, r"lengths are \[0, 5\]; give one at least, all positive"),
        ({"piece": 0}, "piece is 0; it must be positive"),
        ({"bucket": 0}, "bucket is 0; it must be positive"),
        ({"batch_size": 0}, "batch_size is 0; it must be positive"),
        ({"limit": 0}, "limit is 0; it must be positive"),
        ({"lengths": (200,)}, "The 2 documents have 130 tokens together, fewer than the 200 of one sequence"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(UserError, match=sentence):
        measure(model("gated_deltanet"), documents(100, 30), **options)


def test_a_diverged_model_is_named():
    broken = jax.tree.map(lambda x: x * jnp.nan, model("gated_deltanet"))
    with pytest.raises(UserError, match="A loss among tokens 0 to 16 of sequences 0 to 0 is not finite"):
        measure(broken, documents(100))
