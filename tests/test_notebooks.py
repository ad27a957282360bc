"""The notebooks run from top to bottom on runs of this machine, draw their pictures, and make the page in docs/."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import experiments
from experiments.notebook_page import NOTEBOOKS, ORDER, cells_of, run_notebook, write
from gdn_jax import checkpoint, metrics, tokenizer
from gdn_jax.files import write_json
from gdn_jax.fingerprint import Identity
from gdn_jax.model import init_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
PICTURES = {"kernels": 1, "evaluate": 1, "huggingface": 1, "tables": 2}


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
            run = Path("runs") / id / experiment.hash8
            checkpoint.write(run, small, model, 150, trained_on)
            write_json(run / "env.json", metrics.environment() | {"date": "2026-01-02", "devices": ["NVIDIA H200"]})
    return directory


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == set(ORDER) == set(PICTURES)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels", "values drawn at random, no run"),
        pytest.param(
            "evaluate", "smoke/gated-deltanet, step 150, NVIDIA H200, 2026-01-02, .*, data a{8}", marks=pytest.mark.slow
        ),
        pytest.param(
            "huggingface",
            "imported/fla-checkpoint, step 0, 4 x cpu, 20.*, imported.*",
            marks=pytest.mark.slow,
        ),
        ("tables", "the ten tiny runs of table3 .*cpu, 2.*data b962150d.*"),
    ],
)
def test_a_notebook_runs_and_draws(home, monkeypatch, name, source):
    monkeypatch.chdir(home)
    pictures = [picture for cell in run_notebook(NOTEBOOKS / f"{name}.py") for picture in cell.pictures]
    assert len(pictures) == PICTURES[name] and re.fullmatch(source, pictures[0][1])
    for figure, _ in pictures:
        assert any(axes.lines or axes.patches or axes.collections for axes in figure.axes)
        assert all(axes.get_xlabel() for axes in figure.axes)


def test_a_page_shows_text_output_and_pictures(monkeypatch, tmp_path):
    code = "# %% [markdown]\n# # A title\n#\n# And text.\n\n# %%\nimport matplotlib.pyplot as plt\n"
    code += "origin = 'nowhere'\nprint(6 * 7)\nplt.plot([1, 2])\nplt.show()\n"
    (tmp_path / "one.py").write_text(code)
    monkeypatch.setattr("experiments.notebook_page.NOTEBOOKS", tmp_path)
    monkeypatch.setattr("experiments.notebook_page.ORDER", ("one",))
    page = write(tmp_path / "docs").read_text()
    assert "## A title\n\nAnd text.\n" in page and "```text\n42\n```" in page
    assert re.search(r"!\[one, picture 1\]\(notebooks/one-1.png\)\n\n\*From nowhere; drawn on 4 x cpu, 20", page)
    assert (tmp_path / "docs/notebooks/one-1.png").stat().st_size > 5000


def test_the_page_in_docs_is_of_these_notebooks():
    """Text and pictures; what is printed and drawn belongs to the runs that it names."""
    page = (DOCS / "notebooks.md").read_text()
    for name in ORDER:
        for cell in cells_of(NOTEBOOKS / f"{name}.py"):
            assert re.sub("^#", "##", cell.text) in page, "not current; run: python -m experiments.notebook_page docs"
    expected = [f"notebooks/{name}-{n + 1}.png" for name in ORDER for n in range(PICTURES[name])]
    assert re.findall(r"\]\((notebooks/.*)\)\n\n\*From .+; drawn on .+, 20.+, .+\.\*\n", page) == expected
    assert sorted(str(path.relative_to(DOCS)) for path in (DOCS / "notebooks").rglob("*.png")) == sorted(expected)
    assert all((DOCS / path).stat().st_size < 100_000 for path in expected)
