"""Contexts read once for several continuations: the scores of pairs read alone, what is read, when it is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import scripted_model

from experiments.variants import PAPER_MODELS, model_config
from gdn_jax import prefill
from gdn_jax.evaluate import contexts, scoring
from gdn_jax.evaluate.contexts import Pair, divided
from gdn_jax.evaluate.scoring import Scorer
from gdn_jax.layers import Compute
from gdn_jax.model import init_model
from gdn_jax.progress import SILENT

FP32 = Compute(dtype=jnp.float32, chunk=16)
RECURRENT = [name for name in PAPER_MODELS if name != "transformer"]
QUICK = ("gated-deltanet", "gated-deltanet-h1")


def pairs(*sizes, seed=0):
    """(contexts, continuations): of each (tokens of a context, tokens of its continuations) pairs side by side."""
    rng = np.random.default_rng(seed)
    found = []
    for size, of_one in sizes:
        context = rng.integers(0, 256, size).astype(np.int32)
        found += [(context, rng.integers(0, 256, count).astype(np.int32)) for count in of_one]
    return tuple(map(list, zip(*found, strict=True)))


def as_read(*sizes):
    both = zip(*pairs(*sizes), strict=True)
    return [Pair(len(x) + len(y), np.concatenate([x, y]).tobytes(), len(y), 0) for x, y in both]


def score(model, requests, **options):
    return Scorer(model, compute=FP32, max_length=256, **options).score(*requests, progress=SILENT)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECURRENT]
)
def test_together_is_alone(monkeypatch, name):
    """On four devices and on one; the window of the hybrids is 64, within the contexts."""
    model = jax.jit(init_model, static_argnums=0)(model_config(name, "tiny"), jax.random.key(2))
    requests = pairs((100, (1, 7, 12, 16)), (70, (16, 3)))
    monkeypatch.setattr(contexts, "OPERATIONS_PER_BYTE", 0)
    calls = []
    monkeypatch.setattr(scoring, "read_prompts", lambda *a, **k: calls.append(1) or prefill.read_prompts(*a, **k))
    together = score(model, requests)
    assert calls
    monkeypatch.setattr(scoring, "divided", lambda pairs, *_: (pairs, []))
    alone = score(model, requests, devices=jax.devices()[:1])
    for one, other in zip(together, alone, strict=True):
        assert abs(one.log_likelihood - other.log_likelihood) / one.tokens < 1e-5
        assert (one.tokens, one.greedy, one.cut) == (other.tokens, other.greedy, other.cut)


@pytest.fixture
def read(monkeypatch):
    """The shapes that the three programs are given, and how many tokens of contexts."""
    seen = {"begin": [], "token_scores": [], "continuation_scores": [], "context tokens": 0}

    def watch(module, name, place):
        program = getattr(module, name)

        def watched(*arguments, **options):
            tokens = options.get("tokens", arguments[place] if len(arguments) > place else None)
            seen[name].append(tokens.shape)
            seen["context tokens"] += int(options["lengths"].sum()) if "lengths" in options else 0
            return program(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(prefill, "begin", 1)
    watch(scoring, "token_scores", 1)
    watch(scoring, "continuation_scores", 2)
    return seen


def test_four_continuations_read_their_context_once(monkeypatch, read):
    monkeypatch.setattr(contexts, "OPERATIONS_PER_BYTE", 0)
    requests = pairs((40, (5, 9, 17, 3)))
    score(scripted_model({}), requests, devices=jax.devices()[:1])
    assert read["context tokens"] == 39  # the last one is read before each continuation, in place of its own last one
    assert read["begin"] == [(1, 64)] and read["token_scores"] == []
    assert read["continuation_scores"] == [(1, 32 + 1), (1, 16 + 1), (1, 16 + 1), (1, 16 + 1)]
    read["begin"].clear()
    monkeypatch.setattr(contexts, "OPERATIONS_PER_BYTE", 1e9)
    score(scripted_model({}), requests, devices=jax.devices()[:1])
    assert read["begin"] == [] and read["token_scores"] == [(4, 64 + 1)]


def test_any_order_gives_the_same_bits_from_a_handful_of_programs(monkeypatch):
    monkeypatch.setattr(contexts, "OPERATIONS_PER_BYTE", 0)
    rng = np.random.default_rng(4)
    sizes = [(int(rng.integers(34, 129)), rng.integers(1, 33, rng.integers(3, 6))) for _ in range(30)]
    requests = pairs(*sizes)
    model = scripted_model({1: 2, 2: 3})
    programs = prefill.begin, scoring.continuation_scores, scoring.token_scores
    before = [program._cache_size() for program in programs]
    found = score(model, requests)
    order = rng.permutation(len(found))
    shuffled = score(model, [[of[i] for i in order] for of in requests])
    assert shuffled == [found[i] for i in order]
    begun, continued, alone = (program._cache_size() - count for program, count in zip(programs, before, strict=True))
    assert (begun, alone) == (2, 0), "contexts of 64 and 128 tokens; no pair is left to be read alone"
    assert 2 <= continued <= 4, "behind each, continuations of 16 and 32"


def test_when_a_context_is_read_once():
    cfg, compute = model_config("gated-deltanet", "1.3b"), Compute()

    def together(*sizes, cfg=cfg):
        return [len(group) for group in divided(sorted(as_read(*sizes), reverse=True), cfg, compute)[1]]

    assert together((60, (20, 18, 22, 19)), (20, (1, 1)), (150, (1, 1))) == [2, 4]
    assert together((150, (1,)), (150, (0, 1)), (1, (90, 90))) == [], "nothing that two would share"
    assert together((150, (1, 1)), cfg=model_config("transformer", "1.3b")) == []
    assert together((60, (20,) * 4), cfg=model_config("retnet", "1.3b")) == [4]
    assert together((30, (5,) * 2), cfg=model_config("retnet", "1.3b")) == [], "states of 101 MB"
    assert together((30, (5,) * 2), cfg=model_config("mamba", "1.3b")) == [2], "states of 5 MB"


def test_states_limit_the_rows(monkeypatch, read):
    monkeypatch.setattr(contexts, "OPERATIONS_PER_BYTE", 0)
    model = scripted_model({})
    one = contexts.state_bytes(model.config, 1, FP32)
    monkeypatch.setattr(scoring, "STATE_BYTES", 2 * one)
    score(model, pairs(*[(40, (3, 4))] * 5), devices=jax.devices()[:1])
    assert read["begin"] == [(2, 64)] * 3
