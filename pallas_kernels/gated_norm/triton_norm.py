"""RMS norm with a SiLU gate as one Triton kernel forward and one backward, each reading and writing every array once.

A program holds whole vectors: `rows` of them at a time, one or more times. The backward makes r, n and the gate again
from the inputs, which it reads anyway, so that nothing else is kept; equations as in chunked.py. The weight's gradient
is a sum over all vectors: a program makes its own part, and the parts are added outside.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.tiles import power_of_two
from pallas_kernels.triton_calls import BlockSpec

LARGEST = 8192  # elements of a vector


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of one of the two kernels."""

    elements: int = 1024  # of the vectors that a program holds at once, at least one vector
    warps: int = 4
    turns: int = 1  # how often a program takes the next vectors


FORWARD = Config()
BACKWARD = Config(turns=32)


def why_not(vectors: int, size: int, *, interpret: bool) -> str | None:
    """The reason the kernels cannot run on so many vectors of this size, or None."""
    if size > LARGEST:
        return f"a vector has {size} elements; the kernels hold at most {LARGEST}"
    return triton.why_not(vectors * size, interpret)


class _Static(NamedTuple):
    eps: float
    gate_first: bool
    interpret: bool
    forward: Config
    backward: Config


class _Vectors(NamedTuple):
    """The vectors that a program holds: places in an array [vectors, groups, size], and which elements exist."""

    rows: jax.Array  # [R, 1]
    group: jax.Array
    columns: jax.Array  # [1, P]
    exists: jax.Array | None  # [R, P]; None: all

    def load(self, ref):
        return triton.load_where(ref, (self.rows, self.group, self.columns), self.exists).astype(jnp.float32)

    def store(self, ref, value):
        triton.store_where(ref, (self.rows, self.group, self.columns), value, self.exists)


def _held(config, size):
    """(vectors held at once, width of their tile)."""
    wide = power_of_two(size)
    return max(1, config.elements // wide), wide


class _Program(NamedTuple):
    """The vectors of one program in an array [vectors, groups, size]: `turns` times `rows` neighbours of one group."""

    shape: tuple[int, int, int]
    turns: int
    rows: int
    first: jax.Array
    group: jax.Array

    @classmethod
    def here(cls, config, shape):
        rows, _ = _held(config, shape[2])
        first = triton.program_id(0) * (config.turns * rows)
        return cls(shape, config.turns, rows, first, triton.program_id(1))

    def vectors(self, turn):
        """Those that it holds in its turn number `turn`."""
        count, _, size = self.shape
        wide = power_of_two(size)
        iota = partial(jax.lax.broadcasted_iota, jnp.int32)
        at, columns = self.first + turn * self.rows + iota((self.rows, 1), 0), iota((1, wide), 1)
        exists = None
        if count % (self.rows * self.turns) or size != wide:
            exists = (at < count) & (columns < size)
        return _Vectors(at, self.group, columns, exists)


def _programs(config, count, size):
    return -(-count // (_held(config, size)[0] * config.turns))


def _weight(ref, size, wide):
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, wide), 1)
    return triton.load_where(ref, (triton.program_id(1), columns), None if size == wide else columns < size)


def _mean(x, size):
    return jnp.sum(x, axis=1, keepdims=True) * (1.0 / size)


def _gate(z, interpret):
    """(sigmoid(z), SiLU(z))."""
    sigmoid = 1.0 / (1.0 + triton.exp(-z, interpret))
    return sigmoid, z * sigmoid


def _whole(x):
    return None if x is None else BlockSpec(x.shape, lambda p, g: (0,) * x.ndim)


def _forward(static, x, weight, gate):
    """y like x [vectors, groups, size]; weight [groups, size] in fp32; gate like x, or None."""
    config, interpret = static.forward, static.interpret
    count, groups, size = x.shape
    _, wide = _held(config, size)

    def norm(refs):
        program = _Program.here(config, x.shape)
        w = _weight(refs.weight, size, wide)

        def turn(i, carry):
            here = program.vectors(i)
            u = here.load(refs.x)
            opened = None if gate is None else _gate(here.load(refs.gate), interpret)[1]
            if gate is not None and static.gate_first:
                u = u * opened
            y = u * jax.lax.rsqrt(_mean(u * u, size) + static.eps) * w
            if gate is not None and not static.gate_first:
                y = y * opened
            here.store(refs.y, y)
            return carry

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(config.turns), turn, jnp.int32(0))

    made = triton.call(
        norm,
        {"x": (x, _whole(x)), "weight": (weight, _whole(weight)), "gate": (gate, _whole(gate))},
        {"y": (jax.ShapeDtypeStruct(x.shape, x.dtype), _whole(x))},
        grid=(_programs(config, count, size), groups), warps=config.warps, num_stages=1, interpret=interpret,
    )  # fmt: skip
    return made["y"]


def _backward(static, x, weight, gate, dy):
    """(dx, d weight [groups, size] in fp32, d gate or None) of `_forward`."""
    config, interpret = static.backward, static.interpret
    count, groups, size = x.shape
    rows, wide = _held(config, size)

    def reverse_norm(refs):
        program = _Program.here(config, x.shape)
        w = _weight(refs.weight, size, wide)

        def turn(i, total):
            here = program.vectors(i)
            u, d_scaled = here.load(refs.x), here.load(refs.dy)  # the latter of weight n, once the gate is taken in
            if gate is not None:
                z = here.load(refs.gate)
                sigmoid, opened = _gate(z, interpret)
                slope = sigmoid + opened * (1.0 - sigmoid)
            given, d_out = u, d_scaled
            if gate is not None and static.gate_first:
                u = u * opened
            elif gate is not None:
                d_scaled = d_scaled * opened
            r = jax.lax.rsqrt(_mean(u * u, size) + static.eps)
            n = u * r
            dn = d_scaled * w
            du = r * (dn - n * _mean(dn * n, size))
            if gate is None:
                here.store(refs.dx, du)
            elif static.gate_first:
                here.store(refs.dx, du * opened)
                here.store(refs.dgate, given * du * slope)
            else:
                here.store(refs.dx, du)
                here.store(refs.dgate, d_out * w * n * slope)
            return total + d_scaled * n

        total = jnp.zeros((rows, wide), jnp.float32)
        total = jax.lax.fori_loop(jnp.int32(0), jnp.int32(config.turns), turn, total)
        columns = jax.lax.broadcasted_iota(jnp.int32, (wide,), 0)
        part = jnp.sum(total, axis=0)
        triton.store_where(refs.parts, (columns,), part, None if size == wide else columns < size)

    like = lambda y: None if y is None else jax.ShapeDtypeStruct(y.shape, y.dtype)  # noqa: E731
    programs = _programs(config, count, size)
    made = triton.call(
        reverse_norm,
        {"x": (x, _whole(x)), "dy": (dy, _whole(dy)), "weight": (weight, _whole(weight)), "gate": (gate, _whole(gate))},
        {
            "dx": (like(x), _whole(x)),
            "dgate": (like(gate), _whole(gate)),
            "parts": (
                jax.ShapeDtypeStruct((programs, groups, size), jnp.float32),
                BlockSpec((None, None, size), lambda p, g: (p, g, 0)),
            ),
        },
        grid=(programs, groups), warps=config.warps, num_stages=1, interpret=interpret,
    )  # fmt: skip
    return made["dx"], made["parts"].sum(0), made["dgate"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, x, weight, gate):
    return _forward(static, x, weight.astype(jnp.float32), gate)


def _op_fwd(static, x, weight, gate):
    return _op(static, x, weight, gate), (x, weight, gate)


def _op_bwd(static, kept, dy):
    x, weight, gate = kept
    dx, d_weight, d_gate = _backward(static, x, weight.astype(jnp.float32), gate, dy)
    return dx, d_weight.astype(weight.dtype), d_gate


_op.defvjp(_op_fwd, _op_bwd)


def gated_norm(x, weight, gate, eps, gate_first, groups, *, interpret, forward=FORWARD, backward=BACKWARD):
    """Arguments as in api.gated_norm."""
    static = _Static(eps, gate_first, interpret, forward, backward)
    parts = lambda y: None if y is None else y.reshape(-1, groups, x.shape[-1] // groups)  # noqa: E731
    return _op(static, parts(x), parts(weight)[0], parts(gate)).reshape(x.shape)
