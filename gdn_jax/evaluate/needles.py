"""Single needles in a haystack: the paper's Table 2, S-NIAH-1, 2 and 3 of RULER (Hsieh et al., arXiv 2404.06654).

One sentence with a key and a value is hidden in filler text, and the prompt asks for the value. The samples are those
of lm-evaluation-harness 0.4.13 (tasks niah_single_1, 2, 3) for the same random numbers, tokenizer and haystack.
"""

import functools
import gzip
import hashlib
import importlib.metadata
import json
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gdn_jax.errors import UserError, nearest
from gdn_jax.evaluate.generation import Ask
from gdn_jax.half_characters import check_whole
from gdn_jax.sources import NOVELS

ANSWER_TOKENS = 128  # counted into a sample's length; no stop string
SAMPLES = 500  # of each length
SEED = 42
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
PROMPT = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
)
ANSWER_PREFIX = "The special magic {kind} for {key} mentioned in the provided text is"
DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of a text's sentences
# RULER's PaulGrahamEssays.json by its first words, of which every sample up to so many tokens is made.
ESSAY_WORDS = 8192
ESSAYS = "60d8a30387e9717b80cc73308a586c6516e43d7a772934bd4a2fd5ebfea9a5a9"  # sha256 of them, a space between two
TEXT_STEP = 500  # words
NOISE_STEP, SHORT_NOISE_STEP, SHORT = 25, 5, 4096  # lines; the second below SHORT tokens


@dataclass(frozen=True)
class Task:
    """Where the needle lies, and what its value is."""

    haystack: Literal["noise", "text"]
    value: Literal["number", "uuid"]  # 7 digits, or a UUID


TASKS = {
    "niah_single_1": Task("noise", "number"),
    "niah_single_2": Task("text", "number"),
    "niah_single_3": Task("text", "uuid"),
}


@dataclass(frozen=True, eq=False)
class Haystack:
    """A text to hide needles in: its first words serve, as many as a length needs."""

    name: str
    words: tuple[str, ...] = field(repr=False)
    sentences: Callable[[str], list[str]] = field(repr=False)
    stand_in: bool = False  # not the essays that RULER's tasks are made of
    _first: dict[int, list[str]] = field(default_factory=dict, init=False, repr=False)

    def first(self, count: int) -> list[str]:
        """The sentences of the first `count` words."""
        if count not in self._first:
            self._first[count] = self.sentences(" ".join(self.words[:count]).strip())
        return self._first[count]

    @property
    def sha256(self) -> str:
        """Of the words, a space between two: the same wherever the text lies and however its lines end."""
        return _sha256(self.words)

    def made_with(self) -> dict[str, str]:
        """The versions of the libraries that cut the text."""
        return {"nltk": importlib.metadata.version("nltk")} if self.sentences is punkt else {}


@dataclass(frozen=True)
class Sample:
    """One prompt and the value that it asks for."""

    task: str
    index: int
    prompt: str
    answer_prefix: str
    key: str
    value: str
    max_length: int
    length: int  # of the prompt without answer_prefix, and ANSWER_TOKENS: at most max_length (as RULER counts)
    tokens: int  # of `text`, all that the model reads
    depth: float  # of the needle, in per cent
    units: int  # words of the haystack, or lines of noise
    step: int  # units are a multiple of it
    haystack: str
    stand_in: bool

    @property
    def text(self) -> str:
        """What the model continues."""
        return f"{self.prompt} {self.answer_prefix}"


def matches(continuation: str, value: str) -> bool:
    """The value occurs in the continuation, in upper or lower case (RULER's string_match_all)."""
    return value.lower() in continuation.lower()


def essays(path: Path) -> Haystack:
    """A text file, or RULER's .json with a field "text", cut into sentences by NLTK's Punkt as RULER does.

    A stand-in unless its first words are those of RULER's file.
    """
    try:
        content = path.read_text()
        text = json.loads(content)["text"] if path.suffix == ".json" else content
        words = tuple(re.sub(r"\s+", " ", text).split(" "))
    except OSError as error:
        raise UserError(f"The haystack {path} cannot be read ({error.strerror}); give the path of a text.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"The haystack {path} is no text in UTF-8, nor .json with a field 'text'; repair it.") from None
    check_whole(text, f"The haystack {path}", "repair it")
    return Haystack(path.name, words, punkt, stand_in=_sha256(words[:ESSAY_WORDS]) != ESSAYS)


def novels() -> Haystack:
    """The English novels in the package: the essays' stand-in where there is no file."""
    with gzip.open(NOVELS, "rt") as lines:
        text = " ".join(json.loads(line)["text"] for line in lines)
    return Haystack("english-novels", tuple(text.split()), plain_sentences, stand_in=True)


def _sha256(words: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def punkt(text: str) -> list[str]:
    """Sentences by NLTK's Punkt model for English."""
    try:
        import nltk

        return nltk.sent_tokenize(text)
    except ImportError:
        raise UserError("Sentences need the library nltk; install it with: pip install 'gdn_jax[eval]'.") from None
    except LookupError:
        raise UserError(
            "NLTK's data punkt_tab is missing; run: python -m nltk.downloader punkt_tab, or point NLTK_DATA to it."
        ) from None


def plain_sentences(text: str) -> list[str]:
    """Sentences end in . ! or ? before white space."""
    return re.split(r"(?<=[.!?])\s+", text)


@functools.cache
def word_pairs() -> tuple[str, ...]:
    """RULER's keys: every adjective and noun of wonderwords, joined by a hyphen, sorted."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise UserError("Keys need the library wonderwords; install it with: pip install 'gdn_jax[eval]'.") from None
    try:
        words = RandomWord(enhanced_prefixes=False).parts_of_speech
        return tuple(sorted({f"{a}-{n}" for a in words["adjectives"] for n in words["nouns"]}))
    except (TypeError, KeyError):
        raise UserError(
            f"wonderwords {words_version()} has other lists of words than keys are drawn from; install the right "
            f"version with: pip install 'gdn_jax[eval]'."
        ) from None


def words_version() -> str:
    """The version of wonderwords, whose list decides every key and, by the draws, every needle's place."""
    return importlib.metadata.version("wonderwords")


def make_samples(
    task: str,
    count_tokens: Callable[[str], int],
    max_length: int,
    *,
    haystack: Haystack | None = None,
    samples: int = SAMPLES,
    seed: int | random.Random = SEED,
    keys: Sequence[str] | None = None,
) -> list[Sample]:
    """Samples of a task, as long as `max_length` tokens allow in steps of the haystack.

    count_tokens   tokens of a text, as the model reads it
    haystack       of niah_single_2 and 3; None: `novels()`
    seed           random.Random(seed) draws key, value and depth of each sample. lm-eval draws the lengths of a
                   task one after the other from one generator: hand the same random.Random to each call for its samples
    keys           to draw from; None: `word_pairs()`

    A step is 500 words, or 5 lines of noise (25 from 4096 tokens on). Where a prompt with one step does not fit, as a
    byte tokenizer's at 1024, the step is halved until it does; `Sample.step` says so.
    Raises UserError for an unknown task, a haystack too short for the length, and a length too small for the prompt.
    """
    if task not in TASKS:
        raise UserError(f"There is no needle task {task!r}{nearest(task, TASKS)}; there are {', '.join(TASKS)}.")
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be positive.")
    kind = TASKS[task]
    hay = None if kind.haystack == "noise" else haystack or novels()
    keys = word_pairs() if keys is None else keys
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    step = TEXT_STEP if hay else NOISE_STEP if max_length >= SHORT else SHORT_NOISE_STEP
    draw = functools.partial(_draw, rng, kind, hay, keys)
    while (units := _most_units(draw, count_tokens, max_length, step, hay)) < 1:
        step //= 2
        if step < 1:
            raise _too_small(task, max_length)

    out = []
    for index in range(samples):
        used, part = units, step
        while True:
            prompt, key, value, depth = draw(used)
            length = count_tokens(prompt) + ANSWER_TOKENS
            if length <= max_length:
                break
            if used <= part:  # lm-eval would leave the sample out
                part = used // 2
                if part < 1:
                    raise _too_small(task, max_length)
            used -= part
        prefix = ANSWER_PREFIX.format(kind=kind.value, key=key)
        out.append(
            Sample(
                task, index, prompt, prefix, key, value, max_length, length, count_tokens(f"{prompt} {prefix}"), depth,
                used, part, hay.name if hay else "noise", bool(hay and hay.stand_in),
            )
        )  # fmt: skip
    return out


def evaluate(samples: Sequence[Sample], ask: Ask) -> dict[str, float | int | str]:
    """100 times the share of samples whose value is in the answer, and what was measured.

    All samples are of one task and one length.
    """
    found = ask([sample.text for sample in samples], max_tokens=ANSWER_TOKENS)
    right = [matches(answer.text, sample.value) for sample, answer in zip(samples, found, strict=True)]
    first = samples[0]
    return {
        "task": first.task,
        "max_length": first.max_length,
        "accuracy": 100 * sum(right) / len(right),
        "samples": len(samples),
        "haystack": first.haystack,
        "stand_in": first.stand_in,
        "step": min(sample.step for sample in samples),
        "longest": max(sample.tokens for sample in samples),
        "cut": sum(answer.tokens < answer.of_tokens for answer in found),
    }


def _draw(
    rng: random.Random, task: Task, haystack: Haystack | None, keys: Sequence[str], units: int
) -> tuple[str, str, str, float]:
    """(prompt, key, value, depth); the order of the draws is RULER's."""
    key = rng.choice(keys)
    number = task.value == "number"
    value = str(rng.randint(10**6, 10**7 - 1)) if number else str(uuid.UUID(int=rng.getrandbits(128), version=4))
    needle = NEEDLE.format(kind=task.value, key=key, value=value)
    if haystack is None:
        (line,) = rng.sample(range(units), 1)
        depth = 100 * line / units
        context = "\n".join([*[NOISE] * line, needle, *[NOISE] * (units - line)])
    else:
        sentences = haystack.first(units)
        (depth,) = rng.sample(DEPTHS, 1)
        place = int(len(sentences) * (depth / 100))
        context = " ".join([" ".join(sentences[:place]), needle, " ".join(sentences[place:])])
    rng.sample(range(1), 1)  # RULER draws which of its keys it asks for
    return PROMPT.format(kind=task.value, context=context, key=key), key, value, float(depth)


def _most_units(
    draw: Callable[[int], tuple[str, str, str, float]],
    count_tokens: Callable[[str], int],
    max_length: int,
    step: int,
    haystack: Haystack | None,
) -> int:
    """How many units one drawn sample may have, a multiple of step; 0 where not one step fits."""
    units, total = step, 0
    while total + ANSWER_TOKENS < max_length:
        prompt, _, value, _ = draw(units)
        total = count_tokens(prompt + value)
        if total + ANSWER_TOKENS > max_length:
            return units - step
        if haystack and units > len(haystack.words):
            raise UserError(
                f"The haystack {haystack.name} has {len(haystack.words):,} words, too few for {max_length} tokens; "
                f"give a longer text."
            )
        if units > max_length:
            raise UserError(f"{units} units of the haystack count {total} tokens; the tokenizer counts too few.")
        units += step
    return units if total else 0


def _too_small(task: str, max_length: int) -> UserError:
    return UserError(
        f"A length of {max_length} tokens is too small for a prompt of {task} and {ANSWER_TOKENS} tokens of answer; "
        f"give a larger one."
    )
