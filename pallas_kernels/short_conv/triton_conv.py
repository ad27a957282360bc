"""The short convolution, its SiLU and its L2 norm as one Triton kernel forward and one backward.

A program walks along the tokens of a piece of a row for one tile of channels. It holds in registers the last W - 1
inputs, and going backward also what later tokens have added to dx of the W - 1 tokens before them. So every array is
read and written once, but for the W - 1 tokens around a piece. With l2norm a tile is one head, or several small ones.

    z_t = bias + sum_j weight_{W-1-j} x_{t-j}      a = SiLU(z)      y = r a      r = (|a|^2 + eps)^-1/2
    da = r dy - r^3 (dy . a) a      dz = da SiLU'(z)      dx_s = sum_j weight_{W-1-j} dz_{s+j}

The gradients of weight and bias are sums over all tokens: each program makes its own part, and XLA adds the parts.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls as triton
from pallas_kernels.short_conv import chunked
from pallas_kernels.tiles import Places, power_of_two
from pallas_kernels.triton_calls import BlockSpec

LEAST_TOKENS = 16
WIDEST = 8  # of the filter: it and the inputs under it are held in registers
LARGEST_HEAD = 512


@dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of one of the two kernels."""

    tile: int = 256  # channels of one program
    warps: int = 2
    piece: int = 128  # tokens of one program
    unroll: int = 8  # tokens whose loads are on their way at once


FORWARD = Config(unroll=16)
BACKWARD = Config()


def why_not(tokens: int, width: int, head: int | None, *, interpret: bool) -> str | None:
    """The reason the kernels cannot run on rows of so many tokens, or None."""
    if tokens < LEAST_TOKENS:
        return f"T is {tokens}; the kernels read at least {LEAST_TOKENS} tokens"
    if width > WIDEST:
        return f"the filter has {width} rows; the kernels hold at most {WIDEST}"
    if head is not None and head > LARGEST_HEAD:
        return f"l2norm is {head}; the kernels hold vectors of at most {LARGEST_HEAD}"
    return triton.why_not(interpret)


class _Static(NamedTuple):
    silu: bool
    head: int | None  # channels that are normalised together
    interpret: bool
    forward: Config
    backward: Config


class _Channels(NamedTuple):
    """How channels [heads, size] are split among programs: `across` heads of `wide` columns each."""

    heads: int
    size: int
    across: int
    wide: int

    @classmethod
    def of(cls, heads, size, normalised, tile):
        if not normalised:
            return cls(heads, size, 1, min(tile, power_of_two(size)))
        wide = power_of_two(size)
        return cls(heads, size, max(1, min(tile // wide, power_of_two(heads))), wide)

    @property
    def programs(self):
        return -(-self.heads // self.across) * -(-self.size // self.wide)

    def here(self):
        """Those of the program along grid axis 0, in the last two axes of an array [..., heads, size]."""
        along = -(-self.size // self.wide)
        index = triton.program_id(0)
        iota = partial(jax.lax.broadcasted_iota, jnp.int32)
        heads = triton.quotient(index, along) * self.across + iota((self.across, 1), 0)
        columns = triton.remainder(index, along) * self.wide + iota((1, self.wide), 1)
        exists = None
        if self.heads % self.across or self.size % self.wide:
            exists = (heads < self.heads) & (columns < self.size)
        return Places((heads, columns), exists)


def _met(x, reach, back):
    """x, the input `back` tokens before a token whose filter reaches `reach` tokens back; 0 where that is fewer."""
    return x if reach is None or back == 0 else jnp.where(reach >= back, x, 0.0)


def _sigmoid(z, interpret):
    return 1.0 / (1.0 + triton.exp(-z, interpret))


def _vector_sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _forward(static, x, weight, bias, state, reach):
    """y like x [B,T,H,K]; weight [W,H,K]; bias [H,K], state [B,W-1,H,K] and reach [B,T] of int32 may be None."""
    (B, T, H, K), W = x.shape, weight.shape[0]
    config, interpret = static.forward, static.interpret
    tiling = _Channels.of(H, K, static.head is not None, config.tile)
    piece, ragged = config.piece, T % config.piece != 0

    def convolve(refs):
        tile = tiling.here()
        start = triton.program_id(1) * piece
        rows = [tile.load(refs.weight, W - 1 - j) for j in range(W)]
        shift = None if bias is None else tile.load(refs.bias)

        def before(token):
            """x of a token that may be before the first: zero, or of the state."""
            at = jnp.maximum(token, 0)
            given = tile.load(refs.x, at, only=token >= 0)
            if state is None:
                return given
            past = jnp.clip(token + (W - 1), 0, W - 2)
            return given + tile.load(refs.state, past, only=token < 0)

        def convolve_tokens(i, window):
            first = start + i * config.unroll
            tokens = [first + u for u in range(config.unroll)]
            inside = [t < T if ragged else None for t in tokens]
            tokens = [jnp.minimum(t, T - 1) if ragged else t for t in tokens]
            loaded = [tile.load(refs.x, t, only=only) for t, only in zip(tokens, inside, strict=True)]
            for t, only, now in zip(tokens, inside, loaded, strict=True):
                window = (now, *window)
                seen = None if reach is None else refs.reach[t]
                y = sum(row * _met(past, seen, j) for j, (row, past) in enumerate(zip(rows, window, strict=True)))
                if shift is not None:
                    y = y + shift
                if static.silu:
                    y = y * _sigmoid(y, interpret)
                if static.head is not None:
                    y = y * jax.lax.rsqrt(_vector_sum(y * y) + chunked.NORM_EPS)
                tile.store(refs.y, y, t, only=only)
                window = window[: W - 1]
            return window

        window = tuple(before(start - j) for j in range(1, W))
        jax.lax.fori_loop(jnp.int32(0), jnp.int32(piece // config.unroll), convolve_tokens, window)

    row = BlockSpec((None, T, H, K), lambda c, p, b: (b, 0, 0, 0))
    made = triton.call(
        convolve,
        {"x": (x, row), **_parameters(weight, bias, state, reach)},
        {"y": (jax.ShapeDtypeStruct(x.shape, x.dtype), row)},
        grid=(tiling.programs, -(-T // piece), B), warps=config.warps, num_stages=1, interpret=interpret,
    )  # fmt: skip
    return made["y"]


def _parameters(weight, bias, state, reach):
    """The inputs of both kernels besides x and dy."""

    def whole(x):
        return None if x is None else BlockSpec(x.shape, lambda c, p, b: (0,) * x.ndim)

    def of_row(x):
        return None if x is None else BlockSpec((None, *x.shape[1:]), lambda c, p, b: (b,) + (0,) * (x.ndim - 1))

    return {
        "weight": (weight, whole(weight)),
        "bias": (bias, whole(bias)),
        "state": (state, of_row(state)),
        "reach": (reach, of_row(reach)),
    }


def _backward(static, x, weight, bias, state, reach, dy):
    """(dx like x, d weight, d bias or None) of `_forward`, the last two in fp32."""
    (B, T, H, K), W = x.shape, weight.shape[0]
    config, interpret = static.backward, static.interpret
    tiling = _Channels.of(H, K, static.head is not None, config.tile)
    piece, pieces = config.piece, -(-T // config.piece)
    parts = W + (bias is not None)

    def reverse_convolve(refs):
        tile = tiling.here()
        start = triton.program_id(1) * piece
        rows = [tile.load(refs.weight, W - 1 - j) for j in range(W)]
        shift = None if bias is None else tile.load(refs.bias)

        def given(token):
            """x of any token: zero past the last one, and the state or zero before the first."""
            at = jnp.clip(token, 0, T - 1)
            inside = tile.load(refs.x, at, only=(token >= 0) & (token < T))
            if state is None:
                return inside
            past = jnp.clip(token + (W - 1), 0, W - 2)
            return inside + tile.load(refs.state, past, only=token < 0)

        def loads(token):
            """What a step that goes back to `token` reads besides its window: the oldest input, and dy."""
            return given(token - (W - 1)), tile.load(refs.dy, jnp.clip(token, 0, T - 1), only=token < T)

        def step(token, window, later, oldest, dy):
            """(dz, inputs met, dx of this token, window and later parts of dx for the token before)."""
            window = (*window, oldest)
            seen = None if reach is None else refs.reach[jnp.clip(token, 0, T - 1)]
            met = [_met(x, seen, j) for j, x in enumerate(window)]
            da = dy
            if static.silu or static.head is not None:
                z = sum(row * x for row, x in zip(rows, met, strict=True))
                if shift is not None:
                    z = z + shift
                opened = _sigmoid(z, interpret) if static.silu else None
                a = z * opened if static.silu else z
                if static.head is not None:  # two sums that do not wait for each other
                    r = jax.lax.rsqrt(_vector_sum(a * a) + chunked.NORM_EPS)
                    da = r * dy - (r * r * r * _vector_sum(a * dy)) * a
                if static.silu:
                    da = da * (opened + a * (1.0 - opened))
            into = [_met(row * da, seen, j) for j, row in enumerate(rows)]
            later = [*later, None]  # of tokens t, t - 1, ..., t - W + 1
            sums = [part if sum_ is None else sum_ + part for sum_, part in zip(later, into, strict=True)]
            return da, met, sums[0], window[1:], tuple(sums[1:])

        def after(token):
            """(window, later) at the piece's last token, from the W - 1 tokens after it, the last of them `token`."""
            window = tuple(given(token - j) for j in range(W - 1))
            later = tuple(jnp.zeros((tiling.across, tiling.wide), jnp.float32) for _ in range(W - 1))
            for back in range(W - 1):
                at = token - back
                _, _, _, window, later = step(at, window, later, *loads(at))
            return window, later

        def reverse_tokens(i, carry):
            window, later, totals = carry
            last = start + (piece - 1) - i * config.unroll
            tokens = [last - u for u in range(config.unroll)]
            loaded = [loads(t) for t in tokens]
            for t, pair in zip(tokens, loaded, strict=True):
                da, met, dx, window, later = step(t, window, later, *pair)
                totals = tuple(total + (da * met[j] if j < W else da) for j, total in enumerate(totals))
                tile.store(refs.dx, dx, jnp.minimum(t, T - 1), only=t < T)
            return window, later, totals

        window, later = after(start + piece + (W - 2))
        totals = tuple(jnp.zeros((tiling.across, tiling.wide), jnp.float32) for _ in range(parts))
        count = jnp.int32(piece // config.unroll)
        _, _, totals = jax.lax.fori_loop(jnp.int32(0), count, reverse_tokens, (window, later, totals))
        for j, total in enumerate(totals):
            tile.store(refs.parts, total, W - 1 - j if j < W else W)

    row = BlockSpec((None, T, H, K), lambda c, p, b: (b, 0, 0, 0))
    made = triton.call(
        reverse_convolve,
        {"x": (x, row), "dy": (dy, row), **_parameters(weight, bias, state, reach)},
        {
            "dx": (jax.ShapeDtypeStruct(x.shape, x.dtype), row),
            "parts": (
                jax.ShapeDtypeStruct((B, pieces, parts, H, K), jnp.float32),
                BlockSpec((None, None, parts, H, K), lambda c, p, b: (b, p, 0, 0, 0)),
            ),
        },
        grid=(tiling.programs, pieces, B), warps=config.warps, num_stages=1, interpret=interpret,
    )  # fmt: skip
    totals = made["parts"].sum((0, 1))
    return made["dx"], totals[:W], None if bias is None else totals[W]


def _by_head(static, x):
    """[..., C] as [..., heads, size]; one head where nothing is normalised."""
    return None if x is None else x.reshape(*x.shape[:-1], -1, static.head or x.shape[-1])


def _reach(documents, width):
    """How many inputs before each token its filter sees [B, T]: at most W - 1, and none of another document."""
    if documents is None:
        return None
    T = documents.shape[1] - (width - 1)
    same = [documents[:, width - 1 - j : width - 1 - j + T] == documents[:, width - 1 :] for j in range(1, width)]
    return sum((x.astype(jnp.int32) for x in same), jnp.zeros((documents.shape[0], T), jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(static, x, weight, bias, state, documents):
    return _run(static, x, weight, bias, state, documents)


def _as_read(static, x, weight, bias, state, documents):
    """What both kernels read: the arrays by heads, parameters in fp32, and how far each token's filter reaches."""
    exact = [None if y is None else _by_head(static, y.astype(jnp.float32)) for y in (weight, bias)]
    x, state = _by_head(static, x), _by_head(static, state) if len(weight) > 1 else None
    return x, *exact, state, _reach(documents, len(weight))


def _run(static, x, weight, bias, state, documents):
    return _forward(static, *_as_read(static, x, weight, bias, state, documents)).reshape(x.shape)


def _op_fwd(static, *arrays):
    return _run(static, *arrays), arrays


def _op_bwd(static, kept, dy):
    x, weight, bias, state, documents = kept
    dx, d_weight, d_bias = _backward(static, *_as_read(static, *kept), _by_head(static, dy))
    d_weight = d_weight.reshape(weight.shape).astype(weight.dtype)
    d_bias = None if bias is None else d_bias.reshape(bias.shape).astype(bias.dtype)
    d_state = None if state is None else _state_gradient(static, x, weight, bias, state, documents, dy)
    return dx.reshape(x.shape), d_weight, d_bias, d_state, None


def _state_gradient(static, x, weight, bias, state, documents, dy):
    """The first W - 1 tokens alone see the state."""
    few = len(weight) - 1
    if not few:
        return jnp.zeros_like(state)
    near = None if documents is None else documents[:, : 2 * few]
    activation = "silu" if static.silu else None

    def first(state):
        return chunked.op(x[:, :few], weight, bias, state, near, activation, static.head)[0]

    return jax.vjp(first, state)[1](dy[:, :few])[0]


_op.defvjp(_op_fwd, _op_bwd)


def short_conv(
    x, weight, bias, initial_state, segment_ids, activation, l2norm, *,
    interpret, forward=FORWARD, backward=BACKWARD,
):  # fmt: skip
    """Arguments as in api.short_conv; bias, initial_state, segment_ids and l2norm may be None."""
    documents = chunked.documents_of(segment_ids, len(weight))
    static = _Static(activation == "silu", l2norm, interpret, forward, backward)
    y, T = _op(static, x, weight, bias, initial_state, documents), x.shape[1]
    # beside the op, whose backward would else add a gradient that is zero wherever nobody uses these inputs
    return y, chunked.final_state(x[:, T - (len(weight) - 1) :], documents, T)
