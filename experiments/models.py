"""The language models at every scale: MODELS[name][scale] is a config.Model.

Two families: "lit" follows the authors' released code (tied embedding, uniform initialisation), "fla" the
flash-linear-attention library (untied, N(0, 0.02^2), d 1024 or 2048). A plain name is what the tables mean: lit, but
for retnet, hgrn2 and deltanet at 1.3b, whose only published configurations are fla's. A suffix names a variant: -fla,
-lit (those three at the released width), -nomlp.

tiny          two or three blocks on bytes, seconds on a CPU
desk          about 38M parameters on bytes, minutes on one GPU; all models within 5% of each other
400m          the size of the paper's ablations, f 6144 (fla: the 340M configurations of its training recipes)
400m-matched  f 4096, all models within 3% of 417M parameters
1.3b          the size of the paper's tables
"""

from gdn_jax.config import AttentionConfig, DeltaNetConfig, GatedDeltaNetConfig, Model
from gdn_jax.errors import UserError, nearest

BYTE_VOCAB = 320  # 257 byte tokens, rounded up to a multiple of 64
SWA_WINDOW = 2048


def gated_deltanet() -> dict[str, Model]:
    """Gated DeltaNet (paper section 3.4), released configurations at 400m and 1.3b."""

    def model(layers: int, d_model: int, d_ff: int, heads: int = 9, vocab: int = 32000) -> Model:
        mixer = lit_gated_deltanet(d_model, heads)
        return Model(
            pattern=("gated_deltanet",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, gated_deltanet=mixer
        )

    return {
        "tiny": model(2, 128, 384, heads=3, vocab=BYTE_VOCAB),
        "desk": model(8, 512, 2048, heads=3, vocab=BYTE_VOCAB),
        "400m": model(11, 1536, 6144),
        "400m-matched": model(11, 1536, 4096),
        "1.3b": model(16, 2400, 5888),
    }


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
    }


def deltanet(*, fla: bool) -> dict[str, Model]:
    """DeltaNet: key and value width d over heads of 128."""

    def model(layers: int, d_model: int, d_ff: int, heads: int, fla: bool = False, vocab: int = 32000) -> Model:
        mixer = DeltaNetConfig(heads=heads, key_dim=d_model // heads, value_dim=d_model // heads)
        return Model(
            pattern=("deltanet",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, tied=not fla,
            norm_eps=1e-6 if fla else 1e-5, init="fla" if fla else "lit", deltanet=mixer,
        )  # fmt: skip

    if fla:
        return {"400m": model(24, 1024, 2816, 8, fla=True)}
    return {
        "tiny": model(2, 128, 384, 4, vocab=BYTE_VOCAB),
        "desk": model(9, 512, 2048, 4, vocab=BYTE_VOCAB),
        "400m": model(12, 1536, 6144, 12),
        "400m-matched": model(13, 1536, 4096, 12),
        "1.3b": model(24, 2048, 5632, 16, fla=True),
    }


def transformer() -> dict[str, Model]:
    """Transformer++: full softmax attention with RoPE, SwiGLU, RMSNorm."""

    def model(layers: int, d_model: int, d_ff: int, heads: int, vocab: int = 32000) -> Model:
        mixer = AttentionConfig(heads=heads, head_dim=d_model // heads)
        return Model(pattern=("attention",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, attention=mixer)

    return {
        "tiny": model(2, 128, 384, 4, vocab=BYTE_VOCAB),
        "desk": model(9, 512, 2048, 4, vocab=BYTE_VOCAB),
        "400m": model(12, 1536, 6144, 12),
        "400m-matched": model(13, 1536, 4096, 12),
        "1.3b": model(20, 2304, 6144, 18),
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


def gated_deltanet_h1() -> dict[str, Model]:
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
            gated_deltanet=lit_gated_deltanet(d_model, delta_heads),
            attention=AttentionConfig(heads=heads, head_dim=d_model // heads, window=window),
        )  # fmt: skip

    return {
        "tiny": model(1, 128, 384, 4, delta_heads=3, vocab=BYTE_VOCAB, window=64),
        "desk": model(4, 512, 2176, 4, delta_heads=3, vocab=BYTE_VOCAB, window=512),
        "400m": model(6, 1536, 6144, 12),
        "400m-matched": model(6, 1536, 4096, 12),
        "1.3b": model(9, 2304, 6144, 18),
    }


def lit_gated_deltanet(d_model: int, heads: int) -> GatedDeltaNetConfig:
    """Key width 0.75 d and value width 1.5 d over the heads: 6 d^2 parameters, as released."""
    return GatedDeltaNetConfig(heads=heads, key_dim=3 * d_model // (4 * heads), value_dim=3 * d_model // (2 * heads))


MODELS: dict[str, dict[str, Model]] = {
    "gated-deltanet": gated_deltanet(),
    "gated-deltanet-fla": gated_deltanet_fla(),
    "deltanet": deltanet(fla=False),
    "deltanet-fla": deltanet(fla=True),
    "transformer": transformer(),
    "transformer-fla": transformer_fla(),
    "gated-deltanet-h1": gated_deltanet_h1(),
}


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
