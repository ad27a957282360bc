"""Own text: the blocks of docs/own-text.md run in their order and give what the page says; texts of one name."""

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_prepare import manifest_of, run

from experiments.run import main
from gdn_jax import config, prepare
from gdn_jax.errors import UserError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "own-text.md").read_text()


def run_shell(block):
    for line in block.replace("\\\n", "").splitlines():
        if line.startswith("gdn "):
            assert main(shlex.split(line)[1:]) == 0, line
        else:
            subprocess.run(line, shell=True, check=True)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path, capsys):
    names, said = {}, []
    with contextlib.chdir(tmp_path):
        for kind, block in re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL):
            run_shell(block) if kind == "sh" else exec(block, names)
            said.append(capsys.readouterr().out)
    _, prepared, verified, trained, measured, written, in_python, branched, _, own = said
    assert prepared == "data/input.txt-b3838ac4\n" and "`data/input.txt-b3838ac4`" in PAGE
    assert "Every file is whole" in verified and "runs/mine/result.json" in trained
    model, unigram = map(float, re.search(r"nats per byte +(\S+) +(\S+)", measured).groups())
    assert model < unigram - 0.3 and "input.txt" in measured
    assert "The " in written and len(written) > 120
    assert abs(float(re.search(r"(\S+) nats a byte", in_python)[1]) - model) < 1
    assert branched == "(3, 320)\n" and "runs/bpe/result.json" in own


def test_sources_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """What was prepared is refused for another text, and taken for the same one, written otherwise or moved."""
    monkeypatch.chdir(tmp_path)
    for folder, text in (("a", "first"), ("b", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "input.txt").write_text(f"the {text} text " * 50)
    out = run("a/input.txt", prepare.default_directory(config.Data(source="a/input.txt"), "data"))
    manifest = manifest_of(out)
    for same in ("a/input.txt", "./a/input.txt", str(tmp_path / "a/input.txt"), str(out), "input.txt"):
        prepare.check_source(same, out, manifest)
    run("./a/input.txt", out)
    with pytest.raises(UserError, match="data.source is 'b/input.txt', and data/input.txt-b3838ac4 was made of 'a/in"):
        prepare.check_source("b/input.txt", out, manifest)
    with pytest.raises(UserError, match="was prepared with source 'a/input.txt', now it is 'b/input.txt'; choose"):
        run("b/input.txt", prepare.default_directory(config.Data(source="b/input.txt"), "data"))
    (tmp_path / "moved").mkdir()
    (tmp_path / "a/input.txt").rename(tmp_path / "moved/input.txt")
    prepare.check_source("moved/input.txt", out, manifest)
    with pytest.raises(UserError, match="data.source is 'b/input.txt'"):
        prepare.check_source("b/input.txt", out, manifest)
