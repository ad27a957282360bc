"""The language models as functions of scale: MODELS[name](scale) -> config.Model.

Two families: "lit" follows the authors' released code (tied embedding, uniform initialisation; key width 0.75
d, value width 1.5 d over 9 heads), "fla" (suffix -fla) the flash-linear-attention library (untied, N(0,
0.02^2), d 1024 or 2048).

tiny          two blocks on bytes, seconds on a CPU
desk          about 38M parameters on bytes, minutes on one GPU
400m          the size of the paper's ablations, f 6144
400m-matched  f 4096, all models within 3% of 417M parameters
1.3b          the size of the paper's tables
"""

from collections.abc import Callable

from gdn_jax.config import AttentionConfig, GatedDeltaNetConfig, Model
from gdn_jax.errors import UserError, nearest

BYTE_VOCAB = 320  # 257 byte tokens, rounded up to a multiple of 64
SWA_WINDOW = 2048
SCALES = ("tiny", "desk", "400m", "400m-matched", "1.3b")


def gated_deltanet(scale: str) -> Model:
    """Gated DeltaNet (paper section 3.4), released configurations at 400m and 1.3b."""

    def model(layers: int, d_model: int, d_ff: int, heads: int = 9, vocab: int = 32000) -> Model:
        mixer = _lit_gated_deltanet(d_model, heads)
        return Model(
            pattern=("gated_deltanet",),
            repeats=layers,
            d_model=d_model,
            d_ff=d_ff,
            vocab=vocab,
            gated_deltanet=mixer,
        )

    return {
        "tiny": lambda: model(2, 128, 384, heads=3, vocab=BYTE_VOCAB),
        "desk": lambda: model(8, 512, 2048, heads=3, vocab=BYTE_VOCAB),
        "400m": lambda: model(11, 1536, 6144),
        "400m-matched": lambda: model(11, 1536, 4096),
        "1.3b": lambda: model(16, 2400, 5888),
    }[scale]()


def gated_deltanet_fla(scale: str) -> Model:
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
        "tiny": lambda: model(2, 128, 384, 3, 32, 64, vocab=BYTE_VOCAB),
        "desk": lambda: model(8, 512, 2048, 3, 128, 256, vocab=BYTE_VOCAB),
        "400m": lambda: model(21, 1024, 2816, 6, 256, 512),
        "1.3b": lambda: model(21, 2048, 5632, 6, 256, 512),
    }[scale]()


def transformer(scale: str) -> Model:
    """Transformer++: full softmax attention with RoPE, SwiGLU, RMSNorm."""

    def model(layers: int, d_model: int, d_ff: int, heads: int, vocab: int = 32000) -> Model:
        mixer = AttentionConfig(heads=heads, head_dim=d_model // heads)
        return Model(pattern=("attention",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, attention=mixer)

    return {
        "tiny": lambda: model(2, 128, 384, 4, vocab=BYTE_VOCAB),
        "desk": lambda: model(9, 512, 2048, 4, vocab=BYTE_VOCAB),
        "400m": lambda: model(12, 1536, 6144, 12),
        "400m-matched": lambda: model(13, 1536, 4096, 12),
        "1.3b": lambda: model(20, 2304, 6144, 18),
    }[scale]()


def gated_deltanet_h1(scale: str) -> Model:
    """Gated DeltaNet-H1: Gated DeltaNet and sliding-window attention in turn."""

    def model(
        repeats: int,
        d_model: int,
        d_ff: int,
        heads: int,
        delta_heads: int = 9,
        vocab: int = 32000,
        window: int = SWA_WINDOW,
    ) -> Model:
        return Model(
            pattern=("gated_deltanet", "swa"), repeats=repeats, d_model=d_model, d_ff=d_ff, vocab=vocab,
            gated_deltanet=_lit_gated_deltanet(d_model, delta_heads),
            attention=AttentionConfig(heads=heads, head_dim=d_model // heads, window=window),
        )  # fmt: skip

    return {
        "tiny": lambda: model(1, 128, 384, 4, delta_heads=3, vocab=BYTE_VOCAB, window=64),
        "desk": lambda: model(4, 512, 2048, 4, delta_heads=3, vocab=BYTE_VOCAB, window=512),
        "400m": lambda: model(6, 1536, 6144, 12),
        "400m-matched": lambda: model(6, 1536, 4096, 12),
        "1.3b": lambda: model(9, 2304, 6144, 18),
    }[scale]()


def _lit_gated_deltanet(d_model: int, heads: int) -> GatedDeltaNetConfig:
    """Key width 0.75 d and value width 1.5 d over the heads: 6 d^2 parameters, as released."""
    return GatedDeltaNetConfig(heads=heads, key_dim=3 * d_model // (4 * heads), value_dim=3 * d_model // (2 * heads))


MODELS: dict[str, Callable[[str], Model]] = {
    "gated-deltanet": gated_deltanet,
    "gated-deltanet-fla": gated_deltanet_fla,
    "transformer": transformer,
    "gated-deltanet-h1": gated_deltanet_h1,
}


def scales_of(name: str) -> tuple[str, ...]:
    """The scales a model exists at, smallest first."""
    return tuple(scale for scale in SCALES if not (name.endswith("-fla") and scale == "400m-matched"))


def model_config(name: str, scale: str) -> Model:
    """MODELS[name](scale), or a UserError that names what there is."""
    if name not in MODELS:
        raise UserError(f"There is no model {name!r}{nearest(name, MODELS)}; there are {', '.join(MODELS)}.")
    if scale not in scales_of(name):
        known = ", ".join(scales_of(name))
        raise UserError(f"There is no scale {scale!r} of {name}{nearest(scale, scales_of(name))}; there are {known}.")
    return MODELS[name](scale)
