"""An Experiment of the user's own, in a file: it runs as an ID does, and its run is named by file or by directory."""

import contextlib
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from small import losses, prepare_text

from experiments.run import main
from gdn_jax.checkpoint import read_config
from gdn_jax.metrics import read_rows

OWN = """
import dataclasses
import sys
from beside import STEPS
from gdn_jax.config import Data, Experiment, GatedDeltaNetConfig, Model, Optim, Run

print("the file ran")
SMALL = Experiment(
    id="mine/small",
    model=Model(
        pattern=("gated_deltanet",), repeats=1, d_model=16, d_ff=0, vocab=320,
        gated_deltanet=GatedDeltaNetConfig(heads=1, key_dim=8, value_dim=8),
    ),
    optim=Optim(steps=STEPS, batch_size=8, lr=1e-2, precision="fp32"),
    data=Data(source="text", seq_len=32, validation=0.2),
    run=Run(log_every=1, eval_every=4, eval_windows=4, save_every=2, compile_cache="", chunk=32),
)
"""
NAME, CHANGES = "own/my.py:SMALL", ["--optim.lr", "3e-3", "--run.dir", "here"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared text, own/my.py beside its neighbour, and the run `here` of it with one override."""
    directory = tmp_path_factory.mktemp("own")
    with contextlib.chdir(directory):
        prepare_text(Path())
        Path("own").mkdir()
        Path("own/my.py").write_text(OWN)
        Path("own/beside.py").write_text("STEPS = 4\n")
        assert main(["run", NAME, *CHANGES]) == 0
    return directory


@pytest.fixture(autouse=True)
def here(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def without_file():
    """Nothing may need the file any more."""
    shutil.rmtree("own")
    for name in [name for name in sys.modules if name.startswith("own_") or name == "beside"]:
        del sys.modules[name]


def says(capfd, *words, code=2):
    """The last line on stderr of a command that ends with `code`."""
    capfd.readouterr()
    assert main(list(words)) == code
    return capfd.readouterr().err.splitlines()[-1]


def test_the_run_is_as_of_an_id_and_records_its_file():
    tree, row = (json.loads(Path("here", name).read_text()) for name in ("config.json", "result.json"))
    assert tree["file"] == {"path": "own/my.py", "sha256": hashlib.sha256(Path("own/my.py").read_bytes()).hexdigest()}
    assert (tree["id"], tree["optim"]["lr"], tree["optim"]["steps"]) == ("mine/small", 3e-3, 4)
    assert row["id"] == "mine/small" and row["steps"] == 4 and Path("here/loss.png").exists()


def test_the_time_of_compiling_is_in_no_rate(capfd):
    """Neither in a row nor in the seconds left, where a run begins and where it goes on."""
    rows = [row["tokens_per_second"] for row in read_rows(Path("here")) if "loss" in row]
    assert rows[0] is None and all(rate > 0 for rate in rows[1:])
    shutil.rmtree("here/checkpoints/4")
    assert main(["train", "here"]) == 0
    first, second = [line for line in capfd.readouterr().err.splitlines() if "tokens/s" in line]
    assert "  - tokens/s  MFU -  - s left" in first and second.endswith("MFU -  0 s left")


def test_every_command_takes_the_file_and_the_directory(capfd):
    for named in (["own/my.py:SMALL", *CHANGES], ["here"], ["own/my.py:here"]):
        capfd.readouterr()
        assert main(["show", *named, "--json"]) == 0
        shown = json.loads(capfd.readouterr().out)
        assert (shown["id"], shown["run_directory"], shown["optim.lr"]) == ("mine/small", "here", 3e-3)
        assert main(["eval", *named, "--json"]) == 0 and json.loads(capfd.readouterr().out)["step"] == 4
        assert main(["run", *named, "--json"]) == 0 and json.loads(capfd.readouterr().out)["id"] == "mine/small"
    for command in ("generate here --max_tokens 2", "convert export here --format lit --out lit", "doctor nothing"):
        assert main(command.split()) == (2 if "nothing" in command else 0)


def test_a_file_runs_once_and_its_words_do_not_reach_stdout(capfd):
    sys_path = list(sys.path)
    assert main(["show", NAME, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["file.path"] == "own/my.py"
    assert sys_path == sys.path[: len(sys_path)]  # what lies beside the file never hides an installed package


def test_training_goes_on_by_directory_with_its_overrides(capfd):
    """Without the file and without a word of its overrides it repeats the uninterrupted run."""
    wanted, before = losses(Path("here")), Path("here/config.json").read_bytes()
    shutil.rmtree("here/checkpoints/4")
    without_file()
    assert main(["train", "here"]) == 0
    assert "mine/small: step 2 of 4, in here" in capfd.readouterr().err
    assert losses(Path("here")) == wanted and len(wanted) == 4
    assert Path("here/config.json").read_bytes() == before


def test_a_changed_file_is_another_run_or_named_with_what_differs(capfd):
    Path("own/my.py").write_text(OWN.replace("lr=1e-2", "lr=2e-2") + "# more\n")
    sentence = says(capfd, "train", NAME, "--run.dir", "here")
    assert "optim.lr (0.003 there, 0.02 asked) (own/my.py has changed since); choose another run.dir." in sentence
    assert main(["train", NAME]) == 0
    (run,) = Path("runs/mine/small").iterdir()
    assert read_config(run).optim.lr == 2e-2 and run.name == read_config(run).hash8


def test_a_comment_more_changes_nothing(capfd):
    shutil.rmtree("here/checkpoints/4")
    before = Path("here/config.json").read_bytes()
    Path("own/my.py").write_text(OWN + "# a comment\n")
    assert main(["train", NAME, *CHANGES]) == 0
    assert Path("here/config.json").read_bytes() == before  # the file that the run began with


def test_no_word_of_a_configuration_runs_a_file(capfd):
    """A config.json that names another file opens as before, and the file is not run."""
    tree = json.loads(Path("here/config.json").read_text())
    tree["file"]["path"] = "bad.py"
    Path("here/config.json").write_text(json.dumps(tree))
    Path("bad.py").write_text("open('ran', 'w')\n")
    assert main(["eval", "here"]) == 0 and main(["train", "here"]) == 0
    assert not Path("ran").exists()
    tree["id"] = "mine/../../x"
    Path("here/config.json").write_text(json.dumps(tree))
    assert re.search(r"damaged \(The experiment's id is 'mine/\.\./\.\./x'", says(capfd, "eval", "here"))


def test_a_run_that_was_not_trained_here_is_not_trained_over(capfd):
    shutil.rmtree("here/checkpoints/2")
    Path("here/checkpoints/4").rename("here/checkpoints/0")
    path = Path("here/checkpoints/0/_CHECKPOINT_METADATA")
    before = path.read_bytes()
    assert "no optimizer state to go on with; fine-tune them" in says(capfd, "train", "here")
    assert path.read_bytes() == before and [p.name for p in Path("here/checkpoints").iterdir()] == ["0"]
