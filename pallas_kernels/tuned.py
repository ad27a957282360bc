"""Tables of tuned configurations: what `gdn tune` found, for every op that has kernels, and where it is kept.

A table is JSON: device kind -> name of the sizes -> a line of what holds for the entry and a line a kernel. A line says
its own facts of measurement only where they are not those of the entry.

An op's configuration is a frozen dataclass with a field for each kernel, itself a frozen dataclass. An op may have
several such types; each then has a number `block`, which the entry's line notes.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pallas_kernels import ops

WHOLE = "all"  # the timing of all kernels together


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a kernel, or all of them together, took, and where that was measured."""

    ms: float
    shape: str  # a name in benchmark.py, or written out
    date: str
    commit: str
    dirty: bool
    source: str  # hash of the Python files, "" where the commit alone was noted
    jax: str
    jaxlib: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The part of a table for one size on one kind of device."""

    configuration: Any
    admitted: bool  # "auto" takes the size: its configuration passed the float64 check; never said of few rows
    timings: dict[str, Timing]  # of kernels by name, and WHOLE: one at least


Table = dict[str, dict[str, Entry]]
Kinds = Mapping[int | None, type]  # block -> type of configuration; None: the only one


def kernels(configuration: Any) -> dict[str, Any]:
    """Name -> configuration of the kernels, in the order in which they run."""
    return {field.name: getattr(configuration, field.name) for field in fields(configuration)}


def of_package(op: str) -> Path:
    """The table that comes with the package."""
    return ops.HERE / op / "tuned.json"


def of_user(op: str) -> Path:
    """The user's own: in $XDG_CACHE_HOME/gdn_jax/tuned, or in ~/.cache/gdn_jax/tuned."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one does not count, says its specification
    return (given if given.is_absolute() else Path.home() / ".cache") / "gdn_jax" / "tuned" / f"{op}.json"


def to_write(op: str) -> Path:
    """The package's table where its folder can be written to, else the user's."""
    path = of_package(op)
    return path if path.parent.is_dir() and os.access(path.parent, os.W_OK) else of_user(op)


def in_force(op: str, kinds: Kinds) -> Table:
    """The package's table and over it the user's, entry by entry.

    The user's may be of another version of the package: one that cannot be read is said on stderr and left out.
    """
    table = read(path, kinds) if (path := of_package(op)).exists() else {}
    own = of_user(op)
    try:
        more = read(own, kinds) if own.exists() else {}
    except (ValueError, OSError) as error:
        print(f"{error} The file is left out; delete it, or tune again.", file=sys.stderr, flush=True)
        more = {}
    return table | {kind: table.get(kind, {}) | entries for kind, entries in more.items()}


def read(path: Path, kinds: Kinds) -> Table:
    """The table in a file. ValueError with a sentence for one that is not like `as_text` writes it."""
    try:
        devices = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); `gdn tune` writes it anew where there is none.") from None
    return {
        kind: {name: _entry(lines, kinds, f"{path}: {kind} {name}") for name, lines in _object(entries, path).items()}
        for kind, entries in _object(devices, path).items()
    }


def _object(given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where} has {given!r} where an object must be.")
    return given


def _entry(lines, kinds, where):
    common = dict(_object(_object(lines, where).get("entry"), where))
    block = common.pop("block", None)
    kind = kinds.get(block) if block is None or isinstance(block, int) else None
    if kind is None:
        raise ValueError(f"{where}: block is {block!r}; it must be one of {', '.join(map(str, kinds))}.")
    of_entry = {"admitted": bool, "ms": float | None} | {f.name: f.type for f in fields(Timing) if f.name != "ms"}
    _check(common, of_entry, f"{where}: entry")
    admitted, whole = common.pop("admitted"), common.pop("ms")
    timings = {} if whole is None else {WHOLE: Timing(ms=whole, **common)}
    _check(lines, {"entry": dict} | {field.name: dict for field in fields(kind)}, where)
    chosen = {}
    for field in fields(kind):
        line, own = lines[field.name], {f.name: f.type for f in fields(field.type)}
        measured = {f.name: f.type for f in fields(Timing) if f.name in line}
        _check(line, own | measured, f"{where}: {field.name}")
        chosen[field.name] = field.type(**{name: line[name] for name in own})
        if "ms" in line:
            timings[field.name] = Timing(**common | {name: line[name] for name in measured})
    return Entry(configuration=kind(**chosen), admitted=admitted, timings=timings)


def _check(given, types, where):
    """ValueError unless `given` has exactly the fields of `types`, each of its type."""
    for name in [*given, *types]:
        if name not in types or name not in given:
            fault = "an unknown" if name not in types else "no"
            raise ValueError(f"{where} has {fault} field {name!r}; it must have {', '.join(types)}, and no other.")
    for name, kind in types.items():
        if not isinstance(given[name], kind) or (isinstance(given[name], bool) and kind is not bool):
            raise ValueError(
                f"{where}: {name} is {given[name]!r}; it must be of type {getattr(kind, '__name__', kind)}."
            )


def as_text(table: Table) -> str:
    """The text of a table: a line for each entry and each kernel."""

    def lines(entry):
        first = entry.timings.get(WHOLE) or next(iter(entry.timings.values()))
        common = asdict(first)
        ms = entry.timings[WHOLE].ms if WHOLE in entry.timings else None
        yield "entry", block_of(entry.configuration) | {"admitted": entry.admitted} | common | {"ms": ms}
        for name, kernel in kernels(entry.configuration).items():
            facts = asdict(entry.timings[name]) if name in entry.timings else {}
            own = {key: value for key, value in facts.items() if key == "ms" or value != common[key]}
            yield name, asdict(kernel) | own

    def members(pairs, indent):
        joined = (",\n" + indent).join(f"{json.dumps(name)}: {text}" for name, text in pairs)
        return f"{{\n{indent}{joined}\n{indent[:-1]}}}"

    def of_entry(entry):
        return members([(name, json.dumps(line)) for name, line in lines(entry)], "   ")

    def of_device(entries):
        return members([(name, of_entry(entry)) for name, entry in entries.items()], "  ")

    return members([(kind, of_device(entries)) for kind, entries in table.items()], " ") + "\n"


def block_of(configuration: Any) -> dict[str, int]:
    """{"block": its number} where an op has several types of configuration."""
    return {"block": configuration.block} if hasattr(configuration, "block") else {}
