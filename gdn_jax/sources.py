"""Where text comes from: files, folders and data sets, cut into input shards and read as documents."""

import contextlib
import gzip
import importlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal, NamedTuple

from gdn_jax.errors import UserError

TEXT_SHARD_BYTES = 16 << 20
HF_SHARD_ROWS = 100_000
JSONL = tuple(name + packed for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst"))
PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz")
NOVELS = Path(__file__).parent / "corpus" / "english_novels.jsonl.gz"
BUILT_IN = ("english-novels", "python-stdlib")  # sources that are everywhere: they prepare themselves


class LeftOut(NamedTuple):
    """A part of a source that is not read as a document, and the reason."""

    what: str  # a file, or a line or row of one
    why: str


@dataclass(frozen=True)
class InputShard:
    """A part of a source that one process reads in order."""

    kind: Literal["text", "jsonl", "parquet", "hf"]
    root: str  # the source's folder, or the Hugging Face id
    names: tuple[str, ...]  # files below root; text: one document each, otherwise a single file
    bytes: int
    rows: tuple[int, int] = (0, 0)  # hf: first row and the one after the last

    @property
    def paths(self) -> list[Path]:
        return [Path(self.root, name) for name in self.names]


def find_shards(source: str) -> list[InputShard]:
    """Cut `source` (see `prepare` for what it can be) into input shards, always in the same way and order."""
    if source.startswith("hf:"):
        rows = len(_load_hf(source))
        starts = range(0, rows, HF_SHARD_ROWS)
        return [InputShard("hf", source, (), 0, (start, min(start + HF_SHARD_ROWS, rows))) for start in starts]
    if source == "english-novels":
        return [InputShard("jsonl", str(NOVELS.parent), (NOVELS.name,), NOVELS.stat().st_size)]
    if source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return _text_shards(root, [name for name in _walk(root) if name.endswith(".py")])
    path = Path(source)
    if not path.exists():
        built_in = " or ".join(map(repr, BUILT_IN))
        raise UserError(f"Source {source!r} is no file or folder, nor {built_in}, nor 'hf:owner/name'; check the path.")
    if is_prepared(path):
        raise UserError(
            f"{source} is prepared data already: give it as --data.source, or prepare the text that it was made of."
        )
    root, names = (path, _walk(path)) if path.is_dir() else (path.parent, [path.name])
    kinds = {name: _kind(name) for name in names}
    shards = _text_shards(root, [name for name, kind in kinds.items() if kind == "text"])
    shards += [
        InputShard(kind, str(root), (name,), (root / name).stat().st_size)
        for name, kind in kinds.items()
        if kind != "text"
    ]
    if not shards:
        raise UserError(f"Source {source!r} holds no text files; give a folder with some.")
    return shards


def same_source(one: str, other: str) -> bool:
    """Whether two names mean one source: paths may be written differently."""
    paths = not any(name in BUILT_IN or name.startswith("hf:") for name in (one, other))
    return one == other or (paths and Path(one).resolve() == Path(other).resolve())


def is_prepared(directory: Path) -> bool:
    """Whether `prepare` has written to this directory, its files whole or not."""
    return any(directory.glob("train-[0-9]*.bin"))


def documents(shard: InputShard, column: str) -> Iterator[str | LeftOut]:
    """The texts of a shard in order, none of them empty; a LeftOut stands where something is not a text."""
    if shard.kind == "text":
        for path in shard.paths:
            yield _whole_file(path)
    elif shard.kind == "jsonl":
        yield from _jsonl(shard.paths[0], column)
    elif shard.kind == "parquet":
        yield from _parquet(shard.paths[0], column)
    else:
        data = _load_hf(shard.root)
        _require_column(shard.root, column, data.column_names)
        _require_strings(shard.root, column, getattr(data.features[column], "dtype", data.features[column]))
        rows = data.select_columns(column).select(range(*shard.rows)).iter(1000)
        yield from _rows((text for batch in rows for text in batch[column]), shard.root, shard.rows[0])


def _kind(name: str) -> Literal["text", "jsonl", "parquet"]:
    """How a file is read, by the end of its name in any case."""
    if name.lower().endswith(JSONL):
        return "jsonl"
    return "parquet" if name.lower().endswith(".parquet") else "text"


def _whole_file(path: Path) -> str | LeftOut:
    if path.suffix.lower() in PACKED:
        return LeftOut(str(path), "is packed: unpack it")
    if path.suffix.lower() == ".json":
        return LeftOut(str(path), "is JSON and no prose: write an object a line to a .jsonl file")
    with contextlib.suppress(UnicodeDecodeError):
        if "\0" not in (text := path.read_bytes().decode()):
            return _text(text, str(path))
    return LeftOut(str(path), "is not UTF-8 text: convert it")


def _text(value: str | None, where: str) -> str | LeftOut:
    return value or LeftOut(where, "is null" if value is None else "is empty")


def _rows(values: Iterable[str | None], where: str, first: int = 0) -> Iterator[str | LeftOut]:
    for row, value in enumerate(values, first):
        yield _text(value, f"{where}, row {row}")


def _walk(root: Path) -> list[str]:
    """Visible files below `root`, without installed packages and prepared data, relative and sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name not in ("site-packages", "dist-packages")
            if not is_prepared(Path(folder, name))
        ]
        found += [Path(folder, file).relative_to(root).as_posix() for file in files if not file.startswith(".")]
    return sorted(found)


def _text_shards(root: Path, names: Iterable[str]) -> list[InputShard]:
    shards, group, size = [], [], 0
    for name in names:
        group.append(name)
        size += (root / name).stat().st_size
        if size >= TEXT_SHARD_BYTES:
            shards.append(InputShard("text", str(root), tuple(group), size))
            group, size = [], 0
    if group:
        shards.append(InputShard("text", str(root), tuple(group), size))
    return shards


def _jsonl(path: Path, column: str) -> Iterator[str | LeftOut]:
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if path.suffix.lower() == ".zst":
        damage += (_library("zstandard", path).ZstdError,)
    number = 0
    try:
        with _open_lines(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(json.loads(line), column, f"{path}, line {number}")
    except (ValueError, RecursionError) as error:  # not JSON, nested beyond all sense, or not UTF-8
        raise UserError(f"{path}, line {number}: not valid JSON ({error}); repair or remove the line.") from None
    except damage as error:
        raise UserError(f"{path} is damaged after line {number} ({error}); fetch it again.") from None


def _open_lines(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        zstandard = _library("zstandard", path)
        # Files are often several frames glued together, and packed with long windows.
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
            path.open("rb"), read_across_frames=True
        )
        return io.BufferedReader(reader)
    return path.open("rb")


def _text_of(record: Any, column: str, where: str) -> str | LeftOut:
    if not isinstance(record, dict):
        raise UserError(f"{where}: holds {type(record).__name__}; each line must be a JSON object.")
    _require_column(where, column, record)
    if not isinstance(record[column], str | None):
        raise UserError(f"{where}: field {column!r} is {type(record[column]).__name__}; it must be a string.")
    # JSON can spell lone surrogates, which are no text
    return _text(record[column] and record[column].encode("utf-8", "replace").decode(), where)


def _parquet(path: Path, column: str) -> Iterator[str | LeftOut]:
    parquet, arrow = _library("pyarrow.parquet", path), _library("pyarrow", path)
    try:
        with parquet.ParquetFile(path) as file:
            _require_column(str(path), column, file.schema_arrow.names)
            _require_strings(str(path), column, file.schema_arrow.field(column).type)
            batches = file.iter_batches(batch_size=1024, columns=[column])
            yield from _rows((text for batch in batches for text in batch.column(0).to_pylist()), str(path))
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path} is no parquet file or is damaged ({error}); fetch it again.") from None


def _load_hf(source: str) -> Any:
    datasets = _library("datasets", source)
    name, _, configuration = source.removeprefix("hf:").partition(":")
    if not name.strip("/"):
        raise UserError(f"Source {source!r} names no data set; write 'hf:owner/name'.")
    try:
        return datasets.load_dataset(name, configuration or None, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"Data set {source} cannot be loaded: {error}") from error


def _require_column(where: str, column: str, columns: Iterable[str]) -> None:
    if column not in columns:
        raise UserError(f"{where}: there is no text column {column!r}; there are {', '.join(map(str, columns))}.")


def _require_strings(where: str, column: str, kind: object) -> None:
    if str(kind) not in ("string", "large_string"):
        raise UserError(f"{where}: column {column!r} is of type {kind}; it must hold strings.")


def _library(name: str, what: object) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        library = name.partition(".")[0]
        raise UserError(f"{what} needs the library {library}; install it with: pip install 'gdn_jax[data]'.") from None
