"""`gdn table`: every model a row, ours only from runs of the ID's own configuration, the paper's never as ours."""

import json
from pathlib import Path

import pytest

from experiments import SUITES, get, published, report, tables
from experiments.commands.table import main as script
from experiments.models import PAPER_MODELS
from experiments.run import main
from gdn_jax import metrics
from gdn_jax.checkpoint import write_config
from gdn_jax.errors import UserError

DATA, OTHER = "1a2b3c4d" + "0" * 56, "5e6f7a8b" + "0" * 56


@pytest.fixture(autouse=True)
def nothing_published(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)


def row_of(id, perplexity=7.5, seed=3407, data=DATA, device="cpu", measured=None, **more):
    """A result row of the ID's own recipe; `measured` changes what its evaluation says it measured."""
    experiment = get(id)
    window, steps = experiment.data.seq_len, experiment.optim.steps
    protocol = {
        "step": steps,
        "of_steps": steps,
        "data": data,
        "window": window,
        "stride": window,
        "windows": 9,
        "of_windows": 9,
    }
    trained = {"trained_on": data, "trained_window": window, "token_perplexity": perplexity}
    return {
        "id": id, "hash8": experiment.hash8, "recipe8": experiment.recipe8, "seed": seed, "steps": steps,
        "validation": trained | protocol | (measured or {}),
        "environment": {"devices": [device], "date": "2026-01-02T03:04:05", "commit": "abcdef0", "dirty": False},
    } | more  # fmt: skip


def entry(suite, task, metrics, n, of, marks=(), **protocol):
    """A task's numbers as they lie in a run's tasks.json."""
    environment = {"devices": ["cpu"], "date": "2026-01-02", "commit": "abcdef0", "dirty": False, "source": "01234567"}
    return {
        "suite": suite, "task": task, "step": 5, "n": n, "of": of, "metrics": metrics, "marks": list(marks),
        "protocol": protocol, "seconds": 1.0, "environment": environment,
    }  # fmt: skip


PIQA = entry("table3", "piqa", {"acc": 0.5125, "acc_norm": 0.5}, 1838, 1838)


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
    assert lines[0].startswith("table3 at tiny: Language modelling") and len(lines) == 2 + 10 + 1
    assert [line.split()[0] for line in lines[2:12]] == list(PAPER_MODELS)
    assert all(line.count("not run") == 13 for line in lines[2:12]) and "paper  " not in out
    assert lines[-1].startswith("† perplexity per byte of held-out text") and "stand-in" in lines[-1]


def test_a_run_fills_its_own_row(capsys):
    write_run(row_of("table3/hgrn2/tiny", tasks=[PIQA]))
    rows = json.loads(printed(capsys, "--scale", "tiny", "--json"))
    by_model = {row["model"]: row for row in rows}
    assert by_model["hgrn2"]["ours"]["held_out_ppl"] == 7.5 and by_model["hgrn2"]["ours"]["piqa"] == pytest.approx(
        51.25
    )
    assert (
        by_model["hgrn2"]["ours"]["wiki_ppl"] == "not run"
        and by_model["hgrn2"]["from"] == "cpu, 2026-01-02, abcdef0, data 1a2b3c4d"
    )
    others = [row for model, row in by_model.items() if model != "hgrn2"]
    assert {value for row in others for value in row["ours"].values()} == {"not run"}
    assert all(row["paper"] is None for row in rows)
    line = next(line for line in printed(capsys, "--scale", "tiny").splitlines() if line.startswith("hgrn2"))
    assert "7.50*" in line and "51.25*" in line and line.count("not run") == 10


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
        ({"step": 50}, "step 50 of 200"),
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


def test_a_row_from_before_steps_were_recorded_is_marked_where_its_training_is_unfinished():
    for seed, step in enumerate((50, 200)):
        row = row_of("table3/retnet/tiny", seed=seed, steps=step)
        for name in ("step", "of_steps"):
            del row["validation"][name]
        directory = write_run(row)
        write_config(directory, get("table3/retnet/tiny"))
    found = [row for row in tables.rows("table3", "tiny") if row["model"] == "retnet"]
    assert [row["marks"] for row in found] == [[], ["step 50 of 200"]]
    with pytest.raises(UserError, match=r"is not its ID's number \(step 50 of 200\)"):
        published.publish(Path("runs/table3/retnet/tiny/0-cpu"))


def test_imported_parameters_have_no_unfinished_training():
    evaluation = row_of("table3/retnet/tiny")["validation"] | {"step": 0}
    assert published.marks(evaluation) == ["step 0 of 200"]
    assert published.marks(evaluation | {"trained_on": None, "data": None}) == []


def test_an_evaluation_of_fewer_windows_does_not_replace_the_whole(tmp_path):
    whole = row_of("table3/retnet/tiny")["validation"] | {"step": 4}
    for one in (whole, whole | {"windows": 3, "token_perplexity": 1.0}, whole | {"stride": 8, "token_perplexity": 2.0}):
        report.save_evaluation(tmp_path, one)
    kept = json.loads((tmp_path / report.EVALUATION).read_text())
    assert len(kept) == 3 and published.preferred(kept) == whole
    report.save_evaluation(tmp_path, whole | {"token_perplexity": 7.0})  # measured again: replaced
    kept = json.loads((tmp_path / report.EVALUATION).read_text())
    assert len(kept) == 3 and published.preferred(kept)["token_perplexity"] == 7.0
    report.save_evaluation(tmp_path, whole | {"step": 8, "windows": 3})  # the others are of an older checkpoint
    assert [one["step"] for one in json.loads((tmp_path / report.EVALUATION).read_text())] == [8]


def test_a_result_of_uncommitted_files_is_not_published(monkeypatch):
    row = row_of("table3/retnet/tiny")
    changed = row["environment"] | {"dirty": True, "source": "01234567"}
    directory = write_run(row | {"environment": changed})
    with pytest.raises(UserError, match="uncommitted changes"):
        published.publish(directory)
    # a tree copied to another machine has no commit of its own; a clean checkout of the same files gives it theirs
    here = {"commit": "fedcba9", "dirty": False, "source": "01234567"}
    monkeypatch.setattr(metrics, "environment", lambda: here)
    environment = json.loads(published.publish(directory).read_text())["environment"]
    assert (environment["commit"], environment["dirty"]) == ("fedcba9", False)
    here["source"] = "89abcdef"
    with pytest.raises(UserError, match="whose files are those of its source 01234567"):
        published.publish(directory)


def test_without_git_a_result_names_the_hash_of_the_source():
    row = row_of("table3/retnet/tiny")
    write_run(row | {"environment": row["environment"] | {"commit": "unknown", "source": "01234567"}})
    assert tables.rows("table3", "tiny")[0]["from"] == "cpu, 2026-01-02, source 01234567, data 1a2b3c4d"


def test_the_papers_rows_stand_beside_ours(capsys):
    out = printed(capsys)
    line = next(line for line in out.splitlines() if line.startswith("gated-deltanet  "))
    assert line.split()[:4] == ["gated-deltanet", "paper", "16.42*", "12.17*"] and line.split()[-1] == "paper"
    assert out.count(" ours ") == 10 and out.count("not run") == 130


def test_an_unknown_table_is_refused(capsys):
    assert main(["table", "table33"]) == 2
    assert "There is no table 'table33' (did you mean 'table3'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("", [], "There is no table ''; there are table2"),
        ("s1", ["--models", "swa"], "s1 has no row 'swa'; it has gated"),
    ],
)
def test_a_script_without_its_table_or_row(capsys, name, words, sentence):
    with pytest.raises(SystemExit) as stop:
        script(name, words)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_cells_of_less_than_the_task_are_marked_and_lead_nothing(capsys):
    write_run(row_of("table3/retnet/tiny", tasks=[PIQA | {"n": 20}]))
    write_run(row_of("table3/hgrn2/tiny", tasks=[entry("table3", "piqa", {"acc": 0.4}, 3, 3)]))
    write_run(row_of("table3/mamba/tiny", tasks=[PIQA | {"metrics": {"acc": 0.3}, "marks": ["step 5 of 200"]}]))
    write_run(row_of("table3/mamba2/tiny", tasks=[PIQA | {"metrics": {"acc": 0.2}}]))
    out = printed(capsys, "--scale", "tiny")
    lines = {line.split()[0]: line for line in out.splitlines() if " ours " in line}
    assert "51.25 [a]" in lines["retnet"] and "[a] n = 20 of 1,838: compares with no number" in out
    assert "40.00 [b]" in lines["hgrn2"] and "[b] own rows, n = 3" in out
    assert "30.00 [c]" in lines["mamba"] and "[c] step 5 of 200" in out
    assert "20.00*" in lines["mamba2"], "the only number that is PIQA's"
    found = {row["model"]: row for row in tables.rows("table3", "tiny")}
    assert found["retnet"]["cell_marks"] == {"piqa": ["n = 20 of 1,838"]} and found["mamba2"]["cell_marks"] == {}


def test_an_average_needs_every_column_and_bears_every_mark():
    tasks = [
        entry("table3", column.task, {"acc": 0.25, "acc_norm": 0.5}, column.rows.start, column.rows.start)
        for column in SUITES["table3"].columns.values()
    ]
    row = row_of("table3/retnet/tiny", tasks=tasks)
    directory = write_run(row)
    # LMB, PIQA, Wino, ARC-e, SIQA and BoolQ are 25, HellaSwag and ARC-c 50
    assert tables.rows("table3", "tiny")[0]["ours"]["average"] == pytest.approx((6 * 25 + 2 * 50) / 8)
    (directory / "result.json").write_text(json.dumps(row | {"tasks": [*tasks[:-1], tasks[-1] | {"n": 9}]}))
    assert tables.rows("table3", "tiny")[0]["cell_marks"]["average"] == ["n = 9 of 3,270"]
    (directory / "result.json").write_text(json.dumps(row | {"tasks": tasks[:-1]}))
    assert tables.rows("table3", "tiny")[0]["ours"]["average"] == "not run"


def test_seeds_of_a_task_are_averaged_without_those_that_bear_marks():
    for seed, (accuracy, n) in enumerate([(0.5, 1838), (0.6, 1838), (0.9, 20)]):
        write_run(row_of("table3/retnet/tiny", seed=seed, tasks=[PIQA | {"metrics": {"acc": accuracy}, "n": n}]))
    row = tables.rows("table3", "tiny")[0]
    assert row["ours"]["piqa"] == pytest.approx(55) and row["spread"]["piqa"] == pytest.approx(7.07, abs=0.01)
    assert row["cell_marks"] == {}


def test_a_cell_of_fewer_seeds_than_its_row_says_so(capsys):
    write_run(row_of("table3/retnet/tiny", seed=1, tasks=[PIQA]))
    write_run(row_of("table3/retnet/tiny", seed=2, tasks=[]))
    row = tables.rows("table3", "tiny")[0]
    assert row["cell_seeds"] == {"piqa": 1} and row["seeds"] == [1, 2]
    assert row["protocols"]["piqa"] == {"device": "cpu", "commit": "abcdef0"}, "of the seed that was measured"
    assert "51.25 (1 of 2 seeds)" in printed(capsys, "--scale", "tiny")


def test_a_fresh_run_hides_no_published_task():
    """Its own entry counts, unless the published one is the whole measure and its own is not."""
    directory = write_run(row_of("table3/retnet/tiny", tasks=[PIQA]))
    published.publish(directory)
    (directory / "result.json").write_text(json.dumps(row_of("table3/retnet/tiny", 7.0)))
    row = tables.rows("table3", "tiny")[0]
    assert row["ours"]["piqa"] == pytest.approx(51.25) and row["ours"]["held_out_ppl"] == 7.0 and len(row["seeds"]) == 1
    for n, expected in ((20, 51.25), (1838, 90)):
        fresh = row_of("table3/retnet/tiny", tasks=[PIQA | {"n": n, "metrics": {"acc": 0.9}}])
        (directory / "result.json").write_text(json.dumps(fresh))
        assert tables.rows("table3", "tiny")[0]["ours"]["piqa"] == pytest.approx(expected)


def test_task_numbers_of_uncommitted_files_are_not_published(monkeypatch):
    dirty = PIQA | {"environment": PIQA["environment"] | {"dirty": True}}
    directory = write_run(row_of("table3/retnet/tiny", tasks=[dirty]))
    with pytest.raises(UserError, match=r"table3/piqa of .* was measured with uncommitted changes"):
        published.publish(directory)
    here = {"commit": "fedcba9", "dirty": False, "source": "01234567"}
    monkeypatch.setattr(metrics, "environment", lambda: here)
    (kept,) = json.loads(published.publish(directory).read_text())["tasks"]
    assert (kept["environment"]["commit"], kept["environment"]["dirty"]) == ("fedcba9", False)


def test_ours_less_the_papers_where_both_are_whole(capsys):
    write_run(row_of("table3/gated-deltanet/1.3b", tasks=[PIQA, entry("table3", "boolq", {"acc": 0.7}, 5, 3270)]))
    row = next(row for row in tables.rows("table3", "1.3b") if row["model"] == "gated-deltanet")
    assert row["difference"] == {"piqa": pytest.approx(51.25 - 72.25)}
    out = printed(capsys)
    assert any(line.split()[1:4] == ["ours", "-", "paper"] and "-21.00" in line for line in out.splitlines())


def test_the_paper_in_every_table(capsys):
    best = {"table2": "98.80*", "table4": "30.60*", "table5": "16.60*", "s1": "27.13*", "s2": "28.20"}
    for name, cell in best.items():
        scale = "400m" if name in ("s1", "s2") else "1.3b"
        assert main(["table", name, "--scale", scale]) == 0
        out = capsys.readouterr().out
        assert cell in out, name
        assert ("‡" in out) == (name in ("table4", "table5")), name
    assert main(["table", "table3", "--scale", "1.3b"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mamba2 "))
    assert row.count("‡") == 11, "the document has another number in every cell of this row"


def test_the_mean_of_two_perplexities_is_read_into_table_s1(capsys):
    wiki = entry("table3", "wikitext", {"word_perplexity": 30.0}, 62, 62)
    lambada = entry("table3", "lambada_openai", {"perplexity": 20.0, "acc": 0.1}, 5153, 5153)
    write_run(row_of("ablations/no-short-conv/tiny", tasks=[wiki, lambada]))
    assert main(["table", "s1", "--scale", "tiny"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("no-short-conv "))
    assert "25.00*" in line and "Avg-PPL is read as the mean of the Wiki and the LAMBADA perplexity" in out


def test_a_table_as_files(tmp_path, capsys):
    write_run(row_of("table3/mamba2/tiny", tasks=[PIQA]))
    printed(capsys, "--scale", "tiny", "--out", "drawn")
    files = {path.suffix: path for path in Path("drawn").iterdir()}
    assert sorted(files) == [".json", ".md", ".png", ".tex"]
    assert "**51.25**" in files[".md"].read_text() and files[".md"].read_text().count("| --- | --- | --: |") == 1
    assert r"\textbf{51.25}" in files[".tex"].read_text() and r"\toprule" in files[".tex"].read_text()
    assert json.loads(files[".json"].read_text()) == tables.rows("table3", "tiny")
    assert files[".png"].stat().st_size > 20_000


def test_a_scale_that_a_table_lacks(capsys):
    assert main(["table", "s1"]) == 2
    assert "s1 has no scale 1.3b; --scale is one of tiny, desk, 400m." in capsys.readouterr().err


# rows of the paper whose printed average is not the mean of its columns, by more than rounding
OFF = {
    "table3/gated-deltanet-h1/1.3b": 0.06, "table5/retnet/1.3b": 0.14, "table5/hgrn2/1.3b": -0.22,
    "table5/mamba/1.3b": -0.25, "table5/mamba2/1.3b": -0.16, "table5/gated-deltanet/1.3b": 0.06,
    "table5/transformer/1.3b": -0.12, "table5/samba/1.3b": 0.46, "table5/gated-deltanet-h1/1.3b": 0.24,
    "table5/gated-deltanet-h2/1.3b": 0.62,
}  # fmt: skip
OFF_IN_DOCUMENT = {
    "table3/mamba/1.3b": 0.27,
    "table3/mamba2/1.3b": -0.37,
    "table3/gated-deltanet/1.3b": -0.67,
    "table3/gated-deltanet-h2/1.3b": -0.59,
    "table4/gated-deltanet-h1/1.3b": 0.08,
    "table5/mamba/1.3b": -0.71,
    "table5/mamba2/1.3b": -0.28,
    "table5/deltanet/1.3b": -0.16,
    "table5/samba/1.3b": 0.74,
    "table5/gated-deltanet-h1/1.3b": 0.34,
    "table5/gated-deltanet-h2/1.3b": 0.69,
}


def averages():
    """id -> (accuracies of the paper's row, its printed average, the same of the document)."""
    paper, differences = json.loads(report.PAPER.read_text()), json.loads(tables.DIFFERENCES.read_text())
    for id, found in paper.items():
        if id.startswith("figure3/"):
            continue  # speeds: tests/test_figure3.py
        numbers = found["numbers"]
        assert found["source"].startswith("arXiv 2412.06464, Table"), id
        keys = [key for key in numbers if not key.endswith("ppl") and key != "average"]
        document = numbers | {key: cell["document"] for key, cell in differences.get(id, {}).items()}
        assert all(numbers[key] == cell["paper"] != cell["document"] for key, cell in differences.get(id, {}).items())
        if keys and "average" in numbers:
            yield id, *([sum(row[key] for key in keys) / len(keys) - row["average"]][0] for row in (numbers, document))


def test_the_papers_averages_are_the_means_of_its_columns():
    found = {id: round(off, 2) for id, off, _ in averages() if abs(off) > 0.0551}
    assert found == OFF


def test_the_documents_averages():
    """Of the rows in which the document has other numbers than the paper."""
    differ = json.loads(tables.DIFFERENCES.read_text())
    found = {id: round(off, 2) for id, _, off in averages() if abs(off) > 0.0551 and id in differ}
    assert found == OFF_IN_DOCUMENT


def test_every_row_of_the_paper_is_an_id_of_ours_and_every_cell_a_column():
    paper = {id: row for id, row in json.loads(report.PAPER.read_text()).items() if not id.startswith("figure3/")}
    assert len(paper) == 3 + 10 + 10 + 10 + 12 + 4
    shown = {
        (spec.printed(id), key)
        for name, spec in tables.TABLES.items()
        for id in spec.rows("400m" if name in ("s1", "s2") else "1.3b").values()
        for key in spec.columns
    }
    assert {(id, key) for id, found in paper.items() for key in found["numbers"]} <= shown
    assert set(json.loads(tables.DIFFERENCES.read_text())) <= set(paper)
