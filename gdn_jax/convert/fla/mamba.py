"""FLA's mamba, Mamba without MLPs, and its samba: Mamba and softmax attention, an MLP after each."""

import math
from typing import Any

from gdn_jax.config import MambaConfig, Model
from gdn_jax.convert.fla.common import (
    ATTENTION,
    MLP,
    Architecture,
    Config,
    Reader,
    backbone_layout,
    mlp_width,
    read_pattern,
    write_attn,
)
from gdn_jax.convert.tables import CONV, LINEAR, SAME, Entry
from gdn_jax.errors import UserError

TABLE = (
    *(Entry(f"mixer.{name}.weight", (f"mixer/{name}/kernel",), LINEAR) for name in ("in_proj", "x_proj", "dt_proj")),
    Entry("mixer.dt_proj.bias", ("mixer/dt_proj/bias",), SAME),
    Entry("mixer.conv1d.weight", ("mixer/conv/weight",), CONV),
    Entry("mixer.conv1d.bias", ("mixer/conv/bias",), SAME),
    Entry("mixer.A_log", ("mixer/A_log",), SAME, keeps_fp32=True),
    Entry("mixer.D", ("mixer/D",), SAME, keeps_fp32=True),
    Entry("mixer.out_proj.weight", ("mixer/out_proj/kernel",), LINEAR),
)
SOFTMAX = tuple(entry._replace(theirs=entry.theirs.replace("attn.", "mixer.")) for entry in ATTENTION)
SAMBA_BLOCK = (
    Entry("mixer_norm.weight", ("mixer_norm/weight",), SAME),
    Entry("mlp_norm.weight", ("mlp_norm/weight",), SAME),
    *MLP,
)
# Starts of training and the residual's type in half precision: no parameter of a trained model depends on them.
STARTS = (
    "rescale_prenorm_residual", "residual_in_fp32", "dt_scale", "dt_min", "dt_max", "dt_init_scheme", "dt_init_floor",
    "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor",
)  # fmt: skip


def _read_mixer(config: Reader) -> tuple[dict[str, Any], MambaConfig]:
    config.ignore(*STARTS)
    config.require("hidden_act", "silu", "swish")
    config.require("use_bias", False)
    config.require("use_conv_bias", True)
    config.require("attnres_block_size")
    d_model = config.get("hidden_size", int)
    inner = int(config.get("expand", float, 2.0) * d_model)
    config.require("intermediate_size", inner)  # of the mixer, by fla's name
    rank = config.optional("dt_rank", int, "auto") or config.optional("time_step_rank", int, "auto")
    mixer = MambaConfig(
        inner=inner,
        dt_rank=math.ceil(d_model / 16) if rank in (None, "auto") else rank,
        state=config.get("state_size", int, 16),
        conv_width=config.get("conv_kernel", int, 4),
    )
    common = {
        "d_model": d_model,
        "vocab": config.get("vocab_size", int),
        "tied": config.get("tie_word_embeddings", bool, False),
        "norm_eps": config.get("norm_eps", float, 1e-5),
        "init": "fla",
    }
    return common, mixer


def _write_mixer(cfg: Model) -> Config:
    mixer = cfg.mamba
    expand = mixer.inner / cfg.d_model
    if int(expand * cfg.d_model) != mixer.inner:
        raise UserError(
            f"model.mamba.inner is {mixer.inner} and model.d_model {cfg.d_model}; their ratio, which the FLA format "
            "stores, does not give inner back, so this model cannot be exported."
        )
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.layers,
        "intermediate_size": mixer.inner,
        "expand": int(expand) if expand == int(expand) else expand,
        "state_size": mixer.state,
        "conv_kernel": mixer.conv_width,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "norm_eps": cfg.norm_eps,
        "residual_in_fp32": True,
    }


def read_mamba(config: Reader) -> Model:
    common, mixer = _read_mixer(config)
    pattern, repeats, _ = read_pattern(config, "mamba", common["d_model"], softmax=False)
    return Model(pattern=pattern, repeats=repeats, d_ff=0, mamba=mixer, **common)


def write_mamba(cfg: Model) -> Config:
    return _write_mixer(cfg) | {"dt_rank": cfg.mamba.dt_rank}


def read_samba(config: Reader) -> Model:
    common, mixer = _read_mixer(config)
    pattern, repeats, attention = read_pattern(config, "mamba", common["d_model"])
    width = mlp_width(common["d_model"], config.get("hidden_ratio", int, 4))
    return Model(pattern=pattern, repeats=repeats, d_ff=width, mamba=mixer, attention=attention, **common)


def write_samba(cfg: Model) -> Config:
    ratio = next((ratio for ratio in range(1, 65) if mlp_width(cfg.d_model, ratio) == cfg.d_ff), None)
    if ratio is None:
        raise UserError(
            f"model.d_ff is {cfg.d_ff}; FLA's samba has MLPs of two thirds of a whole multiple of model.d_model "
            f"{cfg.d_model}, up to a multiple of 256, so this model cannot be exported."
        )
    own = {"time_step_rank": cfg.mamba.dt_rank, "hidden_ratio": ratio, "attn": write_attn(cfg)}
    return _write_mixer(cfg) | own


MAMBA = Architecture(
    backbone_layout("mamba", (Entry("norm.weight", ("mixer_norm/weight",), SAME),), {"mamba": TABLE}),
    read_mamba,
    write_mamba,
    "MambaForCausalLM",
)
SAMBA = Architecture(
    backbone_layout("samba", SAMBA_BLOCK, {"mamba": TABLE, "attention": SOFTMAX, "swa": SOFTMAX}),
    read_samba,
    write_samba,
    "SambaForCausalLM",
)
