"""Training by several processes of this machine: real processes, real signals, gloo between them."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import FLAGS, by_slurm, ended, free_port, reach, started

from experiments.run import main
from gdn_jax import coordinator, distributed
from gdn_jax.metrics import read_rows

ID, STEPS = "table3/gated-deltanet/tiny", 16
RECIPE = {
    "optim.steps": STEPS, "optim.batch_size": 4, "data.seq_len": 32, "run.log_every": 1, "run.eval_every": 8,
    "run.save_every": 4, "run.keep": 9, "run.eval_windows": 6, "run.micro_batches": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(data root, losses by step) of one process."""
    here = tmp_path_factory.mktemp("alone")
    assert main(words(here, here / "run")) == 0
    return here, losses(here / "run")


def words(data_root, directory, **changed):
    options = RECIPE | {"run.data_root": data_root / "data", "run.dir": directory} | changed
    return ["train", ID, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def losses(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kinds = ("loss", "validation_loss")
    found = [(row["step"], kind, row[kind]) for row in rows for kind in kinds if kind in row]
    assert [step for step, kind, _ in found if kind == "loss"] == list(range(1, len(found) - 1)), "each step once"
    return found


def check_equal(found, wanted):
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in wanted], rtol=2e-5)


def test_a_signal_to_one_stops_both_and_one_process_goes_on(alone, tmp_path):
    data_root, wanted = alone
    run = tmp_path / "run"
    processes = started(tmp_path, [words(data_root, run)] * 2, by_slurm)
    reach(tmp_path, "step 3/", processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ended(tmp_path, processes)
    assert codes == [128 + signal.SIGTERM] * 2
    (step,) = {line.split()[5].strip(";") for line in said}
    assert said == [f"Stopped and saved at step {step}; the same command goes on from there."] * 2
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == int(step) < STEPS
    assert f"process 1 of 2 on {socket.gethostname()}: 1 of 2 devices (cpu)" in (tmp_path / "1.err").read_text()
    assert main(words(data_root, run)) == 0
    check_equal(losses(run), wanted)


def saved(run):
    """The newest finished checkpoint."""
    steps = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max((int(path.name) for path in steps if (path / "_CHECKPOINT_METADATA").exists()), default=0)


def reach_checkpoint(run, step, processes):
    while saved(run) < step:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def left(words_of_it):
    """Whether a process's last line says that another one has gone."""
    gone = "rocess ", "has ended or cannot be reached", "start all of them again with the same command"
    silent = "Process ", "was last heard of", "start all again with the same command"
    return any(all(part in words_of_it for part in parts) for parts in (gone, silent))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_random_kills_lose_no_step_and_repeat_no_window(alone, tmp_path, monkeypatch, kills):
    """Of either of two processes, at its start, after a step or two, or while a checkpoint is written. In the end each
    has half of the tokens of all rows."""
    monkeypatch.setenv(distributed.SILENCE_VARIABLE, "20")
    data_root, wanted = alone
    run, chance, victims = tmp_path / "run", random.Random(kills), []
    command = words(data_root, run, **{"run.save_every": 2})
    for _ in range(kills):
        committed = saved(run)
        processes = started(tmp_path, [command] * 2)
        reach(tmp_path, f"step {committed} of {STEPS}", processes)
        if committed < STEPS - 4:
            reach(tmp_path, f"step {committed + chance.randint(1, 3)}/", processes)
        time.sleep(chance.random() * 0.05)
        victims.append(chance.choice([0, 1, 1]))
        processes[victims[-1]].kill()
        before = time.monotonic()
        codes, said = ended(tmp_path, processes)
        other = 1 - victims[-1]
        assert codes[victims[-1]] == -signal.SIGKILL and codes[other] == 1 and saved(run) >= committed
        assert time.monotonic() - before < 20 + 30
        assert left(said[other]), said[other]
    assert set(victims) == {0, 1}
    command = words(data_root, run, **{"run.save_every": 2, "run.context": 2})
    codes, _ = ended(tmp_path, started(tmp_path, [command] * 2))
    assert codes == [0, 0] and (tmp_path / "0.out").read_text().endswith(f"{run}\n")
    check_equal(losses(run), wanted)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({row["batch"] for row in rows if "batch" in row}) == STEPS


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_when_process_0_is_killed_the_other_says_so_and_all_start_again_at_once(alone, tmp_path, monkeypatch, kills):
    """In one sentence, without jax's own words; at the same port."""
    monkeypatch.setenv(distributed.SILENCE_VARIABLE, "20")
    data_root, wanted = alone
    run, port = tmp_path / "run", free_port()
    for number in range(kills):
        command = words(data_root, run, **{"run.save_every": 2})
        processes = started(tmp_path, [command] * 2, port=port)
        reach(tmp_path, f"step {number + 2}/", processes)
        processes[0].kill()
        before = time.monotonic()
        codes, _ = ended(tmp_path, processes)
        assert codes == [-signal.SIGKILL, 1] and time.monotonic() - before < 20 + 10
        sees, *said = (tmp_path / "1.err").read_text().splitlines()
        assert sees.startswith("process 1 of 2 on ") and len(said) == 1, said
        assert said[0].startswith(f"Process 0 of 2 on {socket.gethostname()} ") and left(said[0])
    assert ended(tmp_path, started(tmp_path, [words(data_root, run)] * 2, port=port))[0] == [0, 0]
    check_equal(losses(run), wanted)


@pytest.fixture
def earlier(alone, tmp_path):
    """A copy of the run as it was after 12 of its steps."""
    shutil.copytree(alone[0] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    return tmp_path / "run"


def cut_short(checkpoint):
    largest = max((checkpoint / "model" / "d").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def altered(checkpoint):
    content = bytearray((checkpoint / "_CHECKPOINT_METADATA").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "_CHECKPOINT_METADATA").write_bytes(content)


def damaged_for_one(checkpoint):
    """What makes the last process read something else than the first."""
    other = checkpoint.parent.parent.parent / "damaged"
    shutil.copytree(checkpoint, other)
    cut_short(other)
    through = ["unshare", "-m", "sh", "-c", f'mount --bind {other} {checkpoint} && exec "$0" "$@"']
    if subprocess.run([*through, "true"], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    return through


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damaged_for_one, cut_short, altered])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_taken(alone, earlier, tmp_path, damage):
    data_root, wanted = alone
    through = damage(earlier / "checkpoints" / "12") or ()
    codes, _ = ended(tmp_path, started(tmp_path, [words(data_root, earlier)] * 2, before=through))
    said = [(tmp_path / f"{index}.err").read_text() for index in (0, 1)]
    assert codes == [0, 0], said
    sentence = f"The checkpoint of step 12 is damaged; it is now {earlier}/damaged-12, and the one before it is taken."
    assert said[0].count(sentence) == 1 and "damaged" not in said[1] and "Traceback" not in said[0] + said[1]
    starts = [row["step"] for row in read_rows(earlier) if row.get("event") == "start"]
    assert starts == [0, 8] and (earlier / "damaged-12").is_dir() and saved(earlier) == STEPS
    check_equal(losses(earlier), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damaged_for_one, cut_short, altered])
def test_the_only_checkpoint_is_not_set_aside(alone, earlier, tmp_path, damage):
    for step in (4, 8):
        shutil.rmtree(earlier / "checkpoints" / str(step))
    through = damage(earlier / "checkpoints" / "12") or ()
    codes, said = ended(tmp_path, started(tmp_path, [words(alone[0], earlier)] * 2, before=through))
    assert codes == [2, 2] and (earlier / "checkpoints" / "12").is_dir()
    if through:
        assert said[0] == f"Process 1 was refused: {said[1]}"
        said = said[1:]
    newest = earlier / "checkpoints" / "12"
    sentence = (
        f"{newest} is another program's checkpoint or damaged"
        if damage is altered
        else f"The checkpoint {newest} is damaged"
    )
    assert set(said) == {f"{sentence}; move {newest} away to begin again."}


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_hung_process_is_named_in_time_and_nothing_is_lost(alone, tmp_path, monkeypatch, stopped):
    monkeypatch.setenv(distributed.SILENCE_VARIABLE, "6")
    data_root, wanted = alone
    run, other = tmp_path / "run", 1 - stopped
    processes = started(tmp_path, [words(data_root, run)] * 2)
    reach(tmp_path, "step 5/", processes)
    processes[stopped].send_signal(signal.SIGSTOP)
    before = time.monotonic()
    assert processes[other].wait(timeout=60) == 1
    assert 5 < time.monotonic() - before < 12
    processes[stopped].kill()
    _, said = ended(tmp_path, processes)
    host = socket.gethostname()
    assert re.match(
        rf"Process {stopped} of 2 on {host} was last heard of [67] seconds ago, at step \d+; end", said[other]
    )
    assert "F1" not in (tmp_path / f"{other}.err").read_text()  # jax's own words
    codes, _ = ended(tmp_path, started(tmp_path, [words(data_root, run)] * 2))
    assert codes == [0, 0]
    check_equal(losses(run), wanted)


@pytest.mark.slow
def test_what_one_is_refused_while_it_trains_ends_both(alone, tmp_path, monkeypatch):
    """Process 0's files may not grow any more, and so not its metrics."""
    monkeypatch.setenv(distributed.SILENCE_VARIABLE, "10")
    data_root, wanted = alone
    run = tmp_path / "run"
    processes = started(tmp_path, [words(data_root, run)] * 2)
    reach_checkpoint(run, 4, processes)  # whole; the one after it will not be written
    size = (run / "metrics.jsonl").stat().st_size
    resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    codes, said = ended(tmp_path, processes)
    assert codes == [2, 1] and said[0] == f"{run}/metrics.jsonl: File too large; check the path and its permissions."
    assert said[1] == f"Process 0 was refused: {said[0]}"
    assert ended(tmp_path, started(tmp_path, [words(data_root, run)] * 2))[0] == [0, 0]
    check_equal(losses(run), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("one", [0, 1])
def test_where_one_cannot_write_its_part_of_a_checkpoint_both_end_in_time(alone, tmp_path, monkeypatch, one):
    """Its files may not grow beyond what is said, and what is noted of steps; the other's may."""
    monkeypatch.setenv(distributed.SILENCE_VARIABLE, "10")
    data_root, wanted = alone
    run, other = tmp_path / "run", 1 - one
    processes = started(tmp_path, [words(data_root, run)] * 2)
    reach_checkpoint(run, 4, processes)
    resource.prlimit(processes[one].pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    before = time.monotonic()
    codes, said = ended(tmp_path, processes)
    assert codes[one] == 2 and codes[other] == 1 and time.monotonic() - before < 30
    assert said[one].startswith(f"A checkpoint cannot be written to {run}/checkpoints (OUT_OF_RANGE: Failed writing")
    assert re.search(r"make room there and run the same command again: it goes on from step (4|8)\.", said[one])
    assert said[other] == f"Process {one} was refused: {said[one]}"
    assert ended(tmp_path, started(tmp_path, [words(data_root, run)] * 2))[0] == [0, 0]
    check_equal(losses(run), wanted)


def test_what_one_is_refused_or_has_otherwise_stops_all(alone, tmp_path):
    data_root, _ = alone
    run = tmp_path / "run"
    ours = words(data_root, run)
    codes, said = ended(tmp_path, started(tmp_path, [ours, words(data_root, run, **{"optim.lr": "1e-4"})]))
    assert codes == [2, 2] and said[0] == said[1]
    assert said[0].startswith("Process 1 has hash '") and "the same code, packages, options and data" in said[0]
    codes, said = ended(tmp_path, started(tmp_path, [ours, words(tmp_path, run, **{"data.source": "elsewhere"})]))
    assert (
        codes == [2, 2] and said[0] == f"Process 1 was refused: {said[1]}" and "'elsewhere' is not prepared" in said[1]
    )
    assert not run.exists()


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, ("--stride", "8", "--windows", "7")),
        pytest.param(4, ("--windows", "9"), marks=pytest.mark.slow),
        pytest.param(4, ("--windows", "30", "--data.reset_at_documents", "True"), marks=pytest.mark.slow),
    ],
)
def test_processes_share_the_windows_of_an_evaluation(alone, tmp_path, capsys, count, options):
    """In batches of four, so that one has fewer windows than another, or none."""
    shutil.copytree(alone[0] / "run", tmp_path / "run")
    command = ["eval", str(tmp_path / "run"), "--json", *options]
    capsys.readouterr()
    assert main(command) == 0
    wanted, kept = json.loads(capsys.readouterr().out), tmp_path / "run" / "evaluation.json"
    by_one = json.loads(kept.read_text())
    kept.unlink()
    codes, said = ended(tmp_path, started(tmp_path, [command] * count))
    assert codes == [0] * count, said
    found = json.loads((tmp_path / "0.out").read_text())
    numbers = [name for name, value in wanted.items() if isinstance(value, float)]
    assert len(numbers) > 5 and [found[name] for name in numbers] == pytest.approx(
        [wanted[name] for name in numbers], rel=1e-6
    )
    assert [found[name] for name in wanted if name not in numbers] == [
        wanted[name] for name in wanted if name not in numbers
    ]
    assert [row["token_nll"] for row in json.loads(kept.read_text())] == [found["token_nll"]] and len(by_one) == 1
    assert not any((tmp_path / f"{index}.out").read_text() for index in range(1, count))


@pytest.mark.slow
def test_what_keeps_one_from_evaluating_ends_both(alone, tmp_path, monkeypatch):
    monkeypatch.setenv(distributed.SILENCE_VARIABLE, "6")
    run = alone[0] / "run"
    ours, there = ["eval", str(run)], run / "evaluation.json"
    before = there.read_text() if there.exists() else ""
    for word, refusal in (
        (["--stride", "3"], "Process 1 has stride 3 and process 0 has None; start all processes with the same"),
        (["--data.source", "elsewhere"], "'elsewhere' is not prepared"),
        (["--stride", "0"], "stride is 0; it must be between 1 and"),
    ):
        codes, said = ended(tmp_path, started(tmp_path, [ours, [*ours, *word]]))
        assert codes == [2, 2] and refusal in said[0] and refusal in said[1], said
    processes = started(tmp_path, [ours] * 2)
    while "process 1 of 2" not in (tmp_path / "1.err").read_text():
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGSTOP)
    before_end = time.monotonic()
    assert processes[0].wait(timeout=60) == 1 and time.monotonic() - before_end < 20
    processes[1].kill()
    _, said = ended(tmp_path, processes)
    assert re.match(r"Process 1 of 2.* was last heard of \d+ seconds ago; end it, .* they begin again\.", said[0])
    assert (there.read_text() if there.exists() else "") == before


@pytest.mark.slow
def test_the_launch_file_for_ssh_starts_and_stops_them(alone, tmp_path):
    """With a program in place of ssh that runs the command here."""
    data_root, wanted = alone
    run, here = tmp_path / "run", tmp_path / "here"
    here.mkdir()
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nexec sh -c "$2"\n')
    ssh.chmod(0o755)
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "experiments.run", *words(data_root, run)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "SSH": str(ssh), "PORT": str(free_port())}
    env |= {"PYTHONPATH": str(root)}
    for stops in (True, False):
        with (tmp_path / "0.err").open("wb") as err:
            launch = subprocess.Popen(
                [root / "docs/launch/ssh.sh", "localhost localhost", *command],
                env=env, cwd=here, stdout=subprocess.DEVNULL, stderr=err,
            )  # fmt: skip
        if stops:
            reach(tmp_path, "step 2/", [launch])
            launch.send_signal(signal.SIGINT)
        try:
            assert launch.wait(timeout=240) == (128 + signal.SIGTERM if stops else 0)
        finally:
            launch.kill()
    assert not list(here.iterdir())
    check_equal(losses(run), wanted)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES not set; several processes need all of",
        ),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a whole number."),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2 and JAX_NUM_PROCESSES 2; processes count from 0."),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS is 'here'; it must be host:port, of process 0."),
        ({"GDN_SILENCE": "4"}, "GDN_SILENCE is '4'; it must be a whole number of seconds, 5 at least."),
        ({"GDN_SILENCE": "long"}, "GDN_SILENCE is 'long'; it must be a whole number of seconds"),
        ({"JAX_COORDINATOR_ADDRESS": "here:x"}, "JAX_COORDINATOR_ADDRESS is 'here:x'; it must be host:port"),
    ],
)
def test_variables_that_make_no_sense(monkeypatch, capsys, given, says):
    usual = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in (given if len(given) < 1 or "not set" in says else usual | given).items():
        monkeypatch.setenv(name, value)
    assert main(["train", ID]) == 2
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(coordinator, "FORMER", 0.3)
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        for name, value in zip(distributed.VARIABLES, (address, "2", "0"), strict=True):
            monkeypatch.setenv(name, value)
        assert main(["train", ID]) == 2
    assert capsys.readouterr().err == (
        f"Process 0 cannot listen at {address} (Address already in use); end what is left of a former run, or name "
        f"another port of its host.\n"
    )


def test_no_process_0(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "PATIENCE", 0.3)
    address = f"localhost:{free_port()}"
    for name, value in zip(distributed.VARIABLES, (address, "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert main(["train", ID]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"Process 0 was not found at JAX_COORDINATOR_ADDRESS {address} within 0.3 seconds (")
    assert said.count("\n") == 1


def test_texts_of_any_length_reach_the_others():
    for text in ("", "é" * 5000):
        assert distributed.gathered(text) == [text]


def test_run_evaluates_and_so_refuses_several(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "alone", lambda: False)
    assert main(["run", ID]) == 2
    assert capsys.readouterr().err == (
        "`gdn run` also evaluates, in one process; train with `gdn train ID`, then evaluate in one.\n"
    )
