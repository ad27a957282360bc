"""Variants of the ten models, and MODELS: all of them by name.

-fla      flash-linear-attention's configurations where the plain name means another: untied, N(0, 0.02^2)
-lit      retnet, hgrn2 and deltanet at the released family's 1.3b width, d 2304 and tied
-nomlp    mamba and mamba2 as stacks of mixers alone, their own authors' shape
-map      the public checkpoint m-a-p/1.3B-100B-GatedDeltaNet-pure
-upload   the depth of the paper's authors' own Mamba2 upload, one block more than mamba2 at 1.3b
-untied   Samba's LLaMA_438M: f 4096, untied, normal initialisation scaled by width and depth
"""

from experiments.models import (
    BYTE_VOCAB,
    PAPER_MODELS,
    deltanet_model,
    hgrn2_model,
    mamba2_model,
    mamba_model,
    retnet_model,
    samba_model,
)
from gdn_jax.config import AttentionConfig, GatedDeltaNetConfig, Model
from gdn_jax.errors import UserError, nearest


def gated_deltanet_fla() -> dict[str, Model]:
    """Gated DeltaNet as flash-linear-attention configures it: head dims 256/512, no bias on beta, untied."""

    def model(
        layers: int, d_model: int, d_ff: int, heads: int, key_dim: int, value_dim: int, vocab: int = 32000
    ) -> Model:
        mixer = GatedDeltaNetConfig(heads=heads, key_dim=key_dim, value_dim=value_dim, beta_bias=False)
        return Model(
            pattern=("gated_deltanet",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, tied=False,
            norm_eps=1e-6, init="fla", gated_deltanet=mixer,
        )  # fmt: skip

    return {
        "tiny": model(2, 128, 384, 3, 32, 64, vocab=BYTE_VOCAB),
        "desk": model(8, 512, 2048, 3, 128, 256, vocab=BYTE_VOCAB),
        "400m": model(21, 1024, 2816, 6, 256, 512),
        "1.3b": model(21, 2048, 5632, 6, 256, 512),
        "map": model(24, 2048, 5632, 8, 256, 256),
    }


def transformer_fla() -> dict[str, Model]:
    """Transformer++ as flash-linear-attention configures it: heads of 64, untied."""

    def model(d_model: int, d_ff: int, heads: int) -> Model:
        mixer = AttentionConfig(heads=heads, head_dim=64)
        return Model(
            pattern=("attention",), repeats=24, d_model=d_model, d_ff=d_ff, tied=False, norm_eps=1e-6, init="fla",
            attention=mixer,
        )  # fmt: skip

    return {"400m": model(1024, 2816, 16), "1.3b": model(2048, 5632, 32)}


def transformer_untied() -> Model:
    """LLaMA_438M of the code that the released code grew from."""
    mixer = AttentionConfig(heads=12, head_dim=128)
    return Model(
        pattern=("attention",), repeats=12, d_model=1536, d_ff=4096, tied=False, init="lit-normal", attention=mixer
    )


VARIANTS: dict[str, dict[str, Model]] = {
    "gated-deltanet-fla": {scale: model for scale, model in gated_deltanet_fla().items() if scale != "map"},
    "gated-deltanet-map": {"1.3b": gated_deltanet_fla()["map"]},
    "deltanet-fla": {"400m": deltanet_model(24, 1024, 2816, 8, fla=True)},
    "deltanet-lit": {"1.3b": deltanet_model(20, 2304, 6144, 18)},
    "retnet-fla": {"400m": retnet_model(24, 1024, 1536, 4, fla=True)},
    "retnet-lit": {"1.3b": retnet_model(15, 2304, 6144, 9)},
    "hgrn2-fla": {"400m": hgrn2_model(24, 1024, 2816, 8, fla=True)},
    "hgrn2-lit": {"1.3b": hgrn2_model(20, 2304, 6144, 18)},
    "mamba-nomlp": {
        "tiny": mamba_model(4, 128, 0, vocab=BYTE_VOCAB),
        "400m": mamba_model(60, 1024, 0),
        "1.3b": mamba_model(48, 2048, 0),
    },
    "mamba-fla": {"400m": mamba_model(48, 1024, 0, tied=False), "1.3b": mamba_model(48, 2048, 0, tied=False)},
    "mamba2-nomlp": {
        "tiny": mamba2_model(4, 128, 0, vocab=BYTE_VOCAB, state=32),
        "400m": mamba2_model(48, 1024, 0),
        "1.3b": mamba2_model(48, 2048, 0),
    },
    "mamba2-fla": {"400m": mamba2_model(48, 1024, 0, tied=False), "1.3b": mamba2_model(48, 2048, 0, tied=False)},
    "mamba2-upload": {"1.3b": mamba2_model(18, 2304, 6144)},
    "samba-fla": {"1.3b": samba_model(9, 2304, 6144, 18, tied=False)},
    "transformer-fla": transformer_fla(),
    "transformer-untied": {"400m": transformer_untied()},
}

MODELS: dict[str, dict[str, Model]] = PAPER_MODELS | VARIANTS


def scales_of(name: str) -> tuple[str, ...]:
    """The scales a model exists at, smallest first."""
    return tuple(MODELS[name])


def model_config(name: str, scale: str) -> Model:
    """MODELS[name][scale], or a UserError that names what there is."""
    if name not in MODELS:
        raise UserError(f"There is no model {name!r}{nearest(name, MODELS)}; there are {', '.join(MODELS)}.")
    if scale not in scales_of(name):
        known = ", ".join(scales_of(name))
        raise UserError(f"There is no scale {scale!r} of {name}{nearest(scale, scales_of(name))}; there are {known}.")
    return MODELS[name][scale]
