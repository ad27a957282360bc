"""How the next token is drawn from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gdn_jax.errors import UserError

MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from logits l: p ~ exp(l / temperature), cut to top_k, then to top_p.

    temperature   0 takes the likeliest token; otherwise at least 0.001
    top_k         the k likeliest tokens only; None: all
    top_p         the fewest likeliest tokens whose probability, after top_k, reaches top_p in (0, 1]
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        temperature = self.temperature
        if not (temperature == 0 or MIN_TEMPERATURE <= temperature < float("inf")):
            raise UserError(
                f"temperature is {temperature}; it must be 0 for the likeliest token, or at least {MIN_TEMPERATURE}."
            )
        if self.top_k is not None and not (isinstance(self.top_k, int | np.integer) and self.top_k >= 1):
            raise UserError(f"top_k is {self.top_k}; it must be positive and whole, or left out for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be in (0, 1], 1 for all tokens.")


def sample(logits: Float[Array, "vocab"], key: Array, sampling: Sampling) -> Int[Array, ""]:
    """One token id; equal logits rank by id."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    scaled = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    order = jnp.argsort(-scaled, stable=True)
    ranked = scaled[order]
    if sampling.top_k is not None:
        ranked = jnp.where(jnp.arange(ranked.size) < sampling.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    likelier = jnp.cumsum(probability[:-1])
    before = jnp.concatenate([jnp.zeros(1, likelier.dtype), likelier])  # exactly 0 for the first: one is always kept
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)
