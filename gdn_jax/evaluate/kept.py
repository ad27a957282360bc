"""Answers written to a file as they come, so that a killed evaluation goes on and another machine can answer."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdn_jax import distributed
from gdn_jax.errors import UserError


def key_of(*parts: Any) -> str:
    """The key of a request in a file: a hash of everything that its answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Kept:
    """A .jsonl file of answers by key, or memory alone where `path` is None.

    here    facts of the program and the devices that make new answers; a line of the file names them before theirs

    Answers are anything that JSON can hold. A last line that a crash cut short is dropped. Of several processes the
    first alone writes.
    Raises UserError for a line that holds no answer.
    """

    def __init__(self, path: Path | None, here: Mapping[str, Any] | None = None):
        self._path, self._here, self._last = path, here, None
        self._answers: dict[str, tuple[Any, Mapping[str, Any] | None]] = {}
        self._given: list[Mapping[str, Any] | None] = []
        content = path.read_bytes() if path is not None and path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if path is not None and whole != content and distributed.first():
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if "made_by" in row:
                    self._last = row["made_by"]
                else:
                    self._answers[row["key"]] = row["answer"], self._last
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}, line {number}: holds no answer; remove the line, or the file.") from None

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        answer, maker = self._answers[key]
        if maker not in self._given:
            self._given.append(maker)
        return answer

    def makers(self) -> list[Mapping[str, Any] | None]:
        """Who made the answers that were given since this was last called; None: a file that does not name them."""
        given, self._given = self._given, []
        return given

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers by their keys, on disk when this returns."""
        self._answers |= {key: (answer, self._here) for key, answer in answers.items()}
        if self._path is None or not answers or not distributed.first():
            return
        rows = [{"key": key, "answer": answer} for key, answer in answers.items()]
        if self._last != self._here:
            rows.insert(0, {"made_by": self._here})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._last = self._here
