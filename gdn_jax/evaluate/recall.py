"""Recall from real documents: the paper's Table 4, six cloze tasks.

The tasks, their cut around the answer and their metric are those of "Just read twice" (Arora et al., arXiv 2407.05483,
in github.com/HazyResearch/prefix-linear-attention). lm-eval's tasks triviaqa, nq_open and drop are others.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdn_jax.errors import UserError, nearest
from gdn_jax.evaluate.generation import Ask
from gdn_jax.evaluate.rows import LABELS, TEXT, TEXTS, Kind, Source, check_row, load_rows
from gdn_jax.tokenizer import Tokenizer, text_between

CONTEXT_LENGTH = 2048  # tokens, the paper's; JRT's own script has 1000
ANSWER_LENGTH = 50  # of them, left free
ANSWER_TOKENS = 48
STOPS = ("\n",)
SUMMARY = "Summary of information above..."  # begins SWDE's own prompt at the end of its text
LOOP_COPIES, LOOP_CHARACTERS = 3, 16
_A_NUMBER = Kind("a number of tokens", lambda value: isinstance(value, int) and not isinstance(value, bool))
MAY_LACK = {"alt_answers": TEXTS, "tok_pos": _A_NUMBER}  # columns

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A column of Table 4."""

    column: str
    dataset: str
    columns: tuple[str, ...]  # that its rows have
    context: str  # the column that is cut
    around: tuple[str, ...]  # columns whose earliest mention the cut keeps; none: the document's beginning is kept
    labels: str  # the column of what counts as right
    prompt: Callable[[Row], str]


def loops(continuation: str) -> bool:
    """The continuation ends in a loop: one piece of text again and again up to the end.

    At least its last 16 characters, and at least three copies, repeat with one period; the last copy may be cut short.
    """
    size = len(continuation)
    for period in range(1, size // LOOP_COPIES + 1):
        same = 0
        while same < size - period and continuation[-1 - same] == continuation[-1 - same - period]:
            same += 1
        if same + period >= max(LOOP_COPIES * period, LOOP_CHARACTERS):
            return True
    return False


def contains(continuation: str, labels: str | Sequence[str]) -> bool:
    """One of the labels occurs in the continuation, in upper or lower case."""
    labels = [labels] if isinstance(labels, str) else labels
    return any(re.search(re.escape(label), continuation, re.IGNORECASE) for label in labels)


def _key_prompt(row: Row, *, body: str) -> str:
    return f"{body}. {row['key'][0].upper()}{row['key'][1:]}:"


def _swde(row: Row) -> str:
    text = _without_end(row["text"].split(SUMMARY)[0], row["key"] + ":")
    return _key_prompt(row, body=text.strip("\n").strip().strip("\n").strip().strip("."))


def _fda(row: Row) -> str:
    return _key_prompt(row, body=_without_end(row["text"], row["key"] + ":").strip("\n").strip("."))


def _squad(row: Row) -> str:
    return row["text"].strip()  # ends just before the answer already


def _drop(row: Row) -> str:
    return _question(row["context"].strip(), row["question"].strip())


def _triviaqa(row: Row) -> str:
    # A question before a mark at the end stays: the space between them hides it from JRT, too.
    return _question(re.sub(r"\[PAR\]|\[DOC\]|\[TLE\]", "", row["context"].strip()), row["question"].strip())


def _question(context: str, question: str) -> str:
    return f"{_without_end(context, question).strip().strip('.')}. {question}"


def _nq(row: Row) -> str:
    question, context = row["question"].strip(), row["context"].strip()
    return f"{context.removesuffix(question).strip().strip('.')}. {question}"


def _without_end(text: str, end: str) -> str:
    """The text without copies of `end` at its end, in upper or lower case."""
    while end and text.lower().endswith(end.lower()):
        text = text[: -len(end)]
    return text


_ASKED = ("context", "question", "answers")
TASKS = {
    "swde": Task(
        "SWDE", "hazyresearch/based-swde-v2", ("text", "key", "value"), "text", ("key", "value"), "value", _swde
    ),
    "squad": Task("SQD", "hazyresearch/based-squad", ("text", "value"), "text", ("value",), "value", _squad),
    "fda": Task("FDA", "hazyresearch/based-fda", ("text", "key", "value"), "text", ("key", "value"), "value", _fda),
    "triviaqa": Task("TQA", "hazyresearch/based_triviaqa", _ASKED, "context", (), "answers", _triviaqa),
    "nq": Task("NQ", "hazyresearch/based_nq_2048", _ASKED, "context", ("answers",), "answers", _nq),
    "drop": Task("DROP", "hazyresearch/based_drop", _ASKED, "context", (), "answers", _drop),
}  # in the order of the paper's columns


def rows_of(task: str, folder: Path) -> list[Row]:
    """The task's rows from folder/<task>.jsonl or .jsonl.gz. Errors as of load_rows."""
    found = _task(task)
    return load_rows(folder, task, _fields(found), Source(found.dataset, "validation"), MAY_LACK)


def _fields(task: Task) -> dict[str, Kind]:
    """The columns of a task's rows, but for those that a row may lack."""
    return {column: LABELS if column == "answers" else TEXT for column in task.columns}


def make_prompt(task: str, row: Row, tokenizer: Tokenizer, context_length: int = CONTEXT_LENGTH) -> str | None:
    """The row's prompt; None where an answer is shorter than two characters, which JRT leaves out of the task.

    The document is cut to context_length - 50 tokens, half of them before the answer's first mention.
    """
    found = _task(task)
    text = row[found.context]
    if task == "swde":
        text = text.split(SUMMARY)[0]
    short = _cut(text.strip(), found.around, row, tokenizer, context_length - ANSWER_LENGTH)
    return None if short is None else found.prompt(row | {found.context: short})


def evaluate(
    task: str, rows: Sequence[Row], tokenizer: Tokenizer, ask: Ask, context_length: int = CONTEXT_LENGTH
) -> dict[str, float | int | str | None]:
    """100 times the share of continuations that contain an answer, and what was measured.

    looping   100 times the share of wrong continuations that `loops`: most errors are repetitions, says the paper's
              section 4. None where nothing is wrong
    """
    found = _task(task)
    if context_length <= ANSWER_LENGTH + 1:
        raise UserError(f"context_length is {context_length}; it must be at least {ANSWER_LENGTH + 2} tokens.")
    for number, row in enumerate(rows, 1):
        check_row(row, f"{task}, row {number}", _fields(found), MAY_LACK)
    prompts = [make_prompt(task, row, tokenizer, context_length) for row in rows]
    asked = [(row, prompt) for row, prompt in zip(rows, prompts, strict=True) if prompt is not None]
    if not asked:
        raise UserError(f"None of the {len(rows)} rows of {task} has an answer of two characters; give other rows.")
    out = ask([prompt for _, prompt in asked], max_tokens=ANSWER_TOKENS, stops=STOPS)
    wrong = [a.text for (row, _), a in zip(asked, out, strict=True) if not contains(a.text, row[found.labels])]
    return {
        "task": task,
        "contains": 100 * (len(asked) - len(wrong)) / len(asked),
        "looping": 100 * sum(map(loops, wrong)) / len(wrong) if wrong else None,
        "rows": len(asked),
        "left_out": len(rows) - len(asked),
        "context_length": context_length,
        "cut": sum(answer.tokens < answer.of_tokens for answer in out),
    }


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"There is no recall task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}.")
    return TASKS[name]


def _cut(text: str, around: Sequence[str], row: Row, tokenizer: Tokenizer, room: int) -> str | None:
    """At most `room` tokens of the text around the earliest mention; JRT's truncate_context, special tokens apart.

    JRT leaves half a character at a cut, and a token more where the text behind the cut encodes to one more.
    """
    places = []
    for column in around:
        answer = row[column][0] if isinstance(row[column], list) and row[column] else row[column]
        if len(answer) <= 1:
            return None
        places += _mentions(answer, text)
    if around and not places:
        for answer in row.get("alt_answers") or []:
            places = places or _mentions(answer, text)
    if around and not places:  # the end is kept then, or what the row says
        before = len(tokenizer.encode(text[:-1]))
        if row.get("tok_pos") is not None and before > room:
            before = row["tok_pos"]
    else:
        before = len(tokenizer.encode(text[: min(places, default=0)]))
    ids = tokenizer.encode(text)
    start = max(0, before - room // 2)
    stop = min(len(ids), start + room)
    short = text_between(tokenizer, ids, start, stop)
    while (over := len(tokenizer.encode(short)) - room) > 0:  # text may encode to more tokens than it was decoded from
        stop -= over
        short = text_between(tokenizer, ids, start, stop)
    return short


def _mentions(answer: str, text: str) -> list[int]:
    """Where the answer first occurs, in upper or lower case; nothing where it does not."""
    found = re.search(re.escape(answer), text, re.IGNORECASE)
    return [found.start()] if found else []
