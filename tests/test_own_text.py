"""docs/own-text.md: its blocks run in their order, as a stranger would run them, and give what the page says."""

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from experiments.run import main

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
