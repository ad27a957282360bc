"""Between which numbers every integer lies that a lowered kernel computes on its way to an address.

Program numbers, tiles and loops have known bounds, so those of all that is made from them follow, operation by
operation. A kernel is right in arrays of any size if each of these integers fits its type, and none is negative where
it is widened as an unsigned one.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax._src.interpreters import mlir  # kernels lie in the program as bytecode, for which there is no public reader
from jax._src.lib.triton import dialect
from jaxlib.mlir import ir

Bounds = tuple[int, int]  # least and greatest


class Kernel(NamedTuple):
    """One launch of a lowered program."""

    name: str
    code: bytes
    grid: tuple[int, int, int]


def kernels(lowered: jax.stages.Lowered) -> list[Kernel]:
    """All launches of a program that was lowered to CUDA."""
    found = []
    for operation in _operations(lowered.compiler_ir("stablehlo").operation):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            config = operation.attributes["mhlo.backend_config"]
            grid = tuple(ir.IntegerAttr(config[f"grid_{axis}"]).value for axis in "xyz")
            name, code = ir.StringAttr(config["name"]).value, ir.StringAttr(config["ir"]).value_bytes
            found.append(Kernel(name, code, grid))
    return found


def offsets(kernel: Kernel) -> tuple[set[int], list[str]]:
    """(in how many bits offsets are computed, what is wrong with any of the integers behind them)."""
    with mlir.JaxIrContext() as context:
        context.append_dialect_registry(mlir.upstream_dialects)
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        module, bits, integers = ir.Module.parse(kernel.code, context), set(), _Integers(kernel.grid)
        for operation in _operations(module.operation):
            if operation.name == "tt.addptr":
                bits.add(_bits(operation.operands[1]))
                integers.bounds(operation.operands[1])
        return bits, integers.wrong


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _bits(value: Any) -> int:
    return int(re.search(r"i(\d+)>?$", str(value.type))[1])


def _corners(rule: Callable[[int, int], int]) -> Callable[[Bounds, Bounds], Bounds]:
    """Bounds of an operation that is greatest and least where its operands are."""

    def bounds(x, y):
        values = [rule(a, b) for a in x for b in y]
        return min(values), max(values)

    return bounds


def _remainder(x: Bounds, y: Bounds) -> Bounds:
    assert x[0] >= 0 and y[0] > 0
    return 0, min(x[1], y[1] - 1)


def _either(x: Bounds, y: Bounds) -> Bounds:
    return min(x[0], y[0]), max(x[1], y[1])


def _merged(x: Bounds, y: Bounds) -> Bounds:
    """Of numbers whose bits are joined by `or`."""
    assert x[0] >= 0 and y[0] >= 0
    return max(x[0], y[0]), (1 << max(x[1], y[1]).bit_length()) - 1


RULES = {
    "add": _corners(lambda a, b: a + b),
    "sub": _corners(lambda a, b: a - b),
    "mul": _corners(lambda a, b: a * b),
    "div": _corners(lambda a, b: a // b),
    "min": _corners(min),
    "max": _corners(max),
    "shl": _corners(lambda a, b: a << b),
    "shr": _corners(lambda a, b: a >> b),
    "rem": _remainder,
    "or": _merged,
}
AS_GIVEN = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "arith.extsi", "arith.extui", "arith.trunci")


class _Integers:
    """The integers of one kernel; `wrong` says of which of those that were asked for their type is too narrow."""

    def __init__(self, grid: tuple[int, int, int]):
        self.grid, self.known, self.wrong = grid, {}, []

    def bounds(self, value: Any) -> Bounds:
        if value not in self.known:
            least, greatest = self.known[value] = self._computed(value)
            half = 1 << (_bits(value) - 1)
            if least < -half or greatest >= half:
                self.wrong.append(f"[{least}, {greatest}] is too much for {value}")
        return self.known[value]

    def _computed(self, value):
        if isinstance(value.owner, ir.Block):
            loop = value.owner.owner
            assert loop.name == "scf.for" and ir.BlockArgument(value).arg_number == 0, f"{value} is carried by a loop"
            return self.bounds(loop.operands[0])[0], self.bounds(loop.operands[1])[1] - 1
        operation = value.owner.operation if hasattr(value.owner, "operation") else value.owner
        name, attributes = operation.name, operation.attributes
        if name == "arith.constant":
            return (int(re.search(r"-?\d+(?=>? : )", str(attributes["value"]))[0]),) * 2
        if name == "tt.get_program_id":
            return 0, self.grid[ir.IntegerAttr(attributes["axis"]).value] - 1
        if name == "tt.make_range":
            start, end = (ir.IntegerAttr(attributes[side]).value for side in ("start", "end"))
            return start, end - 1
        given = [self.bounds(operand) for operand in operation.operands if _is_integer(operand)]
        if name == "arith.extui" and given[0][0] < 0:
            self.wrong.append(f"{value} takes numbers from {given[0][0]} on for unsigned")
        if name in AS_GIVEN:
            return given[0]
        if name == "arith.select":
            return _either(*given)
        rule = re.fullmatch(r"arith\.(add|sub|mul|div|min|max|shl|shr|rem|or)(i|si|ui)", name)
        assert rule, f"no rule for the bounds of {value}"
        return RULES[rule[1]](*given)


def _is_integer(value: Any) -> bool:
    """And no truth value, such as what selects one of two."""
    return re.search(r"(?<!\d)i1>?$", str(value.type)) is None
