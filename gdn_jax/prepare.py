"""Text to token shards: `prepare` tokenises a source once, in parallel, restartably and reproducibly.

Every input shard (a .jsonl or .parquet file, about 16 MiB of text files, 100 000 rows of a Hugging Face data
set) becomes one train and one validation shard. A document is its tokens and EOS; whether it is held out
depends on its text alone, so equal texts never lie on both sides. In the output directory:

    {train,validation}-00000.bin        token ids, little endian uint16 (uint32 when vocab > 65536)
    {train,validation}-00000.ends.npy   int64, where each document ends in its shard
    unigram.npy                         int64[vocab], how often each token occurs in the train split
    manifest.json                       written last: what it was made of, counts, hashes and the fingerprint

The fingerprint says which data it is: it is made of the tokens, where their documents end, the split and the tokenizer,
and of nothing else, so that every machine that prepares the same text in the same way finds the same one.

Until the manifest is written, plan.json says what is being made and shard-00000.json marks a finished shard.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gdn_jax import config, tokenizer
from gdn_jax.errors import UserError
from gdn_jax.files import explained
from gdn_jax.fingerprint import SPLITS, ends_path, fingerprint
from gdn_jax.progress import Progress
from gdn_jax.sources import InputShard, documents, find_shards

FORMAT = 2
IN_PROCESS_BYTES = 64 << 20  # smaller sources are not worth starting processes for
BATCH_CHARACTERS = 1 << 20  # of text tokenised, written and reported at once

Report = Callable[[int, int, int], None]  # documents, tokens and bytes of text done since the last call


def default_directory(data: config.Data, root: str) -> Path:
    """Where the prepared form of `data` lives: <root>/<name of the source>-<hash8 of the tokenizer>."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(data.source).name or "source")
    return Path(root) / f"{name}-{tokenizer.load(data.tokenizer).hash8}"


def prepare(
    source: str,
    out: Path,
    tokenizer_name: str,
    *,
    validation: float,
    text_column: str = "text",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Tokenise `source` into the directory `out`; an interrupted preparation goes on where it stopped.

    source       "english-novels" | "python-stdlib" | a text file or folder | .jsonl[.gz|.zst] or .parquet, file or
                 folder | "hf:owner/name[:config]"
    validation   fraction of documents held out, in (0, 1)
    workers      processes; None: one per core, or this one alone below 64 MiB. The output is always the same
    progress     where the work shows itself; None: on stderr

    Returns `out`. Raises UserError when the source, the tokenizer or the directory cannot be used, or a split
    is empty. Processes are spawned: a script calls this under `if __name__ == "__main__":`.
    """
    if not 0 < validation < 1:
        raise UserError(f"validation is {validation}; it must be in (0, 1).")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; it must be positive.")
    encoder = tokenizer.load(tokenizer_name)
    shards = find_shards(source)
    plan = {
        "format": FORMAT,
        "source": source,
        "inputs": hashlib.sha256(repr([(s.names, s.rows, s.bytes) for s in shards]).encode()).hexdigest(),
        "python": platform.python_version() if source == "python-stdlib" else None,
        "tokenizer": {
            "name": tokenizer_name,
            "hash8": encoder.hash8,
            "vocab": encoder.vocab,
            "eos": encoder.eos,
        },
        "text_column": text_column,
        "dtype": "uint16" if encoder.vocab <= 1 << 16 else "uint32",
        "validation": validation,
    }
    with progress or Progress() as display, _locked(out, display):
        if (out / "manifest.json").exists():
            _check_agreement(out / "manifest.json", plan)
            display.say(f"{out} is prepared already.")
            return out
        if any(out.iterdir()) and not any(out.glob("plan.json*")):  # a temporary one of a killed preparation counts
            raise UserError(f"{out} holds files but no prepared data; choose another --out, or an empty one.")
        if any(out.glob("shard-*.json")):
            _check_agreement(out / "plan.json", plan)
        _remove_temporary(out)  # of a killed preparation
        _write_json(out / "plan.json", plan)
        jobs = [_Job(index, shard, out, plan) for index, shard in enumerate(shards)]
        open_jobs = [job for job in jobs if not job.mark.exists()]
        workers = _worker_count(workers, open_jobs)
        try:
            count = _Count(display)
            if workers == 1:
                for job in open_jobs:
                    _write_shard(job, count.add)
            else:
                _run_pool(open_jobs, workers, count)
        except KeyboardInterrupt:
            finished = sum(job.mark.exists() for job in jobs)
            display.say(f"Stopped with {finished} of {len(jobs)} shards finished; the same command goes on from here.")
            raise
        except BrokenProcessPool:
            raise UserError(
                f"A process that prepared {out} ended early: it ran out of memory (use fewer workers), or a "
                f"script called prepare outside of `if __name__ == '__main__':`; what is finished is kept."
            ) from None
        finally:
            _remove_temporary(out)
        manifest = _finish(out, plan, jobs)
        display.say(_summary(out, manifest))
    return out


@dataclass(frozen=True)
class _Job:
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

    def __init__(self, job: _Job, split: str):
        self._bin = job.out / f"{split}-{job.index:05}.bin"
        self._ends_path = ends_path(self._bin)
        self._dtype = np.dtype(job.plan["dtype"]).newbyteorder("<")
        self._eos = np.array([job.plan["tokenizer"]["eos"]], np.int32)
        self._file = _temporary(self._bin).open("wb")
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
        _save_array(self._ends_path, np.array(self._ends, np.int64))
        os.replace(_temporary(self._bin), self._bin)
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


def _write_shard(job: _Job, report: Report) -> None:
    """Tokenise one input shard into its train and validation files, then mark it finished."""
    encoder = _encoder(job.plan["tokenizer"]["name"])
    threshold = math.ceil(job.plan["validation"] * 2**64)
    skipped = 0
    with _explained(job.out), contextlib.ExitStack() as stack:
        writers = {split: _SplitWriter(job, split) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        for batch in _batches(documents(job.shard, job.plan["text_column"])):
            texts = [text for text in batch if text]
            skipped += len(batch) - len(texts)
            before = sum(writer.tokens for writer in writers.values())
            size = 0
            for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
                content = text.encode()
                size += len(content)
                held_out = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < threshold
                writers["validation" if held_out else "train"].add(ids, text, len(content))
            for writer in writers.values():
                writer.flush()
            report(len(texts), sum(writer.tokens for writer in writers.values()) - before, size)
        _save_array(job.counts, writers["train"].counts)
        mark = {split: writer.publish() for split, writer in writers.items()} | {"skipped": skipped}
        _write_json(job.mark, mark)


@lru_cache(maxsize=1)
def _encoder(name: str) -> tokenizer.Tokenizer:
    return tokenizer.load(name)


def _batches(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text or "")
        if size >= BATCH_CHARACTERS or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    yield batch


def _finish(out: Path, plan: dict, jobs: list[_Job]) -> dict:
    """Write unigram.npy and the manifest from the finished shards, then remove what only a restart needs."""
    marks = [json.loads(job.mark.read_text()) for job in jobs]
    splits = {}
    for split in SPLITS:
        parts = [mark[split] for mark in marks]
        totals = {key: sum(part[key] for part in parts) for key in ("tokens", "documents", "bytes", "words")}
        splits[split] = totals | {"shards": parts}
    leftovers = [path for job in jobs for path in (job.mark, job.counts)] + [out / "plan.json"]
    skipped = sum(mark["skipped"] for mark in marks)
    for split in SPLITS:
        if splits[split]["documents"] == 0:
            shards = [out / mark[name]["file"] for mark in marks for name in SPLITS]
            for path in leftovers + shards + [ends_path(shard) for shard in shards]:
                path.unlink(missing_ok=True)
            total = sum(splits[name]["documents"] for name in SPLITS)
            raise UserError(
                f"The {split} split of {plan['source']} is empty with {total} documents ({skipped} empty or "
                f"unreadable ones left out) and a validation fraction of {plan['validation']}; change the "
                f"fraction or divide the text into more documents."
            )
    _save_array(out / "unigram.npy", sum(np.load(job.counts) for job in jobs))
    manifest = plan | {"skipped": skipped, "splits": splits}
    manifest["fingerprint"] = fingerprint(out, manifest)
    _write_json(out / "manifest.json", manifest)
    for path in leftovers:
        path.unlink()
    return manifest


def _check_agreement(path: Path, plan: dict) -> None:
    try:
        old = json.loads(path.read_text())
        old["tokenizer"]["hash8"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete {path.parent} and run the same command again.") from None
    # The tokenizer's path may differ: its hash is what counts.
    for field in ("format", "source", "inputs", "python", "tokenizer.hash8", "text_column", "validation"):
        group, _, key = field.partition(".")
        before, now = (tree.get(group, {}) for tree in (old, plan))
        before, now = (before.get(key), now[key]) if key else (before, now)
        if before != now:
            change = f"{field} {before!r}, now it is {now!r}"
            if field == "inputs":
                change = f"other files in {plan['source']}"
            raise UserError(f"{path.parent} was prepared with {change}; choose another --out, or delete this one.")


def _worker_count(asked: int | None, jobs: list[_Job]) -> int:
    if asked is None:
        asked = 1 if sum(job.shard.bytes for job in jobs) < IN_PROCESS_BYTES else os.cpu_count() or 1
    return max(1, min(asked, len(jobs)))


class _Stopped(Exception):
    """A worker leaves its shard unfinished because the preparation ends."""


_worker: dict[str, Any] = {}  # what the initializer received, in a worker process only


def _run_pool(jobs: list[_Job], workers: int, count: "_Count") -> None:
    context = multiprocessing.get_context("spawn")
    totals, stop = context.Array("q", 3), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (totals, stop)) as pool:
        try:
            # Ctrl-C reaches the whole group. Workers start with it blocked: the parent decides.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending = {pool.submit(_work, job) for job in jobs}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while pending:
                done, pending = wait(pending, timeout=0.2)
                for future in done:
                    future.result()
                count.show(totals[:])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _start_worker(totals: Any, stop: Any) -> None:
    _worker.update(totals=totals, stop=stop)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(job: _Job) -> None:
    _write_shard(job, _report_to_parent)


def _report_to_parent(*done: int) -> None:
    if _worker["stop"].is_set():
        raise _Stopped
    totals = _worker["totals"]
    with totals.get_lock():
        for index, value in enumerate(done):
            totals[index] += value


@contextlib.contextmanager
def _locked(out: Path, display: Progress) -> Iterator[None]:
    """One preparation at a time in a directory; a second one waits and then finds the work done."""
    with _explained(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A worker that runs an unguarded script again would wait for its own parent.
            if multiprocessing.current_process().name != "MainProcess":
                raise UserError(
                    f"Another process prepares {out}; put the call under `if __name__ == '__main__':`."
                ) from None
            display.say(f"Waiting for another process that prepares {out}.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        with _explained(out):
            yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn the operating system's errors into the user's sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(explained(error, out)) from error


def _temporary(path: Path) -> Path:
    # The process id keeps a killed preparation's dying workers away from the files of the one that follows.
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _remove_temporary(out: Path) -> None:
    for left in out.glob("*.tmp"):
        left.unlink(missing_ok=True)


def _save_array(path: Path, values: np.ndarray) -> None:
    with _temporary(path).open("wb") as file:
        np.save(file, values)
    os.replace(_temporary(path), path)


def _write_json(path: Path, tree: dict) -> None:
    _temporary(path).write_text(json.dumps(tree, indent=1) + "\n")
    os.replace(_temporary(path), path)


def _summary(out: Path, manifest: dict) -> str:
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    return (
        f"Prepared {out}, fingerprint {manifest['fingerprint'][:8]}: train {train['tokens']:,} tokens in "
        f"{train['documents']:,} documents, validation {held_out['tokens']:,} in {held_out['documents']:,}; "
        f"{manifest['skipped']:,} empty or unreadable ones left out."
    )


class _Count:
    """Documents, tokens and bytes done so far, shown with their rate."""

    def __init__(self, progress: Progress):
        self._progress, self._totals, self._start = progress, [0, 0, 0], time.monotonic()

    def add(self, *done: int) -> None:
        self.show([total + value for total, value in zip(self._totals, done, strict=True)])

    def show(self, totals: list[int]) -> None:
        self._totals = totals
        rate = totals[2] / 1e6 / max(time.monotonic() - self._start, 1e-9)
        self._progress.show(f"{totals[0]:,} documents, {totals[1]:,} tokens, {rate:.1f} MB/s")
