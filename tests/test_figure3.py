"""Figure 3: its IDs, points that are measured once and kept, the paper's claims judged, what is drawn and printed."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import experiments
from experiments import drawn_figure3, published, timed_step, training_speed
from experiments.figure3 import SETTINGS
from experiments.models import PAPER_MODELS
from experiments.report import PAPER
from experiments.run import main
from experiments.training_speed import Point, SpeedOptions
from gdn_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ID, H100 = "figure3/gated-deltanet/tiny", "NVIDIA H100 80GB HBM3"
WORDS = ["bench", "figure3", "--scale", "tiny", "--models", "gated-deltanet", "--warm_up", "1", "--repetitions", "2"]


def gdn(directory, *words, **environment):
    """The command as a user starts it, on this CPU."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *WORDS, *words],
        capture_output=True, text=True, timeout=300, cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(JSON, what was said, exit code, directory) of two points, measured by processes of their own."""
    directory = tmp_path_factory.mktemp("figure3")
    done = gdn(directory, "--settings", "64x8,256x2", "--step_profile", "--out", "out", "--json")
    return json.loads(done.stdout), done.stderr, done.returncode, directory


# --- IDs ---


def test_the_ids_time_table_3s_models_at_one_number_of_tokens():
    assert len(experiments.TIMINGS) == 10 * 3
    for timing in experiments.TIMINGS.values():
        assert timing.id == f"figure3/{timing.model}/{timing.scale}" and timing.of.id.startswith("table3/")
        tokens = {seq_len * batch_size for seq_len, batch_size in timing.settings.values()}
        assert tokens == ({512} if timing.scale == "tiny" else {32768})
    timing = experiments.TIMINGS["figure3/gated-deltanet/1.3b"]
    assert list(timing.settings) == ["2Kx16", "4Kx8", "8Kx4", "16Kx2"]
    one, trained = timing.experiment("16Kx2"), experiments.get("table3/gated-deltanet/1.3b")
    assert (one.data.seq_len, one.optim.batch_size, one.run.micro_batches) == (16384, 2, 1)
    assert one.model == trained.model and one.run == replace(trained.run, micro_batches=1)
    assert one.optim.precision == trained.optim.precision == "bf16" and one.id == timing.id
    with pytest.raises(UserError, match=r"no setting '4Kx4' at 1.3b \(did you mean '.*'\?\); there are 2Kx16, 4Kx8"):
        timing.experiment("4Kx4")


def test_they_are_listed_and_every_other_command_names_the_one_that_runs_them(capsys):
    assert main(["list", "figure3/mamba2/*", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [f"figure3/mamba2/{scale}" for scale in ("tiny", "400m", "1.3b")]
    assert rows[2]["of"] == "table3/mamba2/1.3b" and (rows[2]["kind"], rows[2]["tokens"]) == ("times", 32768)
    assert rows[2]["settings"] == ["2Kx16", "4Kx8", "8Kx4", "16Kx2"]
    for words in (["train", "figure3/mamba2/1.3b"], ["bench", "figure3/mamba2/1.3b"], ["show", "figure3/mamba2/1.3b"]):
        assert main(words) == 2
        sentence = "times the training step of table3/mamba2/1.3b and trains nothing; run: gdn bench figure3 --models"
        assert sentence in capsys.readouterr().err


# --- points ---


def test_a_point_is_the_training_step_timed_where_it_says(measured):
    found, said, code, _ = measured
    assert code == 0 and [row["setting"] for row in found["rows"]] == ["64x8", "256x2"]
    for row in found["rows"]:
        experiment = experiments.TIMINGS[ID].experiment(row["setting"])
        assert (row["id"], row["recipe8"], row["parameters"]) == (ID, experiment.recipe8, 537_874)
        assert 0 < row["least"] <= row["tokens_per_s"] <= row["most"]
        assert row["tokens_per_s"] == pytest.approx(512 / (row["step_ms"] / 1e3))
        assert row["impl"]["gated_delta_rule"]["impl"] == "chunked" and len(row["impl"]) == 4
        assert row["run"] == {
            "remat": "none", "scan_layers": True, "micro_batches": 1, "impl": "auto", "chunk": 64, "residuals": "saved",
        }  # fmt: skip
        assert row["changed"] == {} and row["note"] == "" and row["compile_seconds"] > 0
        # random bytes: the loss of a model that knows nothing
        assert row["losses"] == pytest.approx([math.log(320)] * 2, abs=0.1) and row["losses"][0] != row["losses"][1]
        assert 12 * 537_874 < row["planned_bytes"] < 2**30 and row["peak_bytes"] is row["mfu"] is None
        assert row["profile"] is None, "a CPU's trace has no line of a device"
        here = row["environment"]
        assert here["devices"][0] == "cpu" and here["commit"] and here["date"] and here["versions"]["jax"]
    assert "[2/2] gated-deltanet 256x2: " in said and " tokens/s, step " in said


def test_points_are_kept_one_by_one_and_a_changed_one_is_another(measured):
    """Stopped after one point, the command goes on with the other; a crash costs one row and is tried again."""
    found, _, _, directory = measured
    folder = directory / "runs" / ID
    assert sorted(path.name for path in folder.iterdir()) == ["256x2.json", "64x8.json"]
    before = (folder / "64x8.json").read_text()
    assert json.loads(before) == found["rows"][0]
    # kept ones are taken as they are, and one that is missing ends without a word that could be read
    crashed = gdn(directory, "--settings", "64x8,128x4", "--timeout", "1")
    lines = crashed.stderr.splitlines()
    assert crashed.returncode == 1 and lines[-2].startswith("[1/2] kept, gated-deltanet 64x8: ")
    assert lines[-1] == "[2/2] gated-deltanet 128x4: failed: no result within 1 s"
    (line,) = (line for line in crashed.stdout.splitlines() if "| 128x4 |" in line)
    assert line.startswith("| gated-deltanet | 128x4 | not run | - | not run |")
    assert line.endswith("| failed: no result within 1 s |")
    assert (folder / "64x8.json").read_text() == before
    row = json.loads((folder / "128x4.json").read_text())
    assert row["tokens_per_s"] is None and row["environment"]["devices"][0] == "cpu"


def test_a_signal_keeps_what_was_measured(measured):
    _, _, _, directory = measured
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *WORDS, "--settings", "64x8,512x1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stderr.readline().startswith("[1/2] kept, gated-deltanet 64x8: ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines()[-1] == "Stopped; what was measured is kept, and the same command goes on."
    (line,) = (line for line in out.splitlines() if "| 512x1 |" in line)
    assert line.endswith("| remat none, layers scanned, 1 micro-batch | not run |")
    assert not (directory / "runs" / ID / "512x1.json").exists()


def point(**changed):
    options = {"remat": "id", "micro_batches": 1, "impl": "auto", "warm_up": 1, "repetitions": 2, "step_profile": False}
    return Point(**({"id": ID, "setting": "64x8"} | options | changed))


def test_only_what_would_be_measured_again_is_taken_from_what_is_kept(measured, monkeypatch):
    found, _, _, directory = measured
    monkeypatch.chdir(directory)
    here = found["rows"][0]["environment"]
    assert training_speed.kept(point(step_profile=True), here) == found["rows"][0]
    for other in (point(repetitions=3), point(warm_up=2), point(remat="full"), point(setting="512x1")):
        assert training_speed.kept(other, here) is None
    for field, value in (("code", "other"), ("devices", [H100]), ("python", "3.0")):
        assert training_speed.kept(point(), here | {field: value}) is None
    assert training_speed.kept(point(), here | {"source": "other", "commit": "other"}) is not None
    path = training_speed.KEPT / ID / "64x8.json"
    row = found["rows"][0]
    for note, taken in (("failed: SIGKILL, gone", False), ("out of memory with remat none", True)):
        path.write_text(json.dumps(row | {"note": note, "tokens_per_s": None}))
        assert (training_speed.kept(point(), here) is not None) == taken
    path.write_text(json.dumps(row | {"run": row["run"] | {"remat": "full"}}))  # the ID's own was another one then
    assert training_speed.kept(point(), here) is None
    path.write_text(json.dumps(row))
    assert point(remat="full", micro_batches=2).path.name == "64x8-remat-full-micro-batches-2.json"
    assert point(remat="none", micro_batches=1).path.name == "64x8.json", "the ID's own"


def test_out_of_memory_is_said_with_what_would_need_less():
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jnp.zeros((1 << 22, 1 << 22)).block_until_ready()
    said = timed_step.failure(error.value, point(remat="products", micro_batches=2).experiment)
    start = "out of memory with remat products and 2 micro-batches a step: RESOURCE_EXHAUSTED: Out of memory"
    assert said.startswith(start) and "\n" not in said
    assert timed_step.failure(RuntimeError("INTERNAL: no\nmore"), point().experiment) == "failed: INTERNAL: no"


def test_an_implementation_that_cannot_run_is_a_refusal_in_its_row():
    row = training_speed.measure(point(impl="triton"))
    assert row["note"].startswith("refuses: run.impl is 'triton', which cannot run gated_norm here (the device is cpu")
    assert row["tokens_per_s"] is None and row["changed"] == {"impl": "triton"}


# --- the paper's claims ---


def rows(speeds, scale="1.3b", kind=H100, **changed):
    """Points with these tokens/s, as if they had been measured."""
    found = []
    for model, values in speeds.items():
        for setting, value in zip(SETTINGS[scale], values, strict=True):
            one = point(id=f"figure3/{model}/{scale}", setting=setting, **changed)
            numbers = {"tokens_per_s": value, "least": value - 1, "most": value + 1, "step_ms": 32768e3 / value}
            numbers |= {"mfu": 0.5, "compile_seconds": 60.0, "peak_bytes": 3 * 2**30, "limit_bytes": 5 * 2**30}
            here = {"devices": [kind], "versions": {"jax": "0.11.2"}, "python": "3.12", "date": "2026-11-27T00:00"}
            here |= {"commit": "abcdef123", "dirty": False, "source": "0" * 8}
            found.append(training_speed._row(one) | numbers | {"environment": here})
    return found


AS_PAPER = {
    "retnet": [4e4] * 4, "hgrn2": [4e4] * 4, "mamba": [3.8e4] * 4, "mamba2": [4.8e4] * 4, "deltanet": [4.55e4] * 4,
    "gated-deltanet": [4.5e4] * 4, "transformer": [5.5e4, 4.8e4, 3.8e4, 2.65e4], "samba": [4.5e4, 4.4e4, 4.4e4, 4.3e4],
    "gated-deltanet-h1": [5.5e4, 5.4e4, 5.3e4, 5.25e4], "gated-deltanet-h2": [4.95e4] * 4,
}  # fmt: skip


def verdicts(speeds, **changed):
    return [one["verdict"] for one in drawn_figure3.claims("1.3b", rows(speeds, **changed))]


def test_the_papers_own_numbers_hold_every_claim():
    found = drawn_figure3.claims("1.3b", rows(AS_PAPER))
    assert [one["verdict"] for one in found] == ["holds"] * 8
    assert found[0]["numbers"] == "2Kx16 0.99, 4Kx8 0.99, 8Kx4 0.99, 16Kx2 0.99 times deltanet"
    assert found[1]["numbers"] == "2Kx16 +3.0K, 4Kx8 +3.0K, 8Kx4 +3.0K, 16Kx2 +3.0K behind mamba2"
    assert found[3]["numbers"] == "transformer 55.0K, gated-deltanet-h1 55.0K, gated-deltanet-h2 49.5K"
    assert found[4]["numbers"] == "of 2Kx16, at 16Kx2: transformer 48%, gated-deltanet-h1 95%"


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({"gated-deltanet": [4.5e4, 4.5e4, 4.5e4, 4.2e4]}, [0, 1]),  # 0.92 of DeltaNet, 6K behind Mamba2, at 16K
        ({"mamba2": [4.5e4] * 4}, [1, 2]),
        ({"gated-deltanet-h1": [5.6e4] * 4}, [3]),
        ({"samba": [4.5e4, 4.4e4, 4.4e4, 2e4]}, [4, 5]),
        ({"gated-deltanet-h1": [4.5e4] * 4}, [6]),
        ({"gated-deltanet-h2": [4.95e4, 4.95e4, 4.95e4, 4.5e4]}, [7]),
    ],
)
def test_each_claim_can_fail(changed, failing):
    assert [index for index, verdict in enumerate(verdicts(AS_PAPER | changed)) if verdict == "fails"] == failing


def test_a_claim_without_its_points_is_not_run():
    without = {model: values for model, values in AS_PAPER.items() if model != "deltanet"}
    found = drawn_figure3.claims("1.3b", rows(without))
    assert [one["verdict"] == "not run" for one in found] == [True, False, True, True, True, False, False, False]
    assert found[0]["numbers"] == "without deltanet 2Kx16, deltanet 4Kx8, deltanet 8Kx4 and 1 more"
    assert verdicts(AS_PAPER, remat="full") == ["not run"] * 8, "measured otherwise than the IDs say"
    failed = [row | {"note": "failed: the loss is nan"} for row in rows(AS_PAPER)]
    assert {one["verdict"] for one in drawn_figure3.claims("1.3b", failed)} == {"not run"}


# --- for a reader ---


def test_devices_are_apart_and_a_changed_point_is_marked():
    two = {model: AS_PAPER[model] for model in ("gated-deltanet", "retnet")}
    found = drawn_figure3.collected("1.3b", [*rows(two), *rows(two, kind="NVIDIA H200"), *rows(two, remat="full")])
    assert list(found["claims"]) == [H100, "NVIDIA H200"] and list(found["paper"]) == [
        model for model in PAPER_MODELS if model not in ("retnet", "hgrn2")
    ]  # fmt: skip
    text = drawn_figure3.markdown(found)
    assert (
        "| gated-deltanet | 2Kx16 | 45,000 (44,999 to 45,001) | about 45.5K | 50.0% | 728.2 | 3.0 of 5.0 | 60.0 |"
        in text
    )
    assert "remat full, layers written out, 1 micro-batch (not the ID's remat) | ok |" in text
    assert text.count("(jla): not run, flash-linear-attention (FLA): not run\n") == 2
    assert text.count("- Points: 8 of 40 have a number as their IDs say\n") == 2
    assert "commit abcdef123" in text and "- Device: NVIDIA H200\n" in text
    picture = drawn_figure3.draw(found)
    titles = [panel.get_title() for panel in picture.axes]
    assert titles == [H100, "NVIDIA H200", "paper, read from the figure"]
    (ours, _, read) = ({line.get_label(): line for line in panel.lines} for panel in picture.axes)
    assert list(ours["gated-deltanet"].get_ydata()) == [45.0] * 4 and "gated-deltanet-remat-full" in ours
    assert list(read["transformer (paper, read from the figure)"].get_ydata()) == [55.0, 26.5]
    assert list(read["transformer (paper, read from the figure)"].get_xdata()) == [0, 3]


def test_the_papers_curves_name_their_source():
    paper = {id: entry for id, entry in json.loads(PAPER.read_text()).items() if id.startswith("figure3/")}
    assert len(paper) == 8 and set(paper) < set(experiments.TIMINGS)
    for id, entry in paper.items():
        assert "Figure 3" in entry["source"] and "read from the figure, approximate" in entry["source"]
        assert set(entry["numbers"]) == {"2Kx16", "16Kx2"} < set(experiments.TIMINGS[id].settings)


def test_the_figure_is_drawn_from_what_is_kept(measured, monkeypatch, capsys, tmp_path):
    found, _, _, directory = measured
    monkeypatch.chdir(directory)
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    assert {path.name for path in (directory / "out").iterdir()} == {f"figure3-tiny.{x}" for x in ("md", "json", "png")}
    assert json.loads((directory / "out" / "figure3-tiny.json").read_text()) == found
    text = (directory / "out" / "figure3-tiny.md").read_text()
    assert "chunked: gated_norm, short_conv, gated_delta_rule, linear_cross_entropy" in text
    assert "not run: the profiler's trace has no line of a device, as on a CPU" in text
    assert "- Device: cpu; speeds of a CPU say nothing about a GPU" in text
    assert main(["figure", "figure3", "--scale", "tiny", "--out", str(tmp_path), "--json"]) == 0
    drawn = json.loads(capsys.readouterr().out)
    assert [row for row in drawn["rows"] if not row["note"]] == found["rows"]
    assert (tmp_path / "figure3-tiny.png").stat().st_size > 10_000
    # a published point stands where no newer one was measured here
    row = found["rows"][0]
    clean = row | {"environment": row["environment"] | {"dirty": False, "commit": "abcdef1"}}
    (tmp_path / "64x8.json").write_text(json.dumps(clean))
    kept = published.publish_point(tmp_path / "64x8.json")
    assert kept == tmp_path / "results" / ID / row["recipe8"] / "64x8-4-x-cpu.json"
    monkeypatch.chdir(tmp_path)
    assert drawn_figure3.kept_rows("tiny") == [clean]
    kept.write_text(json.dumps(clean | {"recipe8": "older"}))
    assert drawn_figure3.kept_rows("tiny") == []
    (tmp_path / "64x8.json").write_text(json.dumps(row | {"note": "failed: gone"}))
    with pytest.raises(UserError, match=r"holds no number \(failed: gone\); measure it again"):
        published.publish_point(tmp_path / "64x8.json")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("bench figure3 --models gated-deltane", "models names 'gated-deltane' (did you mean 'gated-deltanet'?); it"),
        ("bench figure3 --scale tiny --settings 2Kx16", "settings names '2Kx16'"),
        ("bench figure3 --scale tiny --micro_batches 3", "run.micro_batches is 3; it must divide optim.batch_size 8."),
        ("bench figure3 --repetitions 0", "repetitions is 0; it must be positive."),
        ("bench figure3 --remat some", "--remat is 'some'; it must be one of id, none, products, kernels, "),
        ("figure figure3 --scale desk", "figure3 has no scale 'desk'; it has tiny, 400m, 1.3b."),
        ("figure figure3 --scale 400m", "No step at 400m was timed for figure3; begin with: gdn bench figure3"),
        ("figure figure4", "There is no figure 'figure4' (did you mean 'figure3'?)"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence(capsys, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err and not any(tmp_path.iterdir())


def test_mfu_is_of_the_data_sheets_peak():
    """What a step of 45,000 tokens/s is on an H100, by hand: about 8.1 GFLOP a token of 989 TFLOP/s."""
    experiment = experiments.TIMINGS["figure3/gated-deltanet/1.3b"].experiment("4Kx8")
    by_hand = 45_000 * 3 * (2 * 1.3088e9 + 16 * 9 * (6 * 200 * 400 + 256 * 600)) / 989e12
    assert timed_step.mfu(experiment, 45_000.0, H100) == pytest.approx(by_hand, rel=1e-3)
    assert by_hand == pytest.approx(0.37, abs=0.005)
    assert timed_step.mfu(experiment, 45_000.0, "cpu") is None
    assert SpeedOptions().scale == "1.3b" and len(training_speed.points(SpeedOptions())) == 40
