"""Tokens to text while they are generated: whole characters only, and an end at the first stop string."""

import codecs
from collections.abc import Sequence

from gdn_jax.tokenizer import REPLACEMENT, Tokenizer

CONTEXT = 16  # earlier tokens decoded along, because a token's text may depend on its neighbours
UNDECIDED = 3  # U+FFFD at the end that later tokens may still turn into one character of four bytes


class Continuation:
    """The text of one growing sequence after its prompt.

    `add` takes the tokens one by one, so that the text never depends on how many arrive together. A stop string
    counts from the prompt's end on, may span tokens, and is not part of the text. Of several, the one that is
    complete first ends it, and of those complete together the longest.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids = [int(index) for index in prompt[-CONTEXT:]]
        self._before = len(tokenizer.decode_bytes(self._ids))  # bytes of self._ids that are no longer news
        self._taken = 0  # characters of the news that are in self._all
        self._all = ""
        self._given = 0
        self.stopped = False

    def add(self, index: int) -> str:
        """The text that is certain since the last call; once `stopped`, nothing more comes."""
        if self.stopped:
            return ""
        self._ids.append(int(index))
        news = self._news(final=False)
        whole = len(news)
        while whole > 0 and len(news) - whole < UNDECIDED and news[whole - 1] == REPLACEMENT:
            whole -= 1
        self._take(news, max(whole, self._taken))
        if not self.stopped and whole == len(news) == len(self._news(final=True)):
            self._ids = self._ids[-CONTEXT:]
            self._before, self._taken = len(self._tokenizer.decode_bytes(self._ids)), 0
        return self._release(hold=not self.stopped)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if not self.stopped:
            news = self._news(final=True)
            self._take(news, len(news))
        return self._release(hold=False)

    def _news(self, *, final: bool) -> str:
        news = self._tokenizer.decode_bytes(self._ids)[self._before :]
        return codecs.getincrementaldecoder("utf-8")("replace").decode(news, final)

    def _take(self, news: str, upto: int) -> None:
        """Moves news[taken:upto] to the text, character by character as far as the first stop string."""
        if not self._stops:
            self._all += news[self._taken : upto]
        for character in news[self._taken : upto] if self._stops else "":
            self._all += character
            ends = [stop for stop in self._stops if self._all.endswith(stop)]
            if ends:
                self._all = self._all[: -len(max(ends, key=len))]
                self.stopped = True
                return
        self._taken = upto

    def _release(self, *, hold: bool) -> str:
        """The part not given before, less the end that may become a stop string."""
        end = len(self._all)
        if hold:
            end -= max(
                (n for stop in self._stops for n in range(1, len(stop)) if self._all.endswith(stop[:n])), default=0
            )
        out = self._all[self._given : end]
        self._given = max(self._given, end)
        return out
