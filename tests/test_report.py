"""Result rows, loss curves and the table of IDs, from a run directory of known content."""

import json
import math
import struct
from pathlib import Path

import pytest

from experiments import EXPERIMENTS, get, published, report
from gdn_jax import metrics
from gdn_jax.checkpoint import write_config
from gdn_jax.errors import UserError
from gdn_jax.model import count_parameters

ID = "smoke/gated-deltanet"
README = Path(report.__file__).parent / "README.md"
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05",
    "commit": "0123456789abcdef",
    "dirty": False,
    "devices": ["NVIDIA H200"],
    "versions": {"jax": "0.10.2"},
    "impl": {"gated_delta_rule": {"impl": "chunked", "refused": "triton: no CUDA device"}},
}
DATA = "1a2b3c4d" + "0" * 56
NUMBERS = {
    "step": 40, "of_steps": 40, "trained_on": DATA, "trained_window": 128, "data": DATA,
    "windows": 70, "of_windows": 70,
    "token_nll": 2.0, "token_perplexity": math.exp(2.0), "nats_per_byte": 2.1, "bits_per_byte": 2.1 / math.log(2),
    "byte_perplexity": math.exp(2.1), "word_perplexity": 4e5, "tokens": 1000, "bytes": 950, "words": 160,
    "window": 128, "stride": 128, "unigram_nats_per_token": 3.2, "unigram_nats_per_byte": 3.3,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    """A run of 12 s to step 20, resumed later for another 10 s."""
    rows = [{"event": "start", "step": 0}]
    rows += [{"step": step, "loss": 6.0 - step / 10, "time": 0.6 * step} for step in (10, 20)]
    rows += [{"event": "start", "step": 20}]
    rows += [{"step": step, "loss": 5.0 - step / 10, "time": 0.5 * (step - 20)} for step in (30, 40)]
    rows += [{"step": 40, "validation_loss": 2.5}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 50, "lo')  # killed while writing
    write_config(tmp_path, get(ID))
    windows = {"windows": [1, 5, 9], "of_windows": 70, "unigram_nats_per_token": 3.25}
    (tmp_path / "validation.json").write_text(json.dumps(windows))
    (tmp_path / "env.json").write_text(json.dumps(ENVIRONMENT))
    return tmp_path


def test_a_result_row(run_dir):
    report.save_evaluation(run_dir, NUMBERS)
    row = report.result_row(run_dir)
    assert json.loads((run_dir / "result.json").read_text()) == row
    experiment = get(ID)
    assert (row["id"], row["hash8"], row["recipe8"], row["steps"]) == (ID, experiment.hash8, experiment.recipe8, 40)
    assert row["parameters"] == count_parameters(experiment.model)
    assert row["tokens"] == 40 * 8 * 128 and row["seq_len"] == 128
    assert row["train_seconds"] == pytest.approx(12 + 10)
    assert row["impl"] == {"gated_delta_rule": "chunked"}
    assert row["validation"] == NUMBERS and row["environment"] == ENVIRONMENT
    table = report.summary(row).splitlines()
    assert any(line.split() == ["nats", "per", "byte", "2.1000", "3.3000"] for line in table)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("config.json", "train it first with `gdn train ID`"),
        ("env.json", "holds no env.json; `gdn train` writes it"),
        ("evaluation.json", "holds no evaluation.json; `gdn eval` writes it"),
    ],
)
def test_a_missing_file_names_its_command(run_dir, name, sentence):
    report.save_evaluation(run_dir, NUMBERS)
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=sentence):
        report.result_row(run_dir)


def test_the_loss_curve(run_dir):
    image = report.draw_loss(run_dir).read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24]) == (1050, 645)


def test_what_the_loss_curve_shows(run_dir):
    axes = report.loss_figure(run_dir).axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["training"] == ([10, 20, 30, 40], [5.0, 4.0, 2.0, 1.0])
    assert lines["validation, 3 of 70 windows"] == ([40], [2.5])
    assert lines["unigram model, the same windows"][1] == [3.25, 3.25]
    assert axes.get_ylabel() == "loss (nats per token)" and axes.get_xlabel() == "optimizer step"
    assert axes.get_title() == f"{ID}  {get(ID).hash8}\nNVIDIA H200, commit 012345678"


def test_a_curve_without_losses_is_refused(run_dir):
    (run_dir / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    with pytest.raises(UserError, match="holds no losses"):
        report.draw_loss(run_dir)


def test_smoothing_is_unbiased():
    assert report.smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    two = report.smoothed([5.0, 1.0])
    assert two[0] == 5.0 and 1.0 < two[1] < 2.0  # a short curve is hardly smoothed
    long = report.smoothed([4.0, 2.0] * 200)
    assert long[0] == 4.0 and long[-1] == pytest.approx(3.0, abs=0.05)


def table_rows():
    lines = report.ids_table().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_table_never_leaves_a_cell_blank(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAPER", tmp_path / "none.json")
    rows = table_rows()
    assert list(rows) == list(EXPERIMENTS)
    assert rows["table3/gated-deltanet/1.3b"] == ["1,309,295,632", "100B", "-", "not run", "needs `fineweb-edu`"]
    assert all(row[2:4] == ["-", "not run"] and all(row) for row in rows.values())


def test_published_results_and_the_papers_numbers(monkeypatch, tmp_path, run_dir):
    results = tmp_path / "results"
    paper = {"table3/gated-deltanet/1.3b": {"numbers": {"wikitext": 16.42}, "source": "Table 3"}}
    (tmp_path / "paper.json").write_text(json.dumps(paper))
    monkeypatch.setattr(published, "RESULTS", results)
    monkeypatch.setattr(report, "PAPER", tmp_path / "paper.json")
    report.save_evaluation(run_dir, NUMBERS)
    row = report.result_row(run_dir)
    path = published.publish(run_dir)
    assert path == results / ID / get(ID).recipe8 / "3407-1a2b3c4d-nvidia-h200.json"
    rows = table_rows()
    assert rows[ID][3:] == ["2.1000 nats/byte (unigram 3.3000)", "NVIDIA H200, 2026-01-02, 012345678, data 1a2b3c4d"]
    assert rows["table3/gated-deltanet/1.3b"][2:4] == ["wikitext 16.42", "not run"]
    path.write_text(json.dumps(row | {"recipe8": "00000000"}))
    assert table_rows()[ID][3:] == ["not run", "ready; an older recipe was run (00000000)"]


def test_a_copied_tree_gets_the_commit_that_its_files_are(monkeypatch):
    asked = []
    clean = {"commit": "fedcba9", "dirty": False, "source": "5a5a5a5a"}
    monkeypatch.setattr(metrics, "environment", lambda: asked.append(1) or clean)
    copied = {"commit": "unknown", "dirty": False, "source": "5a5a5a5a", "python": "3.11"}
    assert published.committed(copied) == copied | {"commit": "fedcba9"} and len(asked) == 1
    assert published.committed(copied | {"dirty": True})["dirty"] is False
    assert published.committed(copied | {"source": "0b0b0b0b"})["commit"] == "unknown"
    asked.clear()
    assert published.committed(clean) is clean and not asked


def test_rewriting_a_readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert "is not current; run: python -m experiments.report experiments/README.md" in report.stale(path)
    assert report.update_readme(path) and not report.update_readme(path)
    assert report.stale(path) is None
    text = path.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n| ID |") and text.endswith(f"|\n{report.END}\nafter\n")
    path.write_text("no markers")
    with pytest.raises(UserError, match="lacks the line <!-- ids:begin -->"):
        report.update_readme(path)


def test_the_readme_is_current():
    sentence = report.stale(README)
    assert sentence is None, sentence
