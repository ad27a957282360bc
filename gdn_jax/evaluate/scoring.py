"""Log-likelihoods of token sequences, on which perplexity, tasks and tables are built.

Requests of any lengths are sorted into buckets, one compiled program each, and padded on the right, which no causal
model sees. A context that several continuations share is read once where that costs less (contexts.py). Logits exist
for a few thousand tokens at a time; a token's terms are fp32, their sums float64 on the host.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from gdn_jax import sharding
from gdn_jax.errors import UserError
from gdn_jax.evaluate.contexts import Pair, bucket, by_size, divided, padded, power, room_of, state_bytes
from gdn_jax.evaluate.dealt import of_all, turns
from gdn_jax.layers import Compute, at_least_fp32, dot_precision
from gdn_jax.model import LM
from gdn_jax.prefill import read_prompts
from gdn_jax.progress import Progress
from pallas_kernels import dispatch

HEAD_TOKENS = 4096  # whose logits exist at once
BATCH_TOKENS = 32768  # of a device's part of a batch, padding included
STATE_BYTES = 4 * 2**30  # on a device, of the states that a batch of contexts leaves; the copies take as much

Tokens = Sequence[int] | np.ndarray


class Score(NamedTuple):
    """The log-likelihood of a continuation, and whether greedy decoding would write it."""

    log_likelihood: float  # sum of log p(token | all before it), nats
    greedy: bool  # every token is the likeliest one
    tokens: int  # scored
    cut: int  # context tokens left out, the earliest ones, so that the rest fits max_length


class Scorer:
    """A model on all local devices, ready to score.

    max_length    most tokens the model reads at once: a longer context loses its beginning
    batch_tokens  most tokens of a device's part of a batch; at least one row a device is read
    full_batches  whether a batch has all the rows that batch_tokens allow, also where fewer are asked for. None: in
                  bf16 on a GPU. A product with another number of rows may add in another order there, and what bf16
                  rounds otherwise moved a token's log-likelihood by up to 3e-2; so one program reads one pair or many
    context       devices that share the tokens of each row, for rows that one cannot hold
    """

    def __init__(
        self, model: LM, *, compute: Compute, max_length: int, batch_tokens: int = BATCH_TOKENS,
        full_batches: bool | None = None, devices: Sequence[jax.Device] | None = None, context: int = 1,
    ):  # fmt: skip
        for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be positive.")
        self.max_length, self.compute, self._batch_tokens = max_length, compute, batch_tokens
        self._mesh = sharding.make_mesh(1, list(devices or jax.local_devices()), context=context)
        self._model = sharding.copied(self._mesh, model)
        rounds = jnp.dtype(compute.dtype).itemsize < 4 and self._mesh.devices.flat[0].platform != "cpu"
        self._full = rounds if full_batches is None else full_batches

    def score(
        self,
        contexts: Sequence[Tokens],
        continuations: Sequence[Tokens],
        *,
        progress: Progress | None = None,
        done: Callable[[dict[int, Score]], None] | None = None,
    ) -> list[Score]:
        """log p(continuation | context) for each pair, in the order given.

        contexts       at least one token each: a model says nothing of a first token
        continuations  at most max_length tokens each; an empty one has likelihood 1
        done           is given the scores of each batch by their index, so that an interrupted evaluation can go on

        A pair's score depends neither on the order nor on the pairs beside it, but for rounding. Several processes must
        all call it with the same pairs: each reads some of the batches, which are those of one process.
        Raises UserError for a pair outside these rules, or a log-likelihood that is not finite.
        """
        pairs = [self._cut(i, *pair) for i, pair in enumerate(zip(contexts, continuations, strict=True))]
        todo: dict[Pair, list[int]] = {}  # equal pairs are scored once
        for i, pair in enumerate(pairs):
            todo.setdefault(pair, []).append(i)
        # Sorted by content, so that any order of requests makes the same batches; the longest first.
        alone, together = divided(sorted(todo, reverse=True), self._model.config, self.compute)
        own: dict[int, Score] = {}

        def read() -> dict[int, Score]:
            mine = turns()
            with progress or Progress() as display, jax.set_mesh(self._mesh):
                for batch in itertools.chain(self._alone(alone, mine), self._together(together, mine)):
                    found = {i: score for pair, score in batch.items() for i in todo[pair]}
                    own.update(found)
                    if done is not None:
                        done(found)
                    display.show(f"Scored {len(own):,} of {len(pairs):,} continuations.")
            return own

        every = {i: Score(*score) for i, score in of_all(pairs, read).items()}
        if done is not None and (others := {i: score for i, score in every.items() if i not in own}):
            done(others)
        return [every[i] for i in range(len(pairs))]

    def rolling(
        self, texts: Sequence[Tokens], *, prefix: int, progress: Progress | None = None,
        done: Callable[[dict[int, Score]], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        """log p(text) for each: blocks of max_length tokens side by side, every token scored once.

        The first token is given `prefix`, what documents follow in training; each later block is given the one token
        before it, the last one as many as fit max_length. So the number depends on max_length: name it beside the
        number. The blocks are those of lm-evaluation-harness (get_rolling_token_windows, context_len 1).
        """
        blocks = [(i, start) for i, text in enumerate(texts) for start in range(0, len(text), self.max_length)]
        parts = [texts[i][start : start + self.max_length] for i, start in blocks]
        contexts = [
            texts[i][start + len(part) - self.max_length - 1 : start] if start else [prefix]
            for (i, start), part in zip(blocks, parts, strict=True)
        ]
        found: list[list[Score]] = [[] for _ in texts]
        left = [-(-len(text) // self.max_length) for text in texts]

        def whole(i: int) -> Score:
            total = math.fsum(score.log_likelihood for score in found[i])
            return Score(total, all(score.greedy for score in found[i]), len(texts[i]), 0)

        def blocks_done(scores: dict[int, Score]) -> None:
            ended = []
            for index, score in scores.items():
                i = blocks[index][0]
                found[i].append(score)
                left[i] -= 1
                ended += [] if left[i] else [i]
            if done is not None and ended:
                done({i: whole(i) for i in ended})

        if done is not None and (empty := {i: whole(i) for i, count in enumerate(left) if not count}):
            done(empty)
        self.score(contexts, parts, progress=progress, done=blocks_done)
        return [whole(i) for i in range(len(texts))]

    def _cut(self, i: int, context: Tokens, continuation: Tokens) -> Pair:
        """The pair as it is read, or a UserError."""
        if not len(context):
            raise UserError(f"Context {i} is empty; give at least the token that begins a document.")
        if len(continuation) > self.max_length:
            raise UserError(
                f"Continuation {i} has {len(continuation)} tokens, more than max_length {self.max_length}; raise it, "
                f"or score the text with rolling windows."
            )
        tokens = np.concatenate([np.asarray(context, np.int32), np.asarray(continuation, np.int32)])
        vocab = self._model.config.vocab
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise UserError(
                f"Pair {i} holds token {tokens.max() if tokens.max() >= vocab else tokens.min()}, outside the model's "
                f"vocabulary of {vocab}; use the tokenizer that it was trained with."
            )
        cut = max(0, len(tokens) - 1 - self.max_length)
        return Pair(len(tokens) - cut, tokens[cut:].tobytes(), len(continuation), cut)

    def _alone(self, pairs: Sequence[Pair], mine: Iterator[bool]) -> Iterator[dict[Pair, Score]]:
        """Batches of pairs of one bucket, each read whole; of all of them those that are `mine`."""
        program = functools.partial(token_scores, self._model, compute=self.compute)
        for length, of_bucket in itertools.groupby(pairs, key=lambda pair: bucket(pair.size - 1)):
            members = list(of_bucket)
            rows = self._rows(length, len(members))
            for batch in _batches(members, rows, mine):
                yield self._batch(program, {row: (pair, pair.size) for row, pair in enumerate(batch)}, rows, length)

    def _together(self, groups: Sequence[list[Pair]], mine: Iterator[bool]) -> Iterator[dict[Pair, Score]]:
        """Batches of contexts, each read but for its last token; then from their states one continuation of each after
        the other, with that token before it."""
        # with full batches a neighbour's longer continuations must not choose another program
        lengths = lambda group: [padded(pair.scored) for pair in group] if self._full else []  # noqa: E731
        alike = [
            (size, list(members))
            for size, sized in by_size(groups).items()
            for _, members in itertools.groupby(sorted(sized, key=lengths), lengths)
        ]
        for size, members in alike:
            room = room_of(size, self._model.config)
            rows = self._rows(size.longest, len(members), state_bytes(self._model.config, room, self.compute))
            for batch in _batches(members, rows, mine):
                read = read_prompts(
                    self._model, [np.frombuffer(group[0].context(), np.int32)[:-1] for group in batch], rows=rows,
                    room=room, compute=self.compute, mesh=self._mesh, say=lambda tokens: None,
                )  # fmt: skip
                program = functools.partial(continuation_scores, self._model, read.cache, compute=self.compute)
                for turn in range(max(map(len, batch))):
                    pairs = {row: group[turn] for row, group in enumerate(batch) if turn < len(group)}
                    asked = {row: (pair, 1 + pair.scored) for row, pair in pairs.items()}
                    yield self._batch(program, asked, rows, padded(max(pair.scored for pair in pairs.values())))

    def _rows(self, length: int, wanted: int, state: int = 0) -> int:
        """Rows of a batch of this length: a power of two times the devices, no more than needed unless batches are
        full, and where each has a state of so many bytes no more than there is room for."""
        devices = sharding.row_parts(self._mesh)
        most = max(1, self._batch_tokens // length)
        most = power(max(1, min(most, STATE_BYTES // state)) if state else most, up=False)
        return devices * (most if self._full else min(most, power(-(-wanted // devices), up=True)))

    def _batch(
        self, program: Callable, asked: dict[int, tuple[Pair, int]], rows: int, length: int
    ) -> dict[Pair, Score]:
        """The program's scores of pairs by their rows, each with how many of its last tokens are given to it."""
        tokens = np.zeros((rows, length + 1), np.int32)
        for row, (pair, count) in asked.items():
            tokens[row, :count] = pair.ids()[-count:]
        placed = sharding.place_batch(self._mesh, {"tokens": tokens})["tokens"]
        nll, likeliest = map(np.asarray, program(placed))
        out = {}
        for row, (pair, count) in asked.items():
            last = slice(count - 1 - pair.scored, count - 1)
            total = -float(nll[row, last].sum(dtype=np.float64))
            if not math.isfinite(total):
                raise UserError(
                    f"A log-likelihood is {total}: the model's parameters have diverged; take an earlier checkpoint."
                )
            out[pair] = Score(total, bool(likeliest[row, last].all()), pair.scored, pair.cut)
        return out


def _batches(members: Sequence, size: int, mine: Iterator[bool]) -> Iterator[Sequence]:
    return (members[start : start + size] for start in range(0, len(members), size) if next(mine))


@functools.partial(jax.jit, static_argnames="compute")
def token_scores(
    model: LM, tokens: Int[Array, "B T+1"], compute: Compute
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """For tokens 1..T of each row: -log p given those before, fp32, and whether it is the likeliest.

    Logits [B, c, vocab] exist for about HEAD_TOKENS tokens at a time.
    """
    hidden, _ = model(sharding.split_tokens(tokens[:, :-1]), compute=compute)
    return _of_targets(model, hidden, sharding.split_tokens(tokens[:, 1:]))


@functools.partial(jax.jit, static_argnames="compute")
def continuation_scores(
    model: LM, cache: PyTree, tokens: Int[Array, "B T+1"], compute: Compute
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """token_scores of rows that continue a cache, which is left as it is."""
    hidden, _ = model(tokens[:, :-1], compute=compute, cache=cache)
    return _of_targets(model, hidden, tokens[:, 1:])


def _of_targets(
    model: LM, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    kernel, token = model.head_kernel().astype(hidden.dtype), ("batch", "tokens")
    if not dispatch.splits_tokens(targets.shape[1]):
        return _of_rows(hidden, kernel, targets)
    return dispatch.shard(
        _of_rows, (hidden, kernel, targets), ((*token, None), (None, None), token), (token, token)
    )  # fmt: skip


def _of_rows(
    hidden: Float[Array, "B T D"], kernel: Float[Array, "D vocab"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    B, T = targets.shape
    precision = dot_precision(hidden.dtype)
    slices = _divisor(T, max(1, HEAD_TOKENS // B))

    def of_slice(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        logits = jnp.matmul(hidden, kernel, precision=precision, preferred_element_type=at_least_fp32(hidden.dtype))
        top = logits.max(axis=-1)
        log_total = top + jnp.log(jnp.exp(logits - top[..., None]).sum(axis=-1))
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return log_total - own, jnp.argmax(logits, axis=-1) == targets

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(B, T // slices, slices, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(of_slice, (cut(hidden), cut(targets)))
    nll, likeliest = (jnp.moveaxis(part, 0, 1).reshape(B, T) for part in parts)
    return nll, likeliest


def _divisor(length: int, most: int) -> int:
    """The largest divisor of `length` that is at most `most`."""
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)
