"""FLA's retnet: RetNet, with softmax attention in some layers or none."""

from gdn_jax.config import Model, RetNetConfig
from gdn_jax.convert.fla.common import (
    HYBRID,
    Architecture,
    Config,
    Reader,
    head_dim,
    layout,
    read_common,
    read_pattern,
    require_built_there,
    write_attn,
    write_common,
    write_expansion,
)
from gdn_jax.convert.tables import LINEAR, SAME, Entry

TABLE = (
    *(
        Entry(f"attn.{name}.weight", (f"mixer/{name}/kernel",), LINEAR)
        for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    ),
    Entry("attn.g_norm_swish_gate.weight", ("mixer/o_norm/weight",), SAME),
)


def read(config: Reader) -> Model:
    common = read_common(config, ratio=2)
    heads = config.get("num_heads", int, 8)
    config.require("num_kv_heads", heads)
    config.require("feature_map")
    config.require("use_short_conv", False)
    config.get("conv_size", int, 4)
    config.require("use_output_gate", True)
    config.require("elementwise_affine", True)
    pattern, repeats, attention = read_pattern(config, "retnet", common["d_model"])
    mixer = RetNetConfig(
        heads=heads,
        key_dim=head_dim(config, "expand_k", 1.0, heads, common["d_model"]),
        value_dim=head_dim(config, "expand_v", 2.0, heads, common["d_model"]),
    )
    return Model(pattern=pattern, repeats=repeats, retnet=mixer, attention=attention, **common)


def write(cfg: Model) -> Config:
    mixer = cfg.retnet
    require_built_there("retnet", mixer, rope_base=10000.0)
    return write_common(cfg) | {
        "attn_mode": "chunk",
        "num_heads": mixer.heads,
        "num_kv_heads": None,
        "expand_k": write_expansion(mixer.heads * mixer.key_dim, cfg),
        "expand_v": write_expansion(mixer.heads * mixer.value_dim, cfg),
        "feature_map": None,
        "use_short_conv": False,
        "use_output_gate": True,
        "attn": write_attn(cfg),
    }


ARCHITECTURE = Architecture(layout("retnet", {"retnet": TABLE, **HYBRID}), read, write, "RetNetForCausalLM")
