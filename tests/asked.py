"""Documents for a run to score, asked a few at a time: whether the others beside one change its numbers."""

import string

import jax
import numpy as np

from gdn_jax import tokenizer
from gdn_jax.evaluate.answering import Answering
from gdn_jax.fingerprint import Identity
from gdn_jax.layers import compute_for
from gdn_jax.progress import SILENT
from gdn_jax.runs import OpenRun

BYTES = tokenizer.load("byte")
LENGTHS = (5, 17, 33, 40, 64, 90, 100, 120, 200, 70)  # of contexts, in bytes
CONTINUED = (1, 3, 1, 20, 64, 7, 1, 100, 2, 2)

Document = list[tuple[str, str]]  # pairs of context and continuation


def documents(experiment, model, seed: int = 0) -> list[Document]:
    """Sixteen: ten of one pair, two that go on as the model would, four of a context with four continuations, which is
    read once."""
    random = np.random.default_rng(seed)

    def text(count: int) -> str:
        return "".join(random.choice(list(string.ascii_letters), count))

    single = [[(text(length), text(more))] for length, more in zip(LENGTHS, CONTINUED, strict=True)]
    shared = [[(context, text(5)) for _ in range(4)] for context in map(text, (60, 150, 250, 251))]
    mixed = [document for pair in zip(single, shared, strict=False) for document in pair]
    return mixed + single[len(shared) :] + _likely(experiment, model, [text(31) for _ in range(128)])


def _likely(experiment, model, contexts: list[str]) -> list[Document]:
    """The two contexts after which a letter is by far the likeliest, and that letter."""
    compute = compute_for(experiment)
    tokens = np.array([BYTES.encode(context) for context in contexts], np.int32)
    logits = jax.jit(lambda model, tokens: model.logits(model(tokens, compute=compute)[0][:, -1:])[:, 0])
    found = np.asarray(logits(model, tokens), np.float32)
    first, second = np.sort(found)[:, -1], np.sort(found)[:, -2]
    text = [chr(token) if token < 128 else "" for token in found.argmax(axis=1)]
    ahead = np.where([letter.isalpha() for letter in text], first - second, 0)
    assert np.sort(ahead)[-2] > 0.1, np.sort(ahead)[-2:]  # rounding may not decide
    return [[(contexts[row], text[row])] for row in np.argsort(ahead)[-2:]]


def scores(experiment, model, asked: list[Document], directory, at_once: int, **options) -> list[tuple[float, bool]]:
    """Each pair's log-likelihood a token and greedy flag, so many documents asked together, none known before."""
    run = OpenRun(directory, experiment, model, 0, Identity("0" * 64, BYTES.hash8), BYTES)
    answering = Answering(run, keep=directory / f"{at_once}.jsonl", progress=SILENT, **options)
    found = []
    for start in range(0, len(asked), at_once):
        pairs = [pair for document in asked[start : start + at_once] for pair in document]
        answers = answering.loglikelihood(pairs)
        found += [(total / len(pair[1]), greedy) for pair, (total, greedy) in zip(pairs, answers, strict=True)]
    return found


def furthest(found, others) -> float:
    """The largest difference of two log-likelihoods a token; AssertionError where a greedy flag differs."""
    assert [greedy for _, greedy in found] == [greedy for _, greedy in others]
    return max(abs(one - other) for (one, _), (other, _) in zip(found, others, strict=True))
