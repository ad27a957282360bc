"""What the architectures share: an architecture's parts, the common tables, and config.json read strictly."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gdn_jax.config import AttentionConfig, Model
from gdn_jax.convert.tables import LINEAR, SAME, Entry, Layout
from gdn_jax.errors import UserError

Config = dict[str, Any]


FRAME = (
    Entry("model.embeddings.weight", ("embed",), SAME),
    Entry("model.norm.weight", ("norm/weight",), SAME),
    Entry("lm_head.weight", ("head/kernel",), LINEAR),
)
MLP = tuple(
    Entry(f"mlp.{name}.weight", (f"mlp/{name}/kernel",), LINEAR) for name in ("gate_proj", "up_proj", "down_proj")
)
BLOCK = (
    Entry("attn_norm.weight", ("mixer_norm/weight",), SAME),
    Entry("mlp_norm.weight", ("mlp_norm/weight",), SAME),
    *MLP,
)
ATTENTION = tuple(  # below "attn.", as every mixer there
    Entry(f"attn.{name}.weight", (f"mixer/{name}/kernel",), LINEAR) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
)
HYBRID = {"attention": ATTENTION, "swa": ATTENTION}  # softmax layers among those of any architecture


def layout(
    name: str, mixers: dict[str, tuple[Entry, ...]], frame: tuple[Entry, ...] = (), unused: tuple[str, ...] = ()
) -> Layout:
    """The table of an architecture with keys below `model.`; `frame` adds to those outside the layers."""
    return Layout(f"FLA {name}", "model.layers.{layer}.", FRAME + frame, BLOCK, mixers, unused)


def backbone_layout(name: str, block: tuple[Entry, ...], mixers: dict[str, tuple[Entry, ...]]) -> Layout:
    """The table of an architecture with keys below `backbone.`, as Mamba's first program named them."""
    frame = (
        Entry("backbone.embeddings.weight", ("embed",), SAME),
        Entry("backbone.norm_f.weight", ("norm/weight",), SAME),
        Entry("lm_head.weight", ("head/kernel",), LINEAR),
    )
    return Layout(f"FLA {name}", "backbone.layers.{layer}.", frame, block, mixers)


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

    def optional(self, key: str, kind: type, *words: str) -> Any:
        """The key's value, of the kind or one of the words, or None."""
        self._read.add(key)
        value = self._tree.get(key)
        return value if value is None or value in words else self.get(key, kind)

    def ignore(self, *keys: str) -> None:
        """Keys of which no output of the model depends."""
        self._read |= set(keys)

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


def read_common(config: Reader, ratio: int = 4) -> dict[str, Any]:
    """The fields that every architecture shares."""
    config.require("hidden_act", "swish", "silu")
    config.require("attnres_block_size")
    d_model = config.get("hidden_size", int)
    return {
        "d_model": d_model,
        "d_ff": config.get("intermediate_size", int, mlp_width(d_model, config.get("hidden_ratio", int, ratio))),
        "vocab": config.get("vocab_size", int),
        "tied": config.get("tie_word_embeddings", bool, False),
        "norm_eps": config.get("norm_eps", float, 1e-6),
        "init": "fla",
    }


def mlp_width(d_model: int, ratio: int) -> int:
    """The inner width of an MLP where config.json names none: two thirds of ratio d_model, up to a multiple of 256."""
    return 256 * -(-int(d_model * ratio * 2 / 3) // 256)


def read_attention(config: Reader, d_model: int) -> tuple[str, AttentionConfig]:
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


def read_pattern(
    config: Reader, own: str, d_model: int, *, softmax: bool = True
) -> tuple[tuple[str, ...], int, AttentionConfig | None]:
    """(pattern, repeats, attention) of an architecture whose `attn` may put softmax layers among its own."""
    layers = config.get("num_hidden_layers", int)
    if layers < 1:
        raise UserError(f"{config.where} has num_hidden_layers = {layers}; it must be positive.")
    if not softmax or config.optional("attn", dict) is None:
        return (own,), layers, None
    below = config.below("attn")
    chosen = below.get("layers", list)
    mixer, attention = read_attention(below, d_model)
    below.finish()
    mixers = tuple(mixer if layer in chosen else own for layer in range(layers))
    period = next(n for n in range(1, layers + 1) if layers % n == 0 and mixers == mixers[:n] * (layers // n))
    return mixers[:period], layers // period, attention


def write_attn(cfg: Model) -> Config | None:
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


def require_built_there(where: str, mixer: Any, **only: Any) -> None:
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
    write: Callable[[Model], Config]  # all keys but those of `fla.write_config`
    model_class: str


def write_common(cfg: Model) -> Config:
    """The keys that `read_common` reads, and the number of layers."""
    if not cfg.d_ff:
        raise UserError("model.d_ff is 0; the FLA format has an MLP in every layer of this architecture.")
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.layers,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "swish",
        "norm_eps": cfg.norm_eps,
    }


def head_dim(config: Reader, key: str, default: float, heads: int, d_model: int) -> int:
    """Width of a head where config.json has the total as a multiple of hidden_size."""
    expand = config.get(key, float, default)
    total = round(d_model * expand)
    if heads < 1 or total < 1 or not math.isclose(total, d_model * expand) or total % heads:
        raise UserError(
            f"{config.where} has {key} = {expand} and num_heads = {heads}; {key} x hidden_size {d_model} must be a "
            "multiple of num_heads."
        )
    return total // heads


def write_expansion(total: int, cfg: Model) -> float:
    """`total` as a multiple of hidden_size, which `head_dim` takes back."""
    return total / cfg.d_model
