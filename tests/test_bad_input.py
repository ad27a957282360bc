"""Bad inputs in one table: the command line's words, a run's files, sources of text, calls from Python.

Each gets one sentence that names what is wrong, exit code 2 (or a UserError), and leaves nothing behind. Damage that
takes a whole run to show is in test_faults.py.
"""

import contextlib
import dataclasses
import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small import experiment, prepare_text, with_steps

import experiments
import gdn_jax
from experiments import published, report, suites
from experiments.run import main
from gdn_jax import checkpoint, tokenizer
from gdn_jax.config import Data, Experiment, Optim, Run, from_dict, to_dict
from gdn_jax.errors import UserError
from gdn_jax.fingerprint import Identity
from gdn_jax.generate import generate
from gdn_jax.model import init_model
from gdn_jax.sampling import Sampling
from gdn_jax.tokenizer import ByteTokenizer

ID = "test/small"
DEEP = b'{"text": ' + b"[" * 100_000
# name -> content; a folder where the name ends in a slash
FILES = {
    "empty/": b"", "empty.txt": b"", "one.txt": b"x", "utf16.txt": "hello".encode("utf-16"), "zeros.txt": b"a\0b",
    "empty.jsonl": b"", "array.jsonl": b'["a"]\n', "number.jsonl": b"NaN\n", "list.jsonl": b'{"text": ["a"]}\n',
    "deep.jsonl": DEEP + b"\n", "null.jsonl": b'{"text": null}\n', "not.jsonl.gz": b"no", "empty.parquet": b"",
    "hidden/.a.txt": b"a", "packed/a.zip": b"PK", "t.model": b"", "t.json": b"[]", "deep.json": DEEP,
    "latin.txt": b"\xe9",
    "llama/config.json": b'{"model_type": "llama"}', "deep/config.json": DEEP, "pickle/pytorch_model.bin": b"x",
    "short.safetensors": b"\0\0", "rows/squad.jsonl": b"5\n", "rows/swde.jsonl": DEEP, "junk.jsonl": b"junk\n",
    "number.py": b"SMALL = 3\n", "imports.py": b"import nothing_here\n", "folder.py/": b"",
}  # fmt: skip
NAMES = [
    ("train ' '", "There is no experiment ' '; `gdn list`"),
    ("train smoke//gated-deltanet", "'smoke//gated-deltanet' (did you mean 'smoke/gated-deltanet'?)"),
    ("train table3/gated-deltanet/2b", "'table3/gated-deltanet/2b' (did you mean"),
    ("train table2/gated-deltanet/tiny", "evaluates the run of table3/gated-deltanet/tiny and trains nothing"),
    ("run figure3/gated-deltanet/tiny", "trains nothing; run: gdn bench figure3 --models gated-deltanet --scale tiny."),
    ("train empty", "empty holds no run (there is no config.json)"),
    ("train one.txt", "There is no experiment 'one.txt'"),
    ("show run/checkpoints", "run/checkpoints holds no run"),
    ("show deep", "deep/config.json is damaged"),
    ("run folder.py:A", "There is no file folder.py; FILE:NAME takes the path of a Python file"),
    ("run number.py:SMALL", "SMALL in number.py is of type int, not an Experiment"),
    ("run imports.py:A", "imports.py, line 1: ModuleNotFoundError: No module named 'nothing_here'; mend"),
    ("run :SMALL", "'' in ':SMALL' is no Python file"),
    ("list x y", "'y' is not expected here; options are written --name value."),
    ("list [", "No experiment matches '['"),
    ("table table9", "There is no table 'table9' (did you mean"),
    ("table table3 --scale 7b", "--scale is '7b'; it must be one of tiny, desk,"),
    ("table table3 --scale tiny --out one.txt", "one.txt: File exists; check the path"),
    ("figure figure9", "There is no figure 'figure9' (did you mean"),
    ("figure figure2 --scale tiny", "No run at tiny was evaluated for figure2; begin with: gdn run figure2/"),
    ("figure figure3 --scale tiny", "No step at tiny was timed for figure3; begin with: gdn bench figure3"),
    ("figure figure1 --id figure3/gated-deltanet/tiny", "times the training step of table3/gated-deltanet/tiny"),
    ("figure figure1 --id smoke/transformer --out one.txt", "one.txt: File exists"),
    ("doctor nothing", "There is no experiment 'nothing'"),
    ("bench nothing", "There is no op 'nothing' to bench; it must be one of gated_delta_rule,"),
    ("bench gated_delta_rule --shapes nothing", "Shape 'nothing' is neither BxT,H,K,V"),
    ("bench gated_delta_rule --impls nothing", "impls names 'nothing'; it must be"),
    ("bench gated_delta_rule --peers nothing", "peers names 'nothing'; it must be all, none or some of"),
    ("bench figure3 --settings 3Kx3", "settings names '3Kx3'"),
    ("bench generate smoke/transformer --batches 0", "batches is '0'; it must be positive whole numbers"),
    ("tune gated_norm", "There is no op 'gated_norm' to tune"),
    ("tune gated_delta_rule", "cannot be tuned here: the device is cpu"),
]
FIELDS = [
    ("--optim.lr 1e400", "optim.lr is inf; it must be finite."),
    ("--optim.lr 1,5", "--optim.lr is '1,5'; it must be a number."),
    ("--optim.lr ''", "--optim.lr is ''; it must be a number."),
    ("--optim.steps 1e3", "--optim.steps is '1e3'; it must be a whole number."),
    ("--optim.steps 99999999999999999999", "optim.steps is 99999999999999999999; it must be below 2^31"),
    ("--optim.warmup 1.5", "optim.warmup is 1.5; it must be in [0, 1]."),
    ("--optim.min_lr_ratio -1", "optim.min_lr_ratio is -1.0; it must be in [0, 1]."),
    ("--optim.weight_decay nan", "optim.weight_decay is nan; it must be 0 or positive and finite."),
    ("--optim.b2 -0.5", "optim.b2 is -0.5; it must be in [0, 1)."),
    ("--optim.eps 0", "optim.eps is 0.0; it must be positive."),
    ("--optim.precision fp16", "--optim.precision is 'fp16'; it must be one of bf16, fp32."),
    ("--optim. 3", "There is no option --optim. (did you mean"),
    ("--data.validation 1", "data.validation is 1.0; it must be in (0, 1)."),
    ("--data.reset_at_documents yes", "--data.reset_at_documents is 'yes'; it must be True or False."),
    ("--data.source ''", "data.source is ''; it must name"),
    ("--model.pattern", "model.pattern is empty; name at least one mixer."),
    ("--model.pattern ''", "model.pattern names '', which is no mixer; there are gated_deltanet"),
    ("--model.d_model -3", "model.d_model is -3; it must be positive."),
    ("--model.d_ff -1", "model.d_ff is -1; use 0 for no MLP"),
    ("--model.tied maybe", "--model.tied is 'maybe'; it must be True or False."),
    ("--model.gated_deltanet.heads 2.5", "--model.gated_deltanet.heads is '2.5'; it must be a whole number."),
    ("--model.gated_deltanet.conv_width -1", "conv_width is -1; use 0 for none or a positive width."),
    ("--model.mamba.inner 8", "begins the configuration of a mixer that this model lacks; give --model.mamba.dt_rank"),
    ("--model.pattern swa --model.attention.heads 2 --model.attention.head_dim 15", "head_dim is 15; it must be even"),
    ("--model.own.x 3", "There is no option --model.own.x"),
    ("--run.seed 4294967296", "run.seed is 4294967296; it must be in [0, 2^31)."),
    ("--run.keep 0", "run.keep is 0; it must be positive."),
    ("--run.save_every 0", "run.save_every is 0; it must be positive."),
    ("--run.log_every -1", "run.log_every is -1; it must be positive."),
    ("--run.profile_at -7", "run.profile_at is -7; use -1 for never"),
    ("--run.tensorboard 2", "--run.tensorboard is '2'; it must be True or False."),
    ("--devices -1", "devices is -1; it must be positive, or 0 for none."),
    ("-x", "'-x' is not expected here"),
    ("--json True", "--json takes no value"),
]  # fmt: skip
TEXTS = [
    ("data prepare empty.txt", "holds no text (empty.txt is empty); give one that does."),
    ("data prepare one.txt", "holds one character, too little to hold some out"),
    ("data prepare utf16.txt", "(utf16.txt is not UTF-8 text: convert it)"),
    ("data prepare zeros.txt", "(zeros.txt is not UTF-8 text: convert it)"),
    ("data prepare empty.jsonl", "Source 'empty.jsonl' holds no text; give one that does."),
    ("data prepare array.jsonl", "array.jsonl, line 1: holds list; each line must be a JSON object."),
    ("data prepare number.jsonl", "number.jsonl, line 1: holds float; each line must be a JSON object."),
    ("data prepare list.jsonl", "list.jsonl, line 1: field 'text' is list; it must be a string."),
    ("data prepare deep.jsonl", "deep.jsonl, line 1: not valid JSON"),
    ("data prepare null.jsonl", "holds no text (null.jsonl, line 1 is null)"),
    ("data prepare not.jsonl.gz", "not.jsonl.gz is damaged after line 0 (Not a gzipped file"),
    ("data prepare empty.parquet", "empty.parquet is no parquet file or is damaged"),
    ("data prepare empty", "Source 'empty' holds no text files; give a folder with some."),
    ("data prepare hidden", "Source 'hidden' holds no text files"),
    ("data prepare packed", "holds no text (packed/a.zip is packed: unpack it)"),
    ("data prepare /dev/null", "holds no text (/dev/null is empty)"),
    ("data prepare http://example.com/x.txt", "is no file or folder, nor 'english-novels'"),
    ("data prepare hf:/", "Source 'hf:/' names no data set; write 'hf:owner/name'."),
    ("data prepare text --validation nan", "data.validation is nan; it must be in (0, 1)."),
    ("data prepare text --workers -2", "workers is -2; it must be positive."),
    ("data prepare text --workers two", "--workers is 'two'; it must be a whole number or None."),
    ("data prepare text --out one.txt", "one.txt: File exists"),
    ("data prepare text --out run", "run holds files but no prepared data; choose another --out"),
    ("data prepare text --tokenizer t.model", "t.model is no SentencePiece model or is damaged"),
    ("data prepare text --tokenizer t.json", "Tokenizer file t.json holds no 'model'"),
    ("data prepare text --tokenizer deep.json", "Tokenizer file deep.json is no JSON or is damaged"),
    ("data prepare text --tokenizer gpt2", "Tokenizer 'gpt2' is neither 'byte' nor the path"),
    ("data verify run", "run holds no prepared data: run/manifest.json cannot be read"),
]
RUNS = [
    ("generate run --max_tokens 1.5", "--max_tokens is '1.5'; it must be a whole number."),
    ("generate run --temperature nan", "temperature is nan; it must be 0 for the likeliest token"),
    ("generate run --top_p nan", "top_p is nan; it must be in (0, 1]"),
    ("generate run --top_k -1", "top_k is -1; it must be positive and whole"),
    ("generate run --batch_size 0", "batch_size is 0; it must be positive."),
    ("generate run --prompt_file empty", "prompt_file empty cannot be read (Is a directory)"),
    ("generate data/text-b3838ac4", "data/text-b3838ac4 holds no run"),
    ("eval run --windows x", "--windows is 'x'; it must be a whole number or None."),
    ("eval run --text latin.txt", "latin.txt is no text in UTF-8; convert it first."),
    ("eval run --text empty.txt", "empty.txt is empty; give a file that holds text."),
    ("eval run --text empty", "empty: Is a directory"),
    ("eval run --text one.txt --tasks piqa", "--tasks and --text ask for two things; give one of them."),
    ("eval run --max_length 0", "max_length is 0; it must be positive."),
    ("eval run --limit 0", "limit is 0; it must be positive, or left out for all."),
    ("eval run --tasks table3/nothing", "table3 has no task 'nothing'; it has wikitext"),
    ("eval run --tasks table4/swde --task_data rows", "rows/swde.jsonl is damaged after line 1"),
    ("eval run --tasks table4/squad --task_data rows", "rows/squad.jsonl, line 1: each line must be a JSON object"),
    ("eval run --tasks table5 --task_data one.txt", "one.txt is no folder; --task_data names one"),
    ("eval run --tasks figure2 --task_data empty", "empty holds no corpus; it takes gov_report.jsonl"),
    ("eval run --tasks table2 --haystack empty", "The haystack empty cannot be read (Is a directory)"),
    ("eval run --answer junk.jsonl", "junk.jsonl holds no requests"),
    ("eval run --answer deep.jsonl", "deep.jsonl holds no requests (maximum recursion depth exceeded"),
    ("eval run --requests out.jsonl", "--requests writes the requests of tasks; name them with --tasks."),
    ("eval run --data.source nothing", "data.source 'nothing' is not prepared in data/nothing-b3838ac4"),
    ("convert import nothing --out x", "There is no file or directory 'nothing'"),
    ("convert import llama --out x", "llama/config.json has model_type 'llama'; there are tables for"),
    ("convert import deep --out x", "deep/config.json is no JSON or is damaged"),
    ("convert import pickle --out x", "pickle/pytorch_model.bin is a pickle"),
    ("convert import short.safetensors --out x", "short.safetensors is no whole safetensors file"),
    ("convert import run --out x", "run is a run of ours already"),
    ("convert import llama --out x --precision fp8", "--precision is 'fp8'; it must be one of files, bf16, fp32."),
    ("convert export run --out x --format lit --step 99", "holds no checkpoint of step 99; there are 0."),
    (f"train {ID} --from empty --run.dir t", "empty holds no run"),
    ("train smoke/transformer --from run --run.dir t", "The parameters of run are of another model than"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of bad files, prepared text, and a run of random parameters, as the current directory."""
    directory = tmp_path_factory.mktemp("bad")
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        prepare_text(Path())
        small = with_steps(experiment(Path(), dir="run"), 4)
        patch.setitem(experiments.EXPERIMENTS, ID, small)
        model = jax.jit(init_model, static_argnums=0)(small.model, jax.random.key(0))
        checkpoint.write(Path("run"), small, model, 0, Identity(None, ByteTokenizer().hash8))
        for name, content in FILES.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).mkdir() if name.endswith("/") else Path(name).write_bytes(content)
        yield directory


def paths():
    return sorted(str(path) for path in Path().rglob("*") if ".jax_cache" not in path.parts)


def refused(words, sentence, capfd):
    before = paths()
    capfd.readouterr()
    assert main(words) == 2
    out, err = capfd.readouterr()
    *_, said = err.splitlines()
    assert out == "" and sentence in said and said.endswith(".") and len(said) < 450, said
    assert "Traceback" not in err and paths() == before


@pytest.mark.parametrize(("words", "sentence"), NAMES + TEXTS + RUNS, ids=lambda value: value.replace("/", "|")[:60])
def test_a_command(here, capfd, words, sentence):
    refused(shlex.split(words), sentence, capfd)


@pytest.mark.parametrize(("words", "sentence"), FIELDS, ids=lambda value: value.replace("/", "|")[:60])
def test_a_field(here, capfd, words, sentence):
    refused(["show", ID, *shlex.split(words)], sentence, capfd)


@pytest.mark.parametrize("junk", [b"", b"\xff", b"{", b"5", b"[5]", b"[{}]", DEEP, b"{}"])
@pytest.mark.parametrize("name", ["evaluation.json", "tasks.json", "result.json", "env.json", "validation.json"])
def test_a_file_of_a_run(here, tmp_path, name, junk):
    run_dir = tmp_path / ID / "12345678"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_bytes(Path("run/config.json").read_bytes())
    rows = {"step": 1, "loss": 1.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(rows) + "\n")
    (run_dir / "env.json").write_text('{"devices": ["cpu"], "impl": {}}')
    reads = {
        "evaluation.json": lambda: report.save_evaluation(run_dir, {"step": 4}),
        "tasks.json": lambda: suites.kept(run_dir),
        "result.json": lambda: published.of_experiment(experiments.get(ID), runs=tmp_path),
        "env.json": lambda: report.result_row(run_dir),
        "validation.json": lambda: report.draw_loss(run_dir),
    }
    (run_dir / name).write_bytes(junk)
    with pytest.raises(UserError, match=f"{name} is damaged; delete it, and make it again with the command that wrote"):
        reads[name]()
    assert (run_dir / name).read_bytes() == junk


CALLS = [
    (lambda it: Optim(steps=3.5, batch_size=8), "optim.steps is 3.5; it must be of type int."),
    (lambda it: Optim(steps=True, batch_size=8), "optim.steps is True; it must be of type int."),
    (lambda it: Optim(steps=3, batch_size=8, lr=None), "optim.lr is None; it must be of type float."),
    (lambda it: Run(impl="fast"), "run.impl is 'fast'; it must be one of 'auto'"),
    (lambda it: Run(chunk=48), "run.chunk is 48; it must be one of 16, 32, 64, 128."),
    (lambda it: Run(dir=Path("x")), "it must be of type str."),
    (lambda it: Data(seq_len="x"), "data.seq_len is 'x'; it must be of type int."),
    (lambda it: Data(tokenizer=3), "data.tokenizer is 3; it must be of type str."),
    (lambda it: dataclasses.replace(it.model, pattern="attention"), "model.pattern is 'attention'; it must be a list."),
    (lambda it: dataclasses.replace(it.model, gated_deltanet={"heads": 1}), "it must be a config.GatedDeltaNetConfig."),
    (lambda it: dataclasses.replace(it, id=""), "id is ''; it must be words between single slashes"),
    (lambda it: from_dict(Experiment, to_dict(it) | {"modle": 1}), "no field 'modle' (did you mean 'model'?)."),
    (lambda it: from_dict(Experiment, to_dict(it) | {"model": None}), "experiment.model is None; it must be an object"),
    (lambda it: from_dict(Experiment, {"id": "a"}), "experiment lacks the field 'model'; add it."),
    (lambda it: gdn_jax.open_run("nothing"), "There is no run 'nothing', neither as a directory nor in runs/nothing"),
    (lambda it: gdn_jax.open_run(Path("nothing")), "nothing holds no run (there is no config.json)"),
    (lambda it: gdn_jax.load_fla("nothing"), "There is no file or directory 'nothing'"),
    (lambda it: gdn_jax.load_fla("llama"), "llama/config.json has model_type 'llama'"),
    (lambda it: continued([]), "There is no prompt; give one at least"),
    (lambda it: continued("hi"), "prompts is the text 'hi'; pass a list of prompts: ['hi']."),
    (lambda it: continued([3]), "A prompt is 3; each must be a text."),
    (lambda it: continued(["a"], max_tokens=1.5), "max_tokens is 1.5; it must be a whole number."),
    (lambda it: continued(["a"], max_tokens="9"), "max_tokens is '9'; it must be a whole number."),
    (lambda it: continued(["a"], seeds=[1, 2]), "There are 2 seeds for 1 prompts; give one for each."),
    (lambda it: continued(["a"], seeds=[-2]), "seed is -2; it must be in [0, 2^31)."),
    (lambda it: continued(["a"], stops=[""]), "A stop string is empty"),
    (lambda it: continued(["a"], stops="ab"), "stops is the text 'ab'; pass a list of stops: ['ab']."),
    (lambda it: continued(["a"], batch_size=0.5), "batch_size is 0.5; it must be a whole number."),
    (lambda it: Sampling(top_k=1.5), "top_k is 1.5; it must be positive and whole"),
    (lambda it: gdn_jax.reorder_cache([jnp.zeros((1, 2, 3))], [2]), "rows is [2]; the cache has rows 0 to 1."),
    (lambda it: tokenizer.load("."), "Tokenizer '.' is neither 'byte' nor the path"),
]


def continued(prompts, **options):
    model = gdn_jax.open_run(Path("run")).model
    return generate(model, ByteTokenizer(), prompts, **({"max_tokens": 1} | options))


@pytest.mark.parametrize(("call", "sentence"), CALLS, ids=[sentence.replace("/", "|")[:40] for _, sentence in CALLS])
def test_a_call(here, call, sentence):
    with pytest.raises(UserError) as error:
        call(experiments.get(ID))
    assert sentence in str(error.value) and str(error.value).endswith(".")


def test_they_are_many_and_different():
    commands = [words for words, _ in NAMES + FIELDS + TEXTS + RUNS]
    assert len(commands) == len(set(commands)) == 128
