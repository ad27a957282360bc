"""The layers every model shares, and how parameters start.

Parameters are fp32 `nnx.Param`s; a layer is told at call time how to compute (`Compute`), never at
construction, so a model's parameters and its hash do not depend on precision, implementation or memory
policy.
"""

import itertools
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from beartype import beartype
from flax import nnx
from jaxtyping import Array, Float, Int, jaxtyped

from gdn_jax.config import Experiment, Model, Run
from gdn_jax.errors import UserError
from pallas_kernels import gated_norm, short_conv
from pallas_kernels.chunkwise import document_starts

LEAST_ROWS = 8  # of a bf16 product
ALIGNED = 128  # columns of a weight for single tokens, and half as many rows: XLA copies others, anew for each token

Initialiser = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How to compute: activation dtype, kernel choice, what the backward recomputes. Hashable: jit-static."""

    dtype: Any = jnp.bfloat16  # of the residual stream and of matmul operands; float64: of everything
    impl: str = "auto"  # of every op of pallas_kernels that has it; the others take "auto"
    chunk: int = 64
    residuals: str = "saved"
    remat: str = "none"  # what the backward recomputes, see config.Run
    scan_layers: bool = True  # False, for training alone: write the layers out

    def __post_init__(self):
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        except TypeError:
            raise UserError(f"dtype is {self.dtype!r}; it must be bfloat16, float32 or float64.") from None
        if self.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
            raise UserError(f"dtype is {self.dtype}; it must be bfloat16, float32 or float64.")
        if self.dtype == jnp.float64 and not jax.config.jax_enable_x64:
            raise UserError("dtype is float64, which JAX rounds to float32 by itself; set jax_enable_x64.")
        for name in ("impl", "chunk", "residuals", "remat"):
            known = typing.get_args(typing.get_type_hints(Run)[name])
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(str, known))}.")

    def impl_among(self, known: tuple[str, ...]) -> str:
        """`impl` for an op with the implementations `known`, or "auto" where it is none of them."""
        return self.impl if self.impl in known else "auto"


def compute_for(experiment: Experiment, *, training: bool = False) -> Compute:
    """The `Compute` that an experiment's optim.precision and run groups ask for; run.scan_layers is for training."""
    run = experiment.run
    return Compute(
        dtype={"bf16": jnp.bfloat16, "fp32": jnp.float32}[experiment.optim.precision],
        impl=run.impl, chunk=run.chunk, residuals=run.residuals, remat=run.remat,
        scan_layers=run.scan_layers or not training,
    )  # fmt: skip


def product(x: Float[Array, "*B I"], kernel: Float[Array, "I O"], dtype: Any = None) -> Float[Array, "*B O"]:
    """x kernel, in x's dtype or in `dtype`, in which it is accumulated. The kernel may have more rows of zeros.

    XLA makes a product with a single row of bf16 into sums of columns, which read the kernel at a tenth of an H100's
    bandwidth: rows of zeros keep it a product.
    """
    rows, more = math.prod(x.shape[:-1]), kernel.shape[0] - x.shape[-1]
    few = x.dtype == jnp.bfloat16 and rows == 1
    given = jnp.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, more))) if more else x
    given = jnp.pad(given.reshape(1, -1), ((0, LEAST_ROWS - 1), (0, 0))) if few else given
    y = jnp.matmul(given, kernel, precision=dot_precision(x.dtype), preferred_element_type=dtype)
    return y[:1].reshape(*x.shape[:-1], y.shape[-1]) if few else y


def dot_precision(dtype: Any) -> jax.lax.Precision:
    """HIGHEST for fp32 operands, which a GPU would else round to TF32; bf16 products are exact already."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def at_least_fp32(dtype: Any) -> Any:
    """The dtype of states, gates and sums beside activations of `dtype`: at least fp32."""
    return jnp.promote_types(jnp.float32, dtype)


# --- initialisation: families, chosen by cfg.init ---


def normal(std: float) -> Initialiser:
    """N(0, std^2)."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initialiser:
    """U(-bound, bound)."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def linear_init(cfg: Model, fan_in: int, *, residual: bool = False) -> Initialiser:
    """Start of a Linear kernel: lit U(+-fan_in^-1/2), fla N(0, 0.02^2).

    `residual` marks a projection that writes to the residual stream: lit divides it by the square root of the
    number of such writes, two a layer, or one where there is no MLP. fla does not, but for Mamba2 (see there).
    lit-normal, the released code's start of models without a recurrence: N(0, 2 / (5 d)), residual
    N(0, 1 / (d layers^2)), d the model's width.
    """
    if cfg.init == "fla":
        return normal(0.02)
    if cfg.init == "lit-normal":
        return normal(cfg.d_model**-0.5 / cfg.layers if residual else math.sqrt(0.4 / cfg.d_model))
    writes = cfg.layers * (2 if cfg.d_ff else 1)
    return uniform(fan_in**-0.5 / (math.sqrt(writes) if residual else 1.0))


def embedding_init(cfg: Model) -> Initialiser:
    """Start of the embedding: N(0, 0.02^2); lit-normal N(0, 2 / (5 d))."""
    return normal(math.sqrt(0.4 / cfg.d_model)) if cfg.init == "lit-normal" else normal(0.02)


def conv_init(cfg: Model, width: int) -> Initialiser:
    """Start of a depthwise convolution, whose fan-in is its width: lit U(+-width^-1/2), fla N(0, 0.02^2)."""
    return normal(0.02) if cfg.init == "fla" else uniform(width**-0.5)


def conv_bias_init(cfg: Model, width: int) -> Initialiser:
    """Start of a convolution's bias: lit like its weight, fla 0."""
    return conv_init(cfg, width) if cfg.init == "lit" else lambda key, shape: jnp.zeros(shape, jnp.float32)


def log_decay_rate_init(key: jax.Array, heads: int, low: float = 0.0, high: float = 16.0) -> jax.Array:
    """A_log = log A with A ~ U(low, high) [heads]; A is kept >= 1e-4, whose logarithm is finite."""
    return jnp.log(jnp.maximum(jax.random.uniform(key, (heads,), jnp.float32, low, high), 1e-4))


def dt_bias_init(key: jax.Array, heads: int) -> jax.Array:
    """dt_bias [heads; channels in Mamba]: softplus(dt_bias) = dt, dt log-uniform in [1e-3, 0.1] and at least 1e-4."""
    dt = jnp.exp(jax.random.uniform(key, (heads,), jnp.float32, math.log(1e-3), math.log(0.1)))
    dt = jnp.maximum(dt, 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


# --- layers ---


@jax.custom_vjp
def _exact_product(x: Array, kernel: Array) -> Array:
    """x kernel in fp32 from operands of half precision, whose gradients are products of half precision too.

    Without this rule the cotangent of an fp32 product is fp32, and both products of the backward run on fp32 copies of
    their other operand, at half the speed.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _exact_product_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _exact_product(x, kernel), (x, kernel)


def _exact_product_bwd(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return jax.vjp(jnp.matmul, *saved)[1](dy.astype(saved[0].dtype))


_exact_product.defvjp(_exact_product_fwd, _exact_product_bwd)


class Linear(nnx.Module):
    """y = x kernel (+ bias), kernel [in, out]; operands in compute.dtype, forward and backward, accumulated in fp32."""

    def __init__(self, d_in: int, d_out: int, init: Initialiser, *, rngs: nnx.Rngs, bias: bool = False):
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out, jnp.float32)) if bias else None
        self.size = d_out

    def __call__(
        self, x: Float[Array, "*B I"], compute: Compute, *, exact: bool = False, columns: slice = slice(None)
    ) -> Float[Array, "*B O"]:
        """Output in compute.dtype; exact: in fp32, where rounding would hurt (gate logits). columns: of the output."""
        x, kernel = x.astype(compute.dtype), self.kernel[:, columns].astype(compute.dtype)
        if not exact:
            y = product(x, kernel)
        elif kernel.dtype.itemsize < 4 and x.shape[-2:-1] != (1,):
            y = _exact_product(x, kernel)
        else:
            y = product(x, kernel, at_least_fp32(compute.dtype))
        y = y[..., : self.size]
        return y if self.bias is None else (y + self.bias[columns]).astype(y.dtype)

    def parts(
        self, x: Float[Array, "*B T I"], compute: Compute, sizes: Sequence[int], exact: Sequence[int] = ()
    ) -> list[Array]:
        """The output in parts of `sizes` columns, each for another use; those numbered in `exact` are fp32.

        Of many tokens each is a product of its own: XLA copies the parts of a product that kernels read, and again
        their gradients. Of a single one all are one product, which reads the weight as it lies.
        """
        ends = list(itertools.accumulate(sizes))
        if x.shape[-2] == 1:
            outputs = jnp.split(self(x, compute, exact=bool(exact)), ends[:-1], axis=-1)
            return [y if i in exact else y.astype(compute.dtype) for i, y in enumerate(outputs)]
        return [
            self(x, compute, exact=i in exact, columns=slice(end - size, end))
            for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]


def together(module: nnx.Module, x: Float[Array, "*B T I"], compute: Compute) -> list[Array | None]:
    """What the Linears named in module.TOGETHER make of x, None for one that the module does without.

    Those that module.EXACT names too give fp32. After `for_single_tokens` all are one product.
    """
    linears = [getattr(module, name) for name in module.TOGETHER]
    exact = [name in getattr(module, "EXACT", ()) for name in module.TOGETHER]
    if not any(one is not None and one.kernel is None for one in linears):
        return [one and one(x, compute, exact=fp32) for one, fp32 in zip(linears, exact, strict=True)]
    first = next(one for one in linears if one is not None)
    all_of_them = product(x.astype(compute.dtype), first.kernel[...], at_least_fp32(compute.dtype))
    outputs, begin = [], 0
    for one, fp32 in zip(linears, exact, strict=True):
        y = None
        if one is not None:
            y, begin = all_of_them[..., begin : begin + one.size], begin + one.size
            y = y if one.bias is None else y + one.bias[...]
            y = y if fp32 else y.astype(compute.dtype)
        outputs.append(y)
    return outputs


def for_single_tokens(block: nnx.Module) -> None:
    """Lays out a block's weights for one token at a time, so that each is read once a token, and as it lies.

    The kernels of Linears of one input (`together`) become one, and all kernels get rows and columns of zeros up to
    multiples of ALIGNED / 2 and ALIGNED. XLA would else join products by itself, or split them into aligned parts, and
    lay out their weights again for every token. A mixer from outside, which may read its kernels otherwise than by
    calling Linears, has no TOGETHER and stays as it is.
    """
    for module in (block.mixer, block.mlp):
        if not hasattr(module, "TOGETHER"):
            continue
        joined = [getattr(module, name) for name in module.TOGETHER]
        joined = [one for one in joined if one is not None]
        if joined:
            whole = jnp.concatenate([one.kernel[...] for one in joined], axis=1)
            for one in joined:
                one.kernel = nnx.Param(whole) if one is joined[0] else None
        for _, one in nnx.iter_modules(module):
            if isinstance(one, Linear) and one.kernel is not None:
                rows, columns = one.kernel.shape
                one.kernel = nnx.Param(jnp.pad(one.kernel[...], ((0, -rows % (ALIGNED // 2)), (0, -columns % ALIGNED))))


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight (* SiLU(gate)) over the last axis, in fp32; y has x's dtype.

    On [B, T, H, V] one weight [V] is shared by all heads: the output norm of Gated DeltaNet and RetNet, which is gated
    AFTER it. With gate_first the norm is of x * SiLU(gate), as in Mamba2, and over each of `groups` equal parts.
    """

    def __init__(self, size: int, eps: float, *, gate_first: bool = False, groups: int = 1):
        self.weight = nnx.Param(jnp.ones(size, jnp.float32))
        self.eps, self.gate_first, self.groups = eps, gate_first, groups

    def __call__(
        self, x: Float[Array, "*B D"], compute: Compute, gate: Float[Array, "*B D"] | None = None
    ) -> Float[Array, "*B D"]:
        return gated_norm.gated_norm(
            x, self.weight[...], gate, eps=self.eps, gate_first=self.gate_first, groups=self.groups,
            impl=compute.impl_among(gated_norm.IMPLS),
        )  # fmt: skip


class ShortConv(nnx.Module):
    """Depthwise causal convolution y_t = sum_j w[W-1-j] x_{t-j} (+ bias), j < W, with weight [W, C], and SiLU on it."""

    def __init__(
        self, channels: int, width: int, init: Initialiser, *, rngs: nnx.Rngs, bias_init: Initialiser | None = None
    ):
        self.weight = nnx.Param(init(rngs.params(), (width, channels)))
        self.bias = None if bias_init is None else nnx.Param(bias_init(rngs.params(), (channels,)))

    def __call__(
        self,
        x: Float[Array, "B T C"],
        compute: Compute,
        *,
        activation: Literal["silu"] | None = None,
        l2norm: int | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        history: Float[Array, "B W1 C"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        columns: slice = slice(None),
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B W1 C"]]:
        """y in x's dtype, and the last W-1 inputs, which as `history` continue the sequence (None: zeros).

        x and history are of the channels `columns`.

        Taps stay within a segment; the first segment continues the history. l2norm: the size of the heads that are
        brought to norm 1 after the activation. lengths: the tokens of each row that count; what follows them is
        padding, and the inputs handed on are the last before it.
        """
        bias = None if self.bias is None else self.bias[columns]
        impl = compute.impl_among(short_conv.IMPLS)
        if x.shape[1] < short_conv.LEAST_TOKENS and impl in ("triton", "triton_interpret"):
            impl = "auto"  # a step has no kernel, here as in the recurrences
        y, last = short_conv.short_conv(
            x, self.weight[:, columns], bias, activation=activation, l2norm=l2norm, initial_state=history,
            segment_ids=segment_ids, impl=impl,
        )  # fmt: skip
        if lengths is not None:
            before = jnp.zeros_like(last) if history is None else history.astype(x.dtype)
            places = lengths[:, None] + jnp.arange(last.shape[1])
            last = jnp.take_along_axis(jnp.concatenate([before, x], axis=1), places[..., None], axis=1)
        return y, last


class SwiGLU(nnx.Module):
    """y = down(SiLU(gate x) * (up x)), without biases."""

    TOGETHER = ("gate_proj", "up_proj")

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        D, F = cfg.d_model, cfg.d_ff
        self.gate_proj = Linear(D, F, linear_init(cfg, D), rngs=rngs)
        self.up_proj = Linear(D, F, linear_init(cfg, D), rngs=rngs)
        self.down_proj = Linear(F, D, linear_init(cfg, F, residual=True), rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], compute: Compute) -> Float[Array, "B T D"]:
        gate, up = together(self, x, compute)
        return self.down_proj(jax.nn.silu(gate) * up, compute)


@jaxtyped(typechecker=beartype)
def rope(
    x: Float[Array, "B T H K"], offset: Int[Array, "B"] | int = 0, base: float = 10000.0
) -> Float[Array, "B T H K"]:
    """Rotary position embedding: the pair (x_i, x_{i+K/2}) turns by (offset + t) * base^(-2i/K), i < K/2.

    offset is the position of the first token, one for all rows or one for each. Angles and rotation are in at least
    fp32; the output has x's dtype. K must be even.
    """
    half, dtype = x.shape[-1] // 2, at_least_fp32(x.dtype)
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    position = jnp.asarray(offset)[..., None] + jnp.arange(x.shape[1])
    angle = position.astype(dtype)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jaxtyped(typechecker=beartype)
def segment_index(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers the segments of each row 0, 1, 2, ...; a new one starts wherever the id (any integer) changes."""
    return jnp.cumsum(document_starts(segment_ids), axis=1, dtype=jnp.int32)


def zero_padding(x: Float[Array, "B T *C"], lengths: Int[Array, "B"] | None) -> Float[Array, "B T *C"]:
    """x with everything after the first lengths[b] tokens of row b set to zero; None: nothing is padding."""
    if lengths is None:
        return x
    real = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)
