"""`gdn bench`: its table and its JSON, its exit codes, and workers that refuse, crash, hang or are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from experiments.run import main
from pallas_kernels import bench, dispatch, ops, workers
from pallas_kernels.roofline import floor_ms

ROOT = Path(__file__).resolve().parent.parent
SIZES = "1x64,1,16,16"
OP = "gated_delta_rule"
BENCHMARK = ops.benchmark(OP)


def job(contender="chunked", timeout=60, sizes=(1, 64, 1, 16, 16)):
    return bench.Job(OP, SIZES, sizes, contender, 2, 0, timeout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(JSON, exit code, stderr, directory of --out) of one benchmark on this CPU, as a user starts it."""
    out = tmp_path_factory.mktemp("bench")
    words = [OP, "--shapes", SIZES, "--repetitions", "2", "--json", "--out", str(out / "made")]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "bench", *words],
        capture_output=True, text=True, timeout=200, cwd=out,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return json.loads(done.stdout), done.returncode, done.stderr, out / "made"


def test_ours_are_measured_and_the_numbers_say_where(measured):
    found, _, progress, _ = measured
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == ["auto", "chunked", *BENCHMARK.PEERS]
    for name in ("auto", "chunked"):
        row = rows[name]
        assert (row["shape"], row["sizes"], row["implementation"], row["note"]) == (SIZES, SIZES, "chunked", "")
        for phase in ("forward", "forward_backward"):
            time = row[phase]
            assert 0 < time["min_ms"] <= time["ms"] <= time["max_ms"] and 1 <= time["calls"] <= 50
            assert time["of_floor"] == "unknown"  # no ceilings were measured on a CPU
        assert row["device"] == "cpu" and row["floor_ms"] is None
    assert rows["chunked"]["refused"] == "" and rows["auto"]["refused"].startswith("triton: ")
    assert found["device"] == "cpu" and found["stopped"] == 0 and found["repetitions"] == 2
    assert {"python", "jax", "jaxlib"} <= set(found["versions"]) and found["date"] and found["commit"]
    assert progress.count(SIZES) == 5 and f"[2/5] {SIZES} chunked: forward + backward " in progress


def test_auto_that_leaves_a_faster_one_on_a_gpu_is_a_problem(measured):
    found, code, _, _ = measured
    assert code == 0 and found["problems"] == []
    row = found["rows"][0] | {"device": "NVIDIA H100 80GB HBM3"}
    assert bench._problem(row).startswith(f"{OP} at {SIZES}: auto took chunked (triton: ")


def test_an_implementation_that_cannot_run_is_exit_code_1(capsys):
    assert main(["bench", OP, "--shapes", SIZES, "--impls", "triton", "--peers", "none", "--repetitions", "1"]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert (
        sentence.startswith(f"{OP} at {SIZES}: triton was not wholly measured (")
        and "there is no kernel for key" in sentence
    )


def test_a_peer_that_is_not_installed_says_so(measured):
    found, _, _, _ = measured
    for row in found["rows"]:
        if row["contender"] in BENCHMARK.PEERS:
            assert row["note"] == "not installed" and row["forward"] is row["forward_backward"] is None


def test_the_files_hold_what_was_printed(measured):
    found, _, _, out = measured
    assert json.loads((out / "bench.json").read_text()) == found
    table = (out / "bench.md").read_text().splitlines()
    header = "| shape | contender | forward ms | forward + backward ms | of floor | peak MiB | note |"
    assert table[:4] == [OP, "", header, "|" + " --- |" * 7]
    assert table[4].startswith(f"| {SIZES} | auto (chunked) | ") and " | unknown | unknown | faster" in table[4]
    assert table[6] == f"| {SIZES} | fla | not run | not run | not run | not run | not installed |"
    assert "- Device: cpu; times on a CPU say nothing about a GPU" in table
    cells = [cell.strip() for line in table[4:9] for cell in line.split("|")[1:-1]]
    assert len(cells) == 35 and all(cells)


def test_a_refusal_is_the_first_line_of_its_reason():
    row = bench.measure(job("triton"))
    assert row["note"].startswith(f"refuses: {OP}: impl 'triton' cannot run: ") and row["forward"] is None

    def fails(error):
        try:
            raise error
        except Exception as raised:
            return bench._reason(raised)

    assert fails(ValueError("K is 5.\nIt must not be.")) == "refuses: K is 5."
    assert fails(AssertionError()) == "refuses: AssertionError at raise error"
    assert fails(OSError("gone")) == "failed: OSError: gone"


def test_a_worker_that_hangs_or_crashes_costs_one_row(monkeypatch):
    before = time.monotonic()
    assert bench.measure(job(timeout=1))["note"] == "failed: no result within 1 s"
    assert time.monotonic() - before < 20
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")  # XLA ends the process
    row = bench.measure(job())
    assert row["note"].startswith("failed: exit code 1, ") and row["note"].endswith("--xla_no_such_flag=1")
    assert row["forward"] is row["forward_backward"] is row["peak_mib"] is None


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_signal_ends_the_worker_too(tmp_path, name, code):
    words = [OP, "--shapes", "4x8192,2,64,64", "--impls", "chunked", "--peers", "none", "--repetitions", "9999"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", "bench", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    parent = psutil.Process(process.pid)
    while not (started := parent.children()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    if name != "SIGKILL":
        begun, stopped = err.splitlines()
        assert begun.startswith(f"{OP}: 1 to measure, at most 300 s each.")
        assert stopped == "Stopped; what was not measured says so."
        assert "| 4x8192,2,64,64 | chunked | not run | not run | not run | not run | not run |" in out
    (worker,) = started
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def _runs(process):
    """Whether it has not ended; one that nobody has waited for yet has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_floor_of_an_h200():
    floor = floor_ms(BENCHMARK.cost(BENCHMARK.SHAPES["fla-1.3b"]), "NVIDIA H200")
    assert floor["forward"] == pytest.approx(0.2447, abs=1e-4)  # 983,040 FLOPs a token and head at 790 TFLOP/s
    assert floor["backward"] == pytest.approx(0.6524, abs=1e-4)
    assert floor["forward_backward"] == floor["forward"] + floor["backward"] == pytest.approx(0.90, abs=0.005)
    square = floor_ms(BENCHMARK.cost(BENCHMARK.SHAPES["head-128"]), "NVIDIA H200")
    assert square["forward"] == pytest.approx(524288 * 1032 / 4.3e9, abs=1e-6)  # bound by bytes
    assert floor_ms(BENCHMARK.cost(BENCHMARK.Shape(1, 1, 1, 1, 1)), "cpu") is None


# op -> a small shape as written out, forward and backward floor at a named shape on an H200, in milliseconds
SMALL = {
    "gated_delta_rule": ("1x40,1,16,16", "head-128", 524288 * 1032 / 4.3e9, 524288 * 442368 / 790e9),
    "gated_norm": ("1x40,2,8", "fla-1.3b", 32768 * 6 * 512 * 6 / 4.3e9, 32768 * 6 * 512 * 10 / 4.3e9),
    "linear_attention": ("1x40,1,2,8,8,8", "hgrn2-1.3b", 524288 * 1536 / 4.3e9, 524288 * (14 * 128 + 8 * 128) / 4.3e9),
    "linear_cross_entropy": ("1x40,8,32", "1.3b", 4.2949673e12 / 790e9, 8.5899346e12 / 790e9),
    "selective_scan": ("1x40,8,4", "mamba-1.3b", 32768 * 32832 / 4.3e9, 32768 * (14 * 4096 + 128) / 4.3e9),
    "short_conv": ("1x40,8,4", "keys-1.3b", 32768 * 1536 * 4 / 4.3e9, 32768 * 1536 * 6 / 4.3e9),
}


@pytest.mark.parametrize("op", ops.names())
def test_every_op_is_benched_from_its_own_folder(op):
    written, named, forward, backward = SMALL[op]
    benchmark = ops.benchmark(op)
    todo = bench.jobs(op, bench.Options(shapes=written, impls="chunked,reference", repetitions=1))
    assert [job.contender for job in todo] == ["chunked", "reference", *benchmark.PEERS] and len(todo) > 2
    for job in todo[:2]:
        row = bench.work(job)
        assert (row["sizes"], row["implementation"], row["note"], row["refused"]) == (written, job.contender, "", "")
        assert row["forward"]["ms"] > 0 and row["forward_backward"]["ms"] > 0
    assert all(bench.measure(job)["note"] == "not installed" for job in todo[2:])
    floor = floor_ms(benchmark.cost(benchmark.SHAPES[named]), "NVIDIA H200")
    assert floor["forward"] == pytest.approx(forward, rel=1e-3)
    assert floor["backward"] == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("op", ops.names())
def test_the_inputs_of_a_benchmark_are_random_and_make_gradients(op):
    benchmark = ops.benchmark(op)
    (shape,) = bench.shapes_of(op, SMALL[op][0]).values()
    given = benchmark.inputs(shape, np.random.default_rng(0))
    assert {*benchmark.BF16, *benchmark.GRADIENTS} <= set(given)
    other = benchmark.inputs(shape, np.random.default_rng(1))
    for name in benchmark.BF16:
        assert given[name].dtype == np.float32 and 0.1 < given[name].std() < 2.0
        assert np.abs(given[name] - other[name]).min() > 0
    given = {name: jnp.asarray(x) for name, x in given.items()}
    chosen = {name: given[name] for name in benchmark.GRADIENTS}
    _, pull = jax.vjp(lambda chosen: benchmark.ours("chunked", **given | chosen), chosen)
    out = jax.eval_shape(lambda: benchmark.ours("chunked", **given))
    (gradients,) = pull(jnp.ones(out.shape, out.dtype))
    assert all(float(jnp.abs(x).max()) > 0 for x in gradients.values())


def test_no_op_is_named_outside_its_folder():
    common = ("bench", "tune", "tuned", "peers", "ops", "roofline", "dispatch", "arguments", "accuracy")
    paths = [*(Path(ops.HERE, f"{name}.py") for name in common), ROOT / "experiments" / "doctor.py"]
    for path in (*paths, ROOT / "experiments" / "commands" / "machine.py"):
        assert not [op for op in ops.names() if op in path.read_text()], path


def test_a_repetition_lasts_long_enough_for_its_clock():
    asked = []

    def run(ms):
        def calls_of(calls):
            asked.append(calls)
            return ms * calls

        return calls_of

    assert bench.timed(run(3.0), 3) == {"ms": 3.0, "min_ms": 3.0, "max_ms": 3.0, "calls": 8}
    assert asked == [1, 8, 8, 8, 8]
    assert bench.timed(run(8.0), 1)["calls"] == 3
    assert bench.timed(run(0.001), 1)["calls"] == 50 and bench.timed(run(90.0), 1)["calls"] == 1
    uneven = iter([30.0, 30.0, 50.0, 40.0])
    assert bench.timed(lambda calls: next(uneven), 3) == {"ms": 40.0, "min_ms": 30.0, "max_ms": 50.0, "calls": 1}


def test_jobs_are_every_contender_at_every_shape():
    options = bench.Options(shapes=f"fla-1.3b,8x4096,6,256,512,head-128,{SIZES}", impls="chunked", peers="jla,fla")
    todo = bench.jobs(OP, options)
    assert [job.contender for job in todo] == ["chunked", "jla", "fla"] * 4
    assert [job.shape for job in todo[::3]] == ["fla-1.3b", "8x4096,6,256,512", "head-128", SIZES]
    assert todo[0].sizes == todo[3].sizes == (8, 4096, 6, 256, 512) and todo[9].sizes == (1, 64, 1, 16, 16)
    everything = bench.jobs(OP, bench.Options())
    assert len(everything) == 5 * len(BENCHMARK.SHAPES) and everything[5].shape == "fla-1.3b-16k"
    assert set(bench.IMPLS) == set(typing.get_args(dispatch.Impl))


MISTAKES = [
    ("bench", "`gdn bench` needs OP as its first word."),
    (
        "bench softmax",
        "There is no op 'softmax' to bench; it must be one of gated_delta_rule, gated_norm,",
    ),
    (f"bench {OP} --shapes fla-13b", "Shape 'fla-13b' is neither BxT,H,K,V, such as 8x4096,6,256,512, nor one of fla-"),
    (f"bench {OP} --shapes 8x4096,6,256", "Shape '8x4096,6,256' is not BxT,H,K,V"),
    (f"bench {OP} --shapes 8x0,6,256,512", "each a positive whole number."),
    (f"bench {OP} --shapes 8x4096,6,256,head-128", "Shape '8x4096,6,256,head-128' is not BxT,H,K,V"),
    (f"bench {OP} --shapes {SIZES} --repetitions 0", "repetitions is 0; it must be positive."),
    (f"bench {OP} --shapes {SIZES} --timeout -1", "timeout is -1; it must be positive."),
    (
        f"bench {OP} --shapes {SIZES} --impls cuda",
        "impls names 'cuda'; it must be none or some of auto, triton",
    ),
    (
        f"bench {OP} --shapes {SIZES} --peers fla,torch",
        "peers names 'torch'; it must be all, none or some of fla, ",
    ),
    (f"bench {OP} --impls none --peers none", "name at least one of ours or one peer."),
    (f"bench {OP} --shape {SIZES}", "no option --shape (did you mean '--shapes'?)"),
    (f"bench {OP} --repetitions few", "--repetitions is 'few'; it must be a whole number."),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_exit_code_2(capsys, words, sentence):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and sentence in err


@pytest.mark.slow
def test_starting_the_workers_takes_no_device_memory():
    code = (
        "import sys; from experiments.run import main; from pallas_kernels import bench, ops;"
        "bench.run = lambda todo: sys.exit(len(todo) if not {'jax', 'torch'} & set(sys.modules) else 'a framework');"
        "main(['bench', sys.argv[1], '--shapes', sys.argv[2], '--impls', 'chunked', '--peers', 'none'])"
    )
    for op, (written, *_) in SMALL.items():
        assert subprocess.run([sys.executable, "-c", code, op, written], cwd=ROOT).returncode == 1


def test_a_folder_of_the_users_is_no_module_of_a_worker(monkeypatch, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/__init__.py").write_text("raise SystemExit('theirs')")
    monkeypatch.chdir(tmp_path)
    answer = workers.ask("experiments.training_speed", {}, 60)
    assert isinstance(answer, dict) and "theirs" not in str(answer), answer  # of our module: a row that says what fails
