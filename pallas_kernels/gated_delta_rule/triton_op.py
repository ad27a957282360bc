"""The gated delta rule as Triton kernels: which sizes, which configuration, and the kernels put together.

block 64    prepare (parallel) -> forward (serial)                      reverse (serial) -> chunks (parallel)
block 128   prepare (parallel) -> state (serial) -> output (parallel)   reverse (serial) -> pairs, tokens (parallel)

A state is kept for the backward at the start of every block of tokens. With blocks of 64 there are twice as many states
to write and read, but the serial pass makes the outputs too, and one kernel makes the gradients; with blocks of 128
outputs and gradients take one more kernel each. Which is faster at a size is measured by `gdn tune`.

A serial pass has one program for each row, head and tile of value columns. Where those are too few to fill the device,
long rows are cut into pieces that run side by side; the result is the same but for rounding (triton_pieces.py).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import placement
from pallas_kernels import triton_calls as triton
from pallas_kernels.chunkwise import LEAST_LOG_DECAY, document_starts, pad_tokens
from pallas_kernels.gated_delta_rule import (
    configurations,
    triton_chunks,
    triton_gradients,
    triton_output,
    triton_pieces,
    triton_prepare,
    triton_state,
)
from pallas_kernels.gated_delta_rule.arrays import BLOCK, CHUNK, Documents, Kept, Tokens
from pallas_kernels.gated_delta_rule.configurations import Configuration, Every64

SIZES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (192, 384), (200, 400), (256, 256), (256, 512))

# a serial pass of at most FEW_PROGRAMS has its rows cut into pieces, as long as it then has at most MANY_PROGRAMS
FEW_PROGRAMS, MANY_PROGRAMS = 32, 256
SHORTEST_PIECE = 1024  # tokens


def why_not(key_dim: int, value_dim: int, chunk: int, *, interpret: bool) -> str | None:
    """The reason the kernels cannot run, or None."""
    if (key_dim, value_dim) not in SIZES:
        known = ", ".join(f"{k}x{v}" for k, v in SIZES)
        return f"there is no kernel for key x value dimensions {key_dim}x{value_dim} (there is for {known})"
    if chunk != CHUNK:
        return f"the kernels solve {CHUNK} tokens at once, not {chunk}"
    return triton.why_not(interpret)


def pieces(batch: int, tokens: int, value_heads: int, value_dim: int) -> int:
    """Into how many pieces the serial passes cut every row."""
    programs, count = configurations.programs(batch * value_heads, value_dim), 1
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
    configuration: Configuration


def _prepared(static, tokens):
    """(what the tokens of each chunk do to each other, the serial pass forward with its configuration)."""
    chosen, constants = static.configuration, {"scale": static.scale, "interpret": static.interpret}
    prepared = triton_prepare.solve_chunks(tokens, config=chosen.prepare, **constants)
    serial = chosen.forward if isinstance(chosen, Every64) else chosen.state
    return prepared, partial(triton_state.scan_forward, block=chosen.block, config=serial, **constants)


def _forward(static, tokens, initial_state, *, read, keep):
    """(o where `read`, final state of every piece, what the backward takes where `keep`)."""
    chosen, constants = static.configuration, {"scale": static.scale, "interpret": static.interpret}
    at_once = read and isinstance(chosen, Every64)  # outputs come with the states
    prepared, scan = _prepared(static, tokens)
    maps = None
    if static.pieces > 1:
        maps, local = _maps_and_local(scan, tokens, prepared)
        initial_state = triton_pieces.chain_pieces(
            maps, local, initial_state, count=static.pieces, reverse=False, interpret=static.interpret
        )
    scanned = scan(tokens, prepared, initial_state, read=at_once, keep=keep or not at_once)
    o = scanned.o
    if read and not at_once:
        o = triton_output.make_outputs(tokens, prepared, scanned, config=chosen.output, **constants)
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
    chosen, constants = static.configuration, {"scale": static.scale, "interpret": static.interpret}
    scan = partial(
        triton_state.scan_reverse, tokens, prepared, do, block=chosen.block, config=chosen.reverse, **constants
    )
    if static.pieces > 1:
        local = scan(None, keep=False).d_initial
        d_final = triton_pieces.chain_pieces(
            kept.maps, local, d_final, count=static.pieces, reverse=True, interpret=static.interpret
        )
    backward = scan(d_final, keep=True)
    if isinstance(chosen, Every64):
        gradients = triton_chunks.make_gradients(kept, do, backward, config=chosen.chunks, **constants)
    else:
        paired = triton_gradients.pair_tokens(kept, do, backward.dv, config=chosen.pairs, **constants)
        sums = triton_gradients.sum_gradients(kept, do, backward, paired, config=chosen.tokens, **constants)
        gradients = triton_gradients.gate_gradients(tokens.beta, sums)
    dq, dk, dg, dbeta = gradients
    group = tokens.beta.shape[1] // tokens.k.shape[2]
    if group > 1:
        dq, dk = (x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3).astype(jnp.bfloat16) for x in (dq, dk))
    return Tokens(dq, dk, backward.dv, dg, dbeta, Documents()), _of_rows(backward.d_initial, static.pieces, 0)


_op.defvjp(_op_fwd, _op_bwd)


def _given(q, k, v, g, beta, segment_ids, scale, residuals, configuration, interpret):
    """(_Static, Tokens) of the arguments."""
    (batch, tokens), (heads, value_dim) = k.shape[:2], v.shape[2:]
    count = pieces(batch, tokens, heads, value_dim)
    if configuration is None:
        kind, rows = "" if interpret else placement.device().device_kind, batch * count * heads
        configuration = configurations.choose(k.shape[-1], value_dim, kind, rows)
    padding = -tokens % (BLOCK * count)

    def cut(x):
        return x.reshape(batch * count, -1, *x.shape[2:])

    documents = Documents()
    if segment_ids is not None:
        numbers = jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)
        numbers = jnp.pad(numbers, ((0, 0), (0, padding)), mode="edge")
        before = jnp.pad(numbers, ((0, 0), (1, 0)))  # each token; document 0 before the first
        documents = Documents(cut(numbers), cut(before[:, : numbers.shape[1] : CHUNK]))
    g = jnp.maximum(g.astype(jnp.float32), LEAST_LOG_DECAY)
    given = [*(x.astype(jnp.bfloat16) for x in (q, k, v)), g, beta.astype(jnp.float32)]
    # k = v = beta = g = 0 writes nothing and keeps the state
    q, k, v, g, beta = (cut(pad_tokens(x, padding)) for x in given)
    given = Tokens(q, k, v, jnp.swapaxes(g, 1, 2), jnp.swapaxes(beta, 1, 2), documents)
    return _Static(scale, residuals, interpret, count, configuration), given


def gated_delta_rule(q, k, v, g, beta, initial_state, segment_ids, scale, residuals, configuration, interpret):
    """Arguments as in api.gated_delta_rule; initial_state, segment_ids and configuration may be None. Any T."""
    (batch, tokens), (heads, value_dim), dtype = q.shape[:2], v.shape[2:], v.dtype
    static, given = _given(q, k, v, g, beta, segment_ids, scale, residuals, configuration, interpret)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, q.shape[-1], value_dim), jnp.float32)
    o, state = _op(static, given, initial_state.astype(jnp.float32))
    return o.reshape(batch, -1, *o.shape[2:])[:, :tokens].astype(dtype), state


def part(k, v, g, beta, segment_ids, configuration, interpret):
    """(M [B,Hv,K,K], F [B,Hv,K,V]) of each row in fp32: its final state is M S_0 + F. It has no gradient."""
    static, given = _given(k, k, v, g, beta, segment_ids, 1.0, "inputs", configuration, interpret)
    prepared, scan = _prepared(static, given)
    pieces = (x.reshape(-1, static.pieces, *x.shape[1:]) for x in _maps_and_local(scan, given, prepared))
    (whole, *maps), (final, *local) = (jnp.moveaxis(x, 1, 0) for x in pieces)
    for after, added in zip(maps, local, strict=True):
        whole, final = (jnp.matmul(after, x, precision=jax.lax.Precision.HIGHEST) for x in (whole, final))
        final += added
    return whole, final


def _maps_and_local(scan, tokens, prepared):
    """Final states of the serial pass: from the identity with v = 0 [B,Hv,K,K], and from zero with v [B,Hv,K,V]."""
    (rows, _, _, K), heads = tokens.k.shape, tokens.beta.shape[1]
    identity = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), (rows, heads, K, K))
    maps = scan(tokens._replace(v=None), prepared, identity, read=False, keep=False).final
    return maps, scan(tokens, prepared, None, read=False, keep=False).final
