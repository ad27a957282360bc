"""Linear attention with one decay a key channel as four Triton kernels, forward and backward.

Tokens are taken in chunks of C. For each key channel, total_i is the sum of a chunk's log decays up to token i,
gamma_i = exp(total_i) the fraction of the entering state that is left at token i, and leaving_j = exp(total_C -
total_j) the fraction of token j's write that is left at the chunk's end. With S the state that enters a chunk and dS'
the gradient of the state that leaves it:

    sums    total
    carry   S'  = gamma_C S + (leaving K)^T V            dS  = gamma_C dS' + (scale gamma Q)^T dO
    read    O   = scale P V + (scale gamma Q) S          dV  = scale P^T dO + (leaving K) dS'
    back    dQ  = pairs + scale gamma (dO S^T)           dK  = pairs + leaving (V dS'^T)

P_ij = sum over channels of q_i k_j exp(total_i - total_j): the decay stands inside the sum, so P is no product of
matrices as it is. It becomes one, or a few, in two ways. First, by levels: cut the chunk into blocks of 2 s tokens, and
let m be the last token of a block's first half. A pair with j <= m < i has

    exp(total_i - total_j) = exp(total_i - total_m) exp(total_m - total_j),     E_t = exp(-|total_t - total_m|)

and no exponent is positive, so that this is right at any decay. Every pair i > j belongs to exactly one of the levels
s = C/2, ..., 2, 1: the one with i xor j in [s, 2 s). Second, by whole blocks: where no |total_t - total_m| of a block
is above WITHIN, no factor can overflow or vanish, and one product has all pairs of the block, with E_t = exp(total_t -
total_m) for a query and its inverse for a key. Each tile of channels takes the largest whole blocks that allow this, of
64 or 16 tokens or of a single one, and the levels above them. With M the mask of the pairs of one level, or of whole
blocks, and dP = scale dO V^T below the diagonal:

    P  = sum over M of M . (E Q) (E K)^T
    dQ = sum over M of E . ((M . dP) (E K)) + dP_ii k_i      dK = sum over M of E . ((M . dP)^T (E Q)) + dP_ii q_i

so that all work is in products of matrices. The log decay g_t scales the pairs i >= t > j, the reads of S by tokens
i >= t and the writes to S' by tokens j < t; the diagonal has no part in it:

    dg_t = sum over i >= t of (q_i dq_i - k_i dk_i) + sum over values of S' dS'

where S' dS' = gamma_C S dS' + sum over j of k_j (leaving (V dS'^T))_j needs no state but the one that entered.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.chunkwise import LEAST_LOG_DECAY, document_numbers, pad_tokens
from pallas_kernels.tiles import Tile, Tiling, at_tile, owned
from pallas_kernels.triton_calls import BlockSpec

CHUNK = 64
BLOCKS = (6, 4)  # log2 of the tokens of blocks that may be one product; single tokens always may
WITHIN = 40.0  # exp of it leaves bf16 factors as far from the ends of its range again


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Of the kernel that adds up log decays."""

    column_tile: int = 64
    warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Carry:
    """Of the serial kernel: a program owns a tile of the state."""

    key_tile: int = 64
    value_tile: int = 128
    warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Read:
    """Of the kernel that makes O and dV: a program makes a chunk's, a tile of columns after the other."""

    value_tile: int = 128
    key_tile: int = 128  # of the channels that are summed over with the state
    pair_tile: int = 64  # of the channels that are summed over for the pairs
    warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Back:
    """Of the kernel that makes dQ, dK and dg: a program makes a tile of channels of a chunk's."""

    key_tile: int = 32
    value_tile: int = 64  # of the values that are summed over
    warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Of all four: what was fastest at 128 x 128 (pallas_kernels/LOG.md, 2026-11-29)."""

    sums: Sums = Sums()
    carry: Carry = Carry()
    read: Read = Read()
    back: Back = Back()


# heads whose tiles overlap, or of several value heads a key head: what compiles with the fewest spilled registers
NARROW = Configuration(
    carry=Carry(warps=8),
    read=Read(value_tile=64, key_tile=64, pair_tile=32),
    back=Back(value_tile=32, warps=8, num_stages=2),
)


def configuration_for(K: int, V: int, members: int) -> Configuration:
    """`members`: the value heads of a key head."""
    return Configuration() if members == 1 and K % 64 == 0 and V % 64 == 0 and V > 64 else NARROW


class _Static(NamedTuple):
    scale: float
    residuals: str
    interpret: bool
    configuration: Configuration


class _Documents(NamedTuple):
    """Where each token [B,T] stands among the documents of its row; all None where a row is one document."""

    numbers: jax.Array | None = None  # int32
    entered: jax.Array | None = None  # fp32: 1 in the document of the token before the chunk, else 0
    leaves: jax.Array | None = None  # fp32: 1 in the document of the chunk's last token, else 0


def _documents(numbers):
    """`_Documents` of the numbers [B,1+T] counted along each row, beginning with what came before."""
    if numbers is None:
        return _Documents()
    own = numbers[:, 1:]
    each = own.reshape(own.shape[0], -1, CHUNK)
    before = numbers[:, :-1].reshape(each.shape)[..., :1]
    return _Documents(own, *((each == x).astype(jnp.float32).reshape(own.shape) for x in (before, each[..., -1:])))


def _sums(g, *, config, interpret):
    """total [B,T,Hv,K] fp32: the sums of the log decays g [B,T,Hv,K] from a chunk's first token to each."""
    B, T, Hv, K = g.shape
    size = Hv * K

    def lin_sums(refs):
        origin = 0 * triton.program_id(0)
        rows = triton.ds(0, CHUNK)

        def body(tile):
            each = jnp.maximum(refs.g[rows, tile.place32(origin)], LEAST_LOG_DECAY)
            tile.store_columns(refs.total, rows, jnp.cumsum(each, axis=0))

        Tiling(size, config.column_tile).at(triton.program_id(0), body)

    block = BlockSpec((None, CHUNK, size), lambda i, n, b: (b, n, 0))
    made = triton.call(
        lin_sums,
        {"g": (g.reshape(B, T, size), block)},
        {"total": (jax.ShapeDtypeStruct((B, T, size), jnp.float32), block)},
        grid=(Tiling(size, config.column_tile).number, T // CHUNK, B),
        warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return made["total"].reshape(g.shape)


def _weight(refs, tokens, total, end, *, late, scale, interpret):
    """[C, channels]: `scale gamma` where `late`, the weight of a token's read of the entering state; else `leaving`,
    that of its write to the leaving state. `end` [channels] is the last token's total."""
    weight = scale * triton.exp(total, interpret) if late else triton.exp(end[None, :] - total, interpret)
    lasts = refs.entered if late else refs.leaves
    return weight if lasts is None else weight * lasts[tokens][:, None]


def _gamma_end(refs, last, end, interpret):
    """gamma_C [channels]."""
    gamma = triton.exp(end, interpret)
    return gamma if refs.entered is None else gamma * refs.entered[last]


def _carry(x, y, total, documents, initial, *, reverse, scale, config, interpret):
    """(states [B,Hv,N,K,V] bf16, final state [B,Hv,K,V] fp32) of S' = gamma_C S + (w X)^T Y, chunk after chunk.

    x [B,T,H,K], y [B,T,Hv,V]; initial [B,Hv,K,V] fp32, or None for zeros. Forward, w is `leaving` and states are those
    that enter the chunks. In reverse, from the last chunk to the first, w is `scale gamma` and states are the gradients
    of those that leave the chunks.
    """
    (B, T, H, K), (Hv, V) = x.shape, y.shape[2:]
    N, group = T // CHUNK, Hv // H
    down, along = Tiling(K, config.key_tile), Tiling(V, config.value_tile)

    def lin_carry(refs):
        origin = 0 * triton.program_id(0)

        def body(rows, columns):
            keys, values = rows.place32(origin), columns.place32(origin)
            mine = owned(rows, columns)

            def step(i, state):
                n = N - 1 - i if reverse else i
                triton.store_where(refs.states, (n, keys, values), state, mine)
                tokens, last = triton.ds(n * CHUNK, CHUNK), n * CHUNK + (CHUNK - 1)
                total, end = refs.total[tokens, keys], refs.total[last, keys]
                weight = _weight(refs, tokens, total, end, late=reverse, scale=scale, interpret=interpret)
                weighted = (weight * refs.x[tokens, keys].astype(jnp.float32)).astype(jnp.bfloat16)
                kept = _gamma_end(refs, last, end, interpret)
                return kept[:, None] * state + triton.dot(weighted.T, refs.y[tokens, values])

            if initial is None:
                state = jnp.zeros((keys.size, values.size), jnp.float32)
            else:
                state = refs.initial[keys, values]
            state = jax.lax.fori_loop(jnp.int32(0), jnp.int32(N), step, state)
            triton.store_where(refs.final, (keys, values), state, mine)

        at_tile(triton.program_id(0), down, along, body)

    key = BlockSpec((None, T, None, K), lambda i, h, b: (b, 0, triton.quotient(h, group), 0))
    of_value_head = lambda size: BlockSpec((None, T, None, size), lambda i, h, b: (b, 0, h, 0))  # noqa: E731
    token = BlockSpec((None, T), lambda i, h, b: (b, 0))
    state = BlockSpec((None, None, K, V), lambda i, h, b: (b, h, 0, 0))
    made = triton.call(
        lin_carry,
        {
            "x": (x, key), "y": (y, of_value_head(V)), "total": (total, of_value_head(K)), "initial": (initial, state),
            "entered": (documents.entered, token), "leaves": (None if reverse else documents.leaves, token),
        },
        {
            "states": (
                jax.ShapeDtypeStruct((B, Hv, N, K, V), jnp.bfloat16),
                BlockSpec((None, None, N, K, V), lambda i, h, b: (b, h, 0, 0, 0)),
            ),
            "final": (jax.ShapeDtypeStruct((B, Hv, K, V), jnp.float32), state),
        },
        grid=(down.number * along.number, Hv, B),
        warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return made["states"], made["final"]


def _tokens():
    return jax.lax.broadcasted_iota(jnp.int32, (CHUNK,), 0)


def _shifted(x, level):
    return jax.lax.shift_right_logical(x, jax.lax.broadcast(level, x.shape))


def _from_middle(total, refs_total, log_block, index):
    """Log decays [C, channels] from the middle of a block of 2^log_block tokens to a token."""
    block = jax.lax.shift_left(jnp.int32(1), log_block)
    middle = (_tokens() | (block - 1)) - _shifted(block, jnp.int32(1))  # the last token of the first half
    return total - refs_total[(middle, *index)]


def _largest_blocks(total, refs_total, index):
    """log2 of the tokens of the largest blocks that may be one product."""
    found = jnp.int32(0)
    for log_block in sorted(BLOCKS):
        most = jnp.max(jnp.abs(_from_middle(total, refs_total, jnp.int32(log_block), index)))
        found = jnp.where(most <= WITHIN, jnp.int32(log_block), found)
    return found


class _Pairs(NamedTuple):
    """The pairs of one product: all within blocks of 2^log_block tokens, or only those across a block's middle."""

    log_block: jax.Array
    whole: jax.Array  # 1 or 0

    def of(self, pairs):
        """The pairs [C, C]; zeros elsewhere."""
        part = _shifted(_tokens(), self.log_block + self.whole - 1)  # the number of a token's block, or half of one
        return jnp.where((part ^ (1 - self.whole))[:, None] == part[None, :], pairs, 0)

    def factors(self, total, refs_total, index, interpret):
        """E [C, channels] of queries and of keys."""
        apart = _from_middle(total, refs_total, self.log_block, index)
        within = -jnp.abs(apart)
        late, early = (jnp.where(self.whole == 1, x, within) for x in (apart, -apart))
        return triton.exp(late, interpret), triton.exp(early, interpret)


def _over_pairs(step, first, carry):
    """carry after step(_Pairs, carry) for blocks of 2^first tokens, then for every level above: a loop, so that the
    compiler holds one at a time in registers."""

    def body(log_block, carry):
        return step(_Pairs(log_block, (log_block == first).astype(jnp.int32)), carry)

    return jax.lax.fori_loop(first, jnp.int32(CHUNK.bit_length()), body, carry)


def _diagonal(pairs):
    tokens = _tokens()
    return jnp.where(tokens[:, None] == tokens[None, :], pairs, 0.0)


def _allowed(refs, late):
    """Which pairs [C, C] interact; `late`: rows are the later tokens."""
    tokens = _tokens()
    return _one_document(refs, tokens[:, None] >= tokens[None, :] if late else tokens[:, None] <= tokens[None, :])


def _apart(refs, late):
    """The same without the diagonal."""
    tokens = _tokens()
    return _one_document(refs, tokens[:, None] > tokens[None, :] if late else tokens[:, None] < tokens[None, :])


def _one_document(refs, allowed):
    if refs.numbers is None:
        return allowed
    numbers = refs.numbers[...]
    return allowed & (numbers[:, None] == numbers[None, :])


def _bf16(x, interpret):
    return triton.as_made(x.astype(jnp.bfloat16), interpret)


def _read(x, z, y, total, states, documents, *, late, scale, config, interpret):
    """O [B,T,Hv,V] bf16 of x, z, y = q, k, v if `late`; else dV of k, q, dO, where states are the gradients."""
    (B, T, H, K), (Hv, V) = x.shape, y.shape[2:]
    group = Hv // H

    def lin_read(refs):
        origin = 0 * triton.program_id(0)
        rows = triton.ds(0, CHUNK)

        def add_pairs(pairs, inner):
            keys = inner.place32(origin)
            total = refs.total[rows, keys]
            x, z = inner.own(refs.x[rows, keys]), refs.z[rows, keys]
            x, z = x.astype(jnp.float32), z.astype(jnp.float32)

            def step(which, pairs):
                queries, of_keys = which.factors(total, refs.total, (keys,), interpret)
                own, other = (queries, of_keys) if late else (of_keys, queries)
                return pairs + which.of(triton.dot(_bf16(own * x, interpret), _bf16(other * z, interpret).T))

            return _over_pairs(step, _largest_blocks(total, refs.total, (keys,)), pairs)

        pairs = Tiling(K, config.pair_tile).over(add_pairs, jnp.zeros((CHUNK, CHUNK), jnp.float32))
        pairs = _bf16(jnp.where(_allowed(refs, late), scale * pairs, 0.0), interpret)

        def store_values(done, tile):
            values = tile.place32(origin)

            def add_state(out, inner):
                keys = inner.place32(origin)
                total, end = refs.total[rows, keys], refs.total[CHUNK - 1, keys]
                weight = _weight(refs, rows, total, end, late=late, scale=scale, interpret=interpret)
                x = weight * inner.own(refs.x[rows, keys]).astype(jnp.float32)
                return out + triton.dot(_bf16(x, interpret), refs.states[keys, values])

            out = triton.dot(pairs, refs.y[rows, values])
            tile.store_columns(refs.out, rows, Tiling(K, config.key_tile).over(add_state, out))
            return done

        Tiling(V, config.value_tile).over(store_values, ())

    key = BlockSpec((None, CHUNK, None, K), lambda n, h, b: (b, n, triton.quotient(h, group), 0))
    of_value_head = lambda size: BlockSpec((None, CHUNK, None, size), lambda n, h, b: (b, n, h, 0))  # noqa: E731
    token = BlockSpec((None, CHUNK), lambda n, h, b: (b, n))
    return triton.call(
        lin_read,
        {
            "x": (x, key), "z": (z, key), "y": (y, of_value_head(V)), "total": (total, of_value_head(K)),
            "states": (states, BlockSpec((None, None, None, K, V), lambda n, h, b: (b, h, n, 0, 0))),
            "numbers": (documents.numbers, token), "entered": (documents.entered if late else None, token),
            "leaves": (None if late else documents.leaves, token),
        },
        {"out": (jax.ShapeDtypeStruct((B, T, Hv, V), jnp.bfloat16), of_value_head(V))},
        grid=(T // CHUNK, Hv, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )["out"]  # fmt: skip


def _back(q, k, v, do, total, states, d_states, documents, *, scale, config, interpret):
    """dq, dk [B,T,H,K] bf16, summed in fp32 over the value heads of a key head, and dg [B,T,Hv,K] fp32."""
    (B, T, H, K), (Hv, V) = q.shape, v.shape[2:]
    members, tiles = Hv // H, Tiling(K, config.key_tile).number

    def lin_back(refs):
        origin = 0 * triton.program_id(0)
        rows = triton.ds(0, CHUNK)

        def body(tile):
            keys = tile.place32(origin)

            def add_member(m, sums):
                def add_values(sums, inner):
                    pairs, transposed, read, d_write, both = sums
                    columns = inner.place32(origin)
                    v = inner.own(refs.v[rows, m, columns])
                    do = inner.own(refs.do[rows, m, columns])
                    state, d_state = refs.states[m, keys, columns], refs.d_states[m, keys, columns]
                    met = inner.own(state.astype(jnp.float32) * d_state.astype(jnp.float32))
                    pairs, transposed = pairs + triton.dot(do, v.T), transposed + triton.dot(v, do.T)
                    read, d_write = read + triton.dot(do, state.T), d_write + triton.dot(v, d_state.T)
                    # the states are not for products alone
                    return pairs, transposed, read, triton.finished(d_write, interpret), both + jnp.sum(met, axis=1)

                of_pairs, of_keys = jnp.zeros((CHUNK, CHUNK), jnp.float32), jnp.zeros((CHUNK, keys.size), jnp.float32)
                zero = of_pairs, of_pairs, of_keys, of_keys, jnp.zeros((keys.size,), jnp.float32)
                pairs, transposed, read, d_write, both = Tiling(V, config.value_tile).over(add_values, zero)
                # each by its own product: one that is transposed to feed another is miscompiled (Triton 3.4 to 3.7)
                diagonal = scale * jnp.sum(_diagonal(pairs), axis=1)[:, None]
                pairs = _bf16(jnp.where(_apart(refs, late=True), scale * pairs, 0.0), interpret)
                transposed = _bf16(jnp.where(_apart(refs, late=False), scale * transposed, 0.0), interpret)

                total, end = refs.total[rows, m, keys], refs.total[CHUNK - 1, m, keys]
                q, k = refs.q[rows, keys].astype(jnp.float32), refs.k[rows, keys].astype(jnp.float32)
                weight = partial(_weight, refs, rows, total, end, scale=scale, interpret=interpret)
                dq, dk = weight(late=True) * read, weight(late=False) * d_write
                behind = _gamma_end(refs, CHUNK - 1, end, interpret) * both + jnp.sum(k * dk, axis=0)

                def step(which, sums):
                    dq, dk = sums
                    queries, of_keys = which.factors(total, refs.total, (m, keys), interpret)
                    dq += queries * triton.dot(which.of(pairs), _bf16(of_keys * k, interpret))
                    dk += of_keys * triton.dot(which.of(transposed), _bf16(queries * q, interpret))
                    return dq, dk

                dq, dk = _over_pairs(step, _largest_blocks(total, refs.total, (m, keys)), (dq, dk))
                each = q * dq - k * dk  # a decay has those of its own token and later ones
                dg = each - jnp.cumsum(each, axis=0) + (jnp.sum(each, axis=0) + behind)[None, :]
                every = Tile(0, CHUNK, CHUNK)
                at = (every.place32(origin), m + 0 * origin, keys)
                triton.store_where(refs.dg, at, dg, owned(every, tile))
                return sums[0] + dq + diagonal * k, sums[1] + dk + diagonal * q

            sums = (jnp.zeros((CHUNK, keys.size), jnp.float32),) * 2
            if members == 1:
                sums = add_member(0, sums)
            else:
                sums = jax.lax.fori_loop(jnp.int32(0), jnp.int32(members), add_member, sums)
            tile.store_columns(refs.dq, rows, sums[0])
            tile.store_columns(refs.dk, rows, sums[1])

        Tiling(K, config.key_tile).at(triton.remainder(triton.program_id(0), tiles), body)

    chunk_of = lambda i: triton.quotient(i, tiles)  # noqa: E731
    key = BlockSpec((None, CHUNK, None, K), lambda i, h, b: (b, chunk_of(i), h, 0))
    of_value_heads = lambda size: BlockSpec((None, CHUNK, members, size), lambda i, h, b: (b, chunk_of(i), h, 0))  # noqa: E731
    token = BlockSpec((None, CHUNK), lambda i, h, b: (b, chunk_of(i)))
    state = BlockSpec((None, members, None, K, V), lambda i, h, b: (b, h, chunk_of(i), 0, 0))
    made = triton.call(
        lin_back,
        {
            "q": (q, key), "k": (k, key), "v": (v, of_value_heads(V)), "do": (do, of_value_heads(V)),
            "total": (total, of_value_heads(K)), "states": (states, state), "d_states": (d_states, state),
            **{name: (x, token) for name, x in documents._asdict().items()},
        },
        {
            "dq": (jax.ShapeDtypeStruct(q.shape, jnp.bfloat16), key),
            "dk": (jax.ShapeDtypeStruct(k.shape, jnp.bfloat16), key),
            "dg": (jax.ShapeDtypeStruct(total.shape, jnp.float32), of_value_heads(K)),
        },
        grid=(T // CHUNK * tiles, H, B), warps=config.warps, num_stages=config.num_stages, interpret=interpret,
    )  # fmt: skip
    return made["dq"], made["dk"], made["dg"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, q, k, v, g, initial, numbers):
    return _run(static, q, k, v, g, initial, numbers)[0]


def _entering(static, k, v, g, initial, documents):
    chosen, interpret = static.configuration, static.interpret
    total = _sums(g, config=chosen.sums, interpret=interpret)
    states, final = _carry(
        k, v, total, documents, initial,
        reverse=False, scale=static.scale, config=chosen.carry, interpret=interpret,
    )  # fmt: skip
    return total, states, final


def _run(static, q, k, v, g, initial, numbers):
    documents = _documents(numbers)
    total, states, final = _entering(static, k, v, g, initial, documents)
    o = _read(
        q, k, v, total, states, documents,
        late=True, scale=static.scale, config=static.configuration.read, interpret=static.interpret,
    )  # fmt: skip
    return (o, final), (total, states)


def _op_fwd(static, q, k, v, g, initial, numbers):
    outputs, (total, states) = _run(static, q, k, v, g, initial, numbers)
    return outputs, (q, k, v, initial, numbers, *((total, states) if static.residuals == "saved" else (g, None)))


def _op_bwd(static, kept, cotangents):
    q, k, v, initial, numbers, decays, states = kept
    (do, d_final), documents, chosen = cotangents, _documents(numbers), static.configuration
    total = decays
    if states is None:
        total, states, _ = _entering(static, k, v, decays, initial, documents)
    options = {"scale": static.scale, "interpret": static.interpret}
    d_states, d_initial = _carry(q, do, total, documents, d_final, reverse=True, config=chosen.carry, **options)
    dv = _read(k, q, do, total, d_states, documents, late=False, config=chosen.read, **options)
    dq, dk, dg = _back(q, k, v, do, total, states, d_states, documents, config=chosen.back, **options)
    return dq, dk, dv, dg, None if initial is None else d_initial, None


_op.defvjp(_op_fwd, _op_bwd)


def linear_attention(q, k, v, g, initial_state, *, segment_ids, scale, residuals, interpret, configuration):
    """g [B,T,Hv,K], the rest as in api.linear_attention; initial_state and segment_ids may be None. Any T."""
    tokens, dtype = q.shape[1], v.dtype
    padding = -tokens % CHUNK
    numbers = document_numbers(segment_ids, padding)
    given = [*(x.astype(jnp.bfloat16) for x in (q, k, v)), g.astype(jnp.float32)]
    given = [pad_tokens(x, padding) for x in given]  # k = v = g = 0 writes nothing and keeps the state
    o, state = _op(_Static(scale, residuals, interpret, configuration), *given, initial_state, numbers)
    return o[:, :tokens].astype(dtype), state
