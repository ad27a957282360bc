"""Spikes in real runs, for each run.on_spike: what is recorded, and a stopped run goes on as if it had not been."""

import contextlib
import copy
import json
import random
import signal
import sys

import jax
import numpy as np
import poisoned
import pytest
from poisoned import POISON, STEPS
from processes import ended, started
from small import experiment

from gdn_jax import checkpoint, prepare, sharding, spikes, train
from gdn_jax.errors import UserError
from gdn_jax.metrics import Writer, read_rows
from gdn_jax.optim import schedule
from gdn_jax.progress import SILENT
from gdn_jax.spikes import Watch, usual
from gdn_jax.tree import named_leaves

AT = 40  # the step with a poisoned batch
TRAINER, WRITE = train.Trainer, Writer.write


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three phrases in any order: `nan` and `large` have one poisoned character, `always` one in every window."""
    directory = tmp_path_factory.mktemp("spikes")
    chance = random.Random(0)
    words = [chance.choice(["the state ", "a gate ", "one key "]) for _ in range(2400)]
    for name, poison, every in (("nan", "nan", 1000), ("large", "large", 1000), ("always", "nan", 3)):
        text = [POISON[poison] if i and i % every == 0 and i < 1999 else word for i, word in enumerate(words)]
        (directory / name / "text").mkdir(parents=True)
        (directory / name / "text" / "a.txt").write_text("".join(text))
        group = experiment(directory / name).data
        out = prepare.default_directory(group, str(directory / name / "data"))
        prepare.prepare(group.source, out, group.tokenizer, validation=group.validation, progress=SILENT)
    return directory


@pytest.fixture(scope="module")
def compiled():
    """(run.on_spike, optim.lr) -> Trainer, so that a step is compiled once for all runs."""
    return {}


@pytest.fixture
def run(home, compiled, monkeypatch):
    """Trains `home`, as far as `until` lets it, and returns the run's directory."""

    def call(name, on_spike, text="nan", until=lambda row: None, lr=poisoned.LR):
        def trainer(asked, mesh):
            key = on_spike, lr
            compiled[key] = copy.copy(compiled.get(key) or TRAINER(asked, mesh))
            compiled[key].experiment = asked
            return compiled[key]

        def write(self, row):
            WRITE(self, row)
            until(row)

        monkeypatch.setattr(train, "next_token_loss", poisoned.loss)
        monkeypatch.setattr(train, "Trainer", trainer)
        monkeypatch.setattr(Writer, "write", write)
        directory = home / name
        train.train(poisoned.spiking(home / text, directory, on_spike, lr))
        return directory

    return call


def rows(directory):
    """All of metrics.jsonl but starts and what a clock said."""
    clocks = ("time", "tokens_per_second", "mfu")
    found = [row for row in read_rows(directory) if row.get("event") != "start"]
    return [{name: value for name, value in row.items() if name not in clocks} for row in found]


def batches(found):
    return [row["batch"] for row in found if "batch" in row]


def stopped(row):
    signal.raise_signal(signal.SIGTERM)


def killed(row):
    raise ConnectionAbortedError  # nothing is saved any more, as of a process that is killed


def at(step, do, event=None):
    """What `until` is: do(row) once, at the row of a step."""
    left = [step]

    def until(row):
        if left and (row["step"], row.get("event")) == (step, event) and (event or "loss" in row):
            left.pop()
            do(row)

    return until


# --- the rule ---


def test_limits_by_hand():
    watch = Watch()
    for step in range(1, 33):
        assert watch.limit(step + 1) == np.inf  # 31 are known at step 33, the 32nd is too new
        watch.add(step, 2.0 if step % 2 else 4.0)
    watch.add(33, 100.0)
    np.testing.assert_allclose(watch.limit(34), 3 + 10 * 1.4826)  # MAD 1
    assert usual(17.82, 1e30, watch.limit(34)) and not usual(17.83, 1.0, watch.limit(34))
    for value in (np.nan, np.inf, -np.inf):
        assert not usual(value, 1.0, np.float32(np.inf))
    assert not usual(1.0, np.nan, np.float32(np.inf)) and not usual(1.0, np.inf, np.float32(np.inf))
    flat = Watch()
    for step in range(1, 200):
        flat.add(step, 1.0 if step > 70 else 50.0)
    assert flat.limit(200) == 1.5  # 50 is out of the window of 128; a rise of 0.5 nats at least
    flat.add(200, 3.0)
    assert flat.limit(202) == 3.5  # a batch of another kind was seen before


def test_what_is_recorded_judges_as_before():
    watch, chance = Watch(), random.Random(0)
    for step in range(1, 150):
        watch.add(step, chance.random())
    again = Watch(json.loads(json.dumps(watch.recorded())))
    assert [watch.limit(step) for step in (150, 151)] == [again.limit(step) for step in (150, 151)]
    assert np.isfinite(watch.limit(150)) and watch.limit(150) != watch.limit(151)


def test_a_step_beyond_its_limit_leaves_every_array_as_it_was(home):
    trainer = TRAINER(experiment(home / "nan", on_spike="skip"), sharding.make_mesh(1))
    tokens = np.random.default_rng(0).integers(3, 250, (8, 33)).astype(np.int32)
    with jax.set_mesh(trainer.mesh):
        batch = sharding.place_batch(trainer.mesh, {"tokens": tokens})
        *state, first = trainer.step(*trainer.begin(0), batch, np.float32(np.inf))

        def stepped(state, limit):
            before = {name: np.array(leaf) for name, leaf in named_leaves(tuple(state)).items()}
            *state, metrics = trainer.step(*state, batch, np.float32(limit))
            after = {name: np.array(leaf) for name, leaf in named_leaves(tuple(state)).items()}
            changed = [name for name in before if not np.array_equal(before[name], after[name])]
            return state, bool(metrics["applied"]), len(changed), len(after)

        state, *skipped, leaves = stepped(state, first["loss"] - 1)
        assert skipped == [False, 0] and leaves > 30
        state, *made, _ = stepped(state, first["loss"] + 1)
        assert made[0] and made[1] > 0.9 * leaves and trainer.step._cache_size() == 1


# --- stop ---


def test_stop_names_the_step_and_the_way_on(run, home):
    with pytest.raises(UserError) as stop:
        run("stop", "stop", "large")
    said = str(stop.value)
    assert (
        said.startswith(f"At step {AT} the loss is ") and "(usual: up to " in said and "and the gradient norm" in said
    )
    assert "; pass it with --run.on_spike skip or rewind, lower optim.lr 0.01" in said and len(said) < 400
    assert said.endswith("the last checkpoint (step 30) stands.")
    directory = home / "stop"
    assert (np.load(directory / f"spike-step-{AT}.npz")["tokens"] == ord(POISON["large"])).any()
    assert sorted(int(path.name) for path in (directory / "checkpoints").iterdir()) == [10, 20, 30]
    assert max(row["step"] for row in rows(directory)) == AT - 1


@pytest.mark.slow
def test_a_stopped_run_passes_the_spike_when_it_is_told_to(run, home):
    with pytest.raises(UserError):
        run("told", "stop", "large")
    run("told", "skip", "large")
    found = rows(home / "told")
    assert [row["step"] for row in found if row.get("event") == "skip"] == [AT]
    assert [row["step"] for row in found if "batch" in row] == list(range(1, STEPS + 1))


# --- skip ---


@pytest.mark.parametrize("text", ["nan", pytest.param("large", marks=pytest.mark.slow)])
def test_a_skipped_step_is_recorded_and_a_resumed_run_is_the_same(run, home, text):
    wanted = rows(run(f"skip-{text}", "skip", text))
    (skip,) = [row for row in wanted if row.get("event") == "skip"]
    assert skip["step"] == skip["spike"]["step"] == AT
    assert skip["spike"]["loss"] == "nan" if text == "nan" else skip["spike"]["loss"] > 20
    losses = {row["step"]: row for row in wanted if "loss" in row}
    assert list(losses) == [step for step in range(1, STEPS + 1) if step != AT]
    optim = checkpoint.read_config(home / f"skip-{text}").optim
    assert losses[AT + 1]["lr"] == pytest.approx(float(schedule(optim)(AT - 1)))  # of update 39, not 40
    assert len(set(batches(wanted))) == STEPS
    name = f"skip-{text}-resumed"
    with pytest.raises(train.Interrupted) as stop:
        run(name, "skip", text, until=at(AT, stopped, "skip"))
    assert stop.value.step == AT + 1
    assert rows(run(name, "skip", text)) == wanted


def test_ten_skips_in_a_row_stop(run, home):
    with pytest.raises(
        UserError, match=f"At step {spikes.SKIPS} the loss is nan .* the 10th such step in a row; lower"
    ):
        run("skip-always", "skip", "always")
    assert [row["step"] for row in rows(home / "skip-always")] == list(range(1, spikes.SKIPS))


# --- rewind ---


@pytest.fixture(scope="module")
def rewound():
    """The rows of a run that nothing disturbed, made by the first test that asks."""
    return []


@pytest.mark.parametrize(
    ("name", "do", "step"),
    [
        ("stopped-before", stopped, 35),
        pytest.param("killed-after", killed, 34, marks=pytest.mark.slow),
        pytest.param("killed-later", killed, 43, marks=pytest.mark.slow),
    ],
)
def test_a_rewind_passes_the_batches_and_a_resumed_run_is_the_same(run, rewound, name, do, step):
    """It goes back to 30, the last regular checkpoint, for the run that was stopped (and saved) at 36 too."""
    if not rewound:
        rewound += rows(run("rewind", "rewind"))
        (event,) = [row for row in rewound if row.get("event") == "rewind"]
        assert event["step"] == 31 and event["batches"] == [30, AT - 1] and event["spike"]["loss"] == "nan"
        assert [row["step"] for row in rewound if "loss" in row] == list(range(1, STEPS + 1))
        assert len(set(batches(rewound))) == STEPS
    if name == "killed-after":  # at the second step 34, after the rewind
        passes = at(step, do)
        first = at(step, lambda row: None)
        seen = []

        def until(row):
            seen.append(row.get("event"))
            (passes if "rewind" in seen else first)(row)
    else:
        until = at(step, do)
    with pytest.raises((train.Interrupted, ConnectionAbortedError)):
        run(name, "rewind", until=until)
    assert rows(run(name, "rewind")) == rewound


def test_three_rewinds_without_a_checkpoint_stop(run, home):
    with pytest.raises(
        UserError, match="At step 1 the loss is nan .*, after 3 rewinds without a checkpoint between them;"
    ):
        run("rewind-always", "rewind", "always")
    found = [row["batches"] for row in rows(home / "rewind-always")]
    assert found == [[0, 0], [1, 1], [2, 2]]
    assert checkpoint.read_config(home / "rewind-always").run.on_spike == "rewind"


# --- several processes ---


GENTLE = 1e-4  # with 1e-2 rounding alone changes the losses by a hundredth after 40 steps


@pytest.mark.slow
@pytest.mark.parametrize("on_spike", ["rewind", "skip", "stop"])
def test_two_processes_do_as_one(run, home, tmp_path, on_spike):
    """The same steps left out or passed over, the same losses, everything said and recorded once."""
    with pytest.raises(UserError) if on_spike == "stop" else contextlib.nullcontext() as stop:
        run(f"alone-{on_spike}", on_spike, lr=GENTLE)
    directory = home / f"two-{on_spike}"
    program = (sys.executable, poisoned.__file__, home / "nan", directory, on_spike, GENTLE)
    codes, said = ended(tmp_path, started(tmp_path, [()] * 2, program=program))
    assert codes == ([2, 2] if stop else [0, 0]), said
    alone, two = rows(home / f"alone-{on_spike}"), rows(directory)
    numbers = ("loss", "validation_loss", "grad_norm", "lr", "tokens")
    for one, other in zip(alone, two, strict=True):
        one_has, other_has = ([row.get(name, 0) for name in numbers] for row in (one, other))
        assert one_has == pytest.approx(other_has, rel=1e-5)
        assert all(one.get(name) == other.get(name) for name in ("step", "event", "spike", "batches"))
    assert [row["event"] for row in two if "event" in row] == ([] if stop else [on_spike])
    assert (tmp_path / "0.err").read_text().count(f"At step {AT} the loss is nan") == 1
    if stop:
        assert said == [str(stop.value).replace("alone-stop", "two-stop")] * 2
        (found,) = directory.glob("spike*")
        saved = np.load(found)["tokens"]
        np.testing.assert_array_equal(saved, np.load(home / "alone-stop" / found.name)["tokens"])
        assert (saved == ord(POISON["nan"])).any() and len(saved) == 8
