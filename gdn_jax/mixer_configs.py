"""The configuration of each mixer: one frozen dataclass for each family, held by a field of `config.Model`."""

from dataclasses import dataclass
from typing import Literal

from gdn_jax.fields import positive, require, typed


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """The Gated DeltaNet mixer (paper section 3.4); every ablation of its Table S.1 is a switch here."""

    heads: int
    key_dim: int  # per head
    value_dim: int  # per head
    value_heads: int | None = None  # group-value attention: a multiple of heads; None: as many as heads
    conv_width: int = 4  # 0: no short convolution
    decay: bool = True  # False: the plain delta rule, alpha = 1
    output_gate: bool = True
    output_norm: bool = True
    feature_map: Literal["silu", "relu", "elu1"] = "silu"  # of q and k; elu1 is 1 + elu
    qk_norm: Literal["l2", "l1"] = "l2"
    beta_bias: bool = True
    negative_eigenvalues: bool = False  # beta in (0, 2) instead of (0, 1)

    def __post_init__(self):
        where = "model.gated_deltanet"
        typed(self, where)
        positive(self, where, "heads", "key_dim", "value_dim")
        require(
            self.num_value_heads > 0 and self.num_value_heads % self.heads == 0,
            f"{where}.value_heads is {self.value_heads}; it must be a positive multiple of heads {self.heads}.",
        )
        require(
            self.conv_width >= 0,
            f"{where}.conv_width is {self.conv_width}; use 0 for none or a positive width.",
        )

    @property
    def num_value_heads(self) -> int:
        return self.heads if self.value_heads is None else self.value_heads


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """The DeltaNet mixer (Yang et al. 2024b): the delta rule without decay and without an output gate."""

    heads: int
    key_dim: int  # per head
    value_dim: int  # per head
    conv_width: int = 4  # 0: no short convolution

    def __post_init__(self):
        where = "model.deltanet"
        typed(self, where)
        positive(self, where, "heads", "key_dim", "value_dim")
        require(
            self.conv_width >= 0,
            f"{where}.conv_width is {self.conv_width}; use 0 for none or a positive width.",
        )


@dataclass(frozen=True, kw_only=True)
class RetNetConfig:
    """The retention mixer (Sun et al. 2023a): head h decays by 1 - 2^(-5 - h) a token; queries and keys are rotated."""

    heads: int
    key_dim: int  # per head
    value_dim: int  # per head
    rope_base: float = 10000.0

    def __post_init__(self):
        typed(self, "model.retnet")
        positive(self, "model.retnet", "heads", "key_dim", "value_dim", "rope_base")
        require(
            self.key_dim % 2 == 0,
            f"model.retnet.key_dim is {self.key_dim}; it must be even, because RoPE rotates pairs.",
        )


@dataclass(frozen=True, kw_only=True)
class HGRN2Config:
    """The HGRN2 mixer (Qin et al. 2024b): heads x head_dim = d_model key channels, each with its own decay."""

    heads: int
    head_dim: int

    def __post_init__(self):
        typed(self, "model.hgrn2")
        positive(self, "model.hgrn2", "heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """The Mamba mixer (Gu & Dao 2023): a selective scan over `inner` channels with `state` numbers each."""

    inner: int
    dt_rank: int
    state: int = 16
    conv_width: int = 4

    def __post_init__(self):
        typed(self, "model.mamba")
        positive(self, "model.mamba", "inner", "dt_rank", "state", "conv_width")


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """The Mamba2 mixer (Dao & Gu 2024b): heads x head_dim inner channels; heads / groups of them share B and C."""

    heads: int
    head_dim: int = 64
    state: int = 128
    groups: int = 1
    conv_width: int = 4

    def __post_init__(self):
        where = "model.mamba2"
        typed(self, where)
        positive(self, where, "heads", "head_dim", "state", "groups", "conv_width")
        require(
            self.heads % self.groups == 0,
            f"{where}.groups is {self.groups}; it must divide {where}.heads {self.heads}.",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Softmax attention with RoPE; `window` counts visible tokens, the current one included, and binds `swa` only."""

    heads: int
    head_dim: int
    window: int = 2048
    rope_base: float = 10000.0

    def __post_init__(self):
        typed(self, "model.attention")
        positive(self, "model.attention", "heads", "head_dim", "window", "rope_base")
        require(
            self.head_dim % 2 == 0,
            f"model.attention.head_dim is {self.head_dim}; it must be even, because RoPE rotates pairs.",
        )
