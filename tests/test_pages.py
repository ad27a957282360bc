"""The pages about work of one's own: their blocks run as printed, on a CPU, in an empty folder."""

import re

import pytest
from run_page import blocks, run_page

pytestmark = pytest.mark.slow


def test_own_mixer(tmp_path):
    printed = run_page("own-mixer.md", tmp_path)
    assert (tmp_path / "ema/result.json").exists() and "She looked at " in printed
    assert len(list((tmp_path / "runs/mine/ema").iterdir())) == 1 and printed.endswith("40\n")
    assert len(blocks("own-mixer.md")) == 4


def test_own_experiment(tmp_path):
    printed = run_page("own-experiment.md", tmp_path)
    assert (tmp_path / "slower/config.json").exists() and len(list((tmp_path / "runs/mine/small").iterdir())) == 1
    assert re.search(r"mine/small: all 10 steps are done, in slower", printed)
    assert "in tuned, with the parameters of slower at step 10" in printed
    assert printed.endswith("('gated_deltanet', 'swa') 96\n") and len(blocks("own-experiment.md")) == 5
