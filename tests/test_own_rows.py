"""Which local files hold the published rows of a task, and which are rows of one's own: their sha256 decides."""

import gzip
import hashlib
import os
from pathlib import Path

import pytest
from test_suites import FP32, ID, ROWS, entry, run_of

import experiments
from experiments import suites, table3
from experiments.commands.evaluation import described
from experiments.suites import Asked
from gdn_jax.evaluate.answering import Answering


def test_rows_of_a_local_file_are_own_rows_unless_the_file_is_known():
    """However many they are, in every suite, and of a task without a column too."""
    for name, suite in experiments.SUITES.items():
        if name == "table2":
            continue  # makes its samples
        for column in suite.columns.values():
            count = column.rows.start
            one = entry(suite=name, task=column.task, n=count, of=count)
            assert suite.marks(one, column) == (), "of the hub, or of before files were recorded"
            other = one | {"protocol": {"data_sha256": "0" * 64}}
            assert suite.marks(other, column) == (f"own rows, n = {count:,}",)
            assert suite.marks(other | {"n": 3}, column) == ("own rows, n = 3",)
            for known in column.files:
                whole = one | {"protocol": {"data_sha256": known}}
                assert suite.marks(whole, column) == ()
                assert suite.marks(whole | {"n": 3}, column) == (f"n = 3 of {count:,}",)
                assert suite.standing([whole | {"n": 3}, other]) == whole | {"n": 3}, "own rows hide no published set"
    sciq = entry(task="sciq", n=1000, of=1000, protocol={"data_sha256": "0" * 64})
    assert table3.SUITE.marks(sciq, None) == ("own rows, n = 1,000",) and "own rows, n = 1,000" in described([sciq])


def test_the_full_splits_beside_this_project_are_known():
    folder = Path(os.environ.get("GDN_DATA", "nowhere")) / "eval"
    files = {path.name.partition(".")[0]: path for path in folder.glob("*.jsonl.gz")}
    if not files:
        pytest.skip("GDN_DATA names no folder with eval/*.jsonl.gz")
    files["wikitext"] = files.pop("wikitext2_document_level_test")
    found = {task: hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() for task, path in files.items()}
    assert found == table3.FILES


def test_rows_of_the_splits_own_number_are_own_rows(tmp_path):
    """1,838 rows of our own where PIQA has as many."""
    rows = (ROWS / "table3" / "piqa.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "piqa.jsonl").write_text("".join((rows * 613)[:1838]))
    run = run_of(ID, tmp_path, 200)
    (one,) = suites.measure(table3.SUITE, ["piqa"], Answering(run, compute=FP32), Asked(folder=tmp_path))
    assert (one["n"], one["of"]) == (1838, 1838)
    assert table3.SUITE.marks(one, table3.COLUMNS["piqa"]) == ("own rows, n = 1,838",)
    assert "own rows, n = 1,838" in described([one])
