"""FLA's hgrn2: HGRN2, with softmax attention in some layers or none."""

from gdn_jax.config import HGRN2Config, Model
from gdn_jax.convert.fla.common import (
    HYBRID,
    Architecture,
    Config,
    Reader,
    layout,
    read_common,
    read_pattern,
    write_attn,
    write_common,
)
from gdn_jax.convert.tables import LINEAR, SAME, Entry
from gdn_jax.errors import UserError

TABLE = (
    *(
        Entry(f"attn.{name}.weight", (f"mixer/{name}/kernel",), LINEAR)
        for name in ("q_proj", "f_proj", "i_proj", "o_proj")
    ),
    Entry("attn.g_norm.weight", ("mixer/o_norm/weight",), SAME),
)
FRAME = (Entry("model.lower_bounds", ("lower_bounds",), SAME),)


def read(config: Reader) -> Model:
    common = read_common(config)
    config.require("use_short_conv", False)
    config.get("conv_size", int, 4)
    config.require("use_lower_bound", True)
    config.require("elementwise_affine", True)
    d_model, heads = common["d_model"], config.optional("num_heads", int)
    ratio = config.optional("expand_ratio", int) or (d_model // heads if heads else 128)
    if ratio < 1 or d_model % ratio or heads not in (None, d_model // ratio):
        raise UserError(
            f"{config.where} has num_heads = {heads} and expand_ratio = {ratio}; their product must be hidden_size "
            f"{d_model}."
        )
    pattern, repeats, attention = read_pattern(config, "hgrn2", d_model)
    mixer = HGRN2Config(heads=d_model // ratio, head_dim=ratio)
    return Model(pattern=pattern, repeats=repeats, hgrn2=mixer, attention=attention, **common)


def write(cfg: Model) -> Config:
    mixer = cfg.hgrn2
    return write_common(cfg) | {
        "attn_mode": "chunk",
        "num_heads": mixer.heads,
        "expand_ratio": mixer.head_dim,
        "use_short_conv": False,
        "use_lower_bound": True,
        "attn": write_attn(cfg),
    }


ARCHITECTURE = Architecture(layout("hgrn2", {"hgrn2": TABLE, **HYBRID}, frame=FRAME), read, write, "HGRN2ForCausalLM")
