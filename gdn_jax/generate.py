"""Text from a model: prefill in a few fixed piece sizes, then one jitted loop whose memory does not grow.

Every row of a batch is a sequence of its own, with its own cache and its own random numbers, so a prompt's result does
not depend on the prompts beside it. A recurrent model's cache has constant size; attention's has room for the longest
prompt and max_tokens.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from gdn_jax.continuation import Continuation
from gdn_jax.errors import UserError
from gdn_jax.layers import Compute
from gdn_jax.model import LM
from gdn_jax.progress import Progress
from gdn_jax.tokenizer import Tokenizer

PIECES = (1024, 128, 16, 1)  # a prompt of any length is a sum of these: four programs at most
CACHE_MULTIPLE = 256  # attention caches grow in steps, so that few programs serve all lengths
MIN_TEMPERATURE = 1e-3
MAX_SEED = 2**31  # exclusive


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from logits l: p ~ exp(l / temperature), cut to top_k, then to top_p.

    temperature   0 takes the likeliest token; otherwise at least 0.001
    top_k         the k likeliest tokens only; None: all
    top_p         the fewest likeliest tokens whose probability, after top_k, reaches top_p in (0, 1]
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        temperature = self.temperature
        if not (temperature == 0 or MIN_TEMPERATURE <= temperature < float("inf")):
            raise UserError(
                f"temperature is {temperature}; it must be 0 for the likeliest token, or at least {MIN_TEMPERATURE}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be positive, or left out for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be in (0, 1], 1 for all tokens.")


@dataclass
class Completion:
    """One prompt continued: `finish` is None while it grows, then "stop" (a stop string), "eos" or "length"."""

    prompt: str
    seed: int
    text: str = ""  # without the stop string that ended it
    token_ids: list[int] = field(default_factory=list)  # all generated ones; EOS is not kept
    finish: str | None = None
    fresh: str = ""  # what this step of `stream` added to the text for certain: whole characters


class _Row(NamedTuple):
    """A sequence on the device."""

    cache: PyTree  # of a batch of one
    logits: Float[Array, "vocab"]  # of the next token
    key: Array
    count: Int[Array, ""]  # tokens generated
    done: Bool[Array, ""]  # EOS came, or the host found a stop string
    finite: Bool[Array, ""]  # no logit was infinite or not a number so far


def generate(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stops: Sequence[str] = (),
    compute: Compute | None = None,
) -> list[Completion]:
    """The prompts continued, in their order. Arguments and errors as of `stream`."""
    *_, out = stream(
        model, tokenizer, prompts, max_tokens=max_tokens, sampling=sampling, seeds=seeds, stops=stops,
        compute=compute, chunk=16 if stops else max_tokens,
    )  # fmt: skip
    return out


def stream(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stops: Sequence[str] = (),
    compute: Compute | None = None,
    chunk: int = 16,
    progress: Progress | None = None,
) -> Iterator[list[Completion]]:
    """Continues all prompts together and yields the growing completions after every `chunk` tokens.

    prompts     text, of any lengths; an empty one begins where a document begins, after EOS
    max_tokens  the most tokens added to each; EOS ends a sequence earlier
    seeds       one for each prompt, in [0, 2^31); default 0. Token n of a prompt depends on its seed and n alone
    stops       strings that end a sequence where they would begin
    progress    where the reading of the prompts shows itself; None: on stderr
    Raises UserError for arguments outside these rules, a tokenizer larger than the model's vocabulary, and logits
    that are not finite.
    """
    sampling = Sampling() if sampling is None else sampling
    compute = Compute() if compute is None else compute
    seeds = [0] * len(prompts) if seeds is None else list(seeds)
    _check(model, tokenizer, prompts, max_tokens, seeds, stops, chunk)
    encoded = [tokenizer.encode(prompt) if prompt else np.array([tokenizer.eos], np.int32) for prompt in prompts]
    room = max(map(len, encoded)) + max_tokens
    room += -room % CACHE_MULTIPLE
    vocab = min(tokenizer.vocab, model.config.vocab)
    rows, total, read = [], sum(map(len, encoded)), 0

    with progress or Progress() as display:

        def say(tokens: int) -> None:
            nonlocal read
            read += tokens
            display.show(f"Read {read:,} of {total:,} prompt tokens.")

        for ids, seed in zip(encoded, seeds, strict=True):
            rows.append(_prefill(model, ids, seed, room, compute, say))
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    out = [Completion(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    texts = [Continuation(tokenizer, ids, stops) for ids in encoded]
    left = max_tokens
    while left:
        count = min(chunk, left)
        rows, tokens = _decode(
            model, rows, count, size=chunk, compute=compute, sampling=sampling, vocab=vocab, eos=tokenizer.eos
        )
        left -= count
        tokens = np.asarray(tokens)
        if not bool(np.all(rows.finite)):
            raise UserError(
                "The model's logits are not finite: its parameters have diverged; take an earlier checkpoint or train "
                "again with a smaller optim.lr."
            )
        for completion, text, ids in zip(out, texts, tokens, strict=True):
            _extend(completion, text, ids[:count], tokenizer.eos, last=left == 0)
        yield out
        if all(completion.finish for completion in out):
            return
        rows = rows._replace(done=jnp.array([completion.finish is not None for completion in out]))


def _extend(completion: Completion, text: Continuation, ids: np.ndarray, eos: int, *, last: bool) -> None:
    """Appends a chunk's tokens up to the end of the sequence."""
    completion.fresh = ""
    if completion.finish:
        return
    for index in ids.tolist():
        if index == eos:
            completion.finish = "eos"
            break
        completion.token_ids.append(index)
        completion.fresh += text.add(index)
        if text.stopped:
            completion.finish = "stop"
            break
    if last and not completion.finish:
        completion.finish = "length"
    if completion.finish:
        completion.fresh += text.finish()
        if text.stopped:  # the characters held back to the end may complete a stop string
            completion.finish = "stop"
    completion.text += completion.fresh


def _check(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    seeds: Sequence[int],
    stops: Sequence[str],
    chunk: int,
) -> None:
    if not prompts:
        raise UserError("There is no prompt; give one at least, '' to begin a document.")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"The prompt {prompt[:40]!a} is not valid UTF-8; pass it in UTF-8.") from None
    for name, value in (("max_tokens", max_tokens), ("chunk", chunk)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be positive.")
    if len(seeds) != len(prompts):
        raise UserError(f"There are {len(seeds)} seeds for {len(prompts)} prompts; give one for each.")
    for seed in seeds:
        if not 0 <= seed < MAX_SEED:
            raise UserError(f"seed is {seed}; it must be in [0, 2^31).")
    if any(not stop for stop in stops):
        raise UserError("A stop string is empty and would stop everything; leave it out.")
    if tokenizer.vocab > model.config.vocab:
        raise UserError(
            f"Tokenizer {tokenizer.name!r} has {tokenizer.vocab} tokens but the model's vocabulary is "
            f"{model.config.vocab}; use the tokenizer that it was trained with."
        )


def _prefill(model: LM, ids: np.ndarray, seed: int, room: int, compute: Compute, say: Callable[[int], None]) -> _Row:
    """The row of a prompt, read in pieces: each continues the cache of those before."""
    cache, hidden, start = _empty_cache(model, room, compute), None, 0
    for size in PIECES:
        while len(ids) - start >= size:
            hidden, cache = _read(model, jnp.asarray(ids[None, start : start + size]), cache, compute=compute)
            start += size
            say(size)
    logits = _logits(model, hidden)
    zero = jnp.zeros((), jnp.int32)
    return _Row(cache, logits, jax.random.key(seed), zero, jnp.zeros((), bool), jnp.isfinite(logits).all())


@functools.partial(jax.jit, static_argnames=("room", "compute"))
def _empty_cache(model: LM, room: int, compute: Compute) -> PyTree:
    return model.init_cache(1, room, compute)


@functools.partial(jax.jit, static_argnames="compute", donate_argnames="cache")
def _read(model: LM, tokens: Int[Array, "1 T"], cache: PyTree, *, compute: Compute) -> tuple[Array, PyTree]:
    """(hidden state of the last token [D], new cache)."""
    hidden, cache = model(tokens, compute=compute, cache=cache)
    return hidden[0, -1], cache


@jax.jit
def _logits(model: LM, hidden: Float[Array, "D"]) -> Float[Array, "vocab"]:
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnames=("size", "compute", "sampling", "vocab", "eos"), donate_argnames="rows")
def _decode(
    model: LM,
    rows: _Row,
    count: Int[Array, ""],
    *,
    size: int,
    compute: Compute,
    sampling: Sampling,
    vocab: int,
    eos: int,
) -> tuple[_Row, Int[Array, "B size"]]:
    """(rows, the next `count` <= size tokens of each), fewer when all rows are done; the rest of size stays EOS."""

    def step(row: _Row) -> tuple[_Row, Array]:
        token = sample(row.logits[:vocab], jax.random.fold_in(row.key, row.count), sampling)
        hidden, cache = model(token[None, None], compute=compute, cache=row.cache)
        logits = model.logits(hidden[0, -1])
        finite = row.finite & (row.done | jnp.isfinite(logits).all())
        return _Row(cache, logits, row.key, row.count + 1, row.done | (token == eos), finite), token

    def unfinished(carry: tuple) -> Array:
        made, rows, _ = carry
        return (made < count) & ~rows.done.all()

    def body(carry: tuple) -> tuple:
        made, rows, tokens = carry
        rows, token = jax.vmap(step)(rows)
        return made + 1, rows, tokens.at[:, made].set(token)

    tokens = jnp.full((rows.done.shape[0], size), eos, jnp.int32)
    _, rows, tokens = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), rows, tokens))
    return rows, tokens


def sample(logits: Float[Array, "vocab"], key: Array, sampling: Sampling) -> Int[Array, ""]:
    """One token id; equal logits rank by id."""
    if sampling.temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    scaled = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    order = jnp.argsort(-scaled, stable=True)
    ranked = scaled[order]
    if sampling.top_k is not None:
        ranked = jnp.where(jnp.arange(ranked.size) < sampling.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability  # of the likelier tokens; 0 for the first, so one is always kept
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)
