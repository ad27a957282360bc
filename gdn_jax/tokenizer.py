"""Text to token ids: bytes, a SentencePiece model or a `tokenizers` file behind one small interface."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from gdn_jax.errors import UserError
from gdn_jax.half_characters import check_whole

# A tokenizers file does not say which token ends a document. The first of these it holds does, so that the
# file's hash fixes everything the tokenizer does.
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>")
REPLACEMENT = "\ufffd"  # what half a character decodes to


class Tokenizer(Protocol):
    """What the library asks of a tokenizer; ids are int32 in [0, vocab), and no BOS or EOS is ever added."""

    name: str  # as given to `load`
    vocab: int  # one more than the largest id
    eos: int  # ends every document
    hash8: str  # first 8 hex digits of the sha256 of the file

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text; UserError for one with half a character (a lone surrogate)."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of the ids; EOS and other control tokens leave no trace."""
        ...


def load(name: str) -> Tokenizer:
    """The tokenizer called `name`: "byte", or the path of a SentencePiece .model or tokenizers .json file.

    Raises UserError for a missing or damaged file, another suffix, a tokenizer that cannot end documents, or
    a library that is not installed.
    """
    if name == "byte":
        return ByteTokenizer()
    loaders = {".model": SentencePieceTokenizer, ".json": JsonTokenizer}
    path = Path(name)
    if path.suffix not in loaders:
        raise UserError(f"Tokenizer {name!r} is neither 'byte' nor the path of a .model (SentencePiece) or .json file.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"Tokenizer file {name} cannot be read ({error.strerror}); give the path of an existing file."
        ) from None
    return loaders[path.suffix](name, content)


class ByteTokenizer:
    """The 256 byte values, and 256 for EOS."""

    name = "byte"
    vocab = 257
    eos = 256
    hash8 = hashlib.sha256(b"ids 0..255: the bytes of the UTF-8 text; id 256: EOS").hexdigest()[:8]

    def encode(self, text: str) -> np.ndarray:
        with _whole([text]):
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(index for index in ids if index < 256)


class SentencePieceTokenizer:
    """A SentencePiece model; a character cut in the middle decodes to U+FFFD."""

    def __init__(self, name: str, content: bytes):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise _not_installed(name, "sentencepiece") from None
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError:
            raise UserError(f"Tokenizer file {name} is no SentencePiece model or is damaged; restore it.") from None
        self.name, self.hash8 = name, _hash8(content)
        self.vocab, self.eos = self._model.vocab_size(), self._model.eos_id()
        if self.eos < 0:
            raise UserError(f"Tokenizer {name} has no EOS piece to end documents with; train it with an eos_id >= 0.")

    def encode(self, text: str) -> np.ndarray:
        with _whole([text]):
            return np.asarray(self._model.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _whole(texts):
            return [np.asarray(ids, np.int32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._model.decode([int(index) for index in ids]).encode()


class JsonTokenizer:
    """A file of the `tokenizers` library; special tokens spelled out in a text are read as plain text."""

    def __init__(self, name: str, content: bytes):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise _not_installed(name, "tokenizers") from None
        try:
            tree = json.loads(content)
        except (ValueError, RecursionError):
            raise UserError(f"Tokenizer file {name} is no JSON or is damaged; restore it.") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise UserError(f"Tokenizer file {name} holds no 'model'; give a file saved by the tokenizers library.")
        try:
            self._backend = Backend.from_str(content.decode())
        except Exception as error:
            if type(error) is not Exception:  # the library raises the bare class for a model that it cannot read
                raise
            raise UserError(
                f"Tokenizer file {name} cannot be read ({error}); give a file saved by the tokenizers library."
            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        ids = self._backend.get_vocab(with_added_tokens=True)
        eos = next((token for token in EOS_NAMES if token in ids), None)
        if eos is None:
            raise UserError(f"Tokenizer {name} has no token to end documents with; add one of {', '.join(EOS_NAMES)}.")
        self.name, self.hash8 = name, _hash8(content)
        self.vocab, self.eos = max(ids.values()) + 1, ids[eos]

    def encode(self, text: str) -> np.ndarray:
        with _whole([text]):
            return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _whole(texts):
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        kept = [int(index) for index in ids if index != self.eos]
        return self._backend.decode(kept, skip_special_tokens=True).encode()


def text_between(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, start: int, stop: int) -> str:
    """The text of ids[start:stop], less a character that either end would split.

    Several tokens may spell one character, and some of them decode to U+FFFD. A U+FFFD of the text itself is kept: an
    end splits a character where its two sides hold more of them than the whole.
    """

    def decoded(part: Sequence[int] | np.ndarray) -> str:
        return tokenizer.decode_bytes(part).decode("utf-8", "replace")

    def halves(part: Sequence[int] | np.ndarray) -> int:
        return decoded(part).count(REPLACEMENT)

    def splits(place: int) -> bool:
        return halves(ids[:place]) + halves(ids[place:]) > halves(ids)

    text = decoded(ids[start:stop])
    while text.endswith(REPLACEMENT) and splits(stop):
        stop -= 1
        text = decoded(ids[start:stop])
    while text.startswith(REPLACEMENT) and splits(start):
        start += 1
        text = decoded(ids[start:stop])
    return text


@contextlib.contextmanager
def _whole(texts: Sequence[str]) -> Iterator[None]:
    """Says of a text with half a character what is wrong with it: each library fails in a way of its own."""
    try:
        yield
    except (UnicodeEncodeError, RuntimeError, TypeError):
        for text in texts:
            check_whole(text, f"The text {str(text)[:40]!a}", "pass it in UTF-8")
        raise


def _hash8(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _not_installed(name: str, library: str) -> UserError:
    return UserError(f"Tokenizer {name} needs the library {library}; install it with: pip install 'gdn_jax[data]'.")
