"""FLA's delta_net: DeltaNet, with softmax attention in some layers or none."""

from gdn_jax.config import DeltaNetConfig, Model
from gdn_jax.convert.fla.common import (
    HYBRID,
    Architecture,
    Config,
    Reader,
    head_dim,
    layout,
    read_common,
    read_pattern,
    write_attn,
    write_common,
    write_expansion,
)
from gdn_jax.convert.tables import CONV, LINEAR, SAME, Entry

TABLE = (
    *(
        Entry(f"attn.{name}.weight", (f"mixer/{name}/kernel",), LINEAR)
        for name in ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj")
    ),
    *(Entry(f"attn.{name}_conv1d.weight", (f"mixer/{name}_conv/weight",), CONV) for name in "qkv"),
    Entry("attn.o_norm.weight", ("mixer/o_norm/weight",), SAME),
)


def read(config: Reader) -> Model:
    common = read_common(config)
    config.require("use_gate", False)
    config.require("allow_neg_eigval", False)
    config.require("use_beta", True)
    config.require("use_output_norm", True)
    config.require("qk_norm", "l2")
    config.require("qk_activation", "silu")
    config.require("conv_bias", False)
    pattern, repeats, attention = read_pattern(config, "deltanet", common["d_model"])
    heads, width = config.get("num_heads", int, 16), config.get("conv_size", int, 4)
    mixer = DeltaNetConfig(
        heads=heads,
        key_dim=head_dim(config, "expand_k", 1.0, heads, common["d_model"]),
        value_dim=head_dim(config, "expand_v", 1.0, heads, common["d_model"]),
        conv_width=width if config.get("use_short_conv", bool, True) else 0,
    )
    return Model(pattern=pattern, repeats=repeats, deltanet=mixer, attention=attention, **common)


def write(cfg: Model) -> Config:
    mixer = cfg.deltanet
    return write_common(cfg) | {
        "attn_mode": "chunk",
        "num_heads": mixer.heads,
        "expand_k": write_expansion(mixer.heads * mixer.key_dim, cfg),
        "expand_v": write_expansion(mixer.heads * mixer.value_dim, cfg),
        "use_beta": True,
        "use_gate": False,
        "use_output_norm": True,
        "use_short_conv": mixer.conv_width > 0,
        "conv_size": mixer.conv_width or 4,
        "allow_neg_eigval": False,
        "qk_norm": "l2",
        "qk_activation": "silu",
        "attn": write_attn(cfg),
    }


ARCHITECTURE = Architecture(layout("delta_net", {"deltanet": TABLE, **HYBRID}), read, write, "DeltaNetForCausalLM")
