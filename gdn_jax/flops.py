"""Floating point operations that a model needs by its definition, a multiply-add counting as two.

Counted are the matmuls, attention over the visible pairs, and the recurrences in their chunkwise form; not counted
are convolutions, norms, gates, the embedding lookup, and whatever a backward recomputes.
"""

import jax

from gdn_jax.config import Model
from gdn_jax.model import abstract_model

CHUNK = 64  # the paper's chunk; the count must not change with a run's tiling


def forward_flops_per_token(cfg: Model, seq_len: int) -> float:
    """Forward FLOPs of one token, sequence mean: 2 x matmul parameters (head included) + the mixers' own."""
    mixing = cfg.repeats * sum(MIXER_FLOPS[mixer](cfg, seq_len) for mixer in cfg.pattern)
    return 2.0 * matmul_parameters(cfg) + mixing


def train_flops_per_token(cfg: Model, seq_len: int) -> float:
    """Forward and backward: three times the forward."""
    return 3.0 * forward_flops_per_token(cfg, seq_len)


def matmul_parameters(cfg: Model) -> int:
    """Entries of every Linear kernel and of the head; a tied embedding counts once, as the head."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(cfg))
    kernels = sum(leaf.size for path, leaf in leaves if ".kernel" in jax.tree_util.keystr(path))
    return kernels + (cfg.vocab * cfg.d_model if cfg.tied else 0)


def _delta_rule(heads: int, K: int, V: int) -> float:
    """For each value head: 3 * 2KV (S k, S q, k^T x) + 2 * 2CK (K K^T, Q K^T) + 2 * 2CV (both times V)."""
    return heads * (6.0 * K * V + 4.0 * CHUNK * K + 4.0 * CHUNK * V)


def gated_delta_rule_flops(cfg: Model, seq_len: int) -> float:
    """The delta rule of every value head."""
    mixer = cfg.gated_deltanet
    return _delta_rule(mixer.num_value_heads, mixer.key_dim, mixer.value_dim)


def delta_rule_flops(cfg: Model, seq_len: int) -> float:
    """The same as gated_delta_rule_flops, since the decay needs no matrix product."""
    return _delta_rule(cfg.deltanet.heads, cfg.deltanet.key_dim, cfg.deltanet.value_dim)


def _linear_attention(heads: int, K: int, V: int) -> float:
    """For each value head: 2 * 2KV (S q, k^T v) + 2CK (Q K^T) + 2CV (times V)."""
    return heads * (4.0 * K * V + 2.0 * CHUNK * K + 2.0 * CHUNK * V)


def retnet_flops(cfg: Model, seq_len: int) -> float:
    """Linear attention of every head."""
    return _linear_attention(cfg.retnet.heads, cfg.retnet.key_dim, cfg.retnet.value_dim)


def hgrn2_flops(cfg: Model, seq_len: int) -> float:
    """Linear attention of every head; a decay for each channel needs no further matrix product."""
    return _linear_attention(cfg.hgrn2.heads, cfg.hgrn2.head_dim, cfg.hgrn2.head_dim)


def mamba_flops(cfg: Model, seq_len: int) -> float:
    """Three multiply-adds for each inner channel and state: into the exponent, the state, and the output."""
    return 6.0 * cfg.mamba.inner * cfg.mamba.state


def mamba2_flops(cfg: Model, seq_len: int) -> float:
    """Linear attention of every head, whose Q K^T is made once for each group."""
    mixer = cfg.mamba2
    whole = _linear_attention(mixer.heads, mixer.state, mixer.head_dim)
    return whole - (mixer.heads - mixer.groups) * 2.0 * CHUNK * mixer.state


def attention_flops(cfg: Model, seq_len: int) -> float:
    """4 * heads * head_dim (q k^T and p v) for each visible token, on average (T + 1) / 2 of them."""
    return 4.0 * cfg.d_model * (seq_len + 1) / 2


def swa_flops(cfg: Model, seq_len: int) -> float:
    """As attention with mean_t min(t, W) visible tokens: (W (W + 1) / 2 + (T - W) W) / T for W <= T."""
    W = min(cfg.attention.window, seq_len)
    return 4.0 * cfg.d_model * (W * (W + 1) / 2 + (seq_len - W) * W) / seq_len


MIXER_FLOPS = {
    "gated_deltanet": gated_delta_rule_flops,
    "deltanet": delta_rule_flops,
    "retnet": retnet_flops,
    "hgrn2": hgrn2_flops,
    "mamba": mamba_flops,
    "mamba2": mamba2_flops,
    "attention": attention_flops,
    "swa": swa_flops,
}
