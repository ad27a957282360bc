"""Generation: against the whole-sequence forward, alone and in a batch, how tokens are drawn, when it ends."""

import functools
import io
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import scripted_model

from gdn_jax import tokenizer
from gdn_jax.config import AttentionConfig, GatedDeltaNetConfig, Model
from gdn_jax.decode import decode, idle_rows
from gdn_jax.errors import UserError
from gdn_jax.generate import generate, stream
from gdn_jax.layers import Compute
from gdn_jax.model import init_model
from gdn_jax.sampling import Sampling, sample

FP32 = Compute(dtype=jnp.float32, impl="reference")
BYTES = tokenizer.load("byte")
PROMPTS = ["a", "def main(argv=None)", "", "x" * 16]  # 1, 16 + 3 x 1, 1 and 16 tokens: pieces of every kind
PATTERNS = [("gated_deltanet",), ("gated_deltanet", "swa"), ("attention",)]


@functools.cache
def model(*pattern):
    """Random parameters, scaled up so that the likeliest tokens are far apart and change with the context."""
    cfg = Model(
        pattern=pattern,
        repeats=1,
        d_model=32,
        d_ff=48,
        vocab=320,
        tied=False,
        gated_deltanet=GatedDeltaNetConfig(heads=2, key_dim=8, value_dim=12),
        attention=AttentionConfig(heads=2, head_dim=16, window=6),
    )
    lm = jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(0))
    lm.embed[...] = 10 * lm.embed[...]
    return lm


@functools.partial(jax.jit, static_argnums=3)
def logits_at(lm, tokens, last, compute):
    hidden, _ = lm(tokens, compute=compute)
    return lm.logits(hidden[0, last])[:257]


def greedy(lm, prompt, count):
    """Every token from a fresh forward pass over the whole sequence."""
    ids = BYTES.encode(prompt).tolist() or [256]
    start = len(ids)
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (48 - len(ids))])  # later tokens cannot matter
        ids.append(int(np.argmax(logits_at(lm, padded, len(ids) - 1, FP32))))
        if ids[-1] == 256:
            return ids[start:-1]
    return ids[start:]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_equals_the_forward_pass_for_prompts_of_any_length(pattern):
    lm = model(*pattern)
    out = generate(lm, BYTES, PROMPTS, max_tokens=20, compute=FP32)
    expected = [greedy(lm, prompt, 20) for prompt in PROMPTS]
    assert [completion.token_ids for completion in out] == expected
    assert len({tuple(ids[:8]) for ids in expected}) == len(PROMPTS), "the prompts matter"
    assert [completion.text.encode("utf-8", "replace") for completion in out] == [
        bytes(ids).decode("utf-8", "replace").encode() for ids in expected
    ]


@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_a_prompt_alone_in_a_batch_and_in_any_chunks(pattern):
    lm, sampling = model(*pattern), Sampling(temperature=0.9, top_k=50, top_p=0.95)
    together = generate(lm, BYTES, PROMPTS, max_tokens=20, sampling=sampling, seeds=[5, 6, 7, 8], compute=FP32)
    for i in (0, 3):
        alone = generate(lm, BYTES, [PROMPTS[i]], max_tokens=20, sampling=sampling, seeds=[5 + i], compute=FP32)
        assert alone == [replace(together[i], fresh=alone[0].fresh)]
    fresh = ["" for _ in PROMPTS]
    for out in stream(lm, BYTES, PROMPTS, max_tokens=20, sampling=sampling, seeds=[5, 6, 7, 8], compute=FP32, chunk=7):
        fresh = [text + completion.fresh for text, completion in zip(fresh, out, strict=True)]
    assert [completion.token_ids for completion in out] == [completion.token_ids for completion in together]
    assert fresh == [completion.text for completion in together]


def test_seeds_decide_and_repeat():
    lm, sampling = model("gated_deltanet"), Sampling(temperature=1.0)
    run = functools.partial(generate, lm, BYTES, ["ab"] * 3, max_tokens=20, sampling=sampling, compute=FP32)
    first, second = run(seeds=[1, 2, 1]), run(seeds=[1, 2, 1])
    assert first == second and first[0] == first[2] and first[0].token_ids[:10] != first[1].token_ids[:10]
    flat = jax.tree.map(jnp.zeros_like, lm)  # every token is as likely as any other
    (out,) = generate(flat, BYTES, ["ab"], max_tokens=40, sampling=sampling, compute=FP32)
    assert len(set(out.token_ids)) > len(out.token_ids) / 2 > 10, "each token has random numbers of its own"


DRAWN = [
    (Sampling(temperature=1.0), [0.4, 0.3, 0.2, 0.1]),
    (Sampling(temperature=0.5), [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),
    (Sampling(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
    (Sampling(temperature=1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
    (Sampling(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    (Sampling(temperature=1.0, top_k=3, top_p=0.77), [4 / 7, 3 / 7, 0, 0]),  # 7/9 after top_k reaches 0.77
    (Sampling(temperature=1.0, top_p=1e-6), [1, 0, 0, 0]),
    (Sampling(temperature=1.0, top_p=1e-30), [1, 0, 0, 0]),
    (Sampling(temperature=1e-3), [1, 0, 0, 0]),
    (Sampling(), [1, 0, 0, 0]),
]


@pytest.mark.parametrize(("sampling", "expected"), DRAWN, ids=[str(sampling) for sampling, _ in DRAWN])
def test_tokens_are_drawn_as_asked(sampling, expected):
    """20,000 draws; ids are permuted, so that rank and id differ. Five standard errors are 0.018."""
    order = np.array([2, 0, 3, 1])
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))[np.argsort(order)] + 3
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: sample(logits, key, sampling)))(keys))
    frequency = np.bincount(drawn, minlength=4)[order] / keys.size
    np.testing.assert_allclose(frequency, expected, atol=0.018)
    assert not frequency[np.array(expected) == 0].any()


def test_a_prompt_of_no_token_begins_a_document(tmp_path):
    """SentencePiece's defaults take white space at the ends away: " " encodes to nothing."""
    spm, content = pytest.importorskip("sentencepiece"), io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a wave of the sea"] * 20), model_writer=content, model_type="bpe",
        vocab_size=285, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "t.model").write_bytes(content.getvalue())
    words = tokenizer.load(str(tmp_path / "t.model"))
    assert len(words.encode(" ")) == 0
    blank, empty, other = generate(model("gated_deltanet"), words, [" ", "", "wave"], max_tokens=8, compute=FP32)
    assert blank.token_ids == empty.token_ids != other.token_ids


def test_ids_without_text_are_never_drawn():
    lm = model("gated_deltanet")
    kernel = lm.head.kernel[...]
    hot = jax.tree.map(lambda leaf: leaf, lm)
    hot.head.kernel[...] = kernel.at[:, 257:].multiply(1000.0)
    out = generate(hot, BYTES, ["ab"], max_tokens=20, sampling=Sampling(temperature=1.0), compute=FP32)
    assert len(out[0].token_ids) == 20 and max(out[0].token_ids) < 256


def test_how_a_sequence_ends():
    """The model writes b c d e f g h after a, then EOS; sequences of a batch end one by one."""
    lm = scripted_model({97 + i: 98 + i for i in range(7)} | {104: 256})
    run = functools.partial(generate, lm, BYTES, ["a", "f"], compute=FP32)
    ends = [(out.text, out.finish, len(out.token_ids)) for out in run(max_tokens=20)]
    assert ends == [("bcdefgh", "eos", 7), ("gh", "eos", 2)]
    assert [(out.text, out.finish) for out in run(max_tokens=4)] == [("bcde", "length"), ("gh", "eos")]
    stopped = run(max_tokens=20, stops=["efg", "x"])
    assert [(out.text, out.finish, len(out.token_ids)) for out in stopped] == [("bcd", "stop", 6), ("gh", "eos", 2)]
    held = run(max_tokens=5, stops=["fgx"])  # "f" may begin the stop string until the end
    assert [(out.text, out.finish) for out in held] == [("bcdef", "length"), ("gh", "eos")]


def test_one_program_decodes_and_a_recurrent_cache_has_one_size():
    lm = model("gated_deltanet")
    decode.clear_cache()
    *_, out = stream(lm, BYTES, PROMPTS, max_tokens=23, compute=FP32, chunk=5)
    assert decode._cache_size() == 1 and {len(completion.token_ids) for completion in out} <= set(range(24))
    rows = jax.eval_shape(lambda: idle_rows(lm, batch_size=2, room=256, compute=FP32))
    options = dict(compute=FP32, sampling=Sampling(), vocab=257)
    programs = [decode.lower(lm, lm.layers(), rows, steps=steps, **options).compile() for steps in (16, 4096)]
    temporary = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert temporary[1] - temporary[0] <= 2 * (4 + 1) * 2 * (4096 - 16), "only the tokens themselves"
    sizes = {
        room: sum(leaf.size for leaf in jax.tree.leaves(lm.init_cache(1, room, jnp.float32))) for room in (256, 1 << 20)
    }
    assert sizes[256] == sizes[1 << 20] == 2 * 8 * 12 + 3 * (2 * 16 + 24)


def test_wrong_arguments_get_a_sentence():
    lm = model("gated_deltanet")

    def says(*, prompts=("a",), **changes):
        with pytest.raises(UserError) as error:
            generate(lm, BYTES, list(prompts), **({"max_tokens": 3, "compute": FP32} | changes))
        return str(error.value)

    assert "There is no prompt" in says(prompts=())
    with pytest.raises(UserError, match=r"prompts is the text 'She '; pass a list of prompts: \['She '\]"):
        generate(lm, BYTES, "She ", max_tokens=1)
    assert "stops is the text 'ab'" in says(stops="ab")
    assert "The prompt '\\udcff' is not valid UTF-8" in says(prompts=["\udcff"])
    assert "The stop string '\\udcff' is not valid UTF-8" in says(stops=["\udcff"])
    assert "max_tokens is 0; it must be positive" in says(max_tokens=0)
    assert "seed is -1; it must be in [0, 2^31)" in says(seeds=[-1])
    assert "2 seeds for 1 prompts" in says(seeds=[1, 2])
    assert "A stop string is empty" in says(stops=["x", ""])
    for field, value, rule in (
        ("temperature", 1e-4, "at least 0.001"),
        ("temperature", float("nan"), "must be 0"),
        ("top_k", 0, "must be positive"),
        ("top_p", 0.0, "in (0, 1]"),
        ("top_p", 1.5, "in (0, 1]"),
    ):
        with pytest.raises(UserError, match=f"{field} is {value}.*{rule}".replace("(", r"\(").replace("]", r"\]")):
            Sampling(**{field: value})
    small = jax.eval_shape(lambda: init_model(replace(lm.config, vocab=100), jax.random.key(0)))
    with pytest.raises(UserError, match="has 257 tokens but the model's vocabulary is 100"):
        generate(small, BYTES, ["a"], max_tokens=1)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, lm)
    with pytest.raises(UserError, match="logits are not finite"):
        generate(broken, BYTES, ["a"], max_tokens=1, compute=FP32)
