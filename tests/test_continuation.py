"""Tokens to text: whole characters, stop strings across tokens, the same whatever arrives together."""

import pytest
from test_tokenizer import json_file, model_file  # noqa: F401  fixtures

from gdn_jax import tokenizer
from gdn_jax.continuation import Continuation

TEXT = "Größe 漢字 🙂 a wave of the sea: λ=2π/k\n  end"


def parts(encoder, prompt, ids, stops=()):
    text = Continuation(encoder, encoder.encode(prompt), stops)
    given = [text.add(index) for index in ids]
    return [*given, text.finish()], text


@pytest.mark.parametrize("kind", ["byte", "model_file", "json_file"])
def test_streamed_characters_are_whole_and_join_to_the_text(kind, request):
    encoder = tokenizer.load(kind if kind == "byte" else str(request.getfixturevalue(kind)))
    prompt = "the length"
    ids = encoder.encode(f"{prompt} {TEXT}").tolist()
    start = len(encoder.encode(prompt))
    assert encoder.decode_bytes(ids[:start]) == prompt.encode(), "the prompt's tokens are a prefix here"
    given, _ = parts(encoder, prompt, ids[start:])
    assert "".join(given) == f" {TEXT}" and "\ufffd" not in "".join(given)
    assert sum(map(bool, given)) > 25, "it comes as it grows"
    if kind == "byte":
        assert [piece for piece in given if piece][:8] == [" ", "G", "r", "ö", "ß", "e", " ", "漢"]
        assert given[3] == "" and given[4] == "ö", "the first byte of two waits for the second"


@pytest.mark.parametrize("kind", ["byte", "model_file", "json_file"])
def test_a_character_that_is_never_completed(kind, request):
    encoder = tokenizer.load(kind if kind == "byte" else str(request.getfixturevalue(kind)))
    ids = encoder.encode("a漢").tolist()[:-1]  # the last byte is missing in all three
    given, _ = parts(encoder, "the", [*ids, *encoder.encode("sea").tolist()])
    assert "".join(given).replace("\ufffd", "").replace(" ", "") == "asea" and "\ufffd" in "".join(given)
    given, _ = parts(encoder, "the", ids)
    assert "".join(given[:-1]).strip() == "a" and set(given[-1]) == {"\ufffd"}


STOPS = [
    (("END",), "one END two", "one "),
    (("\n\n",), "a\nb\n\nc", "a\nb"),
    (("字",), "漢字", "漢"),
    (("abc", "b"), "xabcx", "xa"),  # b is complete first
    (("bc", "abc"), "xabcx", "x"),  # complete together: the longest
    (("aab",), "aaab", "a"),
    (("never",), "nevr neve", "nevr neve"),
    (("the",), "other", "o"),
]


@pytest.mark.parametrize(("stops", "generated", "kept"), STOPS)
def test_stop_strings(stops, generated, kept):
    encoder = tokenizer.load("byte")
    given, text = parts(encoder, "the th", encoder.encode(generated), stops)
    assert "".join(given) == kept and text.stopped == (kept != generated)
    first = [piece for piece in given if piece]
    assert all(kept.startswith("".join(first[:n])) for n in range(len(first))), "nothing shown is taken back"


@pytest.mark.parametrize("kind", ["model_file", "json_file"])
def test_a_stop_string_inside_longer_tokens(kind, request):
    encoder = tokenizer.load(str(request.getfixturevalue(kind)))
    ids = encoder.encode("the wave has a length").tolist()
    assert len(ids) < 12, "tokens are words or parts of them"
    given, text = parts(encoder, "a", ids, ["e has a l"])
    assert "".join(given).strip() == "the wav" and text.stopped
