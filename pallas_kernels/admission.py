"""Which kernels "auto" takes: those that float64 has checked on this kind of device under this minor version of jax.

The package lists where its GPU tests passed. Elsewhere `check` runs an op's cases at the sizes that are asked for,
seconds to a minute of compiling, and keeps the verdict for this device, jax and these kernels in the user's cache.
"""

import datetime
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels import ops, placement, tuned
from pallas_kernels.dispatch import Refusal

# kind of device -> minor versions of jax under which tests/test_gpu.py passed for all ops; on an H100 with kernels of
# 2026-11-28, and those of an H200 since then are of the same compute capability
TESTED = {"NVIDIA H100 80GB HBM3": ("0.11",), "NVIDIA H200": ("0.11",)}
STEPS_TESTED = {"NVIDIA H200": ("0.11",)}  # likewise of its tests of single tokens


class Check(NamedTuple):
    """The kernels of an op at some sizes: the arguments of `check` in the op's conformance.py."""

    op: str
    sizes: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.op} at " + ", ".join(f"{name} {value}" for name, value in self.sizes)


class Verdict(NamedTuple):
    """What a check found; it passed where nothing failed."""

    failures: tuple[str, ...]
    date: str


def here() -> tuple[str, str]:
    """(kind of device, minor version of jax) of what is traced now."""
    return placement.device().device_kind, minor(jax.__version__)


def minor(version: str) -> str:
    """ "0.11" of "0.11.2"."""
    return ".".join(version.split(".")[:2])


def is_listed(table: dict[str, tuple[str, ...]]) -> bool:
    """Whether `table`, such as TESTED, has the kind of device and jax of what is traced now."""
    kind, version = here()
    return version in table.get(kind, ())


def refusal(op: str, *, listed: bool | None = None, **sizes: Any) -> Refusal | None:
    """None where "auto" may take an op's kernels at these sizes, else why not, with the check that would decide it.

    listed: whether the op's own table has the sizes for this device and jax; None: TESTED decides
    """
    if is_listed(TESTED) if listed is None else listed:
        return None
    kind, version = here()
    check = Check(op, tuple(sizes.items()))
    verdict = _verdicts().get(check.name)
    on = f"on {kind} with jax {version}"
    if verdict is None:
        reason = (
            f"float64 has not checked {check.name} {on}; `gdn train`, `run`, `eval` and `generate` do at their start, "
            f"`gdn doctor ID` for an ID, `pallas_kernels.admission.check` from Python"
        )
        return Refusal(op, "triton", reason, check)
    if verdict.failures:
        return Refusal(op, "triton", f"{check.name} failed its float64 check {on} ({', '.join(verdict.failures)})")
    return None


def check(wanted: Check) -> Verdict:
    """Runs the check on this device and keeps what it found; "auto" heeds it in programs that are traced after it."""
    found = ops.module(wanted.op, "conformance").check(**dict(wanted.sizes))
    verdict = Verdict(tuple(found), datetime.datetime.now(datetime.UTC).isoformat()[:19])
    _verdicts()[wanted.name] = verdict
    kept = _read() | {_prefix() + name: found._asdict() for name, found in _verdicts().items()}
    path = _path()
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(kept, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        print(f"{error}: the verdict holds for this process alone.", file=sys.stderr, flush=True)
    jax.clear_caches()  # of programs that took another implementation
    return verdict


@functools.cache
def _verdicts() -> dict[str, Verdict]:
    """By the name of a check, those of this device, jax and these kernels."""
    kept = {name.removeprefix(_prefix()): found for name, found in _read().items() if name.startswith(_prefix())}
    return {name: Verdict(tuple(found["failures"]), found["date"]) for name, found in kept.items()}


def _path() -> Path:
    return tuned.of_user("checked")


def _read() -> dict[str, Any]:
    """What the file has, of all devices; one that cannot be read is said on stderr and left out."""
    try:
        found = json.loads(_path().read_text())
        return {str(name): {"failures": list(one["failures"]), "date": one["date"]} for name, one in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        print(f"{_path()} is not a file of verdicts and is left out; delete it.", file=sys.stderr, flush=True)
        return {}


def _prefix() -> str:
    return "/".join((*here(), _source(), ""))


@functools.cache
def _source() -> str:
    """Hash of the files that the kernels are made of."""
    digest = hashlib.sha256()
    for path in sorted(ops.HERE.glob("**/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]
