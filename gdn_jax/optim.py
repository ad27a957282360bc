"""The recipe as optax: global-norm clip, AdamW, linear warm-up and cosine decay."""

import re

import optax

from gdn_jax.config import Optim
from gdn_jax.tree import named_leaves, with_leaves

# What the usual AdamW recipe does not decay: norms, biases, the gates' A_log and dt_bias, the skip D, HGRN2's bounds.
NOT_DECAYED = re.compile(r"(^|/)(A_log|dt_bias|bias|D|lower_bounds)$|norm/weight$")


def schedule(optim: Optim) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ...: linear from 0 over warmup * steps, then cosine to min_lr_ratio * lr."""
    warmup = round(optim.warmup * optim.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else optim.lr,
        peak_value=optim.lr,
        warmup_steps=warmup,
        decay_steps=max(optim.steps, warmup + 1),
        end_value=optim.min_lr_ratio * optim.lr,
    )


def decay_mask(params: optax.Params) -> optax.Params:
    """True for every leaf that weight decay touches when optim.decay_all is False."""
    leaves = named_leaves(params)
    return with_leaves(params, {name: NOT_DECAYED.search(name) is None for name in leaves})


def optimizer(optim: Optim) -> optax.GradientTransformation:
    """clip(global norm) -> AdamW(schedule); weight decay is decoupled and scaled by the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.adamw(
            schedule(optim),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=None if optim.decay_all else decay_mask,
        ),
    )
