"""The language model: embedding, repeats of the mixer pattern, final norm, head.

The repeats are a scan: one compilation of one repeat. Training can write them out one after another instead
(run.scan_layers), since a scan copies all that it keeps into arrays [repeats, ...] and out of them again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from flax import nnx
from jax.extend.core import Primitive
from jaxtyping import Array, Float, Int, Integer, PyTree, jaxtyped

from gdn_jax.config import Model
from gdn_jax.errors import UserError
from gdn_jax.layers import (
    Compute,
    Linear,
    RMSNorm,
    SwiGLU,
    at_least_fp32,
    embedding_init,
    linear_init,
    product,
)
from gdn_jax.mixers import HGRN2, MIXERS
from gdn_jax.mixers.attention import Attention
from gdn_jax.mixers.hgrn2 import lower_bounds
from gdn_jax.tree import named_leaves, with_leaves
from pallas_kernels.arguments import is_known, outside


class Block(nnx.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)), the latter unless d_ff is 0."""

    def __init__(self, cfg: Model, mixer: str, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mixer = MIXERS[mixer](cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps) if cfg.d_ff else None
        self.mlp = SwiGLU(cfg, rngs=rngs) if cfg.d_ff else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: PyTree = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
        bound: Float[Array, "D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        mixer = partial(self.mixer, bound=bound) if isinstance(self.mixer, HGRN2) else self.mixer
        y, cache = mixer(
            self.mixer_norm(x, compute),
            compute=compute, segment_ids=segment_ids, cache=cache, lengths=lengths, room=room,
        )  # fmt: skip
        x = x + y
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x, compute), compute)
        return x, cache


class Group(nnx.Module):
    """One repeat of the pattern: the unit that the model scans over, so that unlike blocks can alternate."""

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(cfg, mixer, rngs=rngs) for mixer in cfg.pattern])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: tuple | None = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
        bounds: Float[Array, "P D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple | None]:
        """bounds: for each block of the pattern the lower bound that an HGRN2 mixer keeps its forget gate above."""
        new = []
        for i, block in enumerate(self.blocks):
            past, bound = None if cache is None else cache[i], None if bounds is None else bounds[i]
            x, past = block(
                x, compute=compute, segment_ids=segment_ids, cache=past, lengths=lengths, room=room, bound=bound
            )
            new.append(past)
        return x, None if cache is None and room is None else tuple(new)


CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"  # a primitive
ELEMENTWISE = ("convolve", "norm")  # kernels that run again in the time in which their outputs could be read


def remat_policy(remat: str) -> Callable[..., bool] | None:
    """The policy that jax.checkpoint takes for run.remat: which primitives' outputs are kept for the backward pass."""
    names = remat.split("+")

    def policy(primitive: Primitive, *arguments: Any, **parameters: Any) -> bool:
        if primitive.name == "pallas_call":
            return "kernels" in names and parameters["name"] not in ELEMENTWISE
        if primitive.name == CUDNN_ATTENTION:
            return "kernels" in names
        products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return "products" in names and products(primitive, *arguments, **parameters)

    return None if remat == "full" else policy


class LM(nnx.Module):
    """A language model; the parameters of `groups` carry a leading axis [repeats]."""

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        self.config = cfg
        self.embed = nnx.Param(embedding_init(cfg)(rngs.params(), (cfg.vocab, cfg.d_model)))
        keys = jax.random.split(rngs.params(), cfg.repeats)
        self.groups = jax.vmap(lambda key: Group(cfg, rngs=nnx.Rngs(key)))(keys)
        with_bounds = "hgrn2" in cfg.pattern
        self.lower_bounds = nnx.Param(jnp.zeros((cfg.layers, cfg.d_model), jnp.float32)) if with_bounds else None
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        init = linear_init(cfg, cfg.d_model)
        self.head = None if cfg.tied else Linear(cfg.d_model, cfg.vocab, init, rngs=rngs)

    @jaxtyped(typechecker=beartype)
    def __call__(
        self,
        tokens: Integer[Array | np.ndarray, "B T"],
        *,
        compute: Compute,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: PyTree = None,
        lengths: Int[Array, "B"] | None = None,
        room: int | None = None,
        layers: list[tuple] | None = None,
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """Final hidden states in compute.dtype, and the new cache (None without a cache or a room).

        tokens       in [0, vocab), of JAX or NumPy
        segment_ids  any integers: documents packed in a row do not see each other; a change of id starts a new one
        cache        from `init_cache` or an earlier call; any T continues it, as far as its room
        lengths      in [0, T]: only the first lengths[b] tokens of row b count. What follows is padding, whose hidden
                     states mean nothing and of which the new cache keeps nothing
        room         the sequences begin here, and their new cache has room for so many tokens, as `init_cache` has for
                     max_len; the kernels of training read them
        layers       what `layers` gives, with a list of each repeat's caches (`by_repeat`): the same arithmetic without
                     a scan, which would copy each weight out of the stacked ones and each state in and out
        Raises UserError for segment_ids with a cache or a room, for a cache with a room, for a token outside the
        vocabulary and for more tokens than a cache has room for. Under jit the last two cannot be raised: such a token
        is not looked for, and a row that has outgrown its cache is NaN.
        """
        check_ids(tokens, self.config.vocab)
        if compute.dtype == jnp.float64 and any(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(self)):
            # what gates make of fp32 would be fp32
            exact, layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (self, layers))
            return exact(
                tokens, compute=compute, segment_ids=segment_ids, cache=cache, lengths=lengths, room=room, layers=layers
            )
        if segment_ids is not None and (cache is not None or room is not None):
            raise UserError(
                "the model got segment_ids and a cache; packed documents are for training, pass one of them."
            )
        if cache is not None and room is not None:
            raise UserError("the model got a cache and a room for a new one; pass one of them.")
        for i, block in enumerate(self.groups.blocks):
            if isinstance(block.mixer, Attention) and cache is not None and layers is None:
                block.mixer.check_room(cache[i].keys.shape[2], cache[i].index, tokens.shape[1], lengths)
            elif isinstance(block.mixer, Attention) and room is not None:
                block.mixer.check_room(room, 0, tokens.shape[1], lengths)
        x = self.embed[jnp.asarray(tokens, jnp.int32)].astype(compute.dtype)

        def group_of(x: Array, group: Group, past: PyTree, bounds: Array | None) -> tuple[Array, PyTree]:
            return group(
                x, compute=compute, segment_ids=segment_ids, cache=past, lengths=lengths, room=room, bounds=bounds
            )

        def body(x: Array, scanned: tuple) -> tuple[Array, PyTree]:
            group, bounds = scanned
            return group_of(x, group, None, bounds)

        def body_with_cache(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
            (x, cache), (repeat, group, bounds) = carry, scanned
            x, new = group_of(x, group, jax.tree.map(lambda whole: whole[repeat], cache), bounds)
            return (x, jax.tree.map(lambda whole, part: whole.at[repeat].set(part), cache, new)), None

        if layers is not None:
            new = []
            for (group, bounds), past in zip(layers, cache, strict=True):
                x, past = group_of(x, group, past, bounds)
                new.append(past)
            return self.norm(x, compute), new
        groups = _kernels_in(self.groups, compute.dtype)
        if cache is not None:  # carried, not scanned over: a loop updates in place what it carries
            repeats = jnp.arange(self.config.repeats)
            (x, cache), _ = jax.lax.scan(body_with_cache, (x, cache), (repeats, groups, self.bounds_by_layer()))
            return self.norm(x, compute), cache
        if compute.remat != "none":  # neither a scan nor `_one_at_a_time` lets XLA merge the two passes
            body = jax.checkpoint(body, prevent_cse=False, policy=remat_policy(compute.remat))
        if compute.scan_layers or room is not None:
            x, cache = jax.lax.scan(body, x, (groups, self.bounds_by_layer()))
            return self.norm(x, compute), cache
        layer = _one_at_a_time(lambda x, scanned: body(x, scanned)[0])
        for scanned in by_repeat((groups, self.bounds_by_layer()), self.config.repeats):
            x = layer(x, scanned)
        return self.norm(x, compute), None

    def layers(self) -> list[tuple[Group, Array | None]]:
        """(blocks, lower bounds) of each repeat."""
        return by_repeat((self.groups, self.bounds_by_layer()), self.config.repeats)

    def bounds_by_layer(self) -> Float[Array, "R P D"] | None:
        """HGRN2's lower bound of every layer, by repeat and place in the pattern; None without an HGRN2 mixer."""
        if self.lower_bounds is None:
            return None
        return lower_bounds(self.lower_bounds[...]).reshape(self.config.repeats, -1, self.config.d_model)

    def head_kernel(self) -> Float[Array, "D vocab"]:
        """The output projection, fp32: the transposed embedding when tied."""
        return self.embed[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
        """Logits of hidden states, in at least fp32."""
        return product(hidden, self.head_kernel().astype(hidden.dtype), at_least_fp32(hidden.dtype))

    def init_cache(self, batch: int, max_len: int, compute: Compute) -> PyTree:
        """The cache of an empty sequence: one entry for each mixer of the pattern, its leaves [repeats, B, ...].

        Attention has room for max_len tokens, or for ever where its window is no longer. `reorder_cache` picks rows.
        """
        one = tuple(block.mixer.init_cache(batch, max_len, compute.dtype) for block in self.groups.blocks)
        return jax.tree.map(lambda x: jnp.repeat(x[None], self.config.repeats, axis=0), one)


def check_ids(tokens: Array | np.ndarray, vocab: int) -> None:
    """Every token is in the vocabulary, or a UserError; those of a traced or a distributed array cannot be asked."""
    strange = outside(tokens, vocab)
    if strange is not None:
        raise UserError(
            f"Token {strange} is not in the model's vocabulary: ids lie in [0, {vocab}); use the tokenizer that it was "
            f"trained with."
        )


def reorder_cache(cache: PyTree, rows: Int[Array, "N"] | Sequence[int]) -> PyTree:
    """The cache whose row n is row rows[n] of `cache`: follows beams, goes on from one prompt many times, drops rows.

    Every leaf of every mixer's cache is [repeats, B, ...]. Raises UserError for rows that the cache does not have;
    under jit these are NaN.
    """
    held, rows = jax.tree.leaves(cache)[0].shape[1], rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if is_known(rows) and not all(0 <= row < held for row in np.asarray(rows).tolist()):
        raise UserError(f"rows is {np.asarray(rows).tolist()}; the cache has rows 0 to {held - 1}.")
    return jax.tree.map(lambda leaf: leaf.at[:, jnp.asarray(rows)].get(mode="fill"), cache)


def _kernels_in(groups: Group, dtype: Any) -> Group:
    """The stacked repeats with every Linear's kernel in the dtype of the arithmetic, to which each use casts it anyway.

    Cast before they are taken apart they are read once, and what a layer keeps and gives back has that dtype.
    """
    groups = jax.tree.map(lambda leaf: leaf, groups)  # modules of their own
    for _, module in nnx.iter_modules(groups):
        if isinstance(module, Linear):
            module.kernel = nnx.Param(module.kernel[...].astype(dtype))
    return groups


def _one_at_a_time(layer: Callable[[Array, PyTree], Array]) -> Callable[[Array, PyTree], Array]:
    """`layer`, whose backward begins when its cotangent is there and gives all of its gradients at once.

    XLA would else put off products of weights' gradients, and hold the activations of many layers until then.
    """

    @jax.custom_vjp
    def tied(x, parameters):
        return layer(x, parameters)

    def backward(vjp, dy):
        kept, structure = jax.tree.flatten(vjp)
        kept, dy = jax.lax.optimization_barrier((kept, dy))
        return jax.lax.optimization_barrier(jax.tree.unflatten(structure, kept)(dy))

    tied.defvjp(lambda x, parameters: jax.vjp(layer, x, parameters), backward)
    return tied


def by_repeat(stacked: PyTree, repeats: int) -> list[PyTree]:
    """Each repeat's part of arrays [repeats, ...]; the gradient joins them in one pass."""
    leaves, tree = jax.tree.flatten(stacked)
    split = [[part[0] for part in jax.lax.split(leaf, [1] * repeats)] for leaf in leaves]
    return [jax.tree.unflatten(tree, parts) for parts in zip(*split, strict=True)]


def init_model(cfg: Model, key: Array) -> LM:
    """A model with freshly drawn fp32 parameters; jit it with out_shardings to have them born sharded."""
    return LM(cfg, rngs=nnx.Rngs(key))


def for_inference(model: LM, dtype: Any) -> LM:
    """The model as inference reads it: the embedding and every Linear kernel in the dtype of the arithmetic.

    Each use casts them to it anyway, so results are the same bit for bit, and a step reads fewer bytes. What computes
    in fp32 stays fp32: norms, convolutions, gates, biases. Parameters of that dtype already are not copied.
    """
    leaves = named_leaves(model)
    return with_leaves(
        model,
        {
            name: leaf.astype(dtype) if name == "embed" or name.endswith("/kernel") else leaf
            for name, leaf in leaves.items()
        },
    )


def abstract_model(cfg: Model) -> LM:
    """The model with ShapeDtypeStructs for parameters: shapes without memory."""
    return jax.eval_shape(lambda: init_model(cfg, jax.random.key(0)))


def count_parameters(cfg: Model) -> int:
    """Number of parameters; a tied embedding counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(cfg)))
