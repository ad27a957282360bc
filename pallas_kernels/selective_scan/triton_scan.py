"""Mamba's selective scan as one Triton kernel forward and one backward, each of which walks along a row's tokens.

A program is one warp: its 32 lanes hold the states of 32 / G x P channels in registers. Each channel's state of N
numbers is spread over G lanes, N / G numbers in each, and each lane has numbers of P channels. All values are vectors
with one element a lane.

    a_t = 2^(dt_t A log2 e + start_t)     start_t is -inf where a document starts, else 0
    h_t = a_t h_{t-1} + u_t B_t           u_t = dt_t x_t
    y_t = sum_n C_t h_t + D x_t

Of a token each lane has N / G numbers of B and of C, and P of dt and of x. A sum over n runs over the G lanes of a
channel, a sum over channels over the 32 / G lanes with the same numbers n. At each step a lane hands half of its values
to another lane and adds what it gets to its other half: for V values over L <= V lanes V - V / L exchanges, where a sum
of each value by itself would take V log2 L. The order of the terms is fixed, so every run gives the same bits.

The forward keeps the state that enters every run of a few tokens, in the dtype of x. The backward makes the states of a
run again from it, in registers, then goes back through it. dh_t is the gradient of h_t, g what that leaves for h_{t-1}:

    dC_t = sum_d dy h_t    dh_t = C_t dy_t + g_{t+1}    g_t = a_t dh_t    dl_t = g_t h_{t-1}, of the exponent dt_t A
    du_t = sum_n dh_t B_t    dB_t = sum_d u_t dh_t    dx = dt du + D dy    ddt = x du + sum_n A dl
    dA = sum_t dt dl    dD = sum_t x dy

Sums over channels leave a program as a part of its own, in the dtype of B; the parts are added outside.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.chunkwise import document_starts, pad_tokens
from pallas_kernels.tiles import power_of_two
from pallas_kernels.triton_calls import BlockSpec

LANES = 32
SECTOR = 32  # bytes that the memory fetches at once
MOST_STATE = 32
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a program's channels lie in its lanes, and how often a state is kept; powers of two."""

    channels_per_lane: int = 2
    lanes_per_channel: int = 4
    run: int = 4  # tokens: a state is kept before each run, and the backward has a run's states in registers at once


CONFIG = Config()


class _Static(NamedTuple):
    residuals: str
    interpret: bool
    config: Config


def why_not(N: int, *, interpret: bool) -> str | None:
    """The reason the kernels cannot run on states of N numbers a channel, or None."""
    if N > MOST_STATE:
        return f"N is {N}; the kernels take at most {MOST_STATE}"
    return triton.why_not(interpret)


class _Tiling(NamedTuple):
    """How channels and their N numbers are split among programs and lanes."""

    D: int
    N: int
    channels_per_lane: int  # P
    lanes_per_channel: int  # G

    @property
    def along(self):
        return self.N // self.lanes_per_channel

    @property
    def tile(self):
        return LANES // self.lanes_per_channel * self.channels_per_lane

    @property
    def programs(self):
        return self.D // self.tile

    @property
    def spread(self):
        return self.channels_per_lane * self.along

    def to_lanes(self, x):
        """[..., D, N] -> [..., programs, LANES, P N / G]: what each lane holds."""
        P, G = self.channels_per_lane, self.lanes_per_channel
        x = x.reshape(*x.shape[:-2], self.programs, LANES // G, P, G, self.along)
        return jnp.swapaxes(x, -3, -2).reshape(*x.shape[:-5], self.programs, LANES, self.spread)

    def from_lanes(self, x):
        """The inverse of to_lanes."""
        P, G = self.channels_per_lane, self.lanes_per_channel
        x = x.reshape(*x.shape[:-3], self.programs, LANES // G, G, P, self.along)
        return jnp.swapaxes(x, -3, -2).reshape(*x.shape[:-5], self.D, self.N)


class _Lanes:
    """A program's lanes: which elements of the arrays each of them reads and writes, [LANES, count] each."""

    def __init__(self, tiling, interpret):
        self.tiling, self.interpret = tiling, interpret
        P, G, along = tiling.channels_per_lane, tiling.lanes_per_channel, tiling.along
        self.number = jax.lax.broadcasted_iota(jnp.int32, (LANES,), 0)
        number = jax.lax.broadcasted_iota(jnp.int32, (LANES, 1), 0)
        place, share = triton.quotient(number, G), triton.remainder(number, G)
        self.first = triton.program_id(0) * tiling.tile
        self.channels = self.first + place * P + _iota(P)
        self.numbers = share * along + _iota(along)
        self.across_shares = _masks(G // 2, 1)
        self.across_places = _masks(LANES // 2, G)
        # what a lane has after a sum over shares of P values, and over places of two tokens' N / G
        self.own_channel = self.first + place * P + _sums_of(share, G, P)
        sums = _sums_of(place, LANES // G, 2 * along)
        self.own_token = triton.quotient(sums, along)
        self.own_number = share * along + triton.remainder(sums, along)

    def touch(self, ref, t, rows, columns, first=0):
        """Starts loading ref[t : t + rows, first : first + columns] into the L2 cache, for the run that comes next."""
        across = max(1, columns * jnp.dtype(ref.dtype).itemsize // SECTOR)
        for part in range(0, rows * across, LANES):
            sector = jnp.minimum(self.number + part, rows * across - 1)
            row, column = triton.quotient(sector, across), triton.remainder(sector, across)
            triton.touch(ref, (t + row, first + column * (columns // across)), self.interpret)

    def scatter_sum(self, values, masks):
        """The sums of `values` over the lanes whose numbers differ in the bits of `masks`; each lane gets those that
        `_sums_of` says."""
        for mask in masks:
            if len(values) == 1:
                values = [values[0] + triton.from_lane(values[0], mask, self.interpret)]
                continue
            upper = (self.number & mask) != 0
            pairs = zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True)
            values = [
                jnp.where(upper, high, low) + triton.from_lane(jnp.where(upper, low, high), mask, self.interpret)
                for low, high in pairs
            ]
        return triton.from_columns(values)


def _columns(tile):
    """In fp32."""
    return triton.columns(tile.astype(jnp.float32))


def _iota(size):
    return jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)


def _masks(most, least):
    """Powers of two from `most` down to `least`."""
    return [1 << bit for bit in range(most.bit_length() - 1, least.bit_length() - 2, -1)] if most >= least else []


def _sums_of(lane, lanes, values):
    """The numbers of the sums, of `values`, that lane `lane` of `lanes` has after scatter_sum: [LANES, count]."""
    if values >= lanes:
        return lane * (values // lanes) + _iota(values // lanes)
    return triton.quotient(lane, lanes // values)


def _decay(exponent, start, interpret):
    return triton.exp2(exponent if start is None else exponent + start, interpret)


def _inputs(tiling, x, dt, A, B, C, D, start):
    """The inputs of both kernels."""
    T = x.shape[1]
    token = BlockSpec((None, T, tiling.D), lambda c, b: (b, 0, 0))
    for_all = BlockSpec((None, T, tiling.N), lambda c, b: (b, 0, 0))
    return {
        "x": (x, token), "dt": (dt, token),
        "B": (B.astype(jnp.float32), for_all), "C": (C.astype(jnp.float32), for_all),
        "A": (tiling.to_lanes(A * LOG2_E), BlockSpec((None, LANES, tiling.spread), lambda c, b: (c, 0, 0))),
        "D": (D / tiling.lanes_per_channel, BlockSpec((tiling.D,), lambda c, b: (0,))),
        "start": (start, BlockSpec((None, T), lambda c, b: (b, 0))),
    }  # fmt: skip


def _of_row(tiling):
    """The block spec of a state of a program's channels in one row."""
    return BlockSpec((None, None, LANES, tiling.spread), lambda c, b: (b, c, 0, 0))


class _Kept(NamedTuple):
    """The states before each run in memory: in pieces, of which each lane has at most 16 bytes next to one another."""

    runs: int
    pieces: int
    size: int

    @classmethod
    def of(cls, tiling, runs, dtype):
        size = min(tiling.spread, 16 // jnp.dtype(dtype).itemsize)
        return cls(runs, tiling.spread // size, size)

    def shape(self, rows, tiling, dtype):
        return jax.ShapeDtypeStruct((rows, self.runs, tiling.programs, self.pieces, LANES, self.size), dtype)

    def spec(self):
        return BlockSpec((None, self.runs, None, self.pieces, LANES, self.size), lambda c, b: (b, 0, c, 0, 0, 0))

    def load(self, ref, run):
        pieces = [triton.columns(ref[run, piece].astype(jnp.float32)) for piece in range(self.pieces)]
        return [column for piece in pieces for column in piece]

    def touch(self, ref, run, lanes):
        for piece in range(self.pieces):
            triton.touch(ref, (run, piece, lanes.number, 0 * lanes.number), lanes.interpret)

    def store(self, ref, run, states):
        for piece in range(self.pieces):
            part = triton.from_columns(states[piece * self.size : (piece + 1) * self.size])
            ref[run, piece] = part.astype(ref.dtype)


def _forward(static, x, dt, A, B, C, D, initial, start, *, read=True, keep=False):
    """(y or None, final state [B, D, N], state before each run as the lanes have them or None)."""
    (rows, T, channels), interpret = x.shape, static.interpret
    tiling = _Tiling(channels, A.shape[1], static.config.channels_per_lane, static.config.lanes_per_channel)
    P, along, length = tiling.channels_per_lane, tiling.along, static.config.run
    runs = T // length
    form = _Kept.of(tiling, runs, x.dtype)

    def scan_forward(refs):
        lanes = _Lanes(tiling, interpret)
        rates = triton.columns(refs.A[...])
        direct = triton.columns(refs.D[lanes.channels])

        def load(r):
            """Of each token of run number r, all that is read."""
            tokens = [r * length + s for s in range(length)]
            return [
                (
                    refs.dt[t, lanes.channels],
                    refs.x[t, lanes.channels],
                    refs.B[t, lanes.numbers],
                    refs.C[t, lanes.numbers] if read else None,
                    None if start is None else refs.start[t],
                )
                for t in tokens
            ]

        def scan_run(r, carry):
            states, loaded = carry
            ahead = load(jnp.minimum(r + 1, runs - 1))  # the next run's, while this one's are used
            if keep:
                form.store(refs.kept, r, states)
            for s, (*tiles, begins) in enumerate(loaded):
                t = r * length + s
                dt, xs, B, C = (tile if tile is None else _columns(tile) for tile in tiles)
                new, outputs = [], []
                for j in range(P):
                    u, y = dt[j] * xs[j], direct[j] * xs[j]
                    for i in range(along):
                        k = j * along + i
                        h = _decay(dt[j] * rates[k], begins, interpret) * states[k] + u * B[i]
                        new.append(h)
                        if read:
                            y = y + h * C[i]
                    outputs.append(y)
                states = new
                if read:
                    y = lanes.scatter_sum(outputs, lanes.across_shares)
                    refs.y[t, lanes.own_channel] = y.astype(x.dtype)
            return tuple(states), ahead

        carry = tuple(triton.columns(refs.initial[...])), load(jnp.int32(0))
        states, _ = jax.lax.fori_loop(jnp.int32(0), jnp.int32(runs), scan_run, carry)
        refs.final[...] = triton.from_columns(states)

    array = jax.ShapeDtypeStruct
    state_shape = (tiling.programs, LANES, tiling.spread)
    arrays = _inputs(tiling, x, dt, A, B, C, D, start)
    made = triton.call(
        scan_forward,
        arrays | {"initial": (tiling.to_lanes(initial), _of_row(tiling))},
        {
            "y": (array(x.shape, x.dtype) if read else None, arrays["x"][1]),
            "final": (array((rows, *state_shape), jnp.float32), _of_row(tiling)),
            "kept": (form.shape(rows, tiling, x.dtype) if keep else None, form.spec()),
        },
        grid=(tiling.programs, rows), warps=1, num_stages=1, interpret=interpret,
    )  # fmt: skip
    return made["y"], tiling.from_lanes(made["final"]), made["kept"]


def _backward(static, x, dt, A, B, C, D, start, kept, dy, d_final):
    """The gradients of x, dt, A, B, C, D and the initial state; those of A, B, C and D in fp32."""
    (rows, T, channels), interpret = x.shape, static.interpret
    tiling = _Tiling(channels, A.shape[1], static.config.channels_per_lane, static.config.lanes_per_channel)
    P, along, length = tiling.channels_per_lane, tiling.along, static.config.run
    runs = T // length
    form = _Kept.of(tiling, runs, x.dtype)
    size = range(tiling.spread)
    zero = partial(jnp.zeros, (LANES,), jnp.float32)

    def scan_backward(refs):
        lanes = _Lanes(tiling, interpret)
        rates = triton.columns(refs.A[...])
        direct = triton.columns(refs.D[lanes.channels])

        def load(t):
            return (
                *(_columns(ref[t, lanes.channels]) for ref in (refs.dt, refs.x, refs.dy)),
                *(_columns(ref[t, lanes.numbers]) for ref in (refs.B, refs.C)),
                None if start is None else refs.start[t],
            )

        def touch(r):
            """Of run number r, all that is read."""
            for ref in (refs.dt, refs.x, refs.dy):
                lanes.touch(ref, r * length, length, tiling.tile, lanes.first)
            for ref in (refs.B, refs.C):
                lanes.touch(ref, r * length, length, tiling.N)
            form.touch(refs.kept, r, lanes)

        def store_sums(ref, first, parts):
            """Sums over channels of two tokens' parts."""
            sums = lanes.scatter_sum(parts[0] + parts[1], lanes.across_places)
            ref[first + lanes.own_token, lanes.own_number] = sums.astype(B.dtype)

        def reverse_run(i, carry):
            r = runs - 1 - i
            gradients, d_rates, d_direct = carry
            touch(jnp.maximum(r - 1, 0))
            states = [form.load(refs.kept, r)]  # before each token
            tokens, parts = [r * length + s for s in range(length)], []
            for s, t in enumerate(tokens):
                dt, xs, dy, B, C, begins = load(t)
                after, part = [], [0.0] * along
                for j in range(P):
                    u = dt[j] * xs[j]
                    for i in range(along):
                        k = j * along + i
                        decay = _decay(dt[j] * rates[k], begins, interpret)
                        h = decay * states[s][k] + u * B[i]
                        after.append(h)
                        part[i] = part[i] + dy[j] * h
                states.append(after)
                parts.append(part)
                if s % 2:
                    store_sums(refs.dC, tokens[s - 1], parts[s - 1 :])
            parts = [None] * length
            for s, t in reversed(tuple(enumerate(tokens))):
                dt, xs, dy, B, C, begins = load(t)
                before = states[s] if s else form.load(refs.kept, r)
                left, d_rates, d_direct, part = [], list(d_rates), list(d_direct), [0.0] * along
                dxs, ddts = [], []
                for j in range(P):
                    u, du, d_exponent = dt[j] * xs[j], 0.0, 0.0
                    for i in range(along):
                        k = j * along + i
                        dh = gradients[k] + dy[j] * C[i]
                        part[i] = part[i] + u * dh
                        du = du + dh * B[i]
                        dh = dh * _decay(dt[j] * rates[k], begins, interpret)
                        left.append(dh)
                        dl = dh * before[k]
                        d_exponent = d_exponent + dl * rates[k]
                        d_rates[k] = d_rates[k] + dl * dt[j]
                    dxs.append(dt[j] * du + direct[j] * dy[j])
                    ddts.append(xs[j] * du + d_exponent * (1.0 / LOG2_E))
                    d_direct[j] = d_direct[j] + xs[j] * dy[j]
                gradients, parts[s] = left, part
                refs.dx[t, lanes.own_channel] = lanes.scatter_sum(dxs, lanes.across_shares).astype(x.dtype)
                refs.ddt[t, lanes.own_channel] = lanes.scatter_sum(ddts, lanes.across_shares)
                if s % 2 == 0:
                    store_sums(refs.dB, t, parts[s : s + 2])
            return tuple(gradients), tuple(d_rates), tuple(d_direct)

        carry = tuple(triton.columns(refs.d_final[...])), (*(zero() for _ in size),), (*(zero() for _ in range(P)),)
        gradients, d_rates, d_direct = jax.lax.fori_loop(jnp.int32(0), jnp.int32(runs), reverse_run, carry)
        refs.d_initial[...] = triton.from_columns(gradients)
        refs.dA[...] = triton.from_columns(d_rates)
        refs.dD[lanes.channels] = triton.from_columns(d_direct)  # the same from all lanes that share a channel

    array = jax.ShapeDtypeStruct
    of_lanes = array((rows, tiling.programs, LANES, tiling.spread), jnp.float32)
    arrays = _inputs(tiling, x, dt, A, B, C, D, start)
    token = arrays["x"][1]
    sums = array((tiling.programs, *B.shape), B.dtype)
    of_sums = BlockSpec((None, None, T, tiling.N), lambda c, b: (c, b, 0, 0))
    made = triton.call(
        scan_backward,
        arrays | {
            "dy": (dy, token), "kept": (kept, form.spec()),
            "d_final": (tiling.to_lanes(d_final), _of_row(tiling)),
        },
        {
            "dx": (array(x.shape, x.dtype), token), "ddt": (array(x.shape, jnp.float32), token),
            "dB": (sums, of_sums), "dC": (sums, of_sums),
            "dA": (of_lanes, _of_row(tiling)), "d_initial": (of_lanes, _of_row(tiling)),
            "dD": (array((rows, channels), jnp.float32), BlockSpec((None, tiling.D), lambda c, b: (b, 0))),
        },
        grid=(tiling.programs, rows), warps=1, num_stages=1, interpret=interpret,
    )  # fmt: skip
    dB, dC = (made[name].sum(0, dtype=jnp.float32) for name in ("dB", "dC"))
    dA, d_initial = tiling.from_lanes(made["dA"].sum(0)), tiling.from_lanes(made["d_initial"])
    return made["dx"], made["ddt"], dA, dB, dC, made["dD"].sum(0), d_initial


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, x, dt, A, B, C, D, initial, start):
    return _forward(static, x, dt, A, B, C, D, initial, start)[:2]


def _op_fwd(static, x, dt, A, B, C, D, initial, start):
    saved = static.residuals == "saved"
    y, final, kept = _forward(static, x, dt, A, B, C, D, initial, start, keep=saved)
    # the initial state is needed only to run the forward again
    return (y, final), (x, dt, A, B, C, D, start, kept if saved else initial)


def _op_bwd(static, residuals, cotangents):
    x, dt, A, B, C, D, start, kept = residuals
    if static.residuals == "inputs":
        *_, kept = _forward(static, x, dt, A, B, C, D, kept, start, read=False, keep=True)
    dx, ddt, dA, dB, dC, dD, d_initial = _backward(static, x, dt, A, B, C, D, start, kept, *cotangents)
    return dx, ddt, dA, dB.astype(B.dtype), dC.astype(C.dtype), dD, d_initial, None


_op.defvjp(_op_fwd, _op_bwd)


def selective_scan(x, dt, A, B, C, D, initial_state, segment_ids, residuals, *, interpret, config=CONFIG):
    """Arguments as in api.selective_scan, dt, A, D and the state in fp32; segment_ids may be None.

    What does not divide is filled up: tokens with dt = 0, which keep the state, and channels and numbers of zeros.
    """
    (_, T, channels), N = x.shape, A.shape[1]
    tile = LANES // config.lanes_per_channel * config.channels_per_lane
    tokens, more = -T % config.run, -channels % tile
    wide = power_of_two(max(N, config.lanes_per_channel)) - N
    start = None
    if segment_ids is not None:
        starts = jnp.where(document_starts(segment_ids), jnp.float32(-jnp.inf), jnp.float32(0.0))
        start = pad_tokens(starts, tokens)
    x, dt = (_pad(y, (0, tokens, more)) for y in (x, dt))
    B, C = (_pad(y, (0, tokens, wide)) for y in (B, C))
    A, D, initial_state = _pad(A, (more, wide)), _pad(D, (more,)), _pad(initial_state, (0, more, wide))
    y, state = _op(_Static(residuals, interpret, config), x, dt, A, B, C, D, initial_state, start)
    return y[:, :T, :channels], state[:, :channels, :N]


def _pad(x, more):
    """Zeros after the last of each axis."""
    return jnp.pad(x, [(0, count) for count in more]) if any(more) else x
