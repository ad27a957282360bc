"""Rows of evaluation tasks from local files, in the columns of the data set that they are of."""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdn_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")


class Source(NamedTuple):
    """Where a task's rows come from: a data set of the Hugging Face hub."""

    dataset: str
    split: str
    configuration: str | None = None


def load_rows(folder: Path, name: str, columns: Sequence[str], source: Source) -> list[dict[str, Any]]:
    """The rows of folder/<name>.jsonl or .jsonl.gz, each with at least `columns`.

    Raises UserError for a file that is missing (with the two ways to get it), damaged, empty or of other columns.
    """
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").exists()]
    if not found:
        arguments = ", ".join(map(repr, filter(None, (source.dataset, source.configuration))))
        raise UserError(
            f"There is no {folder / name}.jsonl or .jsonl.gz with the columns {', '.join(columns)}; with a network "
            f"make it by: datasets.load_dataset({arguments}, split={source.split!r}).to_json('{name}.jsonl'), or write "
            f"rows of your own in these columns."
        )
    path, rows, number = found[0], [], 0
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise UserError(f"{path}, line {number}: each line must be a JSON object; make it again.")
                    missing = [column for column in columns if column not in rows[-1]]
                    if missing:
                        raise UserError(f"{path}, line {number}: there is no column {missing[0]!r}; add it.")
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged after line {number} ({error}); make it again.") from None
    if not rows:
        raise UserError(f"{path} holds no rows; make it again.")
    return rows
