"""Suites: the tasks of a table or figure, measured on a trained run, kept, and read back as columns.

Each task's numbers lie in <run>/tasks.json as soon as it is finished, each answer in <run>/answers.jsonl before that,
so an evaluation that was stopped goes on where it was. What keeps a number from being the column's own is said in its
marks: fewer documents, rows of one's own, a stand-in, an unfinished training, another max_length.
"""

import gzip
import hashlib
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
READ_ALIKE = ("harness", "max_length", "truncation", "context_length")  # one value each in the columns of an average

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

    def facts(self, suite: str, task: str) -> Row:
        """What a protocol says of a task's local rows: the sha256 of their text. Nothing where there are none."""
        from gdn_jax.evaluate.rows import local_file

        folder = self.data(suite)
        found = None if folder is None else local_file(folder, task)
        if found is None:
            return {}
        with gzip.open(found) if found.suffix == ".gz" else found.open("rb") as file:
            return {"data_sha256": hashlib.file_digest(file, "sha256").hexdigest()}

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
    files: tuple[str, ...] = ()  # sha256 of the text of local files that hold its rows; any other one is of own rows


class Cell(NamedTuple):
    """A column's number: the mean over seeds, or None where nothing ran."""

    value: float | None
    spread: float | None = None  # standard deviation over the seeds
    marks: tuple[str, ...] = ()
    seeds: int = 0
    entries: tuple[Row, ...] = ()  # what it was made of, the newest seed first


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
        """The column's number, or the average's, over the result rows of one recipe, one a seed."""
        return self.mean(self.averaged if key == "average" else (key,), rows)

    def mean(self, keys: Sequence[str], rows: Sequence[Row]) -> Cell:
        """The mean of columns within each seed that has them all, then mean and spread over seeds that go together.

        Those are the newest without marks and all that were measured like it; where every seed bears marks, one alone.
        """
        columns = [self.columns[key] for key in keys]
        seeds = [[self.chosen(row.get("tasks", []), column) for column in columns] for row in rows]
        seeds = sorted((one for one in seeds if one and None not in one), key=_date, reverse=True)
        if not seeds:
            return Cell(None)

        def marks(seed: Sequence[Row]) -> tuple[str, ...]:
            of_entries = (mark for one, column in zip(seed, columns, strict=True) for mark in self.marks(one, column))
            return tuple(dict.fromkeys([*of_entries, *_apart(seed)]))

        whole = [seed for seed in seeds if not marks(seed)]
        if not whole:
            together = [max(seeds, key=lambda seed: (-len(marks(seed)), sum(one["n"] for one in seed)))]
            why = marks(together[0])
        else:
            together = [seed for seed in whole if not _differences(seed, whole[0])]
            others = dict.fromkeys(name for seed in whole for name in _differences(seed, whole[0]))
            why = (f"{len(together)} of {len(whole)} seeds: other {', '.join(others)}",) if others else ()
        values = [
            statistics.fmean(
                column.times * one["metrics"][column.metric] for one, column in zip(seed, columns, strict=True)
            )
            for seed in together
        ]
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Cell(statistics.fmean(values), spread, why, len(values), tuple(one for seed in together for one in seed))

    def chosen(self, entries: Sequence[Row], column: Column) -> Row | None:
        """Of a row's entries the one that holds the column's number; None where none does."""
        found = [one for one in entries if (one["suite"], one["task"]) == (self.name, column.task)]
        return self.standing([one for one in found if one["metrics"].get(column.metric) is not None])

    def standing(self, entries: Sequence[Row]) -> Row | None:
        """Of one task's entries, the oldest first, the one that counts, here, in figures and where results are kept.

        The fewest marks decide, then the published rows before one's own, then most documents; of two alike the newest.
        """

        def rank(entry: Row) -> tuple[int, bool, int]:
            column = next((one for one in self.columns.values() if one.task == entry["task"]), None)
            return -len(self.marks(entry, column)), not _own(entry, column), entry["n"]

        return max(reversed(entries), key=rank, default=None)

    def marks(self, entry: Row, column: Column | None) -> tuple[str, ...]:
        """Why the entry is not the column's own number, or a task's that has no column, in words."""
        found = []
        if _own(entry, column):
            found.append(f"own rows, n = {entry['n']:,}")
        elif entry["n"] < entry["of"]:
            found.append(f"n = {entry['n']:,} of {entry['of']:,}")
        return (*found, *entry["marks"])


def _own(entry: Row, column: Column | None) -> bool:
    """Whether the entry is of rows of one's own: a local file that is none of `files`, or another number of rows.

    A file of the published length may hold anything. An entry of before files were recorded has no hash.
    """
    read, known = entry["protocol"].get("data_sha256"), () if column is None else column.files
    return (read is not None and read not in known) or (column is not None and entry["of"] not in column.rows)


def _date(seed: Sequence[Row]) -> str:
    return max(one["environment"]["date"] for one in seed)


def _differences(seed: Sequence[Row], other: Sequence[Row]) -> list[str]:
    """The fields of their protocols in which two seeds' entries differ: they did not measure the same thing.

    An entry that was written before there was a field is one without it. How many documents were asked for is no
    difference where all were.
    """
    found = {}
    for one, two in zip(seed, other, strict=True):
        mine, theirs = one["protocol"], two["protocol"]
        found |= dict.fromkeys(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
    return [name for name in found if name != "limit"]


def _apart(seed: Sequence[Row]) -> list[str]:
    """Marks of a mean whose columns were not read alike."""
    read = {name: {str(one["protocol"].get(name)) for one in seed} for name in READ_ALIKE}
    return [f"columns with {len(values)} values of {name}" for name, values in read.items() if len(values) > 1]


def measure(suite: Suite, tasks: Sequence[str], answering: "Answering", asked: Asked) -> list[Row]:
    """The numbers of `tasks`, measured and kept in the run's directory one after the other."""
    from gdn_jax import distributed
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
        marks += unfinished(run.step, steps, run.trained_on.fingerprint)
        read = {} if own_length is None else {"max_length": answering.max_length}
        protocol = {"limit": asked.limit} | read | row["protocol"] | asked.facts(suite.name, task)
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
        if distributed.first():
            save(run.directory, entry)
        found.append(entry)
    return found


def unfinished(step: int, of_steps: int, trained_on: str | None) -> list[str]:
    """The mark of a checkpoint before a training's last step; imported parameters were trained elsewhere."""
    return [f"step {step:,} of {of_steps:,}"] if step < of_steps and trained_on is not None else []


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
    """For each task the numbers at `step` that stand for the run."""
    from experiments import SUITES

    tasks: dict[tuple[str, str], list[Row]] = {}
    for entry in kept(run_dir):
        if entry["step"] == step:
            tasks.setdefault((entry["suite"], entry["task"]), []).append(entry)
    return [SUITES[suite].standing(entries) for (suite, _), entries in tasks.items()]
