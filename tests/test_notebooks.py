"""The notebooks run from top to bottom on runs of this machine; their pictures are drawn."""

import contextlib
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import matplotlib
import pytest

import experiments
from gdn_jax import checkpoint, tokenizer
from gdn_jax.fingerprint import Identity
from gdn_jax.model import init_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOTEBOOKS = Path(experiments.__file__).parent / "notebooks"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of the two smoke IDs that the notebooks open, with random parameters."""
    directory = tmp_path_factory.mktemp("notebooks")
    with contextlib.chdir(directory):
        for id in ("smoke/gated-deltanet", "smoke/gated-deltanet-fla"):
            experiment = experiments.get(id)
            model = jax.jit(init_model, static_argnums=0)(experiment.model, jax.random.key(0))
            small = replace(experiment, run=replace(experiment.run, dir=""))
            trained_on = Identity("a" * 64, tokenizer.load("byte").hash8)
            checkpoint.write(Path("runs") / id / experiment.hash8, small, model, 150, trained_on)
    return directory


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == {"kernels", "evaluate", "huggingface", "tables"}


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("kernels", 1),
        pytest.param("evaluate", 1, marks=pytest.mark.slow),
        pytest.param("huggingface", 1, marks=pytest.mark.slow),
        ("tables", 2),
    ],
)
def test_a_notebook_runs_and_draws(home, monkeypatch, name, pictures):
    monkeypatch.chdir(home)
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    runpy.run_path(str(NOTEBOOKS / f"{name}.py"))
    assert len(drawn) == pictures
    for figure in drawn:
        assert any(axes.lines or axes.patches or axes.collections for axes in figure.axes)
        assert all(axes.get_xlabel() for axes in figure.axes)
    plt.close("all")
