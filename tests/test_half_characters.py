"""Lone surrogates in what is asked of a run: one sentence that says where, and no answer, with every tokenizer."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from small import experiment
from test_tokenizer import json_file, model_file  # noqa: F401  fixtures

from experiments.run import main
from gdn_jax import checkpoint, tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate.answering import Answering
from gdn_jax.fingerprint import Identity
from gdn_jax.half_characters import half_character
from gdn_jax.model import init_model
from gdn_jax.runs import open_run

HALF = "half a character (a lone surrogate), which no text may hold"
PIQA = {"goal": "To open a jar", "sol1": "turn the lid", "sol2": "turn the glass", "label": 0}
TREC = {"context": "a", "question": "\ud800", "answers": ["x"], "all_classes": ["x"]}
FILES = {
    "piqa.jsonl": [PIQA, PIQA | {"sol2": "x\ud800"}],  # asks for log-likelihoods
    "wikitext.jsonl": [{"page": "a \udc00"}],  # for those of whole texts
    "gsm8k_cot.jsonl": [{"question": "2\ud800?", "answer": "4 #### 4"}],  # for continuations
    "table4/nq.jsonl": [{"context": "a", "question": "b", "answers": ["cd"], "alt_answers": ["\ud800"]}],
    "table5/trec.jsonl": [TREC],
    "figure2/qmsum.jsonl": [{"text": "\ud800"}],
}
AGAIN = "write the file again with: gdn eval RUN --tasks ... --requests FILE."


@pytest.fixture(scope="module")
def home(tmp_path_factory, request):
    """The runs `bytes` and `pieces`, with random parameters, and the files."""
    directory = tmp_path_factory.mktemp("halves")
    with contextlib.chdir(directory):
        small = experiment(Path())
        model = jax.jit(init_model, static_argnums=0)(small.model, jax.random.key(0))
        for name, words in (("bytes", "byte"), ("pieces", str(request.getfixturevalue("model_file")))):
            one = replace(small, data=replace(small.data, tokenizer=words), run=replace(small.run, dir=""))
            checkpoint.write(Path(name), one, model, 24, Identity("a" * 64, tokenizer.load(words).hash8))
        for name, rows in FILES.items():
            path = Path("data") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path("haystack.json").write_text(json.dumps({"text": "so it goes \ud800. "}))
        Path("number.json").write_text(json.dumps({"text": 5}))
        Path("text.txt").write_bytes(b"a\xed\xa0\x80")  # a surrogate, as UTF-8 does not encode it
    return directory


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def says(capsys, *words):
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize("run", ["bytes", "pieces"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--tasks piqa", f"data/piqa.jsonl, line 2: sol2 holds '\\ud800', {HALF}; mend the row, or leave it out."),
        ("--tasks wikitext", f"data/wikitext.jsonl, line 1: page holds '\\udc00', {HALF}; mend"),
        ("--tasks gsm8k_cot", f"data/gsm8k_cot.jsonl, line 1: question holds '\\ud800', {HALF}; mend"),
        ("--tasks piqa --requests out.jsonl", f"data/piqa.jsonl, line 2: sol2 holds '\\ud800', {HALF}; mend"),
        ("--tasks table4/nq", f"data/table4/nq.jsonl, line 1: alt_answers holds '\\ud800', {HALF}; mend"),
        ("--tasks table5/trec", f"data/table5/trec.jsonl, line 1: question holds '\\ud800', {HALF}; mend"),
        ("--tasks figure2", f"data/figure2/qmsum.jsonl, line 1: text holds '\\ud800', {HALF}; mend"),
        ("--tasks table2 --haystack haystack.json", f"The haystack haystack.json holds '\\ud800', {HALF}; repair it."),
        (
            "--tasks table2 --haystack number.json",
            "The haystack number.json is no text in UTF-8, nor .json with a field",
        ),
        ("--text text.txt", "text.txt is no text in UTF-8; convert it first."),
    ],
)
def test_what_is_asked_of_a_run(capsys, run, words, sentence):
    data = [] if "table2" in words or "--text" in words else ["--task_data", "data"]
    assert sentence in says(capsys, "eval", run, *words.split(), *data)
    assert not Path(run, "answers.jsonl").exists()


@pytest.mark.parametrize("run", ["bytes", "pieces"])
def test_requests_and_prompts(capsys, run):
    words = open_run(Path(run)).tokenizer
    for request in (
        {"kind": "loglikelihood", "texts": ["a", "b\ud800"]},
        {"kind": "rolling", "texts": ["a\ud800"]},
        {"kind": "ask", "texts": ["a"], "max_tokens": 3, "stops": ["\ud800"]},
    ):
        rows = [{"max_length": 2048, "tokenizer": words.hash8}, {"kind": "rolling", "texts": ["a"]}, request]
        Path("requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert says(capsys, "eval", run, "--answer", "requests.jsonl") == (
            f"requests.jsonl, line 3 holds '\\ud800', {HALF}; {AGAIN}"
        )
    assert says(capsys, "generate", run, "--prompt", "a\udcff") == (
        "The prompt 'a\\udcff' is not valid UTF-8; pass it in UTF-8."
    )
    assert says(capsys, "generate", run, "--stop", "\udcff") == (
        "The stop string '\\udcff' is not valid UTF-8; pass it in UTF-8."
    )
    answering = Answering(open_run(Path(run)), keep=Path("none.jsonl"))
    for ask in (
        lambda: answering.loglikelihood([("a", "\ud800")]),
        lambda: answering.rolling(["\ud800"]),
        lambda: answering.ask(["\ud800"], max_tokens=1),
    ):
        with pytest.raises(UserError, match=r"The text '.*\\ud800' holds '\\ud800', half a character"):
            ask()


@pytest.mark.parametrize("kind", ["byte", "model_file", "json_file"])
def test_tokenizers(kind, request):
    encoder = tokenizer.load(kind if kind == "byte" else str(request.getfixturevalue(kind)))
    for encode in (lambda: encoder.encode("a\ud800"), lambda: encoder.encode_batch(["b", "a\ud800"])):
        with pytest.raises(
            UserError, match=r"The text 'a\\ud800' holds '\\ud800', half a character .*; pass it in UTF-8"
        ):
            encode()


def test_the_name_of_a_file_need_not_be_text(capsys):
    name = b"\xff.txt".decode("utf-8", "surrogateescape")
    Path(name).write_text("a text")
    assert main(["eval", "bytes", "--text", name]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("\\udcff.txt  6 ")
    Path("bytes", "answers.jsonl").unlink()


def test_half_characters_anywhere_in_a_value():
    assert half_character({"a": [1, None, {"b\udc00": 2}]}) == half_character([["\udc00"]]) == "\udc00"
    assert half_character({"a": ["\U0001f642", 1.0, True]}) is None
    deep = "\ud800"
    for _ in range(100_000):
        deep = [deep]
    assert half_character(deep) == "\ud800"
