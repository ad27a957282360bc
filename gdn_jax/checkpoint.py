"""Orbax checkpoints of a run: parameters, optimizer state, step, data position and config, written asynchronously.

A checkpoint of step n holds the state after n updates, so the next batch is number n: the data position is the step.
A write that was cut off leaves no finished step behind; the one before it is the latest.
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gdn_jax.config import Experiment, canonical, flat, from_dict, to_dict
from gdn_jax.errors import UserError
from gdn_jax.model import LM, abstract_model
from gdn_jax.tree import named_leaves, with_leaves

MODEL = "model"
OPTIMIZER = "optimizer"


class Checkpoints:
    """The checkpoints below `directory`; `experiment` is what a save records and a load must agree with."""

    def __init__(self, directory: Path, experiment: Experiment):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file it touches
        self._experiment = experiment
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(experiment.run.keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest finished step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, model: Any, optimizer: Any) -> None:
        """Begins to write a checkpoint and returns; a write still going on is waited for first."""
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                {MODEL: named_leaves(model), OPTIMIZER: named_leaves(optimizer)},
                force=True,
                overwrite=True,
                custom_metadata={"step": step, "batch": step, "experiment": to_dict(self._experiment)},
            )
        except OSError as error:
            raise self._no_write(step, error) from error

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong in it."""
        try:
            self._checkpointer.wait()
        except OSError as error:
            raise self._no_write(self.latest, error) from error

    def close(self) -> None:
        """Finishes the write under way."""
        self.wait()
        self._checkpointer.close()

    def load(self, step: int, model: Any, optimizer: Any) -> tuple[Any, Any]:
        """(model, optimizer state) of `step`, placed like the given abstract ones (shapes with shardings)."""
        return tuple(self._load(step, {MODEL: model, OPTIMIZER: optimizer}).values())

    def load_model(self, step: int, model: LM) -> LM:
        """The parameters alone."""
        return self._load(step, {MODEL: model})[MODEL]

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        where = self._directory / str(step)
        again = f"remove {where} to go on from the checkpoint before it"
        try:
            metadata = self._checkpointer.checkpointables_metadata(step)
            saved = metadata.custom_metadata or {}
            if "experiment" not in saved:
                raise UserError(f"{where} is an Orbax checkpoint of another program; give the run another directory.")
            check_same(from_dict(Experiment, saved["experiment"]), self._experiment, where)
            found = self._checkpointer.load_checkpointables(
                step, {name: named_leaves(tree) for name, tree in wanted.items()}
            )
            return {name: with_leaves(tree, found[name]) for name, tree in wanted.items()}
        except (ValueError, KeyError, TypeError, OSError, ocp.training.errors.StepNotFoundError) as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise UserError(f"The checkpoint {where} cannot be read ({reason}); {again}.") from error

    def _no_write(self, step: int | None, error: OSError) -> UserError:
        return UserError(
            f"The checkpoint of step {step} cannot be written to {self._directory} ({error.strerror or error}); make "
            f"room there and run the same command again: it goes on from the last finished one."
        )


def check_same(found: Experiment, wanted: Experiment, where: Path) -> None:
    """Both decide the same numbers, or a UserError that names the fields that differ."""
    if canonical(found) == canonical(wanted):
        return
    ours, theirs = (flat(to_dict(e)) for e in (wanted, found))
    decides = [key for key in {**ours, **theirs} if not key.startswith("run.") or key == "run.seed"]
    differing = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} asked)"
        for key in decides
        if key != "id" and theirs.get(key) != ours.get(key)
    ]
    raise UserError(
        f"{where} belongs to another configuration of {found.id}: {', '.join(differing[:4])}; choose another --run.dir."
    )


def read_config(run_dir: Path) -> Experiment:
    """The experiment that a run directory was made for."""
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir} holds no run (there is no config.json); train it first with `gdn train ID`.")
    try:
        return from_dict(Experiment, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove {run_dir} and train again.") from error


def load(run_dir: Path, step: int | None = None) -> tuple[Experiment, LM, int]:
    """(experiment, model, step) of a run's newest checkpoint, or of `step`, on the default device."""
    experiment = read_config(run_dir)
    directory = run_dir / "checkpoints"
    checkpoints = Checkpoints(directory, experiment)
    step = checkpoints.latest if step is None else step
    if step is None:
        raise UserError(f"{run_dir} holds no finished checkpoint; train it first with `gdn train {experiment.id}`.")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_model(experiment.model)
    )
    model = checkpoints.load_model(step, abstract)
    checkpoints.close()
    return experiment, model, step
