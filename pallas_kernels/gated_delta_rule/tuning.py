"""The kernels one by one, as `gdn tune` times them: random inputs, what each makes of the arrays
so far, and the configurations worth a try."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import (
    configurations,
    triton_chunks,
    triton_gradients,
    triton_output,
    triton_prepare,
    triton_state,
)
from pallas_kernels.gated_delta_rule.arrays import (
    CHUNK,
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
from pallas_kernels.gated_delta_rule.configurations import Kernel


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
        return Work(Tokens(q, k, v, g, beta, None), state, do, state)

    return draw()


def run(work: Work, config: Kernel, *, block: int, scale: float, interpret: bool) -> Work:
    """What the kernel of this configuration makes of the arrays so far, alone, with states every `block` tokens."""
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


def candidates(default: Kernel, key_dim: int) -> list[Kernel]:
    """Configurations of a kernel worth a try: its default, those that were among the fastest at some size, and their
    neighbours."""
    widest = 1 << (key_dim.bit_length() - 1)
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
            found = grid(value_tile=(32, 64), key_tile=(wide,), pair_tile=(32, 64), warps=(8,), num_stages=(2, 3))
            found += grid(value_tile=(64,), key_tile=(64,), pair_tile=(32,), warps=(4, 8), num_stages=(2, 3))
    return list(dict.fromkeys([default, *found]))
