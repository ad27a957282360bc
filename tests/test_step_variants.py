"""`gdn bench figure3` otherwise than its IDs say: over several devices, without the decay; beside what that is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import drawn_figure3, published, training_speed
from experiments.run import main
from experiments.training_speed import SpeedOptions, points
from gdn_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ID = "figure3/gated-deltanet/tiny"
FLAGS = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=2")
WORDS = ["bench", "figure3", "--scale", "tiny", "--models", "gated-deltanet", "--settings", "64x8"]
SHORT = ["--warm_up", "1", "--repetitions", "2"]


def gdn(directory, *words):
    """The command as a user starts it, where there are two simulated devices."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", *WORDS, *SHORT, *words], cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(JSON, directory) of one device, two with copies and two that share the parameters, in one command."""
    directory = tmp_path_factory.mktemp("variants")
    done = gdn(directory, "--devices", "1,2", "--fsdp", "1,2", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), directory


def point(**options):
    (found,) = points(SpeedOptions(**({"scale": "tiny", "models": "gated-deltanet", "settings": "64x8"} | options)))
    return found


# --- several devices ---


def test_rows_are_counted_by_device_and_the_ids_own_point_is_apart(measured):
    found, directory = measured
    assert [(row["batch_size"], row["changed"]) for row in found["rows"]] == [
        (8, {}), (16, {"devices": 2}), (16, {"devices": 2, "fsdp": 2}),
    ]  # fmt: skip
    for row in found["rows"]:
        tokens = row["batch_size"] * 64
        assert row["tokens_per_s"] == pytest.approx(tokens / (row["step_ms"] / 1e3)) and row["note"] == ""
    copies, shared = found["rows"][1:]
    assert copies["losses"] == pytest.approx(shared["losses"], rel=1e-5), "the same rows, however they are split"
    # parameters and two moments in fp32: each device has all of them, or half of nearly all
    saved = copies["planned_bytes"] - shared["planned_bytes"]
    assert 4 * 537_874 < saved < 8 * 537_874
    names = {path.name for path in (directory / "runs" / ID).iterdir()}
    assert names == {"64x8.json", "64x8-devices-2.json", "64x8-devices-2-fsdp-2.json"}


def test_a_point_of_two_devices_is_never_taken_for_the_ids_own(measured, monkeypatch, tmp_path):
    found, directory = measured
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(directory)
    assert drawn_figure3.kept_rows("tiny") == found["rows"][:1], "the figure"
    own = found["rows"][0]["environment"]
    for row in found["rows"]:
        clean = row | {"environment": own | {"dirty": False, "commit": "abcdef1"}}
        path = tmp_path / training_speed.name("64x8", row["changed"])
        path = path.with_name(path.name + ".json")
        path.write_text(json.dumps(clean))
        published.publish_point(path)
    monkeypatch.chdir(tmp_path)
    assert [row["changed"] for row in drawn_figure3.kept_rows("tiny")] == [{}]
    assert "- Points: 1 of 40 have a number as their IDs say\n" in drawn_figure3.markdown(found)


def test_kept_points_are_taken_by_what_was_asked(measured, monkeypatch):
    found, directory = measured
    monkeypatch.chdir(directory)
    here = found["rows"][0]["environment"]
    asked = {"warm_up": 1, "repetitions": 2}
    for row in found["rows"]:
        mesh = {field: str(row["changed"].get(field, 1)) for field in ("devices", "fsdp")}
        assert training_speed.kept(point(**asked, **mesh), here) == row
    path = training_speed.KEPT / ID / "64x8-devices-2.json"
    own = path.read_text()
    path.write_text(json.dumps(found["rows"][2]))
    assert training_speed.kept(point(devices="2", **asked), here) is None, "of devices that share"
    path.write_text(own)


def row(speed, **changed):
    """A point with this speed, as if it had been measured."""
    numbers = {"tokens_per_s": speed, "least": speed - 10, "most": speed + 10, "step_ms": 1.0, "compile_seconds": 1.0}
    here = {"devices": ["cpu"], "versions": {}, "date": "2026-11-30", "commit": "abcdef123", "dirty": False}
    return training_speed._row(point(**changed)) | numbers | {"planned_bytes": 1, "environment": here}


def test_a_speed_is_said_as_a_multiple_of_one_devices():
    one, copies, shared = row(1000), row(1950, devices="2"), row(1900, devices="2", fsdp="2")
    found = drawn_figure3.collected("tiny", [copies, one, shared])
    assert [two["ratio"] for two in found["compared"]["cpu"]] == [1.95, 1.9]
    text = drawn_figure3.markdown(found)
    assert "training throughput, 1 or 2 devices, tokens/s of all of them\n" in text
    said = "- gated-deltanet 64x8-devices-2-fsdp-2 1,900 (1,890 to 1,910): 1.90x one device, 64x8 1,000 (990 to 1,010)"
    assert said in text and "(1,940 to 1,960): 1.95x one device, 64x8 1,000" in text
    assert "1 micro-batch, devices 2, fsdp 2 (not the ID's devices, fsdp) | ok |" in text
    # of what was computed otherwise one device is no measure, nor one that failed
    full = row(1800, devices="2", remat="full")
    assert drawn_figure3.compared([one, full]) == []
    assert drawn_figure3.compared([row(900, remat="full"), full])[0]["ratio"] == 2.0
    assert drawn_figure3.compared([one | {"note": "failed: gone"}, copies]) == []
    assert "Points that differ" not in drawn_figure3.markdown(drawn_figure3.collected("tiny", [one]))


# --- without the decay ---


def test_the_decay_is_switched_off_in_one_of_two_points(tmp_path):
    done = gdn(tmp_path, "--decay", "on,off", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    on, off = found["rows"]
    assert (on["changed"], off["changed"]) == ({}, {"decay": False})
    # of each of two layers W_a [128, 3], A_log [3] and dt_bias [3] are gone
    assert on["parameters"] - off["parameters"] == 2 * (128 * 3 + 3 + 3)
    assert on["recipe8"] != off["recipe8"] and on["losses"] != off["losses"] and off["note"] == ""
    assert off["impl"] == on["impl"] and off["batch_size"] == 8
    (beside,) = found["compared"]["cpu"]
    assert beside["ratio"] == off["tokens_per_s"] / on["tokens_per_s"] and beside["against"] == "decay"
    assert beside["other"] == {"name": "64x8"} | {name: on[name] for name in ("tokens_per_s", "least", "most")}
    names = {path.name for path in (tmp_path / "runs" / ID).iterdir()}
    assert names == {"64x8.json", "64x8-decay-False.json"}
    assert [claim["verdict"] for claim in found["claims"]["cpu"]] == ["not run"] * 8


def test_the_difference_is_said_in_per_cent():
    rows = [row(1000), row(1016, decay="off"), row(1950, devices="2"), row(1911, devices="2", decay="off")]
    found = drawn_figure3.collected("tiny", rows)
    assert [(one["against"], one["point"]["name"], one["other"]["name"]) for one in found["compared"]["cpu"]] == [
        ("decay", "64x8-decay-False", "64x8"), ("one device", "64x8-devices-2", "64x8"),
        ("one device", "64x8-devices-2-decay-False", "64x8-decay-False"),
        ("decay", "64x8-devices-2-decay-False", "64x8-devices-2"),
    ]  # fmt: skip
    text = drawn_figure3.markdown(found)
    assert (
        "\n- gated-deltanet 64x8-decay-False 1,016 (1,006 to 1,026): +1.6% against 64x8 1,000 (990 to 1,010)\n" in text
    )
    assert "(1,901 to 1,921): -2.0% against 64x8-devices-2 1,950 (1,940 to 1,960)\n" in text
    assert "1 micro-batch, decay False (not the ID's decay) | ok |" in text
    assert "- Points: 1 of 40 have a number as their IDs say\n" in text


def test_hybrids_have_a_decay_and_other_models_none():
    h1 = point(models="gated-deltanet-h1", decay="off").experiment.model
    assert h1.pattern == ("gated_deltanet", "swa") and not h1.gated_deltanet.decay
    with pytest.raises(UserError, match=r"^decay names off, and mamba2 has no gated_deltanet layer; gated-deltanet, "):
        points(SpeedOptions(models="gated-deltanet,mamba2", decay="on,off"))
    with pytest.raises(UserError, match=r"^decay names 'of' .*; it must be all or some of on, off, separated by comm"):
        point(decay="of")


# --- numbers of several devices ---


def test_mfu_is_one_devices(monkeypatch):
    from experiments import timed_step

    monkeypatch.setattr(timed_step, "mfu", lambda experiment, tokens_per_s, kind: tokens_per_s)
    found = training_speed.measure(point(devices="2", warm_up=1, repetitions=1))
    assert found["note"] == "" and found["mfu"] == pytest.approx(found["tokens_per_s"] / 2)


def test_the_peak_is_of_the_device_that_took_most(monkeypatch):
    """A CPU says nothing of its memory: these two do."""
    peaks = dict(zip(jax.devices(), (3, 5, 9, 9), strict=True))
    kind = type(jax.devices()[0])
    monkeypatch.setattr(kind, "memory_stats", lambda device: {"peak_bytes_in_use": peaks[device], "bytes_limit": 100})
    found = training_speed.measure(point(devices="2", warm_up=1, repetitions=1))
    assert (found["peak_bytes"], found["limit_bytes"]) == (5, 100)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--devices 2 --fsdp 3", "fsdp names 3, which divides none of the devices 2."),
        ("--devices 1,2 --fsdp 2", "devices names 1, which none of fsdp 2 divides; name 1 there too."),
        ("--devices 0", "devices is '0'; it must be positive whole numbers, separated by commas."),
        ("--fsdp all", "fsdp is 'all'; it must be positive whole numbers, separated by commas."),
        ("--devices 1,2 --step_profile", "devices names 2, and step_profile is of one device; leave one of them out."),
        ("--devices 2 --micro_batches 16", "run.micro_batches is 16; it must divide optim.batch_size 8."),
    ],
)
def test_a_mistake_gets_one_sentence(capsys, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err and not any(tmp_path.iterdir())


def test_more_devices_than_there_are(measured):
    _, directory = measured
    done = gdn(directory, "--devices", "1,4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "devices names 4, and this machine has 2 (cpu); name no more.\n"


def test_a_peer_is_timed_on_one_device(monkeypatch):
    monkeypatch.setattr(training_speed.model_peers, "version", lambda peer: f"{peer} 0.1.0")
    options = {"scale": "tiny", "models": "gated-deltanet", "settings": "64x8", "peers": "jla"}
    found = points(SpeedOptions(**options, devices="1,2"))
    assert [(one.devices, one.peer) for one in found] == [(1, ""), (2, ""), (1, "jla")]
    with pytest.raises(UserError, match=r"^jla is timed beside an ID's own point, and devices is 2, decay on"):
        points(SpeedOptions(**options, devices="2"))
