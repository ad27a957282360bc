import json
from itertools import islice

import numpy as np
import pytest
from test_prepare import make_jsonl_folder, make_texts, run, texts_of, write_jsonl

from gdn_jax import data
from gdn_jax.errors import UserError
from gdn_jax.tokenizer import ByteTokenizer

T = 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Five shards of short documents; the fourth holds one document, so one of its splits is empty."""
    root = tmp_path_factory.mktemp("data")
    source = make_jsonl_folder(root / "in", 5, 12)
    write_jsonl(root / "in" / "003.jsonl", make_texts(1))
    return run(source, root / "out")


@pytest.fixture(scope="module")
def prepared(directory):
    return data.open_prepared(directory, tokenizer_hash=ByteTokenizer.hash8)


def batches(prepared, count, *, batch_size=8, start_step=0, seed=5, with_segments=False, process=(0, 1)):
    iterator = data.train_batches(
        prepared, seq_len=T, batch_size=batch_size, seed=seed, start_step=start_step,
        with_segments=with_segments, process_index=process[0], process_count=process[1],
    )  # fmt: skip
    found = list(islice(iterator, count))
    iterator.close()
    return found


def flat_tokens(directory, split):
    return np.concatenate([[*text.encode(), 256] for text in texts_of(directory, split)])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_view_is_the_concatenation_of_the_shards(directory, prepared, split):
    view, expected = prepared.tokens(split), flat_tokens(directory, split)
    assert len(view) == len(expected)
    np.testing.assert_array_equal(view[:], expected)
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(view) + 1, (200, 2))):
        np.testing.assert_array_equal(view[start:stop], expected[start:stop])
    np.testing.assert_array_equal(np.flatnonzero(expected == 256) + 1, prepared.document_ends(split))
    assert prepared.text_bytes(split) == len(expected) - len(prepared.document_ends(split))
    assert (prepared.vocab, prepared.eos) == (257, 256)


def test_windows_overlap_by_one_token_and_drop_the_tail(directory, prepared):
    windows, expected = data.TokenWindows(prepared, "train", T), flat_tokens(directory, "train")
    assert len(windows) == (len(expected) - 1) // T
    for index in range(len(windows)):
        item = windows[index]
        assert item["tokens"].dtype == np.int32 and list(item) == ["tokens"]
        np.testing.assert_array_equal(item["tokens"], expected[index * T : index * T + T + 1])
    with pytest.raises(IndexError):
        windows[len(windows)]
    assert repr(windows) == f"TokenWindows(train, {len(windows)} windows of 32)"


def test_segment_ids_count_documents_across_shards(directory, prepared):
    expected, at = [], 0
    for token in flat_tokens(directory, "train"):
        expected.append(at)
        at += token == 256
    windows = data.TokenWindows(prepared, "train", T, with_segments=True)
    borders = np.cumsum([shard["tokens"] for shard in prepared.manifest["splits"]["train"]["shards"]])
    assert any(border % T not in (0, 1) for border in borders[:-1]), "some window crosses a shard border"
    for index in range(len(windows)):
        ids = windows[index]["segment_ids"]
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, expected[index * T : index * T + T + 1])


def test_every_window_once_an_epoch_in_a_new_order(prepared):
    count = len(data.TokenWindows(prepared, "train", T))
    assert count > 50
    rows = np.concatenate([batch["tokens"] for batch in batches(prepared, 2 * count, batch_size=1)])
    first, second = rows[:count], rows[count:]
    windows = np.stack([data.TokenWindows(prepared, "train", T)[i]["tokens"] for i in range(count)])
    for epoch in (first, second):
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, windows))
    assert (first != second).any(1).mean() > 0.9
    assert (first != windows).any(1).mean() > 0.9
    other = np.concatenate([batch["tokens"] for batch in batches(prepared, count, batch_size=1, seed=6)])
    assert (first != other).any(1).mean() > 0.9


def test_global_batches_do_not_depend_on_the_number_of_processes(prepared):
    count = 2 * len(data.TokenWindows(prepared, "train", T)) // 8  # into the second epoch
    whole = batches(prepared, count)
    for processes in (2, 4):
        parts = [batches(prepared, count, process=(index, processes)) for index in range(processes)]
        for step, batch in enumerate(whole):
            rows = np.concatenate([part[step]["tokens"] for part in parts])
            assert rows.shape == (8, T + 1)
            assert sorted(map(bytes, rows)) == sorted(map(bytes, batch["tokens"]))
            np.testing.assert_array_equal(parts[1][step]["tokens"], batch["tokens"][1::processes])


@pytest.mark.parametrize("start", [1, 7, 40])
def test_resumed_batches_equal_uninterrupted_ones(prepared, start):
    whole = batches(prepared, start + 6, with_segments=True)[start:]
    resumed = batches(prepared, 6, start_step=start, with_segments=True)
    assert len(resumed) == 6
    for expected, found in zip(whole, resumed, strict=True):
        assert set(found) == {"tokens", "segment_ids"}
        for key in found:
            np.testing.assert_array_equal(found[key], expected[key])


def test_start_far_away_costs_nothing(prepared):
    assert batches(prepared, 1, start_step=10**12)[0]["tokens"].shape == (8, T + 1)


def test_validation_batches_are_in_order_and_padded(prepared):
    source = data.TokenWindows(prepared, "validation", T, with_segments=True)
    options = {"batch_size": 4, "with_segments": True}
    windows = data.validation_windows(prepared, T, 10)
    found = list(data.validation_batches(windows, **options))
    assert [list(batch["weights"]) for batch in found] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert found[0]["weights"].dtype == np.float32
    for key in ("tokens", "segment_ids"):
        rows = np.concatenate([batch[key] for batch in found])
        assert rows.shape == (12, T + 1) and rows.dtype == np.int32
        np.testing.assert_array_equal(rows[:10], [source[i][key] for i in windows.indices])
        assert not rows[10:].any()
    every = list(data.validation_batches(data.validation_windows(prepared, T, 10**6), **options))
    assert sum(batch["weights"].sum() for batch in every) == len(source)


def test_unigram_nats_by_hand(tmp_path, directory, prepared):
    train, held_out = flat_tokens(directory, "train"), flat_tokens(directory, "validation")
    expected = 0.0
    for token in held_out:
        expected -= np.log((np.sum(train == token) + 1) / (len(train) + 257)) / len(held_out)
    assert prepared.unigram_nats() == pytest.approx(expected, rel=1e-12)
    assert 1 < expected < np.log(257)
    assert prepared.unigram_nats(split="train") < prepared.unigram_nats()


@pytest.fixture
def fresh(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", make_texts(60))
    return run(tmp_path / "in.jsonl", tmp_path / "out")


def refusal(directory, **options):
    with pytest.raises(UserError) as error:
        data.open_prepared(directory, **({"tokenizer_hash": None} | options))
    return str(error.value)


def test_truncated_shard(fresh):
    size = (fresh / "train-00000.bin").stat().st_size
    with (fresh / "train-00000.bin").open("r+b") as file:
        file.truncate(size - 2)
    sentence = refusal(fresh, verify=False)
    assert f"train-00000.bin has {size - 2} bytes, expected {size}" in sentence
    assert f"gdn data prepare {fresh.parent}/in.jsonl --out {fresh} --tokenizer byte --validation " in sentence
    (fresh / "train-00000.bin").unlink()
    assert "train-00000.bin is missing" in refusal(fresh)


def test_altered_shard(fresh):
    content = bytearray((fresh / "validation-00000.bin").read_bytes())
    content[10] ^= 1
    (fresh / "validation-00000.bin").write_bytes(content)
    for verify in (None, True):
        assert "validation-00000.bin was altered: its sha256 is" in refusal(fresh, verify=verify)
    data.open_prepared(fresh, tokenizer_hash=None, verify=False)


@pytest.mark.parametrize("name", ["train-00000.ends.npy", "unigram.npy"])
def test_damaged_array(fresh, name):
    np.save(fresh / name, np.load(fresh / name)[:-1])
    sentence = refusal(fresh)
    assert f"{name} has" in sentence or f"{name} does not have 257 counts" in sentence
    (fresh / name).write_bytes((fresh / name).read_bytes()[:200])
    assert f"{name} is missing or truncated" in refusal(fresh)
    (fresh / name).unlink()
    assert f"{name} is missing or truncated" in refusal(fresh)


def test_other_tokenizer_or_no_data(fresh, tmp_path):
    sentence = refusal(fresh, tokenizer_hash="0123abcd")
    assert f"by tokenizer byte with hash {ByteTokenizer.hash8}, not 0123abcd" in sentence
    assert "No such file" in refusal(tmp_path / "absent")
    manifest = json.loads((fresh / "manifest.json").read_text())
    (fresh / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    assert "is not of format 2" in refusal(fresh)
    (fresh / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in refusal(fresh)
    (fresh / "manifest.json").rename(fresh / "plan.json")
    assert "its preparation has not finished" in refusal(fresh)


def test_batch_user_errors(prepared):
    with pytest.raises(UserError, match="batch size 6 is not divisible by the 4 processes"):
        batches(prepared, 1, batch_size=6, process=(0, 4))
    with pytest.raises(UserError, match="too few for optim.batch_size 100000"):
        batches(prepared, 1, batch_size=100_000)
    with pytest.raises(UserError, match="process 2 of 2"):
        batches(prepared, 1, process=(2, 2))
    with pytest.raises(UserError, match="too few for one window"):
        data.validation_windows(prepared, 10**6, 1)
