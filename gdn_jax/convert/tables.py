"""Tables that map the tensors of a checkpoint format to our parameters: (their key, our parameters, transform)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from gdn_jax.config import Model
from gdn_jax.errors import UserError
from gdn_jax.model import abstract_model
from gdn_jax.tree import named_leaves

GROUP = "groups/blocks/{block}/"  # where a block's parameters lie; they are stacked over the repeats of the pattern


class Transform(NamedTuple):
    """Converts one tensor of the checkpoint to one or more of our parameters, and back."""

    read: Callable[[np.ndarray, Model], tuple[np.ndarray, ...]]
    write: Callable[[tuple[np.ndarray, ...], Model], np.ndarray]


def _unpack_heads(x: np.ndarray, cfg: Model) -> tuple[np.ndarray, ...]:
    """[3 D, D], rows grouped as [q_h | k_h | v_h] for each head h, to three kernels [D, D]."""
    attention = cfg.attention
    grouped = x.reshape(attention.heads, 3, attention.head_dim, x.shape[1])
    return tuple(grouped[:, part].reshape(-1, x.shape[1]).T for part in range(3))


def _pack_heads(parts: tuple[np.ndarray, ...], cfg: Model) -> np.ndarray:
    attention, width = cfg.attention, parts[0].shape[0]
    grouped = [part.T.reshape(attention.heads, attention.head_dim, width) for part in parts]
    return np.stack(grouped, axis=1).reshape(-1, width)


SAME = Transform(lambda x, cfg: (x,), lambda parts, cfg: parts[0])
LINEAR = Transform(lambda x, cfg: (x.T,), lambda parts, cfg: parts[0].T)  # [out, in] to [in, out]
CONV = Transform(lambda x, cfg: (x[:, 0].T,), lambda parts, cfg: parts[0].T[:, None])  # [C, 1, W] to [W, C], same taps
QKV = Transform(_unpack_heads, _pack_heads)


class Entry(NamedTuple):
    """One row of a table; it is skipped for a model that does not have its parameters."""

    theirs: str  # below the layer's prefix, or the whole key outside the layers
    ours: tuple[str, ...]  # below GROUP, or the whole path outside the blocks
    transform: Transform
    keeps_fp32: bool = False  # in files of half precision


class Layout(NamedTuple):
    """A checkpoint format's table."""

    name: str
    layer: str  # prefix of a layer's keys, with {layer}
    frame: tuple[Entry, ...]  # outside the layers
    block: tuple[Entry, ...]  # in every layer
    mixers: dict[str, tuple[Entry, ...]]  # in the layers of a mixer
    unused: tuple[str, ...] = ()  # keys below the layer's prefix that some files hold and no forward pass reads


class Place(NamedTuple):
    """Where one tensor of the checkpoint belongs in a given model."""

    ours: tuple[str, ...]  # names of leaves
    repeat: int | None  # index on the leaves' leading axis; None: the whole leaf
    transform: Transform
    keeps_fp32: bool
    shape: tuple[int, ...]  # of the tensor


def places(layout: Layout, cfg: Model) -> dict[str, Place]:
    """{their key: Place} for every tensor that a checkpoint of this model holds.

    Raises UserError for a mixer or a parameter that the format has no key for.
    """
    leaves = named_leaves(abstract_model(cfg))
    out = {entry.theirs: _place(entry, "", None, leaves, cfg) for entry in layout.frame if entry.ours[0] in leaves}
    for layer in range(cfg.layers):
        repeat, block = divmod(layer, len(cfg.pattern))
        mixer = cfg.pattern[block]
        if mixer not in layout.mixers:
            raise UserError(
                f"The {layout.name} format has no layer for the mixer {mixer!r}; it holds "
                f"{', '.join(layout.mixers)} only."
            )
        for entry in (*layout.block, *layout.mixers[mixer]):
            prefix = GROUP.format(block=block)
            if prefix + entry.ours[0] in leaves:
                key = layout.layer.format(layer=layer) + entry.theirs
                out[key] = _place(entry, prefix, repeat, leaves, cfg)
    homeless = sorted(leaves.keys() - {name for place in out.values() for name in place.ours})
    if homeless:
        raise UserError(
            f"The {layout.name} format has no key for {', '.join(homeless[:4])}"
            f"{f' and {len(homeless) - 4} more' if len(homeless) > 4 else ''}; the model cannot be exchanged in it."
        )
    return out


def _place(entry: Entry, prefix: str, repeat: int | None, leaves: dict[str, jax.ShapeDtypeStruct], cfg: Model) -> Place:
    names = tuple(prefix + name for name in entry.ours)
    shapes = [leaves[name].shape[0 if repeat is None else 1 :] for name in names]
    views = tuple(np.broadcast_to(np.float32(0), shape) for shape in shapes)  # shapes without memory
    return Place(names, repeat, entry.transform, entry.keeps_fp32, entry.transform.write(views, cfg).shape)


def unused_keys(layout: Layout, cfg: Model) -> set[str]:
    """Keys that some files hold although no forward pass reads them."""
    return {layout.layer.format(layer=layer) + key for layer in range(cfg.layers) for key in layout.unused}
