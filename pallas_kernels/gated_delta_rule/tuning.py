"""The kernels one by one, as `gdn tune` times them: random inputs, what each makes of the arrays so far, the
configurations worth a try, and the cases that admit one."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import (
    configurations,
    triton_chunks,
    triton_gradients,
    triton_op,
    triton_output,
    triton_prepare,
    triton_state,
)
from pallas_kernels.gated_delta_rule.arrays import (
    CHUNK,
    Documents,
    Gradients,
    Kept,
    Pairs,
    Prepared,
    Reversed,
    Scanned,
    Sums,
    Tokens,
)
from pallas_kernels.gated_delta_rule.benchmark import Shape
from pallas_kernels.gated_delta_rule.configurations import Configuration, Every64, Every128, Kernel
from pallas_kernels.gated_delta_rule.conformance import CASES, Case

KERNELS, KINDS = configurations.KERNELS, configurations.BLOCKS

# cases of conformance.py that a configuration must pass before it is admitted
CHECKS = ("T=129", "documents", "decay 0.3", "group value", "beta in (1,2)")


def why_not(shape: Shape) -> str | None:
    """The reason a shape has no kernels, or None."""
    if (shape.key_dim, shape.value_dim) in triton_op.SIZES:
        return None
    return triton_op.why_not(shape.key_dim, shape.value_dim, CHUNK, interpret=True)


def as_run(shape: Shape) -> Shape:
    """`shape` as the kernels see it: long rows of few heads are cut."""
    count = triton_op.pieces(shape.batch, shape.tokens, shape.heads, shape.value_dim)
    return shape._replace(batch=shape.batch * count, tokens=shape.tokens // count)


def entry_name(shape: Shape) -> str:
    """The name in the table of a shape as it is run: "few" where rows times heads leave the serial passes about one
    program a multiprocessor."""
    return configurations.entry_name(shape.key_dim, shape.value_dim, shape.batch * shape.heads)


def admits(name: str) -> bool:
    """Whether "auto" asks the entry of this name if it may take the kernels; it never asks one of few rows."""
    return not name.endswith(" few")


def in_force(shape: Shape, device_kind: str) -> Configuration:
    """What runs there before it is tuned."""
    return configurations.choose(shape.key_dim, shape.value_dim, device_kind, shape.batch * shape.heads)


def wholes(shape: Shape) -> list[Configuration]:
    """The defaults of every way to put the op together that is worth a try: states every 64 or every 128 tokens. Wide
    heads are tried at 128 alone: states every 64 tokens would be most of their traffic."""
    return [Every64(), Every128()] if shape.key_dim in (64, 128) else [Every128()]


def checks(shape: Shape) -> list[Case]:
    """The cases of CHECKS at these sizes."""
    sizes = {"K": shape.key_dim, "V": shape.value_dim, "dtype": "bfloat16"}
    return [replace(case, **sizes) for case in CASES if case.name in CHECKS]


class Work(NamedTuple):
    """The arrays of one call, as far as they are made."""

    tokens: Tokens | None = None
    initial_state: jax.Array | None = None
    do: jax.Array | None = None
    d_final: jax.Array | None = None
    prepared: Prepared | None = None
    scanned: Scanned | None = None
    o: jax.Array | None = None
    backward: Reversed | None = None
    paired: Pairs | None = None
    gradients: Gradients | Sums | None = None

    def kept(self) -> Kept:
        """What the backward takes."""
        return Kept(self.tokens, self.prepared, self.scanned.rho, self.scanned.states, None)

    def with_made(self, made: "Work") -> "Work":
        """These arrays and those that `made` holds."""
        return Work(*(old if new is None else new for old, new in zip(self, made, strict=True)))


def inputs(shape: Shape, seed: int = 0) -> Work:
    """What the first kernels take: unit q and k, normal v and do, decays and strengths of a fresh model."""
    B, T, H, K, V = shape
    keys = jax.random.split(jax.random.key(seed), 6)

    @jax.jit
    def draw():
        q, k = (jax.random.normal(key, (B, T, H, K)) for key in keys[:2])
        q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        v, do = (jax.random.normal(key, (B, T, H, V)) for key in keys[2:4])
        g = jax.nn.log_sigmoid(jax.random.normal(keys[4], (B, H, T))) / 4
        beta = jax.nn.sigmoid(jax.random.normal(keys[5], (B, H, T)))
        q, k, v, do = (x.astype(jnp.bfloat16) for x in (q, k, v, do))
        state = jnp.zeros((B, H, K, V), jnp.float32)
        return Work(Tokens(q, k, v, g, beta, Documents()), state, do, state)

    return draw()


def run(work: Work, config: Kernel, whole: Configuration, *, interpret: bool) -> Work:
    """What the kernel of this configuration makes of the arrays so far, alone, as a part of `whole`."""
    block, scale = whole.block, work.tokens.k.shape[-1] ** -0.5
    constants = {"scale": scale, "interpret": interpret, "config": config}
    match config:
        case configurations.Prepare():
            return Work(prepared=triton_prepare.solve_chunks(work.tokens, **constants))
        case configurations.Scan():
            given, read = (work.tokens, work.prepared, work.initial_state), block == CHUNK
            return Work(scanned=triton_state.scan_forward(*given, read=read, keep=True, block=block, **constants))
        case configurations.Output():
            return Work(o=triton_output.make_outputs(work.tokens, work.prepared, work.scanned, **constants))
        case configurations.Reverse():
            given = work.tokens, work.prepared, work.do, work.d_final
            return Work(backward=triton_state.scan_reverse(*given, keep=True, block=block, **constants))
        case configurations.Chunks():
            return Work(gradients=triton_chunks.make_gradients(work.kept(), work.do, work.backward, **constants))
        case configurations.Pairs():
            return Work(paired=triton_gradients.pair_tokens(work.kept(), work.do, work.backward.dv, **constants))
        case configurations.Tokens():
            given = work.kept(), work.do, work.backward, work.paired
            return Work(gradients=triton_gradients.sum_gradients(*given, **constants))


def candidates(default: Kernel, shape: Shape) -> list[Kernel]:
    """Configurations of a kernel worth a try: its default, those that were among the fastest at some size, and their
    neighbours."""
    widest = 1 << (shape.key_dim.bit_length() - 1)
    wide, widest = min(128, widest), min(256, widest)

    def grid(**choices):
        rows = itertools.product(*choices.values())
        return [replace(default, **dict(zip(choices, values, strict=True))) for values in rows]

    def scans(**more):
        found = grid(
            value_tile=(64,), key_tile=(64, widest), transposed=(False, True), warps=(4,), num_stages=(2, 3), **more
        )
        found += grid(value_tile=(128,), key_tile=(widest,), transposed=(True,), warps=(8,), num_stages=(2, 3), **more)
        return found + grid(value_tile=(32,), key_tile=(widest,), warps=(4,), num_stages=(2, 3), **more)

    match default:
        case configurations.Prepare():
            found = grid(key_tile=(64, 128), warps=(4,), num_stages=(2, 3))
        case configurations.Scan():
            found = scans()
        case configurations.Reverse():
            found = scans(ahead=(True,)) + scans(ahead=(False,))
        case configurations.Output():
            found = grid(value_tile=(32, 64), key_tile=(64, widest), warps=(4,), num_stages=(2, 3))
            found += grid(value_tile=(64, 128), key_tile=(widest,), warps=(8,), num_stages=(2,))
        case configurations.Chunks():
            found = grid(value_tile=(64, 128), key_tile=(32, 64), warps=(4,), num_stages=(2, 3))
            found += grid(value_tile=(64, 128), key_tile=(wide,), warps=(8,), num_stages=(2, 3))
        case configurations.Pairs():
            found = grid(value_tile=(32, 64), warps=(4,), num_stages=(2, 3))
        case configurations.Tokens():
            found = grid(value_tile=(32, 64), key_tile=(wide,), pair_tile=(32, 64), warps=(8,), num_stages=(2, 3, 4))
            found += grid(value_tile=(64,), key_tile=(64,), pair_tile=(32,), warps=(4, 8), num_stages=(2, 3))
    return list(dict.fromkeys([default, *found]))
