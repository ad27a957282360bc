"""Tokenises one input shard into one shard of each split, under temporary names until it is marked as finished."""

import contextlib
import hashlib
import io
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gdn_jax import tokenizer
from gdn_jax.files import temporary, write_bytes, write_json
from gdn_jax.fingerprint import SPLITS, ends_path
from gdn_jax.sources import InputShard, LeftOut, documents

BATCH_CHARACTERS = 1 << 20  # of text tokenised, written and reported at once
NAMED = 10  # of what is left out, with the reason; the rest is counted

Report = Callable[[int, int, int], None]  # documents, tokens and bytes of text done since the last call


@dataclass(frozen=True)
class Job:
    """One input shard to be tokenised; everything a worker needs, picklable."""

    index: int
    shard: InputShard
    out: Path
    plan: dict

    @property
    def mark(self) -> Path:
        return self.out / f"shard-{self.index:05}.json"

    @property
    def counts(self) -> Path:
        return self.out / f"shard-{self.index:05}.counts.npy"


class _SplitWriter:
    """The two files of one split of one shard, under temporary names until `publish`."""

    def __init__(self, job: Job, split: str):
        self._bin = job.out / f"{split}-{job.index:05}.bin"
        self._ends_path = ends_path(self._bin)
        self._dtype = np.dtype(job.plan["dtype"]).newbyteorder("<")
        self._eos = np.array([job.plan["tokenizer"]["eos"]], np.int32)
        self._file = temporary(self._bin).open("wb")
        self._pending: list[np.ndarray] = []
        self._sha256 = hashlib.sha256()
        self._ends = array("q")
        self.counts = np.zeros(job.plan["tokenizer"]["vocab"], np.int64)
        self.tokens = self.bytes = self.words = 0

    def add(self, ids: np.ndarray, text: str, text_bytes: int) -> None:
        self._pending += [ids, self._eos]
        self.tokens += len(ids) + 1
        self.bytes += text_bytes
        self.words += len(text.split())
        self._ends.append(self.tokens)

    def flush(self) -> None:
        if self._pending:
            ids = np.concatenate(self._pending)
            self._pending.clear()
            self.counts += np.bincount(ids, minlength=len(self.counts))
            content = ids.astype(self._dtype).tobytes()
            self._sha256.update(content)
            self._file.write(content)

    def publish(self) -> dict[str, Any]:
        self._file.close()
        write_array(self._ends_path, np.array(self._ends, np.int64))
        os.replace(temporary(self._bin), self._bin)
        return {
            "file": self._bin.name,
            "tokens": self.tokens,
            "documents": len(self._ends),
            "bytes": self.bytes,
            "words": self.words,
            "sha256": self._sha256.hexdigest(),
        }

    def close(self) -> None:
        self._file.close()


def write_shard(job: Job, report: Report) -> None:
    """Tokenise one input shard into its train and validation files, then mark it finished."""
    encoder = _encoder(job.plan["tokenizer"]["name"])
    left_out: list[LeftOut] = []
    skipped = 0
    with contextlib.ExitStack() as stack:
        writers = {split: _SplitWriter(job, split) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        for batch in _batches(documents(job.shard, job.plan["text_column"])):
            parts = [part for text in batch if isinstance(text, str) for part in _divided(text, job.plan)]
            strange = [text for text in batch if isinstance(text, LeftOut)]
            skipped += len(strange)
            left_out += strange[: NAMED - len(left_out)]
            before = sum(writer.tokens for writer in writers.values())
            size = 0
            for (split, text), ids in zip(parts, encoder.encode_batch([text for _, text in parts]), strict=True):
                text_bytes = len(text.encode())
                size += text_bytes
                writers[split].add(ids, text, text_bytes)
            for writer in writers.values():
                writer.flush()
            report(len(batch) - len(strange), sum(writer.tokens for writer in writers.values()) - before, size)
        write_array(job.counts, writers["train"].counts)
        mark = {split: writer.publish() for split, writer in writers.items()}
        write_json(job.mark, mark | {"skipped": skipped, "left_out": left_out})


def split_hash(text: str) -> int:
    """Hash of a text in [0, 2^64): whether the text is held out depends on it alone, not on where the text lies."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _divided(text: str, plan: dict) -> list[tuple[str, str]]:
    """(split, text), or without a threshold the text's head to train on and its tail."""
    if plan["threshold"] is not None:
        return [("validation" if split_hash(text) < plan["threshold"] else "train", text)]
    end = max(1, min(len(text) - 1, round(len(text) * (1 - plan["validation"]))))
    return [part for part in (("train", text[:end]), ("validation", text[end:])) if part[1]]


@lru_cache(maxsize=1)
def _encoder(name: str) -> tokenizer.Tokenizer:
    return tokenizer.load(name)


def _batches(texts: Iterable[str | LeftOut]) -> Iterator[list[str | LeftOut]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    yield batch


def write_array(path: Path, values: np.ndarray) -> None:
    """Replace `path` by an array as NumPy's .npy."""
    content = io.BytesIO()
    np.save(content, values)  # on a disk that fills up, NumPy's own write fails without saying why
    write_bytes(path, content.getbuffer())
