"""Suites: the tasks of a table or figure, measured on a trained run, kept, and read back as columns.

Each task's numbers lie in <run>/tasks.json as soon as it is finished, each answer in <run>/answers.jsonl before that,
so an evaluation that was stopped goes on where it was. What keeps a number from being the column's own is said in its
marks: fewer documents, rows of one's own, a stand-in, an unfinished training, another max_length.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gdn_jax.config import Experiment
from gdn_jax.errors import UserError
from gdn_jax.files import read_json, write_json

if TYPE_CHECKING:
    from gdn_jax.evaluate.answering import Answering, Answers
    from gdn_jax.runs import OpenRun

TASKS = "tasks.json"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that tasks are measured with."""

    folder: Path | None = None  # of local data: <task>.jsonl or .jsonl.gz, there or in a folder named like the suite
    limit: int | None = None  # documents of each task, samples of each length; None: all
    max_length: int | None = None  # most tokens read at once; None: the suite's own
    haystack: Path | None = None  # text that hides Table 2's needles; None: the novels in the package, a stand-in
    fewshot: int | None = None  # worked examples before each question of lm-eval's tasks; None: the task's own number

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; it must be positive, or left out for all.")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length is {self.max_length}; it must be positive.")
        if self.fewshot is not None and self.fewshot < 0:
            raise UserError(f"fewshot is {self.fewshot}; it must be 0 or more, or left out for the task's own number.")

    def data(self, suite: str) -> Path | None:
        """The folder that holds the suite's files."""
        within = None if self.folder is None else self.folder / suite
        return within if within is not None and within.is_dir() else self.folder

    def local(self, suite: str) -> Path:
        """The same, for suites whose data only local files hold."""
        found = self.data(suite)
        if found is None:
            raise UserError(f"{suite} reads local files; name their folder with --task_data.")
        if not found.is_dir():
            raise UserError(f"{found} is no folder; --task_data names one that holds <task>.jsonl(.gz) files.")
        return found

    def first(self, rows: Sequence[Any]) -> Sequence[Any]:
        return rows if self.limit is None else rows[: self.limit]


@dataclass(frozen=True)
class Column:
    """Where a column's number is found, and how many documents make it whole."""

    title: str
    task: str
    metric: str
    rows: range  # numbers of documents that the published task may have
    times: float = 1.0  # 100 for a fraction that the paper prints in per cent
    lower: bool = False  # is better


class Cell(NamedTuple):
    """A column's number: the mean over seeds, or None where nothing ran."""

    value: float | None
    spread: float | None = None  # standard deviation over the seeds
    marks: tuple[str, ...] = ()
    seeds: int = 0


@dataclass(frozen=True)
class Suite:
    """The tasks of a table or figure.

    measure      (task, answers, run, asked) -> {"metrics": {name: value}, "n": documents asked, "of": documents there
                 are, "protocol": what else decided the numbers, "stand_in": what stood in for the paper's data, or ""}
    max_length   most tokens read at once, by scale; at other scales those of a training window, at least 2,048.
                 None: the suite is cut in its own way, or not at all
    """

    name: str
    columns: dict[str, Column]  # keys as in paper.json
    measure: "Callable[[str, Answers, OpenRun, Asked], Row]"
    averaged: tuple[str, ...] = ()  # columns whose mean is the column "average"
    max_length: Mapping[str, int] | None = None

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(column.task for column in self.columns.values()))

    def own_length(self, experiment: Experiment) -> int | None:
        """The max_length of the suite's numbers for a trained run."""
        if self.max_length is None:
            return None
        from gdn_jax.evaluate.answering import default_length

        scale = experiment.id.rpartition("/")[2]
        return self.max_length.get(scale, default_length(experiment.data))

    def cell(self, key: str, rows: Sequence[Row]) -> Cell:
        """The column's number over the result rows of one recipe, one a seed."""
        if key == "average":
            return mean_of([self.cell(one, rows) for one in self.averaged])
        column = self.columns[key]
        found = [entry for row in rows for entry in row.get("tasks", []) if self._holds(entry, column)]
        whole = [entry for entry in found if not self.marks(entry, column)]
        chosen = whole or found[-1:]  # numbers with marks are not averaged
        if not chosen:
            return Cell(None)
        values = [column.times * entry["metrics"][column.metric] for entry in chosen]
        return Cell(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None,
            self.marks(chosen[0], column), len(values),
        )  # fmt: skip

    def marks(self, entry: Row, column: Column) -> tuple[str, ...]:
        """Why the entry is not the column's own number, in words."""
        found = []
        if entry["of"] not in column.rows:
            found.append(f"own rows, n = {entry['n']:,}")
        elif entry["n"] < entry["of"]:
            found.append(f"n = {entry['n']:,} of {entry['of']:,}")
        return (*found, *entry["marks"])

    def _holds(self, entry: Row, column: Column) -> bool:
        same = entry["suite"] == self.name and entry["task"] == column.task
        return same and entry["metrics"].get(column.metric) is not None


def mean_of(cells: Sequence[Cell]) -> Cell:
    """The mean of cells, every one of which must have a number; it bears all their marks."""
    if not cells or any(cell.value is None for cell in cells):
        return Cell(None)
    marks = tuple(dict.fromkeys(mark for cell in cells for mark in cell.marks))
    return Cell(statistics.fmean(cell.value for cell in cells), None, marks, min(cell.seeds for cell in cells))


def measure(suite: Suite, tasks: Sequence[str], answering: "Answering", asked: Asked) -> list[Row]:
    """The numbers of `tasks`, measured and kept in the run's directory one after the other."""
    from gdn_jax.metrics import environment

    run = answering.run
    steps, here, found = run.experiment.optim.steps, environment(), []
    own_length = suite.own_length(run.experiment)
    for task in tasks:
        start = time.monotonic()
        answering.kept.makers()  # those of earlier tasks
        row = suite.measure(task, answering, run, asked)
        makers = answering.kept.makers()
        marks = [row["stand_in"]] if row["stand_in"] else []
        if run.step < steps and run.trained_on.fingerprint is not None:  # imported parameters were trained elsewhere
            marks.append(f"step {run.step:,} of {steps:,}")
        read = {} if own_length is None else {"max_length": answering.max_length}
        protocol = {"limit": asked.limit} | read | row["protocol"]
        if own_length not in (None, protocol.get("max_length")):
            marks.append(f"max_length {protocol['max_length']:,} in place of {own_length:,}")
        if protocol.get("fewshot") and task in suite.tasks:
            marks.append(f"{protocol['fewshot']} worked examples in place of none")
        marks += dict.fromkeys(_other(maker) for maker in makers if maker is None or maker["source"] != here["source"])
        entry = {
            "suite": suite.name, "task": task, "step": run.step, "n": row["n"], "of": row["of"],
            "metrics": row["metrics"], "marks": marks,
            "protocol": protocol,
            "seconds": round(time.monotonic() - start, 1),
            "environment": _environment(here, makers),
        }  # fmt: skip
        save(run.directory, entry)
        found.append(entry)
    return found


def _other(maker: Row | None) -> str:
    """The mark of answers that another program than this one made."""
    if maker is None:
        return "answers of an unknown program"
    return f"answers of source {maker['source']}, commit {maker['commit']}{' (changed)' if maker['dirty'] else ''}"


def _environment(here: Row, makers: Sequence[Row | None]) -> Row:
    """What a task's numbers were made with: this program, and the devices that gave the answers."""
    known = [maker for maker in makers if maker is not None]
    devices = dict.fromkeys(tuple(maker["devices"]) for maker in known) or [here["devices"]]
    return {name: here[name] for name in ("date", "commit", "source")} | {
        "dirty": here["dirty"] or any(maker["dirty"] for maker in known),
        "devices": [device for some in devices for device in some],
    }


def save(run_dir: Path, entry: Row) -> None:
    """Keep a task's numbers beside those of other tasks and protocols; of one protocol the newest stays."""

    def same(one: Row) -> bool:
        return all(one[name] == entry[name] for name in ("suite", "task", "step", "n", "of", "marks", "protocol"))

    write_json(run_dir / TASKS, [*(one for one in kept(run_dir) if not same(one)), entry])


def kept(run_dir: Path) -> list[Row]:
    """Every task's numbers in a run's directory, the oldest first."""
    path = run_dir / TASKS
    return read_json(path, list, "suite", "task", "step") if path.exists() else []


def of_step(run_dir: Path, step: int) -> list[Row]:
    """For each task the numbers at `step` that stand for the run: those of most documents, of two the newest."""
    chosen: dict[tuple[str, str], Row] = {}
    for entry in kept(run_dir):
        key = entry["suite"], entry["task"]
        if entry["step"] == step and (key not in chosen or _weight(entry) >= _weight(chosen[key])):
            chosen[key] = entry
    return list(chosen.values())


def _weight(entry: Row) -> tuple[int, int]:
    return -len(entry["marks"]), entry["n"]
