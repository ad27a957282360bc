"""The gated delta rule as Triton kernels: which sizes, which configuration, and the stages put together.

block 64    prepare (parallel) -> forward (serial)                      reverse (serial) -> chunks (parallel)
block 128   prepare (parallel) -> state (serial) -> output (parallel)   reverse (serial) -> pairs, tokens (parallel)

A block is the tokens between kept states: every 64 they are twice the traffic, but outputs come with them and gradients
need one kernel; every 128 both take one more. Which is faster is measured.

A serial pass has one program for each row, head and tile of value columns. Where that is too few for the device, long
rows are cut into pieces that run side by side, exactly (triton_pieces.py).
"""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_dialect as triton
from pallas_kernels.gated_delta_rule import (
    triton_chunks,
    triton_gradients,
    triton_output,
    triton_pieces,
    triton_prepare,
    triton_state,
)
from pallas_kernels.gated_delta_rule.arrays import BLOCK, CHUNK, Documents, Kept, Tokens
from pallas_kernels.tiles import document_starts, pad_tokens

SIZES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (192, 384), (200, 400), (256, 256), (256, 512))
TUNED = Path(__file__).with_name("tuned.json")  # written by `gdn tune`

# what runs where nothing was tuned
DEFAULTS = {
    "all": {"block": 128},  # tokens between kept states, and of one program of the gradients: 64 or 128
    "prepare": {"key_tile": 64, "warps": 4, "stages": 3},
    "forward": {"block_v": 64, "key_tile": 64, "transposed": False, "warps": 4, "stages": 2},
    "state": {"block_v": 64, "key_tile": 64, "transposed": False, "warps": 4, "stages": 2},
    "output": {"block_v": 64, "key_tile": 64, "warps": 4, "stages": 2},
    "reverse": {"block_v": 64, "key_tile": 64, "transposed": False, "ahead": False, "warps": 4, "stages": 2},
    "chunks": {"block_v": 64, "key_tile": 64, "warps": 4, "stages": 2},
    "pairs": {"block_v": 64, "warps": 4, "stages": 2},
    "tokens": {"block_v": 64, "key_tile": 128, "pair_tile": 32, "warps": 8, "stages": 2},
}

KERNELS = tuple(name for name in DEFAULTS if name != "all")

# The exponential of anything below is 0 in fp32, so that raising g to it changes no decay. It keeps the sums of 64 log
# decays, whose differences are the exponents within a chunk, small enough for fp32: a reset may be -1e9 or -inf.
LEAST_LOG_DECAY = -104.0

MOST_ELEMENTS = 1 << 31  # 32-bit indices
FEW_PROGRAMS, MANY_PROGRAMS = 32, 256  # of a serial pass: at most few, rows are cut into pieces, for at most many
SHORTEST_PIECE = 1024
ONE_EACH = 128  # programs of a serial pass: about one a multiprocessor


def stages(block: int) -> tuple[str, ...]:
    """The stages of forward and backward, in order, with states kept every `block` tokens."""
    if block == CHUNK:
        return ("prepare", "forward", "reverse", "chunks")
    return ("prepare", "state", "output", "reverse", "pairs", "tokens")


def largest_array(batch: int, tokens: int, value_heads: int, key_dim: int, value_dim: int) -> int:
    """Elements of the largest array that the kernels read or write: values, or states every 64 tokens."""
    return batch * value_heads * tokens * max(key_dim, value_dim, key_dim * value_dim // CHUNK)


def why_not(key_dim: int, value_dim: int, chunk: int, *, elements: int = 0, interpret: bool) -> str | None:
    """The reason the kernels cannot run, or None; `elements` is that of `largest_array`."""
    if elements >= MOST_ELEMENTS:
        return (
            f"an array of {elements:,} elements is past the {MOST_ELEMENTS:,} that they are made for; split the batch"
        )
    if (key_dim, value_dim) not in SIZES:
        known = ", ".join(f"{k}x{v}" for k, v in SIZES)
        return f"there is no kernel for key x value dimensions {key_dim}x{value_dim} (there is for {known})"
    if chunk != CHUNK:
        return f"the kernels solve {CHUNK} tokens at once, not {chunk}"
    return None if interpret else triton.why_not_here()


def not_admitted(key_dim: int, value_dim: int, device_kind: str) -> str | None:
    """The reason "auto" must leave the kernels alone at these sizes, or None where they passed their checks."""
    size = f"{key_dim}x{value_dim}"
    if size in _tuned().get("admitted", {}).get(device_kind, ()):
        return None
    return (
        f"its configuration at {size} has not passed the float64 check on {device_kind}; "
        f"`gdn tune gated_delta_rule --shapes 8x4096,24,{key_dim},{value_dim}` checks and admits it"
    )


@functools.cache
def _tuned() -> dict[str, Any]:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


_trial: list[dict] = []


def use(devices: dict[str, dict[str, dict[str, dict[str, Any]]]] | None) -> None:
    """Take configurations from `devices` instead of TUNED, until `use(None)`: tuning tries them out. Forgets what jax
    has compiled."""
    _trial[:] = [] if devices is None else [devices]
    jax.clear_caches()


def _programs(rows, value_dim):
    """Of a serial pass over `rows` rows times heads, one a tile of 64 value columns."""
    return rows * -(-value_dim // 64)


def entry(key_dim: int, value_dim: int, rows: int = MANY_PROGRAMS) -> str:
    """The name in the table of these sizes; `rows` is batch, or pieces, times value heads."""
    few = _programs(rows, value_dim) <= ONE_EACH
    return f"{key_dim}x{value_dim}" + few * " few"


def config(key_dim: int, value_dim: int, device_kind: str = "", rows: int = MANY_PROGRAMS) -> dict[str, dict[str, Any]]:
    """Stage -> configuration at these sizes: the table's for this kind of device, else for the first kind it has
    (all are Hopper), else the defaults. Where rows are few, what was tuned for that comes first."""
    devices = _trial[0] if _trial else _tuned().get("devices", {})
    of_device = devices.get(device_kind) or next(iter(devices.values()), {})
    names = entry(key_dim, value_dim, rows), entry(key_dim, value_dim)
    return DEFAULTS | next((of_device[name] for name in names if name in of_device), {})


def pieces(batch: int, tokens: int, value_heads: int, value_dim: int) -> int:
    """Into how many pieces the serial passes cut every row."""
    programs, count = _programs(batch * value_heads, value_dim), 1
    if programs > FEW_PROGRAMS:
        return 1
    while 2 * count * programs <= MANY_PROGRAMS and tokens >= 2 * count * SHORTEST_PIECE:
        count *= 2
    return count


class _Static(NamedTuple):
    scale: float
    residuals: str
    interpret: bool
    pieces: int


def _configs(tokens, value_heads, value_dim, static):
    kind = "" if static.interpret else jax.devices()[0].device_kind
    return config(tokens.k.shape[-1], value_dim, kind, tokens.k.shape[0] * value_heads)


def _forward(static, tokens, initial_state, *, read, keep):
    """(o where `read`, final state of every piece, what the backward takes where `keep`)."""
    configs = _configs(tokens, *tokens.v.shape[2:], static)
    block, constants = configs["all"]["block"], {"scale": static.scale, "interpret": static.interpret}
    prepared = triton_prepare.prepare(tokens, **constants, **configs["prepare"])
    serial = configs["forward" if block == CHUNK else "state"]
    scan = partial(triton_state.forward, prepared=prepared, block=block, **constants, **serial)
    maps = None
    if static.pieces > 1:
        rows, K, heads = tokens.k.shape[0], tokens.k.shape[-1], tokens.v.shape[2]
        identity = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), (rows, heads, K, K))
        maps = scan(tokens._replace(v=None), initial_state=identity, read=False, keep=False).final
        local = scan(tokens, initial_state=None, read=False, keep=False).final
        initial_state = triton_pieces.chain(
            maps, local, initial_state, count=static.pieces, reverse=False, interpret=static.interpret
        )
    at_once = read and block == CHUNK  # outputs come with the states
    scanned = scan(tokens, initial_state=initial_state, read=at_once, keep=keep or not at_once)
    o = scanned.o
    if read and not at_once:
        o = triton_output.output(tokens, prepared, scanned, **constants, **configs["output"])
    kept = Kept(tokens._replace(v=None, g=None), prepared, scanned.rho, scanned.states, maps)
    return o, scanned.final, kept if keep else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, tokens, initial_state):
    o, final, _ = _forward(static, tokens, initial_state, read=True, keep=False)
    return o, _of_rows(final, static.pieces, -1)


def _op_fwd(static, tokens, initial_state):
    keep = static.residuals == "saved"
    o, final, kept = _forward(static, tokens, initial_state, read=True, keep=keep)
    return (o, _of_rows(final, static.pieces, -1)), kept if keep else (tokens, initial_state)


def _of_rows(states, count, piece):
    """[B,Hv,K,V] of the first (0) or last (-1) of each row's `count` pieces."""
    return states.reshape(-1, count, *states.shape[1:])[:, piece]


def _op_bwd(static, saved, cotangents):
    kept = saved
    if not isinstance(saved, Kept):
        *_, kept = _forward(static, *saved, read=False, keep=True)
    tokens, prepared, (do, d_final) = kept.tokens, kept.prepared, cotangents
    configs = _configs(tokens, *kept.rho.shape[2:], static)
    block, constants = configs["all"]["block"], {"scale": static.scale, "interpret": static.interpret}
    scan = partial(triton_state.reverse, tokens, prepared, do, block=block, **constants, **configs["reverse"])
    if static.pieces > 1:
        local = scan(None, keep=False).d_initial
        d_final = triton_pieces.chain(
            kept.maps, local, d_final, count=static.pieces, reverse=True, interpret=static.interpret
        )
    backward = scan(d_final, keep=True)
    if block == CHUNK:
        gradients = triton_chunks.chunks(kept, do, backward, **constants, **configs["chunks"])
    else:
        paired = triton_gradients.pairs(kept, do, backward.dv, **constants, **configs["pairs"])
        sums = triton_gradients.tokens(kept, do, backward, paired, **constants, **configs["tokens"])
        gradients = triton_gradients.gates(tokens.beta, sums)
    dq, dk, dg, dbeta = gradients
    group = tokens.beta.shape[1] // tokens.k.shape[2]
    if group > 1:
        dq, dk = (x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3).astype(jnp.bfloat16) for x in (dq, dk))
    return Tokens(dq, dk, backward.dv, dg, dbeta, None), _of_rows(backward.d_initial, static.pieces, 0)


_op.defvjp(_op_fwd, _op_bwd)


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, scale, residuals, interpret):
    """Arguments as in api.gated_delta_rule; initial_state and segment_ids may be None. Any T."""
    (batch, tokens), dtype = q.shape[:2], v.dtype
    count = pieces(batch, tokens, *v.shape[2:])
    padding = -tokens % (BLOCK * count)

    def cut(x):
        return x.reshape(batch * count, -1, *x.shape[2:])

    documents = None
    if segment_ids is not None:
        numbers = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
        numbers = jnp.pad(numbers, ((0, 0), (0, padding)), mode="edge")
        before = jnp.pad(numbers, ((0, 0), (1, 0)))  # each token; document 0 before the first
        documents = Documents(cut(numbers), cut(before[:, : numbers.shape[1] : CHUNK]))
    g = jnp.maximum(g.astype(jnp.float32), LEAST_LOG_DECAY)
    given = [*(x.astype(jnp.bfloat16) for x in (q, k, v)), g, beta.astype(jnp.float32)]
    if padding:  # k = v = beta = g = 0 writes nothing and keeps the state
        given = [pad_tokens(x, padding) for x in given]
    if initial_state is None:
        initial_state = jnp.zeros((batch, *v.shape[2:3], q.shape[-1], v.shape[-1]), jnp.float32)
    q, k, v, g, beta = (cut(x) for x in given)
    given = Tokens(q, k, v, jnp.swapaxes(g, 1, 2), jnp.swapaxes(beta, 1, 2), documents)
    o, state = _op(_Static(scale, residuals, interpret, count), given, initial_state.astype(jnp.float32))
    return o.reshape(batch, -1, *o.shape[2:])[:, :tokens].astype(dtype), state
