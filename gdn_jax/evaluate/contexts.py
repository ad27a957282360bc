"""When several continuations of one context read that context only once: a cost model decides.

Read alone, k continuations of m tokens after a context of n cost k (n + m) tokens. Read together, they cost n + k m,
and for each continuation a copy of the state that the context leaves, which is read and written once for the copy and
once more in the layers. In that time an H100 could read 18 tokens of gated-deltanet 1.3b (47 MB of states), 39 of
retnet (101 MB), 2 of mamba (5 MB). So each group of pairs is counted, with the padding of both ways: a long context
with short continuations is read once, two continuations of a short question are read alone. Tokens of gated-deltanet
1.3b on whole tasks, with a vocabulary of 32K:

    task             mean context  continuation  all alone    as counted  of them for states
    piqa                       15          24.8      211,232     199,330   13,442
    arc_easy                   30           5.1      477,376     378,609   74,657
    arc_challenge              34           6.8      268,704     200,046   48,318
    boolq                     157           1.0    1,490,112     961,166  111,822
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gdn_jax.config import Model
from gdn_jax.flops import forward_flops_per_token
from gdn_jax.layers import Compute
from gdn_jax.memory import cache_bytes
from gdn_jax.prefill import NARROWEST, cache_room

SHORTEST = 32  # tokens of the first bucket of pairs that are read alone; each next one is twice as long
OPERATIONS_PER_BYTE = 263  # in the same time: an H100's measured 790 TFLOP/s over 3.0 TB/s (pallas_kernels/bench.py)
PASSES = 4  # over a state for each continuation: in and out of its copy, in and out of the layers


class Pair(NamedTuple):
    """A context and its continuation as they are read; pairs sort by length, then by content."""

    size: int  # tokens of both
    tokens: bytes  # int32
    scored: int  # the last ones: the continuation
    cut: int  # tokens of the context that are left out, the earliest ones

    def ids(self) -> np.ndarray:
        return np.frombuffer(self.tokens, np.int32)

    def context(self) -> bytes:
        return self.tokens[: 4 * (self.size - self.scored)]


class Size(NamedTuple):
    """The padded lengths of a group of pairs with one context; groups of one size share a compiled program."""

    context: int  # tokens of the context without its last one, which is read before each continuation
    longest: int  # the same, or more where a continuation is longer


def bucket(length: int) -> int:
    """The padded length of `length` input tokens read alone: the next of 32, 64, 128, ..."""
    return max(SHORTEST, power(max(length, 1), up=True))


def padded(length: int) -> int:
    """The padded length of a context, or of a continuation behind one: the next of 16, 32, 64, ..."""
    return max(NARROWEST, power(length, up=True))


def power(value: int, *, up: bool) -> int:
    """The nearest power of two that is not below the value, or not above it."""
    return 1 << ((value - 1).bit_length() if up else value.bit_length() - 1)


def size_of(group: Sequence[Pair]) -> Size:
    context = padded(group[0].size - group[0].scored - 1)
    return Size(context, max(context, *(padded(pair.scored) for pair in group)))


def room_of(size: Size, cfg: Model) -> int:
    """The max_len of the caches of a group's batch (see LM.init_cache)."""
    return cache_room(cfg, size.context + size.longest)


@functools.cache
def state_bytes(cfg: Model, room: int, compute: Compute) -> int:
    """Bytes of the state that one context leaves behind."""
    return cache_bytes(cfg, 1, room, compute)


@functools.cache
def _operations(cfg: Model, tokens: int) -> float:
    return forward_flops_per_token(cfg, tokens)


def costs_less(group: Sequence[Pair], cfg: Model, compute: Compute) -> bool:
    """Whether the pairs of one context cost less together, in tokens read: padding counts, and states as above."""
    size = size_of(group)
    moved = PASSES * state_bytes(cfg, room_of(size, cfg), compute)
    copy = moved * OPERATIONS_PER_BYTE / _operations(cfg, size.context)
    together = size.context + sum(padded(pair.scored) + copy for pair in group)
    return together < sum(bucket(pair.size - 1) for pair in group)


def divided(pairs: Sequence[Pair], cfg: Model, compute: Compute) -> tuple[list[Pair], list[list[Pair]]]:
    """(pairs to be read alone, groups to be read together), both in the order of the pairs.

    Contexts of one token and empty continuations leave nothing to share; nor does a model with attention over all
    earlier tokens, whose past is no state.
    """
    groups: dict[bytes, list[Pair]] = {}
    for pair in pairs:
        if "attention" not in cfg.pattern and pair.scored and pair.size - pair.scored > 1:
            groups.setdefault(pair.context(), []).append(pair)
    together = [group for group in groups.values() if len(group) > 1 and costs_less(group, cfg, compute)]
    taken = {pair for group in together for pair in group}
    return [pair for pair in pairs if pair not in taken], together


def by_size(groups: Sequence[list[Pair]]) -> dict[Size, list[list[Pair]]]:
    """The groups of each size, the largest size first, those of most continuations ahead."""
    out: dict[Size, list[list[Pair]]] = {}
    for group in sorted(groups, key=len, reverse=True):
        out.setdefault(size_of(group), []).append(group)
    return {size: out[size] for size in sorted(out, reverse=True)}
