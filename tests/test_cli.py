"""The command line: what it prints for a script, and one sentence and an exit code for every mistake."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import EVALUATIONS, EXPERIMENTS, TIMINGS, doctor, report
from experiments.options import Overrides
from experiments.run import COMMANDS, main
from pallas_kernels import ops
from pallas_kernels.gated_delta_rule import conformance
from pallas_kernels.linear_cross_entropy import conformance as head_conformance

ID = "smoke/gated-deltanet"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ and data/ would be written here


def as_json(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_is_an_array_of_every_id(capsys):
    rows = as_json(capsys, "list")
    assert [row["id"] for row in rows] == [*EXPERIMENTS, *EVALUATIONS, *TIMINGS]
    assert {row["kind"] for row in rows[: len(EXPERIMENTS)]} == {"trains"}
    assert as_json(capsys, "list", "table3/gated-deltanet/*") == [
        row for row in rows if row["model"] == "gated-deltanet" and row["group"] == "table3"
    ]
    by_id = {row["id"]: row for row in rows}
    assert by_id["table3/gated-deltanet/1.3b"]["parameters"] == 1309295632
    assert by_id["table3/gated-deltanet/400m"]["parameters"] == 516837929
    assert by_id["table3/gated-deltanet/1.3b"]["scale"] == "1.3b" and by_id[ID]["scale"] == "tiny"
    assert by_id["table3/gated-deltanet/1.3b"]["tokens"] == 190735 * 128 * 4096


def test_list_for_a_reader(capsys):
    assert main(["list", "*/gated-deltanet/1.3b"]) == 0
    header, row, *others = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "kind", "parameters", "tokens", "data"]
    assert row.split() == ["table3/gated-deltanet/1.3b", "trains", "1,309,295,632", "100B", "fineweb-edu"]
    assert [other.split(maxsplit=2) for other in others] == [
        [f"{name}/gated-deltanet/1.3b", "evaluates", "the run of table3/gated-deltanet/1.3b"]
        for name in ("table2", "table4", "table5", "figure2")
    ] + [["figure3/gated-deltanet/1.3b", "times", "a training step of table3/gated-deltanet/1.3b"]]


def test_an_evaluating_id_is_a_run_and_its_tasks(capsys):
    (row,) = as_json(capsys, "list", "table4/gated-deltanet/tiny")
    assert (row["kind"], row["of"], row["parameters"]) == ("evaluates", "table3/gated-deltanet/tiny", 537874)
    shown = as_json(capsys, "show", "table4/gated-deltanet/tiny")
    assert shown["id"] == row["id"] and shown["of"] == row["of"] and shown["tasks"][:2] == ["swde", "squad"]
    assert shown["run_directory"] == f"runs/table3/gated-deltanet/tiny/{row['hash8']}"
    assert main(["train", "table4/gated-deltanet/tiny"]) == 2
    sentence = "table4/gated-deltanet/tiny evaluates the run of table3/gated-deltanet/tiny and trains nothing"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("scale", "count"), [("1.3b", 1309295632), ("400m", 516837929)])
def test_show_is_one_flat_object(capsys, scale, count):
    shown = as_json(capsys, "show", f"table3/gated-deltanet/{scale}")
    assert {key for key in shown if "param" in key} == {"parameters"}
    assert type(shown["parameters"]) is int and shown["parameters"] == count
    assert not any(isinstance(value, dict) for value in shown.values())
    assert 0 < shown["checkpoint_bytes"] - 12 * count < 1e6
    assert shown["train_flops_per_token"] == 3 * shown["forward_flops_per_token"] > 6 * count
    assert shown["run_directory"] == f"runs/{shown['id']}/{shown['hash8']}"
    assert shown["optim.lr"] == 4e-4 and shown["model.pattern"] == ["gated_deltanet"]
    for op in ("gated_delta_rule", "short_conv"):
        assert shown[f"here.{op}"] == "chunked (triton: the device is cpu, not a CUDA device)"
    assert shown["here.linear_cross_entropy"] == "chunked"


def test_show_says_what_cannot_run_here(capsys):
    shown = as_json(capsys, "show", "table3/gated-deltanet/1.3b", "--run.impl", "triton")
    assert shown["here"].startswith("run.impl is 'triton', which cannot run gated_norm here (the device is cpu")


def test_overrides_reach_the_experiment(capsys):
    before = as_json(capsys, "show", ID)
    words = "--optim.lr 1e-3 --optim.batch-size=4 --model.repeats 3 --model.gated_deltanet.decay False"
    pattern = ["--model.pattern", "gated_deltanet", "gated_deltanet", "--run.profile_at", "-1", "--run.dir", "x"]
    shown = as_json(capsys, "show", ID, *words.split(), *pattern)
    assert shown["optim.lr"] == 1e-3 and shown["optim.batch_size"] == 4 and shown["layers"] == 6
    assert shown["model.gated_deltanet.decay"] is False and shown["run_directory"] == "x"
    assert shown["tokens"] == before["tokens"] // 2 and shown["hash8"] != before["hash8"]
    assert as_json(capsys, "show", ID, "--run.remat", "full")["hash8"] == before["hash8"]


MISTAKES = [
    ("lsit", "no command 'lsit' (did you mean 'list'?)"),
    ("data prepair x", "no command 'data prepair' (did you mean 'data prepare'?)"),
    ("list tabel3/*", "No experiment matches 'tabel3/*'; the IDs begin with smoke, table3"),
    ("list smoke", "No experiment matches 'smoke' (did you mean 'smoke/*'?); the IDs begin with smoke"),
    ("show", "`gdn show` needs ID as its first word; `gdn list` shows all IDs."),
    ("train smoke/gated-deltanett", "no experiment 'smoke/gated-deltanett' (did you mean 'smoke/gated-deltanet'?)"),
    (f"run {ID} --optim.learning_rate 1", "no option --optim.learning_rate"),
    (f"eval {ID} --optim.step 1", "no option --optim.step (did you mean '--optim.steps'?)"),
    (f"show {ID} --optim.lr fast", "--optim.lr is 'fast'; it must be a number."),
    (f"show {ID} --optim.batch-size 1.5", "--optim.batch_size is '1.5'; it must be a whole number."),
    (
        f"show {ID} --run.remat maybe",
        "--run.remat is 'maybe'; it must be one of none, products, kernels, products+kernels, full.",
    ),
    (f"show {ID} --optim.lr", "--optim.lr is given without a value; it must be a number."),
    (f"show {ID} --run.chunk 65", "--run.chunk is '65'; it must be one of 16, 32, 64, 128."),
    (f"show {ID} --run.impl cuda", "it must be one of auto, chunked, reference"),
    (f"show {ID} 3e-4", "'3e-4' is not expected here; options are written --name value."),
    (f"eval {ID} --stride half", "--stride is 'half'; it must be a whole number or None."),
    (f"show {ID} --optim.steps 0", "optim.steps is 0; it must be positive."),
    (f"show {ID} --run.micro_batches 3", "run.micro_batches is 3; it must divide optim.batch_size 8."),
    (f"show {ID} --model.pattern gated_deltnet", "(did you mean 'gated_deltanet'?)"),
    (f"show {ID} --model.pattern swa", "uses 'swa' but model.attention is not set"),
    (f"show {ID} --run.scan_layers maybe", "--run.scan_layers is 'maybe'; it must be"),
    (
        "bench figure3 --step_profile True",
        "--step_profile takes no value; write --step_profile alone, or leave it out.",
    ),
    ("data prepare nowhere", "Source 'nowhere' is no file or folder, nor 'english-novels'"),
    ("data prepare . --validation 2", "validation is 2.0; it must be"),
    ("data prepare . --tokenizer bite", "Tokenizer 'bite' is neither 'byte' nor the path"),
    ("data verify nowhere", "nowhere holds no prepared data"),
    (f"eval {ID}", "train it first with `gdn train ID`"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_exit_code_2(capsys, words, sentence):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err
    assert not any(mark in err for mark in ("Traceback", "╭", "error:"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert out.startswith(f"usage: gdn {name}") and COMMANDS[name].options.__doc__[:40] in out
    assert ("--optim.lr" in out) == issubclass(COMMANDS[name].options, Overrides)
    assert ("The values below are those of smoke/retnet" in " ".join(out.split())) == ("--optim.lr" in out)


def test_the_overview_names_every_command(capsys):
    assert main([]) == main(["--help"]) == main(["data"]) == 0
    out = capsys.readouterr().out
    assert all(f"gdn {name}" in out for name in COMMANDS)


def test_prepare_and_verify(capsys):
    Path("texts").mkdir()
    for i in range(40):
        Path("texts", f"{i}.txt").write_text(f"{i} größe 漢字")
    assert main(["data", "prepare", "texts", "--validation", "0.3", "--workers", "1"]) == 0
    directory = capsys.readouterr().out.strip()
    assert directory.startswith("data/texts-")
    facts = as_json(capsys, "data", "verify", directory)
    assert facts["train_documents"] + facts["validation_documents"] == 40
    assert facts["train_words"] + facts["validation_words"] == 120 and facts["tokenizer_name"] == "byte"
    shard = Path(directory, "train-00000.bin")
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert main(["data", "verify", directory]) == 2
    assert "was altered" in capsys.readouterr().err


def test_doctor_reports_and_passes(capsys, monkeypatch):
    quick = [case for case in conformance.QUICK if case.name == "group value"]
    monkeypatch.setattr(conformance, "QUICK", quick)  # one shape and type compile faster
    monkeypatch.setattr(doctor, "DTYPES", ("bfloat16",))
    found = as_json(capsys, "doctor", ID)
    assert found["ok"] is True and found["id"] == ID
    refused = "triton: the device is cpu, not a CUDA device"
    assert found["impl"]["gated_norm"] == {"impl": "chunked", "refused": refused}
    around = {"short_conv", "gated_norm", "linear_cross_entropy"}
    assert {op["op"] for op in found["ops"]} == {"gated_delta_rule", "linear_attention", "selective_scan"} | around
    assert {op["case"] for op in found["ops"] if op["op"] == "gated_norm"} == {
        "gate after, bfloat16",
        "gate first, bfloat16",
    }
    assert len(found["ops"]) == 8 + 3 and not any(op["failures"] for op in found["ops"])
    assert set(found["optional"]) == set(doctor.OPTIONAL)


@pytest.mark.parametrize("op", doctor.RECURRENCES)
def test_doctor_checks_the_decoding_step(monkeypatch, op):
    recurrence = doctor.RECURRENCES[op]
    assert doctor.decoding_failures(op) == []

    def step(*arguments, **options):
        o, state = recurrence.step(*arguments, **options)
        return o, 1.001 * state

    monkeypatch.setitem(doctor.RECURRENCES, op, recurrence._replace(step=step))
    assert len(doctor.decoding_failures(op)) == 2


def test_doctor_exits_with_1_when_a_check_fails(capsys, monkeypatch):
    monkeypatch.setattr(ops, "names", lambda: ["linear_cross_entropy"])
    monkeypatch.setattr(doctor, "DTYPES", ("float32",))
    beyond_fp32 = dict.fromkeys(head_conformance.OUTPUTS, 1e-12)
    monkeypatch.setattr(head_conformance.SUITE, "limits", lambda case, impl: beyond_fp32)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: loss" in out and "Some checks FAILED" in out


def start(*words):
    code = "import sys; from experiments.run import main; sys.exit(main())"
    root = str(Path(report.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def gdn(*words):
    with start(*words) as process:
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_as_a_process():
    wrong = gdn("show", ID, "--optim.lrr", "1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "There is no option --optim.lrr (did you mean '--optim.lr'?); `gdn show ID --help` lists all.\n"
    )
    shown = gdn("show", ID, "--json")
    assert shown.returncode == 0 and json.loads(shown.stdout)["id"] == ID


def test_a_full_device_is_one_sentence(capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 102400262144 bytes.\nmore")

    monkeypatch.setitem(COMMANDS, "doctor", COMMANDS["doctor"]._replace(call=full))
    assert main(["doctor"]) == 2
    sentence = (
        "The device's memory is full (Out of memory allocating 102400262144 bytes); take fewer or shorter sequences."
    )
    assert capsys.readouterr().err == f"{sentence}\n"


def test_a_closed_pipe_is_no_error():
    with start("list") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_stopped_resumed_and_evaluated(capsys):
    """SIGTERM ends training with 143 and a sentence; the same command goes on; run and eval give one number."""
    Path("texts").mkdir()
    for i in range(60):
        Path("texts", f"{i}.txt").write_text(f"document {i} " * 40)
    assert main(["data", "prepare", "texts", "--validation", "0.2", "--workers", "1"]) == 0
    changes = "--data.source texts --data.validation 0.2 --run.log_every 1 --run.compile_cache="
    words = ["smoke/transformer", *changes.split()]
    with start("train", *words, "--optim.steps", "400") as process:
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("step 3/400") for line in lines)
        process.terminate()
        last = process.stderr.read().splitlines()[-1]
        assert process.stdout.read() == ""
    assert process.returncode == 128 + signal.SIGTERM
    assert last.startswith("Stopped and saved at step ") and last.endswith("; the same command goes on from there.")

    short = [*words, "--optim.steps", "6", "--run.dir", "here"]
    capsys.readouterr()
    row = as_json(capsys, "run", *short)
    assert row == json.loads(Path("here/result.json").read_text()) and row["steps"] == 6
    assert row["environment"]["devices"] and Path("here/loss.png").stat().st_size > 10_000
    numbers = as_json(capsys, "eval", *short)
    assert numbers["nats_per_byte"] == row["validation"]["nats_per_byte"] < math.log(320)
    assert numbers["step"] == 6
    less = as_json(capsys, "eval", *short, "--stride", "64", "--windows", "2")
    assert (less["tokens"], less["stride"]) == (128 + 64, 64)
    assert main(["eval", *short, "--optim.lr", "1"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_help_and_mistakes_load_neither_jax_nor_flax():
    code = (
        "import sys; from experiments.run import main; main(['--help']); main(['show', 'x']); import gdn_jax;"
        "sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
