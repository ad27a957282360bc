"""Mamba (Gu & Dao 2023): a selective scan between a short convolution and a gate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gdn_jax.config import Model
from gdn_jax.layers import Compute, Linear, ShortConv, at_least_fp32, dt_bias_init, linear_init, uniform, zero_padding
from gdn_jax.mixers.recurrence import SELECTIVE_SCAN, advance


class MambaCache(NamedTuple):
    """The whole past in constant memory: the state, and the convolution's last inputs."""

    state: Float[Array, "B I N"]  # fp32
    conv: Float[Array, "B W1 I"]


class Mamba(nnx.Module):
    """Token mixer h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, for each inner channel.

    [u | z] = W_in x; u through a convolution with bias and SiLU; [r | B | C] = W_x u; dt = softplus(W_dt r + bias);
    A = -exp(A_log); out = W_out (y * SiLU(z)).
    """

    TOGETHER = ()  # no two of its Linears read one input

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.config = mixer = cfg.mamba
        D, inner, rank, N, width = cfg.d_model, mixer.inner, mixer.dt_rank, mixer.state, mixer.conv_width
        self.in_proj = Linear(D, 2 * inner, linear_init(cfg, D), rngs=rngs)
        init = uniform(width**-0.5)  # both families leave Mamba's convolution and dt_proj at their own start
        self.conv = ShortConv(inner, width, init, rngs=rngs, bias_init=init)
        self.x_proj = Linear(inner, rank + 2 * N, linear_init(cfg, inner), rngs=rngs)
        self.dt_proj = Linear(rank, inner, uniform(rank**-0.5), rngs=rngs, bias=True)
        self.dt_proj.bias[...] = dt_bias_init(rngs.params(), inner)
        rates = jnp.log(jnp.arange(1.0, N + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(jnp.broadcast_to(rates, (inner, N)))
        self.D = nnx.Param(jnp.ones(inner, jnp.float32))
        self.out_proj = Linear(inner, D, linear_init(cfg, inner, residual=True), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: MambaCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
    ) -> tuple[Float[Array, "B T D"], MambaCache | None]:
        mixer = self.config
        u, z = self.in_proj.parts(x, compute, (mixer.inner, mixer.inner))
        history = None if cache is None else cache.conv
        u, past = self.conv(u, compute, activation="silu", segment_ids=segment_ids, history=history, lengths=lengths)
        low, B, C = jnp.split(self.x_proj(u, compute), [mixer.dt_rank, mixer.dt_rank + mixer.state], axis=-1)
        dt = jax.nn.softplus(self.dt_proj(low, compute, exact=True))
        dt = zero_padding(dt, lengths)  # a step of 0 leaves the state as it is
        A, D = -jnp.exp(self.A_log[...]), self.D[...]
        y, state = advance(SELECTIVE_SCAN, (u, dt, A, B, C, D), cache, compute=compute, segment_ids=segment_ids)
        y = self.out_proj(y * jax.nn.silu(z), compute)
        return y, None if cache is None and room is None else MambaCache(state, past)

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> MambaCache:
        """The cache of an empty sequence; max_len does not matter, its size is constant."""
        mixer = self.config
        state = jnp.zeros((batch, mixer.inner, mixer.state), at_least_fp32(dtype))
        return MambaCache(state, jnp.zeros((batch, mixer.conv_width - 1, mixer.inner), dtype))
