"""`gdn train ID --from RUN`: another run's parameters, a fresh optimizer, step 0, and the source on record."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small import experiment, losses, prepare_text, with_steps
from test_tokenizer import save_json_tokenizer

import experiments
from experiments.run import main
from gdn_jax import checkpoint, fine_tuning, tokenizer
from gdn_jax.fingerprint import Identity
from gdn_jax.metrics import read_rows
from gdn_jax.model import init_model
from gdn_jax.tree import named_leaves

ID, RUN, OUT = "test/small", Path("run"), Path("tuned")
TUNE = ["train", ID, "--run.dir", "tuned", "--run.save_every", "1", "--from"]
STILL = ["--optim.lr", "1e-30"]  # a step that moves no parameter


def registered():
    return with_steps(experiment(Path(), save_every=2, eval_every=4), 4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared text, the run `run` of four steps, and `imported`, which was trained for no step here."""
    directory = tmp_path_factory.mktemp("tuned")
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        prepare_text(Path())
        patch.setitem(experiments.EXPERIMENTS, ID, registered())
        assert main(["train", ID]) == 0
        model = jax.jit(init_model, static_argnums=0)(registered().model, jax.random.key(5))
        foreign = replace(registered(), id="imported/foreign", model=replace(registered().model, init="fla"))
        checkpoint.write(Path("imported"), foreign, model, 0, Identity(None, tokenizer.load("byte").hash8))
    return directory


@pytest.fixture(autouse=True)
def here(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(experiments.EXPERIMENTS, ID, registered())


def says(capfd, *words):
    capfd.readouterr()
    assert main(list(words)) == 2
    return capfd.readouterr().err.splitlines()[-1]


def leaves(directory, step=None):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(checkpoint.load(directory, step)[1]).items()}


@pytest.mark.parametrize(("source", "step"), [("run", 4), pytest.param("imported", 0, marks=pytest.mark.slow)])
def test_parameters_only(source, step):
    assert main([*TUNE, source, *STILL]) == 0
    wanted, found = leaves(Path(source)), leaves(OUT, 2)
    assert found.keys() == wanted.keys()
    assert all(np.allclose(found[name], wanted[name], rtol=0, atol=1e-20) for name in wanted)
    assert not np.array_equal(wanted["embed"], leaves(Path("imported" if source == "run" else "run"))["embed"])
    assert [row["step"] for row in read_rows(OUT) if "loss" in row] == [1, 2, 3, 4]
    start = json.loads((OUT / "config.json").read_text())["start"]
    assert (start["path"], start["step"], len(start["sha256"])) == (source, step, 64)
    ours, theirs = ([row["lr"] for row in read_rows(where) if "loss" in row] for where in (OUT, RUN))
    assert ours == pytest.approx([lr * 1e-30 / 1e-2 for lr in theirs])  # the schedule begins anew


def test_the_optimizer_is_fresh():
    """Adam's first step moves every parameter by the learning rate; moments of the run before would change that."""
    assert main([*TUNE, "run", "--optim.steps", "1", "--optim.lr", "1e-3", "--optim.weight_decay", "0"]) == 0
    moved = np.abs(leaves(OUT)["embed"] - leaves(RUN)["embed"])
    assert np.median(moved[moved > 0]) == pytest.approx(1e-3, rel=0.01) == moved.max()


def test_it_goes_on_without_its_source(capfd):
    assert main([*TUNE, "run", "--optim.lr", "3e-3"]) == 0
    wanted = losses(OUT)
    assert "in tuned, with the parameters of run at step 4" in capfd.readouterr().err
    shutil.rmtree(OUT / "checkpoints/4")
    shutil.rmtree(RUN)
    assert main(["train", "tuned"]) == 0
    assert losses(OUT) == wanted and len(wanted) == 4


@pytest.mark.slow
def test_it_is_another_run_than_one_from_random_parameters(capfd):
    plain = registered()
    tuned = fine_tuning.from_run(plain, RUN)
    other = fine_tuning.from_run(plain, Path("imported"))
    assert len({plain.hash8, tuned.hash8, other.hash8}) == len({plain.recipe8, tuned.recipe8, other.recipe8}) == 3
    RUN.rename("moved")
    assert fine_tuning.from_run(plain, Path("moved")).hash8 == tuned.hash8  # the parameters decide, not their place
    assert main([*TUNE, "moved"]) == 0
    assert "start.sha256 (" in says(capfd, "train", ID, "--run.dir", "tuned")
    assert main(["run", "tuned", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["start"]["path"] == "moved"


def test_what_does_not_fit_is_one_sentence(capfd):
    words = save_json_tokenizer(Path("words.json"), ["</s>"])
    sentence = says(capfd, *TUNE, "run", "--data.tokenizer", str(words))
    assert "run were trained with a tokenizer of hash b3838ac4, and data.tokenizer" in sentence
    sentence = says(capfd, *TUNE, "run", "--model.d_model", "16")
    assert "model.d_model (32 there, 16 here); give test/small these fields" in sentence
    sentence = says(capfd, *TUNE, "run", "--model.gated_deltanet.feature_map", "relu")  # of the same shapes
    assert "model.gated_deltanet.feature_map (silu there, relu here)" in sentence
    assert "another run: runs/a/1" in _with_neighbour(capfd)
    shutil.rmtree(RUN / "checkpoints")
    assert "run holds no finished checkpoint; train it first" in says(capfd, *TUNE, "run")
    assert not OUT.exists()


def _with_neighbour(capfd):
    shutil.copytree(RUN, "runs/a/1")
    return says(capfd, *TUNE, "runs/a/1", "--run.seed", "1", "--data.source", "nothing") and says(
        capfd, "eval", ID, "--run.dir", "runs/a/2"
    )


def test_a_source_that_is_no_longer_what_it_was(capfd):
    begun = replace(fine_tuning.from_run(registered(), Path("imported")), run=replace(registered().run, dir="tuned"))
    OUT.mkdir()
    checkpoint.write_config(OUT, begun)
    model = jax.jit(init_model, static_argnums=0)(registered().model, jax.random.key(6))
    shutil.rmtree("imported")
    checkpoint.write(Path("imported"), replace(begun, start=None), model, 0, Identity(None, "b3838ac4"))
    sentence = says(capfd, "train", "tuned")
    assert "Step 0 of imported is not what this run was to begin with (sha256 " in sentence
