"""Mamba2 (Dao & Gu 2024b): linear attention with one decay a head between a short convolution and a gated norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gdn_jax.config import Model
from gdn_jax.layers import (
    Compute,
    Linear,
    RMSNorm,
    ShortConv,
    at_least_fp32,
    conv_bias_init,
    conv_init,
    dt_bias_init,
    linear_init,
    log_decay_rate_init,
    uniform,
    zero_padding,
)
from gdn_jax.mixers.recurrence import LINEAR_ATTENTION, advance


class Mamba2Cache(NamedTuple):
    """The whole past in constant memory: the state, and the convolution's last inputs."""

    state: Float[Array, "B H N P"]  # fp32
    conv: Float[Array, "B W1 C"]


class Mamba2(nnx.Module):
    """Token mixer S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T, y_t = S_t C_t + D x_t, for each head.

    [z | x | B | C | dt] = W_in u; x, B, C through a convolution with bias and SiLU; dt = softplus(dt + dt_bias),
    A = -exp(A_log); out = W_out RMSNorm(y * SiLU(z)): the gate comes before the norm. No scaling, no normalised keys.
    """

    TOGETHER = ()  # no two of its Linears read one input

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.config = mixer = cfg.mamba2
        D, inner, shared = cfg.d_model, mixer.heads * mixer.head_dim, mixer.groups * mixer.state
        width, channels = mixer.conv_width, inner + 2 * shared
        self.in_proj = Linear(D, inner + channels + mixer.heads, linear_init(cfg, D), rngs=rngs)
        bias = conv_bias_init(cfg, width)
        self.conv = ShortConv(channels, width, conv_init(cfg, width), rngs=rngs, bias_init=bias)
        self.A_log = nnx.Param(log_decay_rate_init(rngs.params(), mixer.heads, low=1.0))
        self.dt_bias = nnx.Param(dt_bias_init(rngs.params(), mixer.heads))
        self.D = nnx.Param(jnp.ones(mixer.heads, jnp.float32))
        self.norm = RMSNorm(inner, cfg.norm_eps, gate_first=True, groups=mixer.groups)
        init = linear_init(cfg, inner, residual=True)
        if cfg.init == "fla":  # which for Mamba2 alone does rescale, counting one write a layer
            init = uniform((inner * cfg.layers) ** -0.5)
        self.out_proj = Linear(inner, D, init, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Mamba2Cache | None = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
    ) -> tuple[Float[Array, "B T D"], Mamba2Cache | None]:
        mixer, (batch, T, _) = self.config, x.shape
        inner, shared = mixer.heads * mixer.head_dim, mixer.groups * mixer.state
        z, *inputs, dt = self.in_proj.parts(x, compute, (inner, inner, 2 * shared, mixer.heads), exact=(3,))
        past = []
        for i, columns in enumerate((slice(inner), slice(inner, None))):
            history = None if cache is None else cache.conv[..., columns]
            inputs[i], last = self.conv(
                inputs[i], compute, activation="silu", segment_ids=segment_ids, history=history, lengths=lengths,
                columns=columns,
            )  # fmt: skip
            past.append(last)
        u, BC = inputs
        B, C = jnp.split(BC, 2, axis=-1)
        u = u.reshape(batch, T, mixer.heads, mixer.head_dim)
        B, C = (y.reshape(batch, T, mixer.groups, mixer.state) for y in (B, C))
        dt = jax.nn.softplus(dt + self.dt_bias[...])
        dt = zero_padding(dt, lengths)  # a step of 0 leaves the state as it is
        g = -jnp.exp(self.A_log[...]) * dt
        v = (dt[..., None] * u).astype(compute.dtype)
        y, state = advance(LINEAR_ATTENTION, (C, B, v, g), cache, compute=compute, segment_ids=segment_ids, scale=1.0)
        y = (y + self.D[..., None] * u).astype(compute.dtype).reshape(batch, T, inner)
        y = self.out_proj(self.norm(y, compute, z), compute)
        return y, None if cache is None and room is None else Mamba2Cache(state, jnp.concatenate(past, axis=-1))

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> Mamba2Cache:
        """The cache of an empty sequence; max_len does not matter, its size is constant."""
        mixer = self.config
        state = jnp.zeros((batch, mixer.heads, mixer.state, mixer.head_dim), at_least_fp32(dtype))
        channels = mixer.heads * mixer.head_dim + 2 * mixer.groups * mixer.state
        return Mamba2Cache(state, jnp.zeros((batch, mixer.conv_width - 1, channels), dtype))
