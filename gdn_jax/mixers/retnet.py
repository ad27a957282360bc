"""RetNet (Sun et al. 2023a): linear attention, a fixed decay for each head, rotated queries and keys, a gated norm."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gdn_jax.config import Model
from gdn_jax.layers import Compute, Linear, RMSNorm, at_least_fp32, linear_init, rope, together, zero_padding
from gdn_jax.mixers.recurrence import LINEAR_ATTENTION, advance


class RetNetCache(NamedTuple):
    """The whole past in constant memory: the state, and the next token's position, which its rotation needs."""

    state: Float[Array, "B H K V"]  # fp32
    index: Int[Array, "B"]


class RetNet(nnx.Module):
    """Token mixer S_t = (1 - 2^(-5-h)) S_{t-1} + v_t k_t^T, o_t = S_t q_t / sqrt(K), of head h = 0, 1, ...

    q, k = RoPE(W_q x), RoPE(W_k x), v = W_v x, y = W_o [RMSNorm(o) * SiLU(W_g x)]; no convolution, no feature map.
    """

    TOGETHER = ("q_proj", "k_proj", "v_proj", "g_proj")

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.config = mixer = cfg.retnet
        D, key_size, value_size = cfg.d_model, mixer.heads * mixer.key_dim, mixer.heads * mixer.value_dim
        self.q_proj = Linear(D, key_size, linear_init(cfg, D), rngs=rngs)
        self.k_proj = Linear(D, key_size, linear_init(cfg, D), rngs=rngs)
        self.v_proj = Linear(D, value_size, linear_init(cfg, D), rngs=rngs)
        self.g_proj = Linear(D, value_size, linear_init(cfg, D), rngs=rngs)
        self.o_norm = RMSNorm(mixer.value_dim, cfg.norm_eps)
        init = linear_init(cfg, value_size, residual=cfg.rescale_o_proj)
        self.o_proj = Linear(value_size, D, init, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: RetNetCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
    ) -> tuple[Float[Array, "B T D"], RetNetCache | None]:
        mixer, (B, T, _) = self.config, x.shape
        offset = 0 if cache is None else cache.index
        by_head = lambda y, dim: y.reshape(B, T, mixer.heads, dim)  # noqa: E731
        q, k, v, gate = together(self, x, compute)
        q, k = (rope(by_head(y, mixer.key_dim), offset, mixer.rope_base) for y in (q, k))
        v = zero_padding(by_head(v, mixer.value_dim), lengths)
        g = log_decays(mixer.heads, at_least_fp32(compute.dtype))
        g = zero_padding(jnp.broadcast_to(g, (B, T, mixer.heads)), lengths)
        o, state = advance(LINEAR_ATTENTION, (q, k, v, g), cache, compute=compute, segment_ids=segment_ids)
        o = self.o_norm(o, compute, by_head(gate, mixer.value_dim))
        y = self.o_proj(o.reshape(B, T, -1), compute)
        if cache is None and room is None:
            return y, None
        read = jnp.full(B, T, jnp.int32) if lengths is None else lengths
        return y, RetNetCache(state, offset + read)

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> RetNetCache:
        """The cache of an empty sequence; max_len does not matter, its size is constant."""
        mixer = self.config
        state = jnp.zeros((batch, mixer.heads, mixer.key_dim, mixer.value_dim), at_least_fp32(dtype))
        return RetNetCache(state, jnp.zeros(batch, jnp.int32))


def log_decays(heads: int, dtype: Any = jnp.float32) -> Float[Array, "H"]:
    """log(1 - 2^(-5 - h)) of every head."""
    return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(heads, dtype=dtype))))
