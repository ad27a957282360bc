"""Softmax attention with RoPE, over all earlier tokens (`attention`) or a sliding window (`swa`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gdn_jax.config import Model
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute, Linear, linear_init, rope, segment_index


class KVCache(NamedTuple):
    """The last L keys and values in a ring: the token at position p lies in slot p mod L."""

    keys: Float[Array, "B L H K"]  # rotated
    values: Float[Array, "B L H K"]
    positions: Int[Array, "L"]  # of each slot; -1: empty
    index: Int[Array, ""]  # position of the next token


class Attention(nnx.Module):
    """y = W_o softmax(q k^T / sqrt(K)) v over the visible tokens: causal, and within the window in `swa`."""

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
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        offset = 0 if cache is None else cache.index
        heads = (*x.shape[:2], self.config.heads, self.config.head_dim)
        q = rope(self.q_proj(x, compute).reshape(heads), offset, self.config.rope_base)
        k = rope(self.k_proj(x, compute).reshape(heads), offset, self.config.rope_base)
        v = self.v_proj(x, compute).reshape(heads)
        if cache is None:
            y = self._attend(q, k, v, segment_ids)
        elif segment_ids is not None:
            raise UserError(
                "attention got segment_ids and a cache; packed documents are for training, pass one of them."
            )
        else:
            y, cache = self._attend_with_cache(q, k, v, cache)
        return self.o_proj(y.reshape(x.shape), compute), cache

    def _attend(self, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        T, window, mask = q.shape[1], None, None
        if self.windowed and self.config.window < T:
            window = (self.config.window - 1, 0)
        if segment_ids is not None:
            segments = segment_index(segment_ids)
            mask = segments[:, None, :, None] == segments[:, None, None, :]
        return _dot_product_attention(q, k, v, mask=mask, is_causal=True, local_window_size=window)

    def _attend_with_cache(self, q: Array, k: Array, v: Array, cache: KVCache) -> tuple[Array, KVCache]:
        T, L = q.shape[1], cache.keys.shape[1]
        if T > L and not self.windowed:
            raise UserError(f"{T} tokens do not fit a cache of max_len {L}; make it with a larger max_len.")
        now = cache.index + jnp.arange(T)
        kept = now[-min(T, L) :]  # distinct slots: what a longer piece would overwrite is not written
        slots = kept % L
        new = KVCache(
            keys=cache.keys.at[:, slots].set(k[:, -kept.size :].astype(cache.keys.dtype)),
            values=cache.values.at[:, slots].set(v[:, -kept.size :].astype(cache.values.dtype)),
            positions=cache.positions.at[slots].set(kept),
            index=cache.index + T,
        )
        if T == 1:  # the slot it overwrote has just left the window
            keys, values, positions = new.keys.astype(k.dtype), new.values.astype(v.dtype), new.positions
        else:  # early queries of the piece still see keys that its end overwrites
            keys = jnp.concatenate([cache.keys.astype(k.dtype), k], axis=1)
            values = jnp.concatenate([cache.values.astype(v.dtype), v], axis=1)
            positions = jnp.concatenate([cache.positions, now])
        visible = (positions >= 0) & (positions <= now[:, None])
        if self.windowed:
            visible &= positions > now[:, None] - self.config.window
        return _dot_product_attention(q, keys, values, mask=visible[None, None]), new

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> KVCache:
        """The cache of an empty sequence of at most max_len tokens; `swa` never keeps more than its window.

        Full attention forgets the oldest tokens when a sequence outgrows max_len.
        """
        length = min(self.config.window, max_len) if self.windowed else max_len
        zeros = jnp.zeros((batch, length, self.config.heads, self.config.head_dim), dtype)
        return KVCache(zeros, zeros, jnp.full(length, -1, jnp.int32), jnp.zeros((), jnp.int32))


class SlidingWindowAttention(Attention):
    """Attention over the last `window` tokens, the current one included."""

    windowed = True


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
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and mask is None and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0  # cuDNN's limits on every GPU
    implementation = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
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
