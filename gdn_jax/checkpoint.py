"""Orbax checkpoints of a run: parameters, optimizer state, step, config and data identity, written asynchronously.

A checkpoint of step n holds the state after n updates, so the next batch is number n: the data position is the step.
A write that was cut off leaves no finished step behind; the one before it is the latest. Checksums of all arrays and of
the metadata are written with it and verified whenever it is read.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from gdn_jax import alive, distributed
from gdn_jax.checksums import checksums
from gdn_jax.config import MIXER_FIELDS, Experiment, canonical, flat, from_dict, to_dict
from gdn_jax.disk import check_space, free_space, in_words
from gdn_jax.errors import Damaged, UserError
from gdn_jax.files import write_json
from gdn_jax.fingerprint import Identity
from gdn_jax.model import LM, abstract_model
from gdn_jax.reading import by_itself, failed_writes, silent
from gdn_jax.tree import named_leaves, with_leaves

LAYOUT = 2  # of run directories and checkpoints; another one is refused
MODEL = "model"
OPTIMIZER = "optimizer"
WRITE_BYTES = 1 << 27  # in flight to the disk, at least
FILES_BYTES = 1 << 17  # of a checkpoint's small files, and for each array what Orbax and the checksums note of it
ARRAY_BYTES = 1 << 10
NAMED = 4  # fields or runs in a refusal


class Checkpoints:
    """The checkpoints below `directory`; a save records `experiment` and `data`, and a load must agree with them.

    data    what the model is trained on; None for a reader, which may take parameters trained on any
    """

    def __init__(self, directory: Path, experiment: Experiment, *, writes: bool, data: Identity | None = None):
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of all reads that a failed one leaves behind
        self._failed = failed_writes()
        self._experiment = experiment
        self._data = data
        self._directory = directory
        self._checkpointer = None  # for a reader: Orbax's waits for all processes, and tidies the trainer's writes away
        if writes:
            self._checkpointer = ocp.training.Checkpointer(
                directory.resolve(),
                preservation_policy=ocp.training.preservation_policies.LatestN(experiment.run.keep),
                cleanup_tmp_directories=True,
            )

    @property
    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return max(self.steps(), default=None)

    def check_space(self, size: int, saves: int) -> None:
        """A UserError where the disk has no room for the next `saves` checkpoints of `size` bytes each.

        At most run.keep of them and the one being written exist at once; those that are there already count.
        """
        held, keep = len(self._checkpointer.checkpoints), self._experiment.run.keep
        new = most_new(held, saves, keep)
        free = free_space(self._directory)
        fewer = [n for n in range(keep - 1, 0, -1) if free is not None and most_new(held, saves, n) * size <= free]
        check_space(
            self._directory,
            new * size,
            f"The checkpoints ({new} more of {in_words(size)}, as run.keep is {keep} and one is being written)",
            f"free some,{f' keep fewer with --run.keep {fewer[0]},' if fewer else ''} or choose another --run.dir",
        )

    def save(self, step: int, model: Any, optimizer: Any = None, spikes: dict | None = None) -> None:
        """Begins to write a checkpoint and returns; a write still going on is waited for first.

        Without an optimizer state it can be evaluated, not trained on. `spikes` is what spikes.Watch records. Raises
        UserError, and writes nothing, where the disk has no room for it.
        """
        state = {MODEL: named_leaves(model)} | ({} if optimizer is None else {OPTIMIZER: named_leaves(optimizer)})
        metadata = {
            "layout": LAYOUT,
            "step": step,
            "experiment": to_dict(self._experiment),
            "data": self._data._asdict(),
            "checksums": {name: checksums(leaves) for name, leaves in state.items()},
            "spikes": spikes,
        }
        self.wait()
        way_out = f"free some and run the same command again: it goes on from {self._last()}"
        size, what = checkpoint_bytes(*state.values()), f"The checkpoint of step {step}"
        distributed.on_every(lambda: check_space(self._directory, size, what, way_out))
        self._failed.error = None
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                state,
                force=True,
                overwrite=True,
                custom_metadata=metadata | {"sha256": _sha256(metadata)},
            )
        except (OSError, ValueError) as error:  # the write before it may be the one that failed
            raise self._no_write(error) from error

    def back_from(self, step: int, every: int) -> int:
        """The newest step before `step` that was saved because `every` divides it, or 0; later checkpoints are deleted.

        One that a stop signal asked for is taken only where there is no other, so that a run that was stopped and went
        on goes back as far as one that was not. All processes must call it.
        """
        self.wait()
        usual, steps = (step - 1) // every * every, self.steps()
        back = usual if usual == 0 or usual in steps else max((one for one in steps if one < step), default=0)
        back = int(distributed.gathered(str(back))[0])
        if distributed.first():
            for one in steps:
                if one > back:
                    shutil.rmtree(self._directory / str(one))
        distributed.gathered("")  # until it is done
        self._checkpointer.reload()
        return back

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong in it, also where it went well for others."""
        try:
            while self._checkpointer.is_saving_in_progress():
                if self._failed.error:
                    raise self._failed.error
                time.sleep(0.01)
            self._checkpointer.wait()
        except (OSError, ValueError) as error:
            raise self._no_write(error) from error

    def close(self) -> None:
        """Finishes the write under way."""
        if self._checkpointer is not None:
            self.wait()
            self._checkpointer.close()

    def load(self, step: int, model: Any, optimizer: Any) -> tuple[Any, Any]:
        """(model, optimizer state) of `step` to go on from, placed like the given abstract ones.

        All processes must call it. Raises Damaged in all where any of them reads something else than was written, and
        UserError where they were trained on other data.
        """
        wanted = {MODEL: model, OPTIMIZER: optimizer}

        def read() -> tuple[_Saved, dict[str, Any]]:
            trained_on = self.check(step).fingerprint
            if trained_on != self._data.fingerprint:
                raise UserError(
                    f"{self._directory / str(step)} was trained on data {_short(trained_on)}, the data prepared now "
                    f"are {_short(self._data.fingerprint)}; prepare the former text again, or choose another run.dir."
                )
            return self._read(step, wanted)

        saved, found = distributed.on_every(read)
        sums = {name: checksums(leaves) for name, leaves in found.items()}  # by all processes together
        distributed.on_every(lambda: self._compare(step, saved, sums))
        return tuple(with_leaves(tree, found[name]) for name, tree in wanted.items())

    def set_aside(self, step: int) -> Path:
        """Moves the checkpoint of `step` out of the way, to where it is returned. All processes must call it."""
        aside = self._directory.parent / f"damaged-{step}"
        if distributed.first():
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        distributed.gathered("")  # until it is done
        self._checkpointer.reload()
        return aside

    def load_model(self, step: int, model: LM) -> tuple[LM, Identity]:
        """The parameters alone, and the data they were trained on."""
        saved, found = self._read(step, {MODEL: model})
        self._compare(step, saved, {MODEL: checksums(found[MODEL])})
        return with_leaves(model, found[MODEL]), saved.data

    def _read(self, step: int, wanted: dict[str, Any]) -> tuple["_Saved", dict[str, Any]]:
        """What this process reads, by itself: arrays by the names of `wanted` and of its leaves."""
        where = self._directory / str(step)
        names = {name: named_leaves(tree) for name, tree in wanted.items()}
        with silent():
            saved = self._saved(step)
            if other := _other_shape(saved.shapes, {name: leaf.shape for name, leaf in names[MODEL].items()}):
                raise UserError(
                    f"The checkpoint {where} is damaged, or its model's code has changed: {other}; restore that code, "
                    f"or {self._way_out(step)}."
                )
            found: dict[str, Any] = {}
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError), by_itself():
                found = ocp.load_checkpointables(where.resolve(), names)
            if any(set(found.get(name, ())) != set(leaves) for name, leaves in names.items()):
                raise Damaged(f"The checkpoint {where} is damaged; {self._way_out(step)}.")
        return saved, {name: found[name] for name in names}

    def _compare(self, step: int, saved: "_Saved", sums: dict[str, dict[str, str]]) -> None:
        """Raises Damaged unless the arrays' checksums are those that were saved."""
        for name, now in sums.items():
            then = saved.checksums.get(name, {})
            if altered := [leaf for leaf in now if now[leaf] != then.get(leaf)]:
                raise Damaged(
                    f"The checkpoint {self._directory / str(step)} is damaged: {name}/{altered[0]} is not what was "
                    f"written (checksum {now[altered[0]]}); {self._way_out(step)}."
                )

    def check(self, step: int) -> Identity:
        """What data the checkpoint of `step` was trained on; a UserError where it is not one of this experiment."""
        return self._saved(step).data

    def checksums(self, step: int) -> dict[str, str]:
        """{name of a parameter: its checksum} for all parameters of `step`."""
        return self._saved(step).checksums[MODEL]

    def spikes(self, step: int) -> dict | None:
        """What was recorded of spikes up to `step`; None in a checkpoint of before there was such a record."""
        return self._saved(step).spikes

    def _saved(self, step: int) -> "_Saved":
        where, foreign = self._directory / str(step), False
        if step not in self.steps():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self._directory} holds no checkpoint of step {step}; there are {steps}.")
        try:
            with silent():
                found = ocp.checkpointables_metadata(where.resolve())
            metadata = dict(found.custom_metadata or {})
            foreign = not metadata and _json(where / "_CHECKPOINT_METADATA")
            if "experiment" in metadata and metadata.get("layout") != LAYOUT:
                raise older(where, metadata.get("layout"))
            if metadata.pop("sha256") != _sha256(metadata):
                raise ValueError("altered metadata")
            leaves = found.metadata[MODEL] or {}  # nothing of a damaged one
            shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
            experiment = from_dict(Experiment, metadata["experiment"])
            data, spikes = Identity(**metadata["data"]), metadata.get("spikes")
            saved = _Saved(experiment, data, metadata["checksums"], shapes, spikes)
        except OlderLayout:
            raise
        except (ValueError, KeyError, TypeError, OSError, UserError):
            kind = UserError if foreign else Damaged
            raise kind(f"{where} is another program's checkpoint or damaged; {self._way_out(step)}.") from None
        check_same(saved.experiment, self._experiment, where)
        return saved

    def steps(self) -> list[int]:
        """Of all finished checkpoints, the oldest first."""
        if self._checkpointer is None:
            return self._on_disk()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def _on_disk(self) -> list[int]:
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def _way_out(self, step: int) -> str:
        before = max((other for other in self.steps() if other < step), default=None)
        then = "begin again" if before is None else f"go on from step {before}"
        return f"move {self._directory / str(step)} away to {then}"

    def _no_write(self, error: Exception) -> UserError:
        alive.end_if_left(error)
        reason = "no space left" if "RESOURCE_EXHAUSTED" in str(error) else getattr(error, "strerror", None)
        reason = reason or str(error).partition("\n")[0][:120]
        return UserError(
            f"A checkpoint cannot be written to {self._directory} ({reason}); make room there and run the same "
            f"command again: it goes on from {self._last()}."
        )

    def _last(self) -> str:
        """What another start goes on from; Orbax counts a step whose write has failed until all have ended theirs."""
        last = max(self._on_disk(), default=None)
        return "the start" if last is None else f"step {last}"


def checkpoint_bytes(*trees: Any) -> int:
    """The most bytes that one checkpoint of these trees (of arrays or of their shapes) takes on disk."""
    leaves = jax.tree.leaves(trees)
    return sum(leaf.size * leaf.dtype.itemsize + ARRAY_BYTES for leaf in leaves) + FILES_BYTES


def most_new(held: int, saves: int, keep: int) -> int:
    """How many new checkpoints exist at once, beside the `held` ones, while `saves` are written and `keep` are kept."""
    return min(saves, max(1, keep + 1 - held))


class _Saved(NamedTuple):
    """What a checkpoint says of itself."""

    experiment: Experiment
    data: Identity
    checksums: dict[str, dict[str, str]]
    shapes: dict[str, tuple[int, ...]]  # of its parameters
    spikes: dict | None


class OlderLayout(UserError):
    """A run or checkpoint in the file layout of another version of this library, which is refused, not misread."""


def older(where: Path, layout: object) -> OlderLayout:
    """The error for a run or checkpoint of another layout; files of the first layout carry no number."""
    return OlderLayout(
        f"{where} is of layout {layout or 1}, and this version reads layout {LAYOUT} alone; train again in another "
        f"run.dir, or use the version that wrote it."
    )


def _other_shape(there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]]) -> str | None:
    """The first parameter that is not the same in both; None where nothing is known of `there`."""
    if not there:
        return None
    for name in [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        then, now = ("no parameter" if shape is None else list(shape) for shape in (there.get(name), here.get(name)))
        return f"{name} is {then} there and {now} here"
    return None


def _json(path: Path) -> bool:
    with contextlib.suppress(ValueError, OSError):
        return bool(json.loads(path.read_bytes()))
    return False


def _sha256(metadata: dict) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _short(fingerprint: str | None) -> str:
    return "of another program" if fingerprint is None else fingerprint[:8]


def check_same(found: Experiment, wanted: Experiment, where: Path) -> None:
    """Raises UserError, naming the fields, where the two experiments differ in what decides a result."""
    if canonical(found) == canonical(wanted):
        return
    ours, theirs = (flat(to_dict(e)) for e in (wanted, found))
    groups, others = ("model.", "optim.", "data."), ("run.seed", "start.sha256")
    differing = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} asked)"
        for key in {**ours, **theirs}
        if (key.startswith(groups) or key in others) and theirs.get(key) != ours.get(key)
    ]
    changed = f" ({wanted.file.path} has changed since)" if changed_file(found, wanted) else ""
    raise UserError(
        f"{where} belongs to another configuration of {found.id}: {', '.join(differing[:NAMED])}{changed}; choose "
        f"another run.dir."
    )


def changed_file(found: Experiment, wanted: Experiment) -> bool:
    """Whether both were read from the user's own file and that file has changed in between."""
    return bool(found.file and wanted.file and found.file.sha256 != wanted.file.sha256)


def write_config(run_dir: Path, experiment: Experiment) -> None:
    """Writes config.json, which makes a directory a run."""
    write_json(run_dir / "config.json", {"layout": LAYOUT} | to_dict(experiment))


def read_config(run_dir: Path) -> Experiment:
    """The experiment that a run directory was made for."""
    path = run_dir / "config.json"
    if not path.exists():
        beside = [] if run_dir.parent == Path() else sorted(str(p.parent) for p in run_dir.parent.glob("*/config.json"))
        others = f", or name another run: {', '.join(beside[:NAMED])}" if beside else ""
        raise UserError(
            f"{run_dir} holds no run (there is no config.json); train it first with `gdn train ID`{others}."
        )
    tree = None
    try:
        tree = json.loads(path.read_text())
        if isinstance(tree, dict) and "model" in tree and (layout := tree.pop("layout", None)) != LAYOUT:
            raise older(path, layout)
        return from_dict(Experiment, tree)
    except OlderLayout:
        raise
    except (ValueError, RecursionError, UserError) as error:
        if needed := _missing_mixer(tree, run_dir):
            raise UserError(needed) from None
        reason = str(error).rstrip(".")
        raise UserError(f"{path} is damaged ({reason}); restore it, or choose another run.dir.") from None


def load(run_dir: Path, step: int | None = None) -> tuple[Experiment, LM, int, Identity]:
    """(experiment, model, step, data trained on) of a run's newest checkpoint, or of `step`, on one device."""
    experiment = read_config(run_dir)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_model(experiment.model)
    )
    with contextlib.closing(reader(run_dir, experiment)) as checkpoints:
        step = checkpoints.latest if step is None else step
        model, data = checkpoints.load_model(step, abstract)
    return experiment, model, step, data


def _missing_mixer(tree: Any, run_dir: Path) -> str | None:
    """What is needed for a configuration whose mixer comes from outside and has not been added here."""
    with contextlib.suppress(KeyError, TypeError):
        unknown = [mixer for mixer in tree["model"]["pattern"] if mixer not in MIXER_FIELDS]
        if unknown and tree["model"]["own"]:
            file = (tree["file"] or {"path": "FILE.py"})["path"]
            return (
                f"{run_dir} is a run of a model with the mixer {unknown[0]!r}, which a file of yours adds; name that "
                f"file with the run, gdn COMMAND {file}:{run_dir}, or import it first in Python."
            )
    return None


def reader(run_dir: Path, experiment: Experiment) -> Checkpoints:
    """Opens a run's checkpoints for reading; the caller closes them. UserError where there is none."""
    directory = run_dir / "checkpoints"
    checkpoints = Checkpoints(directory, experiment, writes=False) if directory.is_dir() else None
    if checkpoints is None or checkpoints.latest is None:
        if checkpoints:
            checkpoints.close()
        raise UserError(f"{run_dir} holds no finished checkpoint; train it first with `gdn train {experiment.id}`.")
    return checkpoints


def write(run_dir: Path, experiment: Experiment, model: LM, step: int, data: Identity) -> None:
    """Makes a run of a model that was not trained here: config.json and one checkpoint, without optimizer state."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(run_dir, experiment)
    # Without a limit the writer holds every array compressed, which is nearly the model once more.
    context = ocp.Context()
    largest = max(leaf.nbytes for leaf in named_leaves(model).values())
    context.memory.write_concurrent_bytes = max(largest + 1, WRITE_BYTES)  # less than one array is an error
    directory = run_dir / "checkpoints"
    with context, contextlib.closing(Checkpoints(directory, experiment, writes=True, data=data)) as checkpoints:
        checkpoints.save(step, model)
