"""Table 4's cloze tasks: prompts, the cut around the answer, what counts as right, what counts as a loop."""

import functools
import gzip
import json
from pathlib import Path

import pytest
from eval_text import Script, told
from test_tokenizer import model_file  # noqa: F401  a fixture

from gdn_jax import tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate.generation import answers
from gdn_jax.evaluate.recall import ANSWER_LENGTH, TASKS, contains, evaluate, loops, make_prompt, rows_of
from gdn_jax.progress import SILENT

ROWS = Path(__file__).parent / "eval_rows" / "table4"
BYTES = tokenizer.load("byte")
FILLER = "The office keeps its papers in order and answers letters on the day they come."


def first_prompt(task, **changes):
    return make_prompt(task, rows_of(task, ROWS)[0] | changes, BYTES)


def test_prompts_are_cloze_statements():
    """Written out by hand from the rules of the six tasks."""
    assert list(TASKS) == ["swde", "squad", "fda", "triviaqa", "nq", "drop"]
    assert first_prompt("swde") == (
        f"Harbour Lights (film). Director: Ana Brandt. Running time: 104 minutes. {FILLER} Director:"
    )
    assert first_prompt("fda") == (
        "510(k) substantial equivalence. Purpose for submission: new device. Measurand: glucose in whole blood. "
        f"{FILLER} Measurand:"
    )
    assert first_prompt("squad").endswith("It burned down in 1840. The mill was built in")
    assert first_prompt("triviaqa") == (
        "Lake Orvin  Lake Orvin is the deepest lake of the Sarn valley. It freezes in January. "
        "The deepest lake of the Sarn valley is"
    )
    assert first_prompt("nq") == (
        "The third bridge over the Tamsel opened in 1968. Before that people took a ferry. "
        "The third bridge over the Tamsel opened in"
    )
    assert first_prompt("drop").endswith("Milling scored one. The number of goals that Harrow scored is")


def test_a_question_at_the_documents_end_is_not_asked_twice():
    question = "The end is"
    for task, end in [("triviaqa", "THE END IS" * 2), ("drop", "The End is" * 2), ("nq", "The end is")]:
        assert first_prompt(task, context=f"Before 1968. {end}", question=question) == "Before 1968. The end is"
    assert first_prompt("fda", text="A glucose in whole blood.\nMEASURAND:measurand:") == (
        "A glucose in whole blood. Measurand:"
    )
    asked = first_prompt("triviaqa", context="Before 1968. The end is [PAR]", question="The end is")
    assert asked == "Before 1968. The end is. The end is", "JRT looks for it before the space that a mark leaves"
    assert first_prompt("drop", question="") == f"{rows_of('drop', ROWS)[0]['context']} "


def squad(before, after, value="needle", **row):
    return {"text": "b" * before + value + "a" * after, "value": value} | row


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (0, 1000, (0, 94)),  # the answer at the beginning: as much behind it as there is room for
        (20, 1000, (20, 74)),
        (500, 1000, (50, 44)),  # half of the room before the answer
        (500, 20, (50, 20)),  # near the end the room behind it stays free
        (30, 20, (30, 20)),  # all of it
    ],
)
def test_the_cut_is_around_the_answer(before, after, kept):
    prompt = make_prompt("squad", squad(before, after), BYTES, 100 + ANSWER_LENGTH)
    assert prompt == "b" * kept[0] + "needle" + "a" * kept[1]


def test_the_cut_is_around_the_earliest_mention_in_any_case():
    room = 20 + ANSWER_LENGTH
    row = {"text": f"{'x' * 50}Colour{'y' * 50}Red{'z' * 50}", "key": "colour", "value": "red"}
    assert make_prompt("fda", row, BYTES, room) == f"{'x' * 10}Coloury" + "yyy. Colour:"
    row |= {"key": "shade"}  # no mention of the key
    assert make_prompt("fda", row, BYTES, room) == f"{'y' * 10}Red{'z' * 7}. Shade:"
    asked = {"context": f"{'x' * 50}one{'y' * 50}", "question": "Q", "answers": ["two", "one"]}
    alternative = make_prompt("nq", asked | {"alt_answers": ["none", "one"]}, BYTES, room)
    assert alternative == f"{'x' * 10}one{'y' * 7}. Q"
    assert make_prompt("nq", asked, BYTES, room) == f"{'y' * 11}. Q", "the end where the answer is nowhere"
    assert make_prompt("nq", asked | {"tok_pos": 52}, BYTES, room) == f"{'x' * 8}one{'y' * 9}. Q"
    for task in ("drop", "triviaqa"):
        for row in (asked, asked | {"alt_answers": ["one"]}):
            assert make_prompt(task, row, BYTES, room) == f"{'x' * 20}. Q", "the beginning for these tasks, always"
    summed = {
        "text": f"{'x' * 50}red{'y' * 50} Summary of information above...\nhue: red",
        "key": "hue",
        "value": "red",
    }
    assert make_prompt("swde", summed, BYTES, room) == f"{'x' * 10}red{'y' * 7}. Hue:"


@pytest.mark.parametrize("room", range(4, 40))
def test_a_cut_leaves_no_half_character_and_stays_within_the_limit(request, room):
    """SentencePiece spells 漢 in three byte pieces, and puts one more before a text that begins with it."""
    pieces = tokenizer.load(str(request.getfixturevalue("model_file")))
    for filler in ("漢字", "wave of 漢, a "):
        text = filler * 9 + "needle" + filler * 9
        kept = make_prompt("squad", {"text": text, "value": "needle"}, pieces, room + ANSWER_LENGTH)
        assert kept in text and len(kept) > 0 and len(pieces.encode(kept)) <= room
        assert len(pieces.encode(kept)) > room - 10, "no more is lost than a character at each end"


def test_answers_of_one_character_are_left_out():
    assert make_prompt("swde", rows_of("swde", ROWS)[2], BYTES) is None
    assert make_prompt("nq", {"context": "a", "question": "b", "answers": []}, BYTES) is None
    found = evaluate("swde", rows_of("swde", ROWS), BYTES, told(["", ""]))
    assert (found["rows"], found["left_out"]) == (2, 1)
    with pytest.raises(UserError, match="None of the 1 rows of swde has an answer of two characters"):
        evaluate("swde", rows_of("swde", ROWS)[2:], BYTES, told([]))


@pytest.mark.parametrize("task", TASKS)
def test_oracles(task):
    """One that gives the answer has 100, one that never does 0; both stop at the line's end, with any tokenizer."""
    rows = rows_of(task, ROWS)
    label = {make_prompt(task, row, BYTES): row[TASKS[task].labels] for row in rows}

    def told_by(answer):
        script = Script(answer)
        return evaluate(task, rows, BYTES, functools.partial(answers, script, BYTES, progress=SILENT))

    def right(prompt):
        return f" {label[prompt] if isinstance(label[prompt], str) else label[prompt][-1]}.\nMore".upper()

    found = told_by(right)
    assert (found["contains"], found["looping"], found["cut"]) == (100, None, 0)
    assert told_by(lambda prompt: "\n" + right(prompt))["contains"] == 0, "nothing counts behind the line's end"
    found = told_by(lambda prompt: "so and so " * 9)
    assert (found["contains"], found["looping"]) == (0, 100)


def test_looping_is_of_wrong_answers_only():
    rows = rows_of("squad", ROWS) * 2
    found = evaluate("squad", rows, BYTES, told(["1792 1792 1792 1792 1792", "iron", "a b a b a b a b a b a", "x"]))
    assert (found["contains"], found["looping"]) == (25, pytest.approx(100 / 3))


def test_contains():
    assert contains("It is COPPER.", "copper") and contains("a (b) c", ["x", "(b)"])
    assert not contains("cop per", "copper") and not contains("abc", ["a.c"]) and not contains("", [])


@pytest.mark.parametrize(
    "text",
    [
        "the red house, the red house, the red house, the re",  # cut short
        "first this, and then the end. the end. the end. the end.",
        "no no no no no no",
        "................",
        "漢字漢字漢字漢字漢字漢字漢字漢字",
    ],
)
def test_loops(text):
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no no no",  # short
        "the red house, the red house",  # twice
        "the end. the end. the end. the end. And then something else",  # it came out of it
        "It was built in 1792 by two brothers of the town.",
    ],
)
def test_what_does_not_loop(text):
    assert not loops(text)


def test_rows_from_files(tmp_path):
    with gzip.open(tmp_path / "drop.jsonl.gz", "wt") as file:
        file.write((ROWS / "drop.jsonl").read_text())
    assert rows_of("drop", tmp_path) == rows_of("drop", ROWS)
    with pytest.raises(
        UserError, match=r"There is no .*nq.jsonl or .jsonl.gz with the columns context, question, answers"
    ):
        rows_of("nq", tmp_path)
    with pytest.raises(UserError, match=r"load_dataset\('hazyresearch/based_nq_2048', split='validation'\)"):
        rows_of("nq", tmp_path)
    (tmp_path / "nq.jsonl").write_text('{"context": "a", "question": "b"}\n')
    with pytest.raises(UserError, match=r"nq.jsonl, line 1: there is no column 'answers'"):
        rows_of("nq", tmp_path)
    (tmp_path / "nq.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"nq.jsonl is damaged after line 1"):
        rows_of("nq", tmp_path)
    (tmp_path / "nq.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"nq.jsonl holds no rows"):
        rows_of("nq", tmp_path)
    (tmp_path / "fda.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 500)[:20])
    with pytest.raises(UserError, match=r"fda.jsonl.gz is damaged|no column"):
        rows_of("fda", tmp_path)
    with pytest.raises(UserError, match=r"no recall task 'nqq' \(did you mean 'nq'\?\)"):
        rows_of("nqq", tmp_path)
    with pytest.raises(UserError, match="context_length is 51; it must be at least 52"):
        evaluate("drop", rows_of("drop", ROWS), BYTES, told([]), context_length=51)


@pytest.mark.parametrize(
    ("task", "change", "sentence"),
    [
        (
            "squad",
            {"value": None},
            "squad.*(row|line) 1: value is null, but must be a text; mend the row, or leave it out.",
        ),
        ("squad", {"value": 1840}, "value is 1840, but must be a text"),
        ("squad", {"text": "born \ud800 in 1840"}, r"text holds '.ud800', half a character"),
        ("triviaqa", {"answers": {"text": ["seven"]}}, "answers is .*, but must be a list of texts, one at least"),
        ("drop", {"answers": "seven"}, "answers is .*, but must be a list of texts"),
        ("drop", {"answers": ["seven", ""]}, r"answers is \[\"seven\", \"\"\], but must be .* none of them empty"),
        ("nq", {"alt_answers": "seven"}, "alt_answers is .*, but must be a list of texts"),
        ("nq", {"tok_pos": "7"}, 'nq.*(row|line) 1: tok_pos is "7", but must be a number of tokens'),
    ],
)
def test_a_wrong_field_is_refused_and_not_asked(tmp_path, task, change, sentence):
    row = rows_of(task, ROWS)[0] | change
    with pytest.raises(UserError, match=sentence):
        evaluate(task, [row], BYTES, told(["x"]))
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=sentence):
        rows_of(task, tmp_path)


def test_columns_that_a_row_may_lack_may_be_null():
    row = rows_of("nq", ROWS)[0]
    found = [make_prompt("nq", row | more, BYTES, 70) for more in ({}, {"alt_answers": None, "tok_pos": None})]
    assert found[0] == found[1]
    assert evaluate("nq", [row | {"alt_answers": None, "tok_pos": None}], BYTES, told(["x"]))["rows"] == 1
