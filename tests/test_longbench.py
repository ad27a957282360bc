"""Table 5's tasks: lm-eval's own scores and prompts, first lines, cuts, rows from files."""

import functools
import json
from pathlib import Path

import pytest
from eval_text import Script, metric_cases, told

from gdn_jax import tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate.generation import answers
from gdn_jax.evaluate.longbench import (
    TASKS,
    classification,
    code_similarity,
    evaluate,
    first_line,
    make_prompt,
    qa_f1,
    rouge_l,
    rows_of,
    score,
)
from gdn_jax.progress import SILENT

THEIRS = Path(__file__).parent / "from_lm_eval"
ROWS = Path(__file__).parent / "eval_rows" / "table5"
BYTES = tokenizer.load("byte")
METRICS = {"hotpotqa": qa_f1, "qmsum": rouge_l, "trec": classification, "lcc": code_similarity}


def test_scores_are_those_of_lm_eval():
    """On edge cases and 200 drawn pairs; committed from lm-eval 0.4.13, rouge 1.0.1 and fuzzywuzzy 0.18.0."""
    rows = json.loads((THEIRS / "longbench.json").read_text())
    cases = metric_cases()
    assert len(rows) == len(cases) > 250
    for (prediction, truth, classes), expected in zip(cases, rows, strict=True):
        row = {"answers": [truth], "all_classes": classes}
        found = [score(task, prediction, row) for task in METRICS]
        assert found == pytest.approx(expected, abs=1e-12), (prediction, truth)
    for column in zip(*rows, strict=True):
        assert len(set(column)) > 3 and max(column) > 0.9, "the cases tell scores apart"


def test_prompts_are_those_of_lm_eval_but_for_a_line_feed():
    rows = json.loads((THEIRS / "longbench_prompts.json").read_text())
    assert [row[0] for row in rows] == list(TASKS) and len(TASKS) == 14
    for name, template, max_tokens in rows:
        if name in ("triviaqa", "samsum"):
            template = template.replace("{context}\n{question}", "{context}\n\n{question}")
        elif name in ("lcc", "repobench-p"):
            template += "\n"
        assert (TASKS[name].template, TASKS[name].max_tokens) == (template, max_tokens)


def test_the_columns_are_the_papers():
    columns = [task.column for task in TASKS.values()]
    assert columns == "NQA QQA MFQ HQA 2WM Mus GvR QMS MNs TRC TQA SSM LCC RBP".split()  # noqa: SIM905
    assert [METRICS[name] for name in METRICS] == [TASKS[name].metric for name in METRICS]


def test_rouge_by_hand():
    """Two of three words of each in common; sentences are apart, words count once."""
    assert rouge_l("a b x", "a b y") == pytest.approx(2 / 3, abs=1e-7)
    assert rouge_l("b a", "a b") == pytest.approx(1 / 2, abs=1e-7), "an order"
    assert rouge_l("b. a", "a b") == pytest.approx(1, abs=1e-7), "the union over sentences"
    assert rouge_l("word " * 3000, "word " * 3000) == pytest.approx(1, abs=1e-7), "no recursion"


def test_first_lines():
    assert first_line("\n\n Date\nQuestion: what") == " Date"
    assert first_line("Date") == "Date" and first_line("\n") == ""


def test_raw_and_first_line_are_both_kept_and_the_tasks_own_is_the_score():
    row = rows_of("triviaqa", ROWS)[0]
    found = evaluate("triviaqa", [row], told(["\nLake Orvin\nPassage: and so on"]), max_length=4096)
    assert found["first_line"] == found["score"] == 100 > found["raw"] > 0
    row = rows_of("hotpotqa", ROWS)[0]
    found = evaluate("hotpotqa", [row], told(["Sarn valley\nPassage: and so on"]), max_length=4096)
    assert found["first_line"] == 100 > found["raw"] == found["score"]


def test_the_best_of_several_answers_counts():
    row = rows_of("triviaqa", ROWS)[0]
    assert score("triviaqa", "the Orvin!", row) == 1 and score("triviaqa", "Sarn", row) == 0
    assert score("triviaqa", "x", row | {"answers": []}) == 0


@pytest.mark.parametrize("task", TASKS)
def test_oracles(task):
    rows = rows_of(task, ROWS)
    truth = {make_prompt(task, row): row["answers"][0] for row in rows}
    options = dict(max_length=4096)

    def told_by(answer):
        return evaluate(task, rows, functools.partial(answers, Script(answer), BYTES, progress=SILENT), **options)

    found = told_by(truth.__getitem__)
    assert found["score"] == pytest.approx(100, abs=1e-5)
    assert (found["rows"], found["max_length"], found["truncation"], found["cut"]) == (1, 4096, "middle", 0)
    found = told_by(lambda prompt: "")
    assert (found["score"], found["raw"], found["first_line"]) == (0, 0, 0)


@pytest.mark.parametrize(("truncation", "kept"), [("middle", (True, True)), ("left", (False, True))])
def test_cuts_are_recorded(truncation, kept):
    row = {"context": "so on " * 200, "question": "What?", "answers": ["it"]}
    script = Script(lambda prompt: "it")
    ask = functools.partial(answers, script, BYTES, progress=SILENT)
    found = evaluate("musique", [row], ask, max_length=300, truncation=truncation)
    assert (found["cut"], found["truncation"], found["max_length"], found["score"]) == (1, truncation, 300, 100)
    (prompt,) = script.asked
    assert len(prompt) == 300 - 32
    assert (prompt.startswith("Answer the question"), prompt.endswith("Question: What?\nAnswer:")) == kept


def test_wrong_arguments(tmp_path):
    with pytest.raises(UserError, match=r"no LongBench task 'hotpot' \(did you mean 'hotpotqa'\?\)"):
        rows_of("hotpot", ROWS)
    with pytest.raises(UserError, match="There are no rows of qasper"):
        evaluate("qasper", [], told([]), max_length=4096)
    sentence = r"trec.jsonl or .jsonl.gz with the columns context, question, answers, all_classes.*LongBench', 'trec'"
    with pytest.raises(UserError, match=sentence):
        rows_of("trec", tmp_path)


@pytest.mark.parametrize(
    ("task", "change", "sentence"),
    [
        ("qasper", {"context": None}, "qasper.*(row|line) 1: context is null, but must be a text; mend the row"),
        ("qasper", {"question": 7}, "question is 7, but must be a text"),
        ("gov_report", {"context": "a\ud800"}, r"context holds '.ud800', half a character"),
        ("qasper", {"answers": "seven"}, 'answers is "seven", but must be a list of texts, one at least'),
        ("qasper", {"answers": []}, r"answers is \[\], but must be a list of texts"),
        ("qasper", {"answers": ["a", None]}, r"answers is \[\"a\", null\], but must be a list of texts"),
        ("trec", {"all_classes": None}, "all_classes is null, but must be a list of texts"),
    ],
)
def test_a_wrong_field_is_refused_and_not_asked(tmp_path, task, change, sentence):
    row = rows_of(task, ROWS)[0] | change
    with pytest.raises(UserError, match=sentence):
        evaluate(task, [row], told(["x"]), max_length=4096)
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=sentence):
        rows_of(task, tmp_path)
