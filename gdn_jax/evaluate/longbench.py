"""Table 5: the 14 English tasks of LongBench (Bai et al., arXiv 2308.14508), prompted and scored as there.

Prompts are the benchmark's data: github.com/THUDM/LongBench, config/dataset2prompt.json (MIT licence, Copyright (c)
2023 THU-KEG & Zhipu AI), word for word, its slips included. lm-evaluation-harness 0.4.13 has them with one line feed
less in triviaqa, samsum, lcc and repobench-p. Scores equal the harness's for the same answers.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn_jax.errors import UserError, nearest
from gdn_jax.evaluate.generation import Ask, Truncation
from gdn_jax.evaluate.rows import TEXT, TEXTS, Kind, Source, check_row, load_rows

DATASET = "Xnhyacinth/LongBench"

Row = dict[str, Any]
Metric = Callable[[str, str, Sequence[str]], float]  # (prediction, truth, classes)


# --- metrics ---


def qa_f1(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of words, without case, punctuation and articles (SQuAD's)."""
    found, true = _plain_words(prediction), _plain_words(truth)
    same = sum((Counter(found) & Counter(true)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(true)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """F of summary-level ROUGE-L over sets of words, as the library rouge 1.0.1 has it; 0 for an empty text.

        LCS = |union over sentences r of the truth, p of the prediction of the words of lcs(r, p)|
        R = LCS / |words of the truth|    P = LCS / |words of the prediction|    F = 2 P R / (P + R + 1e-8)

    The library fails on sentences of about a thousand words, which the harness counts as 0; here they count.
    """
    found, true = _sentences(prediction), _sentences(truth)
    if not found or not true:
        return 0.0
    common = {word for r in true for p in found for word in _common_subsequence(r, p)}
    precision = len(common) / len({word for sentence in found for word in sentence})
    recall = len(common) / len({word for sentence in true for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, truth: str, classes: Sequence[str]) -> float:
    """1 / (number of classes that the prediction names) if the truth is among them; parts of the truth do not count."""
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):  # LongBench removes from the list that it walks, and so skips what follows
        if named[place] in truth and named[place] != truth:
            named.remove(named[place])
        place += 1
    return 1 / len(named) if truth in named else 0.0


def code_similarity(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Similarity (difflib's, in whole per cent) of the first line of code that is neither blank nor has a comment."""
    marks = ("`", "#", "//")
    lines = (line for line in prediction.split("\n") if line.strip() and not any(mark in line for mark in marks))
    line = next(lines, "")
    if line == truth:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, truth).ratio()) / 100 if line and truth else 0.0


def _plain_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _sentences(text: str) -> list[list[str]]:
    """Each sentence's words; sentences end in full stops, and one of white space alone has one empty word."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> Iterator[str]:
    """The words of a longest common subsequence, from its end; of several, the one that takes from the end of x."""
    length = [[0] * (len(y) + 1)]
    for word in x:
        above, row = length[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        length.append(row)
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            yield x[i - 1]
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1


# --- tasks ---


@dataclass(frozen=True)
class Task:
    """A column of Table 5."""

    column: str
    metric: Metric
    max_tokens: int  # of an answer
    template: str
    lines: bool = False  # LongBench scores the answer's first line alone


_QA = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given "
    "passages. Only give me the answer and do not output any other words.\n\nQuestion: {question}\nAnswer:"
)
TASKS = {
    "narrativeqa": Task("NQA", qa_f1, 128, (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the "
        "question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single "
        "phrase if possible. Do not provide any explanation.\n\nQuestion: {question}\n\nAnswer:"
    )),
    "qasper": Task("QQA", qa_f1, 128, (
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in "
        'the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on '
        "the above article as concisely as you can, using a single phrase or sentence if possible. If the "
        'question cannot be answered based on the information in the article, write "unanswerable". If the '
        'question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
        "explanation.\n\nQuestion: {question}\n\nAnswer:"
    )),
    "multifieldqa_en": Task("MFQ", qa_f1, 64, (
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on "
        "the above text, only give me the answer and do not output any other words.\n\nQuestion: {question}\n"
        "Answer:"
    )),
    "hotpotqa": Task("HQA", qa_f1, 32, _QA),
    "2wikimqa": Task("2WM", qa_f1, 32, _QA),
    "musique": Task("Mus", qa_f1, 32, _QA),
    "gov_report": Task("GvR", rouge_l, 512, (
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
        "{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
    )),
    "qmsum": Task("QMS", rouge_l, 512, (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query "
        "in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting "
        "transcript in one or more sentences.\n\nQuery: {question}\nAnswer:"
    )),
    "multi_news": Task("MNs", rouge_l, 512, (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, "
        "write a one-page summary of all the news.\n\nSummary:"
    )),
    "trec": Task("TRC", classification, 64, (
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n"
        "{question}"
    ), lines=True),
    "triviaqa": Task("TQA", qa_f1, 32, (
        "Answer the question based on the given passage. Only give me the answer and do not output any other "
        "words. The following are some examples.\n\n{context}\n\n{question}"
    ), lines=True),
    "samsum": Task("SSM", rouge_l, 128, (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n"
        "{question}"
    ), lines=True),
    "lcc": Task("LCC", code_similarity, 64, (
        "Please complete the code given below. \n{context}Next line of code:\n"
    )),
    "repobench-p": Task("RBP", code_similarity, 64, (
        "Please complete the code given below. \n{context}{question}Next line of code:\n"
    )),
}  # fmt: skip


def rows_of(task: str, folder: Path) -> list[Row]:
    """The task's rows from folder/<task>.jsonl or .jsonl.gz. Errors as of load_rows."""
    return load_rows(folder, task, _fields(_task(task)), Source(DATASET, "test", task))


def _fields(task: Task) -> dict[str, Kind]:
    """The columns of a task's rows."""
    texts = ["context", "question"] if "{question}" in task.template else ["context"]
    lists = ["answers", "all_classes"] if task.metric is classification else ["answers"]
    return dict.fromkeys(texts, TEXT) | dict.fromkeys(lists, TEXTS)


def make_prompt(task: str, row: Row) -> str:
    """The row's prompt, uncut."""
    return _task(task).template.format(context=row["context"], question=row.get("question"))


def first_line(continuation: str) -> str:
    """What a model says before it runs on: the first line that is not empty, as LongBench's eval.py takes it."""
    return continuation.lstrip("\n").split("\n")[0]


def score(task: str, continuation: str, row: Row) -> float:
    """The best score over the row's answers, in [0, 1]."""
    found = _task(task)
    text = continuation if found.metric is code_similarity else continuation.strip()  # a line's indent is code
    return max((found.metric(text, truth, row.get("all_classes") or ()) for truth in row["answers"]), default=0.0)


def evaluate(
    task: str, rows: Sequence[Row], ask: Ask, *, max_length: int, truncation: Truncation = "middle"
) -> dict[str, float | int | str]:
    """Mean scores in per cent, and what was measured.

    raw          of the whole answer; nothing stops it but EOS and the task's number of tokens
    first_line   of `first_line` of the answer
    score        the one of the two that LongBench reports: first_line for trec, triviaqa and samsum
    max_length   most tokens of a prompt and its answer, to which prompts are cut as `truncation` says
    """
    found = _task(task)
    if not rows:
        raise UserError(f"There are no rows of {task}; give one at least.")
    for number, row in enumerate(rows, 1):
        check_row(row, f"{task}, row {number}", _fields(found))
    prompts = [make_prompt(task, row) for row in rows]
    out = ask(prompts, max_tokens=found.max_tokens, max_length=max_length, truncation=truncation)
    pairs = list(zip(out, rows, strict=True))
    raw = 100 * sum(score(task, answer.text, row) for answer, row in pairs) / len(rows)
    first = 100 * sum(score(task, first_line(answer.text), row) for answer, row in pairs) / len(rows)
    return {
        "task": task,
        "score": first if found.lines else raw,
        "raw": raw,
        "first_line": first,
        "rows": len(rows),
        "max_length": max_length,
        "truncation": truncation,
        "cut": sum(answer.tokens < answer.of_tokens for answer in out),
    }


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"There is no LongBench task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}.")
    return TASKS[name]
