"""Figure 1 is what the configuration says: parts that are switched off are not drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments import figure1
from experiments.models import PAPER_MODELS
from experiments.run import main


@pytest.mark.parametrize("model", PAPER_MODELS)
def test_every_model_is_drawn(model, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    id = f"table3/{model}/1.3b"
    assert main(["figure", "figure1", "--id", id]) == 0
    out = capsys.readouterr().out
    picture = Path(f"figure1-table3-{model}-1.3b.png")
    assert f"Wrote {picture}." in out and picture.stat().st_size > 10_000
    cfg = experiments.get(id).model
    texts = {text.get_text() for panel in figure1.draw(experiments.get(id)).axes for text in panel.texts}
    assert f"x {cfg.repeats}" in texts and f"width {cfg.d_model:,}" in texts
    for mixer in cfg.pattern:
        assert f"norm, {figure1.TITLES[mixer]}, +" in texts
    assert len(figure1.layers(cfg)) * cfg.repeats == cfg.layers * (2 if cfg.d_ff else 1)


def test_switches_take_parts_away(capsys):
    def parts(name):
        assert main(["figure", "figure1", "--id", f"{name}/tiny", "--json", "--out", str(Path.cwd())]) == 0
        return json.loads(capsys.readouterr().out)["mixers"]["gated_deltanet"]

    whole = parts("table3/gated-deltanet")
    assert list(whole["lanes"]) == ["q", "k", "v", "beta", "alpha"] and whole["gate"] and whole["above"] == ["RMS norm"]
    assert whole["lanes"]["q"] == ["linear", "conv 4", "SiLU", "L2 norm"]
    assert parts("ablations/no-short-conv")["lanes"]["q"] == ["linear", "SiLU", "L2 norm"]
    assert not parts("ablations/no-output-gate")["gate"] and parts("ablations/no-output-norm")["above"] == []


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_mixer_that_it_does_not_know(monkeypatch, capsys):
    monkeypatch.delitem(figure1.PARTS, "gated_deltanet")
    assert main(["figure", "figure1"]) == 2
    assert capsys.readouterr().err.startswith(
        "figure1 does not know the parts of the mixer 'gated_deltanet'; it draws "
    )


def test_boxes_do_not_overlap():
    """Of one panel: their middles are further apart than their heights or widths."""
    for model in PAPER_MODELS:
        for panel in figure1.draw(experiments.get(f"table3/{model}/1.3b")).axes:
            boxes = [patch.get_bbox().extents for patch in panel.patches]
            for i, (left, low, right, high) in enumerate(boxes):
                for other in boxes[:i]:
                    apart = [other[0] - right, left - other[2], other[1] - high, low - other[3]]
                    assert np.max(apart) >= -1e-9, (model, boxes[i], other)
