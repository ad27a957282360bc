"""Every call that only Pallas's Triton lowering knows, and the differences between its CPU interpreter and a GPU.

The lowering is deprecated upstream and present in jax 0.10 to 0.12; nothing outside this module and the triton_*.py
files of the ops depends on it.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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
    kernel: Callable[..., None],
    *arrays: jax.Array,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    warps: int,
    stages: int,
    interpret: bool,
) -> list[jax.Array]:
    """One kernel launch. Grid axis 0 runs fastest: neighbours there share what they read in the L2 cache."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=list(out_specs),
        out_shape=list(out_shape),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
    )(*arrays)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y for bf16 tiles, accumulated in fp32."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=jax.lax.Precision.DEFAULT)


def dot_tf32(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """x @ y for fp32 tiles with TF32 operands; the interpreter, which has no TF32, rounds the operands to it."""
    if not interpret:
        return jax.lax.dot(x, y, precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32, preferred_element_type=jnp.float32)
    return jax.lax.dot(_tf32(x), _tf32(y), precision=jax.lax.Precision.HIGHEST)


def _tf32(x):
    """Round to the 10 explicit mantissa bits of TF32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + jnp.uint32(0x1000)) & jnp.uint32(0xFFFFE000), jnp.float32)


def tiles(size: int, widest: int) -> tuple[tuple[int, int, int], ...]:
    """(start, width, fresh) of tiles that cover [0, size): widths are powers of two from 16 to `widest`.

    Where what is left is narrower than a tile, the tile begins earlier and only its last `fresh` columns are its own:
    no read or write ever leaves the array.
    """
    out, start = [], 0
    while start < size:
        width = min(widest, 1 << int(math.log2(size - start)))
        if width < 16:
            width = 16
        fresh = min(width, size - start)
        out.append((start + fresh - width, width, fresh))
        start += fresh
    return tuple(out)


def load_own(ref: Any, rows: Any, tile: tuple[int, int, int]) -> jax.Array:
    """ref[rows, tile], with zeros in the columns that the tile before it owns."""
    start, width, fresh = tile
    if fresh == width:
        return ref[rows, start : start + width]
    block = ref.at[rows, start : start + width]
    return plt.load(block, mask=_own((rows.size, width), 1, tile), other=0)


def store_own(ref: Any, rows: Any, tile: tuple[int, int, int], value: jax.Array, leading: tuple = ()) -> None:
    """ref[*leading, rows, tile] = value, leaving the columns of the tile before it alone."""
    start, width, fresh = tile
    index = (*leading, rows, slice(start, start + width))
    if fresh == width:
        ref[index] = value.astype(ref.dtype)
    else:
        plt.store(ref.at[index], value.astype(ref.dtype), mask=_own((rows.size, width), 1, tile))


def load_own_rows(ref: Any, tile: tuple[int, int, int], columns: Any) -> jax.Array:
    """ref[tile, columns], with zeros in the rows that the tile before it owns."""
    start, width, fresh = tile
    if fresh == width:
        return ref[start : start + width, columns]
    block = ref.at[start : start + width, columns]
    return plt.load(block, mask=_own((width, columns.size), 0, tile), other=0)


def store_own_rows(ref: Any, tile: tuple[int, int, int], columns: Any, value: jax.Array) -> None:
    """ref[tile, columns] = value, leaving the rows of the tile before it alone."""
    start, width, fresh = tile
    if fresh == width:
        ref[start : start + width, columns] = value.astype(ref.dtype)
    else:
        block = ref.at[start : start + width, columns]
        plt.store(block, value.astype(ref.dtype), mask=_own((width, columns.size), 0, tile))


def _own(shape, axis, tile):
    _, width, fresh = tile
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) >= width - fresh


def aligned(index: jax.Array, divisor: int, interpret: bool) -> jax.Array:
    """`index`, which the compiler may take for a multiple of `divisor`; the interpreter knows no such promise."""
    return index if interpret else pl.multiple_of(index, divisor)


def why_not_here() -> str | None:
    """The reason Triton kernels cannot run on the default device, or None."""
    if not AVAILABLE:
        return "this version of jax has no Triton lowering of Pallas"
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"the default device is {device.device_kind}, not a CUDA device"
    capability = str(getattr(device, "compute_capability", ""))
    if capability != CAPABILITY:
        return f"{device.device_kind} has compute capability {capability}; the kernels are tested on {CAPABILITY}"
    return None
