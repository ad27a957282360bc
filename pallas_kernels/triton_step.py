"""One token of a recurrence with a matrix state as one Triton kernel, which reads and writes the state once, in place.

    S' = Diag(alpha) S + k u^T,    alpha = exp(g)
    o  = scale S'^T q

with u = v (linear attention), or u = beta (v - (alpha S)^T k) (the gated delta rule, which has one alpha a head). Value
columns need nothing of each other: a program holds all keys of a tile of columns in registers, so that the second
product with the state reads no memory. Everything is fp32; o is rounded to v's dtype.

A token moves 8 K V bytes of state a head and little else. Threads lie along the value columns, four of which are one
read of 16 bytes; tiles are as wide as registers allow, and narrower where programs are few. What belongs to the token
(q, k, v, g and beta) comes as one array, because XLA makes that, with all that goes before it, in one kernel, and
separate arrays in one each: where a batch is small the number of kernels is most of a token's time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import admission, dispatch
from pallas_kernels import triton_calls as triton
from pallas_kernels.tiles import Places, power_of_two
from pallas_kernels.triton_calls import BlockSpec

MOST_KEYS = 512
NORM_EPS = 1e-6
HELD = 8192  # elements of the state that a program of four warps holds: 64 registers a thread
NARROWEST = 16  # value columns: two sectors of memory
FEW_PROGRAMS = 264  # two for each of a Hopper GPU's 132 multiprocessors


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of the kernel."""

    value_tile: int = 32  # value columns of a program
    warps: int = 4


def configuration_for(rows: int, K: int, V: int) -> Config:
    """For states [rows, K, V]: the widest tile whose programs hold HELD elements, halved while programs are few."""
    tile = min(max(HELD // power_of_two(K), NARROWEST), power_of_two(V))
    while tile > NARROWEST and rows * -(-V // tile) < FEW_PROGRAMS:
        tile //= 2
    return Config(value_tile=tile, warps=4 if power_of_two(K) * tile >= HELD // 4 else 2)


def why_not(K: int, interpret: bool) -> str | None:
    """The reason the kernel cannot run on states of so many keys, or None."""
    if K > MOST_KEYS:
        return f"K is {K}; the kernel of one token holds at most {MOST_KEYS} keys"
    return triton.why_not(interpret)


def choose(op: str, impl: str, shape: tuple[int, int, int, int], dtype: Any, **sizes: Any) -> dispatch.Choice:
    """The implementation that `impl` means for a token of `op`, whose state has this shape [B, Hv, K, V].

    dtype: the widest of q, k and v
    sizes: what the op's check needs beside K and V

    Raises dispatch.CannotRun for a named one that cannot run.
    """
    reason = partial(why_not, shape[2])

    def admits():
        listed = admission.is_listed(admission.STEPS_TESTED)
        return admission.refusal(op, listed=listed, K=shape[2], V=shape[3], **sizes, step=True)

    return dispatch.choose(f"{op}_step", impl, reason, admits, dtype=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_gradients_of(plain: Callable[..., Any], kernel: Callable[..., Any], *arrays: jax.Array | None) -> Any:
    """kernel(*arrays), whose gradients are those of plain(*arrays): decoding needs none, and a kernel has none."""
    return kernel(*arrays)


def _forward(plain, kernel, *arrays):
    return kernel(*arrays), arrays


def _backward(plain, kernel, arrays, cotangents):
    return jax.vjp(plain, *arrays)[1](cotangents)


with_gradients_of.defvjp(_forward, _backward)


def advance_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array | None,
    state: jax.Array,
    *,
    scale: float,
    interpret: bool,
    l2norm: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(o like v, S' in the memory of S, which XLA copies before where something else needs it).

    q, k [B, H, K]  v [B, Hv, V]  g [B, Hv, 1 or K]  beta [B, Hv], or None: linear attention  state [B, Hv, K, V]; g,
    beta and state in fp32, none empty, and of sizes to which `why_not` has nothing to say. l2norm: q and k are still to
    be brought to norm 1.
    Source: arXiv 2412.06464, equation 10 and Table 1.
    """
    (B, Hv, K, V), H = state.shape, q.shape[1]
    rows, group = B * Hv, Hv // H
    config = config or configuration_for(rows, K, V)
    tiles, wide = -(-V // config.value_tile), power_of_two(K)
    parts = {"q": q, "k": k, "v": v, "g": g} | ({} if beta is None else {"beta": beta[..., None]})
    begins, end = {}, 0
    for name, x in parts.items():
        begins[name], end = end, end + x.size // B

    def one_token(refs):
        program = triton.program_id(0)
        row, tile = triton.quotient(program, tiles), triton.remainder(program, tiles)
        batch, value_head = triton.quotient(row, Hv), triton.remainder(row, Hv)
        key_head = triton.quotient(value_head, group)
        iota = partial(jax.lax.broadcasted_iota, jnp.int32)
        keys, columns = iota((wide,), 0), tile * config.value_tile + iota((config.value_tile,), 0)
        is_key, is_column = keys < K, columns < V
        is_both = is_key[:, None] & is_column[None, :]
        if wide == K and V % config.value_tile == 0:
            is_key = is_column = is_both = None
        of_state, of_output = Places((keys[:, None], columns[None, :]), is_both), Places((columns,), is_column)

        def part(name, head, numbers, exists):
            size = parts[name].shape[2]
            return Places((begins[name] + size * head + numbers,), exists).load(refs.token, batch)

        matrix = of_state.load(refs.state, row)  # first: all other loads wait beside it
        key, query = part("k", key_head, keys, is_key), part("q", key_head, keys, is_key)
        update = part("v", value_head, columns, is_column)
        one = iota((1,), 0), None
        decay = part("g", value_head, *((keys, is_key) if g.shape[2] > 1 else one))
        strength = None if beta is None else part("beta", value_head, *one)

        if l2norm:
            key, query = (x * jax.lax.rsqrt(jnp.sum(x * x) + NORM_EPS) for x in (key, query))
        matrix = triton.exp(decay, interpret)[:, None] * matrix
        if beta is not None:
            update = strength * (update - jnp.sum(key[:, None] * matrix, axis=0))
        matrix = matrix + key[:, None] * update[None, :]
        of_state.store(refs.after, matrix, row)
        of_output.store(refs.o, scale * jnp.sum(query[:, None] * matrix, axis=0), row)

    def whole(shape):
        return BlockSpec(shape, lambda i: (0,) * len(shape))

    token = jnp.concatenate([x.reshape(B, -1).astype(jnp.float32) for x in parts.values()], axis=1)
    states = (rows, K, V)
    made = triton.call(
        one_token,
        {"token": (token, whole(token.shape)), "state": (state.reshape(states), whole(states))},
        {
            "o": (jax.ShapeDtypeStruct((rows, V), v.dtype), whole((rows, V))),
            "after": (jax.ShapeDtypeStruct(states, state.dtype), whole(states)),
        },
        grid=(rows * tiles,), warps=config.warps, num_stages=1, interpret=interpret, in_place={"state": "after"},
    )  # fmt: skip
    return made["o"].reshape(v.shape), made["after"].reshape(state.shape)
