"""FLA's mamba2: Mamba2 without MLPs."""

from gdn_jax.config import Mamba2Config, Model
from gdn_jax.convert.fla.common import Architecture, Config, Reader, backbone_layout, read_pattern
from gdn_jax.convert.tables import CONV, LINEAR, SAME, Entry
from gdn_jax.errors import UserError

TABLE = (
    Entry("mixer.in_proj.weight", ("mixer/in_proj/kernel",), LINEAR),
    Entry("mixer.conv1d.weight", ("mixer/conv/weight",), CONV),
    Entry("mixer.conv1d.bias", ("mixer/conv/bias",), SAME),
    Entry("mixer.dt_bias", ("mixer/dt_bias",), SAME, keeps_fp32=True),
    Entry("mixer.A_log", ("mixer/A_log",), SAME, keeps_fp32=True),
    Entry("mixer.D", ("mixer/D",), SAME, keeps_fp32=True),
    Entry("mixer.norm.weight", ("mixer/norm/weight",), SAME),
    Entry("mixer.out_proj.weight", ("mixer/out_proj/kernel",), LINEAR),
)
# Starts of training, a kernel's block, the residual's type in half precision: no parameter of a trained model depends
# on them.
STARTS = (
    "A_init_range", "chunk_size", "conv_init", "dt_init_floor", "dt_max", "dt_min", "rescale_prenorm_residual",
    "residual_in_fp32",
)  # fmt: skip


def read(config: Reader) -> Model:
    config.ignore(*STARTS)
    config.require("hidden_act", "silu", "swish")
    config.require("use_bias", False)
    config.require("use_conv_bias", True)
    config.require("D_has_hdim", False)
    config.require("rmsnorm", True)
    config.require("norm_before_gate", False)
    config.require("dt_limit", [0.0, float("inf")])
    d_model, dim = config.get("hidden_size", int), config.get("head_dim", int, 64)
    inner = int(config.get("expand", float, 2.0) * d_model)
    if dim < 1 or inner % dim:
        raise UserError(f"{config.where} has head_dim = {dim}; it must divide expand x hidden_size = {inner}.")
    config.require("num_heads", inner // dim)
    pattern, repeats, _ = read_pattern(config, "mamba2", d_model, softmax=False)
    mixer = Mamba2Config(
        heads=inner // dim,
        head_dim=dim,
        state=config.get("state_size", int, 128),
        groups=config.get("n_groups", int, 1),
        conv_width=config.get("conv_kernel", int, 4),
    )
    return Model(
        pattern=pattern,
        repeats=repeats,
        d_model=d_model,
        d_ff=0,
        vocab=config.get("vocab_size", int),
        tied=config.get("tie_word_embeddings", bool, False),
        norm_eps=config.get("norm_eps", float, 1e-5),
        init="fla",
        mamba2=mixer,
    )


def write(cfg: Model) -> Config:
    mixer = cfg.mamba2
    if cfg.d_ff:
        raise UserError(f"model.d_ff is {cfg.d_ff}; FLA's mamba2 has no MLPs, so this model cannot be exported.")
    inner = mixer.heads * mixer.head_dim
    expand = inner / cfg.d_model
    if int(expand * cfg.d_model) != inner:
        raise UserError(
            f"model.mamba2 has {inner} inner channels and model.d_model is {cfg.d_model}; their ratio, which the FLA "
            "format stores, does not give them back, so this model cannot be exported."
        )
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.layers,
        "expand": int(expand) if expand == int(expand) else expand,
        "head_dim": mixer.head_dim,
        "num_heads": mixer.heads,
        "state_size": mixer.state,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv_width,
        "use_bias": False,
        "use_conv_bias": True,
        "rmsnorm": True,
        "norm_before_gate": False,
        "hidden_act": "silu",
        "norm_eps": cfg.norm_eps,
        "residual_in_fp32": True,
    }


ARCHITECTURE = Architecture(
    backbone_layout("mamba2", (Entry("norm.weight", ("mixer_norm/weight",), SAME),), {"mamba2": TABLE}),
    read,
    write,
    "Mamba2ForCausalLM",
)
