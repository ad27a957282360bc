"""HGRN2 (Qin et al. 2024b): linear attention whose key is what the forget gate lets go, with learned lower bounds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gdn_jax.config import Model
from gdn_jax.layers import Compute, Linear, RMSNorm, at_least_fp32, linear_init, together, zero_padding
from gdn_jax.mixers.recurrence import LINEAR_ATTENTION, advance


class HGRN2Cache(NamedTuple):
    """The whole past in constant memory."""

    state: Float[Array, "B H K V"]  # fp32


class HGRN2(nnx.Module):
    """Token mixer S_t = S_{t-1} Diag(f_t) + i_t (1 - f_t)^T, o_t = S_t q_t / sqrt(K).

    q = SiLU(W_q x), i = W_i x, f = b + (1 - b) sigmoid(W_f x) with the layer's lower bound b in [0, 1) of each key
    channel, y = W_o RMSNorm(o) over all channels; no convolution, no output gate.
    """

    TOGETHER, EXACT = ("q_proj", "i_proj", "f_proj"), ("f_proj",)

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.config = cfg.hgrn2
        D = cfg.d_model
        self.q_proj = Linear(D, D, linear_init(cfg, D), rngs=rngs)
        self.f_proj = Linear(D, D, linear_init(cfg, D), rngs=rngs)
        self.i_proj = Linear(D, D, linear_init(cfg, D), rngs=rngs)
        self.o_norm = RMSNorm(D, 1e-5)  # fla's layer leaves this norm at 1e-5 whatever the model's eps is
        self.o_proj = Linear(D, D, linear_init(cfg, D, residual=cfg.rescale_o_proj), rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: HGRN2Cache | None = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
        bound: Float[Array, "D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], HGRN2Cache | None]:
        """bound: the layer's lower bound of f (`lower_bounds`); none is 0."""
        heads = (*x.shape[:2], self.config.heads, self.config.head_dim)
        q, i, f = together(self, x, compute)
        q, i = jax.nn.silu(q).reshape(heads), i.reshape(heads)
        g, k = forget_gate(f, bound)
        g, k = g.reshape(heads), k.astype(compute.dtype).reshape(heads)
        g, k = zero_padding(g, lengths), zero_padding(k, lengths)
        o, state = advance(LINEAR_ATTENTION, (q, k, i, g), cache, compute=compute, segment_ids=segment_ids)
        y = self.o_proj(self.o_norm(o.reshape(x.shape), compute), compute)
        return y, None if cache is None and room is None else HGRN2Cache(state)

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> HGRN2Cache:
        """The cache of an empty sequence; max_len does not matter, its size is constant."""
        heads, dim = self.config.heads, self.config.head_dim
        return HGRN2Cache(jnp.zeros((batch, heads, dim, dim), at_least_fp32(dtype)))


def lower_bounds(logits: Float[Array, "L D"]) -> Float[Array, "L D"]:
    """The lower bound of f in every layer: softmax over layers, summed from the second layer up to this one.

    It rises with depth from exactly 0 in the first layer and stays below 1, at most the number before 1. (The sum less
    the first layer's share would be that only up to rounding, which differs between two uses in one compiled program,
    and `forget_gate` asks whether the bound is 0.)
    """
    share = jax.nn.softmax(logits, axis=0)
    bound = jnp.concatenate([jnp.zeros_like(share[:1]), jnp.cumsum(share[1:], axis=0)])
    return jnp.minimum(bound, 1 - jnp.finfo(share.dtype).epsneg)


def forget_gate(
    logits: Float[Array, "B T D"], bound: Float[Array, "D"] | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """(log f, 1 - f) of f = b + (1 - b) sigmoid(logits), neither by way of f, which rounds near 0 and 1."""
    log_sigmoid, complement = jax.nn.log_sigmoid(logits), jax.nn.sigmoid(-logits)
    if bound is None:
        return log_sigmoid, complement
    positive = bound > 0
    b = jnp.where(positive, bound, 0.5)  # log b has no gradient at 0, where the other branch is taken
    log_f = jnp.where(positive, jnp.logaddexp(jnp.log(b), jnp.log1p(-b) + log_sigmoid), log_sigmoid)
    return log_f, (1 - bound) * complement
