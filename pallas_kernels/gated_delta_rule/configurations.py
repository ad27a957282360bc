"""The kernels' configurations: a type for each, for the whole op, and the table of those that `gdn tune` found.

The table is JSON: device kind -> "KxV", or "KxV few" where rows are few, -> a line of what holds for the entry and a
line a kernel. A line says its own facts of measurement only where they are not those of the entry.
"""

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

TUNED = Path(__file__).with_name("tuned.json")  # written by `gdn tune`
MANY_ROWS = 256  # no entry for few rows applies
ONE_EACH = 128  # programs of a serial pass: about one a multiprocessor


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """triton_prepare.solve_chunks."""

    key_tile: int = 64  # key columns of one product
    warps: int = 4  # of one program
    num_stages: int = 3  # turns of a loop whose loads are on their way at once


@dataclass(frozen=True, kw_only=True)
class Scan:
    """triton_state.scan_forward."""

    value_tile: int = 64  # value columns of one program
    key_tile: int = 64
    transposed: bool = False  # how the state is held
    warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Output:
    """triton_output.make_outputs."""

    value_tile: int = 64
    key_tile: int = 64
    warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Reverse:
    """triton_state.scan_reverse."""

    value_tile: int = 64
    key_tile: int = 64
    transposed: bool = False
    ahead: bool = False  # write is loaded while the chunk before computes, for a few registers
    warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """triton_chunks.make_gradients."""

    value_tile: int = 64
    key_tile: int = 64
    warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """triton_gradients.pair_tokens."""

    value_tile: int = 64
    warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """triton_gradients.sum_gradients."""

    value_tile: int = 64
    key_tile: int = 128
    pair_tile: int = 32  # tokens of one product with pairs
    warps: int = 8
    num_stages: int = 2


Kernel = Prepare | Scan | Output | Reverse | Chunks | Pairs | Tokens


@dataclass(frozen=True, kw_only=True)
class Every64:
    """The op with states kept every 64 tokens: its kernels in the order in which they run."""

    block: ClassVar[int] = 64
    prepare: Prepare = Prepare()
    forward: Scan = Scan()
    reverse: Reverse = Reverse()
    chunks: Chunks = Chunks()


@dataclass(frozen=True, kw_only=True)
class Every128:
    """The op with states kept every 128 tokens: its kernels in the order in which they run."""

    block: ClassVar[int] = 128
    prepare: Prepare = Prepare()
    state: Scan = Scan()
    output: Output = Output()
    reverse: Reverse = Reverse()
    pairs: Pairs = Pairs()
    tokens: Tokens = Tokens()


Configuration = Every64 | Every128
BLOCKS = {kind.block: kind for kind in (Every64, Every128)}
KERNELS = ("prepare", "forward", "state", "output", "reverse", "chunks", "pairs", "tokens")  # of every block
DEFAULT = Every128()  # what runs where nothing was tuned


def kernels(configuration: Configuration) -> dict[str, Kernel]:
    """Name -> configuration of the kernels, in the order in which they run."""
    return {field.name: getattr(configuration, field.name) for field in fields(configuration)}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a kernel took, or all of them together, and where that was measured."""

    ms: float
    shape: str  # a name in benchmark.py, or BxT,H,K,V
    date: str
    commit: str
    dirty: bool
    source: str  # hash of the Python files, "" where the commit alone was noted
    jax: str
    jaxlib: str


WHOLE = "all"  # the timing of all kernels together


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the table has of one size on one kind of device."""

    configuration: Configuration
    admitted: bool  # "auto" takes the size: its configuration passed the float64 check; never said of few rows
    timings: dict[str, Timing]  # of kernels by name, and WHOLE: one at least


Table = dict[str, dict[str, Entry]]


def read(path: Path) -> Table:
    """The table in a file. ValueError with a sentence for one that is not like `written` writes it."""
    try:
        devices = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); `gdn tune` writes it anew where there is none.") from None
    return {
        kind: {name: _entry(lines, f"{path}: {kind} {name}") for name, lines in _object(entries, path).items()}
        for kind, entries in _object(devices, path).items()
    }


def _object(given, where):
    if not isinstance(given, dict):
        raise ValueError(f"{where} has {given!r} where an object must be.")
    return given


def _entry(lines, where):
    shared = dict(_object(_object(lines, where).get("entry"), where))
    block = shared.pop("block", None)
    kind = BLOCKS.get(block) if isinstance(block, int) else None
    if kind is None:
        raise ValueError(f"{where}: block is {block!r}; it must be one of {', '.join(map(str, BLOCKS))}.")
    of_entry = {"admitted": bool, "ms": float | None} | {f.name: f.type for f in fields(Timing) if f.name != "ms"}
    _check(shared, of_entry, f"{where}: entry")
    admitted, whole = shared.pop("admitted"), shared.pop("ms")
    timings = {} if whole is None else {WHOLE: Timing(ms=whole, **shared)}
    _check(lines, {"entry": dict} | {field.name: dict for field in fields(kind)}, where)
    chosen = {}
    for field in fields(kind):
        line, own = lines[field.name], {f.name: f.type for f in fields(field.type)}
        measured = {f.name: f.type for f in fields(Timing) if f.name in line}
        _check(line, own | measured, f"{where}: {field.name}")
        chosen[field.name] = field.type(**{name: line[name] for name in own})
        if "ms" in line:
            timings[field.name] = Timing(**shared | {name: line[name] for name in measured})
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


def written(table: Table) -> str:
    """The text of a table: a line for each entry and each kernel."""

    def lines(entry):
        first = entry.timings.get(WHOLE) or next(iter(entry.timings.values()))
        shared = asdict(first)
        ms = entry.timings[WHOLE].ms if WHOLE in entry.timings else None
        yield "entry", {"block": entry.configuration.block, "admitted": entry.admitted} | shared | {"ms": ms}
        for name, kernel in kernels(entry.configuration).items():
            facts = asdict(entry.timings[name]) if name in entry.timings else {}
            own = {key: value for key, value in facts.items() if key == "ms" or value != shared[key]}
            yield name, asdict(kernel) | own

    def members(pairs, indent):
        joined = (",\n" + indent).join(f"{json.dumps(name)}: {text}" for name, text in pairs)
        return f"{{\n{indent}{joined}\n{indent[:-1]}}}"

    def of_entry(entry):
        return members([(name, json.dumps(line)) for name, line in lines(entry)], "   ")

    def of_device(entries):
        return members([(name, of_entry(entry)) for name, entry in entries.items()], "  ")

    return members([(kind, of_device(entries)) for kind, entries in table.items()], " ") + "\n"


@functools.cache
def table() -> Table:
    """The package's own."""
    return read(TUNED) if TUNED.exists() else {}


def programs(rows: int, value_dim: int) -> int:
    """Of a serial pass over `rows` rows times heads: one a tile of 64 value columns."""
    return rows * -(-value_dim // 64)


def entry_name(key_dim: int, value_dim: int, rows: int = MANY_ROWS) -> str:
    """The name in the table of these sizes; `rows` is batch, or pieces, times value heads."""
    return f"{key_dim}x{value_dim}" + (programs(rows, value_dim) <= ONE_EACH) * " few"


def choose(key_dim: int, value_dim: int, device_kind: str = "", rows: int = MANY_ROWS) -> Configuration:
    """The table's configuration at these sizes for this kind of device, else for the first kind it has (all are
    Hopper), else DEFAULT. Where rows are few, what was tuned for that comes first."""
    devices = table()
    entries = devices.get(device_kind) or next(iter(devices.values()), {})
    names = entry_name(key_dim, value_dim, rows), entry_name(key_dim, value_dim)
    return next((entries[name].configuration for name in names if name in entries), DEFAULT)


def not_admitted(key_dim: int, value_dim: int, device_kind: str) -> str | None:
    """The reason "auto" must leave the kernels alone at these sizes, or None where they passed their checks."""
    size = f"{key_dim}x{value_dim}"
    entry = table().get(device_kind, {}).get(size)
    if entry is not None and entry.admitted:
        return None
    return (
        f"its configuration at {size} has not passed the float64 check on {device_kind}; "
        f"`gdn tune gated_delta_rule --shapes 8x4096,24,{key_dim},{value_dim}` checks and admits it"
    )
