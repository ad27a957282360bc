"""Choosing an implementation, saying why another was refused, and running an op on each device's own part."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import placement

Impl = Literal["auto", "chunked", "reference", "triton", "triton_interpret"]
PLAIN = ("chunked", "reference")  # the implementations of an op that has no kernel
KERNELS = ("triton", "triton_interpret")
WITH_KERNELS = (*KERNELS, *PLAIN)
# logical axis -> mesh axes that split it
MESH_AXES = {"batch": ("data", "fsdp"), "heads": ("tensor",), "tokens": ("context",)}

_recorders: ContextVar[tuple["_Recorder", ...]] = ContextVar("_recorders", default=())


class Refusal(NamedTuple):
    """An implementation that cannot run, or must not be taken, and the reason."""

    op: str
    impl: str
    reason: str
    check: Any = None  # what would decide it (admission.Check), where nothing else is in the way

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


class Choice(NamedTuple):
    """The implementation that an op takes and the faster ones that "auto" had to leave."""

    op: str
    impl: str
    refused: tuple[Refusal, ...] = ()

    @property
    def reason(self) -> str:
        """Why a faster one was not taken; "" where there is none."""
        return "; ".join(map(str, self.refused))


class CannotRun(NotImplementedError):
    """No implementation that was asked for can run; `refused` says which and why."""

    def __init__(self, message: str, refused: tuple[Refusal, ...]):
        super().__init__(message)
        self.refused = refused


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def choose(
    op: str,
    impl: str,
    why_not: Callable[[bool], str | None],
    admits: Callable[[], Refusal | None] | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    rounds_to: Any = jnp.float32,
) -> Choice:
    """Chooses a named `impl`, or for "auto" the kernels if they can run and may be taken.

    why_not: the reason that the kernels cannot run, or None; given whether they are interpreted
    admits: asked before "auto" takes the kernels, and gives a refusal or None
    dtype: the widest of the op's arrays
    rounds_to: the dtype in which the kernels multiply. "auto" takes no kernel that would round `dtype` to it: that is
        for the caller to ask for, by name. A named kernel rounds float32, and refuses float64

    Raises CannotRun with the reason for a named implementation that cannot run: it never falls back.
    """
    rounding = f"it would round {jnp.dtype(dtype)} to {jnp.dtype(rounds_to)}"
    if impl == "auto":
        if jnp.promote_types(dtype, rounds_to) != rounds_to:
            refusal = Refusal(op, "triton", rounding)
        elif reason := why_not(False):
            refusal = Refusal(op, "triton", reason)
        else:
            refusal = None if admits is None else admits()
        return Choice(op, "triton") if refusal is None else Choice(op, "chunked", (refusal,))
    if impl in KERNELS:
        reason = rounding if dtype == jnp.float64 else why_not(impl == "triton_interpret")
        if reason:
            raise CannotRun(f"{op}: impl {impl!r} cannot run: {reason}.", (Refusal(op, impl, reason),))
    return Choice(op, impl)


def choose_plain(op: str, impl: str) -> Choice:
    """`choose` for an op that has no kernel, so that "auto" refuses nothing."""
    if impl == "auto":
        return Choice(op, "chunked")
    return choose(op, impl, lambda _: "this version has no Triton kernel for it; use 'chunked' or 'auto'")


def taken(choice: Choice) -> str:
    """Records the choice that now runs and returns its implementation.

    On a machine with a GPU a fallback from a kernel is said, once a process on stderr. Without one nobody expects
    kernels, and nothing is said.
    """
    recorders = _recorders.get()
    for recorder in recorders:
        recorder.choices.append(choice)
    heard = not any(recorder.silent for recorder in recorders)
    if choice.refused and heard and placement.on_gpu():
        _say_once(f"{choice.op}: auto takes {choice.impl} ({choice.reason})")
    return choice.impl


class _Recorder(NamedTuple):
    choices: list[Choice]
    silent: bool


@contextlib.contextmanager
def record(*, silent: bool = False) -> Iterator[list[Choice]]:
    """The choices of all op calls that are traced within, in order; silent: nothing runs, so none is said."""
    recorder = _Recorder([], silent)
    token = _recorders.set((*_recorders.get(), recorder))
    try:
        yield recorder.choices
    finally:
        _recorders.reset(token)


def _free_axes() -> dict[str, int]:
    """The axes of the mesh in force that can still split something."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if size > 1 and kind == AxisType.Auto
    }


def splits_tokens(tokens: int) -> bool:
    """Whether the mesh in force splits rows of so many tokens."""
    return any(tokens % size == 0 for name, size in _free_axes().items() if name in MESH_AXES["tokens"])


def shard(
    op: Callable[..., Any],
    arrays: tuple[Any, ...],
    layouts: tuple[tuple, ...],
    out_layouts: tuple[tuple, ...],
    across: Callable[..., Any] | None = None,
) -> Any:
    """op(*arrays), under the mesh in force on each device's own part of the batch, of the heads and of the tokens.

    A layout names, per dimension, "batch", "heads", "tokens" or None. Kernels are opaque to the partitioner, and a
    plain scan could be split along its tokens: shard_map rules out both. Mesh axes that do not divide every array
    evenly, and axes already manual, are left alone. Absent arrays (None) stay absent.

    across  what runs instead of op where tokens are split, with the mesh axis as its `axis` (context.py); None: op
            itself, which then must compute each token by itself
    """
    mesh, free = jax.sharding.get_abstract_mesh(), _free_axes()
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
    if split["tokens"] and across is not None:
        op = functools.partial(across, axis=split["tokens"][0])

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
