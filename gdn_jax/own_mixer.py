"""Adding a mixer of your own: after one call model.pattern may name it, and model.own holds its configuration."""

import dataclasses
from collections.abc import Callable

from flax import nnx

from gdn_jax.config import MIXER_FIELDS, OWN_CONFIGS, OWN_FIELD, Model
from gdn_jax.errors import UserError
from gdn_jax.flops import MIXER_FLOPS
from gdn_jax.mixers import MIXERS


def add_mixer(name: str, mixer: type[nnx.Module], *, config: type, flops: Callable[[Model, int], float]) -> None:
    """Lets a model's pattern say `name`; called again, as by a file that is run again, it replaces what was added.

    mixer   as those of gdn_jax.mixers; made by mixer(cfg, rngs=...), it finds its configuration in cfg.own
    config  frozen dataclass of that configuration; mixers of one model share it. Its fields are numbers, words, bools
            or tuples of one of these
    flops   (cfg, seq_len) -> what a token costs forward beside the matrix products of Linear layers
    Raises UserError where one of them is something else, or where `name` is a mixer of ours.
    """
    if not name.isidentifier():
        raise UserError(f"A mixer cannot be called {name!r}; give it a name of letters, digits and underscores.")
    if name in MIXER_FIELDS and name not in OWN_CONFIGS:
        raise UserError(f"There is a mixer {name!r} already; give yours another name.")
    if not (isinstance(mixer, type) and issubclass(mixer, nnx.Module)):
        raise UserError(f"The mixer {name!r} is {mixer!r}; it must be a class derived from flax.nnx.Module.")
    for method in ("__call__", "init_cache"):
        if not any(method in vars(base) for base in mixer.__mro__):
            raise UserError(f"The mixer {name!r} has no {method}; write it as gdn_jax.mixers describes it.")
    if not (dataclasses.is_dataclass(config) and isinstance(config, type) and config.__dataclass_params__.frozen):
        raise UserError(
            f"The configuration of {name!r} is {config!r}; it must be a class with @dataclass(frozen=True)."
        )
    if not callable(flops):
        raise UserError(f"flops of {name!r} is {flops!r}; it must be a function (cfg, seq_len) -> FLOPs of a token.")
    MIXERS[name], MIXER_FLOPS[name] = mixer, flops
    MIXER_FIELDS[name], OWN_CONFIGS[name] = OWN_FIELD, config
