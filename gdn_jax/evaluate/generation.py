"""Prompts continued for an evaluation: cut to a length, in batches, each answer kept as it comes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from gdn_jax.checksums import checksums
from gdn_jax.errors import UserError
from gdn_jax.evaluate.dealt import of_all, turns
from gdn_jax.evaluate.kept import Kept, key_of
from gdn_jax.generate import stream
from gdn_jax.layers import Compute, compute_for
from gdn_jax.model import LM, for_inference
from gdn_jax.progress import Progress
from gdn_jax.runs import OpenRun
from gdn_jax.tokenizer import Tokenizer, text_between
from gdn_jax.tree import named_leaves

BATCH = 256  # prompts that are handed over together, and whose answers are kept together
ROWS = 16  # of them the model continues at once
Truncation = Literal["left", "middle"]


@runtime_checkable
class Continues(Protocol):
    """Anything that continues prompts: a model, or a script that stands in for one."""

    identity: str  # with a request it decides the answer

    def __call__(self, prompts: Sequence[str], max_tokens: int, stops: Sequence[str], progress: Progress) -> list[str]:
        """The continuations, in the order of the prompts, without the stop string that ended them."""
        ...


@dataclass(frozen=True)
class Greedy:
    """Continues prompts by a model's likeliest tokens."""

    model: LM
    tokenizer: Tokenizer
    compute: Compute

    @cached_property
    def identity(self) -> str:
        """A hash of the parameters, the tokenizer and the arithmetic, by which answers are kept."""
        return key_of(checksums(named_leaves(self.model)), self.model.config, self.tokenizer.hash8, self.compute)

    @cached_property
    def cast(self) -> LM:
        """The model in the dtype of the arithmetic: the same answers bit for bit from half the memory."""
        return for_inference(self.model, self.compute.dtype)

    def __call__(self, prompts: Sequence[str], max_tokens: int, stops: Sequence[str], progress: Progress) -> list[str]:
        for out in stream(
            self.cast, self.tokenizer, prompts, max_tokens=max_tokens, stops=stops, compute=self.compute,
            batch_size=ROWS, progress=progress,
        ):  # fmt: skip
            ended = sum(completion.finish is not None for completion in out)
            progress.show(f"Continued {ended:,} of {len(out):,} prompts to their end.")
        return [completion.text for completion in out]


class Answer(NamedTuple):
    """A continuation, and how much of its prompt was read."""

    text: str
    tokens: int  # of the prompt that was read
    of_tokens: int  # of the prompt before it was cut


class Ask(Protocol):
    """`answers` with its first arguments given, functools.partial(answers, run, run.tokenizer): what tasks call."""

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        stops: Sequence[str] = (),
        max_length: int | None = None,
        truncation: Truncation = "left",
    ) -> list[Answer]: ...


def answers(
    source: OpenRun | LM | Continues,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    stops: Sequence[str] = (),
    max_length: int | None = None,
    truncation: Truncation = "left",
    batch_size: int = BATCH,
    compute: Compute | None = None,
    keep: Kept | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """The likeliest continuations of the prompts, in their order.

    source       a run (its own arithmetic unless `compute` is given), a model, or anything that continues prompts
    max_length   most tokens of a prompt and its answer together; None: no prompt is cut
    truncation   what a prompt that is too long loses: its beginning ("left", as lm-eval), or what lies between two
                 halves of equal length ("middle", as LongBench's own pred.py)
    batch_size   prompts handed over and kept together; a model continues 16 of them at once, each ended one making room
    keep         gets each batch's answers; a prompt whose answer it has is not continued again. Batches are the same
                 with and without it, so an evaluation that goes on gives the uninterrupted answers
    Several processes must all call it with the same prompts: each continues some of the batches, and has all answers.
    Raises UserError for a max_length without room for a prompt, and an unknown truncation.
    """
    if truncation not in ("left", "middle"):
        raise UserError(f"truncation is {truncation!r}; it must be 'left' or 'middle'.")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be positive.")
    if max_length is not None and max_length <= max_tokens:
        raise UserError(f"max_length is {max_length}; it must be more than the {max_tokens} tokens of an answer.")
    continues = _continues(source, tokenizer, compute)
    room = None if max_length is None else max_length - max_tokens
    cuts = [cut(tokenizer, prompt, room, truncation) for prompt in prompts]
    # What is read decides the answer, not what it was cut from: equal cuts are continued once.
    keys = [key_of(continues.identity, max_tokens, list(stops), one.text) for one in cuts]
    todo = dict(zip(keys, cuts, strict=True))
    order = sorted(todo, key=lambda key: -todo[key].tokens)  # the longest first: what does not fit fails at once
    keep = Kept(None) if keep is None else keep
    own: dict[str, str] = {}

    def read() -> dict[str, str]:
        mine = turns()
        with progress or Progress() as display:
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                missing = {key for key in batch if key not in keep}
                if missing and next(mine):
                    texts = continues([todo[key].text for key in batch], max_tokens, stops, display)
                    found = {key: text for key, text in zip(batch, texts, strict=True) if key in missing}
                    own.update(found)
                    keep.add(found)
                display.show(f"Answered {min(first + batch_size, len(order)):,} of {len(order):,} prompts.")
        return own

    every = of_all(order, read)
    keep.add({key: text for key, text in every.items() if key not in own})
    return [one._replace(text=keep[key]) for key, one in zip(keys, cuts, strict=True)]


def cut(tokenizer: Tokenizer, prompt: str, room: int | None, truncation: Truncation) -> Answer:
    """The prompt in at most `room` tokens, as `Answer.text`; a character that a cut would split is left out."""
    ids = tokenizer.encode(prompt)
    count = keep = len(ids)
    text, read = prompt, count
    while room is not None and read > room:
        keep -= read - room  # text may encode to more tokens than it was decoded from
        if keep < 1:
            raise UserError(f"A prompt cannot be cut to {room} tokens; give a larger max_length.")
        head = keep // 2 if truncation == "middle" else 0
        text = text_between(tokenizer, ids, 0, head) + text_between(tokenizer, ids, count - (keep - head), count)
        read = len(tokenizer.encode(text))
    return Answer(text, read, count)


def _continues(source: OpenRun | LM | Continues, tokenizer: Tokenizer, compute: Compute | None) -> Continues:
    if isinstance(source, OpenRun):
        return Greedy(source.model, tokenizer, compute or compute_for(source.experiment))
    if isinstance(source, LM):
        return Greedy(source, tokenizer, compute or Compute())
    return source
