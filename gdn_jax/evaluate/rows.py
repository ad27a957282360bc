"""Rows of evaluation tasks from local files, in the columns of the data set that they are of."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gdn_jax.errors import UserError
from gdn_jax.half_characters import check_whole

SUFFIXES = (".jsonl", ".jsonl.gz")
SHOWN = 40  # characters of a value in a refusal
WAY = "mend the row, or leave it out"

Row = dict[str, Any]


class Source(NamedTuple):
    """Where a task's rows come from: a data set of the Hugging Face hub."""

    dataset: str
    split: str
    configuration: str | None = None


class Kind(NamedTuple):
    """What a field of a row must be."""

    words: str  # "the answers must be ..."
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_labels(value: Any) -> bool:
    return _are_texts(value) and all(value)  # every continuation contains an empty one


TEXT = Kind("a text", _is_text)
TEXTS = Kind("a list of texts, one at least", _are_texts)
LABELS = Kind("a list of texts, one at least and none of them empty", _are_labels)


def local_file(folder: Path, name: str) -> Path | None:
    """folder/<name>.jsonl or .jsonl.gz, or None where there is neither."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").exists()), None)


def load_rows(
    folder: Path, name: str, fields: Mapping[str, Kind], source: Source, may_lack: Mapping[str, Kind] | None = None
) -> list[Row]:
    """The rows of folder/<name>.jsonl or .jsonl.gz, each with at least `fields`: {column: what it must be}.

    may_lack    the same of columns that a row may lack, or leave empty

    Raises UserError for a file that is missing (with the two ways to get it), damaged, empty or of other columns, and
    for a field that is not what it must be: nothing is scored as the text "None".
    """
    path = local_file(folder, name)
    if path is None:
        arguments = ", ".join(map(repr, filter(None, (source.dataset, source.configuration))))
        raise UserError(
            f"There is no {folder / name}.jsonl or .jsonl.gz with the columns {', '.join(fields)}; with a network "
            f"make it by: datasets.load_dataset({arguments}, split={source.split!r}).to_json('{name}.jsonl'), or write "
            f"rows of your own in these columns."
        )
    rows = []
    for number, row in numbered(path):
        check_row(row, f"{path}, line {number}", fields, may_lack)
        rows.append(row)
    return rows


def check_row(
    row: Mapping[str, Any], where: str, fields: Mapping[str, Kind], may_lack: Mapping[str, Kind] | None = None
) -> None:
    """A UserError, which begins with `where`, unless every one of `fields` is in the row and what it must be.

    may_lack    the same of columns that the row may lack, or leave empty
    """
    filled = {column: kind for column, kind in (may_lack or {}).items() if row.get(column) not in (None, [])}
    for column, kind in {**fields, **filled}.items():
        if column not in row:
            raise UserError(f"{where}: there is no column {column!r}; add it.")
        check_whole(row[column], f"{where}: {column}", WAY)
        if not kind.fits(row[column]):
            raise UserError(f"{where}: {column} is {json.dumps(row[column])[:SHOWN]}, but must be {kind.words}; {WAY}.")


def numbered(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, row) of each row of a .jsonl or .jsonl.gz file; UserError where it is damaged or holds none."""
    number, found = 0, False
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: each line must be a JSON object; make it again.")
                    found = True
                    yield number, row
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged after line {number} ({error}); make it again.") from None
    if not found:
        raise UserError(f"{path} holds no rows; make it again.")


def filled_columns(path: Path) -> tuple[list[Row], dict[str, int]]:
    """The rows of a file in the columns that every one of them fills, and the first line that leaves each other empty.

    A null, also one within a value, leaves a column empty. Errors as of load_rows; no column at all is one too, and
    half a character in a column that is filled.
    """
    rows = dict(numbered(path))
    empty: dict[str, int] = {}
    for column in dict.fromkeys(column for row in rows.values() for column in row):
        line = next((number for number, row in rows.items() if not _filled(row.get(column))), None)
        if line is not None:
            empty[column] = line
    if all(column in empty for row in rows.values() for column in row):
        raise UserError(f"{path} has no column that every row fills; mend its rows.")
    kept = {line: {name: value for name, value in row.items() if name not in empty} for line, row in rows.items()}
    for line, row in kept.items():
        check_whole(list(row), f"{path}, line {line}: the name of a column", WAY)
        for name, value in row.items():
            check_whole(value, f"{path}, line {line}: {name}", WAY)
    return list(kept.values()), empty


def _filled(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(map(_filled, value.values() if isinstance(value, dict) else value))
    return value is not None
