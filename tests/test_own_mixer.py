"""A mixer from outside: the example of docs/own-mixer.md added by its one call, trained, opened, changed, missing."""

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from run_page import saved
from small import losses, prepare_text

import experiments
from experiments import own
from experiments.commands import named
from experiments.run import main
from gdn_jax import Compute, add_mixer, open_run
from gdn_jax.config import MIXER_FIELDS, OWN_CONFIGS, Experiment, from_dict, to_dict
from gdn_jax.errors import UserError
from gdn_jax.flops import MIXER_FLOPS, forward_flops_per_token, matmul_parameters
from gdn_jax.mixers import MIXERS
from gdn_jax.model import init_model

SMALLER = """
model = dataclasses.replace(MODEL, repeats=1, d_model=32, d_ff=0, own=EMAConfig(channels=16), gated_deltanet=None)
data = dataclasses.replace(base.data, source="text", seq_len=32, validation=0.2)
run = dataclasses.replace(base.run, dir="here", log_every=1, save_every=2, eval_every=4, eval_windows=4)
optim = dataclasses.replace(base.optim, steps=4)
TEST = Experiment(id="mine/ema", model=model, data=data, optim=optim, run=run)
"""
NAME = "ema.py:TEST"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared text, ema.py, and the run `here` of it."""
    directory = tmp_path_factory.mktemp("ema")
    with contextlib.chdir(directory), not_added():
        prepare_text(Path())
        saved("own-mixer.md", Path())
        Path("ema.py").write_text("from gdn_jax import Experiment\n" + Path("ema.py").read_text() + SMALLER)
        assert main(["train", NAME]) == 0
    return directory


@contextlib.contextmanager
def not_added():
    """Forgets what is added within, and the files that were run."""
    tables = (MIXERS, MIXER_FLOPS, MIXER_FIELDS, OWN_CONFIGS)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        own._module.cache_clear()
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)


@pytest.fixture(autouse=True)
def here(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    with not_added():
        yield


def says(capfd, *words, code=2):
    capfd.readouterr()
    assert main(list(words)) == code
    return capfd.readouterr().err.splitlines()[-1]


# --- a run of it ---


@pytest.mark.parametrize("command", ["train", "eval", "show", "generate", "convert export"])
def test_without_its_file_a_run_names_it(capfd, command):
    extra = ["--out", "out"] if "export" in command else []
    sentence = says(capfd, *command.split(), "here", *extra)
    assert sentence == (
        "here is a run of a model with the mixer 'ema', which a file of yours adds; name that file with the run, "
        "gdn COMMAND ema.py:here, or import it first in Python."
    )
    assert main(["convert", "export", "ema.py:here", "--out", "lit", "--format", "lit"]) == 2  # known, and not lit's
    assert "no layer for the mixer 'ema'" in capfd.readouterr().err


def test_with_its_file_every_command_takes_it(capfd):
    for word in (NAME, "ema.py:here"):
        assert main(["eval", word, "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["step"] == 4
        assert main(["generate", word, "--max_tokens", "3", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)[0]["tokens"] <= 3
    wanted = losses(Path("here"))
    shutil.rmtree("here/checkpoints/4")
    assert main(["train", "ema.py:here"]) == 0 and losses(Path("here")) == wanted
    assert json.loads(Path("here/config.json").read_text())["file"]["path"] == "ema.py"
    assert open_run("here").step == 4  # the file has been run in this process


def test_a_changed_file_is_said_where_its_mixers_compute(capfd):
    Path("ema.py").write_text(Path("ema.py").read_text() + "# more\n")
    for command in (["generate", NAME, "--max_tokens", "1"], ["eval", "ema.py:here", "--windows", "1"]):
        capfd.readouterr()
        assert main(command) == 0
        lines = [line for line in capfd.readouterr().err.splitlines() if "has changed since" in line]
        assert len(lines) == 1 and lines[0].startswith("ema.py has changed since here began (sha256 ")
    assert main(["eval", "here", "--windows", "1"]) == 0  # names no file, so that none is said to have changed
    assert "has changed" not in capfd.readouterr().err


def test_parameters_of_another_shape_are_named(capfd):
    text = Path("ema.py").read_text()
    Path("ema.py").write_text(text.replace("nnx.Param(start)", "nnx.Param(start[:, None])"))
    sentence = says(capfd, "eval", "ema.py:here")
    assert "here/checkpoints/4 is damaged, or its model's code has changed: groups/blocks/0/mixer/logit is " in sentence
    assert "is [1, 16] there and [1, 16, 1] here; restore that code, or move here/checkpoints/4 away" in sentence
    Path("ema.py").write_text(text.replace("self.logit = ", "self.decay = ").replace("self.logit[", "self.decay["))
    assert "logit is [1, 16] there and no parameter here;" in says(capfd, "eval", "ema.py:here")


def test_a_run_of_a_mixer_that_no_file_is_on_record_for(capfd):
    tree = json.loads(Path("here/config.json").read_text())
    Path("here/config.json").write_text(json.dumps(tree | {"file": None}))  # as of one that was trained in Python
    assert "gdn COMMAND FILE.py:here, or import it first" in says(capfd, "eval", "here")


# --- its configuration ---


def test_the_configuration_survives_json_and_decides_the_hash():
    experiment = named(NAME)
    again = from_dict(Experiment, json.loads(json.dumps(to_dict(experiment))))
    assert again == experiment and again.hash8 == experiment.hash8 and hash(again.model) == hash(experiment.model)
    wider = dataclasses.replace(experiment.model.own, channels=17)
    model = dataclasses.replace(experiment.model, own=wider)
    assert dataclasses.replace(experiment, model=model).hash8 != experiment.hash8
    share = forward_flops_per_token(model, 32) - 2 * matmul_parameters(model)
    assert share == 4 * 17


def test_its_fields_and_other_mixers_from_the_command_line(capfd):
    def shown(*words):
        assert main(["show", NAME, "--json", *words]) == 0
        return json.loads(capfd.readouterr().out)

    assert shown("--model.own.channels", "8")["model.own.channels"] == 8
    delta = "--model.gated_deltanet.heads 1 --model.gated_deltanet.key_dim 8 --model.gated_deltanet.value_dim=8"
    both = shown("--model.pattern", "ema", "gated_deltanet", *delta.split())
    assert both["layers"] == 2 and both["model.gated_deltanet.decay"] is True and both["model.own.channels"] == 16
    assert shown("--model.pattern", "gated_deltanet", *delta.split())["model.own"] is None
    base = "ema.py:base"  # whose model lacks the mixer
    assert main(["show", base, "--json", "--model.pattern", "ema", "--model.own.channels", "8"]) == 0
    assert json.loads(capfd.readouterr().out)["model.own.longest"] == 5.0


def test_what_is_wrong_with_the_fields_of_a_mixer(capfd):
    heads, size = "--model.attention.heads", "--model.attention.head_dim"
    for words, sentence in (
        (f"{heads} 4", f"{heads} begins the configuration of a mixer that this model lacks; give {size} too."),
        (f"{heads} four {size} 8", f"{heads} is 'four'; it must be a whole number."),
        (f"{heads} 4 {size} 4", "model.d_model is 128; it must be model.attention.heads 4 x head_dim 4 = 16."),
        (f"{heads} 4 {size} 32 --model.attention.windw 3", "(did you mean '--model.attention.window'?)"),
        ("", "set it: model.attention.heads, model.attention.head_dim."),
    ):
        words = f"--model.pattern swa {words}".split()
        assert sentence in says(capfd, "show", "smoke/gated-deltanet", *words)


# --- the call ---


@dataclass(frozen=True)
class Settings:
    wide: Any = 3


class Nothing(nnx.Module):
    def __call__(self, x, **_):
        return x, None

    def init_cache(self, batch, max_len, dtype):
        return ()


class WithoutCache(nnx.Module):
    def __call__(self, x):
        return x


@dataclass
class NotFrozen:
    wide: int = 3


def flops(cfg, seq_len):
    return 0.0


@pytest.mark.parametrize(
    ("name", "mixer", "config", "cost", "sentence"),
    [
        ("e m a", Nothing, Settings, flops, "'e m a'; give it a name of letters"),
        ("mamba", Nothing, Settings, flops, "There is a mixer 'mamba' already; give yours another name"),
        ("new", Nothing(), Settings, flops, "must be a class derived from flax.nnx.Module"),
        ("new", WithoutCache, Settings, flops, "has no init_cache; write it as gdn_jax.mixers describes"),
        ("new", Nothing, NotFrozen, flops, r"must be a class with @dataclass\(frozen=True\)"),
        ("new", Nothing, Settings(), flops, r"must be a class with @dataclass\(frozen=True\)"),
        ("new", Nothing, Settings, 3.0, "flops of 'new' is 3.0; it must be a function"),
    ],
)
def test_a_wrong_call(name, mixer, config, cost, sentence):
    with pytest.raises(UserError, match=sentence):
        add_mixer(name, mixer, config=config, flops=cost)
    assert name not in OWN_CONFIGS


def test_a_model_takes_what_its_mixer_takes():
    add_mixer("new", Nothing, config=Settings, flops=flops)
    model = experiments.get("smoke/gated-deltanet").model
    for given, sentence in (
        (None, "model.pattern uses 'new' but model.own is not set; set it: model.own.wide."),
        (NotFrozen(), r"model.own is NotFrozen\(wide=3\); the mixer 'new' takes Settings."),
        (Settings(jnp.ones(2)), "its fields must be numbers, words, True or False, or tuples of these"),
    ):
        with pytest.raises(UserError, match=sentence):
            dataclasses.replace(model, pattern=("new",), own=given)
    with pytest.raises(UserError, match="model.own is set, but model.pattern names no mixer that takes it"):
        dataclasses.replace(model, own=Settings())


# --- the page's mixer is a right one ---


def test_steps_pieces_packed_and_padded_agree():
    model = init_model(named("ema.py:SMALL").model, jax.random.key(0))
    compute, tokens = Compute(dtype=jnp.float32), jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
    whole, _ = model(tokens, compute=compute)
    near = lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=2e-5)  # noqa: E731
    first, cache = model(tokens[:, :7], compute=compute, room=12)
    near(first, whole[:, :7])
    padded, short = model(jnp.pad(tokens[:, :7], ((0, 0), (0, 4))), compute=compute, room=12, lengths=jnp.full(2, 7))
    near(padded[:, :7], first)
    near(jax.tree.leaves(short)[0], jax.tree.leaves(cache)[0])
    for t in range(7, 12):
        step, cache = model(tokens[:, t : t + 1], compute=compute, cache=cache)
        near(step[:, 0], whole[:, t])
    both, _ = model(tokens, compute=compute, segment_ids=jnp.array([[0] * 5 + [1] * 7] * 2))
    near(both[:, 5:], model(tokens[:, 5:], compute=compute)[0])
