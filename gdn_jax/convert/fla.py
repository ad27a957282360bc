"""flash-linear-attention's checkpoints (fla 0.6): tables of keys, and config.json to and from `Model`.

An architecture is its table, the reading of its config.json, and the writing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gdn_jax.config import AttentionConfig, GatedDeltaNetConfig, Model
from gdn_jax.convert.tables import CONV, LINEAR, SAME, Entry, Layout
from gdn_jax.errors import UserError

Config = dict[str, Any]

# --- tables ---

FRAME = (
    Entry("model.embeddings.weight", ("embed",), SAME),
    Entry("model.norm.weight", ("norm/weight",), SAME),
    Entry("lm_head.weight", ("head/kernel",), LINEAR),
)
BLOCK = (
    Entry("attn_norm.weight", ("mixer_norm/weight",), SAME),
    Entry("mlp_norm.weight", ("mlp_norm/weight",), SAME),
    Entry("mlp.gate_proj.weight", ("mlp/gate_proj/kernel",), LINEAR),
    Entry("mlp.up_proj.weight", ("mlp/up_proj/kernel",), LINEAR),
    Entry("mlp.down_proj.weight", ("mlp/down_proj/kernel",), LINEAR),
)
ATTENTION = tuple(
    Entry(f"attn.{name}.weight", (f"mixer/{name}/kernel",), LINEAR) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
)
GATED_DELTANET = (
    *(
        Entry(f"attn.{name}.weight", (f"mixer/{name}/kernel",), LINEAR)
        for name in ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj")
    ),
    *(Entry(f"attn.{name}_conv1d.weight", (f"mixer/{name}_conv/weight",), CONV) for name in "qkv"),
    Entry("attn.A_log", ("mixer/A_log",), SAME, keeps_fp32=True),
    Entry("attn.dt_bias", ("mixer/dt_bias",), SAME, keeps_fp32=True),
    Entry("attn.o_norm.weight", ("mixer/o_norm/weight",), SAME),
)
HYBRID = {"attention": ATTENTION, "swa": ATTENTION}  # softmax layers among those of any architecture


def _layout(name: str, mixers: dict[str, tuple[Entry, ...]], unused: tuple[str, ...] = ()) -> Layout:
    return Layout(f"FLA {name}", "model.layers.{layer}.", FRAME, BLOCK, mixers, unused)


# --- configuration ---

# Of these no parameter and no forward pass depends.
NEUTRAL = {
    "_name_or_path", "architectures", "attn_mode", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "hidden_ratio",
    "id2label", "initializer_range", "label2id", "max_position_embeddings", "model_type", "pad_token_id", "return_dict",
    "torch_dtype", "transformers_version", "use_cache", "use_l2warp",
}  # fmt: skip


class Reader:
    """config.json read key by key; what nobody read, and is not neutral or off, is refused."""

    def __init__(self, tree: Config, where: str):
        self._tree, self.where, self._read = tree, where, set(NEUTRAL)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The key's value, or `default` where it is missing or null; a missing key without default is refused."""
        self._read.add(key)
        value = self._tree.get(key)
        if value is None:
            if default is None:
                raise UserError(f"{self.where} lacks {key!r}; restore the file from where the checkpoint came from.")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where} has {key} = {value!r}; it must be of type {kind.__name__}.")
        return value

    def optional(self, key: str, kind: type) -> Any:
        """The key's value, or None."""
        self._read.add(key)
        return None if self._tree.get(key) is None else self.get(key, kind)

    def require(self, key: str, *values: Any) -> None:
        """The key is missing, null or one of `values`: the only ones whose mathematics is built here."""
        self._read.add(key)
        found = self._tree.get(key)
        if found is not None and found not in values:
            raise UserError(
                f"{self.where} has {key} = {found!r}, which is not built here; only {' or '.join(map(repr, values))} "
                "can be imported."
            )

    def finish(self) -> None:
        unread = [key for key, value in self._tree.items() if key not in self._read and value not in (None, False)]
        if unread:
            known = ", ".join(f"{key} = {self._tree[key]!r}" for key in sorted(unread)[:4])
            raise UserError(
                f"{self.where} has {known}, which this importer does not know; delete such a key only if the model's "
                "outputs do not depend on it."
            )

    def below(self, key: str) -> "Reader":
        """A reader of a nested object."""
        return Reader(self.get(key, dict), f"{self.where}, {key}")


def _common(config: Reader) -> dict[str, Any]:
    """The fields that every architecture shares."""
    config.require("hidden_act", "swish", "silu")
    config.require("attnres_block_size")
    d_model = config.get("hidden_size", int)
    ratio = config.optional("hidden_ratio", int) or 4
    rounded = 256 * -(-int(d_model * ratio * 2 / 3) // 256)  # fla's width where none is given
    return {
        "d_model": d_model,
        "d_ff": config.get("intermediate_size", int, rounded),
        "vocab": config.get("vocab_size", int),
        "tied": config.get("tie_word_embeddings", bool, False),
        "norm_eps": config.get("norm_eps", float, 1e-6),
        "init": "fla",
    }


def _attention(config: Reader, d_model: int) -> tuple[str, AttentionConfig]:
    """(mixer, its configuration) of softmax layers."""
    heads = config.get("num_heads", int)
    config.require("num_kv_heads", heads)
    config.require("qkv_bias", False)
    config.require("qk_norm", False)
    window = config.optional("window_size", int)
    base = config.get("rope_theta", float, 10000.0)
    if heads < 1 or d_model % heads:
        raise UserError(f"{config.where} has num_heads = {heads}; it must divide hidden_size {d_model}.")
    attention = AttentionConfig(heads=heads, head_dim=d_model // heads, rope_base=base)
    if window is None:
        return "attention", attention
    return "swa", AttentionConfig(heads=heads, head_dim=d_model // heads, rope_base=base, window=window)


def _pattern(config: Reader, own: str, d_model: int) -> tuple[tuple[str, ...], int, AttentionConfig | None]:
    """(pattern, repeats, attention) of an architecture whose `attn` may put softmax layers among its own."""
    layers = config.get("num_hidden_layers", int)
    if layers < 1:
        raise UserError(f"{config.where} has num_hidden_layers = {layers}; it must be positive.")
    if config.optional("attn", dict) is None:
        return (own,), layers, None
    below = config.below("attn")
    chosen = below.get("layers", list)
    mixer, attention = _attention(below, d_model)
    below.finish()
    mixers = tuple(mixer if layer in chosen else own for layer in range(layers))
    period = next(n for n in range(1, layers + 1) if layers % n == 0 and mixers == mixers[:n] * (layers // n))
    return mixers[:period], layers // period, attention


def _read_gated_deltanet(config: Reader) -> Model:
    common = _common(config)
    config.require("output_gate_activation", "swish", "silu")
    config.require("conv_bias", False)
    key_dim = config.get("head_dim", int, 256)
    heads = config.get("num_heads", int, 6)
    expand = config.get("expand_v", float, 2.0)
    value_dim = round(key_dim * expand)
    if not math.isclose(key_dim * expand, value_dim, rel_tol=1e-5):
        raise UserError(f"{config.where} has expand_v = {expand}; times head_dim {key_dim} it must be a whole number.")
    width = config.get("conv_size", int, 4)
    pattern, repeats, attention = _pattern(config, "gated_deltanet", common["d_model"])
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


def _write_gated_deltanet(cfg: Model) -> Config:
    mixer = cfg.gated_deltanet
    if mixer.beta_bias:
        raise UserError(
            "model.gated_deltanet.beta_bias is True, and the FLA format has no bias of beta; export with --format lit, "
            "or train a model of the -fla family."
        )
    _built_there("gated_deltanet", mixer, decay=True, output_norm=True, feature_map="silu", qk_norm="l2")
    expand = mixer.value_dim / mixer.key_dim
    if int(mixer.key_dim * expand) != mixer.value_dim:  # as fla computes it
        raise UserError(
            f"model.gated_deltanet.value_dim is {mixer.value_dim} and key_dim {mixer.key_dim}; their ratio, which the "
            "FLA format stores, does not give value_dim back, so this model cannot be exported."
        )
    return {
        "attn_mode": "chunk",
        "num_heads": mixer.heads,
        "num_v_heads": mixer.value_heads,
        "head_dim": mixer.key_dim,
        "expand_v": expand,
        "use_gate": mixer.output_gate,
        "use_short_conv": mixer.conv_width > 0,
        "conv_size": mixer.conv_width or 4,
        "allow_neg_eigval": mixer.negative_eigenvalues,
        "attn": _hybrid(cfg),
    }


def _read_transformer(config: Reader) -> Model:
    common = _common(config)
    config.require("elementwise_affine", True)
    mixer, attention = _attention(config, common["d_model"])
    return Model(pattern=(mixer,), repeats=config.get("num_hidden_layers", int), attention=attention, **common)


def _write_transformer(cfg: Model) -> Config:
    if len(set(cfg.pattern)) > 1:
        raise UserError(
            f"model.pattern is {' '.join(cfg.pattern)}; the FLA transformer has one kind of layer, so such a model "
            "cannot be exported."
        )
    attention = cfg.attention
    return {
        "num_heads": attention.heads,
        "num_kv_heads": None,
        "window_size": attention.window if cfg.pattern[0] == "swa" else None,
        "rope_theta": attention.rope_base,
    }


def _hybrid(cfg: Model) -> Config | None:
    """The `attn` object of config.json: the softmax layers among an architecture's own."""
    mixers = cfg.pattern * cfg.repeats
    softmax = {mixer for mixer in mixers if mixer in HYBRID}
    if not softmax:
        return None
    if len(softmax) > 1:
        raise UserError("model.pattern has both 'attention' and 'swa'; the FLA format holds one of the two.")
    attention = cfg.attention
    return {
        "layers": [layer for layer, mixer in enumerate(mixers) if mixer in HYBRID],
        "num_heads": attention.heads,
        "num_kv_heads": attention.heads,
        "qkv_bias": False,
        "window_size": attention.window if softmax == {"swa"} else None,
        "rope_theta": attention.rope_base,
    }


def _built_there(where: str, mixer: Any, **only: Any) -> None:
    """Switches of ours that change the mathematics without changing a tensor's name."""
    for name, value in only.items():
        if getattr(mixer, name) != value:
            raise UserError(
                f"model.{where}.{name} is {getattr(mixer, name)!r}; the FLA format knows {value!r} only, so this model "
                "cannot be exported."
            )


class Architecture(NamedTuple):
    """One architecture of FLA's."""

    layout: Layout
    read: Callable[[Reader], Model]
    write: Callable[[Model], Config]  # its own keys; `write_config` adds the common ones
    model_class: str


# model_type of config.json -> architecture
ARCHITECTURES = {
    "gated_deltanet": Architecture(
        _layout("gated_deltanet", {"gated_deltanet": GATED_DELTANET, **HYBRID}, unused=("attn.D",)),
        _read_gated_deltanet,
        _write_gated_deltanet,
        "GatedDeltaNetForCausalLM",
    ),
    "transformer": Architecture(
        _layout("transformer", HYBRID), _read_transformer, _write_transformer, "TransformerForCausalLM"
    ),
}


def read_config(tree: Any, where: str) -> tuple[Architecture, Model]:
    """(architecture, model) of a config.json, or a UserError that names the key."""
    model_type = tree.get("model_type") if isinstance(tree, dict) else None
    if model_type not in ARCHITECTURES:
        raise UserError(f"{where} has model_type {model_type!r}; there are tables for {', '.join(ARCHITECTURES)} only.")
    architecture = ARCHITECTURES[model_type]
    reader = Reader(tree, where)
    cfg = architecture.read(reader)
    reader.finish()
    return architecture, cfg


def write_config(cfg: Model, *, dtype: str, eos: int) -> tuple[Architecture, Config]:
    """(architecture, config.json) of a model, or a UserError that names what the format cannot say."""
    own = [mixer for mixer in dict.fromkeys(cfg.pattern) if mixer not in HYBRID] or ["transformer"]
    if len(own) > 1 or own[0] not in ARCHITECTURES:
        raise UserError(
            f"model.pattern is {' '.join(cfg.pattern)}; the FLA format has no such model, it has "
            f"{', '.join(ARCHITECTURES)}, with softmax layers among them."
        )
    if not cfg.d_ff:
        raise UserError("model.d_ff is 0; the FLA format has an MLP in every layer of this architecture.")
    architecture = ARCHITECTURES[own[0]]
    return architecture, {
        "model_type": own[0],
        "architectures": [architecture.model_class],
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.layers,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "swish",
        "norm_eps": cfg.norm_eps,
        "vocab_size": cfg.vocab,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "use_cache": True,
        **architecture.write(cfg),
    }
