"""Where runs live, finding and opening one, and the data it names.

runs/<id>/<hash8>/   config.json  env.json  validation.json  metrics.jsonl  checkpoints/<step>
                     evaluation.json  result.json  loss.png
"""

import contextlib
import dataclasses
import fcntl
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import jax

from gdn_jax import checkpoint, data, prepare, tokenizer
from gdn_jax.config import Experiment, Run
from gdn_jax.errors import UserError
from gdn_jax.fingerprint import Identity
from gdn_jax.model import LM
from gdn_jax.progress import Progress
from gdn_jax.sources import BUILT_IN

ROOT = Path("runs")  # below the current directory


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A trained model with what belongs to it."""

    directory: Path
    experiment: Experiment  # as it was trained
    model: LM  # parameters of `step`, on the default device
    step: int
    trained_on: Identity
    tokenizer: tokenizer.Tokenizer

    @cached_property
    def prepared(self) -> data.Prepared:
        """The prepared data that the run names; other text by now where its fingerprint is not trained_on's."""
        return prepared_data(self.experiment)


def run_directory(experiment: Experiment) -> Path:
    """run.dir, or runs/<id>/<hash8> below the current directory."""
    return Path(experiment.run.dir or ROOT / experiment.id / experiment.hash8)


def find_run(name: str) -> Path:
    """The directory of a run: `name` itself, or the only run of the ID `name` below runs/.

    Raises UserError where there is none, or more than one.
    """
    directory = Path(name)
    if (directory / "config.json").exists():
        return directory
    found = sorted(path.parent for path in (ROOT / name).glob("*/config.json"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name} has {len(found)} runs; name one of them: {', '.join(map(str, found))}.")
    raise UserError(f"There is no run {name!r}, neither as a directory nor in {ROOT / name}; train it first.")


def open_run(name: str | Path, *, step: int | None = None) -> OpenRun:
    """The run `name`, an ID or a directory (a Path is always one), at its newest checkpoint or at that of `step`.

    Raises UserError where there is no such run or checkpoint, where it is damaged or of an older layout, and where the
    tokenizer is no longer the one that the run was trained with.
    """
    directory = find_run(name) if isinstance(name, str) else name
    words = tokenizer.load(checkpoint.read_config(directory).data.tokenizer)
    experiment, model, step, trained_on = checkpoint.load(directory, step)
    check_tokenizer(words, trained_on, directory)
    return OpenRun(directory, experiment, model, step, trained_on, words)


def check_tokenizer(words: tokenizer.Tokenizer, trained_on: Identity, directory: Path) -> None:
    """Raises UserError unless `words` is the tokenizer that the run was trained with."""
    if words.hash8 != trained_on.tokenizer:
        raise UserError(
            f"The run {directory} was trained with a tokenizer of hash {trained_on.tokenizer}, and {words.name!r} has "
            f"{words.hash8}: its ids mean other text; restore the former file."
        )


def prepared_data(experiment: Experiment, progress: Progress | None = None) -> data.Prepared:
    """The experiment's prepared data. A built-in source is prepared if need be; any other one must be there."""
    group = experiment.data
    directory = prepare.default_directory(group, experiment.run.data_root)
    if group.source in BUILT_IN and not (directory / "manifest.json").exists():
        prepare.prepare(group.source, directory, group.tokenizer, validation=group.validation, progress=progress)
    if not any((directory / name).exists() for name in ("manifest.json", "plan.json")):
        raise UserError(
            f"data.source {group.source!r} is not prepared in {directory}; run: gdn data prepare "
            f"{group.source if Path(group.source).exists() else 'SOURCE'} --out {directory} --tokenizer "
            f"{group.tokenizer} --validation {group.validation}."
        )
    tokens = tokenizer.load(group.tokenizer)
    prepared = data.open_prepared(directory, tokenizer_hash=tokens.hash8)
    prepare.check_source(group.source, directory, prepared.manifest)
    if prepared.vocab > experiment.model.vocab:
        raise UserError(
            f"model.vocab is {experiment.model.vocab}; it must be at least {prepared.vocab}, the tokens of "
            f"data.tokenizer {group.tokenizer!r}."
        )
    if not math.isclose(prepared.manifest["validation"], group.validation):
        raise UserError(
            f"data.validation is {group.validation} but {directory} was prepared with "
            f"{prepared.manifest['validation']}; use that, or prepare into another run.data_root."
        )
    return prepared


def keep_compiled(run: Run) -> None:
    """Keeps compiled programs in run.compile_cache, where later processes find them.

    Off where a CPU simulates several devices: jaxlib 0.10.2 was seen to crash while it wrote such a program.
    """
    if run.compile_cache and (jax.default_backend() != "cpu" or jax.device_count() == 1):
        jax.config.update("jax_compilation_cache_dir", str(Path(run.compile_cache).resolve()))


@contextlib.contextmanager
def locked(directory: Path, experiment: Experiment) -> Iterator[Experiment]:
    """Locks the run's directory for this process while it trains, after making or checking it.

    Yields the experiment that the run was started as, which may differ from `experiment` in how it is computed.
    """
    config = directory / "config.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in directory.iterdir()}
        if names and not names & {"config.json", "lock"}:
            raise _no_run(directory)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"The run's directory {directory} cannot be written ({error.strerror}); choose another run.dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is training in {directory}; wait for it, or choose another run.dir."
            ) from None
        began = experiment
        if config.exists():
            began = checkpoint.read_config(directory)
            checkpoint.check_same(began, experiment, directory)
        elif any(path.name != "lock" and not path.match("config.json.*.tmp") for path in directory.iterdir()):
            raise _no_run(directory)
        else:
            checkpoint.write_config(directory, experiment)
        yield began


def _no_run(directory: Path) -> UserError:
    return UserError(f"{directory} holds files but no run; choose another run.dir, or an empty one.")
