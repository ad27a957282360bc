"""`gdn bench long-rows`: one row over several devices, its losses those of one device, and what it says."""

import json
import os
import subprocess
import sys

import pytest

from experiments import long_rows
from experiments.run import main

FLAGS = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=2")


@pytest.mark.slow
def test_devices_that_share_a_row_agree_with_one(tmp_path):
    words = ["--scale", "tiny", "--models", "retnet", "--lengths", "64", "--devices", "1,2,4", "--repetitions", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "bench", "long-rows", *words, "--out", tmp_path / "out", "--json"],
        env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # of what the machine does not have
    rows = json.loads(done.stdout)
    assert [(row["devices"], row["tokens_per_s"] is None) for row in rows] == [(1, False), (2, False), (4, True)]
    assert rows[2]["note"] == "not run: there are 2 devices here"
    one, two = (row["losses"] for row in rows[:2])
    assert one == pytest.approx(two, rel=1e-4) and one[0] != one[1] and 5 < one[0] < 7
    assert "[1/3] retnet 64 tokens over 1 device: " in done.stderr
    text = (tmp_path / "out" / "long-rows-tiny.md").read_text()
    assert f"| retnet | 64 | 2 | {rows[1]['tokens_per_s']:,.0f} (" in text and f"{one[0]:.5f}" in text
    assert json.loads((tmp_path / "out" / "long-rows-tiny.json").read_text()) == {"scale": "tiny", "rows": rows}
    assert (tmp_path / "out" / "long-rows-tiny.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--models", "retnett"], "models names 'retnett' (did you mean 'retnet'?); it must be some of retnet, hgrn2"),
        (["--lengths", "64,1K"], "lengths is '64,1K'; it must be positive whole numbers, separated by commas."),
        (["--lengths", "65", "--devices", "2"], "lengths names 65, which 2 devices cannot share evenly."),
        (["--repetitions", "0"], "repetitions is 0; it must be positive."),
    ],
)
def test_mistakes(capsys, words, says):
    assert main(["bench", "long-rows", *words]) == 2
    assert says in capsys.readouterr().err


def test_what_did_not_run_has_no_curve():
    points = long_rows.points(long_rows.LongRowsOptions(models="retnet", lengths="64,128", devices="1"))
    rows = [points[0] | {"tokens_per_s": 640.0, "step_ms": 100.0}, points[1] | {"tokens_per_s": None, "note": "x"}]
    (panel,) = long_rows.draw(rows).axes
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[64.0, 0.1]]]
