"""`gdn generate`, `gdn convert` and `gdn eval` of a run's directory, as a user calls them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from small import experiment, prepare_text, scripted_model

import experiments
from experiments.run import main
from gdn_jax import checkpoint, generate, tokenizer
from gdn_jax.config import AttentionConfig
from gdn_jax.fingerprint import Identity
from gdn_jax.generate import stream
from gdn_jax.model import init_model

ROOT = str(Path(experiments.__file__).parents[1])
CHUNK = ["--run.chunk", "32"]  # as the run was written with: the order of sums is part of a number's last digits
ID = "imported/small"  # of a run that was never trained
LETTERS = {97 + i: 98 + i for i in range(7)} | {104: 256}  # b to h after a, then the end
KANJI = dict(zip("漢".encode(), "漢".encode()[1:] + "漢".encode()[:1], strict=True))


def write(directory, model):
    small = experiment(Path())
    small = replace(small, id=ID, model=model.config, run=replace(small.run, dir="", compile_cache=""))
    checkpoint.write(Path(directory), small, model, 0, Identity(None, tokenizer.load("byte").hash8))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs `letters`, `kanji` and `random`, of the -fla family, and prepared text."""
    directory = tmp_path_factory.mktemp("commands")
    with contextlib.chdir(directory):
        prepare_text(Path())
        write("letters", scripted_model(LETTERS))
        write("kanji", scripted_model(KANJI))
        cfg = experiment(Path()).model
        cfg = replace(cfg, init="fla", tied=False, gated_deltanet=replace(cfg.gated_deltanet, beta_bias=False))
        write("random", jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(0)))
    return directory


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def as_json(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_texts_for_a_reader(capsys):
    assert main(["generate", "letters", "--prompt", "a", "xf", "ef g h", "--stop", "de"]) == 0
    assert capsys.readouterr().out == "abc\n---\nxfgh\n---\nef g h\n"


def test_texts_as_json(capsys):
    Path("prompts.txt").write_text("c\nf\n", encoding="utf-8")
    words = ["--prompt", "a", "--prompt_file", "prompts.txt", "--max_tokens", "5"]
    first, second, third = as_json(capsys, "generate", "letters", *words)
    assert first == {
        "prompt": "a", "text": "bcdef", "finish": "length", "tokens": 5, "token_ids": [98, 99, 100, 101, 102], "seed": 0
    }  # fmt: skip
    assert (second["text"], second["finish"], third["text"]) == ("defgh", "length", "gh")
    assert third["finish"] == "eos" and third["tokens"] == 2


def test_samples_have_seeds_of_their_own_and_repeat_alone(capsys):
    words = ["generate", "random", "--prompt", "ab", "cd", "--max_tokens", "12", "--temperature", "1"]
    rows = as_json(capsys, *words, "--seed", "7", "--samples", "2", "--top_k", "200", "--top_p", "0.99")
    assert [(row["prompt"], row["seed"]) for row in rows] == [("ab", 7), ("ab", 8), ("cd", 7), ("cd", 8)]
    assert len({tuple(row["token_ids"]) for row in rows}) == 4
    words[3:5] = ["cd"]
    assert as_json(capsys, *words, "--seed", "8", "--top_k", "200", "--top_p", "0.99") == rows[3:]


def test_characters_are_whole_on_the_way_out(capsys):
    """Steps of 16 bytes cut a character of three; the reader gets whole ones, and at the end what there is."""
    words = ["generate", "kanji", "--prompt", "漢", "--max_tokens"]
    assert main([*words, "60"]) == 0
    assert capsys.readouterr().out == "漢" * 21 + "\n"
    assert main([*words, "61"]) == 0
    assert capsys.readouterr().out == "漢" * 21 + "\ufffd\n"


def test_control_characters_do_not_reach_a_terminal(capsys, monkeypatch):
    write("escape", scripted_model({97: 27, 27: 91, 91: 256}))
    assert main(["generate", "escape", "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "a\x1b[\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["generate", "escape", "--prompt", "a\tb\na"]) == 0
    assert capsys.readouterr().out == "a\tb\na\ufffd[\n"


def test_ctrl_c_keeps_what_was_printed():
    code = "from gdn_jax.console import console; console()"
    words = ["generate", "kanji", "--prompt", "x漢", "--max_tokens", "100000000"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-c", code, *words], env=environment, **pipes) as process:
        printed = b""
        while len(printed) < 400:
            printed += process.stdout.read(100)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=100)
    *loaded, stopped = err.splitlines()
    assert process.returncode == 130 and stopped == b"Stopped; what was finished before is kept."
    assert all(line.startswith(b"Read ") for line in loaded)  # nothing of kernels, where there is no GPU
    text = (printed + rest).decode()
    assert text == "x" + "漢" * (len(text) - 2) + "\n" and len(text) > 130


def test_ctrl_c_keeps_the_texts_as_json(capsys, monkeypatch):
    def stopped_after_two_steps(*arguments, **options):
        growing = stream(*arguments, **options)
        yield next(growing)
        yield next(growing)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", stopped_after_two_steps)
    assert main(["generate", "kanji", "--prompt", "漢", "--max_tokens", "1000", "--json"]) == 130
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    assert (row["text"], row["finish"], row["tokens"]) == ("漢" * 10, "interrupted", 32)
    assert err.splitlines()[-1] == "Stopped; the texts are as far as they came."


def test_there_and_back_generates_and_scores_the_same(capsys, tmp_path):
    """A run, its FLA directory, and the run imported from that: one text and one perplexity."""
    wrote = as_json(capsys, "convert", "export", "random", "--out", str(tmp_path / "fla"))
    assert (wrote["tensors"], wrote["dtype"], wrote["step"]) == (3 + 2 * 18, "float32", 0)
    back = str(tmp_path / "back")
    words = ["--tokenizer", "byte", "--source", "text", "--seq_len", "32", "--validation", "0.2"]
    read = as_json(capsys, "convert", "import", str(tmp_path / "fla"), "--out", back, *words)
    assert read["id"] == "imported/fla" and read["elements"] == wrote["elements"]
    kept = json.loads(Path(back, "import.json").read_text())
    assert kept["tensors"] == 39 and kept["environment"]["versions"]["jax"] == jax.__version__
    prompt = ["--prompt", "def f(", "--max_tokens", "20", "--temperature", "0.7"]
    assert as_json(capsys, "generate", back, *prompt) == as_json(capsys, "generate", "random", *prompt)
    before, after = (
        as_json(capsys, "eval", "random", "--windows", "9"),
        as_json(capsys, "eval", back, "--windows", "9", *CHUNK),
    )
    assert before["token_nll"] == after["token_nll"] and after["step"] == 0
    assert before["marks"][1] == after["marks"][1] and after["marks"][1].endswith("trained on data of another program")
    other = as_json(capsys, "eval", back, "--windows", "9", "--data.seq_len", "16")
    assert other["token_nll"] != after["token_nll"] and other["window"] == 16
    assert "windows of 16, trained with 32" in other["marks"]
    kept = json.loads(Path(back, "evaluation.json").read_text())
    assert [(one["window"], one["token_nll"]) for one in kept] == [(32, after["token_nll"]), (16, other["token_nll"])]
    assert main(["eval", back, "--model.norm_eps", "0.1"]) == 2
    assert "model.norm_eps (1e-05 there, 0.1 asked)" in capsys.readouterr().err


MISTAKES = [
    ("generate", "`gdn generate` needs RUN as its first word, an ID, FILE:NAME or the directory of a run."),
    ("generate leters", "There is no experiment 'leters'; `gdn list` shows all."),
    ("generate smoke/transformer", "runs/smoke/transformer"),
    ("generate text", "text holds no run (there is no config.json)"),
    ("generate hf", "hf is a Hugging Face directory, not a run; import it first: gdn convert import hf --out DIR."),
    ("eval hf", "gdn convert import hf --out DIR."),
    ("convert export hf --out x", "gdn convert import hf --out DIR."),
    ("generate letters --temperature -1", "temperature is -1.0; it must be 0 for the likeliest token, or at least"),
    ("generate letters --temperature hot", "--temperature is 'hot'; it must be a number."),
    ("generate letters --top_k 0", "top_k is 0; it must be positive"),
    ("generate letters --top_p 2", "top_p is 2.0; it must be in (0, 1]"),
    ("generate letters --max_tokens 0", "max_tokens is 0; it must be positive."),
    ("generate letters --samples 0", "samples is 0; it must be positive."),
    ("generate letters --seed -1", "seed is -1; it must be in [0, 2^31 - samples]."),
    ("generate letters --stop=", "A stop string is empty"),
    ("generate letters --step 3", "holds no checkpoint of step 3; there are 0."),
    ("generate letters --impl triton", "run.impl is 'triton', which cannot run gated_norm here"),
    ("generate letters --prompt_file no.txt", "prompt_file no.txt cannot be read (No such file or directory)"),
    ("generate letters --prompt_file latin", "prompt_file latin is not UTF-8 (byte 1)"),
    ("generate letters --prompt_file empty", "prompt_file empty is empty"),
    ("convert", ""),
    ("convert imprt x", "no command 'convert imprt' (did you mean 'convert import'?)"),
    ("convert import hf", "--out is missing; give the directory to write."),
    ("convert import hf --out x", "hf/config.json lacks 'hidden_size'"),
    ("convert import hf --out x --like smoke/x", "There is no experiment 'smoke/x'"),
    ("convert export letters --out x --format onnx", "--format is 'onnx'; it must be one of fla, lit."),
    ("convert export random --out letters", "letters exists already; choose another --out, or delete it."),
    ("convert export random --out x --step 3", "holds no checkpoint of step 3; there are 0."),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_exit_code_2(capfd, words, sentence):
    Path("hf").mkdir(exist_ok=True)
    Path("hf/config.json").write_text('{"model_type": "gated_deltanet", "num_hidden_layers": 2}')
    Path("latin").write_bytes(b"a\xff")
    Path("empty").write_bytes(b"")
    before = sorted(str(path) for path in Path().rglob("*"))
    code = main(words.split())
    out, err = capfd.readouterr()
    if not sentence:
        assert code == 0 and "gdn convert import SOURCE" in out
        return
    assert code == 2 and out == "" and err.count("\n") == 1 and sentence in err and err.endswith(".\n")
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_more_tokens_than_memory_holds(capsys):
    """The cache of attention grows with the text; a CPU has the memory that its machine has."""
    cfg = replace(experiment(Path()).model, pattern=("attention",), attention=AttentionConfig(heads=2, head_dim=16))
    write("attending", jax.jit(init_model, static_argnums=0)(cfg, jax.random.key(0)))
    assert main(["generate", "attending", "--max_tokens", "99999999999"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "the longest of 100,000,000,000 tokens, need about " in err
    assert "one sequence of at most " in err and err.count("\n") == 1
