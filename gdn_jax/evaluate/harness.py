"""lm-evaluation-harness on a run: its tasks and metrics, our answers. Needs the extra `eval`; works without torch.

Data comes from the harness's own data sets, or from local files, <task>.jsonl or .jsonl.gz in a folder, with the
columns that the stock task reads: nothing is downloaded then.
"""

import contextlib
import functools
import logging
import os
import socket
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

from gdn_jax.errors import UserError, nearest
from gdn_jax.evaluate.answering import Answers
from gdn_jax.evaluate.rows import SUFFIXES

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: the harness's bars would break up our lines
try:
    import datasets
    import huggingface_hub
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError:
    raise UserError("Tasks need the library lm-eval; install it with: pip install 'gdn_jax[eval]'.") from None

VERSION = lm_eval.__version__


class HarnessModel(LM):
    """The harness's view of a run: three kinds of requests, passed on as text."""

    def __init__(self, answering: Answers):
        super().__init__()
        self._answering = answering

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answering.loglikelihood([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        return self._answering.rolling([request.args[0] for request in requests])

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, grouped by their options."""
        out, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):
            options = dict(request.args[1])
            if options.get("do_sample") or options.get("temperature", 0) or options.get("num_beams", 1) != 1:
                raise UserError(f"Task {request.task_name} asks for sampling or beams; only greedy decoding is built.")
            until = options.get("until", [])
            stops = (until,) if isinstance(until, str) else tuple(until)
            groups.setdefault((options.get("max_gen_toks", 256), stops), []).append(i)
        for (max_tokens, stops), indices in groups.items():
            prompts = [requests[i].args[0] for i in indices]
            found = self._answering.ask(
                prompts, max_tokens=max_tokens, stops=[stop for stop in stops if stop],
                max_length=self._answering.max_length,
            )  # fmt: skip
            for i, answer in zip(indices, found, strict=True):
                out[i] = answer.text
        return out


def evaluate_task(answers: Answers, task: str, *, data: Path | None = None, limit: int | None = None) -> dict[str, Any]:
    """{"version", "n", "of", "metrics": {"acc": 0.5, ...}} of one of the harness's tasks, zero-shot.

    data     folder of local files; a task without one there takes the harness's own data set
    limit    documents, at least one; None: all
    Raises UserError for an unknown task, a group of tasks, or data that cannot be had here.
    """
    if data is not None and not data.is_dir():
        raise UserError(f"{data} is no folder; give one that holds <task>.jsonl or <task>.jsonl.gz files.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    stock = _stock()
    if task not in stock.all_tasks:
        raise UserError(f"There is no task {task!r}{nearest(task, stock.all_tasks)} in lm-eval {VERSION}.")
    path = _local(data, task)
    with tempfile.TemporaryDirectory() as folder, _offline(path is not None or not _hub_answers()):
        manager = stock
        if path is not None:
            Path(folder, f"{task}.yaml").write_text(_override(task, stock.task_index[task], path))
            manager = TaskManager(include_path=folder, include_defaults=False)
        try:
            loaded = manager.load([task])
        except (OSError, ValueError, RuntimeError) as error:  # what the datasets library raises offline
            raise UserError(
                f"The data of task {task} cannot be had here ({str(error).splitlines()[0][:80]}); put it into "
                f"{'DIR' if data is None else data}/{task}.jsonl, rows with the columns of the stock data set, and "
                f"name the folder with --task_data, or fill the cache of Hugging Face where there is a network."
            ) from None
        results = lm_eval.evaluate(
            HarnessModel(answers), loaded, limit=limit, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
        )
    if task not in results["n-samples"]:
        raise UserError(f"{task} is a group of tasks; name its tasks one by one.")
    metrics = {name.removesuffix(",none"): value for name, value in results["results"][task].items()}
    return {
        "version": results["versions"].get(task),
        "n": results["n-samples"][task]["effective"],
        "of": results["n-samples"][task]["original"],
        "metrics": {
            name: value
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "sample_len" and "," not in name and "stderr" not in name
        },
    }


@functools.cache
def _stock() -> TaskManager:
    return TaskManager()


def _local(data: Path | None, task: str) -> Path | None:
    if data is None:
        return None
    return next((path for suffix in SUFFIXES if (path := data / f"{task}{suffix}").exists()), None)


def _override(task: str, entry: Any, path: Path) -> str:
    """The stock task with its data replaced by a local file."""
    split = "test" if entry.cfg.get("test_split") else "validation"  # the one that the harness evaluates
    lines = [
        f"include: {entry.yaml_path}",
        f"task: {task}",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{data_files: {{{split}: {path.resolve()}}}}}",
        "training_split: null",
        f"validation_split: {'validation' if split == 'validation' else 'null'}",
        f"test_split: {'test' if split == 'test' else 'null'}",
    ]
    return "\n".join(lines) + "\n"


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
