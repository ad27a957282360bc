import errno
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_tokenizer import save_json_tokenizer

from gdn_jax import config, prepare, sources
from gdn_jax.errors import UserError
from gdn_jax.progress import SILENT, Progress
from gdn_jax.shards import split_hash
from gdn_jax.tokenizer import ByteTokenizer

FRACTION = 0.2
KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from gdn_jax.prepare import prepare
from gdn_jax.progress import Progress

def end_midway():
    while sum(1 for _ in Path(sys.argv[2]).glob("shard-*.json")) < 3:
        time.sleep(0.001)
    if sys.argv[4] == "SIGINT":
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does, workers included
    else:
        os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=end_midway, daemon=True).start()
prepare(sys.argv[1], Path(sys.argv[2]), "byte", validation=0.2, workers=int(sys.argv[3]), progress=Progress(say=print))
"""


def make_texts(count, seed=0, words=60):
    rng = np.random.default_rng(seed)
    vocabulary = np.array(["wave", "größe", "of", "the", "波", "x\n", "λ", "length"])
    return [f"{i} " + " ".join(rng.choice(vocabulary, rng.integers(1, words))) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def make_jsonl_folder(folder, files, count, words=60):
    folder.mkdir()
    for index in range(files):
        write_jsonl(folder / f"{index:03}.jsonl", make_texts(count, seed=index, words=words))
    return str(folder)


def run(source, out, name="byte", **options):
    options = {"validation": FRACTION, "workers": 1, "progress": SILENT} | options
    return prepare.prepare(str(source), out, name, **options)


def contents(directory, pattern="*"):
    return {path.name: path.read_bytes() for path in sorted(directory.glob(pattern))}


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


def texts_of(directory, split):
    """Every text of a split, decoded from the shards through their ends."""
    texts, manifest = [], manifest_of(directory)
    for shard in manifest["splits"][split]["shards"]:
        tokens = np.fromfile(directory / shard["file"], manifest["dtype"])
        ends = np.load((directory / shard["file"]).with_suffix(".ends.npy"))
        for start, end in zip([0, *ends], ends, strict=False):
            assert tokens[end - 1] == 256 and 256 not in tokens[start : end - 1]
            texts.append(ByteTokenizer().decode_bytes(tokens[start:end]).decode())
    return texts


def test_output_does_not_depend_on_the_workers(tmp_path):
    source = make_jsonl_folder(tmp_path / "in", 5, 200)
    outs = [run(source, tmp_path / f"out{workers}", workers=workers) for workers in (1, 2, 3)]
    first = contents(outs[0])
    assert len(first) == 5 * 4 + 2 and not any("shard" in name or "plan" in name for name in first)
    assert contents(outs[1]) == first and contents(outs[2]) == first


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_restart_after_an_end_midway_equals_an_uninterrupted_run(tmp_path, workers, name):
    source, out = make_jsonl_folder(tmp_path / "in", 60, 200, words=250), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, source, str(out), str(workers), name]
    # This returns when every process holding the pipes has ended, so it also shows that no worker lives on.
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert ended.returncode == -getattr(signal, name)
    marks = list(out.glob("shard-*.json"))
    assert 3 <= len(marks) < 60 and not (out / "manifest.json").exists()
    if name == "SIGINT":
        found = re.search(r"Stopped with (\d+) of 60 shards finished", ended.stdout)
        assert int(found[1]) == len(marks) and not list(out.glob("*.tmp"))
        assert ended.stderr.count("Traceback") == 1
    kept = {mark: (out / f"train-{mark.stem[-5:]}.bin").stat().st_mtime_ns for mark in marks}
    run(source, out)
    assert {mark: (out / f"train-{mark.stem[-5:]}.bin").stat().st_mtime_ns for mark in marks} == kept
    assert contents(out) == contents(run(source, tmp_path / "whole"))


def test_splits_are_disjoint_and_complete(tmp_path):
    texts = make_texts(300) + make_texts(300)[:50] + [""]  # duplicates, and an empty one that is left out
    write_jsonl(tmp_path / "in.jsonl", texts)
    out = run(tmp_path / "in.jsonl", tmp_path / "out")
    train, held_out = texts_of(out, "train"), texts_of(out, "validation")
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(texts[:-1])
    by_hash = [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < FRACTION for text in texts[:-1]]
    assert [text for text, held in zip(texts, by_hash, strict=False) if held] == held_out
    assert 0.1 < len(held_out) / len(texts) < 0.3
    manifest = manifest_of(out)
    assert manifest["skipped"] == 1 and manifest["dtype"] == "uint16"
    for split, part in (("train", train), ("validation", held_out)):
        found = manifest["splits"][split]
        size = sum(len(text.encode()) for text in part)
        assert found["documents"] == len(part) and found["bytes"] == size
        assert found["tokens"] == size + len(part)
        assert found["words"] == sum(len(text.split()) for text in part)
    ids = np.concatenate([[*text.encode(), 256] for text in train])
    np.testing.assert_array_equal(np.load(out / "unigram.npy"), np.bincount(ids, minlength=257))


def test_every_format_gives_the_tokens_of_the_folder(tmp_path):
    zstandard, arrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    texts = make_texts(300)
    (tmp_path / "folder").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "folder" / f"{index:04}.txt").write_bytes(text.encode())
    (tmp_path / "folder" / "image.txt").write_bytes(b"\xff\xd8\x00")
    (tmp_path / "folder" / ".hidden").write_text("not read")
    write_jsonl(tmp_path / "a.jsonl", texts)
    content = (tmp_path / "a.jsonl").read_bytes()
    half = content.index(b"\n", len(content) // 2) + 1
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "b.jsonl.zst").write_bytes(compress(content[:half]) + compress(content[half:]))  # two frames
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(content))
    table = arrow.table({"id": range(300), "text": texts})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=70)
    expected = contents(run(tmp_path / "folder", tmp_path / "out"), "*[0-9].*")
    assert manifest_of(tmp_path / "out")["skipped"] == 1 and len(expected) == 4
    for name in ("a.jsonl", "b.jsonl.zst", "c.jsonl.gz", "d.parquet"):
        assert contents(run(tmp_path / name, tmp_path / f"out-{name}"), "*[0-9].*") == expected, name


def test_hugging_face_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "HF_SHARD_ROWS", 120)
    texts = make_texts(300)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", texts)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    out = run(f"hf:{tmp_path / 'set'}", tmp_path / "out")
    assert len(manifest_of(out)["splits"]["train"]["shards"]) == 3
    assert sorted(texts_of(out, "train") + texts_of(out, "validation")) == sorted(texts)
    with pytest.raises(UserError, match="no text column 'body'; there are id, text"):
        run(f"hf:{tmp_path / 'set'}", tmp_path / "out2", text_column="body")


def test_large_vocabulary_is_stored_in_32_bits(tmp_path):
    path = save_json_tokenizer(tmp_path / "big.json", ["</s>"])
    tree = json.loads(path.read_text())
    tree["added_tokens"][0]["id"] = tree["model"]["vocab"]["</s>"] = 70_000
    path.write_text(json.dumps(tree))
    write_jsonl(tmp_path / "in.jsonl", make_texts(50))
    out = run(tmp_path / "in.jsonl", tmp_path / "out", str(path))
    manifest = manifest_of(out)
    assert manifest["dtype"] == "uint32" and manifest["tokenizer"]["vocab"] == 70_001
    for split in prepare.SPLITS:
        tokens = np.fromfile(out / f"{split}-00000.bin", "<u4")
        ends = np.load(out / f"{split}-00000.ends.npy")
        assert len(tokens) == manifest["splits"][split]["tokens"] == ends[-1]
        np.testing.assert_array_equal(np.flatnonzero(tokens == 70_000) + 1, ends)


def test_python_stdlib_leaves_packages_out(tmp_path, monkeypatch):
    for name in ("b.py", "a/z.py", "site-packages/c.py", "a/dist-packages/d.py", "e.txt"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(name)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    (shard,) = sources.find_shards("python-stdlib")
    assert shard.names == ("a/z.py", "b.py")
    assert list(sources.documents(shard, "text")) == ["a/z.py", "b.py"]


def test_text_files_are_grouped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TEXT_SHARD_BYTES", 100)
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text("x" * 40)
    assert [len(shard.names) for shard in sources.find_shards(str(tmp_path))] == [3, 3, 3, 1]


def test_disagreement_names_the_field(tmp_path):
    source, out = make_jsonl_folder(tmp_path / "in", 1, 100), tmp_path / "out"
    run(source, out)
    before = contents(out)
    run(source, out)
    assert contents(out) == before
    with pytest.raises(UserError, match=r"with validation 0\.2, now it is 0\.3"):
        run(source, out, validation=0.3)
    path = save_json_tokenizer(tmp_path / "t.json", ["</s>"])
    with pytest.raises(UserError, match=r"with tokenizer\.hash8 'b3838ac4', now it is"):
        run(source, out, str(path))
    os.rename(out / "manifest.json", out / "plan.json")  # as if one shard had been finished
    (out / "shard-00000.json").write_text("{}")
    with (tmp_path / "in" / "000.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="with other files in"):
        run(source, out)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("workers", [1, 2])
def test_few_documents_leave_no_split_empty(tmp_path, fraction, workers):
    """The text whose hash is the nearest to the other split goes there, with all that equal it."""
    texts = make_texts(60)
    texts += [min(texts, key=split_hash), max(texts, key=split_hash)]
    for file in range(4):
        write_jsonl(tmp_path / f"{file}.jsonl", texts[file::4])
    source, out = tmp_path, tmp_path / "out"
    run(source, out, validation=fraction, workers=workers)
    few, many = ("validation", "train") if fraction < 0.5 else ("train", "validation")
    assert texts_of(out, few) == [texts[-2 if few == "validation" else -1]] * 2
    assert sorted(texts_of(out, few) + texts_of(out, many)) == sorted(texts)
    assert not list(out.glob("shard-*")) + list(out.glob("*.tmp"))


def test_a_single_text_is_cut_by_position(tmp_path):
    text = "".join(make_texts(50))
    (tmp_path / "input.txt").write_bytes(text.encode())
    out = run(tmp_path / "input.txt", tmp_path / "out")
    train, held_out = texts_of(out, "train"), texts_of(out, "validation")
    assert train + held_out == [text[: round(0.8 * len(text))], text[round(0.8 * len(text)) :]]
    (tmp_path / "two").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "two" / name).write_text("xy")
    out = run(tmp_path / "two", tmp_path / "out2", validation=0.01)
    assert [texts_of(out, split) for split in prepare.SPLITS] == [["x", "x"], ["y", "y"]]
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(UserError, match="holds one character"):
        run(tmp_path / "one.txt", tmp_path / "out3")


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_moved_threshold_outlives_a_restart(tmp_path, monkeypatch, replaced):
    """Ended while the shards are written again: the rest follows the same rule."""
    texts = make_texts(20)
    held = min(texts, key=split_hash)
    (tmp_path / "in").mkdir()
    for file in range(3):  # each holds a copy of the one text that is held out
        write_jsonl(tmp_path / "in" / f"{file}.jsonl", [*texts[file::3], held])
    write, written = prepare.write_shard, []

    def ending(job, report):
        written.append(job)
        if len(written) == 4 + replaced:
            raise KeyboardInterrupt
        write(job, report)

    monkeypatch.setattr(prepare, "write_shard", ending)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "out", validation=1e-9)
    run(tmp_path / "in", tmp_path / "out", validation=1e-9)
    assert texts_of(tmp_path / "out", "validation") == [held] * 4 and held not in texts_of(tmp_path / "out", "train")


def test_a_mixed_folder_is_read_whole_and_what_is_left_out_is_named(tmp_path):
    folder, texts, said = tmp_path / "in", make_texts(30), []
    folder.mkdir()
    for index, text in enumerate(texts[:5]):
        (folder / f"{index}.txt").write_bytes(text.encode())
    (folder / "read.me").write_bytes(texts[5].encode())
    for name, part in (("a.JSONL", texts[6:12]), ("b.ndjson", texts[12:20]), ("c.jsonl", [None, *texts[20:25]])):
        write_jsonl(folder / name, part)
    write_jsonl(tmp_path / "d", texts[25:])
    (folder / "d.ndjson.GZ").write_bytes(gzip.compress((tmp_path / "d").read_bytes()))
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "packed.txt.gz").write_bytes(gzip.compress(b"text"))
    (folder / "list.json").write_text('[{"text": "braces"}]')
    (folder / "nothing.txt").write_text("")
    for index in range(8):
        (folder / f"x{index}.bin").write_bytes(b"\0")
    (folder / "old").mkdir()
    (folder / "old" / "train-00000.bin").write_text("prepared data")
    out = run(folder, tmp_path / "out", progress=Progress(say=said.append))
    assert sorted(texts_of(out, "train") + texts_of(out, "validation")) == sorted(texts)
    named = [line.removeprefix(f"Left out: {folder}/") for line in said if line.startswith("Left out")]
    assert named == [
        "latin.txt is not UTF-8 text: convert it.",
        "list.json is JSON and no prose: write an object a line to a .jsonl file.",
        "nothing.txt is empty.",
        "packed.txt.gz is packed: unpack it.",
        *(f"x{index}.bin is not UTF-8 text: convert it." for index in range(6)),
        "Left out: 3 more.",
    ]
    manifest = manifest_of(out)
    assert manifest["skipped"] == 13 and len(manifest["left_out"]) == 10 and said[-1].endswith("; 13 left out.")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_without_text_are_left_out_alike(tmp_path, kind):
    texts, said = [None, "a", "", "b"], []
    if kind == "jsonl":
        write_jsonl(tmp_path / "in.jsonl", texts)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": texts}), tmp_path / "in.parquet")
    out = run(tmp_path / f"in.{kind}", tmp_path / "out", progress=Progress(say=said.append))
    assert sorted(texts_of(out, "train") + texts_of(out, "validation")) == ["a", "b"]
    places = ("line 1", "line 3") if kind == "jsonl" else ("row 0", "row 2")
    assert said[0].endswith(f"in.{kind}, {places[0]} is null.") and said[1].endswith(f"{places[1]} is empty.")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_refused_preparation_leaves_nothing_behind(tmp_path, workers):
    source = make_jsonl_folder(tmp_path / "in", 6, 50)
    (tmp_path / "in" / "004.jsonl").write_text('{"text": "a"}\n{\n')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        run(source, tmp_path / "data" / "deep" / "out", workers=workers)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        run(source, tmp_path / "mine", workers=workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "mine"] and not list(
        (tmp_path / "mine").iterdir()
    )


def test_a_full_disk_leaves_what_is_finished(tmp_path, monkeypatch):
    source, write, out = make_jsonl_folder(tmp_path / "in", 3, 50), prepare.write_shard, tmp_path / "out"

    def full(job, report):
        if job.index == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(job, report)

    monkeypatch.setattr(prepare, "write_shard", full)
    with pytest.raises(UserError, match="No space left"):
        run(source, out)
    assert len(list(out.glob("shard-*.json"))) == 2
    monkeypatch.undo()
    assert contents(run(source, out)) == contents(run(source, tmp_path / "whole"))


def test_a_prepared_directory_is_a_source_of_training_and_not_of_text(tmp_path):
    out = run(make_jsonl_folder(tmp_path / "in", 1, 50), tmp_path / "out")
    assert prepare.default_directory(config.Data(source=str(out)), "root") == out
    with pytest.raises(UserError, match="out is prepared data already: give it as --data.source"):
        run(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_user_errors(tmp_path):
    def sentence(source, out="out", **options):
        with pytest.raises(UserError) as error:
            run(source, tmp_path / out, **options)
        return str(error.value)

    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    assert "'hf:' names no data set; write 'hf:owner/name'" in sentence("hf:")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "a.txt").symlink_to("nowhere")
    assert "a.txt: No such file or directory; check the path" in sentence(tmp_path / "dangling")
    latin = file("latin.txt", "é".encode("latin-1"))
    assert f"holds no text ({latin} is not UTF-8 text: convert it); give one that does" in sentence(latin)
    good = file("good.jsonl", b'{"text": "a"}\n')
    assert "is no file or folder" in sentence(tmp_path / "absent")
    assert "holds no text files" in sentence(tmp_path / "empty")
    assert "bad.jsonl, line 3: not valid JSON" in sentence(file("bad.jsonl", b'{"text": "a"}\n\n{"text": \n'), "o1")
    assert "line 1: not valid JSON" in sentence(file("latin.jsonl", b'{"text": "\xe9"}\n'), "o2")
    assert "line 1: there is no text column 'body'; there are text" in sentence(good, "o3", text_column="body")
    assert "field 'text' is int" in sentence(file("int.jsonl", b'{"text": 3}\n'), "o4")
    assert "must be a JSON object" in sentence(file("list.jsonl", b"[1]\n"), "o5")
    packed = gzip.compress(json.dumps({"text": make_texts(1, words=5000)}).encode())
    assert "is damaged" in sentence(file("cut.jsonl.gz", packed[: len(packed) // 2]), "o6")
    assert "is damaged" in sentence(file("bad.jsonl.zst", b"not zst at all"), "o7")
    assert "is no parquet file" in sentence(file("bad.parquet", b"PAR1 not parquet"), "o8")
    assert "good.jsonl: File exists" in sentence(good, "good.jsonl")
    assert "validation is 1.5" in sentence(good, validation=1.5)
    assert "workers is 0" in sentence(good, workers=0)
    assert not list(tmp_path.glob("o*/"))


def test_parquet_columns(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no text column 'text'; there are id, body"):
        run(tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(UserError, match="column 'id' is of type int64; it must hold strings"):
        run(tmp_path / "a.parquet", tmp_path / "out2", text_column="id")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_explained(tmp_path, number):
    with pytest.raises(UserError, match="No space left for"), prepare._explained(tmp_path):
        raise OSError(number, os.strerror(number))


def test_error_in_a_worker_reaches_the_caller(tmp_path):
    source = make_jsonl_folder(tmp_path / "in", 4, 50)
    (tmp_path / "in" / "002.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"002\.jsonl, line 1: not valid JSON"):
        run(source, tmp_path / "out", workers=2)
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").glob("*.tmp"))


def test_unguarded_script_gets_a_sentence(tmp_path):
    source = make_jsonl_folder(tmp_path / "in", 2, 50)
    script = tmp_path / "script.py"
    out = str(tmp_path / "out")
    script.write_text(
        f"from pathlib import Path\nfrom gdn_jax.prepare import prepare\n"
        f"prepare({source!r}, Path({out!r}), 'byte', validation=0.2, workers=2)\n"
    )
    paths = os.pathsep.join([os.getcwd(), *sys.path])
    ended = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert ended.returncode == 1
    assert "called prepare outside of `if __name__ == '__main__':`" in ended.stderr


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("python-stdlib", "python-stdlib"),
        ("texts/my corpus/", "my-corpus"),
        ("hf:owner/set:sample", "set-sample"),
    ],
)
def test_default_directory(source, name):
    assert str(prepare.default_directory(config.Data(source=source), "root")) == f"root/{name}-b3838ac4"
