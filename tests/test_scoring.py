"""The scoring core: closed forms, one token after the other, and what must not change a score."""

import math
from dataclasses import replace
from functools import partial

import asked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import scripted_model

import experiments
from gdn_jax.errors import UserError
from gdn_jax.evaluate import answering, contexts, scoring
from gdn_jax.evaluate.scoring import Scorer, bucket
from gdn_jax.layers import Compute
from gdn_jax.model import init_model
from gdn_jax.progress import SILENT

FP32 = Compute(dtype=jnp.float32, chunk=16)
EOS, VOCAB = 256, 320


def pairs(count=13, longest=70, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, (count, 2))
    return tuple([rng.integers(0, 256, size).astype(np.int32) for size in of] for of in sizes.T)


@pytest.fixture(scope="module")
def model():
    return jax.jit(init_model, static_argnums=0)(experiments.get("table3/gated-deltanet/tiny").model, jax.random.key(3))


@pytest.fixture(scope="module")
def scores(model):
    return Scorer(model, compute=FP32, max_length=256).score(*pairs(), progress=SILENT)


def per_token(found, expected):
    return max(
        abs(a.log_likelihood - b.log_likelihood) / max(a.tokens, 1) for a, b in zip(found, expected, strict=True)
    )


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    scorer = Scorer(scripted_model({}), compute=FP32, max_length=64)
    found = scorer.score(*pairs(5), progress=SILENT)
    for score, continuation in zip(found, pairs(5)[1], strict=True):
        assert score.tokens == len(continuation)
        assert math.exp(-score.log_likelihood / score.tokens) == pytest.approx(VOCAB, rel=1e-5)
        assert score.greedy == (not continuation.any())  # of equal logits the first is the likeliest


def test_a_scripted_model_would_write_its_continuation_greedily():
    scorer = Scorer(scripted_model({1: 2, 2: 3}), compute=FP32, max_length=64)
    right, wrong = scorer.score([[9, 1], [9, 1]], [[2, 3], [2, 4]], progress=SILENT)
    assert (right.greedy, wrong.greedy) == (True, False) and right.log_likelihood > wrong.log_likelihood


@pytest.mark.parametrize("name", ["gated-deltanet", pytest.param("gated-deltanet-h2", marks=pytest.mark.slow)])
def test_a_score_is_the_sum_of_stepwise_decoding(name):
    cfg = experiments.get(f"table3/{name}/tiny").model
    model = jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(1))
    context, continuation = (x[0] for x in pairs(1, 30, seed=4))

    @jax.jit
    def step(token, cache):
        hidden, cache = model(token[None, None], compute=FP32, cache=cache)
        return jax.nn.log_softmax(model.logits(hidden)[0, 0].astype(jnp.float32)), cache

    cache, total = model.init_cache(1, 64, FP32), 0.0
    tokens = np.concatenate([context, continuation])
    for position, token in enumerate(tokens[:-1]):
        log_p, cache = step(jnp.int32(token), cache)
        if position >= len(context) - 1:
            total += float(log_p[tokens[position + 1]])
    (score,) = Scorer(model, compute=FP32, max_length=64).score([context], [continuation], progress=SILENT)
    assert abs(score.log_likelihood - total) / len(continuation) < 1e-5


def test_any_order_gives_the_same_bits(model, scores):
    order = np.random.default_rng(2).permutation(13)
    contexts, continuations = pairs()
    shuffled = Scorer(model, compute=FP32, max_length=256).score(
        [contexts[i] for i in order], [continuations[i] for i in order], progress=SILENT
    )
    assert shuffled == [scores[i] for i in order]


@pytest.mark.parametrize(
    "change", [{"batch_tokens": 1}, {"batch_tokens": 200}, {"devices": 1}, {"shortest": 128}, {"context": 4}], ids=str
)
def test_batches_buckets_and_devices_change_nothing_but_rounding(model, scores, monkeypatch, change):
    devices = jax.devices()[: change.pop("devices", 4)]
    monkeypatch.setattr(contexts, "SHORTEST", change.pop("shortest", contexts.SHORTEST))
    found = Scorer(model, compute=FP32, max_length=256, devices=devices, **change).score(*pairs(), progress=SILENT)
    assert per_token(found, scores) < 1e-5
    assert [score.greedy for score in found] == [score.greedy for score in scores]


def test_lengths_share_a_handful_of_programs(model):
    contexts, continuations = pairs(40, 100, seed=7)
    before = scoring.token_scores._cache_size()
    Scorer(model, compute=FP32, max_length=256).score(contexts, continuations, progress=SILENT)
    assert {bucket(n) for n in range(1, 257)} == {32, 64, 128, 256}
    assert scoring.token_scores._cache_size() - before <= 4


def test_a_long_context_loses_its_beginning(model):
    context, continuation = np.arange(100) % 256, [7, 8, 9]
    scorer = Scorer(model, compute=FP32, max_length=40)
    cut, whole = scorer.score([context, context[-38:]], [continuation, continuation], progress=SILENT)
    assert (cut.cut, whole.cut) == (62, 0) and cut.log_likelihood == whole.log_likelihood


def test_rolling_scores_each_token_once_in_blocks(model):
    text = np.random.default_rng(9).integers(0, 256, 50)
    scorer = Scorer(model, compute=FP32, max_length=20)
    done = {}
    (score, empty) = scorer.rolling([text, []], prefix=EOS, progress=SILENT, done=done.update)
    # blocks as lm-evaluation-harness makes them: the last one is given as much before it as fits
    parts = scorer.score([[EOS], [text[19]], text[29:40]], [text[:20], text[20:40], text[40:]], progress=SILENT)
    assert score.tokens == 50 and empty == (0.0, True, 0, 0) and done == {0: score, 1: empty}
    assert score.log_likelihood == pytest.approx(math.fsum(part.log_likelihood for part in parts), rel=1e-6)


def test_scores_are_handed_on_batch_by_batch(model, scores):
    done = []
    Scorer(model, compute=FP32, max_length=256, batch_tokens=200).score(*pairs(), progress=SILENT, done=done.append)
    assert len(done) > 3 and sorted(i for one in done for i in one) == list(range(13))


@pytest.mark.parametrize(
    ("context", "continuation", "sentence"),
    [
        ([], [1], "Context 0 is empty; give at least the token that begins a document."),
        ([1], [2] * 41, "Continuation 0 has 41 tokens, more than max_length 40"),
        ([1], [320], "Pair 0 holds token 320, outside the model's vocabulary of 320"),
        ([-1], [3], "Pair 0 holds token -1, outside"),
    ],
)
def test_wrong_pairs(context, continuation, sentence):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        Scorer(scripted_model({}), compute=FP32, max_length=40).score([context], [continuation], progress=SILENT)


def test_a_model_that_diverged_is_named():
    broken = jax.tree.map(lambda x: x * jnp.nan, scripted_model({1: 2}))
    with pytest.raises(UserError, match="A log-likelihood is nan: the model's parameters have diverged"):
        Scorer(broken, compute=FP32, max_length=40).score([[1]], [[2]], progress=SILENT)


@pytest.mark.parametrize("option", ["max_length", "batch_tokens"])
def test_wrong_sizes(option):
    with pytest.raises(UserError, match=f"{option} is 0; it must be positive."):
        Scorer(scripted_model({}), compute=FP32, **({"max_length": 8} | {option: 0}))


@pytest.mark.parametrize("name", ["transformer", pytest.param("gated-deltanet", marks=pytest.mark.slow)])
def test_full_batches_give_the_same_bits_in_bf16_however_many_are_asked(name, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "Scorer", partial(Scorer, full_batches=True))
    experiment = experiments.get(f"table3/{name}/tiny")
    experiment = replace(experiment, optim=replace(experiment.optim, precision="bf16"))
    model = jax.jit(init_model, static_argnums=0)(experiment.model, jax.random.key(0))
    given = experiment, model, asked.documents(experiment, model), tmp_path
    alone, all_at_once = (asked.scores(*given, at_once, batch_tokens=1024) for at_once in (1, 16))
    assert [greedy for _, greedy in alone][-2:] == [True, True]
    assert asked.furthest(alone, all_at_once) == 0


def test_a_neighbour_with_longer_continuations_changes_no_program(monkeypatch):
    """Two contexts of one size, each with six continuations: of 3 tokens, or of 40."""
    monkeypatch.setattr(contexts, "OPERATIONS_PER_BYTE", 0)
    lengths = []
    monkeypatch.setattr(Scorer, "_batch", lambda self, program, asked, rows, length: lengths.append(length) or {})
    model = scripted_model({})
    random = np.random.default_rng(0)
    for texts in ([3], [3, 40]):
        begins = [random.integers(0, 256, 100) for _ in texts]
        asked_of = [
            (begin, random.integers(0, 256, size)) for begin, size in zip(begins, texts, strict=True) for _ in range(6)
        ]
        with pytest.raises(KeyError):  # no scores come back
            Scorer(model, compute=FP32, max_length=200, full_batches=True).score(*zip(*asked_of, strict=True))
        assert sorted(lengths) == [16] * 6 + [64] * 6 * (len(texts) - 1)
        lengths.clear()
