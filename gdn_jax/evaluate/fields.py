"""What a task's rows hold, checked before anything is asked: other types would be asked and scored as text."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gdn_jax.errors import UserError


def check_fields(
    rows: Sequence[Mapping[str, Any]], name: str, *, texts: Sequence[str] = (), lists: Sequence[str] = (),
    labels: Sequence[str] = (), first: int = 1,
) -> None:  # fmt: skip
    """A UserError for the first row with a column that does not hold what it should.

    name     of what the rows are of, for the sentence
    texts    columns of text, which may be empty; lone surrogates, which no tokenizer encodes, are no text
    lists    columns of lists of texts, one at least
    labels   the same without empty texts: every continuation contains one
    first    number of the first row
    """
    rules: dict[str, tuple[Callable[[Any], bool], str]] = dict.fromkeys(texts, (_is_text, "a text"))
    rules |= dict.fromkeys(lists, (_is_list, "a list of texts, one at least"))
    rules |= dict.fromkeys(labels, (_is_labels, "a list of texts, one at least and none of them empty"))
    for number, row in enumerate(rows, first):
        for column, (right, rule) in rules.items():
            if column not in row:
                raise UserError(f"Row {number} of {name} has no column {column!r}; add it, or leave the row out.")
            if not right(row[column]):
                value = json.dumps(row[column])
                value = value if len(value) <= 40 else f"{value[:40]}..."
                raise UserError(
                    f"Row {number} of {name}: {column!r} is {value}, and must be {rule}; repair the row or "
                    f"leave it out."
                )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_labels(value: Any) -> bool:
    return _is_list(value) and all(value)
