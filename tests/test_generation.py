"""Answers of an evaluation: cuts, what is kept, an evaluation that goes on, a real model behind it."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from eval_text import Script
from small import experiment, scripted_model
from test_tokenizer import model_file  # noqa: F401  a fixture

from gdn_jax import tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate.generation import Answer, Greedy, answers, cut
from gdn_jax.evaluate.kept import Kept
from gdn_jax.fingerprint import Identity
from gdn_jax.generate import generate
from gdn_jax.layers import Compute, compute_for
from gdn_jax.progress import SILENT
from gdn_jax.runs import OpenRun

BYTES = tokenizer.load("byte")
FP32 = Compute(dtype=jnp.float32, impl="reference")
PROMPTS = ["one", "three", "two", "one", "a longer prompt", ""]

ask = functools.partial(answers, tokenizer=BYTES, prompts=PROMPTS, max_tokens=4, progress=SILENT)


class Broken(Exception):
    """What ends an evaluation halfway."""


def test_answers_come_in_order_and_equal_prompts_are_asked_once():
    script = Script(lambda prompt: prompt[::-1])
    found = ask(script, batch_size=2)
    assert [answer.text for answer in found] == [prompt[::-1] for prompt in PROMPTS]
    assert [answer.tokens for answer in found] == [len(prompt) for prompt in PROMPTS]
    assert sorted(script.asked) == sorted(set(PROMPTS)), "the longest first, each once"
    assert script.asked[0] == "a longer prompt"


def test_an_evaluation_that_is_killed_goes_on_with_the_uninterrupted_answers(tmp_path):
    keep = tmp_path / "run" / "answers.jsonl"
    whole = ask(Script(str.upper), batch_size=2)
    asked = []

    def breaks(prompt):
        asked.append(prompt)
        if len(asked) == 4:
            raise Broken
        return prompt.upper()

    with pytest.raises(Broken):
        ask(Script(breaks), batch_size=2, keep=Kept(keep))
    first = keep.read_text()
    assert len(first.splitlines()) == 2
    keep.write_text(first + '{"key": "cut sho')  # as a crash in the middle of a line leaves it
    again = Script(str.upper)
    assert ask(again, batch_size=2, keep=Kept(keep)) == whole and len(again.asked) == 3
    assert keep.read_text().startswith(first) and all(map(json.loads, keep.read_text().splitlines()))
    silent = Script(lambda prompt: 1 / 0)
    assert ask(silent, batch_size=2, keep=Kept(keep)) == whole and silent.asked == []


def test_a_batch_that_is_kept_in_part_is_made_as_a_whole_and_kept_once(tmp_path):
    keep = tmp_path / "answers.jsonl"
    whole = ask(Script(str.upper), batch_size=3, keep=Kept(keep))
    lines = keep.read_text().splitlines(keepends=True)
    keep.write_text("".join(lines[:1]))
    script = Script(str.upper)
    assert ask(script, batch_size=3, keep=Kept(keep)) == whole
    assert len(script.asked) == 5 and keep.read_text() == "".join(lines)


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 5}, {"stops": ["\n"]}],
    ids=str,
)
def test_other_options_and_other_models_are_other_requests(tmp_path, change):
    keep = tmp_path / "answers.jsonl"
    ask(Script(str.upper), keep=Kept(keep))
    other, model = Script(str.upper), Script(str.lower, identity="another")
    ask(other, keep=Kept(keep), **change)
    ask(model, keep=Kept(keep))
    assert len(other.asked) == len(model.asked) == 5


def test_what_is_read_decides_an_answer_and_not_what_it_was_cut_from(tmp_path):
    keep = Kept(tmp_path / "answers.jsonl")
    ask(Script(str.upper), keep=keep)
    same = Script(str.upper)
    ask(same, keep=keep, max_length=50)
    assert same.asked == [] and len(keep) == 5
    found = ask(Script(str.upper), keep=keep, max_length=10)
    assert found[4] == Answer("PROMPT", 6, 15) and len(keep) == 6


def test_cuts():
    text = "0123456789"
    assert cut(BYTES, text, None, "left") == Answer(text, 10, 10)
    assert cut(BYTES, text, 10, "middle") == Answer(text, 10, 10)
    assert cut(BYTES, text, 4, "left") == Answer("6789", 4, 10)
    assert cut(BYTES, text, 4, "middle") == Answer("0189", 4, 10)
    assert cut(BYTES, text, 5, "middle") == Answer("01789", 5, 10)
    assert cut(BYTES, text, 1, "middle") == Answer("9", 1, 10)
    assert cut(BYTES, "aé漢b", 3, "left") == Answer("b", 1, 7), "no half characters"
    found = ask(Script(lambda prompt: prompt), max_length=7, truncation="left")
    assert [answer.text for answer in found] == ["one", "ree", "two", "one", "mpt", ""]


def test_a_cut_splits_no_character_of_several_pieces(request):
    pieces = tokenizer.load(str(request.getfixturevalue("model_file")))
    for room in range(4, 30):
        for truncation in ("left", "middle"):
            found = cut(pieces, "漢字" * 9, room, truncation)
            assert "\ufffd" not in found.text and found.tokens <= room


class Swelling(tokenizer.ByteTokenizer):
    """Text that does not begin with the first byte it was cut from costs one token more, as dummy prefixes do."""

    def encode(self, text):
        ids = super().encode(text)
        return ids if text.startswith("0") else super().encode("_" + text)


def test_a_cut_fits_after_it_is_encoded_again():
    found = cut(Swelling(), "0123456789", 4, "left")
    assert found == Answer("789", 4, 10)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_length": 4}, "max_length is 4; it must be more than the 4 tokens of an answer"),
        ({"truncation": "right"}, "truncation is 'right'; it must be 'left' or 'middle'"),
        ({"batch_size": 0}, "batch_size is 0; it must be positive"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(UserError, match=sentence):
        ask(Script(str.upper), **options)


def test_who_made_an_answer_is_kept_with_it(tmp_path):
    """Also of a file that was begun before makers were named, and of one that two machines wrote."""
    path, old, one, other = tmp_path / "answers.jsonl", {"key": "a", "answer": 1}, {"source": "1"}, {"source": "2"}
    path.write_text(json.dumps(old) + "\n")
    for here, keys in ((one, "bc"), (other, "d"), (one, "e"), (one, "f")):
        Kept(path, here).add(dict.fromkeys(keys, 2))
    assert [json.loads(line).get("made_by", "-") for line in path.read_text().splitlines()] == [
        "-", one, "-", "-", other, "-", one, "-", "-",
    ]  # fmt: skip
    keep = Kept(path, other)
    assert len(keep) == 6 and keep.makers() == []
    for keys, makers in (("a", [None]), ("bec", [one]), ("dba", [other, one, None]), ("", [])):
        assert [keep[key] for key in keys] == [1 if key == "a" else 2 for key in keys] and keep.makers() == makers
    keep.add({"g": 3})
    assert keep["g"] == 3 and keep.makers() == [other]


def test_a_damaged_file_is_named(tmp_path):
    keep = tmp_path / "answers.jsonl"
    for line in ('{"key": 1}\n', "[" * 100_000 + "\n"):
        keep.write_text(line)
        with pytest.raises(UserError, match=r"answers.jsonl, line 1: holds no answer"):
            ask(Script(str.upper), keep=Kept(keep))


def test_a_model_continues_and_is_known_by_its_parameters(tmp_path):
    model = scripted_model({ord("a"): ord("b"), ord("b"): ord("c"), ord("c"): ord("a")})
    keep = tmp_path / "answers.jsonl"
    options = dict(tokenizer=BYTES, prompts=["xa", "b"], max_tokens=5, compute=FP32, progress=SILENT, keep=Kept(keep))
    found = answers(model, **options)
    assert [answer.text for answer in found] == ["bcabc", "cabca"]
    assert found == [
        Answer(completion.text, len(completion.prompt), len(completion.prompt))
        for completion in generate(model, BYTES, ["xa", "b"], max_tokens=5, compute=FP32)
    ]
    size = keep.stat().st_size
    assert answers(model, **options) == found and keep.stat().st_size == size
    other = jax.tree.map(lambda x: x * 2, model)
    assert Greedy(other, BYTES, FP32).identity != Greedy(model, BYTES, FP32).identity
    assert answers(other, **options) == found and keep.stat().st_size == 2 * size
    assert answers(model, **(options | {"stops": ["ca"]}))[0].text == "b"


def test_a_run_continues_with_its_own_arithmetic(tmp_path):
    model, group = scripted_model({ord("a"): ord("b"), ord("b"): ord("a")}), experiment(tmp_path)
    run = OpenRun(tmp_path, group, model, 3, Identity(None, BYTES.hash8), BYTES)
    keep = tmp_path / "answers.jsonl"
    options = dict(prompts=["a"], max_tokens=3, progress=SILENT, keep=Kept(keep))
    (answer,) = answers(run, run.tokenizer, **options)
    assert answer.text == "bab"
    answers(model, BYTES, compute=compute_for(group), **options)
    assert len(keep.read_text().splitlines()) == 1, "the same request"
    answers(run, BYTES, compute=FP32, **options)
    assert len(keep.read_text().splitlines()) == 2
