"""Prompts of unequal lengths read together, each row as if it were alone.

Prompts of one bucket, a power of two, share a program: rows are padded on the right with tokens that leave no trace in
the cache. A prompt longer than the widest bucket is read in pieces of that width through the carried cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from gdn_jax import sharding
from gdn_jax.config import Model
from gdn_jax.layers import Compute
from gdn_jax.model import LM, check_ids

NARROWEST, WIDEST = 16, 1024  # buckets: seven programs at most, and one that goes on
TOKENS = 16 * 1024  # at most, padding included, that one program reads
ROOM_STEP = 256  # attention caches grow in steps, so that few programs serve all lengths


class ReadPrompts(NamedTuple):
    """What a group of prompts left behind; rows without a prompt hold nothing of meaning."""

    cache: PyTree  # [repeats, R, ...] each
    hidden: Float[Array, "R D"]  # of each row's last token


def bucket(length: int) -> int:
    """The tokens of a piece in which a prompt is read: a power of two in [NARROWEST, WIDEST]."""
    return min(max(1 << (length - 1).bit_length(), NARROWEST), WIDEST)


def rows_at_once(width: int, batch_size: int) -> int:
    """The rows of the program that reads a bucket: the batch's, as far as TOKENS allow. It depends on nothing else, so
    that a prompt is read with the same shapes, and the same roundings, whatever prompts come with it."""
    return max(1, min(batch_size, TOKENS // width))


def groups(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The prompts that are read together, by their places: those of one bucket, in their order, but prompts longer
    than a piece come first, the longest ahead, so that few of a group wait for others."""
    out: list[list[int]] = []
    filling: dict[int, list[int]] = {}
    for place in sorted(range(len(lengths)), key=lambda place: -_pieces(lengths[place])):
        width = bucket(lengths[place])
        if len(filling.get(width, ())) in (0, rows_at_once(width, batch_size)):
            filling[width] = []
            out.append(filling[width])
        filling[width].append(place)
    return out


def _pieces(length: int) -> int:
    return -(-length // bucket(length))


def cache_room(cfg: Model, tokens: int) -> int:
    """The max_len of caches for sequences of at most `tokens`: in steps, and one value for all where no cache grows."""
    room = tokens + -tokens % ROOM_STEP
    if "attention" in cfg.pattern:
        return room
    return min(room, cfg.attention.window) if "swa" in cfg.pattern else 1


def read_prompts(
    model: LM,
    prompts: Sequence[np.ndarray],
    *,
    rows: int,
    room: int,
    compute: Compute,
    say: Callable[[int], None],
    mesh: Mesh | None = None,
) -> ReadPrompts:
    """Reads one group of `groups`, each prompt of at least one token; `say` hears how many tokens each piece had.

    mesh   whose devices share the rows, of which there are a multiple of them; None: the default device
    """
    longest = max(map(len, prompts))
    width, read = bucket(longest), None
    for start in range(0, longest, width):
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, ids in enumerate(prompts):
            part = ids[start : start + width]
            tokens[row, : len(part)], lengths[row] = part, len(part)
        check_ids(tokens, model.config.vocab)
        piece = {"tokens": tokens, "lengths": lengths}
        piece = piece if mesh is None else sharding.place_batch(mesh, piece)
        if read is None:
            read = begin(model, **piece, room=room, compute=compute)
        else:
            read = go_on(model, **piece, read=read, compute=compute)
        say(int(lengths.sum()))
    return read


@functools.partial(jax.jit, static_argnames=("room", "compute"))
def begin(
    model: LM, tokens: Int[Array, "R T"], lengths: Int[Array, "R"], *, room: int, compute: Compute
) -> ReadPrompts:
    """Reads the first piece of each prompt, the first lengths[r] tokens of row r."""
    hidden, cache = model(tokens, compute=compute, lengths=lengths, room=room)
    return ReadPrompts(cache, _last(hidden, lengths))


@functools.partial(jax.jit, static_argnames="compute", donate_argnames="read")
def go_on(
    model: LM, tokens: Int[Array, "R T"], lengths: Int[Array, "R"], read: ReadPrompts, *, compute: Compute
) -> ReadPrompts:
    """Reads the next piece of each prompt; a row whose prompt has ended has length 0 and stays unchanged."""
    hidden, cache = model(tokens, compute=compute, lengths=lengths, cache=read.cache)
    return ReadPrompts(cache, jnp.where(lengths[:, None] > 0, _last(hidden, lengths), read.hidden))


def _last(hidden: Float[Array, "R T D"], lengths: Int[Array, "R"]) -> Float[Array, "R D"]:
    return hidden[jnp.arange(len(hidden)), jnp.maximum(lengths - 1, 0)]
