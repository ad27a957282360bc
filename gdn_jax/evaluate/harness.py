"""lm-evaluation-harness on a run: its tasks and metrics, our answers. Needs the extra `eval`; works without torch.

Data comes from the harness's own data sets, or from local files, <task>.jsonl or .jsonl.gz in a folder, with the
columns that the stock task reads: nothing is downloaded then.
"""

import contextlib
import functools
import glob
import json
import logging
import numbers
import os
import random
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gdn_jax.errors import UserError, nearest
from gdn_jax.evaluate.answering import Answers
from gdn_jax.evaluate.rows import filled_columns, local_file

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: the harness's bars would break up our lines
try:
    import datasets
    import huggingface_hub
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError:
    raise UserError("Tasks need the library lm-eval; install it with: pip install 'gdn_jax[eval]'.") from None

VERSION = lm_eval.__version__
SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}  # those of lm_eval.simple_evaluate; some tasks shuffle choices


class HarnessModel(LM):
    """The harness's view of a run: three kinds of requests, passed on as text."""

    def __init__(self, answering: Answers):
        super().__init__()
        self._answering = answering
        self.fault: Exception | None = None  # of the model's own, which says nothing of the task

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._ours():
            return self._answering.loglikelihood([_texts(request, 2) for request in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        with self._ours():
            return self._answering.rolling([_texts(request, 1)[0] for request in requests])

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, grouped by their options."""
        with self._ours():
            out, groups = [""] * len(requests), {}
            for i, request in enumerate(requests):
                options = normalize_gen_kwargs(dict(request.args[1]))  # as the harness's own models read them
                if options["do_sample"] or options.get("num_beams", 1) != 1:
                    raise UserError(
                        f"Task {request.task_name} asks for sampling or beams; only greedy decoding is built."
                    )
                stops = tuple(stop for stop in options["until"] if stop)
                groups.setdefault((options["max_gen_toks"], stops), []).append(i)
            for (max_tokens, stops), indices in groups.items():
                found = self._answering.ask(
                    [_texts(requests[i], 1)[0] for i in indices], max_tokens=max_tokens, stops=stops,
                    max_length=self._answering.max_length,
                )  # fmt: skip
                for i, answer in zip(indices, found, strict=True):
                    out[i] = answer.text
        return out

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.fault = error
            raise


def _texts(request: Any, count: int) -> tuple[str, ...]:
    """The first arguments of a request, which a row of the wrong type can make something else than text."""
    found = tuple(request.args[:count])
    for value in found:
        if not isinstance(value, str):
            raise UserError(
                f"Task {request.task_name} makes {str(value)[:40]!r}, which is no text, of document {request.doc_id}; "
                f"mend that row."
            )
    return found


def evaluate_task(
    answers: Answers, task: str, *, data: Path | None = None, limit: int | None = None, fewshot: int | None = None
) -> dict[str, Any]:
    """{"version", "n", "of", "fewshot", "metrics": {"acc": 0.5, ...}} of one of the harness's tasks.

    data     folder of local files; a task without one there takes the harness's own data set. A column that some row
             leaves empty is none: the task does not see it
    limit    documents, at least one; None: all
    fewshot  worked examples before each question; None: the task's own number, which is 0 for those of Table 3

    A metric has the name of its filter where it has one: "exact_match,strict-match".
    Raises UserError for an unknown task, a group of tasks, data that cannot be had here or that does not fit the task.
    """
    if data is not None and not data.is_dir():
        raise UserError(f"{data} is no folder; give one that holds <task>.jsonl or <task>.jsonl.gz files.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    stock = _stock()
    if task not in stock.all_tasks:
        raise UserError(f"There is no task {task!r}{nearest(task, stock.all_tasks)} in lm-eval {VERSION}.")
    if task not in stock.all_subtasks:
        raise UserError(f"{task} is a group of tasks; name its tasks one by one.")
    path = None if data is None else local_file(data, task)
    model, empty = HarnessModel(answers), {}
    with tempfile.TemporaryDirectory() as folder, _offline(path is not None or not _hub_answers()), _seeded():
        try:
            if path is None:
                loaded = _from_hub(task, data)
            else:
                rows, empty = filled_columns(path)
                loaded = _from_rows(task, path, rows, fewshot, Path(folder))
            ((name, one),) = loaded["tasks"].items()
            _set_fewshot(one, task, fewshot)
            results = lm_eval.evaluate(
                model, loaded, limit=limit, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
            )
        except Exception as error:
            if isinstance(error, UserError) or error is model.fault:
                raise
            raise UserError(_explained(error, task, path, empty)) from error
    metrics = _numbers(results["results"][name])
    if not metrics:
        raise UserError(f"Task {task} gives no number that could be kept; take another.")
    return {
        "version": results["versions"].get(name),
        "n": results["n-samples"][name]["effective"],
        "of": results["n-samples"][name]["original"],
        "fewshot": one.config.num_fewshot or 0,
        "metrics": metrics,
    }


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """The harness's metrics, "acc,none": without their errors, and without the filter where that is none."""
    out = {}
    for name, value in found.items():
        metric, _, chosen = name.partition(",")
        if chosen and isinstance(value, numbers.Real) and not metric.endswith("_stderr"):
            out[metric if chosen == "none" else name] = float(value)
    return out


def _explained(error: Exception, task: str, path: Path | None, empty: dict[str, int]) -> str:
    """What an error of the harness says of a task and its data; `empty`: columns that a row leaves empty."""
    if isinstance(error, ImportError):
        return f"Task {task} needs a library that is not installed ({str(error).splitlines()[0]})."
    if isinstance(error, OverflowError):
        return (
            f"Task {task} has a number beyond all bounds ({error}): the model has diverged, or has learnt nothing of "
            f"such text; take another checkpoint."
        )
    if path is None:
        return f"Task {task} of lm-eval {VERSION} cannot be measured here: {_said(error)}; take another task."
    named = ", ".join(f"{column}, line {line}" for column, line in empty.items())
    return f"Task {task} does not fit {path}{f' (nothing in {named})' if named else ''}: {_said(error)}; mend the rows."


def _said(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__} {lines[0][:80]}" if lines else type(error).__name__


@functools.cache
def _stock() -> TaskManager:
    return TaskManager()


def _from_hub(task: str, data: Path | None) -> dict[str, Any]:
    """The task with the data of the hub, or of its cache."""
    try:
        return _stock().load([task])
    except (OSError, ValueError, RuntimeError) as error:  # what the datasets library raises offline
        rows = (
            f"put it into {'DIR' if data is None else data}/{task}.jsonl, rows with the columns of the stock data set, "
        )
        way = f"{rows}and name the folder with --task_data, or " if _takes_rows(task) else ""
        raise UserError(
            f"The data of task {task} cannot be had here ({_said(error)}); {way}fill the cache of Hugging Face where "
            f"there is a network."
        ) from error


def _takes_rows(task: str) -> bool:
    """Whether the harness lets the data of a task be replaced: not of one that is a class, or that makes its own."""
    return not _stock().task_index[task].cfg.keys() & {"class", "custom_dataset"}


def _from_rows(task: str, path: Path, rows: list[dict], fewshot: int | None, folder: Path) -> dict[str, Any]:
    """The stock task with its data replaced by rows, which are written to `folder` in the types that they have."""
    if not _takes_rows(task):
        raise UserError(
            f"Task {task} of lm-eval takes no rows but its own; remove {path} (--tasks table4 reads rows of its tasks)."
        )
    stock = _stock().task_index[task]
    config, examples = stock.cfg, stock.cfg.get("fewshot_config") or {}
    own_examples = "samples" in examples and "split" not in examples  # written out in the task
    shots = config.get("num_fewshot") or 0 if fewshot is None else fewshot
    if shots and not own_examples:
        raise UserError(
            f"Task {task} begins with {shots} worked examples of a split that {path} does not hold; measure it without "
            f"them: --fewshot 0."
        )
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    split = "test" if config.get("test_split") else "validation"  # the one that the harness evaluates
    override = {
        "include": str(stock.yaml_path),
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: glob.escape(str(folder / "rows.parquet"))},
            "cache_dir": str(folder / "cache"),
        },
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
        "fewshot_split": None,
    }
    if not own_examples:
        override["fewshot_config"] = None
    (folder / "task.yaml").write_text(json.dumps(override))  # JSON is YAML
    loaded = TaskManager(include_path=folder, include_defaults=False).load([task])
    read = loaded["tasks"][task]
    for part in (read.config.doc_to_text, read.config.doc_to_target, read.config.doc_to_choice):
        # The harness takes the name of a column that is not there for the text itself.
        if isinstance(part, str) and part.isidentifier() and part not in read.features:
            raise UserError(f"{path}: task {task} reads the column {part!r}, which not every row has; add it.")
    if read.OUTPUT_TYPE == "multiple_choice" and not callable(read.config.process_results):
        for number, doc in enumerate(read.eval_docs, 1):
            _check_target(read, doc, f"{path}, document {number}")
    return loaded


def _check_target(task: Task, doc: dict, where: str) -> None:
    """The harness counts each answer to a question as wrong whose target is none of its choices."""
    choices = task.doc_to_choice(doc)
    targets = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for target in targets if isinstance(targets, list) else [targets]:
        if not (target in choices if isinstance(target, str) else 0 <= target < len(choices)):
            raise UserError(f"{where}: the target {target!r} is none of the {len(choices)} choices; mend that row.")


def _set_fewshot(task: Task, name: str, fewshot: int | None) -> None:
    fixed = task.get_config("num_fewshot") == 0
    if fewshot and fixed:
        raise UserError(f"Task {name} is one without worked examples; leave --fewshot out.")
    if fewshot is not None:
        task.set_config("num_fewshot", fewshot)
    task.set_fewshot_seed(SEEDS["fewshot"])


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The random numbers that tasks draw are the same each time; afterwards the process goes on with its own."""
    before = random.getstate(), np.random.get_state()
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextlib.contextmanager
def _offline(yes: bool):
    """Keeps the data sets library from asking the network, in vain for half a minute where there is none.

    It reads the environment once, when it is imported; afterwards these two decide.
    """
    places = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place, value in zip(places, before, strict=True):
        place.HF_HUB_OFFLINE = value or yes
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@functools.cache
def _hub_answers() -> bool:
    """Whether the Hugging Face hub takes a connection from here."""
    where = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((where.hostname, where.port or 443), timeout=5).close()
    except OSError:
        return any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))  # it may know a way
    return True
