"""Rows of local files: what a field may hold, said of the first one that holds something else."""

import json

import pytest

from gdn_jax.errors import UserError
from gdn_jax.evaluate.rows import LABELS, TEXT, TEXTS, Source, load_rows

SOURCE = Source("hub/set", "test")


def load(folder, fields, *rows):
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(folder, "task", fields, SOURCE)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (TEXT, ""),
        (TEXT, "ein ä"),
        (TEXTS, ["seven", ""]),
        (LABELS, ["seven", "7"]),
    ],
)
def test_fields_that_fit(tmp_path, kind, value):
    assert load(tmp_path, {"field": kind}, {"field": value, "more": None}) == [{"field": value, "more": None}]


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (TEXT, None, "field is null, but must be a text; mend the row, or leave it out."),
        (TEXT, 7, "field is 7, but must be a text;"),
        (
            TEXT,
            "half a \ud83d",
            r"field holds '\\ud83d', half a character \(a lone surrogate\), which no text may hold;",
        ),
        (TEXTS, ["x", "\ud83d"], r"field holds '\\ud83d', half a character"),
        (TEXTS, "seven", 'field is "seven", but must be a list of texts, one at least;'),
        (TEXTS, [], r"field is \[\], but must be a list of texts, one at least;"),
        (TEXTS, None, "field is null, but must be a list of texts, one at least;"),
        (TEXTS, ["seven", 7], r'field is \["seven", 7\], but must be a list of texts, one at least;'),
        (LABELS, "seven", 'field is "seven", but must be a list of texts, one at least and none of them empty;'),
        (
            LABELS,
            ["seven", ""],
            r'field is \["seven", ""\], but must be a list of texts, one at least and none of them empty;',
        ),
        (LABELS, {"text": ["seven"]}, r'field is {"text": \["seven"\]}, but must be a list'),
        (LABELS, 7, "field is 7, but must be a list"),
    ],
)
def test_fields_that_do_not_fit(tmp_path, kind, value, said):
    with pytest.raises(UserError, match=r"task.jsonl, line 2: " + said):
        load(tmp_path, {"field": kind}, {"field": "x" if kind is TEXT else ["x"]}, {"field": value})


def test_a_field_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="line 2: there is no column 'field'; add it."):
        load(tmp_path, {"field": TEXT}, {"field": "x"}, {"other": "x"})
