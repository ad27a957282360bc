"""All experiments by their IDs. An ID stands for one Experiment with every field set; nothing else decides a result."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from experiments import ablations, figure2, figure3, smoke, table2, table3, table4, table5
from experiments.models import PAPER_MODELS
from experiments.suites import Suite
from gdn_jax.config import Experiment
from gdn_jax.errors import UserError, nearest


def collect(experiments: Iterable[Experiment]) -> dict[str, Experiment]:
    """id -> Experiment in order; an id that occurs twice is a UserError."""
    found: dict[str, Experiment] = {}
    for experiment in experiments:
        if experiment.id in found:
            raise UserError(f"The experiment ID {experiment.id!r} is used twice; give one of the two another name.")
        found[experiment.id] = experiment
    return found


@dataclass(frozen=True)
class Evaluation:
    """An ID that evaluates the run of another one and trains nothing of its own."""

    id: str
    suite: Suite
    experiment: Experiment


EXPERIMENTS = collect([*smoke.EXPERIMENTS, *table3.EXPERIMENTS, *ablations.EXPERIMENTS])


# what evaluates a trained run, by name; table3's own ID trains, and its columns are asked for by `--tasks table3`
SUITES = {module.SUITE.name: module.SUITE for module in (table2, table3, table4, table5, figure2)}
EVALUATIONS = {
    f"{name}/{model}/{scale}": Evaluation(f"{name}/{model}/{scale}", suite, EXPERIMENTS[f"table3/{model}/{scale}"])
    for name, suite in SUITES.items()
    if name != "table3"
    for model in PAPER_MODELS
    for scale in table3.RECIPES
}

TIMINGS = {timing.id: timing for timing in figure3.TIMINGS}  # what times a training step, by ID


def get(id: str) -> Experiment:
    """The experiment of an ID that trains, or a UserError with the nearest one."""
    if id in EVALUATIONS:
        trains = EVALUATIONS[id].experiment.id
        raise UserError(f"{id} evaluates the run of {trains} and trains nothing; name {trains} here.")
    if id in TIMINGS:
        one = TIMINGS[id]
        command = f"gdn bench figure3 --models {one.model} --scale {one.scale}"
        raise UserError(f"{id} times the training step of {one.of.id} and trains nothing; run: {command}.")
    if id not in EXPERIMENTS:
        known = [*EXPERIMENTS, *EVALUATIONS, *TIMINGS]
        or_run = ", nor a run's directory of that name" if "/" in id and not nearest(id, known) else ""
        raise UserError(f"There is no experiment {id!r}{nearest(id, known)}{or_run}; `gdn list` shows all.")
    return EXPERIMENTS[id]


def find(glob: str = "*") -> list[Experiment]:
    """The experiments whose IDs match a shell pattern such as `table3/*`, in order."""
    return [experiment for id, experiment in EXPERIMENTS.items() if fnmatchcase(id, glob)]
