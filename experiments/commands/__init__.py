"""What each `gdn` command does, one module a topic; run.py names and calls them.

JAX, Flax and the training stack load inside the commands that need them: help and mistakes answer at once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import experiments
from experiments.report import aligned
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError


class Stopped(Exception):
    """A signal stopped a command that has said what it kept."""

    def __init__(self, sentence: str, code: int):
        super().__init__(sentence)
        self.code = code


def of_run(name: str) -> Experiment:
    """The experiment of an ID, or the one that a run's directory holds, whose run.dir it then is."""
    directory = Path(name)
    if name in experiments.EXPERIMENTS or not directory.is_dir():
        return experiments.get(name)
    from gdn_jax.checkpoint import read_config

    if holds_foreign_config(directory):
        raise UserError(
            f"{name} is a Hugging Face directory, not a run; import it first: gdn convert import {name} --out DIR."
        )
    experiment = read_config(directory)
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, dir=name))


def holds_foreign_config(directory: Path) -> bool:
    """Whether its config.json is one of Hugging Face's, which name a model_type."""
    try:
        tree = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
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
