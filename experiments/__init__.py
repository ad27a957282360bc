"""One ID = one fully resolved Experiment; nothing else decides a number."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from experiments import ablations, smoke, table3
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


EXPERIMENTS = collect([*smoke.EXPERIMENTS, *table3.EXPERIMENTS, *ablations.EXPERIMENTS])


def get(id: str) -> Experiment:
    """The experiment of an ID, or a UserError with the nearest one."""
    if id not in EXPERIMENTS:
        raise UserError(f"There is no experiment {id!r}{nearest(id, EXPERIMENTS)}; `gdn list` shows all.")
    return EXPERIMENTS[id]


def find(glob: str = "*") -> list[Experiment]:
    """The experiments whose IDs match a shell pattern such as `table3/*`, in order."""
    return [experiment for id, experiment in EXPERIMENTS.items() if fnmatchcase(id, glob)]
