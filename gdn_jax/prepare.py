"""Text to token shards: `prepare` tokenises a source once, in parallel, restartably and reproducibly.

Every input shard (a .jsonl or .parquet file, about 16 MiB of text files, 100 000 rows of a Hugging Face data
set) becomes one train and one validation shard. A document is its tokens and EOS; whether it is held out
depends on its text alone, so equal texts never lie on both sides. Where that leaves a split empty, the text nearest to
it is moved there, and a source of one text is cut by position: its tail is held out. In the output directory:

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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from gdn_jax import config, tokenizer
from gdn_jax.errors import UserError
from gdn_jax.files import NO_SPACE, explained, write_json
from gdn_jax.fingerprint import SPLITS, fingerprint
from gdn_jax.progress import Progress
from gdn_jax.shards import NAMED, Job, split_hash, write_array, write_shard
from gdn_jax.sources import InputShard, documents, find_shards, is_prepared, same_source

FORMAT = 2
IN_PROCESS_BYTES = 64 << 20  # smaller sources are not worth starting processes for


def default_directory(data: config.Data, root: str) -> Path:
    """Where the prepared form of `data` lives: <root>/<name of the source>-<hash8 of the tokenizer>.

    Where the source is a prepared directory itself, that directory.
    """
    if is_prepared(Path(data.source)):
        return Path(data.source)
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

    source       "english-novels" | "python-stdlib" | "hf:owner/name[:config]" | a file, or a folder that is read whole:
                 .jsonl or .ndjson [.gz|.zst] and .parquet hold a document a row, every other file is one in UTF-8
    validation   fraction of documents held out, in (0, 1): one at least, or the tail of the only one
    workers      processes; None: one per core, or this one alone below 64 MiB. The output is always the same
    progress     where the work shows itself; None: on stderr

    Says what is left out and why. Returns `out`. Raises UserError, and leaves nothing behind, when the source, the
    tokenizer or the directory cannot be used; Ctrl-C and a full disk leave what is finished. Processes are spawned: a
    script calls this under `if __name__ == "__main__":`.
    """
    if not 0 < validation < 1:
        raise UserError(f"validation is {validation}; it must be in (0, 1).")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; it must be positive.")
    encoder = tokenizer.load(tokenizer_name)
    with _explained(Path(source)):
        shards = find_shards(source)
    plan = {
        "format": FORMAT,
        "source": source,
        "inputs": _hash_of_inputs(shards),
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
        "threshold": math.ceil(validation * 2**64),  # texts whose hash lies below are held out; None: every text's tail
    }
    with progress or Progress() as display, _locked(out, display):
        if (out / "manifest.json").exists():
            _check_agreement(out / "manifest.json", plan)
            display.say(f"{out} is prepared already.")
            return out
        if any(out.iterdir()) and not any(out.glob("plan.json*")):  # a temporary one of a killed preparation counts
            raise UserError(f"{out} holds files but no prepared data; choose another --out, or an empty one.")
        if any(out.glob("shard-*.json")):
            plan["threshold"] = _check_agreement(out / "plan.json", plan).get("threshold", plan["threshold"])
        _remove(out, "*.tmp")  # of a killed preparation
        try:
            marks = _tokenised(out, plan, shards, workers, display)
            if _lacks_a_split(marks):
                plan = _moved(plan, shards, marks)
                _remove(out, "shard-*")
                marks = _tokenised(out, plan, shards, workers, display)
            manifest = _finish(out, plan, marks)
        except BrokenProcessPool:
            raise UserError(
                f"A process that prepared {out} ended early: it ran out of memory (use fewer workers), or a "
                f"script called prepare outside of `if __name__ == '__main__':`; what is finished is kept."
            ) from None
        except (UserError, OSError) as error:
            full = isinstance(error, OSError) and error.errno in NO_SPACE
            if not (full and any(out.glob("shard-*.json"))):
                _remove(out, "plan.json", "shard-*", "train-[0-9]*", "validation-[0-9]*", "unigram.npy")
            raise
        finally:
            _remove(out, "*.tmp")
        for line in _summary(out, manifest):
            display.say(line)
    return out


def _hash_of_inputs(shards: list[InputShard]) -> str:
    """A hash of the names and sizes of a source's files."""
    return hashlib.sha256(repr([(s.names, s.rows, s.bytes) for s in shards]).encode()).hexdigest()


def check_source(source: str, directory: Path, manifest: dict) -> None:
    """Raises UserError where `directory`, whose name is made of the last part of `source`, was made of another source.

    Text that was moved since is the same source: nothing is left at its old place, names and sizes of files agree.
    """
    made_of, path = manifest["source"], Path(source)
    if path == directory or same_source(made_of, source) or not (source.startswith("hf:") or path.exists()):
        return
    if path.exists() and not Path(made_of).exists() and _hash_of_inputs(find_shards(source)) == manifest.get("inputs"):
        return
    raise UserError(
        f"data.source is {source!r}, and {directory} was made of {made_of!r}, which has the same name; prepare yours "
        f"with gdn data prepare {source} --out DIR, and give that DIR as --data.source."
    )


def _tokenised(out: Path, plan: dict, shards: list[InputShard], workers: int | None, display: Progress) -> list[dict]:
    """What the marks of all shards say, after those without one have been written as the plan says."""
    write_json(out / "plan.json", plan)
    jobs = [Job(index, shard, out, plan) for index, shard in enumerate(shards)]
    open_jobs = [job for job in jobs if not job.mark.exists()]
    workers, count = _worker_count(workers, open_jobs), _Count(display)
    try:
        if workers == 1:
            for job in open_jobs:
                write_shard(job, count.add)
        else:
            _run_pool(open_jobs, workers, count)
    except KeyboardInterrupt:
        finished = sum(job.mark.exists() for job in jobs)
        display.say(f"Stopped with {finished} of {len(jobs)} shards finished; the same command goes on from here.")
        raise
    return [json.loads(job.mark.read_text()) for job in jobs]


def _moved(plan: dict, shards: list[InputShard], marks: list[dict]) -> dict:
    """The plan with the nearest threshold that holds out one text and keeps another; with none for a single text."""
    places = {
        split_hash(text) for shard in shards for text in documents(shard, plan["text_column"]) if isinstance(text, str)
    }
    if not places:
        reasons = [" (" + " ".join(mark["left_out"][0]) + ")" for mark in marks if mark["left_out"]]
        raise UserError(f"Source {plan['source']!r} holds no text{''.join(reasons[:1])}; give one that does.")
    alone = len(places) == 1
    return plan | {"threshold": None if alone else min(max(plan["threshold"], min(places) + 1), max(places))}


def _lacks_a_split(marks: list[dict]) -> bool:
    return not all(any(mark[split]["documents"] for mark in marks) for split in SPLITS)


def _finish(out: Path, plan: dict, marks: list[dict]) -> dict:
    """Write unigram.npy and the manifest from the finished shards, then remove what only a restart needs."""
    if _lacks_a_split(marks):
        raise UserError(f"Source {plan['source']!r} holds one character, too little to hold some out; give more text.")
    splits = {}
    for split in SPLITS:
        parts = [mark[split] for mark in marks]
        totals = {key: sum(part[key] for part in parts) for key in ("tokens", "documents", "bytes", "words")}
        splits[split] = totals | {"shards": parts}
    write_array(out / "unigram.npy", sum(np.load(path) for path in out.glob("shard-*.counts.npy")))
    left_out = [named for mark in marks for named in mark["left_out"]][:NAMED]
    manifest = plan | {"skipped": sum(mark["skipped"] for mark in marks), "left_out": left_out, "splits": splits}
    manifest["fingerprint"] = fingerprint(out, manifest)
    write_json(out / "manifest.json", manifest)
    _remove(out, "shard-*", "plan.json")
    return manifest


def _check_agreement(path: Path, plan: dict) -> dict:
    """What `path` says was prepared, which is what the plan asks for, or a UserError."""
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
        if before != now and not (field == "source" and same_source(before, now)):
            change = f"{field} {before!r}, now it is {now!r}"
            if field == "inputs":
                change = f"other files in {plan['source']}"
            raise UserError(f"{path.parent} was prepared with {change}; choose another --out, or delete this one.")
    return old


def _worker_count(asked: int | None, jobs: list[Job]) -> int:
    if asked is None:
        asked = 1 if sum(job.shard.bytes for job in jobs) < IN_PROCESS_BYTES else os.cpu_count() or 1
    return max(1, min(asked, len(jobs)))


class _Stopped(Exception):
    """A worker leaves its shard unfinished because the preparation ends."""


_worker: dict[str, Any] = {}  # what the initializer received, in a worker process only


def _run_pool(jobs: list[Job], workers: int, count: "_Count") -> None:
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


def _work(job: Job) -> None:
    write_shard(job, _report_to_parent)


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
    made = [directory for directory in (out, *out.parents) if not directory.exists()]
    with _explained(out):
        handle = _hold(out, display)
    try:
        with _explained(out):
            yield
    except BaseException:
        for directory in made:
            with contextlib.suppress(OSError):  # which one that holds something gives
                directory.rmdir()
        raise
    finally:
        os.close(handle)


def _hold(out: Path, display: Progress) -> int:
    """A lock on the directory `out`, made where it is missing."""
    while True:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A worker that runs an unguarded script again would wait for its own parent.
            if multiprocessing.current_process().name != "MainProcess":
                os.close(handle)
                raise UserError(
                    f"Another process prepares {out}; put the call under `if __name__ == '__main__':`."
                ) from None
            display.say(f"Waiting for another process that prepares {out}.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        if out.exists() and os.path.samestat(out.stat(), os.fstat(handle)):
            return handle
        os.close(handle)  # the process waited for has failed and taken its directory away


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn the operating system's errors into the user's sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(explained(error, out)) from error


def _remove(out: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _summary(out: Path, manifest: dict) -> Iterator[str]:
    yield from (f"Left out: {what} {why}." for what, why in manifest["left_out"])
    if (more := manifest["skipped"] - len(manifest["left_out"])) > 0:
        yield f"Left out: {more:,} more."
    if manifest["threshold"] is None:
        yield "There is one text: its tail is held out."
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    yield (
        f"Prepared {out}, fingerprint {manifest['fingerprint'][:8]}: train {train['tokens']:,} tokens in "
        f"{train['documents']:,} documents, validation {held_out['tokens']:,} in {held_out['documents']:,}; "
        f"{manifest['skipped']:,} left out."
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
