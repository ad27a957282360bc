"""The fingerprint of prepared data: one hash of its content, the same wherever the same text was prepared."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation")


class Identity(NamedTuple):
    """The data that parameters were trained on, as checkpoints and results record it."""

    fingerprint: str | None  # None: on none of ours, as parameters that were imported
    tokenizer: str  # hash8


def fingerprint(directory: Path, manifest: dict) -> str:
    """sha256 of a prepared directory's content: tokenizer, and per split all token ids and all document ends.

    It does not depend on the source's name, on how it was cut into files, or on the date.
    """
    digest = hashlib.sha256(f"{manifest['tokenizer']['hash8']} {manifest['dtype']}\n".encode())
    for split in SPLITS:
        counts, start = manifest["splits"][split], 0
        digest.update(f"{split} {counts['tokens']} {counts['documents']}\n".encode())
        for shard in counts["shards"]:
            with (directory / shard["file"]).open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        for shard in counts["shards"]:
            ends = np.load(ends_path(directory / shard["file"])) + start
            digest.update(ends.astype("<i8").tobytes())
            start += shard["tokens"]
    return digest.hexdigest()


def ends_path(shard: Path) -> Path:
    """The file that holds where each document of a shard ends."""
    return shard.with_suffix(".ends.npy")
