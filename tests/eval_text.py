"""Text for the tests of the evaluation tasks, the same for ours and for lm-eval's side of a comparison."""

import random
import re

from gdn_jax.evaluate.generation import Answer

KEYS = [f"{a}-{b}" for a in ("quiet", "brisk", "amber", "hollow") for b in ("lantern", "harbor", "meadow", "engine")]
WORDS = "the a an river stone Turned, slowly over old grey doors keep; seven 42 cats' and (once) Ünder light".split()  # noqa: SIM905


def count_tokens(text: str) -> int:
    """Words and marks: a tokenizer that needs no file."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def haystack_words(count: int = 9000) -> list[str]:
    """Sentences of 3 to 12 drawn words."""
    rng, words = random.Random(3), []
    while len(words) < count:
        sentence = [rng.choice(WORDS).strip(".") for _ in range(rng.randint(3, 12))]
        words += [*sentence[:-1], sentence[-1] + "."]
    return words


def metric_cases(count: int = 200) -> list[tuple[str, str, list[str]]]:
    """(prediction, truth, classes): edges first, then drawn text with sentences, lines, comments and classes."""
    classes = ["Food", "Food and drink", "Person", "Person or group", "Date"]
    code = ["# note\nx = 1", "\n\nx = 1 # note\ny = 2"]
    edges = ["", " ", ".", "...", "\n", "Food", "the a an", *code, "Food and drink. Date"]
    cases = [(p, t, classes) for p in edges for t in edges[3:]]
    rng = random.Random(5)

    def drawn() -> str:
        pieces, gaps = [*WORDS, "Food", "Person or group", "x = 1", "#", "//", "`"], [" ", " ", " ", ". ", "\n", ".\n"]
        return "".join(rng.choice(pieces) + rng.choice(gaps) for _ in range(rng.randint(1, 60)))

    for _ in range(count):
        truth = drawn()
        words = truth.split(" ")
        kept = " ".join(word for word in words if rng.random() < 0.7)
        cases.append((kept if rng.random() < 0.6 else drawn(), rng.choice([truth, rng.choice(classes)]), classes))
    return cases


class Script:
    """A model that is a function of the prompt; counts the prompts it was given."""

    def __init__(self, answer, identity: str = "script"):
        self._answer, self.identity, self.asked = answer, identity, []

    def __call__(self, prompts, max_tokens, stops, progress):
        self.asked += prompts
        out = []
        for text in map(self._answer, prompts):
            ends = [text.index(stop) for stop in stops if stop in text]
            out.append(text[: min(ends, default=len(text))])
        return out


def told(texts):
    """An `Ask` that gives these texts, whatever it is asked."""
    return lambda prompts, **_: [Answer(text, 1, 1) for _, text in zip(prompts, texts, strict=True)]
