"""What a run records: its environment, one JSON line per logged step, and TensorBoard or Weights & Biases if asked."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from gdn_jax.config import Experiment, Run, flat, to_dict
from gdn_jax.errors import UserError
from gdn_jax.files import write_text
from pallas_kernels.roofline import data_sheet_flops

HERE = Path(__file__).resolve().parent.parent
SOURCES = ("gdn_jax", "pallas_kernels", "experiments")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict[str, Any]:
    """Versions, commit, hash of the source, devices and date, which are stored with every result."""
    commit, dirty = _commit()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "source": source_hash(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }


@functools.cache
def source_hash(packages: tuple[str, ...] = SOURCES) -> str:
    """Hash of the packages' Python files, 8 hex digits: the same in a checkout, a copy without git and a wheel."""
    digest = hashlib.sha256()
    files = sorted(path.relative_to(HERE).as_posix() for name in packages for path in (HERE / name).rglob("*.py"))
    for name in files:
        content = (HERE / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:8]


def _commit() -> tuple[str, bool]:
    """(short hash, uncommitted changes) of the checkout this package lies in; ("unknown", False) outside one.

    Published results decide nothing that is measured: one of them that was replaced is no change.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != HERE:
            return "unknown", False
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)experiments/results")
        return git("rev-parse", "--short", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def peak_flops() -> float | None:
    """bf16 peak of all devices together by the data sheet, or None for a kind without an entry."""
    peak = data_sheet_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()


class Writer:
    """Appends rows to metrics.jsonl and to the sinks that run.tensorboard and run.wandb ask for.

    Opening truncates to the rows up to `step`: what a resumed run will write again is not written twice.
    """

    def __init__(self, directory: Path, experiment: Experiment, step: int):
        self.path = directory / "metrics.jsonl"
        self._rewrite([row for row in read_rows(directory) if row["step"] <= step])
        self._tensorboard = _tensorboard(directory, step) if experiment.run.tensorboard else None
        self._wandb = _wandb(directory, experiment) if experiment.run.wandb else None

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self.path.open("a", buffering=1)

    def back_to(self, step: int) -> None:
        """Takes back the rows after `step`, but for those of rewinds to it; the sinks keep theirs."""
        self._file.close()
        rows = read_rows(self.path.parent)
        self._rewrite([row for row in rows if row["step"] <= step or row.get("event") == "rewind"])

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, which has the key "step"."""
        with self._named():
            self._file.write(json.dumps(row) + "\n")
        scalars = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, row["step"])
        if self._wandb is not None and scalars:
            self._wandb.log(scalars, step=row["step"])

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a failed write does not know its file
            error.filename = error.filename or str(self.path)
            raise

    def close(self) -> None:
        with self._named():  # it writes what is left
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoWriter:
    """Writes nothing: for the processes that do not own the run."""

    def write(self, row: dict[str, Any]) -> None: ...

    def back_to(self, step: int) -> None: ...

    def close(self) -> None: ...


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line cut short by a crash is left out, any other is a UserError."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    rows, lines = [], path.read_bytes().rstrip(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is no row of a run; remove that line alone.") from None
        else:
            rows.append(row)
    return rows


def check_sinks(run: Run) -> None:
    """Raises UserError where a library that run.tensorboard or run.wandb needs is not installed."""
    for field, value, library in (
        ("tensorboard", run.tensorboard, "tensorboardX"),
        ("wandb", run.wandb, "wandb"),
    ):
        if value and importlib.util.find_spec(library) is None:
            raise UserError(
                f"run.{field} is {value!r}, which needs {library}; install it with: pip install 'gdn_jax[logging]'."
            )


def _tensorboard(directory: Path, step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)


def _wandb(directory: Path, experiment: Experiment) -> Any:
    import wandb

    return wandb.init(
        project=experiment.run.wandb,
        id=f"{experiment.id.replace('/', '-')}-{experiment.hash8}",
        dir=str(directory),
        resume="allow",
        config=flat(to_dict(experiment)),
    )
