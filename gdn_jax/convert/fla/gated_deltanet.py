"""FLA's gated_deltanet: Gated DeltaNet, with softmax attention in some layers or none."""

import math

from gdn_jax.config import GatedDeltaNetConfig, Model
from gdn_jax.convert.fla.common import (
    HYBRID,
    Architecture,
    Config,
    Reader,
    layout,
    read_common,
    read_pattern,
    require_built_there,
    write_attn,
    write_common,
)
from gdn_jax.convert.tables import CONV, LINEAR, SAME, Entry
from gdn_jax.errors import UserError

TABLE = (
    *(
        Entry(f"attn.{name}.weight", (f"mixer/{name}/kernel",), LINEAR)
        for name in ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj")
    ),
    *(Entry(f"attn.{name}_conv1d.weight", (f"mixer/{name}_conv/weight",), CONV) for name in "qkv"),
    Entry("attn.A_log", ("mixer/A_log",), SAME, keeps_fp32=True),
    Entry("attn.dt_bias", ("mixer/dt_bias",), SAME, keeps_fp32=True),
    Entry("attn.o_norm.weight", ("mixer/o_norm/weight",), SAME),
)


def read(config: Reader) -> Model:
    common = read_common(config)
    config.require("output_gate_activation", "swish", "silu")
    config.require("conv_bias", False)
    key_dim = config.get("head_dim", int, 256)
    heads = config.get("num_heads", int, 6)
    expand = config.get("expand_v", float, 2.0)
    value_dim = round(key_dim * expand)
    if not math.isclose(key_dim * expand, value_dim, rel_tol=1e-5):
        raise UserError(f"{config.where} has expand_v = {expand}; times head_dim {key_dim} it must be a whole number.")
    width = config.get("conv_size", int, 4)
    pattern, repeats, attention = read_pattern(config, "gated_deltanet", common["d_model"])
    mixer = GatedDeltaNetConfig(
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        value_heads=config.optional("num_v_heads", int),
        conv_width=width if config.get("use_short_conv", bool, True) else 0,
        output_gate=config.get("use_gate", bool, True),
        negative_eigenvalues=config.get("allow_neg_eigval", bool, False),
        beta_bias=False,
    )
    return Model(pattern=pattern, repeats=repeats, gated_deltanet=mixer, attention=attention, **common)


def write(cfg: Model) -> Config:
    mixer = cfg.gated_deltanet
    if mixer.beta_bias:
        raise UserError(
            "model.gated_deltanet.beta_bias is True, and the FLA format has no bias of beta; export with --format lit, "
            "or train a model of the -fla family."
        )
    require_built_there("gated_deltanet", mixer, decay=True, output_norm=True, feature_map="silu", qk_norm="l2")
    expand = mixer.value_dim / mixer.key_dim
    if int(mixer.key_dim * expand) != mixer.value_dim:  # as fla computes it
        raise UserError(
            f"model.gated_deltanet.value_dim is {mixer.value_dim} and key_dim {mixer.key_dim}; their ratio, which the "
            "FLA format stores, does not give value_dim back, so this model cannot be exported."
        )
    return write_common(cfg) | {
        "attn_mode": "chunk",
        "num_heads": mixer.heads,
        "num_v_heads": mixer.value_heads,
        "head_dim": mixer.key_dim,
        "expand_v": expand,
        "use_gate": mixer.output_gate,
        "use_short_conv": mixer.conv_width > 0,
        "conv_size": mixer.conv_width or 4,
        "allow_neg_eigval": mixer.negative_eigenvalues,
        "attn": write_attn(cfg),
    }


ARCHITECTURE = Architecture(
    layout("gated_deltanet", {"gated_deltanet": TABLE, **HYBRID}, unused=("attn.D",)),
    read,
    write,
    "GatedDeltaNetForCausalLM",
)
