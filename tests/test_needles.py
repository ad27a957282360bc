"""S-NIAH: lm-eval's own samples, lengths under any tokenizer, an oracle that scores 100 and one that scores 0."""

import configparser
import functools
import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from eval_text import KEYS, Script, count_tokens, haystack_words

from gdn_jax import tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate import needles
from gdn_jax.evaluate.generation import answers
from gdn_jax.evaluate.needles import (
    ANSWER_TOKENS,
    DEPTHS,
    NOISE,
    TASKS,
    Haystack,
    essays,
    evaluate,
    make_samples,
    matches,
    novels,
    plain_sentences,
    punkt,
    word_pairs,
)
from gdn_jax.progress import SILENT

THEIRS = json.loads((Path(__file__).parent / "from_lm_eval" / "needles.json").read_text())
BYTES = tokenizer.load("byte")
LISTED = (6171620, "425c410acbdb7b3d")  # pairs of wonderwords' words, a hash of every 1000th
HAY = Haystack("drawn", tuple(haystack_words()), plain_sentences)


def count_bytes(text):
    return len(text.encode())


def make(task, max_length, count=count_tokens, **options):
    return make_samples(task, count, max_length, **({"haystack": HAY, "samples": 8, "keys": KEYS} | options))


@pytest.mark.parametrize("task", TASKS)
def test_the_samples_are_those_of_lm_eval(task):
    """Committed from lm-eval 0.4.13; its lengths follow one another in one stream of random numbers."""
    rng = random.Random(7)
    ours = [sample for length in (1024, 2048, 4096) for sample in make(task, length, seed=rng)]
    theirs = [row for row in THEIRS if row["task"] == task]
    assert len(ours) == len(theirs) == 24
    for sample, row in zip(ours, theirs, strict=True):
        found = {name: getattr(sample, name) for name in row if name != "sha256"}
        assert found | {"sha256": hashlib.sha256(sample.prompt.encode()).hexdigest()} == row


@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("task", TASKS)
def test_every_sample_fits_and_holds_its_needle_once(task, length):
    for count in (count_tokens, count_bytes):
        samples = make(task, length, count)
        for sample in samples:
            assert sample.length == count(sample.prompt) + ANSWER_TOKENS <= length
            assert sample.tokens == count(sample.text)
            assert sample.prompt.count(sample.value) == 1
            assert sample.text.endswith(f"{sample.key} mentioned in the provided text is")
            assert re.fullmatch(r"\d{7}" if task != "niah_single_3" else r"[0-9a-f-]{36}", sample.value)
            assert sample.units % sample.step == 0 and 0 <= sample.depth <= 100
        assert max(sample.length for sample in samples) > length / 2, "the length is used"
        assert [sample.index for sample in samples] == list(range(8))
        assert make(task, length, count) == samples != make(task, length, count, seed=1)


def test_bytes_take_smaller_steps_of_words_and_say_so():
    steps = {length: {sample.step for sample in make("niah_single_2", length, count_bytes)} for length in (1024, 2048)}
    assert steps == {1024: {62}, 2048: {250}}
    assert {sample.step for sample in make("niah_single_2", 2048)} == {500}


def test_where_the_needle_lies():
    samples = make("niah_single_2", 2048, samples=60)
    for sample in samples:
        context = sample.prompt.split("\n")[1]
        words = context[: context.index("One of the special magic")].split()
        assert sample.depth in DEPTHS
        assert abs(len(words) / sample.units - sample.depth / 100) < 0.05
    assert min(s.depth for s in samples) < 15 < 85 < max(s.depth for s in samples)
    lines = make("niah_single_1", 1024)[0].prompt.split("\n")
    assert len(lines) == 3 + make("niah_single_1", 1024)[0].units and lines.count(NOISE) == len(lines) - 3


def test_the_default_haystack_is_marked_as_a_stand_in():
    (sample,) = make("niah_single_2", 1024, haystack=None, samples=1)
    assert (sample.haystack, sample.stand_in) == ("english-novels", True)
    assert not make("niah_single_1", 1024, haystack=None)[0].stand_in, "noise is the task's own"
    assert not make("niah_single_2", 1024)[0].stand_in
    assert len(novels().words) > 500_000


def test_a_file_is_a_stand_in_unless_it_begins_as_rulers_does(tmp_path, monkeypatch):
    """Known by its words, wherever it lies and however its lines end."""
    words = haystack_words(needles.ESSAY_WORDS)[: needles.ESSAY_WORDS]
    one, two = tmp_path / "one.txt", tmp_path / "two.json"
    one.write_text("\n".join(words))
    two.write_text(json.dumps({"text": " ".join(words)}))
    assert essays(one).stand_in and essays(two).stand_in
    assert essays(one).sha256 == essays(two).sha256 and (essays(one).name, essays(two).name) == ("one.txt", "two.json")
    monkeypatch.setattr(needles, "ESSAYS", essays(one).sha256)
    two.write_text(json.dumps({"text": " ".join([*words, "More."])}))
    assert not essays(one).stand_in and not essays(two).stand_in and essays(one).sha256 != essays(two).sha256
    two.write_text(" ".join(["Other", *words[1:]]))
    two = two.rename(tmp_path / "two.txt")
    assert essays(two).stand_in


def test_the_word_list_is_the_one_of_the_extras():
    """It decides every key and, through the draws, where every needle lies."""
    pytest.importorskip("wonderwords")
    extras = configparser.ConfigParser()
    extras.read(Path(__file__).parent.parent / "setup.cfg")
    for name in ("eval", "dev"):
        pinned = f"wonderwords=={needles.words_version()}"
        assert pinned in extras["options.extras_require"][name].split(), f"{name} pins the version that is tested"
    pairs = word_pairs()
    assert len(pairs) == LISTED[0] and hashlib.sha256(" ".join(pairs[::1000]).encode()).hexdigest()[:16] == LISTED[1]


def test_essays_from_a_file(tmp_path):
    plain, ruler = tmp_path / "essays.txt", tmp_path / "essays.json"
    plain.write_text("One  two.\nThree\tfour.")
    ruler.write_text(json.dumps({"text": plain.read_text()}))
    assert essays(plain).words == essays(ruler).words == ("One", "two.", "Three", "four.")
    ruler.write_text("[1]")
    with pytest.raises(UserError, match="no text in UTF-8, nor .json with a field 'text'"):
        essays(ruler)
    with pytest.raises(UserError, match="cannot be read"):
        essays(tmp_path / "absent.txt")


@pytest.mark.parametrize("task", TASKS)
def test_oracles(task):
    """One that reads the value out of its prompt has 100, one that never does 0, one that does for some in between."""
    samples = make(task, 2048)
    values = {sample.text: sample.value for sample in samples}

    def told(answer, **options):
        return evaluate(samples, functools.partial(answers, Script(answer), BYTES, progress=SILENT, **options))

    found = told(lambda prompt: f" {values[prompt].upper()}. And so on")
    assert (found["accuracy"], found["samples"], found["max_length"], found["cut"]) == (100, 8, 2048, 0)
    assert told(lambda prompt: values[prompt][:-1])["accuracy"] == 0
    half = {sample.text for sample in samples[:2]}
    assert told(lambda prompt: values[prompt] if prompt in half else "")["accuracy"] == 25
    assert told(lambda prompt: "", max_length=1000)["cut"] == 8, "a model that reads less than a sample is recorded"


def test_matches():
    assert matches("it is 1234567.", "1234567") and matches("AB-CD", "ab-cd")
    assert not matches("it is 123456 7", "1234567") and not matches("", "1234567")


@pytest.mark.parametrize(
    ("task", "length", "options", "sentence"),
    [
        ("niah_single_9", 1024, {}, r"no needle task 'niah_single_9' \(did you mean 'niah_single_"),
        ("niah_single_1", 128, {}, "A length of 128 tokens is too small for a prompt of niah_single_1"),
        ("niah_single_2", 140, {}, "A length of 140 tokens is too small"),
        ("niah_single_2", 8192, {}, "The haystack drawn has 1,000 words, too few for 8192 tokens; give a longer text"),
        ("niah_single_2", 2048, {"samples": 0}, "samples is 0; it must be positive"),
        ("niah_single_1", 2048, {"count": lambda text: 1}, "the tokenizer counts too few"),
    ],
)
def test_wrong_arguments(task, length, options, sentence):
    short = Haystack("drawn", tuple(haystack_words(1000)[:1000]), plain_sentences)
    with pytest.raises(UserError, match=sentence):
        make(task, length, **({"haystack": short} | options))


def test_the_generator_equals_lm_evals_where_it_is_installed():
    """With its own word list, its own splitter and real prose."""
    prose = Haystack("prose", novels().words, punkt)
    try:
        prose.first(10)
    except UserError:  # without Punkt's data, importing theirs would fetch it
        pytest.skip("NLTK's punkt_tab is not here")
    pytest.importorskip("wonderwords")
    theirs = pytest.importorskip("lm_eval.tasks.ruler.prepare_niah")
    from from_lm_eval.make import template

    assert list(word_pairs()) == theirs.WORDS and [int(depth) for depth in theirs.DEPTHS] == DEPTHS
    random.seed(11)
    rng = random.Random(11)
    for length in (1024, 4096):
        rows = theirs.generate_samples(
            list(prose.words), max_seq_length=length, template=template(), type_haystack="essay",
            type_needle_k="words", type_needle_v="uuids", num_samples=5,
            TOKENIZER=lambda text: type("", (), {"input_ids": range(count_tokens(text))}),
        )  # fmt: skip
        ours = make_samples("niah_single_3", count_tokens, length, haystack=prose, samples=5, seed=rng)
        assert [(s.prompt, [s.value], s.length) for s in ours] == [
            (r["input"], r["outputs"], r["length"]) for r in rows
        ]
