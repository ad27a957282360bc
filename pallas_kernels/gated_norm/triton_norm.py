"""RMS norm with a SiLU gate as one Triton kernel forward and one backward, each reading and writing every array once.

A program holds `rows` whole vectors at a time, and works through one or more such sets. The backward makes r, n and
SiLU(gate) again from the inputs, which it reads anyway, so that nothing else is kept; equations as in chunked.py. The
weight's gradient is a sum over all vectors: each program makes its own part, and XLA adds the parts.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.tiles import Places, power_of_two
from pallas_kernels.triton_calls import BlockSpec

LARGEST = 8192  # elements of a vector


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of one of the two kernels."""

    elements: int = 1024  # of the vectors that a program holds at once, at least one vector
    warps: int = 4
    repeats: int = 1  # how many such sets of vectors a program works through, one after another


FORWARD = Config()
BACKWARD = Config(repeats=32)


def why_not(size: int, *, interpret: bool) -> str | None:
    """The reason the kernels cannot run on vectors of this size, or None."""
    if size > LARGEST:
        return f"a vector has {size} elements; the kernels hold at most {LARGEST}"
    return triton.why_not(interpret)


class _Static(NamedTuple):
    eps: float
    gate_first: bool
    interpret: bool
    forward: Config
    backward: Config


class _Vectors(NamedTuple):
    """How vectors [count, groups, size] are split: a program takes `rows` neighbours of one group, `repeats` times."""

    count: int
    size: int
    rows: int
    repeats: int

    @classmethod
    def of(cls, shape, config):
        count, _, size = shape
        return cls(count, size, max(1, config.elements // power_of_two(size)), config.repeats)

    @property
    def wide(self):
        """The width of a tile of them."""
        return power_of_two(self.size)

    @property
    def programs(self):
        return -(-self.count // (self.rows * self.repeats))

    def of_program(self):
        """(number of its first one, number of its group)."""
        return triton.program_id(0) * (self.repeats * self.rows), triton.program_id(1)

    def places(self, first, group, repeat):
        """Those that a program holds in its repeat number `repeat`."""
        iota = partial(jax.lax.broadcasted_iota, jnp.int32)
        at, columns = first + repeat * self.rows + iota((self.rows, 1), 0), iota((1, self.wide), 1)
        exists = None
        if self.count % (self.rows * self.repeats) or self.size != self.wide:
            exists = (at < self.count) & (columns < self.size)
        return Places((at, group, columns), exists)

    def weight(self, ref):
        columns = jax.lax.broadcasted_iota(jnp.int32, (1, self.wide), 1)
        exists = None if self.size == self.wide else columns < self.size
        return triton.load_where(ref, (triton.program_id(1), columns), exists)


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
    (_, groups, size), vectors = x.shape, _Vectors.of(x.shape, config)

    def normalise(refs):
        first, group = vectors.of_program()
        w = vectors.weight(refs.weight)

        def normalise_rows(i, carry):
            here = vectors.places(first, group, i)
            u = here.load(refs.x)
            opened = None if gate is None else _gate(here.load(refs.gate), interpret)[1]
            if gate is not None and static.gate_first:
                u = u * opened
            y = u * jax.lax.rsqrt(_mean(u * u, size) + static.eps) * w
            if gate is not None and not static.gate_first:
                y = y * opened
            here.store(refs.y, y)
            return carry

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(config.repeats), normalise_rows, jnp.int32(0))

    made = triton.call(
        normalise,
        {"x": (x, _whole(x)), "weight": (weight, _whole(weight)), "gate": (gate, _whole(gate))},
        {"y": (jax.ShapeDtypeStruct(x.shape, x.dtype), _whole(x))},
        grid=(vectors.programs, groups), warps=config.warps, num_stages=1, interpret=interpret,
    )  # fmt: skip
    return made["y"]


def _backward(static, x, weight, gate, dy):
    """(dx, d weight [groups, size] in fp32, d gate or None) of `_forward`."""
    config, interpret = static.backward, static.interpret
    (_, groups, size), vectors = x.shape, _Vectors.of(x.shape, config)

    def reverse_normalise(refs):
        first, group = vectors.of_program()
        w = vectors.weight(refs.weight)

        def reverse_rows(i, total):
            here = vectors.places(first, group, i)
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

        total = jnp.zeros((vectors.rows, vectors.wide), jnp.float32)
        total = jax.lax.fori_loop(jnp.int32(0), jnp.int32(config.repeats), reverse_rows, total)
        columns = jax.lax.broadcasted_iota(jnp.int32, (vectors.wide,), 0)
        part = jnp.sum(total, axis=0)
        triton.store_where(refs.parts, (columns,), part, None if size == vectors.wide else columns < size)

    like = lambda y: None if y is None else jax.ShapeDtypeStruct(y.shape, y.dtype)  # noqa: E731
    made = triton.call(
        reverse_normalise,
        {"x": (x, _whole(x)), "dy": (dy, _whole(dy)), "weight": (weight, _whole(weight)), "gate": (gate, _whole(gate))},
        {
            "dx": (like(x), _whole(x)),
            "dgate": (like(gate), _whole(gate)),
            "parts": (
                jax.ShapeDtypeStruct((vectors.programs, groups, size), jnp.float32),
                BlockSpec((None, None, size), lambda p, g: (p, g, 0)),
            ),
        },
        grid=(vectors.programs, groups), warps=config.warps, num_stages=1, interpret=interpret,
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
