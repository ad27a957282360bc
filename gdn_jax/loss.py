"""The training loss: plain mean cross entropy of the next token."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gdn_jax.layers import Compute, at_least_fp32
from gdn_jax.model import LM, check_ids
from gdn_jax.sharding import split_tokens
from pallas_kernels import linear_cross_entropy


def next_token_loss(model: LM, batch: dict[str, jax.Array | np.ndarray], compute: Compute) -> Float[Array, ""]:
    """Mean over all targets of -log p(token_{t+1} | tokens_{<=t}), in nats; no z-loss.

    batch: "tokens" [B, T+1] int32; optionally "segment_ids" [B, T+1] (packed documents that must not see each
    other) and "weights" [B] >= 0, one for each row (0 leaves a row out; all 0 gives 0). Targets across a
    border count too. Every token is an input and a target, so one that is not in [0, vocab), -100 included, is a
    UserError (under jit, where none can be raised, it is not looked for).
    """
    check_ids(batch["tokens"], model.config.vocab)
    tokens, segment_ids = jnp.asarray(batch["tokens"], jnp.int32), batch.get("segment_ids")
    inputs, targets = split_tokens(tokens[:, :-1]), split_tokens(tokens[:, 1:])
    if segment_ids is not None:
        segment_ids = split_tokens(jnp.asarray(segment_ids)[:, :-1])
    rows, dtype = batch.get("weights"), at_least_fp32(compute.dtype)
    rows = jnp.ones(tokens.shape[0], dtype) if rows is None else jnp.asarray(rows, dtype)
    weights = jnp.broadcast_to(rows[:, None], targets.shape)
    total = jnp.sum(weights)
    hidden, _ = model(inputs, compute=compute, segment_ids=segment_ids)
    impl = compute.impl_among(linear_cross_entropy.IMPLS)
    loss = linear_cross_entropy.linear_cross_entropy(hidden, model.head_kernel(), targets, weights, impl=impl)
    return loss / jnp.where(total > 0, total, 1.0)
