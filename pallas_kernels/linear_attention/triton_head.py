"""Linear attention with one decay a head as three Triton kernels, which the forward and the backward share.

Tokens are taken in chunks of C. total_i is the sum of a chunk's log decays up to token i. gamma_i = exp(total_i) is the
fraction of the entering state that is left at token i, leaving_j = exp(total_C - total_j) the fraction of token j's
write that is left at the chunk's end, and D_ij = exp(total_i - total_j) for i >= j of one document, else 0. One kernel
carries a state from chunk to chunk, two do the rest, all chunks at once:

    carry   S'  = gamma_C S + K^T (leaving V)            dS  = gamma_C dS' + Q^T (scale gamma dO)
    read    O   = (scale D . Q K^T) V + scale gamma (Q S)
            dV  = (scale D . Q K^T)^T dO + leaving (K dS')
    back    dQ  = (scale D . dO V^T) K + scale gamma (dO S^T)
            dK  = (scale D . dO V^T)^T Q + leaving (V dS'^T)

with S entering and dS' leaving a chunk. Both carries are S' = gamma_C S + Z^T (write Y), and all four others
out = (scale D . X Z^T) Y + read (X S), where `read` has the Z, Y and S of the two carries. Where keys are few a program
of carry holds whole columns of the state, and makes O or dV on its way, for S is in its registers then.

A program of `read` makes its chunk's pairs X Z^T once, keeps them and X, and then goes through the columns of Y and S.
A program of `back` goes through the columns of X, Z and S, and adds up pairs and dQ or dK as it goes: for all value
heads of a key head, in fp32, whose pairs are then multiplied with the one K or Q together. So each array is read once
for each chunk, but what a tile of dQ's columns has in common with its neighbours.

The log decay g_t scales every pair i >= t > j of the chunk and the state S' that leaves it, so that

    dg_t = sum over i >= t in the chunk of (q_i . dq_i - k_i . dk_i) + <S', dS'>

for each value head. Under strong decays dg is what is left of two numbers that nearly cancel, so `back` makes them in
fp32: q . dq from dQ before it is rounded, or where a key head has several value heads, for each of these

    q . dq = sum over its row of (scale D . dO V^T) . (Q K^T) + scale gamma dO . (Q S)

and k . dk alike; a pair of tokens is in both and cancels. <S', dS'> is a sum in `back` too, whose programs are many: in
the serial carry each chunk waited for S'.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import triton_calls as triton
from pallas_kernels.chunkwise import LEAST_LOG_DECAY, document_numbers, pad_tokens
from pallas_kernels.tiles import Tiling, at_tile, owned
from pallas_kernels.triton_calls import BlockSpec

LEAST_DIM, MOST_DIM = 16, 512
BLOCK = 64  # tokens of a chunk whose carry makes O or dV


@dataclass(frozen=True, kw_only=True)
class Carry:
    """Of the serial kernel: a program owns a tile of the state, or all keys of its columns where `joined`."""

    joined: bool = False  # whether it also makes the outputs, where a chunk is one block
    key_tile: int = 64
    value_tile: int = 64
    token_tile: int = 64  # tokens of one product; where it makes outputs, those of a block
    warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Read:
    """Of the kernel that makes O or dV: a program makes a chunk's, a tile of columns after the other."""

    value_tile: int = 64
    key_tile: int = 64  # of the columns that are summed over
    warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Back:
    """Of the kernel that makes dQ or dK: a program makes a tile of a chunk's columns."""

    key_tile: int = 256
    value_tile: int = 64  # of the columns that are summed over
    warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Of every launch, and the tokens of a chunk: 64 or 128."""

    chunk: int = 128
    forward: Carry = Carry()
    reverse: Carry = Carry()
    read: Read = Read()  # O and dV, where the carries leave them
    back: Back = Back()  # dQ and dK

    def __post_init__(self):
        if self.chunk not in (BLOCK, 2 * BLOCK):
            raise ValueError(f"chunk is {self.chunk}; the kernels take chunks of {BLOCK} or {2 * BLOCK} tokens")


def configuration_for(K: int, V: int) -> Configuration:
    """The fastest of those timed: at RetNet's heads (256 x 512), at 128 x 128, and at Mamba2's (128 x 64)."""
    if K <= 128 and (V <= 128 or K < 128):
        carry = Carry(joined=True, key_tile=128, num_stages=2)
        stages = 3 if V < 128 else 2
        back = Back(key_tile=128, warps=4, num_stages=stages)
        return Configuration(chunk=BLOCK, forward=carry, reverse=carry, back=back)
    if min(K, V) < 128:
        read = Read(warps=4) if K <= 256 else Read(value_tile=32, warps=4, num_stages=2)
        return Configuration(chunk=BLOCK, read=read, back=Back(key_tile=128, warps=4, num_stages=2))
    carry = Carry(key_tile=128, value_tile=128, num_stages=2)
    read = Read() if K <= 256 else Read(value_tile=32, num_stages=2)
    return Configuration(chunk=128, forward=carry, reverse=carry, read=read)


def why_not(K: int, V: int, *, interpret: bool) -> str | None:
    """The reason that these kernels, and those of triton_channel.py, cannot run at these dimensions, or None."""
    for name, size in (("K", K), ("V", V)):
        if not LEAST_DIM <= size <= MOST_DIM:
            return f"{name} is {size}; the kernels take {LEAST_DIM} to {MOST_DIM}"
    return triton.why_not(interpret)


class _Static(NamedTuple):
    chunk: int
    scale: float
    residuals: str
    interpret: bool
    configuration: Configuration

    def makes_outputs(self, carry: Carry) -> bool:
        """Whether a carry makes O or dV on its way."""
        return carry.joined and self.chunk == BLOCK


class _Decays(NamedTuple):
    """Decays of tokens and chunks, fp32, T a multiple of C; gamma, leaving, end are 0 across a document's border."""

    total: jax.Array  # [B,Hv,T] the chunk's log decays up to a token
    gamma: jax.Array  # [B,Hv,T] the fraction of the entering state that is left at a token
    leaving: jax.Array  # [B,Hv,T] the fraction of a token's write that is left at the chunk's end
    end: jax.Array  # [B,Hv,N] gamma of a chunk's last token
    numbers: jax.Array | None  # [B,T] int32: the token's document; None where a row is one document


def _decays(g, numbers, chunk):
    """`_Decays` of g [B,Hv,T] and the documents [B,1+T] counted along each row, beginning with what came before."""
    by_chunk = (*g.shape[:2], -1, chunk)
    total = jnp.cumsum(g.reshape(by_chunk), axis=-1)
    gamma = jnp.exp(total)
    later = jnp.pad(g.reshape(by_chunk)[..., 1:], ((0, 0),) * 3 + ((0, 1),))
    leaving = jnp.exp(jax.lax.cumsum(later, axis=3, reverse=True))  # a sum, not a difference of large ones
    own = None
    if numbers is not None:
        own = numbers[:, 1:]
        each = own.reshape(own.shape[0], 1, -1, chunk)
        before = numbers[:, :-1].reshape(each.shape)[..., :1]
        gamma = jnp.where(each == before, gamma, 0.0)
        leaving = jnp.where(each == each[..., -1:], leaving, 0.0)
    return _Decays(*(x.reshape(g.shape) for x in (total, gamma, leaving)), gamma[..., -1], own)


def _left(total, numbers, late, interpret):
    """D [C, C] from a chunk's totals and its tokens' documents, or its transpose if not `late`."""
    between = total[:, None] - total[None, :] if late else total[None, :] - total[:, None]
    iota = partial(jax.lax.broadcasted_iota, jnp.int32, between.shape)
    allowed = iota(0) >= iota(1) if late else iota(0) <= iota(1)
    if numbers is not None:
        allowed &= numbers[:, None] == numbers[None, :]
    return triton.exp(jnp.where(allowed, between, -jnp.inf), interpret)


class _Asked(NamedTuple):
    """What a carry makes on its way: out = (scale D . X Z^T) Y + read (X S), [B,T,Hv,V]."""

    x: jax.Array  # [B,T,H,K]
    read: jax.Array  # [B,Hv,T]
    scale: float


class _Carried(NamedTuple):
    states: jax.Array | None  # [B,Hv,N+1,K,V] bf16 that enter the chunks, and the last; in reverse N that leave them
    final: jax.Array  # [B,Hv,K,V] fp32
    out: jax.Array | None  # [B,T,Hv,V] bf16


def _carry(z, y, write, decays, initial, asked, *, reverse, keep, config, chunk, interpret):
    """S' = end S + Z^T (write Y), chunk after chunk; in reverse from the last to the first, for gradients dS'.

    z [B,T,H,K], y [B,T,Hv,V], write [B,Hv,T]; initial [B,Hv,K,V] fp32, or None for zeros. The states are
    stored where `keep`.
    """
    (B, T, H, K), (Hv, V) = z.shape, y.shape[2:]
    N, group = T // chunk, Hv // H
    down, along = Tiling(K, config.key_tile), Tiling(V, config.value_tile)
    token_tile = BLOCK if asked is not None or chunk % config.token_tile else config.token_tile

    def lin_carry(refs):
        origin = 0 * triton.program_id(0)

        def join(states, keys, z, y, tokens):
            """The rows of out, from the state that enters their chunk, or in reverse the gradient of what leaves it."""
            pairs, read = jnp.zeros((BLOCK, BLOCK), jnp.float32), jnp.zeros(y.shape, jnp.float32)
            for state, key, other_rows in zip(states, keys, z, strict=True):
                rows = key.own(refs.x[tokens, key.place32(origin)])
                pairs += triton.dot(rows, other_rows.T)
                read += triton.dot(rows, state.astype(jnp.bfloat16))
            total = refs.total[tokens]
            numbers = None if decays.numbers is None else refs.numbers[tokens]
            left = _left(total, numbers, not reverse, interpret)
            pairs = (asked.scale * left * pairs).astype(jnp.bfloat16)
            return refs.read[tokens][:, None] * read + triton.dot(pairs, y)

        def body(keys, value):
            columns = value.place32(origin)
            value = value._replace(start=columns.start)
            places = [(key.place32(origin), owned(key, value)) for key in keys]

            def store(n, states):
                for (place, mine), state in zip(places, states, strict=True):
                    triton.store_where(refs.states, (n, place, columns), state, mine)

            def step(i, states):
                n = N - 1 - i if reverse else i
                if keep:
                    store(n, states)
                new = [refs.end[n] * state for state in states]
                for piece in range(chunk // token_tile):
                    tokens = triton.ds(n * chunk + piece * token_tile, token_tile)
                    z, y = [refs.z[tokens, place] for place, _ in places], refs.y[tokens, columns]
                    if asked is not None:
                        value.store_columns(refs.out, tokens, join(states, keys, z, y, tokens))
                    added = (refs.write[tokens][:, None] * y.astype(jnp.float32)).astype(jnp.bfloat16)
                    new = [state + triton.dot(rows.T, added) for state, rows in zip(new, z, strict=True)]
                return tuple(new)

            if initial is None:
                states = tuple(jnp.zeros((key.width, columns.size), jnp.float32) for key in keys)
            else:
                states = tuple(refs.initial[place, columns] for place, _ in places)
            states = jax.lax.fori_loop(jnp.int32(0), jnp.int32(N), step, states)
            for (place, mine), state in zip(places, states, strict=True):
                triton.store_where(refs.final, (place, columns), state, mine)
            if keep and not reverse:
                store(jnp.int32(N), states)

        if asked is None:
            at_tile(triton.program_id(0), down, along, lambda key, value: body((key,), value))
        else:
            along.at(triton.program_id(0), partial(body, down.tiles()))

    tiles = along.number * (down.number if asked is None else 1)
    key = BlockSpec((None, T, None, K), lambda i, h, b: (b, 0, triton.quotient(h, group), 0))
    value = BlockSpec((None, T, None, V), lambda i, h, b: (b, 0, h, 0))
    gate = BlockSpec((None, None, T), lambda i, h, b: (b, h, 0))
    state = BlockSpec((None, None, K, V), lambda i, h, b: (b, h, 0, 0))
    kept = lambda count: BlockSpec((None, None, count, K, V), lambda i, h, b: (b, h, 0, 0, 0))  # noqa: E731
    count = N if reverse else N + 1
    shape = lambda wanted, *sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype) if wanted else None  # noqa: E731
    x, read, _ = (None, None, None) if asked is None else asked
    made = triton.call(
        lin_carry,
        {
            "z": (z, key), "y": (y, value), "write": (write, gate), "initial": (initial, state),
            "end": (decays.end, BlockSpec((None, None, N), lambda i, h, b: (b, h, 0))),
            "x": (x, key), "read": (read, gate), "total": (None if asked is None else decays.total, gate),
            "numbers": (None if asked is None else decays.numbers, BlockSpec((None, T), lambda i, h, b: (b, 0))),
        },
        {
            "states": (shape(keep, B, Hv, count, K, V, dtype=jnp.bfloat16), kept(count)),
            "final": (shape(True, B, Hv, K, V, dtype=jnp.float32), state),
            "out": (shape(asked is not None, B, T, Hv, V, dtype=jnp.bfloat16), value),
        },
        grid=(tiles, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return _Carried(**made)


def _read(x, z, y, read, states, decays, *, late, scale, config, chunk, interpret):
    """O [B,T,Hv,V] bf16 of x, z, y = q, k, v if `late`; else dV of k, q, dO, where states are the gradients."""
    (B, T, H, K), (Hv, V) = x.shape, y.shape[2:]
    group = Hv // H
    key_tiles = Tiling(K, config.key_tile)

    def lin_read(refs):
        origin = 0 * triton.program_id(0)
        rows = triton.ds(0, chunk)

        def multiply(pairs, tile):
            keys = tile.place32(origin)
            return pairs + triton.dot(tile.own(refs.x[rows, keys]), refs.z[rows, keys].T)

        pairs = key_tiles.over(multiply, jnp.zeros((chunk, chunk), jnp.float32))
        numbers = None if refs.numbers is None else refs.numbers[rows]
        pairs = (scale * _left(refs.total[rows], numbers, late, interpret) * pairs).astype(jnp.bfloat16)
        reading = []
        for tile in key_tiles.tiles():
            weighted = refs.read[rows][:, None] * tile.own(refs.x[rows, tile.place32(origin)]).astype(jnp.float32)
            reading.append((tile.place32(origin), weighted.astype(jnp.bfloat16)))

        def store_values(done, tile):
            values = tile.place32(origin)
            out = triton.dot(pairs, refs.y[rows, values])
            for keys, weighted in reading:
                out += triton.dot(weighted, refs.states[keys, values])
            tile.store_columns(refs.out, rows, out)
            return done

        Tiling(V, config.value_tile).over(store_values, ())

    key = BlockSpec((None, chunk, None, K), lambda n, h, b: (b, n, triton.quotient(h, group), 0))
    value = BlockSpec((None, chunk, None, V), lambda n, h, b: (b, n, h, 0))
    gate = BlockSpec((None, None, chunk), lambda n, h, b: (b, h, n))
    return triton.call(
        lin_read,
        {
            "x": (x, key), "z": (z, key), "y": (y, value), "read": (read, gate), "total": (decays.total, gate),
            "states": (states, BlockSpec((None, None, None, K, V), lambda n, h, b: (b, h, n, 0, 0))),
            "numbers": (decays.numbers, BlockSpec((None, chunk), lambda n, h, b: (b, n))),
        },
        {"out": (jax.ShapeDtypeStruct(y.shape, jnp.bfloat16), value)},
        grid=(T // chunk, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )["out"]  # fmt: skip


def _back(x, z, y, own, read, states, other, decays, *, late, dg, scale, config, chunk, interpret):
    """(dQ [B,T,H,K] bf16, summed over the value heads of a key head; q . dq [tiles,B,Hv,T]; None) of x, z, y, own =
    dO, v, k, q if `late`; else (dK, k . dk, <S', dS'> [tiles,B,N,Hv]) of v, dO, q, k, where states are the gradients
    and `other` the states. Sums are fp32, a part for each tile of keys, and None if not `dg`.
    """
    (B, T, Hv, V), (H, K) = x.shape, y.shape[2:]
    members, tiles = Hv // H, Tiling(K, config.key_tile).number

    def lin_back(refs):
        origin = 0 * triton.program_id(0)
        rows = triton.ds(0, chunk)
        numbers = None if refs.numbers is None else refs.numbers[rows]

        def body(tile):
            keys = tile.place32(origin)
            apart = dg and members > 1  # each value head's q . dq, since dQ is summed over them
            if apart:
                own = tile.own(refs.own[rows, keys])
                between = triton.dot(own, refs.y[rows, keys].T)

            def add_member(m, sums):
                def add_values(sums, inner):
                    pairs, out, met, product = sums
                    values = inner.place32(origin)
                    other_state = None if other is None else refs.other[m, keys, values]
                    mine, state = inner.own(refs.x[rows, m, values]), refs.states[m, keys, values]
                    pairs = pairs + triton.dot(mine, refs.z[rows, m, values].T)
                    reading = mine
                    if members > 1:
                        reading = (refs.read[m, rows][:, None] * mine.astype(jnp.float32)).astype(jnp.bfloat16)
                    out = out + triton.dot(reading, state.T)
                    if apart:
                        through = triton.dot(own, state)
                        met = met + jnp.sum(reading.astype(jnp.float32) * through, axis=1)
                    if members > 1 or other is not None:  # x or the state is not for products alone
                        out = triton.finished(out, interpret)
                    if other is not None:
                        both = inner.own(state.astype(jnp.float32) * other_state.astype(jnp.float32))
                        both = both if tile.is_own else jnp.where(tile.mask(both.shape, 0), both, 0.0)
                        product = product + jnp.sum(both)
                    return pairs, out, met, product

                weights, out = sums
                zero, none = jnp.zeros((chunk, chunk), jnp.float32), jnp.zeros((chunk,), jnp.float32)
                pairs, out, met, product = Tiling(V, config.value_tile).over(
                    add_values, (zero, out, none, jnp.float32(0))
                )
                if other is not None:
                    refs.inner[m] = product
                if members == 1:
                    out = refs.read[m, rows][:, None] * out
                pairs = scale * _left(refs.total[m, rows], numbers, late, interpret) * pairs
                if apart:
                    refs.met[m, rows] = met + jnp.sum(pairs * between, axis=1)
                return weights + pairs, out

            sums = jnp.zeros((chunk, chunk), jnp.float32), jnp.zeros((chunk, keys.size), jnp.float32)
            if members == 1:
                weights, out = add_member(0, sums)
            else:
                weights, out = jax.lax.fori_loop(jnp.int32(0), jnp.int32(members), add_member, sums)
            out += triton.dot(weights.astype(jnp.bfloat16), refs.y[rows, keys])
            tile.store_columns(refs.out, rows, out)
            if dg and not apart:
                refs.met[0, rows] = jnp.sum(tile.own(refs.own[rows, keys]).astype(jnp.float32) * out, axis=1)

        Tiling(K, config.key_tile).at(triton.remainder(triton.program_id(0), tiles), body)

    of = lambda i: triton.quotient(i, tiles)  # noqa: E731  the chunk
    key = BlockSpec((None, chunk, None, K), lambda i, h, b: (b, of(i), h, 0))
    value = BlockSpec((None, chunk, members, V), lambda i, h, b: (b, of(i), h, 0))
    gate = BlockSpec((None, members, chunk), lambda i, h, b: (b, h, of(i)))
    met = BlockSpec((None, None, members, chunk), lambda i, h, b: (triton.remainder(i, tiles), b, h, of(i)))
    made = triton.call(
        lin_back,
        {
            "x": (x, value), "z": (z, value), "y": (y, key), "own": (own if dg else None, key), "read": (read, gate),
            "total": (decays.total, gate),
            "states": (states, BlockSpec((None, members, None, K, V), lambda i, h, b: (b, h, of(i), 0, 0))),
            "numbers": (decays.numbers, BlockSpec((None, chunk), lambda i, h, b: (b, of(i)))),
            "other": (other, BlockSpec((None, members, None, K, V), lambda i, h, b: (b, h, of(i) + 1, 0, 0))),
        },
        {
            "inner": (
                None if other is None else jax.ShapeDtypeStruct((tiles, B, T // chunk, Hv), jnp.float32),
                BlockSpec((None, None, None, members), lambda i, h, b: (triton.remainder(i, tiles), b, of(i), h)),
            ),
            "out": (jax.ShapeDtypeStruct(y.shape, jnp.bfloat16), key),
            "met": (jax.ShapeDtypeStruct((tiles, B, Hv, T), jnp.float32) if dg else None, met),
        },
        grid=(T // chunk * tiles, H, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return made["out"], made["met"], made["inner"]


def _carried(static, z, y, write, decays, initial, asked, *, reverse, keep):
    config = static.configuration.reverse if reverse else static.configuration.forward
    return _carry(
        z, y, write, decays, initial, asked if static.makes_outputs(config) else None,
        reverse=reverse, keep=keep, config=config, chunk=static.chunk, interpret=static.interpret,
    )  # fmt: skip


def _constants(static):
    return {"scale": static.scale, "chunk": static.chunk, "interpret": static.interpret}


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Wanted:
    """Whether the caller asked for dg: without it the backward saves its sums."""

    dg: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, q, k, v, g, initial, numbers):
    return _run(static, q, k, v, g, initial, numbers, keep=False)[0]


def _run(static, q, k, v, g, initial, numbers, *, keep):
    """((o, final state), states where `keep` or where o is made from them)."""
    decays = _decays(g, numbers, static.chunk)
    read = static.scale * decays.gamma
    made = _carried(
        static, k, v, decays.leaving, decays, initial, _Asked(q, read, static.scale),
        reverse=False, keep=keep or not static.makes_outputs(static.configuration.forward),
    )  # fmt: skip
    o = made.out
    if o is None:
        o = _read(q, k, v, read, made.states, decays, late=True, config=static.configuration.read, **_constants(static))
    return (o, made.final), made.states


def _op_fwd(static, *primals):
    q, k, v, g, initial, numbers = (None if x is None else x.value for x in primals)
    keep = static.residuals == "saved"
    outputs, states = _run(static, q, k, v, g, initial, numbers, keep=keep)
    return outputs, (q, k, v, g, initial, numbers, states if keep else None, _Wanted(primals[3].perturbed))


def _op_bwd(static, residuals, cotangents):
    q, k, v, g, initial, numbers, states, wanted = residuals
    do, d_final = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    chosen, constants = static.configuration, _constants(static)
    decays = _decays(g, numbers, static.chunk)
    read, leaving = static.scale * decays.gamma, decays.leaving
    if states is None:
        states = _carried(static, k, v, leaving, decays, initial, None, reverse=False, keep=True).states
    made = _carried(
        static, q, do, read, decays, d_final, _Asked(k, leaving, static.scale),
        reverse=True, keep=True,
    )  # fmt: skip
    d_states, dv = made.states, made.out
    if dv is None:
        dv = _read(k, q, do, leaving, d_states, decays, late=False, config=chosen.read, **constants)
    back = partial(_back, decays=decays, dg=wanted.dg, config=chosen.back, **constants)
    dq, of_queries, _ = back(do, v, k, q, read, states, None, late=True)
    dk, of_keys, inner = back(v, do, q, k, leaving, d_states, states if wanted.dg else None, late=False)
    dg = None
    if wanted.dg:
        each = (of_queries - of_keys).sum(0).reshape(*g.shape[:2], -1, static.chunk)
        dg = jax.lax.cumsum(each, axis=3, reverse=True) + jnp.swapaxes(inner.sum(0), 1, 2)[..., None]
        dg = dg.reshape(g.shape)
    return dq, dk, dv, dg, None if initial is None else made.final, None


_op.defvjp(_op_fwd, _op_bwd, symbolic_zeros=True)


def linear_attention(q, k, v, g, initial_state, *, segment_ids, scale, residuals, interpret, configuration):
    """g [B,T,Hv], the rest as in api.linear_attention; initial_state and segment_ids may be None. Any T."""
    tokens, dtype = q.shape[1], v.dtype
    chunk = BLOCK if tokens <= BLOCK else configuration.chunk
    padding = -tokens % chunk
    numbers = document_numbers(segment_ids, padding)
    given = [*(x.astype(jnp.bfloat16) for x in (q, k, v)), jnp.maximum(g.astype(jnp.float32), LEAST_LOG_DECAY)]
    # k = v = g = 0 writes nothing and keeps the state
    q, k, v, g = (pad_tokens(x, padding) for x in given)
    static = _Static(chunk, scale, residuals, interpret, configuration)
    o, state = _op(static, q, k, v, jnp.swapaxes(g, 1, 2), initial_state, numbers)
    return o[:, :tokens].astype(dtype), state
