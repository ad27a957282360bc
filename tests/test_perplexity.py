"""Held-out perplexity against hand computations: units, sliding windows, the text's bytes and words."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdn_jax import tokenizer
from gdn_jax.config import AttentionConfig, Model
from gdn_jax.data import open_prepared
from gdn_jax.errors import UserError
from gdn_jax.evaluate import perplexity as module
from gdn_jax.layers import Compute
from gdn_jax.model import init_model
from gdn_jax.prepare import prepare
from gdn_jax.progress import SILENT

T = 24
VOCAB = 320
FP32 = Compute(dtype=jnp.float32, impl="chunked")
CONFIG = Model(
    pattern=("attention",), repeats=1, d_model=16, d_ff=24, vocab=VOCAB, tied=False,
    attention=AttentionConfig(heads=2, head_dim=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """About a hundred held-out documents of words of one to four bytes a character; some end in a space."""
    root = tmp_path_factory.mktemp("text")
    words = ["sun", "é", "größe", "漢字", "🙂", "a\u00a0b", "x,\n"]
    rng = np.random.default_rng(0)
    lines = [{"text": f"{i} " + " ".join(rng.choice(words, rng.integers(1, 9)))} for i in range(200)]
    source = root / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    prepare(str(source), root / "out", "byte", validation=0.5, workers=1, progress=SILENT)
    return open_prepared(root / "out", tokenizer_hash=None)


@pytest.fixture(scope="module")
def model():
    return jax.jit(init_model, static_argnums=0)(CONFIG, jax.random.key(1))


def with_parameters(model, **changes):
    """A copy of the model in which `head` or `mixing` (attention's output projection) is zero."""
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    if changes.get("head") == 0:
        copy.head.kernel[...] = jnp.zeros_like(copy.head.kernel[...])
    if changes.get("mixing") == 0:
        projection = copy.groups.blocks[0].mixer.o_proj.kernel
        projection[...] = jnp.zeros_like(projection[...])
    return copy


def measure(model, prepared, **options):
    options = dict(seq_len=T, batch_size=4, compute=FP32, with_segments=False) | options
    return module.perplexity(model, prepared, tokenizer.load("byte"), **options)


@jax.jit
def all_logits(model, tokens):
    return model.logits(model(tokens, compute=FP32)[0])


def nll_in_context(model, tokens, room=T):
    """-log p of tokens[1:], each given all before it in `tokens`, from plain float64 logits."""
    padded = np.zeros((1, room), np.int32)  # behind what counts, so that one program serves all lengths
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(all_logits(model, padded), np.float64)[0, : len(tokens) - 1]
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(log_p)), tokens[1:]]


def test_a_uniform_model_has_the_closed_form(model, prepared):
    found = measure(with_parameters(model, head=0), prepared)
    nats = math.log(VOCAB)
    held_out = prepared.tokens("validation")[:]
    count = (len(held_out) - 1) // T * T
    assert (found["tokens"], found["window"], found["stride"]) == (count, T, T)
    assert found["token_nll"] == pytest.approx(nats, rel=1e-6)
    assert found["token_perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    scored = bytes(b for b in held_out[1 : count + 1].tolist() if b < 256)
    assert found["bytes"] == len(scored)
    assert found["nats_per_byte"] == pytest.approx(nats * count / len(scored), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(math.log2(VOCAB) * count / len(scored), rel=1e-6)
    assert found["byte_perplexity"] == pytest.approx(math.exp(found["nats_per_byte"]), rel=1e-9)
    per_word = nats * count / found["words"]
    assert found["word_perplexity"] == pytest.approx(math.exp(per_word), rel=1e-4)


@pytest.mark.parametrize("count", [1, 3, None])
def test_bytes_and_words_are_those_of_the_scored_text(model, prepared, count):
    found = measure(with_parameters(model, head=0), prepared, windows=count)
    scored = prepared.tokens("validation")[1 : found["tokens"] + 1]
    texts, text = [], bytearray()
    for token in scored.tolist():
        if token < 256:
            text.append(token)
        else:
            texts.append(bytes(text))
            text.clear()
    texts.append(bytes(text))
    assert found["bytes"] == sum(map(len, texts))
    assert found["words"] == sum(len(text.decode(errors="replace").split()) for text in texts)
    # 漢字 has two characters and six bytes, and a document's last word never joins the next one's first
    assert found["bytes"] > sum(len(text.decode(errors="replace")) for text in texts)
    assert found["words"] != len(b"".join(texts).decode(errors="replace").split()) or len(texts) == 1


def test_the_whole_split_has_the_sizes_of_its_manifest(prepared):
    stop = len(prepared.tokens("validation"))
    size = module._text_size(prepared, tokenizer.load("byte"), 0, stop)
    split = prepared.manifest["splits"]["validation"]
    assert size == (split["bytes"], split["words"])


@pytest.mark.parametrize("stride", [1, 7, 12, T - 1, T])
def test_every_target_is_scored_once_whatever_the_stride(model, prepared, stride):
    """Without mixing, a token's loss depends on the token before it alone, so strides must agree exactly."""
    bigram = with_parameters(model, mixing=0)
    found = measure(bigram, prepared, stride=stride, windows=40)
    assert found["tokens"] == T + 39 * stride
    expected = nll_in_context(bigram, prepared.tokens("validation")[: found["tokens"] + 1], room=40 * T)
    assert found["token_nll"] == pytest.approx(expected.mean(), rel=1e-6)


@pytest.mark.parametrize(("stride", "batch_size"), [(T, 3), (8, 4), (5, 1)])
def test_contexts_are_those_of_the_window(model, prepared, stride, batch_size):
    found = measure(model, prepared, stride=stride, windows=10, batch_size=batch_size)
    held_out = prepared.tokens("validation")
    parts = [
        nll_in_context(model, held_out[w * stride : w * stride + T + 1])[0 if w == 0 else T - stride :]
        for w in range(10)
    ]
    assert found["token_nll"] == pytest.approx(np.concatenate(parts).mean(), rel=1e-6)


def test_segments_hide_other_documents(model, prepared):
    found = measure(model, prepared, windows=6, with_segments=True)
    held_out, ends = prepared.tokens("validation")[: 6 * T + 1], prepared.document_ends("validation")
    losses = []
    for w in range(6):
        window = held_out[w * T : (w + 1) * T + 1]
        first = 0
        # A document's EOS predicts the next document's first token from this document alone.
        for stop in [*(int(e) - w * T for e in ends if w * T < e < w * T + T), T]:
            losses.append(nll_in_context(model, window[first : stop + 1]))
            first = stop
    assert found["token_nll"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    assert abs(found["token_nll"] - measure(model, prepared, windows=6)["token_nll"]) > 1e-4


def test_unigram_numbers_and_one_compilation(model, prepared):
    before = module._nll._cache_size()
    found = measure(model, prepared, batch_size=7)
    assert module._nll._cache_size() == before + 1
    scored = found["tokens"]
    unigram = prepared.unigram_nats([range(1, 1 + scored)])  # the same tokens, not the whole split
    assert found["unigram_nats_per_token"] == unigram != prepared.unigram_nats()
    assert found["unigram_nats_per_byte"] == pytest.approx(unigram * scored / found["bytes"], rel=1e-12)
    assert (found["data"], found["windows"], found["of_windows"]) == (prepared.fingerprint, scored // T, scored // T)
    part = measure(model, prepared, windows=3, stride=5)
    assert (part["windows"], part["of_windows"]) == (3, (len(prepared.tokens("validation")) - 1 - T) // 5 + 1)
    assert set(json.loads(json.dumps(found, allow_nan=False))) == set(found)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"stride": 0}, "stride is 0; it must be between 1 and data.seq_len 24"),
        ({"stride": T + 1}, "stride is 25"),
        ({"windows": 0}, "windows is 0; it must be positive"),
        ({"context": 8}, "run.context is 8; this process has 4 devices, name no more"),
        ({"context": 4, "seq_len": 30}, "run.context is 4; it must divide the 30 tokens of a window"),
        ({"seq_len": 100_000}, r"held-out tokens, too few for one window of data.seq_len 100000 \+ 1"),
    ],
)
def test_wrong_arguments(model, prepared, options, sentence):
    with pytest.raises(UserError, match=sentence):
        measure(model, prepared, **options)


def test_text_of_another_vocabulary_is_refused(prepared):
    small = jax.eval_shape(lambda: init_model(replace(CONFIG, vocab=256), jax.random.key(0)))
    with pytest.raises(UserError, match="holds ids of 257 tokens but the model's vocabulary is 256; prepare the text"):
        measure(small, prepared)


def test_a_diverged_model_is_named(model, prepared):
    broken = with_parameters(model)
    first = int(prepared.tokens("validation")[:1][0])
    broken.embed[...] = broken.embed[...].at[first].set(jnp.nan)
    with pytest.raises(UserError, match=r"loss of held-out window 0 is nan.*smaller optim.lr"):
        measure(broken, prepared)


def test_devices_that_share_windows_change_nothing_but_rounding(model, prepared):
    alone, shared = (measure(model, prepared, with_segments=True, stride=7, context=count) for count in (1, 4))
    assert alone.pop("data") == shared.pop("data") and alone["windows"] > 10
    assert alone == pytest.approx(shared, rel=1e-6)
