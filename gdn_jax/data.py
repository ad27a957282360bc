"""Prepared tokens to batches: memory-mapped shards, windows of T + 1 tokens, Grain for order and prefetching.

Training order is a function of (seed, step) alone: step t takes entries [t * batch, (t + 1) * batch) of an
endless sequence of shuffled epochs, and process p of P every P-th of them. A resumed run therefore needs one
integer, and the number of processes may change.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gdn_jax.errors import UserError
from gdn_jax.fingerprint import SPLITS, Identity, ends_path, fingerprint
from gdn_jax.prepare import FORMAT

SHARD_FIELDS = {"file", "tokens", "documents", "bytes", "words", "sha256"}
VERIFY_BYTES = 1 << 30  # hashing more than this at every start takes too long
# One element is a whole batch, so a few in flight are enough.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

Batch = dict[str, np.ndarray]


class TokenView:
    """The tokens of one split as one sequence: len() and slices of step 1, read from memory-mapped shards."""

    def __init__(self, shards: list[np.ndarray]):
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in steps of 1, not {step}")
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self._starts[first])
            part = self._shards[first][offset : offset + stop - start]
            parts.append(part)
            start += len(part)
            first += 1
        return np.concatenate(parts) if parts else self._shards[0][:0]

    def __repr__(self) -> str:
        return f"TokenView({len(self)} tokens in {len(self._shards)} shards)"


@dataclass(frozen=True)
class Prepared:
    """A directory written by `gdn_jax.prepare.prepare`, opened and checked by `open_prepared`."""

    directory: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """sha256 of the content: tokens, document ends, split and tokenizer (see gdn_jax.fingerprint)."""
        return self.manifest["fingerprint"]

    @property
    def identity(self) -> Identity:
        """What a checkpoint records of the data it was trained on."""
        return Identity(self.fingerprint, self.manifest["tokenizer"]["hash8"])

    @property
    def vocab(self) -> int:
        return self.manifest["tokenizer"]["vocab"]

    @property
    def eos(self) -> int:
        return self.manifest["tokenizer"]["eos"]

    def tokens(self, split: str) -> TokenView:
        """All tokens of "train" or "validation", shard after shard."""
        return self._views[split]

    def document_ends(self, split: str) -> np.ndarray:
        """int64 [documents]: where each document ends (one past its EOS) in `tokens(split)`."""
        return self._ends[split]

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the split's text, the denominator of bits per byte."""
        return self.manifest["splits"][split]["bytes"]

    def unigram_nats(self, ranges: Iterable[range] | None = None, split: str = "validation") -> float:
        """Cross entropy of the tokens in `ranges` of a split (None: all) under token frequencies alone, nats per token.

        p(v) = (n_v + 1) / (sum n + vocab) with n the counts in the train split.
        """
        train = np.load(self.directory / "unigram.npy")
        log_p = np.log(train + 1.0) - np.log(train.sum() + len(train))
        tokens, counts, block = self.tokens(split), np.zeros_like(train), 1 << 24
        for part in [range(len(tokens))] if ranges is None else ranges:
            for start in range(part.start, part.stop, block):
                counts += np.bincount(tokens[start : min(start + block, part.stop)], minlength=len(train))
        return float(-(counts * log_p).sum() / counts.sum())

    @cached_property
    def _views(self) -> dict[str, TokenView]:
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        return {
            split: TokenView(
                [
                    # an empty file cannot be mapped
                    np.memmap(self.directory / shard["file"], dtype, "r") if shard["tokens"] else np.empty(0, dtype)
                    for shard in self.manifest["splits"][split]["shards"]
                ]
            )
            for split in SPLITS
        }

    @cached_property
    def _ends(self) -> dict[str, np.ndarray]:
        ends = {}
        for split in SPLITS:
            parts, start = [], 0
            for shard in self.manifest["splits"][split]["shards"]:
                parts.append(np.load(ends_path(self.directory / shard["file"])) + start)
                start += shard["tokens"]
            ends[split] = np.concatenate(parts)
        return ends


def open_prepared(directory: str | Path, *, tokenizer_hash: str | None, verify: bool | None = None) -> Prepared:
    """Open a prepared directory, checking that its files are whole and made by the expected tokenizer.

    tokenizer_hash   hash8 of the tokenizer the model was built for; None: any
    verify           recompute the hash of every shard; None: only when they hold less than 1 GiB

    Raises UserError that names the file, what was found and how to prepare again.
    """
    directory = Path(directory)
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        begun = (directory / "plan.json").exists()
        found = "its preparation has not finished" if begun else f"{path} cannot be read ({error.strerror})"
        raise UserError(
            f"{directory} holds no prepared data: {found}; run: gdn data prepare SOURCE --out {directory}."
        ) from None
    except ValueError:
        raise UserError(
            f"{path} is damaged: it is not JSON; delete {directory} and run: gdn data prepare SOURCE --out {directory}."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} is not of format {FORMAT}, the one this version reads; delete {directory} and run: "
            f"gdn data prepare SOURCE --out {directory}."
        )
    try:
        made_by, width = manifest["tokenizer"], np.dtype(manifest["dtype"]).itemsize
        command = (
            f"gdn data prepare {manifest['source']} --out {directory} --tokenizer {made_by['name']} "
            f"--validation {manifest['validation']}"
        )
        shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
        complete = isinstance(manifest["fingerprint"], str)
        complete &= {"hash8", "vocab", "eos"} <= set(made_by) and all(set(shard) >= SHARD_FIELDS for shard in shards)
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(
            f"{path} is damaged: fields are missing; delete {directory} and run: "
            f"gdn data prepare SOURCE --out {directory}."
        )
    again = f"delete {directory} and run: {command}"
    if tokenizer_hash is not None and made_by["hash8"] != tokenizer_hash:
        raise UserError(
            f"{directory} was made by tokenizer {made_by['name']} with hash {made_by['hash8']}, not {tokenizer_hash}; "
            f"use that one as data.tokenizer, or prepare into another directory."
        )
    for shard in shards:
        _check_size(directory / shard["file"], shard["tokens"] * width, again)
        ends = _load(ends_path(directory / shard["file"]), again)
        if (len(ends), int(ends[-1]) if len(ends) else 0) != (shard["documents"], shard["tokens"]):
            raise UserError(
                f"{ends_path(directory / shard['file'])} has {len(ends)} document ends, expected "
                f"{shard['documents']} with the last at token {shard['tokens']}; {again}."
            )
    if len(_load(directory / "unigram.npy", again)) != made_by["vocab"]:
        raise UserError(f"{directory / 'unigram.npy'} does not have {made_by['vocab']} counts; {again}.")
    if verify is None:
        verify = sum(shard["tokens"] for shard in shards) * width < VERIFY_BYTES
    for shard in shards if verify else ():
        with (directory / shard["file"]).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard["sha256"]:
            raise UserError(
                f"{directory / shard['file']} was altered: its sha256 is {found[:8]}..., expected "
                f"{shard['sha256'][:8]}...; {again}."
            )
    prepared = Prepared(directory, manifest)
    if verify and (found := fingerprint(directory, manifest)) != prepared.fingerprint:
        raise UserError(
            f"{directory} was altered: its fingerprint is {found[:8]}..., expected {prepared.fingerprint[:8]}...; "
            f"{again}."
        )
    return prepared


class TokenWindows:
    """Random access to windows of one split: item i is tokens [i T, i T + T + 1), inputs and shifted targets.

    Items: {"tokens": int32 [T+1]} and, with segments, {"segment_ids": int32 [T+1]}, the index in the split of
    the document each token belongs to (EOS belongs to the document it ends). What is left after the last
    whole window is dropped. Windows may cross shards.
    """

    def __init__(self, prepared: Prepared, split: str, seq_len: int, *, with_segments: bool = False):
        self._split, self._seq_len = split, seq_len
        self._tokens = prepared.tokens(split)
        self._ends = prepared.document_ends(split) if with_segments else None

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._seq_len)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._seq_len
        stop = start + self._seq_len + 1
        window = {"tokens": self._tokens[start:stop].astype(np.int32)}
        if self._ends is not None:
            first, last = np.searchsorted(self._ends, [start, stop], "right")
            ids = first + np.searchsorted(self._ends[first:last], np.arange(start, stop), "right")
            window["segment_ids"] = ids.astype(np.int32)
        return window

    def __repr__(self) -> str:  # Grain stores and compares it
        return f"TokenWindows({self._split}, {len(self)} windows of {self._seq_len})"


def train_batches(
    prepared: Prepared,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_step: int,
    with_segments: bool,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches from step `start_step` on: dicts of int32 [batch_size / process_count, T+1].

    Keys as in TokenWindows. Every epoch is a new permutation of all windows; batches may span two epochs.
    batch_size counts windows over all processes, and the windows of a step do not depend on their number. The
    iterator has close().
    """
    if batch_size % process_count:
        raise UserError(f"batch size {batch_size} is not divisible by the {process_count} processes; use a multiple.")
    if not 0 <= process_index < process_count or start_step < 0:
        raise UserError(f"process {process_index} of {process_count} at step {start_step}: both count from 0.")
    check_length(prepared, seq_len, batch_size)
    windows = TokenWindows(prepared, "train", seq_len, with_segments=with_segments)
    entries = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    local = entries[process_index::process_count]
    # Endless data has no remainder to drop, but rounding its length up overflows for a batch of one.
    batches = local.batch(batch_size // process_count, drop_remainder=True)
    iterator = iter(batches.to_iter_dataset(READ_OPTIONS))
    iterator.set_state({"next_index": start_step})
    return iterator


@dataclass(frozen=True)
class ValidationWindows:
    """The held-out windows that a training run measures its loss on, always the same: spread evenly over the split."""

    prepared: Prepared
    seq_len: int
    indices: tuple[int, ...]  # of `of` windows side by side
    of: int

    def described(self) -> dict[str, Any]:
        """The facts that a run records about these windows, with a unigram model's cross entropy on their targets."""
        starts = (index * self.seq_len + 1 for index in self.indices)
        unigram = self.prepared.unigram_nats(range(start, start + self.seq_len) for start in starts)
        return {
            "data": self.prepared.fingerprint,
            "seq_len": self.seq_len,
            "windows": list(self.indices),
            "of_windows": self.of,
            "unigram_nats_per_token": unigram,
        }


def validation_windows(prepared: Prepared, seq_len: int, count: int) -> ValidationWindows:
    """`count` of the W whole held-out windows, numbers floor((i + 1/2) W / count); all of them where W <= count."""
    check_held_out(prepared, seq_len)
    of = (len(prepared.tokens("validation")) - 1) // seq_len
    count = min(count, of)
    return ValidationWindows(prepared, seq_len, tuple((2 * i + 1) * of // (2 * count) for i in range(count)), of)


def validation_batches(windows: ValidationWindows, *, batch_size: int, with_segments: bool) -> Iterator[Batch]:
    """The windows in order, keyed as in training.

    "weights" float32 [batch_size] is 1 for a window and 0 for the rows of zeros that fill up the last batch.
    """
    source = TokenWindows(windows.prepared, "validation", windows.seq_len, with_segments=with_segments)
    for start in range(0, len(windows.indices), batch_size):
        rows = [source[index] for index in windows.indices[start : start + batch_size]]
        missing = batch_size - len(rows)
        batch = {key: np.pad(np.stack([row[key] for row in rows]), ((0, missing), (0, 0))) for key in rows[0]}
        yield batch | {"weights": (np.arange(batch_size) < len(rows)).astype(np.float32)}


def check_length(prepared: Prepared, seq_len: int, batch_size: int) -> None:
    """Raises UserError unless there is enough text to train and to validate."""
    check_held_out(prepared, seq_len)
    found = len(TokenWindows(prepared, "train", seq_len))
    if found < batch_size:
        raise UserError(
            f"{prepared.directory} has {found} training windows of data.seq_len {seq_len}, too few for "
            f"optim.batch_size {batch_size}; lower one of them, or prepare more text."
        )


def check_held_out(prepared: Prepared, seq_len: int) -> None:
    """Raises UserError unless there is at least one held-out window."""
    found = len(prepared.tokens("validation"))
    if found < seq_len + 1:
        raise UserError(
            f"{prepared.directory} has {found} held-out tokens, too few for one window of data.seq_len {seq_len} + 1; "
            f"lower it, or prepare with a larger --validation."
        )


def _check_size(path: Path, expected: int, again: str) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes, expected {expected}"
        raise UserError(f"{path} {state}; {again}.")


def _load(path: Path, again: str) -> np.ndarray:
    try:
        # an empty array cannot be mapped
        return np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} is missing or truncated; {again}.") from None
