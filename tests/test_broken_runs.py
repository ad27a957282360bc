"""What breaks a run: injected into real files and processes, what is said, and that the next start loses nothing.

Every row ends with the losses and batches of the run that nothing disturbed, bit for bit: no step that was committed is
lost, none is made twice. Spikes are in test_spikes.py, wrong inputs in test_faults.py.
"""

import contextlib
import copy
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from small import experiment, prepare_text, with_steps

import experiments
from experiments.run import main
from gdn_jax import prepare, train
from gdn_jax.metrics import Writer, read_rows
from gdn_jax.progress import SILENT

ID, STEPS = "test/small", 10
RUN, DATA = Path("run"), Path("data/text-b3838ac4")
NEWEST = RUN / "checkpoints" / "4"
TRAINER, WRITE = train.Trainer, Writer.write


def registered():
    return with_steps(experiment(Path(), save_every=2, eval_every=STEPS, keep=9), STEPS)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prepared text and a run after four of its ten steps; the rows of all ten; what compiled them."""
    directory = tmp_path_factory.mktemp("broken")
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        prepare_text(Path())
        patch.setitem(experiments.EXPERIMENTS, ID, registered())
        trainers = {}
        patch.setattr(train, "Trainer", reusing(trainers))
        assert main(["train", ID]) == 0
        wanted = rows()
        for step in (6, 8, 10):
            shutil.rmtree(RUN / "checkpoints" / str(step))
        lines = (RUN / "metrics.jsonl").read_text().splitlines(keepends=True)
        (RUN / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    return directory, wanted, trainers


def reusing(trainers):
    """Trainer, compiled once for all runs."""

    def made(asked, mesh):
        trainers["one"] = copy.copy(trainers.get("one") or TRAINER(asked, mesh))
        trainers["one"].experiment = asked
        return trainers["one"]

    return made


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A copy of `home` as the current directory, and what is to be closed after the command."""
    shutil.copytree(home[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(experiments.EXPERIMENTS, ID, registered())
    monkeypatch.setattr(train, "Trainer", reusing(home[2]))
    with contextlib.ExitStack() as held:
        yield held


def rows():
    """(step, loss, batch) of the run, each step once."""
    return [(row["step"], row["loss"], row["batch"]) for row in read_rows(RUN) if "loss" in row]


# --- what is injected; each gets the test's stack and monkeypatch ---


def cut(pattern):
    def half(*_):
        path = max(Path().glob(pattern), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return half


def gone(path):
    return lambda *_: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def written(path, content):
    def write(*_):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    return write


def appended(path, content):
    return lambda *_: Path(path).write_bytes(Path(path).read_bytes() + content)


def flipped(path):
    def flip(*_):
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(content)

    return flip


def in_metrics(*_):
    first, *rest = (RUN / "metrics.jsonl").read_bytes().splitlines(True)
    (RUN / "metrics.jsonl").write_bytes(b"".join([first, b"5\n", *rest]))


def without_junk():
    lines = (RUN / "metrics.jsonl").read_bytes().splitlines(True)
    (RUN / "metrics.jsonl").write_bytes(b"".join(line for line in lines if line != b"5\n"))


def other_text(*_):
    """The source has one line more, and was prepared again."""
    path = sorted(Path("text").iterdir())[0]
    path.write_text(path.read_text() + "# one more line\n")
    shutil.rmtree(DATA)
    prepare.prepare("text", DATA, "byte", validation=0.2, progress=SILENT)


def held(stack, _):
    """By a process that lives."""
    fcntl.flock(stack.enter_context((RUN / "lock").open("w")), fcntl.LOCK_EX)


def left_by_a_dead_process(*_):
    code = "import fcntl, os; f = open('run/lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


def mounted(options):
    """The run's directory on a file system of its own."""

    def mount(stack, _):
        shutil.move(RUN, "moved")
        RUN.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(RUN)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here")
        stack.callback(shutil.rmtree, "moved")
        stack.callback(shutil.copytree, "moved", RUN, dirs_exist_ok=True)
        stack.callback(subprocess.run, ["umount", "-l", str(RUN)], check=True)
        shutil.copytree("moved", RUN, dirs_exist_ok=True)
        if "full" in options:
            with contextlib.suppress(OSError), (RUN / "filler").open("wb") as filler:
                filler.write(bytes(4 << 20))
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(RUN)], check=True)

    return mount


def at_step(step, do):
    """do() when the row of a step is written."""

    def patch(_, monkeypatch):
        def write(self, row):
            WRITE(self, row)
            if row["step"] == step and "loss" in row:
                monkeypatch.setattr(Writer, "write", WRITE)
                do()

        monkeypatch.setattr(Writer, "write", write)

    return patch


def raised(*numbers):
    return at_step(5, lambda: [signal.raise_signal(number) for number in numbers])


def backwards(_, monkeypatch):
    """The clock of the day jumps back by a day at every look."""
    real, looks = time.time, []
    monkeypatch.setattr(time, "time", lambda: real() - 86400 * (looks.append(0) or len(looks)))


class Fault(NamedTuple):
    name: str
    inject: Callable
    says: tuple[str, ...]
    code: int = 0
    mend: Callable | None = None  # what the sentence asks for; None: the same command alone
    slow: bool = False  # where another row is of its kind


STOPPED = "the same command goes on from there."
DAMAGED = ("The checkpoint of step 4 is damaged; it is now run/damaged-4", "step 2 of 10")
AGAIN = f"delete {DATA} and run: gdn"
FROM = "step {} of 10, in run"


def from_backup(path):
    """What a person does who has a copy."""
    return lambda: shutil.copytree(BACKUP / path, path, dirs_exist_ok=True)


BACKUP = Path("..") / "backup"
FAULTS = [
    Fault("arrays of the newest checkpoint cut short", cut("run/checkpoints/4/model/d/*"), DAMAGED),
    Fault("optimizer state cut short", cut("run/checkpoints/4/optimizer/d/*"), DAMAGED, slow=True),
    Fault("a byte of the newest checkpoint flipped", flipped(NEWEST / "_CHECKPOINT_METADATA"), DAMAGED, slow=True),
    Fault("metadata of the newest checkpoint garbage", written(NEWEST / "_CHECKPOINT_METADATA", b"\xff{"), DAMAGED),
    Fault("arrays of the newest checkpoint gone", gone(NEWEST / "model"), DAMAGED, slow=True),
    Fault("newest checkpoint gone", gone(NEWEST), (FROM.format(2),), slow=True),
    Fault("all checkpoints gone", gone(RUN / "checkpoints"), (FROM.format(0),), slow=True),
    Fault(
        "a write that was not finished", written(RUN / "checkpoints/6.orbax-checkpoint-tmp/x", b"x"), (FROM.format(4),)
    ),
    Fault(
        "config.json garbage",
        written(RUN / "config.json", b'{"layout": 2'),
        ("run/config.json is damaged", "restore it"),
        2,
        from_backup("run"),
    ),
    Fault("config.json gone", gone(RUN / "config.json"), ("run holds files but no run",), 2, from_backup("run")),
    Fault("half a config.json.new", written(RUN / "config.json.new", b'{"lay'), (FROM.format(4),), slow=True),
    Fault(
        "half a line at the end of the metrics", appended(RUN / "metrics.jsonl", b'{"step": 5, "lo'), (FROM.format(4),)
    ),
    Fault("junk in the metrics", in_metrics, ("metrics.jsonl, line 2, is no row",), 2, without_junk),
    Fault("env.json garbage", written(RUN / "env.json", b"\xff"), (FROM.format(4),), slow=True),
    Fault("lock left by a dead process", left_by_a_dead_process, (FROM.format(4),)),
    Fault("two starts at once", held, ("Another process is training in run; wait for it",), 2),
    Fault(
        "data shard gone", gone(DATA / "train-00000.bin"), ("train-00000.bin is missing", AGAIN), 2, from_backup("data")
    ),
    Fault("data shard cut short", cut(f"{DATA}/train*.bin"), ("expected", AGAIN), 2, from_backup("data")),
    Fault("data shard changed", flipped(DATA / "train-00000.bin"), ("was altered", AGAIN), 2, from_backup("data")),
    Fault("index of documents cut short", cut(f"{DATA}/train*.ends.npy"), (".ends.npy", AGAIN), 2, from_backup("data")),
    Fault("manifest cut short", cut(f"{DATA}/manifest.json"), ("manifest.json is damaged",), 2, from_backup("data")),
    Fault("other text", other_text, ("checkpoints/4 was trained on data",), 2, from_backup("data")),
    Fault(
        "read-only directory",
        mounted("read-only"),
        ("run cannot be written (Read-only file system)", "choose another run.dir"),
        2,
    ),
    Fault("full disk", mounted("full"), ("where 0 bytes are free", "free some"), 2),
    Fault("SIGTERM", raised(signal.SIGTERM), ("Stopped and saved at step 6", STOPPED), 128 + signal.SIGTERM),
    Fault("SIGTERM twice", raised(signal.SIGTERM, signal.SIGTERM), (STOPPED,), 128 + signal.SIGTERM, slow=True),
    Fault("SIGINT", raised(signal.SIGINT), (STOPPED,), 128 + signal.SIGINT, slow=True),
    Fault("SIGINT twice", raised(signal.SIGINT, signal.SIGINT), ("Stopped; what was finished before is kept.",), 130),
    Fault("SIGHUP", raised(signal.SIGHUP), (STOPPED,), 128 + signal.SIGHUP),
    Fault(
        "directory gone while training",
        at_step(5, lambda: shutil.rmtree(RUN)),
        ("directory run is gone",),
        2,
        from_backup("run"),
    ),
    Fault("data gone while training", at_step(5, lambda: shutil.rmtree(DATA)), (FROM.format(4),), slow=True),
    Fault("a clock that jumps", backwards, (FROM.format(4),)),
]


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] * fault.slow) for fault in FAULTS]
)
def test_what_breaks_is_said_and_the_next_start_loses_nothing(home, here, capfd, fault):
    for name in ("run", "data"):
        shutil.copytree(name, BACKUP / name)
    with pytest.MonkeyPatch.context() as patch:
        fault.inject(here, patch)
        capfd.readouterr()
        code = main(["train", ID])
        said = capfd.readouterr().err
    assert code == fault.code, said
    for part in fault.says:
        assert part in said
    assert "Traceback" not in said and (code == 0 or said.endswith(".\n"))
    here.close()
    if code:
        if fault.mend:
            fault.mend()
        assert main(["train", ID]) == 0
    assert rows() == home[1] and len(rows()) == STEPS
    assert all((row.get(name) or 0) >= 0 for row in read_rows(RUN) for name in ("time", "tokens_per_second"))
    assert not list((RUN / "checkpoints").glob("*tmp*"))
