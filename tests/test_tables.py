"""`gdn table`: every model a row, ours only from runs of the ID's own configuration, the paper's never as ours."""

import json
from pathlib import Path

import pytest

from experiments import get, published, report, tables
from experiments.models import PAPER_MODELS
from experiments.run import main
from gdn_jax.errors import UserError

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


DATA, OTHER = "1a2b3c4d" + "0" * 56, "5e6f7a8b" + "0" * 56


@pytest.fixture(autouse=True)
def nothing_published(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)


def row_of(id, perplexity=7.5, seed=3407, data=DATA, device="cpu", measured=None, **more):
    """A result row of the ID's own recipe; `measured` changes what its evaluation says it measured."""
    experiment = get(id)
    window = experiment.data.seq_len
    protocol = {"data": data, "window": window, "stride": window, "windows": 9, "of_windows": 9}
    trained = {"trained_on": data, "trained_window": window, "token_perplexity": perplexity}
    return {
        "id": id, "hash8": experiment.hash8, "recipe8": experiment.recipe8, "seed": seed, "steps": 5,
        "validation": trained | protocol | (measured or {}),
        "environment": {"devices": [device], "date": "2026-01-02T03:04:05", "commit": "abcdef0", "dirty": False},
    } | more  # fmt: skip


def write_run(row):
    directory = Path("runs") / row["id"] / f"{row['seed']}-{row['environment']['devices'][0]}"
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(row))
    return directory


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
    write_run(row_of("table3/hgrn2/tiny", zero_shot={"piqa": 51.25}))
    rows = json.loads(printed(capsys, "--scale", "tiny", "--json"))
    by_model = {row["model"]: row for row in rows}
    assert by_model["hgrn2"]["ours"]["held_out_ppl"] == 7.5 and by_model["hgrn2"]["ours"]["piqa"] == 51.25
    assert (
        by_model["hgrn2"]["ours"]["wiki_ppl"] == "not run"
        and by_model["hgrn2"]["from"] == "cpu, 2026-01-02, abcdef0, data 1a2b3c4d"
    )
    others = [row for model, row in by_model.items() if model != "hgrn2"]
    assert {value for row in others for value in row["ours"].values()} == {"not run"}
    assert all(row["paper"] is None for row in rows)
    line = next(line for line in printed(capsys, "--scale", "tiny").splitlines() if line.startswith("hgrn2"))
    assert "7.50" in line and "51.25" in line and line.count("not run") == 10


def test_a_published_result_counts_when_its_recipe_is_the_ids():
    directory = write_run(row_of("table3/retnet/tiny"))
    path = published.publish(directory)
    (directory / "result.json").unlink()
    assert tables.rows("table3", "tiny")[0]["ours"]["held_out_ppl"] == 7.5
    path.write_text(json.dumps(row_of("table3/retnet/tiny", recipe8="00000000")))
    assert tables.rows("table3", "tiny")[0]["ours"]["held_out_ppl"] == "not run"


def test_a_row_is_mean_and_spread_over_seeds_of_the_same_data_and_device(capsys):
    for seed, perplexity in ((1, 7.0), (2, 8.0), (3, 9.0)):
        write_run(row_of("table3/retnet/tiny", perplexity, seed))
    write_run(row_of("table3/retnet/tiny", 70.0, 4, device="NVIDIA H100"))
    write_run(row_of("table3/retnet/tiny", 700.0, 5, data=OTHER))
    found = [row for row in tables.rows("table3", "tiny") if row["model"] == "retnet"]
    assert {(row["ours"]["held_out_ppl"], row["spread"]["held_out_ppl"], len(row["seeds"])) for row in found} == {
        (8.0, 1.0, 3), (70.0, None, 1), (700.0, None, 1),
    }  # fmt: skip
    lines = [line for line in printed(capsys, "--scale", "tiny").splitlines() if line.startswith("retnet")]
    assert sum("8.00 ± 1.00" in line and "data 1a2b3c4d, 3 seeds" in line for line in lines) == 1
    assert sum("NVIDIA H100" in line for line in lines) == sum("data 5e6f7a8b" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("measured", "mark"),
    [
        ({"windows": 3}, "3 of 9 windows"),
        ({"stride": 16}, "stride 16"),
        ({"window": 512, "stride": 512}, "windows of 512, trained with 256"),
        ({"data": OTHER}, "read on data 5e6f7a8b, trained on 1a2b3c4d"),
    ],
)
def test_what_was_measured_otherwise_is_marked_and_never_averaged(capsys, measured, mark):
    write_run(row_of("table3/retnet/tiny", 7.0, 1))
    write_run(row_of("table3/retnet/tiny", 9.0, 2, measured=measured))
    whole, marked = (row for row in tables.rows("table3", "tiny") if row["model"] == "retnet")
    assert (whole["ours"]["held_out_ppl"], whole["spread"]["held_out_ppl"], whole["marks"]) == (7.0, None, [])
    assert (marked["ours"]["held_out_ppl"], marked["marks"]) == (9.0, [mark])
    assert f"MARKED: {mark}" in printed(capsys, "--scale", "tiny")
    with pytest.raises(UserError, match="is not its ID's number"):
        published.publish(Path("runs/table3/retnet/tiny/2-cpu"))


def test_an_evaluation_of_fewer_windows_does_not_replace_the_whole(tmp_path):
    whole = {"step": 4} | row_of("table3/retnet/tiny")["validation"]
    for one in (whole, whole | {"windows": 3, "token_perplexity": 1.0}, whole | {"stride": 8, "token_perplexity": 2.0}):
        report.save_evaluation(tmp_path, one)
    kept = json.loads((tmp_path / report.EVALUATION).read_text())
    assert len(kept) == 3 and published.preferred(kept) == whole
    report.save_evaluation(tmp_path, whole | {"token_perplexity": 7.0})  # measured again: replaced
    kept = json.loads((tmp_path / report.EVALUATION).read_text())
    assert len(kept) == 3 and published.preferred(kept)["token_perplexity"] == 7.0
    report.save_evaluation(tmp_path, whole | {"step": 8, "windows": 3})  # the others are of an older checkpoint
    assert [one["step"] for one in json.loads((tmp_path / report.EVALUATION).read_text())] == [8]


def test_a_result_of_uncommitted_files_is_not_published():
    row = row_of("table3/retnet/tiny")
    directory = write_run(row | {"environment": row["environment"] | {"dirty": True}})
    with pytest.raises(UserError, match="uncommitted changes"):
        published.publish(directory)


def test_without_git_a_result_names_the_hash_of_the_source():
    row = row_of("table3/retnet/tiny")
    write_run(row | {"environment": row["environment"] | {"commit": "unknown", "source": "01234567"}})
    assert tables.rows("table3", "tiny")[0]["from"] == "cpu, 2026-01-02, source 01234567, data 1a2b3c4d"


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
