"""Floating point operations that a model needs by its definition, a multiply-add counting as two.

Counted are the matmuls, attention over the visible pairs, and the gated delta rule in its chunkwise form; not
counted are convolutions, norms, gates, the embedding lookup, and whatever a backward recomputes.
"""

import jax

from gdn_jax.config import Model
from gdn_jax.model import abstract_model

DELTA_RULE_CHUNK = 64  # the paper's chunk; the count must not change with a run's tiling


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


def gated_delta_rule_flops(cfg: Model, seq_len: int) -> float:
    """For each value head: 3 * 2KV (S k, S q, k^T x) + 2 * 2CK (K K^T, Q K^T) + 2 * 2CV (both times V)."""
    mixer, C = cfg.gated_deltanet, DELTA_RULE_CHUNK
    K, V = mixer.key_dim, mixer.value_dim
    return mixer.num_value_heads * (6.0 * K * V + 4.0 * C * K + 4.0 * C * V)


def attention_flops(cfg: Model, seq_len: int) -> float:
    """4 * heads * head_dim (q k^T and p v) for each visible token, on average (T + 1) / 2 of them."""
    return 4.0 * cfg.d_model * (seq_len + 1) / 2


def swa_flops(cfg: Model, seq_len: int) -> float:
    """As attention with mean_t min(t, W) visible tokens: (W (W + 1) / 2 + (T - W) W) / T for W <= T."""
    W = min(cfg.attention.window, seq_len)
    return 4.0 * cfg.d_model * (W * (W + 1) / 2 + (seq_len - W) * W) / seq_len


MIXER_FLOPS = {"gated_deltanet": gated_delta_rule_flops, "attention": attention_flops, "swa": swa_flops}
