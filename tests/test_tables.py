"""`gdn table`: every model a row, ours only from runs of the ID's own configuration, the paper's never as ours."""

import json

import pytest

from experiments import get, report, tables
from experiments.models import PAPER_MODELS
from experiments.run import main

SUMMARY_DIFFERS = {
    "hgrn2",
    "mamba",
    "mamba2",
    "deltanet",
    "gated-deltanet",
    "samba",
    "gated-deltanet-h1",
    "gated-deltanet-h2",
}


@pytest.fixture(autouse=True)
def nothing_published(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)


def write_run(id, hash8=None, perplexity=7.5, **more):
    experiment = get(id)
    row = {
        "id": id, "hash8": hash8 or experiment.hash8, "steps": 5, "validation": {"token_perplexity": perplexity},
        "environment": {"devices": ["cpu"], "date": "2026-01-02T03:04:05", "commit": "abcdef0", "dirty": False},
    }  # fmt: skip
    directory = report.RESULTS / "runs" / id / experiment.hash8
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(row | more))
    return row


def printed(capsys, *words):
    assert main(["table", "table3", *words]) == 0
    return capsys.readouterr().out


def test_nothing_run(capsys):
    out = printed(capsys, "--scale", "tiny")
    lines = out.splitlines()
    assert lines[0] == "table3 at tiny" and len(lines) == 2 + 10 + 1
    assert [line.split()[0] for line in lines[2:12]] == list(PAPER_MODELS)
    assert all(line.count("not run") == 13 for line in lines[2:12]) and "paper  " not in out
    assert lines[-1].startswith("* perplexity per byte of held-out text") and "stand-in" in lines[-1]


def test_a_run_fills_its_own_row(capsys):
    write_run("table3/hgrn2/tiny", zero_shot={"piqa": 51.25})
    rows = json.loads(printed(capsys, "--scale", "tiny", "--json"))
    by_model = {row["model"]: row for row in rows}
    assert by_model["hgrn2"]["ours"]["held_out_ppl"] == 7.5 and by_model["hgrn2"]["ours"]["piqa"] == 51.25
    assert (
        by_model["hgrn2"]["ours"]["wiki_ppl"] == "not run" and by_model["hgrn2"]["from"] == "cpu, 2026-01-02, abcdef0"
    )
    others = [row for model, row in by_model.items() if model != "hgrn2"]
    assert {value for row in others for value in row["ours"].values()} == {"not run"}
    assert all(row["paper"] is None for row in rows)
    line = next(line for line in printed(capsys, "--scale", "tiny").splitlines() if line.startswith("hgrn2"))
    assert "7.50" in line and "51.25" in line and line.count("not run") == 10


def test_a_published_result_counts_when_its_configuration_is_the_ids(capsys):
    row = write_run("table3/retnet/tiny")
    (report.RESULTS / "runs").rename(report.RESULTS / "elsewhere")
    (report.RESULTS / "one.json").write_text(json.dumps(row))
    assert tables.rows("table3", "tiny")[0]["ours"]["held_out_ppl"] == 7.5
    (report.RESULTS / "one.json").write_text(json.dumps(row | {"hash8": "00000000"}))
    assert tables.rows("table3", "tiny")[0]["ours"]["held_out_ppl"] == "not run"


def test_the_papers_rows_stand_beside_ours(capsys):
    out = printed(capsys)
    line = next(line for line in out.splitlines() if line.startswith("gated-deltanet  "))
    assert line.split()[:4] == ["gated-deltanet", "paper", "16.42", "12.17"] and line.split()[-1] == "paper"
    assert out.count(" ours ") == 10 and out.count("not run") == 130


def test_an_unknown_table_is_refused(capsys):
    assert main(["table", "table33"]) == 2
    assert "There is no table 'table33' (did you mean 'table3'?)" in capsys.readouterr().err


def test_the_papers_averages_are_the_means_of_its_columns():
    """All but H1's, off by 0.06; the rest by rounding."""
    paper = json.loads(report.PAPER.read_text())
    accuracies = [metric for metric in tables.TABLE3 if not metric.endswith("ppl") and metric != "average"]

    def off(numbers):
        return abs(sum(numbers[metric] for metric in accuracies) / 8 - numbers["average"])

    for model in PAPER_MODELS:
        entry = paper[f"table3/{model}/1.3b"]
        assert set(entry["numbers"]) == set(entry["summary"]["numbers"]) == set(tables.TABLE3)
        assert off(entry["numbers"]) < (0.07 if model == "gated-deltanet-h1" else 0.012), model
        assert (entry["numbers"] != entry["summary"]["numbers"]) == (model in SUMMARY_DIFFERS), model
        assert "arXiv 2412.06464" in entry["source"] and "000_17d5b185e1126207.txt" in entry["summary"]["source"]
    ids = {id for id in paper if id.startswith("ablations/")}
    assert len(ids) == 14 and all(get(id) for id in paper)
