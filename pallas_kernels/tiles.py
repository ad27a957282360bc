"""How kernels cut an axis: a tile as a type, and the tiling of a whole axis.

A Triton tile is as long as a power of two, and no read or write may leave its array. Where what is left of an axis is
narrower than a tile, the tile begins earlier and only its last `fresh` places are its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton

NARROWEST = 16  # what a product takes


def power_of_two(size: int) -> int:
    """The smallest power of two from `size` on: what the length of every axis of a tile must be."""
    return 1 << (size - 1).bit_length()


class Tile(NamedTuple):
    """Places [start, start + width) of an axis, of which the last `fresh` belong to no tile before."""

    start: Any  # a number, or one that is known on the device alone
    width: int
    fresh: Any  # likewise

    @property
    def is_own(self) -> bool:
        """Whether all of it is known to be its own."""
        return isinstance(self.fresh, int) and self.fresh == self.width

    @property
    def place(self) -> Any:
        """The index of its places."""
        return triton.ds(self.start, self.width)

    def place32(self, origin: jax.Array) -> Any:
        """`place` in 32 bits like all other indices, where jax_enable_x64 would give it 64. `origin`, 0 times a
        program's number, makes such an index of a Python number; the compiler folds it."""
        start = self.start + origin if isinstance(self.start, int) else self.start.astype(jnp.int32)
        return triton.ds(start, self.width)

    def mask(self, shape: tuple[int, ...], axis: int) -> jax.Array | None:
        """Which elements of an array that it cuts along `axis` are its own; None: all."""
        if self.is_own:
            return None
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis) >= self.width - self.fresh

    def own(self, x: jax.Array) -> jax.Array:
        """x [rows, tile] with zeros in the columns that are not its own."""
        return x if self.is_own else jnp.where(self.mask(x.shape, 1), x, 0)

    def load_columns(self, ref: Any, rows: Any, *leading: Any) -> jax.Array:
        """ref[*leading, rows, tile], with zeros in the columns that are not its own."""
        return triton.load_where(ref, (*leading, rows, self.place), self.mask((rows.size, self.width), 1))

    def load_rows(self, ref: Any, columns: Any, *leading: Any) -> jax.Array:
        """ref[*leading, tile, columns], with zeros in the rows that are not its own."""
        return triton.load_where(ref, (*leading, self.place, columns), self.mask((self.width, columns.size), 0))

    def store_columns(self, ref: Any, rows: Any, value: jax.Array, *leading: Any) -> None:
        """ref[*leading, rows, tile] = value, leaving the columns alone that are not its own."""
        value = value.astype(ref.dtype)
        triton.store_where(ref, (*leading, rows, self.place), value, self.mask((rows.size, self.width), 1))

    def store_rows(self, ref: Any, columns: Any, value: jax.Array, *leading: Any) -> None:
        """ref[*leading, tile, columns] = value, leaving the rows alone that are not its own."""
        value = value.astype(ref.dtype)
        triton.store_where(ref, (*leading, self.place, columns), value, self.mask((self.width, columns.size), 0))


def owned(rows: Tile, columns: Tile) -> jax.Array | None:
    """Which elements of [rows, columns] no tile before has; None: all."""
    shape = rows.width, columns.width
    first, second = rows.mask(shape, 0), columns.mask(shape, 1)
    return second if first is None else first if second is None else first & second


class Tiling(NamedTuple):
    """The tiles that cover [0, size): as many as fit of `width`, then those of what is left, narrower by halves."""

    size: int
    widest: int

    @property
    def width(self) -> int:
        """Of the full tiles."""
        return min(self.widest, 1 << (self.size.bit_length() - 1))

    @property
    def full(self) -> int:
        """How many tiles of `width` fit."""
        return self.size // self.width

    @property
    def rest(self) -> tuple[Tile, ...]:
        """The tiles of what is left."""
        out, start = [], self.full * self.width
        while start < self.size:
            width = max(NARROWEST, 1 << ((self.size - start).bit_length() - 1))
            fresh = min(width, self.size - start)
            out.append(Tile(start + fresh - width, width, fresh))
            start += fresh
        return tuple(out)

    @property
    def number(self) -> int:
        """How many tiles there are."""
        return self.full + len(self.rest)

    def full_tile(self, index: Any) -> Tile:
        """Number `index` of the full tiles."""
        return Tile(index * self.width, self.width, self.width)

    def tiles(self) -> tuple[Tile, ...]:
        """All of them."""
        return (*map(self.full_tile, range(self.full)), *self.rest)

    def over(self, step: Callable[[Any, Tile], Any], carry: Any) -> Any:
        """carry after step(carry, tile) for every tile: the full ones in a loop, which the compiler pipelines, unless
        there is only one."""
        if self.full == 1:
            carry = step(carry, self.full_tile(0))
        else:
            carry = jax.lax.fori_loop(0, self.full, lambda i, carry: step(carry, self.full_tile(i)), carry)
        for tile in self.rest:
            carry = step(carry, tile)
        return carry

    def at(self, index: Any, body: Callable[[Tile], None]) -> None:
        """body(tile) for tile number `index`, known on the device alone."""
        if not self.rest:
            body(self.full_tile(index))
            return
        triton.when(index < self.full)(lambda: body(self.full_tile(index)))
        for number, tile in enumerate(self.rest):
            triton.when(index == self.full + number)(partial(body, tile))


def at_tile(index: Any, down: Tiling, along: Tiling, body: Callable[[Tile, Tile], None]) -> None:
    """body(rows, columns) for tile number `index` of a matrix, counted along its rows."""
    row, column = triton.quotient(index, along.number), triton.remainder(index, along.number)
    down.at(row, lambda rows: along.at(column, lambda columns: body(rows, columns)))


class Places(NamedTuple):
    """Elements by their numbers along the last axes of an array, and which exist: a tile that reaches past the end."""

    numbers: tuple[jax.Array, ...]  # of each axis; they broadcast against each other
    exists: jax.Array | None  # None: all

    def load(self, ref: Any, *leading: Any, only: jax.Array | None = None) -> jax.Array:
        """ref[*leading, places] in fp32; zero where `only`, a scalar, is False."""
        return triton.load_where(ref, (*leading, *self.numbers), self._mask(only)).astype(jnp.float32)

    def store(self, ref: Any, value: jax.Array, *leading: Any, only: jax.Array | None = None) -> None:
        """ref[*leading, places] = value where `only` is not False."""
        triton.store_where(ref, (*leading, *self.numbers), value, self._mask(only))

    def _mask(self, only):
        if only is None:
            return self.exists
        whole = jnp.broadcast_to(only, jnp.broadcast_shapes(*(number.shape for number in self.numbers)))
        return whole if self.exists is None else whole & self.exists
