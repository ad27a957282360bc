"""FILE:NAME, an Experiment in the user's own file, which is run only when the command line names it so."""

import contextlib
import functools
import hashlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from gdn_jax.config import Experiment
from gdn_jax.errors import UserError, nearest
from gdn_jax.origin import File

SUFFIX = ".py"
SHOWN = 200  # characters of another program's message


def names_file(word: str) -> bool:
    """Whether a word is FILE:NAME or a file without a name; no ID has a colon."""
    return ":" in word or word.endswith(SUFFIX)


def read(word: str) -> tuple[ModuleType, File, str]:
    """The module, its file and NAME of FILE:NAME; a UserError where there is no such file or it fails."""
    name, _, wanted = (word, "", "") if word.endswith(SUFFIX) else word.rpartition(":")
    path = Path(name)
    if path.suffix != SUFFIX:
        raise UserError(
            f"The file {name!r} in {word!r} is no Python file; FILE:NAME takes a file that ends in {SUFFIX}."
        )
    if not path.is_file():
        raise UserError(f"There is no file {name}; FILE:NAME takes the path of a Python file that exists.")
    source = path.read_bytes()
    return _module(name, source), File(path=name, sha256=hashlib.sha256(source).hexdigest()), wanted


def experiment_of(module: ModuleType, file: File, name: str) -> Experiment:
    """The Experiment called `name`, or a UserError that lists those that there are."""
    there = [key for key, value in vars(module).items() if isinstance(value, Experiment)]
    listed = f"it has {', '.join(there)}" if there else "it has none: write NAME = Experiment(...) there"
    if not name:
        raise UserError(f"{file.path} is a file; name an Experiment in it, as in {file.path}:NAME ({listed}).")
    if name not in vars(module):
        raise UserError(f"{file.path} has no Experiment {name!r}{nearest(name, there)}; {listed}.")
    found = vars(module)[name]
    if not isinstance(found, Experiment):
        raise UserError(f"{name} in {file.path} is of type {type(found).__name__}, not an Experiment; {listed}.")
    return found


@functools.cache
def _module(name: str, source: bytes) -> ModuleType:
    """The file, run once; what lies beside it can be imported, but never in the place of an installed package."""
    module = ModuleType(f"own_{Path(name).stem}_{hashlib.sha256(name.encode() + source).hexdigest()[:8]}")
    module.__file__ = name
    folder = str(Path(name).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[module.__name__] = module  # where dataclasses look up the names of their annotations
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            exec(compile(source, name, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        if isinstance(error, SyntaxError) and error.filename == name:
            lines = [error.lineno or 1]
        raise UserError(f"{name}, line {lines[-1] if lines else 1}: {_said(error)}; mend the file.") from None
    return module


def _said(error: BaseException) -> str:
    """The error of a user's file in one line."""
    if isinstance(error, UserError):
        return str(error).rstrip(".")
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    first = next(iter(text.splitlines()), "")[:SHOWN].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
