"""Safetensors files in and out, one tensor in memory at a time; a pickle is never opened."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gdn_jax.errors import UserError
from gdn_jax.files import write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16")
SHARD_BYTES = 1 << 29  # of a written file; what one file holds is in memory once more while it is written


def library() -> Any:
    """The safetensors package, or a UserError that says how to install it."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError(
            "Checkpoints need the library safetensors; install it with: pip install 'gdn_jax[hf]'."
        ) from None
    return safetensors


class Tensors:
    """The tensors of a .safetensors file, or of a directory of them, by name.

    `shapes` and `dtypes` come from the files' headers; `read` maps the tensor's bytes and copies nothing.
    """

    def __init__(self, source: Path, stack: contextlib.ExitStack):
        package = library()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for path in _shards(source):
            try:
                opened = stack.enter_context(package.safe_open(path, framework="np"))
                for name in opened.keys():  # noqa: SIM118  no mapping, it has this method only
                    if name in self.shapes:
                        raise UserError(f"{source} holds the tensor {name} twice; remove the files that do not belong.")
                    part = opened.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                    self._files[name] = opened
            except FileNotFoundError:
                raise UserError(f"{path} is missing although {INDEX} names it; download it again.") from None
            except package.SafetensorError as error:
                raise UserError(f"{path} is no whole safetensors file ({error}); download it again.") from None

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored."""
        return self._files[name].get_tensor(name)


def _shards(source: Path) -> list[Path]:
    if not source.exists():
        raise UserError(
            f"There is no file or directory {str(source)!r}; give a .safetensors file or a directory that holds some."
        )
    if source.is_file():
        if source.suffix in PICKLES:
            raise _pickle(source)
        return [source]
    index = source / INDEX
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("a file outside the directory")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error}); download it again.") from None
        return [source / name for name in sorted(names)]
    if found := sorted(source.glob("*.safetensors")):
        return found
    if pickles := sorted(path for path in source.iterdir() if path.suffix in PICKLES):
        raise _pickle(pickles[0])
    raise UserError(f"{source} holds no .safetensors file; give the directory of a checkpoint.")


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which may run any code when opened, and is never loaded; where you trust it, make "
        f"safetensors of it with torch: safetensors.torch.save_file({{k: v.clone() for k, v in "
        f"torch.load({path.name!r}, weights_only=True).items()}}, {SINGLE!r})."
    )


class Shards:
    """Writes tensors to numbered .safetensors files with an index, or to one file when they fit."""

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES):
        self._directory, self._limit = directory, shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._written: list[list[str]] = []  # names of the tensors of each file
        self._bytes = self.total_bytes = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """One tensor; it is copied only where its memory is not contiguous."""
        if self._pending and self._bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = np.ascontiguousarray(tensor)
        self._bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> int:
        """Writes what is left and the index; returns the number of files."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._path(0).rename(self._directory / SINGLE)
            return 1
        weight_map = {}
        for i, names in enumerate(self._written):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._path(i).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        write_json(self._directory / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})
        return count

    def _path(self, i: int) -> Path:
        return self._directory / f"shard-{i}.safetensors"

    def _flush(self) -> None:
        path, package = self._path(len(self._written)), library()
        try:
            package.numpy.save_file(self._pending, path, metadata={"format": "pt"})
        except package.SafetensorError as error:
            raise UserError(
                f"{path} cannot be written ({error}); make room there and run the same command again."
            ) from None
        path.chmod(self._directory.stat().st_mode & 0o666)  # the library makes files for their owner alone
        self._written.append(list(self._pending))
        self._pending, self._bytes = {}, 0


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, and is gone when it does not."""
    partial = out.with_name(f"{out.name}.partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out, or delete it.")
    if partial.exists():
        raise UserError(f"{partial} is left from a command that was killed, or is being written; delete it first.")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be made ({error.strerror}); choose another --out.") from None
    try:
        yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
