"""Softmax attention with RoPE, over all earlier tokens (`attention`) or a sliding window (`swa`)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gdn_jax.config import Model
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute, Linear, linear_init, rope, segment_index, together
from pallas_kernels import context, dispatch, placement
from pallas_kernels.arguments import is_known

NAME = "softmax_attention"  # implementations: cudnn and xla, by device and shape; run.impl names neither
SCORES = 2**26  # fp32 attention scores that exist at once where a mask rules out cuDNN's kernel: 256 MiB


class KVCache(NamedTuple):
    """The last L keys and values of each row in a ring: the token at position p lies in slot p mod L."""

    keys: Float[Array, "B L H K"]  # rotated
    values: Float[Array, "B L H K"]
    positions: Int[Array, "B L"]  # of each slot; -1: empty
    index: Int[Array, "B"]  # position of the next token


class Attention(nnx.Module):
    """y = W_o softmax(q k^T / sqrt(K)) v over the visible tokens: causal, and within the window in `swa`."""

    TOGETHER = ("q_proj", "k_proj", "v_proj")
    windowed = False

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.config = cfg.attention
        D = cfg.d_model
        self.q_proj = Linear(D, D, linear_init(cfg, D), rngs=rngs)
        self.k_proj = Linear(D, D, linear_init(cfg, D), rngs=rngs)
        self.v_proj = Linear(D, D, linear_init(cfg, D), rngs=rngs)
        self.o_proj = Linear(D, D, linear_init(cfg, D, residual=True), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        if cache is not None and segment_ids is not None:
            raise UserError(
                "attention got segment_ids and a cache; packed documents are for training, pass one of them."
            )
        offset = 0 if cache is None else cache.index
        heads = (*x.shape[:2], self.config.heads, self.config.head_dim)
        q, k, v = (y.reshape(heads) for y in together(self, x, compute))
        q, k = (rope(y, offset, self.config.rope_base) for y in (q, k))
        if cache is not None:
            y, cache = self._attend_with_cache(q, k, v, cache, lengths)
        else:  # padding lies behind the tokens that count, where none of them looks
            y = self._attend(q, k, v, segment_ids)
            if room is not None:
                cache = self._written(self.init_cache(x.shape[0], room, compute.dtype), k, v, lengths)
        return self.o_proj(y.reshape(x.shape), compute), cache

    def _attend(self, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        if not dispatch.splits_tokens(q.shape[1]):
            return self._attend_to_rows(q, k, v, segment_ids)
        run, token = self._attend_to_rows, ("batch", "tokens", None, None)
        (y,) = dispatch.shard(
            lambda *arrays: (run(*arrays),), (q, k, v, segment_ids), (token, token, token, token[:2]), (token,),
            across=lambda *arrays, axis: (context.by_heads(run, *arrays, axis=axis),),
        )  # fmt: skip
        return y

    def _attend_to_rows(self, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        T, window, mask = q.shape[1], None, None
        if self.windowed and self.config.window < T:
            window = (self.config.window - 1, 0)
        if segment_ids is not None:
            segments = segment_index(segment_ids)
            mask = segments[:, None, :, None] == segments[:, None, None, :]
        return _dot_product_attention(q, k, v, mask=mask, is_causal=True, local_window_size=window)

    def _attend_with_cache(
        self, q: Array, k: Array, v: Array, cache: KVCache, lengths: Array | None
    ) -> tuple[Array, KVCache]:
        new = self._written(cache, k, v, lengths)
        now = _positions(cache, k)
        if k.shape[1] == 1:  # the slot it overwrote has just left the window
            keys, values, positions = new.keys.astype(k.dtype), new.values.astype(v.dtype), new.positions
        else:  # early queries of the piece still see keys that its end overwrites
            keys = jnp.concatenate([cache.keys.astype(k.dtype), k], axis=1)
            values = jnp.concatenate([cache.values.astype(v.dtype), v], axis=1)
            positions = jnp.concatenate([cache.positions, now], axis=1)
        visible = (positions[:, None] >= 0) & (positions[:, None] <= now[..., None])
        if self.windowed:
            visible &= positions[:, None] > now[..., None] - self.config.window
        y = _by_rows(q, keys, values, visible)
        if self.forgets_at(cache.keys.shape[1]):
            outgrown = new.index > cache.keys.shape[1]  # under jit, where `check_room` cannot refuse it
            y = jnp.where(outgrown[:, None, None, None], jnp.nan, y)
        return y, new

    def _written(self, cache: KVCache, k: Array, v: Array, lengths: Array | None) -> KVCache:
        """The cache with the tokens of k and v that count, of more than it holds the last."""
        (B, T), L = k.shape[:2], cache.keys.shape[1]
        self.check_room(L, cache.index, T, lengths)
        lengths = jnp.full(B, T, jnp.int32) if lengths is None else lengths
        now, rows = _positions(cache, k), jnp.arange(B)[:, None]
        slots = ring_slots(now, lengths, L)

        def put(ring: Array, tokens: Array) -> Array:
            return ring.at[rows, slots].set(tokens.astype(ring.dtype), mode="drop", unique_indices=True)

        return KVCache(put(cache.keys, k), put(cache.values, v), put(cache.positions, now), index=cache.index + lengths)

    def forgets_at(self, room: int) -> bool:
        """Whether a ring buffer for `room` tokens would overwrite one that is still visible."""
        return not self.windowed or room < self.config.window

    def check_room(
        self, room: int, held: Int[Array, "*R B"] | int, tokens: int, lengths: Int[Array, "B"] | None
    ) -> None:
        """A ring for `room` tokens that holds so many has room for more, or a UserError; under jit none."""
        read = tokens if lengths is None else lengths
        if all(isinstance(x, int) or is_known(x) for x in (held, read)):
            total = int(np.max(np.asarray(held) + np.asarray(read), initial=0))
        else:
            total = tokens if lengths is None else 0
        if total > room and self.forgets_at(room):
            raise UserError(f"{total} tokens do not fit a cache of max_len {room}; make it with a larger max_len.")

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> KVCache:
        """The cache of an empty sequence of at most max_len tokens; `swa` never keeps more than its window.

        One with room for the window goes on for ever. Another refuses a sequence that outgrows max_len; under jit,
        where it cannot, the outputs are NaN from there on.
        """
        length = min(self.config.window, max_len) if self.windowed else max_len
        zeros = jnp.zeros((batch, length, self.config.heads, self.config.head_dim), dtype)
        return KVCache(zeros, zeros, jnp.full((batch, length), -1, jnp.int32), jnp.zeros(batch, jnp.int32))


class SlidingWindowAttention(Attention):
    """Attention over the last `window` tokens, the current one included."""

    windowed = True


def ring_slots(positions: Int[Array, "B T"], lengths: Int[Array, "B"], size: int) -> Int[Array, "B T"]:
    """The slots of new tokens, in a row all different; those of padding and of tokens that later ones of the piece
    overwrite lie beyond the ring."""
    token = jnp.arange(positions.shape[1])
    kept = (token < lengths[:, None]) & (token >= lengths[:, None] - size)
    return jnp.where(kept, positions % size, size + token)


def _positions(cache: KVCache, k: Array) -> Array:
    """Of the tokens of k, which continue the cache [B, T]."""
    return cache.index[:, None] + jnp.arange(k.shape[1])


def _by_rows(q: Array, keys: Array, values: Array, visible: Array) -> Array:
    """Attention under the mask `visible` [B, T, S], so many rows at a time as SCORES allows."""
    rows = max(1, SCORES // (visible[0].size * q.shape[2]))
    if rows >= len(q):
        return _dot_product_attention(q, keys, values, mask=visible[:, None])

    def one(row: tuple) -> Array:
        q, keys, values, visible = (x[None] for x in row)
        return _dot_product_attention(q, keys, values, mask=visible[:, None])[0]

    return jax.lax.map(one, (q, keys, values, visible), batch_size=rows)


def _why_not_cudnn(q: Array, mask: Array | None) -> str | None:
    """The reason cuDNN's attention cannot run here, by its limits on every GPU, or None."""
    if not placement.on_gpu():
        return f"the device is {placement.device().device_kind}, not a CUDA device"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if mask is not None:
        return "it takes no mask, which documents and a cache need"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"a head has {q.shape[-1]} dimensions; it takes multiples of 8 up to 128"
    return None


def _dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    local_window_size: tuple[int, int] | None = None,
) -> Array:
    """jax.nn's attention: cuDNN's kernel where it applies, else XLA, with exact products of fp32 inputs."""
    reason = _why_not_cudnn(q, mask)
    refused = (dispatch.Refusal(NAME, "cudnn", reason),) if reason else ()
    implementation = dispatch.taken(dispatch.Choice(NAME, "xla" if reason else "cudnn", refused))
    if q.dtype == jnp.float64:
        return _float64_attention(q, k, v, mask, is_causal, local_window_size)
    with jax.default_matmul_precision("highest"):  # jax.nn takes no precision; bf16 products are exact anyway
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=is_causal,
            local_window_size=local_window_size,
            implementation=implementation,
        )


def _float64_attention(
    q: Array, k: Array, v: Array, mask: Array | None, is_causal: bool, local_window_size: tuple[int, int] | None
) -> Array:
    """The same in float64 throughout: jax.nn's softmax is fp32 whatever it is given."""
    behind = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    visible = behind >= 0 if is_causal else jnp.ones_like(behind, bool)
    if local_window_size is not None:
        visible &= behind <= local_window_size[0]
    visible = visible if mask is None else visible & mask
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, where=visible), v)
