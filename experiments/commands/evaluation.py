"""Tasks, texts and files of requests put to a trained run: what `gdn eval` and `gdn run` do beside perplexity."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experiments
from experiments import suites
from experiments.report import aligned
from experiments.suites import Asked, Suite
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError

if TYPE_CHECKING:
    from gdn_jax.evaluate.answering import Answering


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks a run is measured on, and how."""

    tasks: str = ""  # a suite (table2, table3, table4, table5, figure2), or tasks of one or of lm-eval: a,b
    task_data: str = ""  # folder of local files, <task>.jsonl or .jsonl.gz; without one tasks of lm-eval ask the hub
    limit: int | None = None  # documents of each task; None: all
    fewshot: int | None = None  # worked examples before each question of lm-eval's tasks; None: the task's own number
    max_length: int | None = None  # most tokens read at once; None: the suite's own. Another one marks the numbers
    haystack: str = ""  # file of the text that hides Table 2's needles; without one the novels stand in


def checked(options: TaskOptions) -> tuple[Asked, list[tuple[Suite, list[str]]]]:
    """The checked options, and the suites and tasks that they name; UserError where they make no sense."""
    asked = Asked(
        folder=Path(options.task_data) if options.task_data else None,
        limit=options.limit,
        max_length=options.max_length,
        haystack=Path(options.haystack) if options.haystack else None,
        fewshot=options.fewshot,
    )
    found: list[tuple[Suite, list[str]]] = []
    for name in filter(None, options.tasks.split(",")):
        suite, _, task = name.partition("/")
        if suite in experiments.SUITES:
            of_suite = experiments.SUITES[suite].tasks
            if task and task not in of_suite:
                raise UserError(f"{suite} has no task {task!r}; it has {', '.join(of_suite)}.")
            found.append((experiments.SUITES[suite], [task] if task else of_suite))
        else:
            found.append((experiments.SUITES["table3"], [name]))  # any task of the harness
    _check_read(asked, [suite for suite, _ in found])
    if any(suite is experiments.SUITES["table3"] for suite, _ in found):
        importlib.import_module("gdn_jax.evaluate.harness")  # says before the training that its library is missing
    return asked, found


def _check_read(asked: Asked, named: list[Suite]) -> None:
    """Raises UserError for an option that none of the suites reads: it would change nothing, unsaid."""
    readers = {
        "max_length": [suite.max_length is not None for suite in named],
        "haystack": [suite.name == "table2" for suite in named],
        "fewshot": [suite.name == "table3" for suite in named],
    }
    for option, read in readers.items():
        if getattr(asked, option) is not None and named and not any(read):
            names = ", ".join(dict.fromkeys(suite.name for suite in named))
            raise UserError(f"--{option} changes nothing in {names}; leave it out.")


def measure(experiment: Experiment, options: TaskOptions) -> list[dict[str, Any]]:
    """The tasks' numbers, kept in the run's directory; its result.json is made current where there is one."""
    from experiments import report
    from gdn_jax import distributed

    asked, named = checked(options)
    if not distributed.alone() and any(suite.name == "figure2" for suite, _ in named):
        raise UserError("figure2 reads whole documents in pieces, in one process; several share questions alone.")
    answering = opened(experiment, asked.max_length)
    found = []
    with answering.progress as progress:
        for suite, tasks in named:
            for task in _there(suite, tasks, asked):
                progress.show(f"{suite.name}/{task} ...")
                found += suites.measure(suite, [task], answering, asked)
    if (answering.run.directory / "result.json").exists() and distributed.first():
        report.result_row(answering.run.directory)
    return found


def _there(suite: Suite, tasks: list[str], asked: Asked) -> list[str]:
    """The tasks to measure: of a figure's corpora those whose files are there, of a table all."""
    if suite.name != "figure2" or len(tasks) == 1:
        return tasks
    from gdn_jax.evaluate.rows import SUFFIXES

    folder = asked.local(suite.name)
    found = [task for task in tasks if any((folder / f"{task}{suffix}").exists() for suffix in SUFFIXES)]
    if not found:
        raise UserError(f"{folder} holds no corpus; it takes {', '.join(f'{task}.jsonl' for task in tasks)} (or .gz).")
    return found


def opened(experiment: Experiment, max_length: int | None) -> "Answering":
    """The run's newest checkpoint, ready to answer with the arithmetic that `experiment` asks for."""
    from gdn_jax import distributed, runs
    from gdn_jax.evaluate.answering import Answering
    from gdn_jax.implementations import check_impl
    from gdn_jax.layers import compute_for
    from gdn_jax.metrics import environment
    from gdn_jax.progress import Progress

    context = experiment.run.context

    def read() -> Answering:
        run = runs.open_run(runs.run_directory(experiment))
        check_impl(experiment)
        return Answering(run, compute=compute_for(experiment), max_length=max_length, context=context)

    if not distributed.alone():
        Progress().say(distributed.described())
    found, here = distributed.on_every(read), environment()
    same = {"step": found.run.step, "model": found.identity, "max_length": found.max_length, "context": context}
    same |= {"answers": len(found.kept)}
    distributed.agree(same | {name: here[name] for name in ("python", "versions", "source", "backend")})
    return found


def described(found: list[dict[str, Any]]) -> str:
    """The tasks' numbers for a terminal, marks included."""
    header = ("task", "n", "numbers", "marks")
    lines = []
    for one in found:
        suite = experiments.SUITES[one["suite"]]
        columns = [column for column in suite.columns.values() if column.task == one["task"]] or [None]
        marks = list(dict.fromkeys(mark for column in columns for mark in suite.marks(one, column)))
        shots = one["protocol"].get("fewshot")
        task = f"{one['suite']}/{one['task']}{f', {shots} worked examples' if shots else ''}"
        numbers = ", ".join(f"{name} {_number(value)}" for name, value in one["metrics"].items())
        lines.append((task, f"{one['n']:,}", numbers, "; ".join(marks)))
    return aligned([header, *lines])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def write_requests(experiment: Experiment, options: TaskOptions, path: Path) -> None:
    """Write what the tasks would ask to `path`, for a machine that has the run but not the tasks."""
    from gdn_jax import runs
    from gdn_jax.evaluate.answering import RequestFile, default_length

    asked, named = checked(options)
    run = runs.open_run(runs.run_directory(experiment))
    length = default_length(run.experiment.data) if asked.max_length is None else asked.max_length
    file = RequestFile(path, run.tokenizer, max_length=length)
    for suite, tasks in named:
        if suite.name == "figure2":
            raise UserError("figure2 reads whole documents and asks nothing; run it where the run and its files are.")
        for task in tasks:
            suite.measure(task, file, run, asked)
    print(f"Wrote {file.write():,} requests to {path}; answer them with: gdn eval RUN --answer {path.name}.")


def answer(experiment: Experiment, path: Path, max_length: int | None) -> str:
    """Answer the requests of a file and keep the answers in the run's directory; says so."""
    from gdn_jax.evaluate.answering import answer_file, read_requests

    facts, _ = read_requests(path)
    answering = opened(experiment, facts["max_length"] if max_length is None else max_length)
    count = answer_file(answering, path)
    return f"{answering.run.directory / 'answers.jsonl'} holds the answers of {count:,} requests."


def score_text(experiment: Experiment, files: tuple[str, ...], max_length: int | None, as_json: bool) -> str:
    """Log-likelihood of whole texts, in blocks of max_length tokens, the first one after EOS; a table or JSON."""
    import math

    texts = {}
    for name in files:
        try:
            texts[name] = Path(name).read_bytes().decode()  # line ends as they are
        except UnicodeDecodeError:
            raise UserError(f"{name} is no text in UTF-8; convert it first.") from None
        if not texts[name]:
            raise UserError(f"{name} is empty; give a file that holds text.")
    answering = opened(experiment, max_length)
    found = answering.rolling(list(texts.values()))
    rows = []
    for (name, text), log_likelihood in zip(texts.items(), found, strict=True):
        size, words, tokens = len(text.encode()), len(text.split()), len(answering.tokenizer.encode(text))
        rows.append({
            "file": name, "bytes": size, "words": words, "tokens": tokens, "log_likelihood": log_likelihood,
            "nats_per_byte": -log_likelihood / size, "nats_per_token": -log_likelihood / tokens,
            "word_perplexity": math.exp(min(-log_likelihood / max(words, 1), 700)),
            "max_length": answering.max_length, "step": answering.run.step,
        })  # fmt: skip
    if as_json:
        return json.dumps(rows, indent=1)
    header = ("file", "bytes", "nats per byte", "nats per token", "word perplexity")
    lines = [
        (_shown(row["file"]), f"{row['bytes']:,}", f"{row['nats_per_byte']:.4f}", f"{row['nats_per_token']:.4f}",
         f"{row['word_perplexity']:.4g}")
        for row in rows
    ]  # fmt: skip
    return f"{aligned([header, *lines])}\nstep {answering.run.step:,}, blocks of {answering.max_length:,} tokens"


def _shown(name: str) -> str:
    """The name of a file, which need not be text."""
    return name.encode("utf-8", "backslashreplace").decode()
