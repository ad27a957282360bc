"""Tables' tasks asked of a run: what is kept and marked, what `gdn eval` and `gdn figure` say of it."""

import contextlib
import gzip
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small import prepare_text, scripted_model

import experiments
from experiments import figures, suites, table3, table4, table5
from experiments.commands.evaluation import TaskOptions, checked, described
from experiments.run import main
from experiments.suites import Asked, Column, Suite
from gdn_jax import checkpoint, tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate.answering import Answering
from gdn_jax.fingerprint import Identity
from gdn_jax.layers import Compute
from gdn_jax.model import init_model
from gdn_jax.runs import OpenRun

ROWS = Path(__file__).parent / "eval_rows"
ID = "table3/gated-deltanet/tiny"
FP32 = Compute(dtype=jnp.float32, chunk=16)
COLUMN = Column("T", "t", "acc", range(10, 11), 100.0)
SUITE = Suite("table3", {"t": COLUMN, "u": Column("U", "u", "acc", range(10, 11))}, None, averaged=("t", "u"))


def entry(**change):
    row = {"suite": "table3", "task": "t", "step": 5, "n": 10, "of": 10, "metrics": {"acc": 0.5}, "marks": []}
    return row | {"protocol": {"limit": None}, "environment": {"date": "2026-01-02"}} | change


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of table3/gated-deltanet/tiny whose last checkpoint is of its last step, with random parameters."""
    directory = tmp_path_factory.mktemp("suites")
    experiment = experiments.get(ID)
    with contextlib.chdir(directory):
        prepare_text(Path())
        run = Path("runs") / ID / experiment.hash8
        model = jax.jit(init_model, static_argnums=0)(experiment.model, jax.random.key(0))
        trained_on = Identity("a" * 64, tokenizer.load("byte").hash8)
        checkpoint.write(run, replace(experiment, run=replace(experiment.run, dir="")), model, 200, trained_on)
    return directory


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def test_marks_say_what_a_number_is_not():
    assert SUITE.marks(entry(), COLUMN) == ()
    assert SUITE.marks(entry(n=3), COLUMN) == ("n = 3 of 10",)
    assert SUITE.marks(entry(n=3, of=3), COLUMN) == ("own rows, n = 3",)
    assert SUITE.marks(entry(of=11, n=11, marks=["step 5 of 9"]), COLUMN) == ("own rows, n = 11", "step 5 of 9")


def test_cells_and_their_mean():
    rows = [{"tasks": [entry(), entry(task="u", metrics={"acc": 3.0}, n=2)]}]
    t, u = rows[0]["tasks"]
    assert SUITE.cell("t", rows) == (50.0, None, (), 1, (t,))
    assert SUITE.cell("u", rows) == (3.0, None, ("n = 2 of 10",), 1, (u,))
    assert SUITE.cell("average", rows) == (26.5, None, ("n = 2 of 10",), 1, (t, u))
    assert SUITE.cell("average", [{"tasks": [entry()]}]).value is None
    assert SUITE.cell("t", [{}]).value is None and SUITE.cell("t", []).value is None


def test_of_one_task_the_largest_measure_without_marks_stands_for_the_run(tmp_path):
    for one in (entry(n=3), entry(metrics={"acc": 0.9}), entry(n=9), entry(marks=["haystack"]), entry(step=9)):
        suites.save(tmp_path, one)
    assert len(suites.kept(tmp_path)) == 5
    (chosen,) = suites.of_step(tmp_path, 5)
    assert chosen["metrics"]["acc"] == 0.9 and chosen["n"] == 10
    suites.save(tmp_path, entry(metrics={"acc": 0.1}))  # measured again: replaced
    assert len(suites.kept(tmp_path)) == 5 and suites.of_step(tmp_path, 5)[0]["metrics"]["acc"] == 0.1
    assert suites.of_step(tmp_path, 4) == []


def seeds(*tasks):
    return [{"tasks": list(entries)} for entries in tasks]


def of(version, accuracy, date="2026-01-02", **change):
    return entry(metrics={"acc": accuracy}, protocol={"version": version}, environment={"date": date}, **change)


def test_seeds_that_were_measured_otherwise_are_not_averaged():
    """The newest counts, and those like it; a protocol's field that an older entry lacks is a difference."""
    old, new, newest = of(1, 0.5), of(2, 0.7, "2026-02-01"), of(2, 0.8, "2026-03-01")
    assert SUITE.cell("t", seeds([new], [newest]))[:4] == (pytest.approx(75), pytest.approx(7.071, abs=1e-3), (), 2)
    found = SUITE.cell("t", seeds([newest], [old], [new]))
    assert (found.value, found.seeds, found.entries) == (pytest.approx(75), 2, (newest, new))
    assert found.marks == ("2 of 3 seeds: other version",)
    before = new | {"protocol": {}, "environment": {"date": "2026-01-01"}}
    assert SUITE.cell("t", seeds([before], [newest])).marks == ("1 of 2 seeds: other version",)
    assert SUITE.cell("t", seeds([before]))[:4] == (pytest.approx(70), None, (), 1), "alone it is what it was"
    limited = newest | {"protocol": {"version": 2, "limit": 99}}
    assert SUITE.cell("t", seeds([new], [limited])).seeds == 2, "all documents were read"


def test_an_average_is_of_whole_seeds_and_has_a_spread():
    whole = [entry(metrics={"acc": 0.5}), entry(task="u", metrics={"acc": 10.0})]
    better = [entry(metrics={"acc": 0.7}), entry(task="u", metrics={"acc": 10.0})]
    part = [entry(metrics={"acc": 0.9})]
    assert SUITE.cell("average", seeds(whole, part))[:4] == (30.0, None, (), 1)
    assert SUITE.cell("t", seeds(whole, part)).seeds == 2
    assert SUITE.cell("average", seeds(whole, better))[:4] == (35.0, pytest.approx(50**0.5), (), 2)
    assert SUITE.cell("average", seeds(part, part)).value is None
    apart = [of(1, 0.5) | {"protocol": {"max_length": 512}}, entry(task="u", protocol={"max_length": 2048})]
    assert SUITE.cell("average", seeds(apart)).marks == ("columns with 2 values of max_length",)


def test_own_rows_hide_no_published_set(tmp_path):
    for one in (entry(task="piqa", n=1838, of=1838), entry(task="piqa", n=5000, of=5000)):
        suites.save(tmp_path, one)
        assert suites.of_step(tmp_path, 5)[0]["n"] == 1838
    for name in ("part", "other"):
        (tmp_path / name).mkdir()
    suites.save(tmp_path / "part", entry(task="piqa", n=100, of=1838))
    suites.save(tmp_path / "part", entry(task="piqa", n=5000, of=5000))
    assert suites.of_step(tmp_path / "part", 5)[0]["n"] == 100
    suites.save(tmp_path / "other", entry(task="sciq", n=3, of=1000))
    suites.save(tmp_path / "other", entry(task="sciq", n=1000, of=1000, metrics={"acc": 0.1}))
    assert suites.of_step(tmp_path / "other", 5)[0]["n"] == 1000, "a task without a column"


def test_a_protocol_holds_the_hash_of_local_rows(tmp_path):
    """Compressed or not; another file is another measurement."""
    suite = Suite("table4", {}, lambda *_: {"metrics": {}, "n": 1, "of": 1, "protocol": {}, "stand_in": ""})
    answering = Answering(run_of(ID, tmp_path, 200))

    for name in ("packed", "plain"):
        (tmp_path / name).mkdir()
    (tmp_path / "packed" / "squad.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    (packed,) = suites.measure(suite, ["squad"], answering, Asked(folder=tmp_path / "packed"))
    assert packed["protocol"] == {"limit": None, "data_sha256": hashlib.sha256(b"{}\n").hexdigest()}
    (tmp_path / "plain" / "squad.jsonl").write_text("{}\n")
    assert (
        suites.measure(suite, ["squad"], answering, Asked(folder=tmp_path / "plain"))[0]["protocol"]
        == packed["protocol"]
    )
    (tmp_path / "plain" / "squad.jsonl").write_text("{} \n")
    suites.measure(suite, ["squad"], answering, Asked(folder=tmp_path / "plain"))
    assert len(suites.kept(tmp_path)) == 2
    assert suites.measure(suite, ["squad"], answering, Asked())[0]["protocol"] == {"limit": None}


def test_table_4s_published_counts():
    squad, nq = table4.SUITE.columns["squad"], table4.SUITE.columns["nq"]
    own = entry(suite="table4", task="squad", n=1000, of=1000)
    assert table4.SUITE.marks(own, squad) == ("own rows, n = 1,000",)
    assert table4.SUITE.marks(own | {"n": 2984, "of": 2984}, squad) == ()
    assert table4.SUITE.marks(own | {"n": 3160, "of": 3160}, nq) == ()


def test_what_tasks_name():
    asked, found = checked(TaskOptions(tasks="table4,table2/niah_single_1,copa", limit=3))
    named = {suite.name: tasks for suite, tasks in found}
    assert asked == Asked(limit=3)
    assert list(named) == ["table4", "table2", "table3"]
    assert len(named["table4"]) == 6 and named["table2"] == ["niah_single_1"] and named["table3"] == ["copa"]


def evaluate(capsys, *words):
    assert main(["eval", ID, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_tasks_of_three_tables_on_rows_of_our_own(capsys):
    found = evaluate(capsys, "--tasks", "table4,table5/trec,table3/arc_easy", "--task_data", str(ROWS))
    assert [one["suite"] for one in found] == ["table4"] * 6 + ["table5", "table3"]
    assert found[0]["metrics"].keys() == {"contains", "looping"} and found[0]["protocol"]["context_length"] == 2048
    assert found[6]["metrics"].keys() == {"score", "raw", "first_line"} and found[6]["protocol"]["max_length"] == 2048
    assert found[7]["protocol"]["harness"] == "lm-eval 0.4.13" and found[7]["protocol"]["version"] == 1.0
    assert found[7]["protocol"]["fewshot"] == 0 and found[7]["protocol"]["seeds"]["random"] == 0
    directory = next((Path("runs") / ID).iterdir())
    assert suites.kept(directory) == found
    size = (directory / "answers.jsonl").stat().st_size
    assert main(["eval", ID, "--tasks", "table4", "--task_data", str(ROWS)]) == 0
    out = capsys.readouterr().out
    assert "table4/swde" in out and "own rows, n = 3" in out
    assert (directory / "answers.jsonl").stat().st_size == size, "nothing was asked twice"
    assert main(["table", "table4", "--scale", "tiny"]) == 0  # no result.json yet: training writes no row by itself
    assert "own rows" not in capsys.readouterr().out


def test_needles_with_a_stand_in_haystack(capsys, monkeypatch):
    from experiments import table2

    monkeypatch.setattr(table2, "LENGTHS", {"niah_single_2": (1024,)})
    (one,) = evaluate(capsys, "--tasks", "table2/niah_single_2", "--limit", "2")
    assert one["metrics"].keys() == {"1024"} and (one["n"], one["of"]) == (2, 500)
    assert one["marks"] == ["haystack english-novels in place of the essays"]


def test_a_figure_of_one_corpus(capsys, tmp_path):
    text = "Once more the lamp was lit. " * 800  # 22,400 bytes
    (tmp_path / "qmsum.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (one,) = evaluate(capsys, "--tasks", "figure2", "--task_data", str(tmp_path))
    assert [one["metrics"][str(n)] > 1 for n in (4096, 8192, 12288, 16384, 20480)] == [True] * 5
    assert len([name for name in one["metrics"] if name.startswith("bucket_")]) == 10
    directory = next((Path("runs") / ID).iterdir())
    experiment = experiments.get(ID)
    row = {
        "id": ID, "recipe8": experiment.recipe8, "seed": 1, "steps": 200, "tasks": [one],
        "validation": {
            "trained_on": "a" * 64, "data": "a" * 64, "window": 256, "trained_window": 256, "stride": 256,
            "windows": 1, "of_windows": 1,
        },
        "environment": {"devices": ["cpu"], "date": "2026-01-02", "commit": "abcdef0", "dirty": False},
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(row))
    assert main(["figure", "figure2", "--scale", "tiny", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{one['metrics']['4096']:.2f}" in out and "QMSum" in out
    assert (tmp_path / "figure2-tiny.png").stat().st_size > 20_000
    (drawn,) = figures.rows("tiny")
    assert drawn["marks"] == ["own rows, n = 1"] and drawn["protocol"]["left_out"] == 0
    assert drawn["prefix"][20480] == one["metrics"]["20480"] and drawn["buckets"][2048] == one["metrics"]["bucket_2048"]
    (directory / "result.json").unlink()


def test_any_text_is_scored(capsys, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"The lamp was lit\r\n" * 200)  # bytes are counted as they are
    assert main(["eval", ID, "--text", str(tmp_path / "a.txt"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["bytes"], row["words"], row["tokens"], row["max_length"]) == (3600, 800, 3600, 2048)
    assert row["nats_per_byte"] == pytest.approx(-row["log_likelihood"] / 3600)
    assert row["nats_per_byte"] == pytest.approx(math.log(320), abs=0.3), "random parameters"


def test_requests_are_written_and_answered(capsys, tmp_path):
    path = tmp_path / "requests.jsonl"
    words = ["--tasks", "table3/winogrande", "--task_data", str(ROWS)]
    assert main(["eval", ID, *words, "--requests", str(path)]) == 0
    assert "Wrote 4 requests" in capsys.readouterr().out
    assert main(["eval", ID, "--answer", str(path)]) == 0
    assert "holds the answers of 4 requests." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tasks", "table4/swed", "--task_data", str(ROWS)], "table4 has no task 'swed'; it has swde, squad"),
        (["--tasks", "tabel4"], "There is no task 'tabel4'"),
        (["--tasks", "table4"], "table4 reads local files; name their folder with --task_data."),
        (["--tasks", "table4", "--task_data", "nowhere"], "nowhere is no folder; --task_data names one"),
        (["--tasks", "table4", "--task_data", "."], "There is no swde.jsonl or .jsonl.gz with the columns"),
        (["--tasks", "table3", "--limit", "0"], "limit is 0; it must be positive, or left out for all."),
        (["--tasks", "table3", "--max_length", "0"], "max_length is 0; it must be positive."),
        (["--tasks", "table2", "--haystack", "none.txt"], "The haystack none.txt cannot be read"),
        (["--tasks", "figure2", "--task_data", "."], ". holds no corpus; it takes gov_report.jsonl"),
        (["--tasks", "table3", "--text", "a.txt"], "--tasks and --text ask for two things; give one of them."),
        (["--requests", "a.jsonl"], "--requests writes the requests of tasks; name them with --tasks."),
        (["--text", "none.txt"], "none.txt"),
        (["--answer", "none.jsonl"], "none.jsonl holds no requests"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_get_one_sentence(capsys, words, sentence):
    assert main(["eval", ID, *words]) == 2
    out, err = capsys.readouterr()
    assert sentence in err and len(err.strip().splitlines()) <= 2 and out == ""


def test_a_figures_row_is_of_the_seeds_that_its_curve_is_of(monkeypatch):
    """A seed without the corpus, an older row without tasks, a limited one add nothing; one legend for all."""

    def read(corpus, value, n=99, **change):
        metrics = {str(length): value for length in figures.figure2.LENGTHS} | {"bucket_0": value - 1}
        return entry(suite="figure2", task=corpus, n=n, of=99, metrics=metrics, protocol={"sequences": n}, **change)

    def row(seed, *tasks):
        trained = {"trained_on": "a" * 64, "data": "a" * 64, "window": 1, "trained_window": 1, "stride": 1}
        return {
            "recipe8": "r", "seed": seed, "steps": 5, "tasks": list(tasks),
            "validation": trained | {"windows": 1, "of_windows": 1, "step": 5, "of_steps": 5},
            "environment": {"devices": ["cpu"], "date": "2026-01-02", "commit": "abcdef0", "dirty": False},
        }  # fmt: skip

    old = row(3)
    del old["tasks"]
    found = {
        ID: [row(0, read("qmsum", 10.0)), row(1), row(2, read("qmsum", 99.0, n=2)), old],
        "table3/samba/tiny": [row(0, read("pg19", 5.0, n=100) | {"of": 100})],
        "table3/retnet/tiny": [row(0, read("qmsum", 10.0)), row(1, read("qmsum", 12.0))],
        "table3/mamba/tiny": [row(0, read("qmsum", 8.0, n=2))],
    }
    monkeypatch.setattr(
        figures.published, "of_experiment", lambda one, runs: figures.published.results(found.get(one.id, []))
    )
    drawn = {one["model"]: one for one in figures.rows("tiny")}
    ours = drawn["gated-deltanet"]
    assert (ours["prefix"][4096], ours["buckets"], ours["documents"], ours["marks"]) == (10.0, {0: 9.0}, 99, [])
    assert (ours["seeds"], ours["of_seeds"], ours["protocol"]) == (1, 4, {"sequences": 99})
    assert (drawn["retnet"]["prefix"][4096], drawn["retnet"]["buckets"]) == (11.0, {0: 10.0})
    picture = figures.draw("tiny", list(drawn.values()))
    legend = [text.get_text() for text in picture.legends[0].get_texts()]
    assert sorted(legend) == ["gated-deltanet", "mamba (n = 2 of 99)", "retnet", "samba"]
    assert "; of 1" in figures.described([ours])


def test_a_figure_without_runs(capsys):
    assert main(["figure", "figure2", "--scale", "desk"]) == 2
    assert "No run at desk was evaluated for figure2; begin with: gdn run figure2/" in capsys.readouterr().err
    assert main(["figure", "figure22"]) == 2
    assert "There is no figure 'figure22' (did you mean 'figure2'?)" in capsys.readouterr().err


def run_of(id, directory, step):
    """A run of the ID that says nothing."""
    byte = tokenizer.load("byte")
    return OpenRun(directory, experiments.get(id), scripted_model({}), step, Identity("a" * 64, byte.hash8), byte)


def test_imported_parameters_have_no_unfinished_training(tmp_path):
    suite = Suite("table3", {}, lambda *_: {"metrics": {}, "n": 1, "of": 1, "protocol": {}, "stand_in": ""})
    run = replace(run_of(ID, tmp_path, 0), trained_on=Identity(None, tokenizer.load("byte").hash8))
    assert suites.measure(suite, ["t"], Answering(run), Asked())[0]["marks"] == []


def test_an_unfinished_training_is_marked(tmp_path):
    suite = Suite("table3", {}, lambda *_: {"metrics": {}, "n": 1, "of": 1, "protocol": {}, "stand_in": ""})
    (one,) = suites.measure(suite, ["t"], Answering(run_of(ID, tmp_path, 50)), Asked())
    assert one["marks"] == ["step 50 of 200"]
    with pytest.raises(UserError, match="limit is -1"):
        Asked(limit=-1)


def test_imported_parameters_are_of_no_unfinished_training(tmp_path):
    suite = Suite("table3", {}, lambda *_: {"metrics": {}, "n": 1, "of": 1, "protocol": {}, "stand_in": ""})
    run = replace(run_of(ID, tmp_path, 0), trained_on=Identity(None, tokenizer.load("byte").hash8))
    assert suites.measure(suite, ["t"], Answering(run), Asked())[0]["marks"] == []


def test_a_number_names_the_devices_and_the_program_that_gave_its_answers(tmp_path):
    def measured():
        options = Asked(folder=ROWS)
        return suites.measure(table4.SUITE, ["squad"], Answering(run_of(ID, tmp_path, 200), compute=FP32), options)[0]

    path, first = tmp_path / "answers.jsonl", measured()
    assert first["marks"] == [] and first["environment"]["devices"] == ["cpu"] * jax.device_count()
    maker, *lines = path.read_text().splitlines(keepends=True)
    maker = json.loads(maker)["made_by"]
    assert maker == {name: first["environment"][name] for name in ("commit", "dirty", "source", "devices")}

    def by(**change):
        path.write_text(json.dumps({"made_by": maker | change}) + "\n" + "".join(lines))

    by(devices=["NVIDIA H200"], dirty=True)
    found = measured()
    assert found["environment"] == first["environment"] | {
        "devices": ["NVIDIA H200"], "dirty": True, "date": found["environment"]["date"],
    }  # fmt: skip
    assert (found["metrics"], found["marks"]) == (first["metrics"], [])
    by(source="0ther", commit="abcdef0", dirty=False)
    assert measured()["marks"] == ["answers of source 0ther, commit abcdef0"]
    path.write_text("".join(lines))
    found = measured()
    assert found["marks"] == ["answers of an unknown program"] and found["metrics"] == first["metrics"]
    assert path.read_text() == "".join(lines), "nothing was asked twice"


def test_worked_examples_are_recorded_and_mark_a_column(tmp_path):
    def measure(task, fewshot):
        row = {"metrics": {}, "n": 1, "of": 1, "protocol": {"fewshot": fewshot}, "stand_in": ""}
        suite = replace(table3.SUITE, measure=lambda *_: row)
        return suites.measure(suite, [task], Answering(run_of(ID, tmp_path, 200)), Asked(fewshot=fewshot))[0]

    assert measure("piqa", 0)["marks"] == [] and measure("gsm8k", 5)["marks"] == []
    assert measure("piqa", 5)["marks"] == ["5 worked examples in place of none"]
    assert "table3/gsm8k, 5 worked examples" in described([measure("gsm8k", 5)])
    with pytest.raises(UserError, match="fewshot is -1; it must be 0 or more"):
        Asked(fewshot=-1)


def test_marks_of_a_task_without_a_column_are_shown():
    one = entry(task="sciq", marks=["step 100 of 200", "max_length 64 in place of 2,048"])
    assert "  step 100 of 200; max_length 64 in place of 2,048" in described([one])
    assert "  n = 3 of 10; step 100 of 200; max_length 64 in place of 2,048" in described([one | {"n": 3}])


@pytest.mark.parametrize(
    ("id", "asked", "read", "marks"),
    [
        ("table3/gated-deltanet/1.3b", None, 16384, []),
        ("table3/gated-deltanet/1.3b", 600, 600, ["max_length 600 in place of 16,384"]),
        (ID, None, 2048, []),
        (ID, 600, 600, ["max_length 600 in place of 2,048"]),
    ],
)
def test_table5_is_cut_to_its_own_length_unless_another_is_asked(tmp_path, id, asked, read, marks):
    run = run_of(id, tmp_path, experiments.get(id).optim.steps)
    options = Asked(folder=ROWS, max_length=asked)
    (one,) = suites.measure(table5.SUITE, ["trec"], Answering(run, compute=FP32, max_length=asked), options)
    assert (one["protocol"]["max_length"], one["marks"]) == (read, marks)


def test_another_length_of_whole_texts_is_marked(tmp_path):
    def measure(suite, **asked):
        row = {"metrics": {}, "n": 1, "of": 1, "protocol": {}, "stand_in": ""}
        answering = Answering(run_of(ID, tmp_path, 200), **asked)
        return suites.measure(replace(suite, measure=lambda *_: row), ["t"], answering, Asked(**asked))[0]["marks"]

    assert measure(table3.SUITE) == [] and measure(table3.SUITE, max_length=512) == ["max_length 512 in place of 2,048"]
    assert measure(table4.SUITE, max_length=512) == [], "cut to 2K in its own way"


def test_an_option_that_nothing_reads_is_refused_and_not_recorded(tmp_path):
    for tasks, options, named in (
        ("table4", {"max_length": 1024}, "--max_length changes nothing in table4; leave it out."),
        ("table2,figure2", {"max_length": 1024}, "--max_length changes nothing in table2, figure2; leave it out."),
        ("piqa", {"haystack": "any.txt"}, "--haystack changes nothing in table3; leave it out."),
        ("table5", {"fewshot": 0}, "--fewshot changes nothing in table5; leave it out."),
    ):
        with pytest.raises(UserError, match=named):
            checked(TaskOptions(tasks=tasks, **options))
    assert checked(TaskOptions(tasks="table4,piqa", max_length=1024))[0].max_length == 1024
    assert checked(TaskOptions(max_length=1024))[1] == [], "a text is read at this length"
    row = {"metrics": {}, "n": 1, "of": 1, "protocol": {"context_length": 2048}, "stand_in": ""}
    answering = Answering(run_of(ID, tmp_path, 200), max_length=512)
    (one,) = suites.measure(replace(table4.SUITE, measure=lambda *_: row), ["swde"], answering, Asked(max_length=512))
    assert one["protocol"] == {"limit": None, "context_length": 2048}
