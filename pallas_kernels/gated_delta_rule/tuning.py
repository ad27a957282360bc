"""The kernels one by one, as `gdn tune` times them: random inputs, and what each makes of the arrays so far."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import (
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
from pallas_kernels.shapes import DeltaShape


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


def inputs(shape: DeltaShape, seed: int = 0) -> Work:
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


def run(
    kernel: str, work: Work, configuration: dict[str, Any], *, scale: float, block: int, interpret: bool
) -> Work:  # fmt: skip
    """What a kernel makes of the arrays so far, alone."""
    constants = {"scale": scale, "interpret": interpret, **configuration}
    match kernel:
        case "prepare":
            return Work(prepared=triton_prepare.prepare(work.tokens, **constants))
        case "forward" | "state":
            given, read = (work.tokens, work.prepared, work.initial_state), block == CHUNK
            return Work(scanned=triton_state.forward(*given, read=read, keep=True, block=block, **constants))
        case "output":
            return Work(o=triton_output.output(work.tokens, work.prepared, work.scanned, **constants))
        case "reverse":
            given = work.tokens, work.prepared, work.do, work.d_final
            return Work(backward=triton_state.reverse(*given, keep=True, block=block, **constants))
        case "chunks":
            return Work(gradients=triton_chunks.chunks(work.kept(), work.do, work.backward, **constants))
        case "pairs":
            return Work(paired=triton_gradients.pairs(work.kept(), work.do, work.backward.dv, **constants))
        case "tokens":
            given = work.kept(), work.do, work.backward, work.paired
            return Work(gradients=triton_gradients.tokens(*given, **constants))
    raise ValueError(f"There is no kernel {kernel!r}.")
