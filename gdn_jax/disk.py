"""Free space on a disk, asked before the hours of work whose result would not fit."""

import os
from pathlib import Path

from gdn_jax.errors import UserError

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


def free_space(path: Path) -> int | None:
    """Bytes that this user may still write where `path` is or will be; None where the file system names no size."""
    there = path.resolve()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def check_space(path: Path, needed: int, what: str, way_out: str) -> None:
    """A UserError where `what`, of `needed` bytes, does not fit on the disk of `path`."""
    free = free_space(path)
    if free is not None and free < needed:
        raise UserError(f"{what} would need {in_words(needed)} in {path}, where {in_words(free)} are free; {way_out}.")


def in_words(count: int) -> str:
    """1234567 -> '1.23 MB'."""
    unit, name = next(((unit, name) for unit, name in UNITS if count >= unit), UNITS[-1])
    return f"{count / unit:,.{0 if unit == 1 else 2}f} {name}"
