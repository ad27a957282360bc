"""Length extrapolation: loss by position in documents far beyond the training length, the paper's Figure 2.

The paper does not give its protocol. Both usual ones are here: the mean over a document's first L tokens, and over
buckets of positions (flash-linear-attention, evals/ppl.py).
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from gdn_jax.errors import UserError
from gdn_jax.layers import Compute
from gdn_jax.model import LM, check_ids
from gdn_jax.progress import Progress
from pallas_kernels.linear_cross_entropy import token_nll

LENGTHS = (4096, 8192, 12288, 16384, 20480)
BUCKET = 2048
PIECE = 2048  # tokens read at once


class Piece(NamedTuple):
    """The next tokens of a batch of sequences."""

    inputs: np.ndarray  # [B, piece] int32
    targets: np.ndarray  # [B, piece] int32
    start: int  # position of the first target
    count: int  # targets that count; what follows fills up the last piece


def length_extrapolation(
    model: LM,
    documents: Iterable[np.ndarray],
    *,
    eos: int,
    lengths: Sequence[int] = LENGTHS,
    bucket: int = BUCKET,
    piece: int = PIECE,
    batch_size: int = 1,
    limit: int | None = None,
    compute: Compute,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Cross entropy of the first tokens of long documents, in nats per token.

        prefix(L) = mean over sequences and i < L of -log p(x_i | eos, x_0 ... x_{i-1})
        bucket(b) = the same over b width <= i < (b + 1) width

    documents   token ids of each; arrays larger than memory (np.memmap) are read piece by piece. One of at least
                max(lengths) tokens is a sequence, its rest is not read. Shorter ones are joined in their order, EOS
                between them, until they reach max(lengths); what remains at the end is left out
    bucket      width of the buckets; the last one ends at max(lengths)
    piece       a sequence is read in pieces of so many tokens, each continuing the model's cache: a recurrent model's
                memory does not grow with the length. Attention keeps max(lengths) keys, and sees positions beyond its
                training without any scaling
    limit       most sequences; None: all

    Returns lengths and buckets as lists of {start, stop, nll, perplexity}, sequences, documents in them, of which
    joined, documents left out (read but in no sequence; 0 where `limit` ended the reading), and the options. Every
    sequence has all tokens of every length, so means are weighted by tokens.
    Raises UserError for options out of range, documents too short together, and losses that are not finite.
    """
    lengths = sorted(set(lengths))
    _check(lengths, bucket=bucket, piece=piece, batch_size=batch_size, limit=limit)
    size = lengths[-1]
    edges = sorted({*range(0, size, bucket), *lengths, size})
    sums = np.zeros(len(edges) - 1)
    read = Sequences(documents, size, eos, limit)
    done = 0
    with progress or Progress() as display:
        for batch in _batches(read, batch_size):
            cache = _empty_cache(model, batch_size, size + -size % piece, compute)
            for part in _pieces(batch, batch_size, size, piece, eos):
                check_ids(part.inputs, model.config.vocab)
                check_ids(part.targets, model.config.vocab)
                nll, cache = _read(model, jnp.asarray(part.inputs), jnp.asarray(part.targets), cache, compute=compute)
                losses = np.asarray(nll, np.float64)[: len(batch), : part.count]
                if not np.isfinite(losses).all():
                    raise UserError(
                        f"A loss among tokens {part.start:,} to {part.start + part.count:,} of sequences {done} to "
                        f"{done + len(batch) - 1} is not finite: the parameters have diverged, or this length is too "
                        f"much for them; take an earlier checkpoint, or smaller lengths."
                    )
                where = np.searchsorted(edges, part.start + np.arange(part.count), "right") - 1
                sums += np.bincount(where, losses.sum(0), len(sums))
                display.show(f"Read {part.start + part.count:,} of {size:,} tokens of sequence {done + 1:,}.")
            done += len(batch)
    if not done:
        raise UserError(
            f"The {read.documents} documents have {read.tokens:,} tokens together, fewer than the {size:,} of one "
            f"sequence; give more text or smaller lengths."
        )
    until = dict(zip(edges[1:], np.cumsum(sums), strict=True)) | {0: 0.0}

    def mean(start: int, stop: int) -> dict[str, float | int | None]:
        nll = float(until[stop] - until[start]) / (done * (stop - start))
        return {"start": start, "stop": stop, "nll": nll, "perplexity": math.exp(nll) if nll < 700 else None}

    return {
        "lengths": [mean(0, length) for length in lengths],
        "buckets": [mean(start, min(start + bucket, size)) for start in range(0, size, bucket)],
        "sequences": done,
        "documents": read.documents,
        "joined": read.joined,
        "left_out": read.left_out,
        "bucket": bucket,
        "piece": piece,
    }


class Sequences:
    """The documents as sequences of at least `size` tokens each, and a count of what was read for them."""

    def __init__(self, documents: Iterable[np.ndarray], size: int, eos: int, limit: int | None):
        self._documents, self._size, self._eos, self._limit = documents, size, eos, limit
        self.documents = 0  # in the sequences; all that were read where there is no sequence
        self.joined = 0  # of them, those that share a sequence with others
        self.left_out = 0  # empty ones, and those that were too few at the end; known when all are read
        self.tokens = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        short, length, made = [], 0, 0
        read = 0
        for document in self._documents:
            if made == self._limit:
                return
            read += 1
            self.tokens += len(document)
            if len(document) >= self._size:
                self.documents += 1
                made += 1
                yield document
                continue
            short += [document[:], np.array([self._eos])] if len(document) else []
            length += len(document) + 1 if len(document) else 0
            if length - 1 >= self._size:  # the last EOS is of no document's inside
                self.documents += len(short) // 2
                self.joined += len(short) // 2
                made += 1
                yield np.concatenate(short)
                short, length = [], 0
        if not made:
            self.documents = read
        self.left_out = read - self.documents


def _batches(sequences: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch = []
    for sequence in sequences:
        batch.append(sequence)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _pieces(batch: Sequence[np.ndarray], rows: int, size: int, piece: int, eos: int) -> Iterator[Piece]:
    """The batch's first `size` tokens, piece by piece; EOS stands before them, and in rows and places that fill up."""
    last = np.full(rows, eos, np.int32)
    for start in range(0, size, piece):
        count = min(piece, size - start)
        targets = np.full((rows, piece), eos, np.int32)
        for row, sequence in enumerate(batch):
            targets[row, :count] = sequence[start : start + count]
        inputs = np.concatenate([last[:, None], targets[:, :-1]], axis=1)
        last = targets[:, -1].copy()
        yield Piece(inputs, targets, start, count)


@functools.partial(jax.jit, static_argnames=("batch", "room", "compute"))
def _empty_cache(model: LM, batch: int, room: int, compute: Compute) -> PyTree:
    return model.init_cache(batch, room, compute)


@functools.partial(jax.jit, static_argnames="compute", donate_argnames="cache")
def _read(
    model: LM, inputs: Int[Array, "B T"], targets: Int[Array, "B T"], cache: PyTree, *, compute: Compute
) -> tuple[Float[Array, "B T"], PyTree]:
    """(-log p of each target, the cache behind the inputs)."""
    hidden, cache = model(inputs, compute=compute, cache=cache)
    return token_nll(hidden, model.head_kernel(), targets), cache


def _check(lengths: Sequence[int], **positive: int | None) -> None:
    if not lengths or lengths[0] < 1:
        raise UserError(f"lengths are {list(lengths)}; give one at least, all positive.")
    for name, value in positive.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be positive.")
