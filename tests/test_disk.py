"""Disks that are full or too small: found before the work is done, said in one sentence, and nothing is lost."""

import contextlib
import errno
import json
import os
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from small import experiment, losses, prepare_text, with_steps

import experiments
from experiments.run import main
from gdn_jax import disk
from gdn_jax.checkpoint import checkpoint_bytes, most_new
from gdn_jax.errors import UserError
from gdn_jax.model import abstract_model
from gdn_jax.optim import optimizer
from gdn_jax.shards import write_array
from gdn_jax.train import _Loop, saves_left

ID = "test/small"
MEGABYTE = 1 << 20


@contextlib.contextmanager
def mounted(directory: Path, size: int):
    """A file system of `size` bytes at `directory`, or a skipped test where none may be mounted."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True, timeout=60)


def fill(directory: Path, leave: int) -> Path:
    """Takes all but `leave` bytes of a file system; gives the file to delete."""
    path = directory / "full"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.free_space(directory) - leave)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("disk")
    prepare_text(directory)
    return directory


@pytest.fixture(scope="module")
def whole(home):
    """The directory of a run that no disk disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        registered(patch, home, home / "whole")
        assert main(["train", ID]) == 0
    return home / "whole"


def registered(monkeypatch, home, directory):
    small = with_steps(experiment(home, dir=str(directory), save_every=2, eval_every=8), 8)
    monkeypatch.setitem(experiments.EXPERIMENTS, ID, small)
    return small


def size_of(small):
    return checkpoint_bytes(*abstract(small))


def abstract(small):
    model = abstract_model(small.model)
    return model, jax.eval_shape(optimizer(small.optim).init, model)


@pytest.mark.parametrize(
    ("held", "saves", "keep", "new"),
    [(0, 100, 3, 4), (0, 2, 3, 2), (0, 1, 1, 1), (0, 9, 1, 2), (3, 9, 3, 1), (2, 9, 3, 2), (5, 9, 2, 1), (3, 1, 3, 1)],
)
def test_how_many_checkpoints_exist_at_once(held, saves, keep, new):
    assert most_new(held, saves, keep) == new


@pytest.mark.parametrize(
    ("steps", "every", "start", "left"), [(24, 5, 0, 5), (24, 5, 20, 1), (24, 5, 12, 3), (20, 5, 0, 4), (3, 500, 0, 1)]
)
def test_how_many_checkpoints_a_run_will_write(home, steps, every, start, left):
    assert saves_left(with_steps(experiment(home, save_every=every), steps), start) == left


def test_numbers_of_bytes_for_a_reader():
    found = [disk.in_words(count) for count in (0, 999, 1_000, 1_234_567, 15_711_613_952)]
    assert found == ["0 bytes", "999 bytes", "1.00 kB", "1.23 MB", "15.71 GB"]


def test_free_space_is_that_of_the_first_directory_there_is(tmp_path, monkeypatch):
    found = os.statvfs(tmp_path)
    near = disk.free_space(tmp_path / "not" / "yet")
    assert abs(near - found.f_bavail * found.f_frsize) < 1e9  # others write too
    assert disk.free_space(Path("/proc/self")) is None  # it names no size
    monkeypatch.setattr(disk, "free_space", lambda path: 5)
    disk.check_space(tmp_path, 5, "It", "free some")
    with pytest.raises(UserError, match=r"^It would need 6 bytes in .*, where 5 bytes are free; free some\.$"):
        disk.check_space(tmp_path, 6, "It", "free some")
    monkeypatch.setattr(disk, "free_space", lambda path: None)
    disk.check_space(tmp_path, 10**15, "It", "free some")


def test_a_checkpoint_takes_no_more_than_is_asked_for(whole):
    taken = sum(path.lstat().st_blocks * 512 for path in (whole / "checkpoints/8").rglob("*"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract(experiment(whole))[0]))
    assert 12 * parameters < taken <= size_of(experiment(whole)) < 2 * taken


def test_a_disk_too_small_stops_a_run_at_once_or_later_and_the_same_command_goes_on(
    home, whole, tmp_path, monkeypatch, capfd
):
    with mounted(tmp_path / "disk", 64 * MEGABYTE) as place:
        size, checkpoints = size_of(registered(monkeypatch, home, place / "run")), place / "run/checkpoints"
        full = fill(place, round(2.5 * size))
        assert main(["train", ID]) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert f"The checkpoints (4 more of {disk.in_words(size)}, as run.keep is 3 and one is being written)" in said
        assert f"would need {disk.in_words(4 * size)} in {checkpoints}, where" in said
        assert said.endswith("are free; free some, keep fewer with --run.keep 1, or choose another --run.dir.")
        assert not (place / "run/metrics.jsonl").exists()

        log = _Loop._log

        def fill_at_5(self, step, metrics, batch):
            log(self, step, metrics, batch)
            if step == 5:
                self.checkpoints.wait()
                full.unlink()
                fill(place, size - 4096)

        monkeypatch.setattr(_Loop, "_log", fill_at_5)
        assert main(["train", ID, "--run.keep", "1"]) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert said.startswith(f"The checkpoint of step 6 would need {disk.in_words(size)} in {checkpoints}, where")
        assert said.endswith("are free; free some and run the same command again: it goes on from step 4.")
        assert [path.name for path in checkpoints.iterdir()] == ["4"]

        full.unlink()
        monkeypatch.setattr(_Loop, "_log", log)
        assert main(["train", ID, "--run.keep", "1"]) == 0
        assert losses(place / "run") == losses(whole) and len(losses(whole)) == 8


def test_an_export_that_does_not_fit_is_refused_before_it_is_written(whole, tmp_path, capfd):
    with mounted(tmp_path / "disk", MEGABYTE) as place:
        fill(place, 8192)
        words = ["convert", "export", str(whole), "--format", "lit", "--out", str(place / "out")]
        for dtype, advice in (("fp32", ", or write half of it with --dtype bf16."), ("bf16", "another --out.")):
            assert main([*words, "--dtype", dtype]) == 2
            said = capfd.readouterr().err.splitlines()[-1]
            assert re.match(
                r"The tensors would need \d+\.\d\d kB in .*, where 8.19 kB are free; free some, choose", said
            )
            assert said.endswith(advice) and [path.name for path in place.iterdir()] == ["full"]


@pytest.mark.parametrize("workers", [1, 2])
def test_preparing_on_a_full_disk_keeps_finished_shards_alone(tmp_path, capfd, workers):
    """Nothing where none is finished; the same command then gives what a large disk gives."""
    source = tmp_path / "in"
    source.mkdir()
    for name, count in (("0", 1), ("1", 3000)):
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 99}) + "\n" for i in range(count)))
    with mounted(tmp_path / "disk", 4 * MEGABYTE) as place:
        command = ["data", "prepare", str(source), "--validation", "0.3", "--workers", str(workers), "--out"]
        for leave, left in ((8192, []), (900_000, ["plan.json", "shard-00000.json"])):
            full = fill(place, leave)
            capfd.readouterr()
            assert main([*command, str(place / "out")]) == 2
            *_, said = capfd.readouterr().err.splitlines()
            assert said.startswith(f"No space left for {place}/out") and said.endswith(
                ": it goes on from what is saved."
            )
            out = place / "out"
            assert sorted(path.name for path in out.glob("*.json")) == left and not list(out.glob("*.tmp"))
            assert out.exists() == bool(left)
            full.unlink()
        assert main([*command, str(place / "out")]) == 0
        assert main([*command, str(tmp_path / "whole")]) == 0
        manifests = [json.loads((out / "manifest.json").read_text()) for out in (place / "out", tmp_path / "whole")]
        assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]


def test_an_array_that_a_full_disk_cuts_short_says_so(tmp_path):
    with mounted(tmp_path / "disk", 1 << 16) as place:
        with pytest.raises(OSError) as error:
            write_array(place / "a.npy", np.zeros(100_000))
        assert error.value.errno == errno.ENOSPC and not list(place.iterdir())
        write_array(place / "a.npy", np.arange(3))
        assert np.load(place / "a.npy").tolist() == [0, 1, 2]
