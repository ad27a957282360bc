"""Wrong inputs, run through the command line: one sentence with the value and the way out, and nothing is lost."""

import contextlib
import fcntl
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from small import experiment, prepare_text, with_steps
from test_tokenizer import save_json_tokenizer

import experiments
from experiments.run import main
from gdn_jax import checkpoint
from gdn_jax.errors import UserError
from gdn_jax.files import temporary
from gdn_jax.metrics import read_rows

ID = "test/small"
RUN, DATA, STEPS = Path("run"), Path("data/text-b3838ac4"), 4
PROGRESS = re.compile(rf"{ID}: step \d+ of|step \d+/\d+  |Evaluated [\d,]+ of [\d,]+ windows\.")
ELSEWHERE = "--run.dir other"


def registered(directory):
    return with_steps(experiment(directory, save_every=2, eval_every=4), STEPS)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared text and a run of four steps with checkpoints at 2 and 4."""
    directory = tmp_path_factory.mktemp("faults")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        prepare_text(Path())
        patch.setitem(experiments.EXPERIMENTS, ID, registered(Path()))
        assert main(["train", ID]) == 0
    yield directory
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A copy of `home` as the current directory."""
    place = tmp_path / "here"
    shutil.copytree(home, place)
    monkeypatch.chdir(place)
    monkeypatch.setitem(experiments.EXPERIMENTS, ID, registered(Path()))
    with contextlib.ExitStack() as held:
        yield held


# --- what goes wrong on disk; each gets the test's monkeypatch and a stack that is closed after the command ---


def without(path):
    return lambda *_: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def file(path, content):
    def make(*_):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    return make


def truncated(pattern):
    """The largest file that matches loses its second half."""

    def cut(*_):
        path = max(Path().glob(pattern), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def altered(path):
    def flip(*_):
        content = bytearray(Path(path).read_bytes())
        content[0] ^= 1
        Path(path).write_bytes(content)

    return flip


def full(path):
    """The file's disk has no space left; the newest checkpoint is gone, so that training goes on from step 2."""

    def link(*_):
        shutil.rmtree(RUN / "checkpoints" / "4")
        temporary(path).symlink_to("/dev/full")

    return link


def foreign_checkpoint(*_):
    with ocp.training.Checkpointer(Path(RUN, "checkpoints").resolve()) as other:
        other.save_pytree(9, {"a": np.ones(3)})


def held(_, stack):
    fcntl.flock(stack.enter_context((RUN / "lock").open("w")), fcntl.LOCK_EX)


def not_installed(name):
    return lambda monkeypatch, _: monkeypatch.setitem(sys.modules, name, None)  # as Python marks an absent module


def json_tokenizer(*_):
    save_json_tokenizer(Path("t.json"), ["</s>"])


def broken_json_tokenizer(*_):
    tree = json.loads(save_json_tokenizer(Path("t.json"), ["</s>"]).read_text())
    Path("t.json").write_text(json.dumps(tree | {"model": {"type": "none"}}))


def parquet(*_):
    arrow, library = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    library.write_table(arrow.table({"id": [1], "body": ["a"]}), "in.parquet")


class Fault(NamedTuple):
    name: str
    command: str
    says: tuple[str, ...]  # the wrong value, then the way out
    arrange: Callable | None = None


OWN = b"""import dataclasses
import experiments
SMALL = dataclasses.replace(experiments.get("test/small"), id="mine/small")
N = 3
"""
FAILING = OWN + b"def f():\n    return 1\nf() / 0\n"
EMPTY = b"from gdn_jax import Model\nModel(pattern=(), repeats=1, d_model=8, d_ff=8)\n"
OUTSIDE = OWN + b"A = dataclasses.replace(SMALL, id='a/../b')\n"
TRAIN, SHOW, EVAL = f"train {ID}", f"show {ID}", f"eval {ID}"
FAULTS = [
    Fault("unknown ID", "train test/smal", ("'test/smal'", "did you mean 'test/small'?")),
    Fault("unknown glob", "list nothing/*", ("'nothing/*'", "the IDs begin with smoke")),
    Fault("unknown field", f"{TRAIN} --optim.step 3", ("--optim.step ", "did you mean '--optim.steps'?")),
    Fault("unknown group", f"{TRAIN} --optimizer.lr 3", ("--optimizer.lr", "--help` lists all")),
    Fault("wrong type", f"{TRAIN} --optim.steps ten", ("--optim.steps is 'ten'", "a whole number")),
    Fault("outside a Literal", f"{TRAIN} --run.chunk 48", ("--run.chunk is '48'", "one of 16, 32, 64, 128")),
    Fault("zero", f"{TRAIN} --optim.steps 0", ("optim.steps is 0", "must be positive")),
    Fault("negative", f"{TRAIN} --optim.lr -1", ("optim.lr is -1.0", "must be positive")),
    Fault("not a number", f"{TRAIN} --optim.lr nan", ("optim.lr is nan", "must be positive")),
    Fault("infinite", f"{TRAIN} --optim.clip inf", ("optim.clip is inf", "must be finite")),
    Fault("beta of 1", f"{TRAIN} --optim.b2 1", ("optim.b2 is 1.0", "in [0, 1)")),
    Fault("nested zero", f"{TRAIN} --model.gated_deltanet.heads 0", ("model.gated_deltanet.heads is 0", "positive")),
    Fault("value heads", f"{TRAIN} --model.gated_deltanet.value_heads 3", ("value_heads is 3", "multiple of heads 2")),
    Fault(
        "d_model is not heads x head_dim",
        "train smoke/transformer --model.d_model 40",
        ("model.d_model is 40", "must be model.attention.heads"),
    ),
    Fault("unknown mixer", f"{TRAIN} --model.pattern gated_deltanets", ("'gated_deltanets'", "mean 'gated_deltanet'?")),
    Fault("micro-batches", f"{TRAIN} --run.micro_batches 3", ("run.micro_batches is 3", "divide optim.batch_size 8")),
    Fault(
        "devices", f"{TRAIN} {ELSEWHERE} --optim.batch_size 6", ("optim.batch_size is 6", "multiple of the 4 devices")
    ),
    Fault("fsdp", f"{TRAIN} --run.fsdp 3", ("run.fsdp is 3", "must divide the number of devices here, 4")),
    Fault("no kernel", f"{TRAIN} --run.impl triton", ("run.impl is 'triton'", "use 'auto'")),
    Fault("no kernel to evaluate", f"{EVAL} --run.impl triton", ("run.impl is 'triton'", "use 'auto'")),
    Fault(
        "no data",
        f"{TRAIN} {ELSEWHERE} --data.source fineweb-edu",
        ("data.source 'fineweb-edu'", "run: gdn data prepare SOURCE --out data/fineweb-edu-b3838ac4"),
    ),
    Fault(
        "data of another text with the same name",
        f"{TRAIN} {ELSEWHERE} --data.source b/text",
        ("data.source is 'b/text', and data/text-b3838ac4 was made of 'text'", "gdn data prepare b/text --out DIR"),
        file("b/text/1.txt", b"another text"),
    ),
    Fault(
        "another text with the same name to prepare",
        "data prepare b/text --validation 0.2",
        ("was prepared with source 'text', now it is 'b/text'", "choose another --out"),
        file("b/text/1.txt", b"another text"),
    ),
    Fault(
        "another data set with the same name",
        f"{TRAIN} {ELSEWHERE} --data.source hf:somebody/text",
        ("data.source is 'hf:somebody/text'", "was made of 'text'", "gdn data prepare hf:somebody/text --out DIR"),
    ),
    Fault("no tokenizer", f"{TRAIN} --data.tokenizer no.model", ("no.model", "give the path of an existing file")),
    Fault("tokenizer's suffix", f"{TRAIN} --data.tokenizer LICENSE", ("'LICENSE'", "'byte' nor the path of a .model")),
    Fault(
        "damaged SentencePiece", f"{TRAIN} --data.tokenizer t.model", ("t.model", "restore it"), file("t.model", b"xx")
    ),
    Fault(
        "damaged tokenizers file", f"{TRAIN} --data.tokenizer t.json", ("t.json", "restore it"), file("t.json", b"{")
    ),
    Fault(
        "tokenizers file of no model",
        f"{TRAIN} --data.tokenizer t.json",
        ("t.json", "give a file saved by the tokenizers library"),
        broken_json_tokenizer,
    ),
    Fault(
        "data of another tokenizer",
        f"data prepare text --out {DATA} --tokenizer t.json --validation 0.2",
        ("'b3838ac4'", "choose another --out"),
        json_tokenizer,
    ),
    Fault("vocabulary", f"{TRAIN} {ELSEWHERE} --model.vocab 256", ("model.vocab is 256", "at least 257")),
    Fault(
        "truncated shard", TRAIN, ("train-00000.bin has", f"delete {DATA} and run: gdn"), truncated(f"{DATA}/t*.bin")
    ),
    Fault("altered shard", TRAIN, ("was altered", f"delete {DATA} and run: gdn"), altered(DATA / "train-00000.bin")),
    Fault("missing shard", TRAIN, ("is missing", f"delete {DATA} and run: gdn"), without(DATA / "train-00000.bin")),
    Fault(
        "damaged manifest", TRAIN, ("manifest.json is damaged", f"delete {DATA}"), truncated(f"{DATA}/manifest.json")
    ),
    Fault(
        "manifest without fields",
        TRAIN,
        ("manifest.json is damaged", f"delete {DATA}"),
        file(DATA / "manifest.json", b'{"format": 2}'),
    ),
    Fault(
        "damaged manifest when preparing",
        f"data prepare text --out {DATA}",
        ("manifest.json is damaged", f"delete {DATA}"),
        truncated(f"{DATA}/manifest.json"),
    ),
    Fault(
        "validation fraction", f"{TRAIN} {ELSEWHERE} --data.validation 0.3", ("data.validation is 0.3", "with 0.2; use")
    ),
    Fault(
        "too few tokens", f"{TRAIN} {ELSEWHERE} --optim.batch_size 100000", ("optim.batch_size 100000", "lower one of")
    ),
    Fault(
        "too little held out",
        f"{TRAIN} {ELSEWHERE} --data.seq_len 1000000",
        ("data.seq_len 1000000", "larger --validation"),
    ),
    Fault("foreign checkpoint", TRAIN, ("checkpoints/9", "away to go on from step 4"), foreign_checkpoint),
    Fault("another configuration", f"{TRAIN} --run.dir run --optim.lr 0.5", ("0.5 asked", "another run.dir")),
    Fault(
        "damaged checkpoint", EVAL, ("checkpoints/4 is damaged", "to go on from step 2"), truncated("run/*/4/model/d/*")
    ),
    Fault(
        "damaged metadata of a checkpoint",
        TRAIN,
        ("checkpoints/4", "to go on from step 2"),
        truncated("run/*/4/_CHECKPOINT_METADATA"),
    ),
    Fault("damaged config.json", TRAIN, ("run/config.json is damaged", "restore it"), truncated("run/config.json")),
    Fault("config.json of no run", EVAL, ("run/config.json is damaged", "restore it"), file("run/config.json", b"[]")),
    Fault("run.dir is a file", f"{TRAIN} --run.dir f", ("directory f ", "choose another run.dir"), file("f", b"x")),
    Fault("run.dir below a file", f"{TRAIN} --run.dir f/x", ("f/x", "choose another run.dir"), file("f", b"x")),
    Fault("run.dir below /proc", f"{TRAIN} --run.dir /proc/x", ("/proc/x", "choose another run.dir")),
    Fault("run.dir is no run", f"{TRAIN} --run.dir text", ("text holds files but no run", "another run.dir")),
    Fault("--out is no data", "data prepare text --out run", ("run holds files", "choose another --out")),
    Fault("no space to train", TRAIN, ("No space left for run/env.json;", "free some"), full(RUN / "env.json")),
    Fault(
        "no space for metrics",
        TRAIN,
        ("No space left for run/metrics.jsonl;", "free some"),
        full(RUN / "metrics.jsonl"),
    ),
    Fault(
        "no space to evaluate",
        EVAL,
        ("No space left for run/evaluation.json;", "free some"),
        full(RUN / "evaluation.json"),
    ),
    Fault(
        "loss is not finite",
        f"{TRAIN} {ELSEWHERE} --optim.lr 1e30 --optim.warmup 0",
        ("the gradient norm nan", "lower optim.lr 1e+30"),
    ),
    Fault("eval without training", f"{EVAL} {ELSEWHERE}", ("other holds no run", "train it first")),
    Fault(
        "eval before a checkpoint", EVAL, ("run holds no finished checkpoint", "gdn train"), without("run/checkpoints")
    ),
    Fault("held by another process", TRAIN, ("training in run", "wait for it, or choose another run.dir"), held),
    Fault(
        "no tensorboard",
        f"{TRAIN} --run.tensorboard True",
        ("run.tensorboard is True", "pip install"),
        not_installed("tensorboardX"),
    ),
    Fault("no wandb", f"{TRAIN} --run.wandb p", ("run.wandb is 'p'", "pip install"), not_installed("wandb")),
    Fault(
        "line that is no JSON",
        "data prepare in.jsonl",
        ("in.jsonl, line 2: not valid JSON", "repair or remove the line"),
        file("in.jsonl", b'{"text": "a"}\n{"text": \n'),
    ),
    Fault(
        "line without the field",
        "data prepare in.jsonl",
        ("in.jsonl, line 1: there is no text column 'text'", "there are body"),
        file("in.jsonl", b'{"body": "a"}\n'),
    ),
    Fault("no data set's name", "data prepare hf:", ("'hf:'", "write 'hf:owner/name'")),
    Fault("prepared data as text", f"data prepare {DATA}", (f"{DATA} is prepared", "give it as --data.source")),
    Fault(
        "JSON that is no prose",
        "data prepare in.json",
        ("in.json is JSON", "to a .jsonl file"),
        file("in.json", b'{"text": "a"}'),
    ),
    Fault("parquet column", "data prepare in.parquet", ("in.parquet: there is no text", "there are id, body"), parquet),
    Fault("stride of 0", f"{EVAL} --stride 0", ("stride is 0", "between 1 and data.seq_len 32")),
    Fault("stride too large", f"{EVAL} --stride 33", ("stride is 33", "between 1 and data.seq_len 32")),
    Fault("no windows", f"{EVAL} --windows 0", ("windows is 0", "must be positive")),
    Fault("file of a run that is not there", "train no.py:SMALL", ("no file no.py", "a Python file that exists")),
    Fault("file that is no Python", "run my.txt:SMALL", ("'my.txt'", "ends in .py"), file("my.txt", b"")),
    Fault("file without a name", "show my.py", ("as in my.py:NAME (it has SMALL)",), file("my.py", OWN)),
    Fault(
        "name not in the file", "train my.py:SMAL", ("'SMAL' (did you mean 'SMALL'?)", "has SMALL"), file("my.py", OWN)
    ),
    Fault("file without one", "eval my.py:SMALL", ("no Experiment 'SMALL'", "NAME = Exp"), file("my.py", b"a = 1")),
    Fault("name of a number", "doctor my.py:N", ("N in my.py is of type int", "it has SMALL"), file("my.py", OWN)),
    Fault("no syntax", "show my.py:SMALL", ("my.py, line 2: SyntaxError", "mend"), file("my.py", b"\na = = 1\n")),
    Fault("no UTF-8", "show my.py:SMALL", ("my.py, line 1: SyntaxError", "mend"), file("my.py", b"a = '\xff'\n")),
    Fault("failing file", "show my.py:SMALL", ("my.py, line 7: ZeroDivisionError", "mend"), file("my.py", FAILING)),
    Fault("file that ends", "show my.py:SMALL", ("my.py, line 2: SystemExit: 3", "mend"), file("my.py", b"\nexit(3)")),
    Fault(
        "file breaks a rule", "show my.py:A", ("line 2: model.pattern is empty", "name at least"), file("my.py", EMPTY)
    ),
    Fault(
        "id outside runs", "show my.py:A", ("id is 'a/../b'", "words between single slashes"), file("my.py", OUTSIDE)
    ),
    Fault("stride of a run", f"run {ID} {ELSEWHERE} --stride 0", ("stride is 0", "between 1 and data.seq_len 32")),
]


def contents():
    """path -> bytes of every regular file here; the cache of compiled programs is nobody's loss."""
    return {
        path: path.read_bytes()
        for path in Path().rglob("*")
        if path.is_file() and not path.is_symlink() and path.parts[0] != "cache"
    }


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_wrong_input_gets_one_sentence_and_loses_nothing(here, capfd, monkeypatch, fault):
    if fault.arrange:
        fault.arrange(monkeypatch, here)
    before = contents()
    capfd.readouterr()
    assert main(fault.command.split()) == 2
    out, err = capfd.readouterr()
    *progress, sentence = err.splitlines()
    assert out == "" and not [line for line in progress if not PROGRESS.match(line)]
    assert sentence.endswith(".") and len(sentence) < 400 and sentence[0] not in "╭'["
    for part in fault.says:
        assert part in sentence
    after = contents()
    assert not [path for path in after if path not in before and path.parts[0] in ("text", "run")]
    # env.json says who trained last: only a run that comes as far as its metrics may renew it
    renewed = {RUN / "env.json"} if fault.name == "no space for metrics" else set()
    assert {path: after.get(path) for path in before if path not in renewed} == {
        path: content for path, content in before.items() if path not in renewed
    }


def test_a_repaired_source_is_prepared_by_the_same_command(here, capfd):
    """What a refused preparation leaves behind does not stand in the way."""
    lines = [json.dumps({"text": f"text {i}"}) for i in range(50)]
    command = ["data", "prepare", "in.jsonl", "--validation", "0.3", "--workers", "1"]
    Path("in.jsonl").write_text("\n".join([*lines, "{"]))
    assert main(command) == 2
    Path("in.jsonl").write_text("\n".join(lines))
    assert main(command) == 0
    assert json.loads(Path("data/in.jsonl-b3838ac4/manifest.json").read_text())["splits"]["train"]["documents"] > 20


def test_the_way_out_of_a_damaged_checkpoint(here, capfd):
    """Moved away as the sentence says, training repeats the steps after the one before and ends as it had."""
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    truncated("run/*/4/model/d/*")()
    assert main(["eval", ID]) == 2
    Path(re.search(r"move (\S+) away", capfd.readouterr().err)[1]).rename("damaged")
    assert main(["train", ID]) == 0
    again = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    losses = [[(row["step"], row["loss"]) for row in table if "loss" in row] for table in (rows, again)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.mark.parametrize("junk", [b"\xff\xfe\x00", b"{", b"5", b"{}", b'{"step": "x"}', b""])
def test_junk_among_the_metrics(here, capfd, junk):
    """It is named and nothing is lost; at the end it is what a crash leaves behind."""
    path = RUN / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, junk, *rest, b""]))
    before = path.read_bytes()
    shutil.rmtree(RUN / "checkpoints" / "4")
    capfd.readouterr()
    assert main(["train", ID]) == 2
    assert "run/metrics.jsonl, line 2, is no row of a run; remove that line alone." in capfd.readouterr().err
    assert path.read_bytes() == before
    path.write_bytes(b"\n".join([first, *rest, junk]))
    assert [row["step"] for row in read_rows(RUN) if "loss" in row] == [1, 2, 3, 4]


def test_a_step_that_was_not_saved(here):
    with pytest.raises(UserError, match=r"holds no checkpoint of step 3; there are 2, 4\."):
        checkpoint.load(RUN, step=3)


def test_reading_a_run_leaves_a_write_under_way_alone(here):
    unfinished = RUN / "checkpoints" / "5.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert checkpoint.load(RUN)[2] == STEPS
    assert unfinished.exists()
