"""Text from a model: the one engine behind `gdn generate`, evaluations and notebooks.

Prompts are read in groups (prefill.py) and continued in the rows of a batch (batch.py, decode.py); a row whose sequence
has ended takes the next prompt. The device writes a chunk of tokens while the host turns the chunk before into text.
Every row has its own cache and its own random numbers, so a prompt's result does not depend on the prompts beside it.
A recurrent model's cache has constant size; attention's has room for the longest prompt and max_tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from gdn_jax.batch import Batch, Chunk
from gdn_jax.continuation import Continuation
from gdn_jax.errors import UserError
from gdn_jax.half_characters import half_character
from gdn_jax.layers import Compute
from gdn_jax.memory import check_fits, free_bytes
from gdn_jax.model import LM, for_inference
from gdn_jax.progress import Progress
from gdn_jax.sampling import Sampling
from gdn_jax.tokenizer import Tokenizer

BATCH = 64  # rows at most, unless the caller says otherwise
CHUNK = 16  # tokens between two looks at what ended
MAX_SEED = 2**31  # exclusive


@dataclass
class Completion:
    """A prompt and its continuation; `finish`: None while it grows, then "stop" (a stop string), "eos" or "length"."""

    prompt: str
    seed: int
    text: str = ""  # without the stop string that ended it
    token_ids: list[int] = field(default_factory=list)  # all generated ones; EOS is not kept
    finish: str | None = None
    fresh: str = ""  # what this step of `stream` added to the text for certain: whole characters


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
    batch_size: int | None = None,
) -> list[Completion]:
    """Continues the prompts and returns their completions in the same order. Arguments and errors: see `stream`."""
    *_, out = stream(
        model, tokenizer, prompts, max_tokens=max_tokens, sampling=sampling, seeds=seeds, stops=stops,
        compute=compute, batch_size=batch_size,
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
    batch_size: int | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Iterator[list[Completion]]:
    """Continues the prompts and yields all their completions, begun or not, after every chunk of tokens.

    model       a caller that keeps the result of `model.for_inference` has its parameters cast once, not in each call
    prompts     text, of any lengths; one of no token ("", and for SentencePiece's defaults " ") begins where a document
                begins, after EOS
    max_tokens  the most tokens added to each; EOS ends a sequence earlier
    seeds       one for each prompt, in [0, 2^31); default 0. Token n of a prompt depends on its seed and n alone
    stops       strings that end a sequence where they would begin
    batch_size  rows that are continued together; a row whose sequence has ended takes the next prompt. None: as many
                as there are prompts, at most 64. It decides the shapes of the arithmetic: with another one a logit may
                differ by a rounding
    chunk       most tokens of each sequence between two yields
    progress    where the reading of the prompts shows itself; None: on stderr
    Raises UserError for arguments outside these rules, a tokenizer larger than the model's vocabulary, more than the
    device's free memory holds, and logits that are not finite.
    """
    for name, texts in (("prompts", prompts), ("stops", stops)):
        if isinstance(texts, str):
            raise UserError(f"{name} is the text {texts[:20]!r}; pass a list of {name}: [{texts[:20]!r}].")
    sampling = Sampling() if sampling is None else sampling
    compute = Compute() if compute is None else compute
    seeds = [0] * len(prompts) if seeds is None else list(seeds)
    _check(model, tokenizer, prompts, max_tokens, seeds, stops, batch_size, chunk)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    encoded = [ids if len(ids) else np.array([tokenizer.eos], np.int32) for ids in encoded]
    batch_size = min(len(prompts), BATCH) if batch_size is None else batch_size
    progress, total, read = progress or Progress(), sum(map(len, encoded)), 0

    def say(tokens: int) -> None:
        nonlocal read
        read += tokens
        progress.show(f"Read {read:,} of {total:,} prompt tokens.")

    model = for_inference(model, compute.dtype)  # under its old name, so that what was wider can be freed
    check_fits(
        model.config, [len(ids) for ids in encoded], max_tokens=max_tokens, batch_size=batch_size,
        compute=compute, free=free_bytes(),
    )  # fmt: skip
    batch = Batch(
        model, encoded, seeds, batch_size=batch_size, max_tokens=max_tokens,
        chunk=chunk, compute=compute, sampling=sampling, vocab=min(tokenizer.vocab, model.config.vocab),
    )  # fmt: skip
    out = [Completion(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    texts = [Continuation(tokenizer, ids, stops) for ids in encoded]
    in_flight: Chunk | None = None
    while not all(completion.finish for completion in out):
        with progress:
            batch.fill(say)
        following = batch.launch()
        if in_flight is not None:
            for completion in out:
                completion.fresh = ""
            for which, ids, finite in in_flight.sequences():
                if out[which].finish:
                    continue
                used = _extend(out[which], texts[which], ids, tokenizer.eos, max_tokens)
                if not finite[:used].all():
                    raise UserError(
                        "The model's logits are not finite: its parameters have diverged; take an earlier checkpoint "
                        "or train again with a smaller optim.lr."
                    )
                if out[which].finish:
                    batch.free(which)
            yield out
        in_flight = following


def _extend(completion: Completion, text: Continuation, ids: np.ndarray, eos: int, max_tokens: int) -> int:
    """Appends a chunk's tokens up to the end of the sequence, and says how many of them were looked at."""
    used = 0
    for index in ids.tolist():
        used += 1
        if index == eos:
            completion.finish = "eos"
            break
        completion.token_ids.append(index)
        completion.fresh += text.add(index)
        if text.stopped:
            completion.finish = "stop"
            break
        if len(completion.token_ids) == max_tokens:
            completion.finish = "length"
            break
    if completion.finish:
        completion.fresh += text.finish()
        if text.stopped:  # the characters held back to the end may complete a stop string
            completion.finish = "stop"
    completion.text += completion.fresh
    return used


def _check(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    seeds: Sequence[int],
    stops: Sequence[str],
    batch_size: int | None,
    chunk: int,
) -> None:
    if not prompts:
        raise UserError("There is no prompt; give one at least, '' to begin a document.")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"A prompt is {prompt!r:.40}; each must be a text.")
    for name, texts in (("prompt", prompts), ("stop string", stops)):
        for text in texts:
            if half_character(text) is not None:
                raise UserError(f"The {name} {text[:40]!a} is not valid UTF-8; pass it in UTF-8.")
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size), ("chunk", chunk)):
        if not isinstance(value, int | np.integer | None):
            raise UserError(f"{name} is {value!r}; it must be a whole number.")
        if value is not None and value < 1:
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
