"""Answers of a run to requests in text: log-likelihoods, whole texts, continuations. Tasks and harness use them."""

import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gdn_jax import distributed
from gdn_jax.config import Data
from gdn_jax.errors import UserError
from gdn_jax.evaluate.generation import Ask, Greedy, answers
from gdn_jax.evaluate.kept import Kept, key_of
from gdn_jax.evaluate.scoring import BATCH_TOKENS, Score, Scorer
from gdn_jax.half_characters import check_whole
from gdn_jax.layers import Compute, compute_for
from gdn_jax.metrics import environment
from gdn_jax.progress import SILENT, Progress
from gdn_jax.runs import OpenRun
from gdn_jax.tokenizer import Tokenizer

LEAST_LENGTH = 2048  # tokens read at once where a model was trained on shorter windows


class Answers(Protocol):
    """The interface that tasks use to question a model."""

    tokenizer: Tokenizer
    max_length: int  # most tokens read at once
    ask: Ask  # the likeliest continuations

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding would write it) for each pair of texts."""
        ...

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text) for each whole text, in blocks of max_length tokens (Scorer.rolling)."""
        ...


class Answering:
    """A run's answers; each is kept in a file as it comes, and a request found there is not made again.

    max_length    most tokens read at once; None: `default_length` of the training's data
    keep          the file; None: <run>/answers.jsonl. Answers are known by the parameters, the tokenizer, the
                  arithmetic and the request, so one file serves every checkpoint and may be copied between machines;
                  it names the program and the devices that made them
    context       local devices that share the tokens of each row; must divide their number

    Documents of the training data end in EOS and begin with nothing, so a text without a context is given EOS.
    """

    def __init__(
        self, run: OpenRun, *, compute: Compute | None = None, max_length: int | None = None, keep: Path | None = None,
        batch_tokens: int = BATCH_TOKENS, context: int = 1, progress: Progress | None = None,
    ):  # fmt: skip
        self.run, self.tokenizer = run, run.tokenizer
        self.compute = compute_for(run.experiment) if compute is None else compute
        self.max_length = default_length(run.experiment.data) if max_length is None else max_length
        self.progress = progress or (Progress() if distributed.first() else SILENT)
        facts = environment()
        here = {name: facts[name] for name in ("commit", "dirty", "source", "devices")}
        self.kept = Kept(run.directory / "answers.jsonl" if keep is None else keep, here)
        self._greedy = Greedy(run.model, self.tokenizer, self.compute)
        self.ask: Ask = partial(answers, self._greedy, self.tokenizer, keep=self.kept, progress=self.progress)
        self._batch_tokens, self._context = batch_tokens, context

    @property
    def identity(self) -> str:
        """A hash of the parameters, the tokenizer and the arithmetic."""
        return self._greedy.identity

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(
            self._greedy.cast, compute=self.compute, max_length=self.max_length, batch_tokens=self._batch_tokens,
            context=self._context,
        )  # fmt: skip

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        keys = [self._key("loglikelihood", *pair) for pair in pairs]
        new = self._new(keys, pairs)
        if new:
            encoded = [encode_pair(self.tokenizer, *pair) for pair in new.values()]
            self._score(list(new), self._scorer.score, *zip(*encoded, strict=True))
        return [(answer[0], answer[1]) for answer in map(self.kept.__getitem__, keys)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        keys = [self._key("rolling", text) for text in texts]
        new = self._new(keys, texts)
        if new:
            encoded = [self.tokenizer.encode(text) for text in new.values()]
            self._score(list(new), self._scorer.rolling, encoded, prefix=self.tokenizer.eos)
        return [self.kept[key][0] for key in keys]

    def _key(self, kind: str, *texts: str) -> str:
        return key_of(self.identity, kind, self.max_length, self.tokenizer.eos, texts)

    def _new(self, keys: Sequence[str], requests: Sequence[Any]) -> dict[str, Any]:
        """The requests without an answer, each once."""
        return {key: request for key, request in zip(keys, requests, strict=True) if key not in self.kept}

    def _score(self, keys: list[str], score: Any, *arguments: Any, **options: Any) -> None:
        def done(found: dict[int, Score]) -> None:
            self.kept.add({keys[i]: [one.log_likelihood, one.greedy] for i, one in found.items()})

        score(*arguments, **options, progress=self.progress, done=done)


def default_length(data: Data) -> int:
    """The most tokens read at once unless something else is asked: those of a training window, at least 2,048."""
    return max(data.seq_len, LEAST_LENGTH)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a context and of its continuation, as lm-evaluation-harness divides them.

    Spaces that end the context begin the continuation instead; the whole is encoded, and what follows as many tokens as
    the context alone has is the continuation, also where the first of those tokens are others than the context's own.
    An empty context is EOS, which documents follow in training.
    Raises UserError for a continuation that has no token of its own: there is nothing to score.
    """
    bare = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    before = tokenizer.encode(bare) if bare else whole[:0]
    after = whole[len(before) :]
    if continuation and not len(after):
        raise UserError(
            f"The continuation {continuation[:40]!r} has no token of its own: the tokenizer joins it to the end of its "
            f"context, {context[-40:]!r}; begin it where a token begins, as with a space."
        )
    return (before if len(before) else np.array([tokenizer.eos], np.int32)), after


class RequestFile:
    """Takes the place of an Answering and collects the requests in a file, for `answer_file` on another machine.

    The values that it returns itself are placeholders.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, *, max_length: int):
        self.tokenizer, self.max_length, self._path = tokenizer, max_length, path
        self._lines: dict[str, None] = {}
        self.ask: Ask = partial(answers, self, tokenizer)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self._add({"kind": "loglikelihood", "texts": list(pair)} for pair in pairs)
        return [(-1.0, False)] * len(pairs)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        self._add({"kind": "rolling", "texts": [text]} for text in texts)
        return [-1.0] * len(texts)

    identity = "requests"  # this and __call__: continues prompts, as generation.Continues

    def __call__(self, prompts: Sequence[str], max_tokens: int, stops: Sequence[str], progress: Progress) -> list[str]:
        self._add({"kind": "ask", "texts": [text], "max_tokens": max_tokens, "stops": list(stops)} for text in prompts)
        return [""] * len(prompts)

    def _add(self, requests: Any) -> None:
        self._lines |= dict.fromkeys(json.dumps(request) for request in requests)

    def write(self) -> int:
        """Write the file; returns how many requests it holds."""
        first = {"max_length": self.max_length, "tokenizer": self.tokenizer.hash8}
        self._path.write_text("".join(line + "\n" for line in [json.dumps(first), *self._lines]))
        return len(self._lines)


def read_requests(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(max_length and tokenizer, the requests) of a file that RequestFile wrote, or a UserError."""
    try:
        first, *rows = map(json.loads, path.read_text().splitlines())
        facts = {name: first[name] for name in ("max_length", "tokenizer")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} holds no requests ({error}); write it with: gdn eval RUN --tasks ... --requests FILE."
        ) from None
    again = "write the file again with: gdn eval RUN --tasks ... --requests FILE"
    for number, row in enumerate(rows, 2):
        if not _is_request(row):
            raise UserError(f"{path}, line {number}: is no request; {again}.")
        check_whole(row, f"{path}, line {number}", again)
    return facts, rows


LENGTHS = {"loglikelihood": 2, "rolling": 1, "ask": 1}  # of a request's texts, by its kind


def _is_request(row: Any) -> bool:
    if not isinstance(row, dict) or row.get("kind") not in tuple(LENGTHS) or not _are_texts(row.get("texts")):
        return False
    options = row["kind"] != "ask" or (isinstance(row.get("max_tokens"), int) and _are_texts(row.get("stops")))
    return options and len(row["texts"]) == LENGTHS[row["kind"]]


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def answer_file(answering: Answering, path: Path) -> int:
    """Answers the requests of a file into `answering.kept`; returns how many there are."""
    facts, rows = read_requests(path)
    for name, mine in (("max_length", answering.max_length), ("tokenizer", answering.tokenizer.hash8)):
        if facts[name] != mine:
            raise UserError(f"{path} was written for {name} {facts[name]}, not {mine}; write it again for this run.")
    of_kind: dict[str, list] = {"loglikelihood": [], "rolling": []}
    prompts: dict[tuple, list[str]] = {}
    for row in rows:
        if row["kind"] == "ask":
            prompts.setdefault((row["max_tokens"], *row["stops"]), []).append(row["texts"][0])
        else:
            of_kind[row["kind"]].append(row["texts"])
    answering.loglikelihood([(context, continuation) for context, continuation in of_kind["loglikelihood"]])
    answering.rolling([text for (text,) in of_kind["rolling"]])
    for (max_tokens, *stops), texts in prompts.items():
        answering.ask(texts, max_tokens=max_tokens, stops=stops)
    return len(rows)
