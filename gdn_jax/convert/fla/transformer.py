"""FLA's transformer: softmax attention in every layer, full or within a window."""

from gdn_jax.config import Model
from gdn_jax.convert.fla.common import (
    HYBRID,
    Architecture,
    Config,
    Reader,
    layout,
    read_attention,
    read_common,
    write_common,
)
from gdn_jax.errors import UserError


def read(config: Reader) -> Model:
    common = read_common(config)
    config.require("elementwise_affine", True)
    mixer, attention = read_attention(config, common["d_model"])
    return Model(pattern=(mixer,), repeats=config.get("num_hidden_layers", int), attention=attention, **common)


def write(cfg: Model) -> Config:
    if len(set(cfg.pattern)) > 1:
        raise UserError(
            f"model.pattern is {' '.join(cfg.pattern)}; the FLA transformer has one kind of layer, so such a model "
            "cannot be exported."
        )
    attention = cfg.attention
    return write_common(cfg) | {
        "num_heads": attention.heads,
        "num_kv_heads": None,
        "window_size": attention.window if cfg.pattern[0] == "swa" else None,
        "rope_theta": attention.rope_base,
    }


ARCHITECTURE = Architecture(layout("transformer", HYBRID), read, write, "TransformerForCausalLM")
