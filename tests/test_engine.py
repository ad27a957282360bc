"""The engine: rows that take the next prompt, buckets and their programs, parameters cast once."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import scripted_model

from experiments.variants import PAPER_MODELS, model_config
from gdn_jax import prefill, tokenizer
from gdn_jax.generate import generate, stream
from gdn_jax.layers import Compute
from gdn_jax.model import for_inference, init_model
from gdn_jax.prefill import begin, bucket, cache_room, go_on, groups, rows_at_once
from gdn_jax.sampling import Sampling
from gdn_jax.tree import named_leaves

FP32 = Compute(dtype=jnp.float32, impl="chunked", chunk=16)
BYTES = tokenizer.load("byte")
# two buckets, one last character: tokens that differ are due to what came before
PROMPTS = ["She.", "def main(argv=None): return 1.", "x" * 15 + ".", "a prompt of thirty characters.", "."]
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.9, top_p=0.95)
OFTEN = ("gated-deltanet", "transformer", "gated-deltanet-h2")  # drawn tokens of the others: slow


@functools.cache
def tiny(name):
    """Random parameters and a head of its own: a tied one would repeat the last token whatever came before."""
    cfg = replace(model_config(name, "tiny"), tied=False)
    return jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(0))


CASES = [
    pytest.param(
        name,
        sampling,
        marks=() if name in OFTEN or (sampling == GREEDY and name != "gated-deltanet-h2") else pytest.mark.slow,
    )
    for sampling in (GREEDY, DRAWN)
    for name in PAPER_MODELS
]


@pytest.mark.parametrize(("name", "sampling"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_prompt_has_the_same_tokens_alone_and_in_a_batch_of_any_size(name, sampling):
    """Five prompts in three rows, so that rows are taken over, and two of the prompts on their own."""
    lm = tiny(name)
    run = functools.partial(generate, lm, BYTES, max_tokens=12, sampling=sampling, compute=FP32)
    together = run(PROMPTS, seeds=[5, 6, 7, 8, 9], batch_size=3)
    assert sum(len(completion.token_ids) == 12 for completion in together) >= 3, "few end early"
    assert len({tuple(completion.token_ids[:8]) for completion in together}) == 5, "the prompts matter"
    for which in (1, 4):
        (alone,) = run([PROMPTS[which]], seeds=[5 + which])
        assert alone.token_ids == together[which].token_ids and alone.text == together[which].text


def test_a_free_row_takes_the_next_prompt_while_another_goes_on():
    """The model writes b c d e f g h after a, then EOS."""
    lm = scripted_model({97 + i: 98 + i for i in range(7)} | {104: 256})
    prompts = ["a", "g", "f", "zf", "e"]
    seen, kept = [], []
    for out in stream(lm, BYTES, prompts, max_tokens=9, compute=FP32, batch_size=2, chunk=1, stops=["fgx"]):
        seen.append([completion.finish for completion in out])
        kept.append([completion.fresh for completion in out])
    assert [completion.text for completion in out] == ["bcdefgh", "h", "gh", "gh", "fgh"]
    assert seen[-1] == ["eos"] * 5 and None in seen[-2]
    assert any(ends[2] and not ends[0] for ends in seen), "the third does not wait for the first"
    assert ["".join(parts) for parts in zip(*kept, strict=True)] == [completion.text for completion in out]


def test_prompts_are_grouped_by_bucket_the_longest_first():
    assert [bucket(length) for length in (1, 16, 17, 32, 33, 1000, 1024, 1025, 5000)] == [
        16, 16, 32, 32, 64, 1024, 1024, 1024, 1024
    ]  # fmt: skip
    lengths = [5, 100, 7, 3000, 16, 1500, 900, 128, 1, 2000]
    assert groups(lengths, 4) == [[3, 5, 9, 6], [0, 2, 4, 8], [1, 7]]
    assert groups([5] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert rows_at_once(1024, 64) == 16 and rows_at_once(256, 64) == 64 and rows_at_once(16, 3) == 3
    assert cache_room(model_config("transformer", "tiny"), 300) == 512
    assert cache_room(model_config("samba", "tiny"), 300) == 64, "its window"
    assert cache_room(model_config("mamba", "tiny"), 300) == cache_room(model_config("mamba", "tiny"), 9**9)


@pytest.mark.parametrize("name", ["gated-deltanet-h1", "transformer"])
def test_one_program_for_each_bucket_and_one_that_goes_on(name, monkeypatch):
    """Pieces of 32 in the place of 1,024: prompts of every length up to 100 give the tokens of one piece each."""
    lm = tiny(name)
    letters = [np.random.default_rng(n).integers(98, 123, n - 1) for n in (1, 9, 16, 17, 31, 32, 33, 100)]
    prompts = [bytes(ids.tolist()).decode() + "a" for ids in letters]
    run = functools.partial(generate, lm, BYTES, max_tokens=6, compute=FP32, batch_size=4)
    expected = [completion.token_ids for completion in run(prompts)]
    assert len(set(map(tuple, expected))) == 8, "the prompts matter"
    monkeypatch.setattr(prefill, "WIDEST", 32)
    begin.clear_cache(), go_on.clear_cache()
    assert [completion.token_ids for completion in run(prompts)] == expected
    assert (begin._cache_size(), go_on._cache_size()) == (2, 1)
    run(["z" * n for n in (3, 20, 40, 70)])
    assert (begin._cache_size(), go_on._cache_size()) == (2, 1), "no program for a new length"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in (*OFTEN, "mamba2") else pytest.mark.slow) for name in PAPER_MODELS]
)
def test_parameters_cast_once_give_the_same_bits(name):
    """Logits and cache of a bf16 model behind a piece and behind one token more."""
    compute = Compute(impl="reference")

    @jax.jit
    def run(lm):
        tokens = jnp.arange(14).reshape(2, 7)
        first, cache = lm(tokens, compute=compute, room=16)
        then, cache = lm(tokens[:, :1], compute=compute, cache=cache)
        return lm.logits(first), lm.logits(then), cache

    lm = tiny(name)
    if name == "gated-deltanet":
        lm = jax.jit(init_model, static_argnums=0)(model_config(name, "tiny"), jax.random.key(0))  # tied
    cast = for_inference(lm, jnp.bfloat16)
    before, after = named_leaves(lm), named_leaves(cast)
    changed = {leaf for leaf in after if after[leaf].dtype == jnp.bfloat16}
    assert changed == {leaf for leaf in before if leaf == "embed" or leaf.endswith("kernel")}
    assert all(after[leaf] is before[leaf] for leaf in after if leaf not in changed)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (cast, for_inference(cast, jnp.bfloat16))), strict=True))
    for a, b in zip(jax.tree.leaves(run(lm)), jax.tree.leaves(run(cast)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
