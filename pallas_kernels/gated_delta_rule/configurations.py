"""The kernels' configurations: a type for each, for the whole op, and which of those that `gdn tune` found is taken.

The table is tuned.json beside this file; entries of the user's own table come before its. An entry is named "KxV", or
"KxV few" for calls of few rows times heads. It says when and at which commit it was timed, and stands there only if the
op passed the float64 cases of tuning.py with it.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

from pallas_kernels import tuned
from pallas_kernels.admission import minor

MANY_ROWS = 256  # rows times heads to which no entry for few applies
ONE_EACH = 128  # at most so many programs of a serial pass, about one a multiprocessor, are few


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """triton_prepare.solve_chunks."""

    key_tile: int = 64  # key columns of one product
    warps: int = 4  # of one program
    num_stages: int = 3  # iterations of a loop whose loads are on their way at once


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


@functools.cache
def table() -> tuned.Table:
    """The package's own, and the user's over it."""
    return tuned.in_force("gated_delta_rule", BLOCKS)


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


def admitted(key_dim: int, value_dim: int, device_kind: str, jax_minor: str) -> bool:
    """Whether the table's configuration at these sizes passed its checks on this kind of device under this jax."""
    entry = table().get(device_kind, {}).get(f"{key_dim}x{value_dim}")
    return entry is not None and entry.admitted and any(jax_minor == minor(one.jax) for one in entry.timings.values())
