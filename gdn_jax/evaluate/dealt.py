"""An evaluation that several processes share: batches are dealt out in turn, so that each is one of one process."""

import hashlib
import itertools
import json
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

from gdn_jax import distributed


def turns() -> Iterator[bool]:
    """For one batch after the other whether it is this process's."""
    index, count = jax.process_index(), jax.process_count()
    return (number % count == index for number in itertools.count())


def of_all(requests: Any, own: Callable[[], dict[Hashable, Any]]) -> dict[Hashable, Any]:
    """What all processes have found together, each by own(): what JSON can hold, by its number or text.

    All must call it. Raises UserError where their requests, which decide the batches, are not the same.
    """
    if distributed.alone():
        return own()
    distributed.agree({"requests": hashlib.sha256(repr(requests).encode()).hexdigest()[:8]})
    parts = distributed.gathered(json.dumps(list(distributed.on_every(own).items())))
    return {key: value for part in parts for key, value in json.loads(part)}
