"""What each `gdn` command does, one module a topic; run.py names and calls them.

JAX, Flax and the training stack load inside the commands that need them: help and mistakes answer at once.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import experiments
from experiments import own
from experiments.report import aligned
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError


class Stopped(Exception):
    """A signal stopped a command; the message says what was kept."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


def named(word: str) -> Experiment:
    """The experiment that a word names: an ID, the directory of a run (which becomes its run.dir), or FILE:NAME.

    NAME is an Experiment in the user's file, or the directory of a run that needs the file.
    """
    if word in experiments.EXPERIMENTS:
        return experiments.get(word)
    if Path(word).is_dir():
        return _of_directory(word)
    if not own.names_file(word):
        return experiments.get(word)
    module, file, name = own.read(word)
    if name not in vars(module) and Path(name, "config.json").is_file():
        return dataclasses.replace(_of_directory(name), file=file)
    return dataclasses.replace(own.experiment_of(module, file, name), file=file)


def _of_directory(name: str) -> Experiment:
    from gdn_jax.checkpoint import read_config

    if holds_foreign_config(Path(name)):
        raise UserError(
            f"{name} is a Hugging Face directory, not a run; import it first: gdn convert import {name} --out DIR."
        )
    experiment = read_config(Path(name))
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, dir=name))


def say_if_changed(experiment: Experiment) -> None:
    """Warns on stderr where the file of a run's own mixers has changed since the run was trained."""
    if not (experiment.file and experiment.model.own):
        return
    from gdn_jax.checkpoint import changed_file, read_config
    from gdn_jax.runs import run_directory

    directory = run_directory(experiment)
    found = read_config(directory) if (directory / "config.json").exists() else experiment
    if changed_file(found, experiment):
        print(
            f"{experiment.file.path} has changed since {directory} began (sha256 {found.file.sha256[:8]} then, "
            f"{experiment.file.sha256[:8]} now): its mixers may compute something else.",
            file=sys.stderr,
        )


def holds_foreign_config(directory: Path) -> bool:
    """Whether the directory's config.json is one of Hugging Face's, which name a model_type."""
    try:
        tree = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and "model_type" in tree


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """One flat object, as JSON or as a table for a reader."""
    print(json.dumps(facts, indent=1) if as_json else aligned([(name, _readable(x)) for name, x in facts.items()]))


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float) and value >= 1e6:
        return f"{value:.4g}"
    large = isinstance(value, int) and not isinstance(value, bool) and value >= 10_000
    return f"{value:,}" if large else str(value)
