"""Gated DeltaNet (paper section 3.4): the gated delta rule between short convolutions and a gated norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gdn_jax.config import GatedDeltaNetConfig, Model
from gdn_jax.layers import (
    Compute,
    Linear,
    RMSNorm,
    ShortConv,
    at_least_fp32,
    conv_init,
    dt_bias_init,
    linear_init,
    log_decay_rate_init,
    together,
    zero_padding,
)
from gdn_jax.mixers.recurrence import DELTA_RULE, advance


class OpInputs(NamedTuple):
    """What the gated delta rule reads: q, k, v in compute.dtype; log decay g, write strength beta in fp32.

    q and k of a single token are in fp32, and not yet of norm 1, where the op's step can see to that
    (`GatedDeltaNet.step_normalises`).
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T Hv V"]
    g: Float[Array, "B T Hv"]
    beta: Float[Array, "B T Hv"]


class GatedDeltaNetCache(NamedTuple):
    """The whole past in constant memory: the state, and the last inputs of the convolutions of q, k and v, side by
    side (none without convolutions)."""

    state: Float[Array, "B Hv K V"]  # fp32
    conv: Float[Array, "B W1 C"]


class GatedDeltaNet(nnx.Module):
    """Token mixer S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t (eq. 10).

    q = L2(SiLU(conv(W_q x))), k likewise, v = SiLU(conv(W_v x)), beta = sigmoid(W_b x),
    log alpha = -exp(A_log) softplus(W_a x + dt_bias), y = W_o [RMSNorm(o) * SiLU(W_g x)].
    Every line has a switch in GatedDeltaNetConfig; a switched-off part has no parameters.
    """

    TOGETHER = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
    EXACT = ("b_proj", "a_proj")

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.config = mixer = self.settings(cfg)
        D, Hv = cfg.d_model, mixer.num_value_heads
        key_size, value_size = mixer.heads * mixer.key_dim, Hv * mixer.value_dim

        def project(size: int, bias: bool = False) -> Linear:
            return Linear(D, size, linear_init(cfg, D), rngs=rngs, bias=bias)

        def conv(size: int) -> ShortConv | None:
            width = mixer.conv_width
            return ShortConv(size, width, conv_init(cfg, width), rngs=rngs) if width else None

        self.q_proj, self.k_proj, self.v_proj = project(key_size), project(key_size), project(value_size)
        self.q_conv, self.k_conv, self.v_conv = conv(key_size), conv(key_size), conv(value_size)
        self.b_proj = project(Hv, bias=mixer.beta_bias)
        self.a_proj = project(Hv) if mixer.decay else None
        self.A_log = nnx.Param(log_decay_rate_init(rngs.params(), Hv)) if mixer.decay else None
        self.dt_bias = nnx.Param(dt_bias_init(rngs.params(), Hv)) if mixer.decay else None
        self.g_proj = project(value_size) if mixer.output_gate else None
        self.o_norm = RMSNorm(mixer.value_dim, cfg.norm_eps) if mixer.output_norm else None
        init = linear_init(cfg, value_size, residual=cfg.rescale_o_proj)
        self.o_proj = Linear(value_size, D, init, rngs=rngs)

    @staticmethod
    def settings(cfg: Model) -> GatedDeltaNetConfig:
        """The switches of this mixer in a model."""
        return cfg.gated_deltanet

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: GatedDeltaNetCache | None = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
    ) -> tuple[Float[Array, "B T D"], GatedDeltaNetCache | None]:
        inputs, gate, past = self.op_inputs(x, compute=compute, segment_ids=segment_ids, cache=cache, lengths=lengths)
        unnormalised = self.step_normalises(x, cache)
        o, state = advance(
            DELTA_RULE, inputs, cache, compute=compute, segment_ids=segment_ids, l2norm=unnormalised
        )  # fmt: skip
        y = self.o_proj(self._output(o, gate, compute), compute)
        return y, None if cache is None and room is None else GatedDeltaNetCache(state, past)

    def step_normalises(self, x: Float[Array, "B T D"], cache: GatedDeltaNetCache | None) -> bool:
        """Whether x is a single token whose q and k the op's step brings to norm 1: for its kernel that is no work, and
        beside the convolution it would be four kernels more."""
        mixer = self.config
        normal = mixer.conv_width and mixer.feature_map == "silu" and mixer.qk_norm == "l2"
        return cache is not None and x.shape[1] == 1 and bool(normal)

    def op_inputs(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: GatedDeltaNetCache | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[OpInputs, Float[Array, "B T HvV"] | None, Float[Array, "B W1 C"]]:
        """The op's inputs for x, what gates its output (None: nothing), and the convolutions' last inputs."""
        mixer, exact = self.config, at_least_fp32(compute.dtype)
        unnormalised = self.step_normalises(x, cache)
        q, k, v, gate, b, a = together(self, x, compute)

        def features(
            y: Array, conv: ShortConv | None, history: Array | None, feature_map: str, norm: str | None
        ) -> tuple[Array, Array]:
            head = mixer.key_dim
            if conv is None:
                y, history = FEATURE_MAPS[feature_map](y), y[:, :0]
            elif unnormalised and norm is not None:
                y, history = conv(y.astype(exact), compute, activation="silu", history=history, lengths=lengths)
                return y, history.astype(compute.dtype)
            else:
                silu = feature_map == "silu"  # what the convolution can apply itself
                y, history = conv(
                    y, compute, activation="silu" if silu else None, l2norm=head if silu and norm == "l2" else None,
                    segment_ids=segment_ids, history=history, lengths=lengths,
                )  # fmt: skip
                if silu and norm == "l2":
                    return y, history
                y = y if silu else FEATURE_MAPS[feature_map](y)
            return y if norm is None else _normalise(y, head, norm).astype(compute.dtype), history

        ends = [q.shape[-1], q.shape[-1] + k.shape[-1]]
        past = (None, None, None) if cache is None else jnp.split(cache.conv, ends, axis=-1)
        q, q_past = features(q, self.q_conv, past[0], mixer.feature_map, mixer.qk_norm)
        k, k_past = features(k, self.k_conv, past[1], mixer.feature_map, mixer.qk_norm)
        v, v_past = features(v, self.v_conv, past[2], "silu", None)

        q, k = (y.reshape(*y.shape[:2], mixer.heads, mixer.key_dim) for y in (q, k))
        v = v.reshape(*v.shape[:2], mixer.num_value_heads, mixer.value_dim)
        beta = jax.nn.sigmoid(b)
        if mixer.negative_eigenvalues:
            beta = 2.0 * beta  # I - beta k k^T then has an eigenvalue in (-1, 1)
        if mixer.decay:
            g = -jnp.exp(self.A_log[...]) * jax.nn.softplus(a + self.dt_bias[...])
        else:
            g = jnp.zeros_like(beta)
        g, beta = zero_padding(g, lengths), zero_padding(beta, lengths)  # padding writes nothing and forgets nothing
        return OpInputs(q, k, v, g, beta), gate, jnp.concatenate([q_past, k_past, v_past], axis=-1)

    def _output(self, o: Float[Array, "B T Hv V"], gate: Float[Array, "B T HvV"] | None, compute: Compute) -> Array:
        gate = None if gate is None else gate.reshape(o.shape)
        if self.o_norm is not None:
            o = self.o_norm(o, compute, gate)
        elif gate is not None:
            o = o * jax.nn.silu(gate)
        return o.reshape(*o.shape[:2], -1)

    def init_cache(self, batch: int, max_len: int, dtype: Any) -> GatedDeltaNetCache:
        """The cache of an empty sequence; max_len does not matter, its size is constant."""
        mixer, past = self.config, max(self.config.conv_width - 1, 0)
        Hv, K, V = mixer.num_value_heads, mixer.key_dim, mixer.value_dim
        state = jnp.zeros((batch, Hv, K, V), at_least_fp32(dtype))
        return GatedDeltaNetCache(state, jnp.zeros((batch, past, 2 * mixer.heads * K + Hv * V), dtype))


FEATURE_MAPS = {"silu": jax.nn.silu, "relu": jax.nn.relu, "elu1": lambda x: 1.0 + jax.nn.elu(x)}


def _normalise(x: Float[Array, "B T HK"], head: int, norm: str) -> Float[Array, "B T HK"]:
    """Each head's vector to unit L2 or L1 norm, in at least fp32."""
    heads = x.astype(at_least_fp32(x.dtype)).reshape(*x.shape[:2], -1, head)
    if norm == "l2":
        heads = heads * jax.lax.rsqrt(jnp.sum(jnp.square(heads), axis=-1, keepdims=True) + 1e-6)
    else:
        heads = heads / (jnp.sum(jnp.abs(heads), axis=-1, keepdims=True) + 1e-6)
    return heads.reshape(x.shape)
