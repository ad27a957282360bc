"""The main job on real text: train, evaluate, report. Slow: every model but one."""

import json

import pytest

import experiments
from experiments.run import main

DEFAULT = "smoke/gated-deltanet"
IDS = [
    pytest.param(experiment.id, marks=() if experiment.id == DEFAULT else pytest.mark.slow)
    for experiment in experiments.find("smoke/*")
]


@pytest.mark.parametrize("id", IDS)
def test_smoke_run_beats_a_unigram_model(id, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", id]) == 0
    run_dir = tmp_path / "runs" / id / experiments.get(id).hash8
    row = json.loads((run_dir / "result.json").read_text())
    validation = row["validation"]
    assert validation["windows"] == validation["of_windows"] == 1903
    assert validation["data"].startswith(
        "b962150d"
    )  # one text everywhere, so one number: 5 digits hold across versions
    assert 2.5 < validation["unigram_nats_per_byte"] < 4
    assert validation["nats_per_byte"] < validation["unigram_nats_per_byte"] - 0.7
    assert (run_dir / "loss.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"{validation['nats_per_byte']:.4f}" in printed and f"{validation['unigram_nats_per_byte']:.4f}" in printed
