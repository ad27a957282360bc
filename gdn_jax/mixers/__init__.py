"""Token mixers, [B, T, D] -> [B, T, D]. To add one: a module here, its name below and in config.MIXER_FIELDS.
One from outside is added by own_mixer.add_mixer.

Every mixer is made by `Mixer(cfg, rngs=...)` and has
    __call__(x, *, compute, segment_ids=None, cache=None, lengths=None, room=None) -> (y, new cache or None)
    init_cache(batch, max_len, dtype) -> cache of an empty sequence
A new cache comes where a cache was given, or a room: the sequence then begins here and its cache has that max_len.
lengths [B]: the tokens of each row that count. What follows them is padding and leaves no trace in the new cache.
HGRN2 alone also takes the lower bound of its layer, which the model makes for all layers at once.
"""

from gdn_jax.mixers.attention import Attention, SlidingWindowAttention
from gdn_jax.mixers.deltanet import DeltaNet
from gdn_jax.mixers.gated_deltanet import GatedDeltaNet
from gdn_jax.mixers.hgrn2 import HGRN2
from gdn_jax.mixers.mamba import Mamba
from gdn_jax.mixers.mamba2 import Mamba2
from gdn_jax.mixers.retnet import RetNet

MIXERS = {
    "gated_deltanet": GatedDeltaNet,
    "deltanet": DeltaNet,
    "retnet": RetNet,
    "hgrn2": HGRN2,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "attention": Attention,
    "swa": SlidingWindowAttention,
}
