import hashlib
import io
import json
import sys

import numpy as np
import pytest

from gdn_jax import tokenizer
from gdn_jax.errors import UserError

TEXT = "Die Größe der Welle: λ = 2π/k — 波長 🙂\r\n\tx\x07  end </s> <|endoftext|>"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A SentencePiece BPE model with byte fallback, spaces and line ends kept."""
    spm = pytest.importorskip("sentencepiece")
    path, model = tmp_path_factory.mktemp("spm") / "tiny.model", io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the wave has a length", "a wave of the sea", "length of a wave"] * 20),
        model_writer=model, model_type="bpe", vocab_size=300, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def save_json_tokenizer(path, special_tokens, vocab_size=300):
    """A byte-level BPE that also truncates and adds </s>, which `load` must undo."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["the wave has a length"] * 20, trainer)
    if special_tokens:
        last = special_tokens[-1]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {last}", special_tokens=[(last, backend.token_to_id(last))]
        )
        backend.enable_truncation(4)
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    return save_json_tokenizer(tmp_path_factory.mktemp("json") / "tiny.json", ["<unk>", "</s>"])


@pytest.mark.parametrize("kind", ["byte", "model_file", "json_file"])
def test_round_trip_of_any_text(kind, request):
    name = kind if kind == "byte" else str(request.getfixturevalue(kind))
    encoder = tokenizer.load(name)
    ids = encoder.encode(TEXT)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < encoder.vocab
    assert encoder.eos not in ids, "a spelled-out special token is plain text, and none is added"
    assert encoder.decode_bytes([*ids, encoder.eos]) == TEXT.encode()
    batch = encoder.encode_batch([TEXT, "a wave", TEXT])
    assert [list(one) for one in batch] == [list(ids), list(encoder.encode("a wave")), list(ids)]
    assert len(batch[0]) > 4, "the file's truncation is off"


def test_byte_ids_are_the_bytes():
    encoder = tokenizer.load("byte")
    assert list(encoder.encode("aß")) == [97, 0xC3, 0x9F]
    assert (encoder.vocab, encoder.eos, encoder.name) == (257, 256, "byte")
    assert encoder.hash8 == "b3838ac4", "prepared directories carry it in their names"


def test_hash_and_sizes_come_from_the_file(model_file, json_file):
    for path in (model_file, json_file):
        assert tokenizer.load(str(path)).hash8 == hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    model, backend = tokenizer.load(str(model_file)), tokenizer.load(str(json_file))
    assert (model.vocab, model.eos) == (300, 2)
    assert (backend.vocab, backend.eos) == (273, 1)


def test_user_errors(tmp_path, model_file, monkeypatch):
    def sentence(name):
        with pytest.raises(UserError) as error:
            tokenizer.load(str(name))
        return str(error.value)

    (tmp_path / "bad.model").write_bytes(b"\x08garbage" * 9)
    (tmp_path / "bad.json").write_text('{"model": {')
    (tmp_path / "other.json").write_text(json.dumps({"vocab": 3}))
    no_eos = save_json_tokenizer(tmp_path / "no_eos.json", [])
    assert "neither 'byte' nor the path" in sentence("bytes")
    assert "No such file" in sentence(tmp_path / "absent.model")
    assert "is no SentencePiece model" in sentence(tmp_path / "bad.model")
    assert "is no JSON" in sentence(tmp_path / "bad.json")
    assert "holds no 'model'" in sentence(tmp_path / "other.json")
    assert "no token to end documents with; add one of </s>" in sentence(no_eos)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as when it is not installed
    assert "pip install 'gdn_jax[data]'" in sentence(model_file)


@pytest.mark.parametrize("kind", ["byte", "model_file", "json_file"])
def test_a_text_between_two_tokens_has_no_half_character(kind, request):
    """Each is what is whole between its ends, whatever the tokens are; a U+FFFD of the text itself stays."""
    encoder = tokenizer.load(kind if kind == "byte" else str(request.getfixturevalue(kind)))
    text = "wave 漢\ufffd\ufffd字🙂 é\ufffd"
    ids = encoder.encode(text)
    texts = [tokenizer.text_between(encoder, ids, start, stop) for stop in range(len(ids) + 1) for start in range(stop)]
    assert text in texts and all(one in text for one in texts)
    assert {"漢\ufffd\ufffd字", "\ufffd字🙂", "漢\ufffd"} <= {one.strip() for one in texts}
    after = len(encoder.encode("wave 漢"))
    assert tokenizer.text_between(encoder, ids, 0, after) == "wave 漢"
    assert tokenizer.text_between(encoder, ids, 0, after - 1) == tokenizer.text_between(encoder, ids, 0, after - 2)
    assert tokenizer.text_between(encoder, ids, after - 1, len(ids)) == text[6:]
