"""Every call that only Pallas's Triton lowering knows, and the differences between its CPU interpreter and a GPU.

The lowering is deprecated upstream and present in jax 0.10 to 0.12; nothing outside this module and the triton_*.py
files of the ops depends on it.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import placement

AVAILABLE = importlib.util.find_spec("jax.experimental.pallas.triton") is not None
if AVAILABLE:
    from jax.experimental.pallas import triton as plt

# said at every lowering, long after the call is traced
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")

CAPABILITY = "9.0"  # Hopper: what the kernels are tested on

BlockSpec = pl.BlockSpec
ds = pl.ds
program_id = pl.program_id
when = pl.when


def call(
    kernel: Callable[[SimpleNamespace], None],
    inputs: dict[str, tuple[jax.Array | None, pl.BlockSpec]],
    outputs: dict[str, tuple[jax.ShapeDtypeStruct | None, pl.BlockSpec]],
    *,
    grid: tuple[int, ...],
    warps: int,
    num_stages: int,
    interpret: bool,
    in_place: dict[str, str] | None = None,
) -> dict[str, jax.Array | None]:
    """One kernel launch: name -> array of `outputs`.

    `kernel` gets one object that holds the ref of every input and output under its name; where an array or a shape is
    None, so are the ref and the result. Grid axis 0 runs fastest: neighbours there share what they read in the L2
    cache. in_place: input -> the output, of the same shape and dtype, that takes its memory; XLA copies the input
    before where something else still needs it.

    Arrays may have any size. In one of more than 2^32 bytes the lowering computes offsets in 64 bits, each index by
    itself before it is multiplied; it takes an index, or the start of a slice, for unsigned then, so neither may be
    negative. In a smaller array offsets have 32 bits, which is enough where an element has two bytes or more.
    """
    given, made = ({name: pair for name, pair in side.items() if pair[0] is not None} for side in (inputs, outputs))

    def with_names(*refs):
        kernel(SimpleNamespace(**dict.fromkeys(inputs | outputs) | dict(zip(given | made, refs, strict=True))))

    aliases = {list(given).index(name): list(made).index(taker) for name, taker in (in_place or {}).items()}
    results = pl.pallas_call(
        with_names,
        name=kernel.__name__,
        grid=grid,
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in made.values()],
        out_shape=[shape for shape, _ in made.values()],
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=num_stages),
        input_output_aliases=aliases,
        interpret=interpret,
    )(*(array for array, _ in given.values()))
    return dict.fromkeys(outputs) | dict(zip(made, results, strict=True))


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y for tiles of bf16 or fp16, accumulated in fp32."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=jax.lax.Precision.DEFAULT)


def exp(x: jax.Array, interpret: bool) -> jax.Array:
    """exp of an fp32 tile by the device's own power of two, 2 ulp; exp(-inf) is 0."""
    if interpret:
        return jnp.exp(x)
    return exp2(x * math.log2(math.e), interpret)


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2^x of an fp32 tile by the device's own instruction, 2 ulp; exp2(-inf) is 0."""
    if interpret:
        return jnp.exp2(x)
    (y,) = plt.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y


def from_lane(x: jax.Array, mask: int, interpret: bool) -> jax.Array:
    """What the lane whose number differs by the bits of `mask`, a power of two, holds of x.

    x is a vector of fp32 with one element a lane, the only form that 32 numbers in a program of one warp have.
    """
    if interpret:
        return x.reshape(-1, 2, mask)[:, ::-1].reshape(x.shape)
    (y,) = plt.elementwise_inline_asm(
        f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, -1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return y


def columns(x: jax.Array) -> list[jax.Array]:
    """The columns of a tile [L, a power of two], each a vector: values cannot be indexed."""
    if x.shape[1] == 1:
        return [x.reshape(x.shape[0])]
    even, odd = jnp.unstack(x.reshape(x.shape[0], -1, 2), axis=-1)
    out = [None] * x.shape[1]
    out[::2], out[1::2] = columns(even), columns(odd)
    return out


def from_columns(columns: list[jax.Array]) -> jax.Array:
    """The inverse of `columns`: pairs alone can be stacked, along a new last axis."""
    if len(columns) == 1:
        return columns[0][:, None]
    even, odd = from_columns(columns[::2]), from_columns(columns[1::2])
    return jnp.stack([even, odd], axis=-1).reshape(even.shape[0], len(columns))


def finished(x: jax.Array, interpret: bool) -> jax.Array:
    """x, an accumulator that a loop carries, once every product issued so far in this iteration is finished.

    Triton lets the products of one iteration run on into the next. It gives each load a second buffer for that, unless
    something besides products uses what was loaded: then the next load may overwrite what a product still reads (Triton
    3.4 to 3.7). A loop with such a load hands on its last product through here.
    """
    return _unseen(x, interpret)


def summand(x: jax.Array, interpret: bool) -> jax.Array:
    """x, a product to which a loop adds something that it loads.

    Triton would make what was loaded the start of the product's accumulator, and it loads nothing ahead for those.
    """
    return _unseen(x, interpret)


def _unseen(x, interpret):
    """x by an instruction that Triton does not see through."""
    if interpret:
        return x
    (y,) = plt.elementwise_inline_asm(
        "mov.b32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[jax.typeof(x)]
    )
    return y


def barrier(interpret: bool) -> None:
    """What any thread of the program wrote to memory before, all of them read after."""
    if not interpret:  # the interpreter has one thread
        plt.debug_barrier()


def load_where(ref: Any, index: tuple, mask: jax.Array | None) -> jax.Array:
    """ref[index] where `mask` says so, else 0; None: everywhere."""
    return ref[index] if mask is None else plt.load(ref.at[index], mask=mask, other=0)


def store_where(ref: Any, index: tuple, value: jax.Array, mask: jax.Array | None) -> None:
    """ref[index] = value where `mask` says so; None: everywhere."""
    if mask is None:
        ref[index] = value.astype(ref.dtype)
    else:
        plt.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def touch(ref: Any, index: tuple, interpret: bool) -> None:
    """ref[index] on its way from memory to the L2 cache, which a load that comes later then need not wait for."""
    if not interpret:
        plt.load(ref.at[index], volatile=True)


def quotient(index: jax.Array, divisor: int) -> jax.Array:
    """index // divisor of an index >= 0, in its own type: under jax_enable_x64 a Python number would be int64."""
    return jax.lax.div(index, jnp.asarray(divisor, index.dtype))


def remainder(index: jax.Array, divisor: int) -> jax.Array:
    """index % divisor, likewise."""
    return jax.lax.rem(index, jnp.asarray(divisor, index.dtype))


def aligned(index: jax.Array, divisor: int, interpret: bool) -> jax.Array:
    """`index`, which the compiler may take for a multiple of `divisor`; the interpreter knows no such promise."""
    return index if interpret else pl.multiple_of(index, divisor)


def as_made(x: jax.Array, interpret: bool) -> jax.Array:
    """x, which the interpreter's XLA must not join with its uses: on a CPU, jax 0.11's makes of them a product of bf16
    tiles that it then cannot run."""
    return jax.lax.optimization_barrier(x) if interpret else x


def why_not(interpret: bool) -> str | None:
    """The reason kernels cannot run here, or None; the interpreter runs them anywhere."""
    return None if interpret else why_not_here()


def why_not_here() -> str | None:
    """The reason Triton kernels cannot run on the device in force (placement.py), or None."""
    if not AVAILABLE:
        return "this version of jax has no Triton lowering of Pallas"
    device = placement.device()
    if not placement.on_gpu():
        return f"the device is {device.device_kind}, not a CUDA device"
    capability = str(getattr(device, "compute_capability", ""))
    if capability != CAPABILITY:
        return f"{device.device_kind} has compute capability {capability}; the kernels are tested on {CAPABILITY}"
    return None
