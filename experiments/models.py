"""The language models at every scale: MODELS[name][scale] is a config.Model.

Two families: "lit" follows the authors' released code (tied embedding, uniform initialisation), "fla" the
flash-linear-attention library (untied, N(0, 0.02^2), d 1024 or 2048). A plain name is what the tables mean: lit, but
for retnet, hgrn2 and deltanet at 1.3b, whose only published configurations are fla's. A suffix names a variant
(variants.py): -fla, -lit (those three at the released width), -nomlp, -map, -upload, -untied.

tiny          two or three blocks on bytes, seconds on a CPU
desk          about 38M parameters on bytes, minutes on one GPU; all models within 5% of each other
400m          the size of the paper's ablations, f 6144 (fla: the 340M configurations of its training recipes)
400m-matched  f 4096, all models within 3% of 417M parameters
1.3b          the size of the paper's tables
"""

from gdn_jax.config import (
    AttentionConfig,
    DeltaNetConfig,
    GatedDeltaNetConfig,
    HGRN2Config,
    Mamba2Config,
    MambaConfig,
    Model,
    RetNetConfig,
)

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


def deltanet_model(layers: int, d_model: int, d_ff: int, heads: int, *, fla: bool = False, vocab: int = 32000) -> Model:
    """DeltaNet: key and value width d over the heads."""
    mixer = DeltaNetConfig(heads=heads, key_dim=d_model // heads, value_dim=d_model // heads)
    return Model(
        pattern=("deltanet",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, deltanet=mixer,
        tied=not fla, norm_eps=1e-6 if fla else 1e-5, init="fla" if fla else "lit",
    )  # fmt: skip


def deltanet() -> dict[str, Model]:
    """DeltaNet with heads of 128; 1.3b is fla's published configuration."""
    return {
        "tiny": deltanet_model(2, 128, 384, 4, vocab=BYTE_VOCAB),
        "desk": deltanet_model(9, 512, 2048, 4, vocab=BYTE_VOCAB),
        "400m": deltanet_model(12, 1536, 6144, 12),
        "400m-matched": deltanet_model(13, 1536, 4096, 12),
        "1.3b": deltanet_model(24, 2048, 5632, 16, fla=True),
    }


def retnet_model(layers: int, d_model: int, d_ff: int, heads: int, *, fla: bool = False, vocab: int = 32000) -> Model:
    """RetNet: key width d and value width 2 d over the heads, 8 d^2 parameters."""
    mixer = RetNetConfig(heads=heads, key_dim=d_model // heads, value_dim=2 * d_model // heads)
    return Model(
        pattern=("retnet",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, retnet=mixer,
        tied=not fla, norm_eps=1e-6 if fla else 1e-5, init="fla" if fla else "lit",
    )  # fmt: skip


def retnet() -> dict[str, Model]:
    """RetNet with head dims 256/512; 1.3b is fla's published configuration, whose MLP is half as wide."""
    return {
        "tiny": retnet_model(2, 128, 384, 4, vocab=BYTE_VOCAB),
        "desk": retnet_model(7, 512, 2112, 2, vocab=BYTE_VOCAB),
        "400m": retnet_model(10, 1536, 6144, 6),
        "400m-matched": retnet_model(10, 1536, 4096, 6),
        "1.3b": retnet_model(24, 2048, 2816, 8, fla=True),
    }


def hgrn2_model(layers: int, d_model: int, d_ff: int, heads: int, *, fla: bool = False, vocab: int = 32000) -> Model:
    """HGRN2: d key channels over the heads."""
    mixer = HGRN2Config(heads=heads, head_dim=d_model // heads)
    return Model(
        pattern=("hgrn2",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, hgrn2=mixer,
        tied=not fla, norm_eps=1e-6 if fla else 1e-5, init="fla" if fla else "lit",
    )  # fmt: skip


def hgrn2() -> dict[str, Model]:
    """HGRN2 with heads of 128; 1.3b is fla's published configuration."""
    return {
        "tiny": hgrn2_model(2, 128, 384, 4, vocab=BYTE_VOCAB),
        "desk": hgrn2_model(9, 512, 2048, 4, vocab=BYTE_VOCAB),
        "400m": hgrn2_model(12, 1536, 6144, 12),
        "400m-matched": hgrn2_model(13, 1536, 4096, 12),
        "1.3b": hgrn2_model(24, 2048, 5632, 16, fla=True),
    }


def mamba_model(layers: int, d_model: int, d_ff: int, *, tied: bool = True, vocab: int = 32000) -> Model:
    """Mamba; without an MLP where d_ff is 0."""
    return Model(
        pattern=("mamba",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab, mamba=lit_mamba(d_model),
        tied=tied, init="lit" if tied else "fla",
    )  # fmt: skip


def mamba() -> dict[str, Model]:
    """Mamba with an MLP after every mixer, as the authors' uploads of recurrent baselines have it."""
    return {
        "tiny": mamba_model(2, 128, 384, vocab=BYTE_VOCAB),
        "desk": mamba_model(8, 512, 2048, vocab=BYTE_VOCAB),
        "400m": mamba_model(11, 1536, 6144),
        "400m-matched": mamba_model(11, 1536, 4096),
        "1.3b": mamba_model(17, 2304, 6144),
    }


def mamba2_model(
    layers: int, d_model: int, d_ff: int, *, tied: bool = True, vocab: int = 32000, state: int = 128
) -> Model:
    """Mamba2; without an MLP where d_ff is 0."""
    return Model(
        pattern=("mamba2",), repeats=layers, d_model=d_model, d_ff=d_ff, vocab=vocab,
        mamba2=lit_mamba2(d_model, state), tied=tied, init="lit" if tied else "fla",
    )  # fmt: skip


def mamba2() -> dict[str, Model]:
    """Mamba2 with an MLP after every mixer, as the authors' uploads of recurrent baselines have it."""
    return {
        "tiny": mamba2_model(2, 128, 384, vocab=BYTE_VOCAB, state=32),
        "desk": mamba2_model(8, 512, 1984, vocab=BYTE_VOCAB),
        "400m": mamba2_model(11, 1536, 6144),
        "400m-matched": mamba2_model(11, 1536, 4096),
        "1.3b": mamba2_model(17, 2304, 6144),
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


def samba_model(
    repeats: int, d_model: int, d_ff: int, heads: int, *, tied: bool = True, vocab: int = 32000,
    window: int = SWA_WINDOW,
) -> Model:  # fmt: skip
    """Samba: Mamba and sliding-window attention in turn."""
    return Model(
        pattern=("mamba", "swa"), repeats=repeats, d_model=d_model, d_ff=d_ff, vocab=vocab, mamba=lit_mamba(d_model),
        attention=AttentionConfig(heads=heads, head_dim=d_model // heads, window=window),
        tied=tied, init="lit" if tied else "fla",
    )  # fmt: skip


def samba() -> dict[str, Model]:
    """Samba as its authors configure it at 400m-matched (Samba_421M) and 1.3b."""
    return {
        "tiny": samba_model(1, 128, 384, 4, vocab=BYTE_VOCAB, window=64),
        "desk": samba_model(4, 512, 2176, 4, vocab=BYTE_VOCAB, window=512),
        "400m": samba_model(6, 1536, 6144, 12),
        "400m-matched": samba_model(6, 1536, 4096, 12),
        "1.3b": samba_model(9, 2304, 6144, 18),
    }


H2_ORDER = ("mamba2", "gated_deltanet", "swa")  # the best of the four orders in the paper's Table S.2


def h2_model(
    repeats: int, d_model: int, d_ff: int, heads: int, *, order: tuple[str, ...] = H2_ORDER, delta_heads: int = 9,
    state: int = 128, vocab: int = 32000, window: int = SWA_WINDOW,
) -> Model:  # fmt: skip
    """A hybrid of Mamba2, Gated DeltaNet and sliding-window attention in any order."""
    return Model(
        pattern=order, repeats=repeats, d_model=d_model, d_ff=d_ff, vocab=vocab, mamba2=lit_mamba2(d_model, state),
        gated_deltanet=lit_gated_deltanet(d_model, delta_heads),
        attention=AttentionConfig(heads=heads, head_dim=d_model // heads, window=window),
    )  # fmt: skip


def gated_deltanet_h2() -> dict[str, Model]:
    """Gated DeltaNet-H2: Mamba2, Gated DeltaNet, sliding-window attention; depth and width follow H1 (unpublished)."""
    return {
        "tiny": h2_model(1, 128, 384, 4, delta_heads=3, state=32, vocab=BYTE_VOCAB, window=64),
        "desk": h2_model(3, 512, 1792, 4, delta_heads=3, vocab=BYTE_VOCAB, window=512),
        "400m": h2_model(4, 1536, 6144, 12),
        "400m-matched": h2_model(4, 1536, 4096, 12),
        "1.3b": h2_model(6, 2304, 6144, 18),
    }


def lit_gated_deltanet(d_model: int, heads: int) -> GatedDeltaNetConfig:
    """Key width 0.75 d and value width 1.5 d over the heads: 6 d^2 parameters, as released."""
    return GatedDeltaNetConfig(heads=heads, key_dim=3 * d_model // (4 * heads), value_dim=3 * d_model // (2 * heads))


def lit_mamba(d_model: int) -> MambaConfig:
    """2 d inner channels and a rank of d / 16 for dt."""
    return MambaConfig(inner=2 * d_model, dt_rank=-(-d_model // 16))


def lit_mamba2(d_model: int, state: int = 128) -> Mamba2Config:
    """2 d inner channels in heads of 64, one group."""
    return Mamba2Config(heads=2 * d_model // 64, head_dim=64, state=state)


PAPER_MODELS: dict[str, dict[str, Model]] = {
    "retnet": retnet(),
    "hgrn2": hgrn2(),
    "mamba": mamba(),
    "mamba2": mamba2(),
    "deltanet": deltanet(),
    "gated-deltanet": gated_deltanet(),
    "transformer": transformer(),
    "samba": samba(),
    "gated-deltanet-h1": gated_deltanet_h1(),
    "gated-deltanet-h2": gated_deltanet_h2(),
}
