"""What the devices send each other in a compiled step, read from XLA's program; an operation in a loop counts once for
each iteration."""

import math
import re
from collections import Counter
from typing import NamedTuple

from gdn_jax.errors import UserError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_OF_ONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\]<=)")  # every device by itself: nothing is sent
_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")  # mesh['data'=2,'fsdp'=1] {'fsdp'}
_SIZE = re.compile(r"'([^']+)'=(\d+)")
_LOOP = re.compile(r" while\(.*\bbody=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One kind of collective operation with results of one shape."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the result on each device

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


def collectives(program: str) -> Counter[Collective]:
    """How often each runs in one execution of a compiled program (`compiled.as_text()`).

    Raises UserError for a loop with collectives whose number of iterations XLA does not know.
    """
    own: dict[str, Counter[Collective]] = {}
    below: dict[str, list[tuple[str, int | None]]] = {}
    entry = here = ""
    for line in program.splitlines():
        if header := _HEADER.match(line):
            here = header[2]
            entry = here if header[1] else entry
            own[here], below[here] = Counter(), []
        elif here and (found := _COLLECTIVE.search(line)):
            if _alone(line):
                continue
            for dtype, sizes in _ARRAY.findall(found[1]):
                shape = tuple(int(size) for size in sizes.split(",") if size)
                own[here][Collective(found[2], dtype, shape)] += 1
        elif here and (loop := _LOOP.search(line)):
            turns = _TURNS.search(line)
            below[here].append((loop[1], int(turns[1]) if turns else None))
        elif here:
            below[here] += [(name, 1) for name in _CALLED.findall(line)]

    def total(name: str) -> Counter[Collective]:
        sums = Counter(own.get(name, Counter()))
        for child, turns in below.get(name, ()):
            inside = total(child)
            if inside and turns is None:
                raise UserError(
                    f"The loop {child} has collectives, and XLA does not know how often it turns; with run.scan_layers "
                    f"False the layers are no loop."
                )
            for one, count in inside.items():
                sums[one] += count * turns
        return sums

    return total(entry)


def _alone(line: str) -> bool:
    """Whether every device is a group of its own."""
    if mesh := _OF_MESH.search(line):
        sizes = dict(_SIZE.findall(mesh[1]))
        return all(int(sizes.get(axis, 2)) == 1 for axis in re.findall("'([^']+)'", mesh[2]))
    return _OF_ONE.search(line) is not None


def in_words(found: Counter[Collective]) -> dict[str, str]:
    """kind -> how many a step and the bytes of their results on each device, the largest named."""
    out = {}
    for kind in KINDS:
        of_kind = {one: count for one, count in found.items() if one.kind == kind}
        if not of_kind:
            continue
        moved = sum(one.bytes * count for one, count in of_kind.items())
        largest = max(of_kind, key=lambda one: one.bytes)
        shape = f"{largest.dtype}[{','.join(map(str, largest.shape))}]"
        out[kind] = f"{sum(of_kind.values()):,} a step, {moved / 1e6:,.1f} MB on each device, the largest {shape}"
    return out or {"none": "a step sends nothing"}
