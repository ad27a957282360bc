"""Choosing an implementation, saying why another was refused, and running an op on each device's own part."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

Impl = Literal["auto", "chunked", "reference", "triton", "triton_interpret"]
AUTO_ORDER = ("triton", "chunked")  # fastest first; triton_interpret and reference are only taken by name
MESH_AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",)}  # logical axis -> mesh axes that split it

log = logging.getLogger("pallas_kernels")


class Choice(NamedTuple):
    """The implementation taken and, for "auto", why a faster one was not ("" when none was refused)."""

    impl: str
    refused: str


@functools.cache
def _say_once(line: str) -> None:
    log.info(line)


def without_kernels(impl: str) -> str | None:
    """The `why_not` of an op that has only reference and chunked implementations."""
    if impl in ("triton", "triton_interpret"):
        return "this version has no Triton kernel for it; use 'chunked' or 'auto'"
    return None


def choose(op: str, impl: str, why_not: Callable[[str], str | None]) -> Choice:
    """A named `impl` or an error with the reason; for "auto" the first of AUTO_ORDER that can run."""
    if impl != "auto":
        reason = why_not(impl)
        if reason:
            raise NotImplementedError(f"{op}: impl {impl!r} cannot run: {reason}.")
        return Choice(impl, "")
    refusals = []
    for name in AUTO_ORDER:
        reason = why_not(name)
        if reason is None:
            refused = "; ".join(refusals)
            _say_once(f"{op}: auto takes {name}" + (f" ({refused})" if refused else ""))
            return Choice(name, refused)
        refusals.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op}: no implementation can run: {'; '.join(refusals)}.")


def shard(
    op: Callable[..., Any],
    arrays: tuple[Any, ...],
    layouts: tuple[tuple, ...],
    out_layouts: tuple[tuple, ...],
) -> Any:
    """op(*arrays), under the mesh in force on each device's own part of the batch and of the heads.

    A layout names, per dimension, "batch", "heads" or None. Kernels are opaque to the partitioner, and a plain scan
    could be split along its tokens: shard_map rules out both. Mesh axes that do not divide every array evenly, and
    axes already manual, are left alone. Absent arrays (None) stay absent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if size > 1 and kind == AxisType.Auto
    }
    split = {}
    for logical, names in MESH_AXES.items():
        sizes = [
            x.shape[layout.index(logical)]
            for x, layout in zip(arrays, layouts, strict=True)
            if x is not None and logical in layout
        ]
        taken, parts = [], 1
        for name in names:
            if name in free and all(size % (parts * free[name]) == 0 for size in sizes):
                taken.append(name)
                parts *= free[name]
        split[logical] = tuple(taken) or None
    if not any(split.values()):
        return op(*arrays)

    def spec(layout):
        return PartitionSpec(*(split.get(axis) for axis in layout))

    present = [i for i, x in enumerate(arrays) if x is not None]

    def local(*given):
        full = [None] * len(arrays)
        for i, x in zip(present, given, strict=True):
            full[i] = x
        return op(*full)

    in_specs = tuple(spec(layouts[i]) for i in present)
    out_specs = tuple(spec(layout) for layout in out_layouts)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(*(arrays[i] for i in present))
