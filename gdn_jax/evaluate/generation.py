"""Prompts continued for an evaluation: cut to a length, in batches, each answer kept as it comes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from gdn_jax.checksums import checksums
from gdn_jax.errors import UserError
from gdn_jax.generate import stream
from gdn_jax.layers import Compute, compute_for
from gdn_jax.model import LM, for_inference
from gdn_jax.progress import Progress
from gdn_jax.runs import OpenRun
from gdn_jax.tokenizer import Tokenizer
from gdn_jax.tree import named_leaves

BATCH = 256  # prompts that are handed over together, and whose answers are kept together
ROWS = 16  # of them the model continues at once
Truncation = Literal["left", "middle"]


@runtime_checkable
class Continues(Protocol):
    """Whatever continues prompts: a model, or a script in its place."""

    identity: str  # with a request it decides the answer

    def __call__(self, prompts: Sequence[str], max_tokens: int, stops: Sequence[str], progress: Progress) -> list[str]:
        """The continuations, in the order of the prompts, without the stop string that ended them."""
        ...


@dataclass(frozen=True)
class Greedy:
    """A model's likeliest tokens."""

    model: LM
    tokenizer: Tokenizer
    compute: Compute

    @cached_property
    def identity(self) -> str:
        """Of the parameters' bits, the tokenizer and the arithmetic."""
        return _hash([checksums(named_leaves(self.model)), self.model.config, self.tokenizer.hash8, self.compute])

    @cached_property
    def _cast(self) -> LM:
        return for_inference(self.model, self.compute.dtype)

    def __call__(self, prompts: Sequence[str], max_tokens: int, stops: Sequence[str], progress: Progress) -> list[str]:
        for out in stream(
            self._cast, self.tokenizer, prompts, max_tokens=max_tokens, stops=stops, compute=self.compute,
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
    keep: Path | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """The likeliest continuations of the prompts, in their order.

    source       a run (its own arithmetic unless `compute` is given), a model, or anything that continues prompts
    max_length   most tokens of a prompt and its answer together; None: no prompt is cut
    truncation   what a prompt that is too long loses: its beginning ("left", as lm-eval), or what lies between two
                 halves of equal length ("middle", as LongBench's own pred.py)
    batch_size   prompts handed over and kept together; a model continues 16 of them at once, each ended one making room
    keep         a .jsonl file to which each batch's answers are appended; a request found there is not made again.
                 Batches are the same with and without it, so an evaluation that goes on gives the uninterrupted answers
    Raises UserError for a max_length without room for a prompt, an unknown truncation, and a damaged `keep`.
    """
    if truncation not in ("left", "middle"):
        raise UserError(f"truncation is {truncation!r}; it must be 'left' or 'middle'.")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be positive.")
    if max_length is not None and max_length <= max_tokens:
        raise UserError(f"max_length is {max_length}; it must be more than the {max_tokens} tokens of an answer.")
    continues = _continues(source, tokenizer, compute)
    room = None if max_length is None else max_length - max_tokens
    options = [continues.identity, tokenizer.hash8, max_tokens, list(stops), max_length, truncation]
    keys = [_hash([*options, prompt]) for prompt in prompts]
    cuts = {key: cut(tokenizer, prompt, room, truncation) for key, prompt in zip(keys, prompts, strict=True)}
    order = sorted(cuts, key=lambda key: -cuts[key].tokens)  # the longest first: what does not fit fails at once
    found = {} if keep is None else _kept(keep)
    with progress or Progress() as display:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            missing = [key for key in batch if key not in found]
            if missing:
                texts = continues([cuts[key].text for key in batch], max_tokens, stops, display)
                made = {key: cuts[key]._replace(text=text) for key, text in zip(batch, texts, strict=True)}
                found |= {key: made[key] for key in missing}
                if keep is not None:
                    _append(keep, {key: made[key] for key in missing})
            display.show(f"Answered {min(first + batch_size, len(order)):,} of {len(order):,} prompts.")
    return [found[key] for key in keys]


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
        parts = ids[:head], ids[count - (keep - head) :]
        text = "".join(tokenizer.decode_bytes(part).decode("utf-8", "ignore") for part in parts)
        read = len(tokenizer.encode(text))
    return Answer(text, read, count)


def _continues(source: OpenRun | LM | Continues, tokenizer: Tokenizer, compute: Compute | None) -> Continues:
    if isinstance(source, OpenRun):
        return Greedy(source.model, tokenizer, compute or compute_for(source.experiment))
    if isinstance(source, LM):
        return Greedy(source, tokenizer, compute or Compute())
    return source


def _hash(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, default=str).encode()).hexdigest()[:32]


def _kept(path: Path) -> dict[str, Answer]:
    """The answers in the file; a last line that a crash cut short is dropped from it."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["key"]] = Answer(row["text"], row["tokens"], row["of_tokens"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: holds no answer; remove the line, or the file.") from None
    return found


def _append(path: Path, new: dict[str, Answer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"key": key, **answer._asdict()}) + "\n" for key, answer in new.items()]
    with path.open("a") as file:
        file.write("".join(lines))
