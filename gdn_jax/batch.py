"""The rows of a batch and the prompts that pass through them: read in groups, placed where a row is free."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gdn_jax.decode import decode, idle_rows, layers_of, place
from gdn_jax.layers import Compute
from gdn_jax.model import LM
from gdn_jax.prefill import ReadPrompts, bucket, cache_room, groups, read_prompts, rows_at_once
from gdn_jax.sampling import Sampling


class Chunk(NamedTuple):
    """Tokens that the device was asked for, and which prompt each row continues (None for an empty row)."""

    tokens: jax.Array  # [B, steps]
    finite: jax.Array  # [B, steps]
    prompts: tuple[int | None, ...]

    def sequences(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(prompt, its tokens, whether they were drawn from finite logits), once the device has written them."""
        tokens, finite = np.asarray(self.tokens), np.asarray(self.finite)
        return ((which, tokens[row], finite[row]) for row, which in enumerate(self.prompts) if which is not None)


class Batch:
    """The rows on the device, and the prompts that are in them, read, and still to be read."""

    def __init__(
        self,
        model: LM,
        encoded: Sequence[np.ndarray],
        seeds: Sequence[int],
        *,
        batch_size: int,
        max_tokens: int,
        chunk: int,
        compute: Compute,
        sampling: Sampling,
        vocab: int,
    ):
        self._model, self._encoded, self._seeds, self._compute = model, encoded, seeds, compute
        self._max_tokens = max_tokens
        self._steps = -(-max_tokens // -(-max_tokens // chunk))  # chunks of one size, as few as can be
        self._decode = functools.partial(decode, steps=self._steps, compute=compute, sampling=sampling, vocab=vocab)
        self._room = cache_room(model.config, max(map(len, encoded)) + max_tokens)
        self._groups = groups([len(ids) for ids in encoded], batch_size)
        self._waiting: list[tuple[int, int]] = []  # (row of self._read, prompt)
        self._read: ReadPrompts | None = None
        self._prompts: list[int | None] = [None] * batch_size  # of each row
        self._asked = [0] * batch_size  # tokens of each row's sequence
        self._layers = layers_of(model)
        self.rows = idle_rows(model, batch_size=batch_size, room=self._room, compute=compute)

    def fill(self, say: Callable[[int], None]) -> None:
        """Gives every free row the next prompt, reading prompts where none is waiting."""
        free = [row for row, which in enumerate(self._prompts) if which is None]
        while free and (self._waiting or self._groups):
            if not self._waiting:
                self._read_next_group(say)
            count = min(len(free), len(self._waiting))
            taken, self._waiting = self._waiting[:count], self._waiting[count:]
            size = len(self._prompts)
            sources, targets, seeds = np.zeros(size, np.int32), np.full(size, size, np.int32), np.zeros(size, np.int32)
            for n, (source, which) in enumerate(taken):
                sources[n], targets[n], seeds[n] = source, free[n], self._seeds[which]
                self._prompts[free[n]], self._asked[free[n]] = which, 0
            self.rows = place(self._model, self.rows, self._read, sources, targets, seeds)
            free = free[count:]
        if not self._waiting:
            self._read = None

    def _read_next_group(self, say: Callable[[int], None]) -> None:
        group = self._groups.pop(0)
        prompts = [self._encoded[which] for which in group]
        self._read = None  # its memory is for the next one
        rows = rows_at_once(bucket(len(prompts[0])), len(self._prompts))
        self._read = read_prompts(self._model, prompts, rows=rows, room=self._room, compute=self._compute, say=say)
        self._waiting = list(enumerate(group))

    def launch(self) -> Chunk | None:
        """Asks the device for a chunk of tokens, unless every sequence has been asked for all of its own."""
        growing = [row for row, which in enumerate(self._prompts) if which is not None]
        if all(self._asked[row] >= self._max_tokens for row in growing):
            return None
        self.rows, tokens, finite = self._decode(self._model, self._layers, self.rows)
        for row in growing:
            self._asked[row] += self._steps
        return Chunk(tokens, finite, tuple(self._prompts))

    def free(self, which: int) -> None:
        """Frees the row of a prompt whose sequence has ended."""
        self._prompts[self._prompts.index(which)] = None
