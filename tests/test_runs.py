"""A number is bound to its data: real runs whose text, tokenizer or files are changed behind their back."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import experiment, prepare_text, with_steps
from test_tokenizer import save_json_tokenizer

import experiments
import gdn_jax
from experiments import published, report
from experiments.run import main
from gdn_jax import checkpoint, metrics, prepare, runs
from gdn_jax.data import open_prepared
from gdn_jax.errors import UserError
from gdn_jax.progress import SILENT, Progress
from gdn_jax.tree import named_leaves

ID = "test/small"
RUN, DATA = Path("run"), Path("data/text-b3838ac4")
# What `gdn run smoke/...` reads, on every machine, Python and jax
NOVELS = "b962150d998327812b38070c54f154bd0072c4412fc5606633b47babc42ce301"


def registered(directory):
    """Six steps with checkpoints at 2, 4 and 6; every held-out window is a validation window."""
    return with_steps(experiment(directory, save_every=2, eval_every=6, eval_windows=10**6), 6)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        prepare_text(Path())
        patch.setitem(experiments.EXPERIMENTS, ID, registered(Path()))
        assert main(["run", ID]) == 0
    return directory


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A copy of `home` as the current directory."""
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(experiments.EXPERIMENTS, ID, registered(Path()))


def says(capfd, *words, code=2):
    """The last line on stderr of a command that ends with `code`."""
    capfd.readouterr()
    assert main(list(words)) == code
    return capfd.readouterr().err.splitlines()[-1]


def prepared_again(change=lambda path: path.write_text(path.read_text() + "# one more line\n")):
    """The fingerprints before and after the source was changed and prepared again."""
    before = open_prepared(DATA, tokenizer_hash=None).fingerprint
    change(sorted(Path("text").iterdir())[0])
    shutil.rmtree(DATA)
    prepare.prepare("text", DATA, "byte", validation=0.2, progress=SILENT)
    return before[:8], open_prepared(DATA, tokenizer_hash=None).fingerprint[:8]


def result():
    return json.loads((RUN / "result.json").read_text())


def all_files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- the data of a run ---


def test_a_run_does_not_go_on_with_other_data(here, capfd):
    shutil.rmtree(RUN / "checkpoints" / "6")
    before, after = prepared_again()
    files = all_files(RUN)
    sentence = says(capfd, "train", ID)
    assert f"run/checkpoints/4 was trained on data {before}, the data prepared now are {after};" in sentence
    assert sentence.endswith("prepare the former text again, or choose another run.dir.")
    assert all_files(RUN) == files
    prepared_again(lambda path: path.write_text(path.read_text().removesuffix("# one more line\n")))
    assert main(["train", ID]) == 0


def test_other_data_may_be_evaluated_and_the_numbers_say_so(here, capfd):
    whole = result()
    before, after = prepared_again()
    capfd.readouterr()
    assert main(["eval", ID]) == 0
    assert f"NOT the whole measure: read on data {after}, trained on {before}" in capfd.readouterr().out
    assert main(["run", ID, "--json"]) == 0  # it is trained already: the number of its own data stays
    assert json.loads(capfd.readouterr().out)["validation"] == result()["validation"] == whole["validation"]


@pytest.mark.slow
def test_an_evaluation_of_three_windows_keeps_the_whole_one(here, capfd):
    whole = result()
    assert main(["run", ID, "--windows", "3"]) == 0
    out = capfd.readouterr().out
    assert f"NOT the whole measure: 3 of {whole['validation']['of_windows']:,} windows" in out
    assert result()["validation"] == whole["validation"]
    assert main(["eval", ID, "--stride", "7", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["marks"] == ["stride 7"]


def test_an_unfinished_training_is_marked(here, capfd):
    """Its newest checkpoint is scored, and of its evaluations the one of the whole text stands for it."""
    shutil.rmtree(RUN / "checkpoints" / "6")
    for words in ([], ["--windows", "3"]):
        capfd.readouterr()
        assert main(["eval", ID, *words]) == 0
        assert "NOT the whole measure: step 4 of 6" in capfd.readouterr().out
    row = report.result_row(RUN)
    assert (row["steps"], published.marks(row["validation"])) == (4, ["step 4 of 6"])
    with pytest.raises(UserError, match=r"is not its ID's number \(step 4 of 6\)"):
        published.publish(RUN)
    assert main(["run", ID]) == 0 and published.marks(result()["validation"]) == []


def test_results_checkpoints_and_curves_name_the_data(here):
    fingerprint = open_prepared(DATA, tokenizer_hash=None).fingerprint
    assert result()["validation"]["trained_on"] == result()["validation"]["data"] == fingerprint
    assert checkpoint.load(RUN)[3] == (fingerprint, "b3838ac4")
    assert json.loads((RUN / "env.json").read_text())["data"]["fingerprint"] == fingerprint
    assert json.loads((RUN / "validation.json").read_text())["data"] == fingerprint


def test_the_curve_ends_at_the_held_out_loss(here):
    """Its windows are those of the whole split here, and the unigram line is of the same ones."""
    last = [row["validation_loss"] for row in metrics.read_rows(RUN) if "validation_loss" in row][-1]
    validation, drawn = result()["validation"], json.loads((RUN / "validation.json").read_text())
    assert last == pytest.approx(validation["token_nll"], rel=1e-5)
    assert drawn["unigram_nats_per_token"] == pytest.approx(validation["unigram_nats_per_token"], rel=1e-12)
    assert drawn["windows"] == list(range(validation["of_windows"]))


def test_the_fingerprint_is_of_content_alone(tmp_path):
    def fingerprint(name, texts, cut=10**6, **options):
        folder = tmp_path / name
        folder.mkdir()
        for start in range(0, len(texts), cut):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[start : start + cut])
            (folder / f"{start:05}.jsonl").write_text(rows)
        options = {"validation": 0.3, "workers": 1, "progress": SILENT} | options
        prepare.prepare(str(folder), folder / "out", options.pop("tokenizer", "byte"), **options)
        return open_prepared(folder / "out", tokenizer_hash=None, verify=True).fingerprint

    texts = [f"document {i}: {'abc' * i}" for i in range(60)]
    whole = fingerprint("one", texts)
    assert fingerprint("another", texts) == whole
    assert fingerprint("in-seven-files", texts, cut=9) == whole
    last = texts[-1][:-1] + "d"
    assert fingerprint("one-character", [*texts[:-1], last]) != whole
    assert fingerprint("other-order", texts[::-1]) != whole
    assert fingerprint("other-split", texts, validation=0.31) != whole
    assert fingerprint("moved-border", [texts[0] + texts[1][:1], texts[1][1:], *texts[2:]]) != whole
    ends = tmp_path / "one" / "out" / "train-00000.ends.npy"
    np.save(ends, np.load(ends) - np.r_[1, np.zeros(len(np.load(ends)) - 1, np.int64)])
    with pytest.raises(UserError, match="was altered: its fingerprint is"):
        open_prepared(tmp_path / "one" / "out", tokenizer_hash=None, verify=True)


def test_the_novels_are_the_same_everywhere(tmp_path):
    prepare.prepare("english-novels", tmp_path / "out", "byte", validation=0.05, progress=SILENT)
    prepared = open_prepared(tmp_path / "out", tokenizer_hash=None)
    assert prepared.fingerprint == NOVELS
    counts = prepared.manifest["splits"]
    assert (counts["train"]["bytes"], counts["validation"]["bytes"]) == (4_680_312, 243_644)


# --- checksums ---


def changed_byte(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("places", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_flipped_byte_of_a_checkpoint_never_passes(here, capfd, places):
    """Every file of it, some places each: the parameters are those that were written, or the checkpoint is refused."""
    chance, refused = random.Random(0), 0
    wanted = {name: np.asarray(leaf) for name, leaf in named_leaves(checkpoint.load(RUN)[1]).items()}
    for path in sorted(path for path in (RUN / "checkpoints" / "6").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for _ in range(places):
            changed_byte(path, chance.randrange(len(content)))
            try:
                found = named_leaves(checkpoint.load(RUN)[1])
            except UserError as error:
                refused += 1
                assert "run/checkpoints/6" in str(error) and "damaged" in str(error)
                assert "move run/checkpoints/6 away to go on from step 4." in str(error)
            else:
                assert found.keys() == wanted.keys()
                assert all(np.array_equal(np.asarray(found[name]), wanted[name]) for name in wanted), path
            path.write_bytes(content)
    assert refused >= 2 * places


def test_a_parameter_that_is_not_what_was_written_is_named(here, capfd, monkeypatch):
    """Damage that the file format does not notice: the writer's memory, say."""
    written = checkpoint.checksums

    def other(leaves):
        return {name: "0" * 16 if name == "embed" else value for name, value in written(leaves).items()}

    shutil.rmtree(RUN)
    monkeypatch.setattr(checkpoint, "checksums", other)
    assert main(["train", ID]) == 0
    monkeypatch.setattr(checkpoint, "checksums", written)
    for command in ("eval", "generate"):
        sentence = says(capfd, command, ID)
        assert "The checkpoint run/checkpoints/6 is damaged: model/embed is not what was written" in sentence
        assert sentence.endswith("move run/checkpoints/6 away to go on from step 4.")


def test_a_checksum_sees_every_bit_and_place_on_any_mesh():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    (whole,) = checkpoint.checksums({"x": x}).values()
    assert re.fullmatch("[0-9a-f]{16}", whole)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    assert checkpoint.checksums({"x": split})["x"] == whole
    bits = np.asarray(x).view(np.uint32)
    others = {bytes(x.tobytes())}
    for bit in range(32):
        changed = bits.copy()
        changed[3, 2] ^= np.uint32(1 << bit)
        assert checkpoint.checksums({"x": jax.numpy.asarray(changed.view(np.float32))})["x"] != whole or np.isnan(
            changed.view(np.float32)[3, 2]
        )
        others.add(changed.tobytes())
    swapped = x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])
    assert checkpoint.checksums({"x": swapped})["x"] != whole and len(others) == 33
    small = {"bf16": x.astype("bfloat16"), "count": jax.numpy.int32(7), "flag": jax.numpy.array([True, False])}
    assert len(set(checkpoint.checksums(small).values())) == 3


SUMS_OF_MANY = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from gdn_jax.checksums import checksums
mesh = jax.make_mesh((4,), ("fsdp",))
x = jax.device_put(np.ones((256, 128), np.float32), NamedSharding(mesh, PartitionSpec("fsdp")))
for _ in range(20):
    checksums({str(i): x for i in range(60)})
"""


def test_checksums_of_many_arrays_end_on_few_cores():
    """All at once, four devices of two cores waited for each other until XLA gave up."""
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=30"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SUMS_OF_MANY], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_an_import_of_numbers_that_are_not_finite_is_refused(here, capfd):
    assert main(["convert", "export", ID, "--out", "lit", "--format", "lit"]) == 0
    path = Path("lit/model.safetensors")
    tensors = load_file(path)
    name = "transformer.wte.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 2] = np.nan
    save_file(tensors, path)
    model = registered(Path()).model
    from gdn_jax.convert.exchange import import_checkpoint

    with pytest.raises(UserError, match=rf"hold numbers that are not finite: {name}; take a checkpoint from before"):
        import_checkpoint(path, Path("back"), data=registered(Path()).data, like=model, progress=SILENT)
    assert not Path("back").exists() and not Path("back.partial").exists()


# --- the tokenizer of a run ---


def test_every_command_that_reads_or_writes_text_checks_the_tokenizer(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = save_json_tokenizer(tmp_path / "words.json", ["</s>"])
    small = registered(Path())
    prepare_text(Path())
    out = Path(prepare.default_directory(dataclasses.replace(small.data, tokenizer=str(words)), "data"))
    prepare.prepare("text", out, str(words), validation=0.2, progress=SILENT)
    size = open_prepared(out, tokenizer_hash=None).vocab
    named = dataclasses.replace(
        small,
        data=dataclasses.replace(small.data, tokenizer=str(words)),
        model=dataclasses.replace(small.model, vocab=max(320, size)),
    )
    monkeypatch.setitem(experiments.EXPERIMENTS, ID, named)
    assert main(["train", ID]) == 0
    tree = json.loads(words.read_text())
    words.write_text(json.dumps(tree, indent=7))  # as many tokens, another file
    for command in ("generate", "eval", "convert export"):
        extra = ["--out", "lit", "--format", "lit"] if "export" in command else []
        sentence = says(capfd, *command.split(), ID, *extra)
        assert sentence.startswith("The run run was trained with a tokenizer of hash ")
        assert sentence.endswith("its ids mean other text; restore the former file.")
    assert "tokenizer" in says(capfd, "train", ID, "--run.dir", "other")


# --- opening a run ---


def test_open_run_by_id_directory_and_step(here, monkeypatch):
    opened = gdn_jax.open_run(RUN)
    assert (opened.step, opened.experiment, opened.tokenizer.name) == (6, registered(Path()), "byte")
    assert opened.prepared.fingerprint == opened.trained_on.fingerprint
    assert gdn_jax.open_run("run", step=4).step == 4
    hidden, _ = opened.model(jax.numpy.zeros((1, 5), int), compute=gdn_jax.Compute(dtype="float32", impl="chunked"))
    assert hidden.shape == (1, 5, 32)
    with pytest.raises(UserError, match="There is no run 'test/small', neither as a directory nor in runs/test/small"):
        gdn_jax.open_run(ID)
    shutil.copytree(RUN, runs.ROOT / ID / "0a")
    assert gdn_jax.open_run(ID).directory == runs.ROOT / ID / "0a"
    shutil.copytree(RUN, runs.ROOT / ID / "0b")
    with pytest.raises(UserError, match="has 2 runs; name one of them: runs/test/small/0a, runs/test/small/0b"):
        gdn_jax.open_run(ID)
    with pytest.raises(UserError, match="holds no run"):
        gdn_jax.open_run(Path("text"))


def test_runs_and_checkpoints_of_the_layout_before_are_refused_by_name(here, capfd):
    tree = json.loads((RUN / "config.json").read_text())
    assert tree.pop("layout") == checkpoint.LAYOUT == 2
    (RUN / "config.json").write_text(json.dumps(tree))
    files = all_files(RUN)
    for command in ("train", "eval", "generate"):
        sentence = says(capfd, command, ID)
        assert sentence.startswith("run/config.json is of layout 1, and this version reads layout 2 alone; train again")
    assert all_files(RUN) == files
    (RUN / "config.json").write_text(json.dumps({"layout": 2} | tree))
    path = RUN / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    del metadata["custom_metadata"]["layout"]
    path.write_text(json.dumps(metadata))
    assert says(capfd, "eval", ID).startswith("run/checkpoints/6 is of layout 1, and this version reads layout 2")


# --- what a result says of the code, and how work shows itself ---


def test_a_published_result_that_is_replaced_is_no_uncommitted_change(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "HERE", tmp_path)
    result, source = tmp_path / "experiments/results/x.json", tmp_path / "experiments/x.json"
    result.parent.mkdir(parents=True)
    result.write_text("1"), source.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    result.write_text("2")
    commit, dirty = metrics._commit()
    assert len(commit) >= 7 and dirty is False
    source.write_text("2")
    assert metrics._commit() == (commit, True)


def test_the_hash_of_the_source_needs_no_git(tmp_path):
    """A copy of the packages has the checkout's hash; one changed line of code gives another."""
    for name in metrics.SOURCES:
        shutil.copytree(metrics.HERE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from gdn_jax import metrics; e = metrics.environment(); print(e['commit'], e['source'])"

    def printed():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    assert printed() == ["unknown", metrics.source_hash()]
    with (tmp_path / "pallas_kernels" / "accuracy.py").open("a") as file:
        file.write("\n")
    commit, other = printed()
    assert commit == "unknown" and other != metrics.source_hash()


def test_long_work_ends_with_its_last_state(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    work = Progress(say=lines.append)
    for stops in (False, True):
        with contextlib.suppress(KeyboardInterrupt), work:
            for number in range(1, 25):
                clock[0] += 1.0
                work.show(f"{number} of 24")
            if stops:
                raise KeyboardInterrupt
    assert lines == ["10 of 24", "20 of 24", "24 of 24", "6 of 24", "16 of 24"]
    with work:
        work.show("quick")
    assert len(lines) == 5


def test_progress_keeps_lines_apart_without_a_terminal(capsys):
    lines = []
    with Progress(say=lines.append, seconds=3600) as quiet, Progress(say=lines.append, seconds=0) as loud:
        quiet.show("never")
        loud.show("always")
        quiet.say("kept")
    assert lines == ["always", "kept"]
    with Progress(seconds=0) as shown, shown:  # handed on to a function that enters it too
        shown.show("[red]as it is[/red]")
    assert capsys.readouterr() == ("", "[red]as it is[/red]\n")
