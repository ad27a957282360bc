"""Linear attention with one decay a head as two Triton kernels, each of which the forward and the backward run.

Tokens are taken in chunks of C. total_i is the sum of a chunk's log decays up to token i. gamma_i = exp(total_i) is the
fraction of the entering state that is left at token i, leaving_j = exp(total_C - total_j) the fraction of token j's
write that is left at the chunk's end, and D_ij = exp(total_i - total_j) for i >= j of one document, else 0. One kernel
carries a state from chunk to chunk, the other does the rest, all chunks at once:

    carry   S'  = gamma_C S + K^T (leaving V)            dS  = gamma_C dS' + Q^T (scale gamma dO)
    join    O   = (scale D . Q K^T) V + scale gamma (Q S)
            dV  = (scale D . Q K^T)^T dO + leaving (K dS')
            dQ  = (scale D . dO V^T) K + scale gamma (dO S^T)
            dK  = (scale D . dO V^T)^T Q + leaving (V dS'^T)

with S entering and dS' leaving a chunk. Both carries are S' = gamma_C S + Z^T (write Y), and all four joins
out = (scale D . X Z^T) Y + read (X S), where the first two have the Z, Y and S of the two carries. Where keys are few a
program of carry holds whole columns of the state, and makes those two on its way: S is in its registers then, and is
stored for the other two alone. Where several value heads read one key head, dQ and dK are summed over them in fp32
inside the program. The log decay g_t scales every pair i >= t > j of the chunk and the state S' that leaves it, so that

    dg_t = sum over i >= t in the chunk of (q_i . dq_i - k_i . dk_i) + <S', dS'>

Each join makes its pairs again: keeping them would cost more time for their bytes than their products take. A program
of join makes the rows of BLOCK tokens. Where a chunk is longer, it adds the pairs with the chunk's other blocks one
block at a time: those before its own for O and dQ, those after it for dV and dK. The longer the chunk, the fewer states
are written and read.
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
BLOCK = 64  # tokens whose rows a program of join makes


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
class Join:
    """Of the parallel kernel: a program makes a tile of columns of a block's rows."""

    column_tile: int = 64
    inner_tile: int = 64  # of the columns that are summed over
    warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Of every launch, and the tokens of a chunk, a multiple of BLOCK."""

    chunk: int = 128
    forward: Carry = Carry()
    reverse: Carry = Carry()
    output: Join = Join()
    values: Join = Join()
    keys: Join = Join()  # dQ and dK


def configuration_for(K: int, V: int) -> Configuration:
    """The fastest of those timed on an H100: at RetNet's heads (256 x 512), and Mamba2's (128 x 64) for narrow ones."""
    if min(K, V) < 128:
        carry = Carry(joined=True, key_tile=128, num_stages=2) if K <= 128 else Carry()
        return Configuration(chunk=BLOCK, forward=carry, reverse=carry, keys=Join(column_tile=128))
    carry = Carry(key_tile=128, value_tile=64, token_tile=128, num_stages=2)
    join = Join(column_tile=128, num_stages=3)
    return Configuration(chunk=128, forward=carry, reverse=carry, output=join, values=join, keys=join)


def why_not(shape: tuple[int, int, int, int, int], *, interpret: bool) -> str | None:
    """The reason the kernels cannot run on [B, T, Hv, K, V], or None."""
    B, T, Hv, K, V = shape
    for name, size in (("K", K), ("V", V)):
        if not LEAST_DIM <= size <= MOST_DIM:
            return f"{name} is {size}; the kernels take {LEAST_DIM} to {MOST_DIM}"
    return triton.why_not(B * Hv * max(T, 64) * max(K, V, K * V // 64), interpret)


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


def _left_between(here, there, mine, theirs, *, late, same_block, interpret):
    """D of a block's rows `here` and the tokens `there`, of totals and documents' numbers; its transpose if not `late`.

    late: whether the rows are the later tokens of their pairs; same_block: whether `there` are the rows themselves
    """
    between = here[:, None] - there[None, :] if late else there[None, :] - here[:, None]
    allowed = None
    if same_block:
        iota = partial(jax.lax.broadcasted_iota, jnp.int32, between.shape)
        allowed = iota(0) >= iota(1) if late else iota(0) <= iota(1)
    if mine is not None:
        same = mine[:, None] == theirs[None, :]
        allowed = same if allowed is None else allowed & same
    return triton.exp(between if allowed is None else jnp.where(allowed, between, -jnp.inf), interpret)


class _Asked(NamedTuple):
    """What a carry makes on its way: out = (scale D . X Z^T) Y + read (X S), [B,T,Hv,V]."""

    x: jax.Array  # [B,T,H,K]
    read: jax.Array  # [B,Hv,T]
    scale: float


class _Carried(NamedTuple):
    states: jax.Array | None  # [B,Hv,N+1,K,V] bf16 that enter the chunks, and the last; in reverse N that leave them
    final: jax.Array  # [B,Hv,K,V] fp32
    inner: jax.Array | None  # [tiles,B,Hv,N]
    out: jax.Array | None  # [B,T,Hv,V] bf16


def _carry(z, y, write, decays, initial, other, asked, *, reverse, keep, config, chunk, interpret):
    """S' = end S + Z^T (write Y), chunk after chunk; in reverse from the last to the first, for gradients dS'.

    z [B,T,H,K], y [B,T,Hv,V], write [B,Hv,T]; initial [B,Hv,K,V] fp32, or None for zeros. The states are
    stored where `keep`. With the forward's as `other`, <S', dS'> of each chunk is made too, a part for each tile.
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
            left = _left_between(total, total, numbers, numbers, late=not reverse, same_block=True, interpret=interpret)
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
                if other is not None:
                    inner = jnp.float32(0)
                    for (place, mine), state in zip(places, states, strict=True):
                        both = state * refs.other[n + 1, place, columns].astype(jnp.float32)
                        inner += jnp.sum(both if mine is None else jnp.where(mine, both, 0.0))
                    refs.inner[n] = inner
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
            "end": (decays.end, BlockSpec((None, None, N), lambda i, h, b: (b, h, 0))), "other": (other, kept(N + 1)),
            "x": (x, key), "read": (read, gate), "total": (None if asked is None else decays.total, gate),
            "numbers": (None if asked is None else decays.numbers, BlockSpec((None, T), lambda i, h, b: (b, 0))),
        },
        {
            "states": (shape(keep, B, Hv, count, K, V, dtype=jnp.bfloat16), kept(count)),
            "final": (shape(True, B, Hv, K, V, dtype=jnp.float32), state),
            "inner": (
                shape(other is not None, tiles, B, Hv, N, dtype=jnp.float32),
                BlockSpec((None, None, None, N), lambda i, h, b: (i, b, h, 0)),
            ),
            "out": (shape(asked is not None, B, T, Hv, V, dtype=jnp.bfloat16), value),
        },
        grid=(tiles, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return _Carried(**made)


class _Operands(NamedTuple):
    """Of one join, out = (scale D . X Z^T) Y + read (X S); x, z, y are [B,T,heads,size] of key or value heads."""

    x: jax.Array
    z: jax.Array
    y: jax.Array
    read: jax.Array  # [B,Hv,T]
    states: jax.Array  # [B,Hv,N or N+1,K,V]
    transposed: bool  # the states are read transposed, S^T
    late: bool  # the rows of `out` are the later tokens of their pairs; else the earlier ones
    other: jax.Array | None  # like out: its inner product with each value head's part of out is made too, row by row


def _join(operands, decays, heads, *, scale, config, chunk, interpret):
    """(out [B,T,heads,size] bf16, inner products [tiles,B,Hv,T] or None), where heads is H or Hv."""
    x, z, y, read, states, transposed, late, other = operands
    (B, T), Hv, size = y.shape[:2], read.shape[1], y.shape[3]
    N, blocks, members = T // chunk, chunk // BLOCK, Hv // heads  # value heads that are summed
    tiles = Tiling(size, config.column_tile).number

    def lin_join(refs):
        number = triton.program_id(0)
        origin = 0 * number
        block = triton.remainder(triton.quotient(number, tiles), blocks)
        rows = triton.ds(block * BLOCK, BLOCK)

        def body(tile):
            columns = tile.place32(origin)

            def add_member(m, out):
                at = lambda array: m if array.shape[2] == Hv else origin  # noqa: E731  one key head for all
                zero = jnp.zeros((BLOCK, BLOCK), jnp.float32)

                def multiply(inner, there):
                    depth = inner.place32(origin)
                    mine = inner.own(refs.x[rows, at(x), depth])
                    return mine, triton.dot(mine, refs.z[there, at(z), depth].T)

                def weigh(pairs, there, same_block):
                    """Of the tokens `there`, from their products with the rows."""
                    numbers = lambda tokens: None if decays.numbers is None else refs.numbers[tokens]  # noqa: E731
                    left = _left_between(
                        refs.total[m, rows], refs.total[m, there], numbers(rows), numbers(there),
                        late=late, same_block=same_block, interpret=interpret,
                    )  # fmt: skip
                    pairs = (scale * left * pairs).astype(jnp.bfloat16)
                    return triton.dot(pairs, refs.y[there, at(y), columns])

                def add_own_block(sums, inner):
                    pairs, read = sums
                    mine, product = multiply(inner, rows)
                    depth = inner.place32(origin)
                    state = refs.states[m, columns, depth].T if transposed else refs.states[m, depth, columns]
                    return pairs + product, read + triton.dot(mine, state)

                def add_other_block(b, part):
                    there = triton.ds(b * BLOCK, BLOCK)
                    products = lambda pairs, inner: pairs + multiply(inner, there)[1]  # noqa: E731
                    pairs = Tiling(x.shape[3], config.inner_tile).over(products, zero)
                    return part + weigh(pairs, there, False)

                sums = zero, jnp.zeros((BLOCK, columns.size), jnp.float32)
                pairs, read = Tiling(x.shape[3], config.inner_tile).over(add_own_block, sums)
                part = refs.read[m, rows][:, None] * read + weigh(pairs, rows, True)
                if blocks > 1:
                    first, last = (origin, block) if late else (block + 1, origin + blocks)
                    part = jax.lax.fori_loop(first, last, add_other_block, part)
                if other is not None:
                    product = refs.other[rows, columns].astype(jnp.float32) * part
                    refs.inner[m, rows] = jnp.sum(tile.own(product), axis=1)
                return out + part

            out = jnp.zeros((BLOCK, columns.size), jnp.float32)
            if members == 1:
                out = add_member(origin, out)
            else:
                out = jax.lax.fori_loop(jnp.int32(0), jnp.int32(members), add_member, out)
            tile._replace(start=columns.start).store_columns(refs.out, rows, out)

        Tiling(size, config.column_tile).at(triton.remainder(number, tiles), body)

    chunk_of = lambda i: triton.quotient(i, tiles * blocks)  # noqa: E731

    def tokens(array):
        """[C, value heads that are summed, size], or of the one key head that they share."""
        if array.shape[2] == Hv:
            return BlockSpec((None, chunk, members, array.shape[3]), lambda i, h, b: (b, chunk_of(i), h, 0))
        group = Hv // array.shape[2] // members  # programs that read a key head
        shape = (None, chunk, 1, array.shape[3])
        return BlockSpec(shape, lambda i, h, b: (b, chunk_of(i), triton.quotient(h, group), 0))

    gate = BlockSpec((None, members, chunk), lambda i, h, b: (b, h, chunk_of(i)))
    state = BlockSpec((None, members, None, *states.shape[3:]), lambda i, h, b: (b, h, chunk_of(i), 0, 0))
    out = BlockSpec((None, chunk, None, size), lambda i, h, b: (b, chunk_of(i), h, 0))
    sums = BlockSpec((None, None, members, chunk), lambda i, h, b: (triton.remainder(i, tiles), b, h, chunk_of(i)))
    inner_shape = None if other is None else jax.ShapeDtypeStruct((tiles, B, Hv, T), jnp.float32)
    made = triton.call(
        lin_join,
        {
            "x": (x, tokens(x)), "z": (z, tokens(z)), "y": (y, tokens(y)), "read": (read, gate),
            "total": (decays.total, gate), "states": (states, state), "other": (other, out),
            "numbers": (decays.numbers, BlockSpec((None, chunk), lambda i, h, b: (b, chunk_of(i)))),
        },
        {
            "out": (jax.ShapeDtypeStruct((B, T, heads, size), jnp.bfloat16), out),
            "inner": (inner_shape, sums),
        },
        grid=(N * blocks * tiles, heads, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return made["out"], made["inner"]


def _carried(static, z, y, write, decays, initial, other, asked, *, reverse, keep):
    config = static.configuration.reverse if reverse else static.configuration.forward
    return _carry(
        z, y, write, decays, initial, other, asked if static.makes_outputs(config) else None,
        reverse=reverse, keep=keep, config=config, chunk=static.chunk, interpret=static.interpret,
    )  # fmt: skip


def _joined(static, decays, heads, config, operands):
    options = {"scale": static.scale, "chunk": static.chunk, "interpret": static.interpret}
    return _join(operands, decays, heads, config=config, **options)


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
        static, k, v, decays.leaving, decays, initial, None, _Asked(q, read, static.scale),
        reverse=False, keep=keep or not static.makes_outputs(static.configuration.forward),
    )  # fmt: skip
    o = made.out
    if o is None:
        operands = _Operands(q, k, v, read, made.states, False, True, None)
        o, _ = _joined(static, decays, v.shape[2], static.configuration.output, operands)
    return (o, made.final), made.states


def _op_fwd(static, *primals):
    q, k, v, g, initial, numbers = (None if x is None else x.value for x in primals)
    keep = static.residuals == "saved"
    outputs, states = _run(static, q, k, v, g, initial, numbers, keep=keep)
    return outputs, (q, k, v, g, initial, numbers, states if keep else None, _Wanted(primals[3].perturbed))


def _op_bwd(static, kept, cotangents):
    q, k, v, g, initial, numbers, states, wanted = kept
    do, d_final = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do = jnp.zeros_like(v) if do is None else do
    chosen, decays = static.configuration, _decays(g, numbers, static.chunk)
    if states is None:
        states = _carried(static, k, v, decays.leaving, decays, initial, None, None, reverse=False, keep=True).states
    read = static.scale * decays.gamma
    back = _carried(
        static, q, do, read, decays, d_final, states if wanted.dg else None, _Asked(k, decays.leaving, static.scale),
        reverse=True, keep=True,
    )  # fmt: skip
    run, H, Hv, d_states = partial(_joined, static, decays), k.shape[2], v.shape[2], back.states
    against = lambda x: x if wanted.dg else None  # noqa: E731
    dv = back.out
    if dv is None:
        dv, _ = run(Hv, chosen.values, _Operands(k, q, do, decays.leaving, d_states, False, False, None))
    dq, of_queries = run(H, chosen.keys, _Operands(do, v, k, read, states, True, True, against(q)))
    dk, of_keys = run(H, chosen.keys, _Operands(v, do, q, decays.leaving, d_states, True, False, against(k)))
    dg = None
    if wanted.dg:
        each = (of_queries - of_keys).sum(0).reshape(*g.shape[:2], -1, static.chunk)
        dg = jax.lax.cumsum(each, axis=3, reverse=True) + back.inner.sum(0)[..., None]
        dg = dg.reshape(g.shape)
    return dq, dk, dv, dg, None if initial is None else back.final, None


_op.defvjp(_op_fwd, _op_bwd, symbolic_zeros=True)


def linear_attention(q, k, v, g, initial_state, *, segment_ids, scale, residuals, interpret, configuration):
    """g [B,T,Hv], the rest as in api.linear_attention; initial_state and segment_ids may be None. Any T."""
    tokens, dtype = q.shape[1], v.dtype
    chunk = min(configuration.chunk, -(-tokens // BLOCK) * BLOCK)
    padding = -tokens % chunk
    numbers = document_numbers(segment_ids, padding)
    given = [*(x.astype(jnp.bfloat16) for x in (q, k, v)), jnp.maximum(g.astype(jnp.float32), LEAST_LOG_DECAY)]
    # k = v = g = 0 writes nothing and keeps the state
    q, k, v, g = (pad_tokens(x, padding) for x in given)
    static = _Static(chunk, scale, residuals, interpret, configuration)
    o, state = _op(static, q, k, v, jnp.swapaxes(g, 1, 2), initial_state, numbers)
    return o[:, :tokens].astype(dtype), state
