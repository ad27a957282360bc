"""`python -m experiments.table3 --scale tiny`: run what a table lacks, then print it."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import experiments
from experiments import tables
from experiments.commands import Stopped
from experiments.commands import experiment as on_ids
from experiments.commands.evaluation import TaskOptions
from experiments.options import parse
from gdn_jax.errors import UserError
from gdn_jax.files import explained


@dataclass(frozen=True, kw_only=True)
class Options(TaskOptions):
    """Train and evaluate the rows of a table that have no run yet, then print it."""

    scale: Literal["tiny", "desk", "400m", "400m-matched", "1.3b"] = "tiny"
    models: str = ""  # some of the rows, separated by commas; empty: all
    out: str = ""  # directory that gets the table's files


def main(name: str, words: list[str] | None = None) -> None:
    """The script of a table's module."""
    try:
        run_table(name, parse(Options(), sys.argv[1:] if words is None else words, f"python -m experiments.{name}"))
    except (UserError, Stopped) as error:
        print(error, file=sys.stderr)
        sys.exit(error.code if isinstance(error, Stopped) else 2)
    except OSError as error:
        sys.exit(explained(error))


def run_table(name: str, options: Options) -> None:
    spec = tables.table_of(name)
    ids = spec.rows(options.scale)
    named = options.models.split(",") if options.models else list(ids)
    if unknown := [model for model in named if model not in ids]:
        raise UserError(f"{name} has no row {unknown[0]!r}; it has {', '.join(ids)}.")
    tasks = replace(options, tasks=options.tasks or spec.suite.name)
    for model in named:
        experiment = experiments.get(ids[model])
        groups = {group: getattr(experiment, group) for group in ("model", "optim", "data", "run")}
        given = {field: getattr(tasks, field) for field in TaskOptions.__dataclass_fields__}
        on_ids.run(experiment, on_ids.RunOptions(**groups, **given))
    tables.table(name, tables.TableOptions(scale=options.scale, out=str(Path(options.out)) if options.out else ""))
