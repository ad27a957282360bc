"""flash-linear-attention's checkpoints (fla 0.6): one module an architecture, its table and its config.json.

To add one: a module with an ARCHITECTURE, and its line below.
"""

from typing import Any

from gdn_jax.config import Model
from gdn_jax.convert.fla import delta_net, gated_deltanet, hgrn2, mamba, mamba2, retnet, transformer
from gdn_jax.convert.fla.common import HYBRID, Architecture, Config, Reader
from gdn_jax.errors import UserError

# model_type of config.json -> architecture
ARCHITECTURES = {
    "gated_deltanet": gated_deltanet.ARCHITECTURE,
    "delta_net": delta_net.ARCHITECTURE,
    "retnet": retnet.ARCHITECTURE,
    "hgrn2": hgrn2.ARCHITECTURE,
    "mamba": mamba.MAMBA,
    "mamba2": mamba2.ARCHITECTURE,
    "samba": mamba.SAMBA,
    "transformer": transformer.ARCHITECTURE,
}
# what a model's mixers other than softmax attention are called there; attention alone is a transformer
MODEL_TYPES = {
    (): "transformer",
    ("gated_deltanet",): "gated_deltanet",
    ("deltanet",): "delta_net",
    ("retnet",): "retnet",
    ("hgrn2",): "hgrn2",
    ("mamba",): "mamba",  # or samba, which has MLPs
    ("mamba2",): "mamba2",
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
    mixers = tuple(dict.fromkeys(mixer for mixer in cfg.pattern if mixer not in HYBRID))
    if mixers not in MODEL_TYPES:
        raise UserError(
            f"model.pattern is {' '.join(cfg.pattern)}; the FLA format has no such model, it has "
            f"{', '.join(ARCHITECTURES)}."
        )
    model_type = "samba" if mixers == ("mamba",) and cfg.d_ff else MODEL_TYPES[mixers]
    architecture = ARCHITECTURES[model_type]
    return architecture, {
        "model_type": model_type,
        "architectures": [architecture.model_class],
        "vocab_size": cfg.vocab,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "use_cache": True,
        **architecture.write(cfg),
    }
