"""Token mixers, [B, T, D] -> [B, T, D]. To add one: a module here, its name below and in config.MIXER_FIELDS.

Every mixer is made by `Mixer(cfg, rngs=...)` and has
    __call__(x, *, compute, segment_ids=None, cache=None) -> (y, new cache, or None without one)
    init_cache(batch, max_len, dtype) -> cache of an empty sequence
"""

from gdn_jax.mixers.attention import Attention, SlidingWindowAttention
from gdn_jax.mixers.deltanet import DeltaNet
from gdn_jax.mixers.gated_deltanet import GatedDeltaNet

MIXERS = {
    "gated_deltanet": GatedDeltaNet,
    "deltanet": DeltaNet,
    "attention": Attention,
    "swa": SlidingWindowAttention,
}
