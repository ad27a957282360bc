"""Training, top to bottom: prepare or resume, one jitted step, a loop that never waits for its own metrics.

`train` goes on from the newest checkpoint by itself, and the resumed run repeats the uninterrupted one exactly: the
checkpoint holds parameters and optimizer state, and batch number n is a function of the seed and n alone.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdn_jax import alive, data, distributed, fine_tuning, sharding
from gdn_jax.checkpoint import Checkpoints, checkpoint_bytes, write_config
from gdn_jax.config import Experiment
from gdn_jax.errors import Damaged, UserError
from gdn_jax.files import write_json
from gdn_jax.flops import train_flops_per_token
from gdn_jax.implementations import admit, traced
from gdn_jax.layers import compute_for
from gdn_jax.loss import next_token_loss
from gdn_jax.metrics import NoWriter, Writer, check_sinks, environment, peak_flops
from gdn_jax.model import LM, init_model
from gdn_jax.optim import optimizer, schedule
from gdn_jax.progress import SILENT, Progress
from gdn_jax.runs import keep_compiled, locked, prepared_data, run_directory
from gdn_jax.spikes import Spike, Watch, usual
from gdn_jax.stopping import Interrupted, stop_signals


def make_train_step(experiment: Experiment, transform: optax.GradientTransformation) -> Callable:
    """(model, optimizer state, batch [B, T+1]) -> (model, optimizer state, {loss, grad_norm}); pure."""
    compute = compute_for(experiment, training=True)
    slices = experiment.run.micro_batches
    loss_and_grad = jax.value_and_grad(lambda model, batch: next_token_loss(model, batch, compute))

    def accumulated(model, batch):
        # rows r, r + slices, ... form a slice, so that each keeps rows of every device
        batches = jax.tree.map(lambda x: x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total, batch):
            return jax.tree.map(jnp.add, total, loss_and_grad(model, batch)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, model))
        total, _ = jax.lax.scan(add, zero, batches)
        return jax.tree.map(lambda x: x / slices, total)

    def train_step(model, opt_state, batch):
        loss, grads = loss_and_grad(model, batch) if slices == 1 else accumulated(model, batch)
        updates, opt_state = transform.update(grads, opt_state, model)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(model, updates), opt_state, metrics

    return train_step


def keeping(train_step: Callable) -> Callable:
    """`train_step` with spikes.Watch.limit as a last argument: beyond it the state stays what it was.

    Its metrics have `applied` too. Decided on the devices, so that no step waits for the host and all processes agree.
    """

    def step(model, opt_state, batch, limit):
        *state, metrics = train_step(model, opt_state, batch)
        applied = usual(metrics["loss"], metrics["grad_norm"], limit)
        state = jax.tree.map(partial(jnp.where, applied), state, [model, opt_state])
        return *state, metrics | {"applied": applied}

    return step


@dataclasses.dataclass
class Trainer:
    """An experiment compiled for a mesh: how to begin, to step, to measure."""

    experiment: Experiment
    mesh: jax.sharding.Mesh

    def __post_init__(self):
        experiment, mesh = self.experiment, self.mesh
        rows = experiment.optim.batch_size // experiment.run.micro_batches
        parts, context = sharding.row_parts(mesh), mesh.shape["context"]
        if rows % parts:
            over = f" over run.context {context}" if context > 1 else ""
            raise UserError(
                f"optim.batch_size is {experiment.optim.batch_size}; over run.micro_batches "
                f"{experiment.run.micro_batches} it must be a multiple of the {mesh.size} devices{over}."
            )
        if experiment.data.seq_len % context:
            raise UserError(
                f"run.context is {context}; it must divide data.seq_len {experiment.data.seq_len}, whose tokens it "
                f"splits evenly."
            )
        transform = optimizer(experiment.optim)

        def begin(seed):
            model = init_model(experiment.model, jax.random.key(seed))
            return model, transform.init(model)

        shapes = jax.eval_shape(begin, 0)
        self.shardings = sharding.state_shardings(mesh, shapes)
        self.abstract = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, self.shardings
        )
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        self.begin = jax.jit(begin, static_argnums=0, out_shardings=self.shardings)
        step, inputs = make_train_step(experiment, transform), (*self.shardings, rows)
        self.skips = experiment.run.on_spike == "skip"
        if self.skips:
            step, inputs = keeping(step), (*inputs, everywhere)
        self.step = jax.jit(
            step,
            in_shardings=inputs,
            out_shardings=(*self.shardings, everywhere),
            donate_argnums=(0, 1),
        )
        compute = compute_for(experiment)
        self.batch_loss = jax.jit(
            lambda model, batch: next_token_loss(model, batch, compute),
            in_shardings=(self.shardings[0], rows),
            out_shardings=everywhere,
        )

    def implementations(self) -> dict[str, dict[str, str]]:
        """`implementations.traced` of the step, which is traced here and not again when it runs."""
        return traced(self.experiment.run.impl, self.traced_step)

    def traced_step(self) -> jax.stages.Traced:
        """The step on abstract arrays."""
        optim, group = self.experiment.optim, self.experiment.data
        rows = jax.sharding.NamedSharding(self.mesh, sharding.BATCH)
        tokens = jax.ShapeDtypeStruct((optim.batch_size, group.seq_len + 1), jnp.int32, sharding=rows)
        names = ("tokens", "segment_ids") if group.reset_at_documents else ("tokens",)
        limit = [jax.ShapeDtypeStruct((), jnp.float32)] if self.skips else []
        with jax.set_mesh(self.mesh):
            return self.step.trace(*self.abstract, dict.fromkeys(names, tokens), *limit)

    def validation_loss(self, model: LM, windows: data.ValidationWindows) -> float:
        """Mean nats per token over the held-out windows."""
        experiment = self.experiment
        batches = data.validation_batches(
            windows,
            batch_size=experiment.optim.batch_size // experiment.run.micro_batches,
            with_segments=experiment.data.reset_at_documents,
        )
        total = count = 0.0
        for batch in batches:
            rows = float(batch["weights"].sum())
            total += rows * float(self.batch_loss(model, sharding.place_whole(self.mesh, batch)))
            count += rows
        return total / count


def train(experiment: Experiment) -> Path:
    """Trains, or goes on, to the last step and returns the run's directory.

    Raises UserError for what the user can mend (a spike that run.on_spike stops at included: its batch is saved) and
    Interrupted when SIGINT or SIGTERM asked to stop, after saving.
    """
    directory = run_directory(experiment)
    if not distributed.alone():
        Progress().say(distributed.described())
    with contextlib.ExitStack() as stack:
        watched = stack.enter_context(alive.watched(distributed.silence(os.environ)))
        trainer, impls, prepared, windows = distributed.on_every(partial(_prepare, experiment))
        env = environment() | {"impl": impls, "data": prepared.identity._asdict()}
        same = ("python", "versions", "source", "backend", "impl", "data")
        distributed.agree({"hash": experiment.hash8, "recipe": experiment.recipe8} | {name: env[name] for name in same})
        progress = Progress(seconds=0) if distributed.first() else SILENT
        began = distributed.on_every(
            lambda: stack.enter_context(locked(directory, experiment)) if distributed.first() else experiment
        )
        keep_compiled(experiment.run)
        checkpoints = Checkpoints(directory / "checkpoints", experiment, writes=True, data=prepared.identity)
        stack.enter_context(contextlib.closing(checkpoints))
        stack.enter_context(jax.set_mesh(trainer.mesh))
        stack.enter_context(progress)
        stop = stack.enter_context(stop_signals())
        if checkpoints.latest == 0:
            raise UserError(
                f"{directory} holds parameters that were not trained here, and no optimizer state to go on with; "
                f"fine-tune them as a run of its own: gdn train ID --from {directory}."
            )
        if (checkpoints.latest or 0) >= experiment.optim.steps:
            checkpoints.check(checkpoints.latest)
            progress.say(f"{experiment.id}: all {checkpoints.latest} steps are done, in {directory}")
            return directory

        def state(step: int) -> tuple:
            if step:
                return checkpoints.load(step, *trainer.abstract)
            model, opt_state = trainer.begin(experiment.run.seed)
            if experiment.start:
                model = fine_tuning.parameters(experiment.start, trainer.abstract[0])
            return model, opt_state

        start, begin = _newest(checkpoints, state, progress)
        size, saves = checkpoint_bytes(*trainer.abstract), saves_left(experiment, start)
        distributed.on_every(lambda: checkpoints.check_space(size, saves))
        writer = NoWriter()
        if distributed.first():
            origins = {"start": began.start or experiment.start, "file": began.file or experiment.file}
            write_config(directory, dataclasses.replace(experiment, **origins))
            write_json(directory / "env.json", env)
            write_json(directory / "validation.json", windows.described())
            writer = Writer(directory, experiment, start)
        stack.enter_context(contextlib.closing(writer))
        source = experiment.start
        begins = "" if start or not source else f", with the parameters of {source.path} at step {source.step}"
        progress.say(f"{experiment.id}: step {start} of {experiment.optim.steps}, in {directory}{begins}")
        writer.write({"step": start, "event": "start"} | env)
        loop = _Loop(trainer, prepared, windows, checkpoints, writer, progress, directory, watched)
        try:
            loop.run(state, start, begin, stop)
        except (ValueError, RuntimeError) as error:
            alive.end_if_left(error)
            raise
    return directory


def saves_left(experiment: Experiment, start: int) -> int:
    """How many checkpoints a run writes after step `start`: one every run.save_every steps, and the last."""
    steps, every = experiment.optim.steps, experiment.run.save_every
    return steps // every - start // every + bool(steps % every)


def _prepare(experiment: Experiment) -> tuple[Trainer, dict, data.Prepared, data.ValidationWindows]:
    check_sinks(experiment.run)
    admit(experiment, Progress() if distributed.first() else SILENT)
    trainer = Trainer(experiment, sharding.make_mesh(experiment.run.fsdp, context=experiment.run.context))
    impls = trainer.implementations()
    prepared = prepared_data(experiment)
    data.check_length(prepared, experiment.data.seq_len, experiment.optim.batch_size)
    windows = data.validation_windows(prepared, experiment.data.seq_len, experiment.run.eval_windows)
    return trainer, impls, prepared, windows


def _newest(checkpoints: Checkpoints, state: Callable[[int], tuple], progress: Progress) -> tuple[int, tuple]:
    """(step, its state) of the newest checkpoint that is whole, or the beginning; a damaged one is set aside.

    Not the only one: that would begin again. Which there are is what process 0 sees.
    """
    while True:
        steps = json.loads(distributed.gathered(json.dumps(checkpoints.steps()))[0])
        step = max(steps, default=0)
        try:
            return step, state(step)
        except Damaged:
            if len(steps) < 2:
                raise
        aside = checkpoints.set_aside(step)
        progress.say(f"The checkpoint of step {step} is damaged; it is now {aside}, and the one before it is taken.")


class _Loop:
    """The steps. Step n is dispatched before the metrics of step n - 1 are fetched."""

    def __init__(
        self, trainer: Trainer, prepared: data.Prepared, windows: data.ValidationWindows, checkpoints: Checkpoints,
        writer: Writer | NoWriter, progress: Progress, directory: Path, watched: alive.Alive,
    ):  # fmt: skip
        self.trainer, self.prepared, self.windows, self.checkpoints = trainer, prepared, windows, checkpoints
        self.writer, self.progress, self.directory = writer, progress, directory
        self.watched = watched
        self.experiment = experiment = trainer.experiment
        self.schedule = schedule(experiment.optim)
        self.tokens_per_step = experiment.optim.batch_size * experiment.data.seq_len
        self.flops_per_token = train_flops_per_token(experiment.model, experiment.data.seq_len)
        self.peak = peak_flops()
        self.begun = self.since = time.monotonic()
        self.since_step, self.compiled = 0, False  # the first step's time is that of compiling it
        self.validation = math.nan

    def run(self, state: Callable[[int], tuple], start: int, begin: tuple, stop: list[int]) -> None:
        """From step `start` on, whose state `begin` is; state(step) is what a rewind goes back to."""
        self.watch = Watch(self.checkpoints.spikes(start) if start else None)
        self.asked = distributed.any_process(self.trainer.mesh)
        while (back := self._steps(*begin, start, stop)) is not None:
            begin, start = (), back  # the former state first makes room
            begin = state(start)

    def _steps(self, model, opt_state, start: int, stop: list[int]) -> int | None:
        """Trains to the end, or to a spike to rewind from, and returns the step to go back to."""
        run, optim = self.experiment.run, self.experiment.optim
        batches = self._batches(start, *sharding.own_rows(self.trainer.mesh))
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(batches))
            profile = stack.enter_context(contextlib.ExitStack())
            self.since_step, pending, profiling = start, None, False
            for step in range(start, optim.steps):
                batch = next(batches)
                if step == run.profile_at:
                    jax.profiler.start_trace(str(self.directory / "profile"))
                    profile.callback(jax.profiler.stop_trace)
                    profiling = True
                placed = sharding.place_batch(self.trainer.mesh, batch)
                limit = [self.watch.limit(step + 1)] if self.trainer.skips else []
                model, opt_state, metrics = self.trainer.step(model, opt_state, placed, *limit)
                if pending is not None and (back := self._log(*pending)) is not None:
                    return back
                pending = (step + 1, metrics, batch)
                last, stopping = step + 1 == optim.steps, self.asked(bool(stop))
                if profiling and (step + 1 - run.profile_at >= run.profile_steps or last or stopping):
                    jax.block_until_ready(metrics)
                    profile.close()
                    profiling = False
                evaluate = last or (step + 1) % run.eval_every == 0
                if evaluate or stopping or (step + 1) % run.save_every == 0:
                    # a state is measured or saved only once its loss is known to be no spike, or its update left out
                    if (back := self._log(*pending)) is not None:
                        return back
                    pending = None
                    if evaluate:
                        self._validate(step + 1, model)
                    if not (self.directory / "config.json").exists():
                        raise UserError(
                            f"The run's directory {self.directory} is gone, or its config.json, since training began; "
                            f"bring it back and run the same command, which otherwise begins again."
                        )
                    regular = (step + 1) % run.save_every == 0
                    if last or stopping or regular:
                        self.watch.rewinds *= not regular
                        self.checkpoints.save(step + 1, model, opt_state, self.watch.recorded())
                    self.since, self.since_step = time.monotonic(), step + 1
                if stopping and not last:
                    self.checkpoints.wait()
                    raise Interrupted(step + 1, stop[0] if stop else signal.SIGTERM)
        return None

    def _batches(self, start: int, part: int, parts: int) -> Iterator[data.Batch]:
        """This part of the batch of step `start` + 1 and of those after it."""
        group = self.experiment.data
        return data.train_batches(
            self.prepared,
            seq_len=group.seq_len,
            batch_size=self.experiment.optim.batch_size,
            seed=self.experiment.run.seed,
            start_step=start + self.watch.passed,
            with_segments=group.reset_at_documents,
            process_index=part,
            process_count=parts,
        )

    def _log(self, step: int, metrics: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> int | None:
        """The step to go back to because of this one."""
        run, optim = self.experiment.run, self.experiment.optim
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        self.watched.step = step
        done = step - 1 - self.watch.skipped  # updates before this one
        limit = self.watch.limit(step)
        if not (metrics["applied"] if self.trainer.skips else usual(loss, norm, limit)):
            return self._spike(Spike(step, loss, norm, limit), batch)
        self.watch.add(step, loss)
        now, rate = time.monotonic(), None
        if self.compiled:
            rate = (step - self.since_step) * self.tokens_per_step / max(now - self.since, 1e-9)
        logged = step % run.log_every == 0 or step in (1, optim.steps)
        if logged or not self.compiled:
            self.since, self.since_step, self.compiled = now, step, True
        if not logged:
            return None
        mfu = None if self.peak is None or rate is None else rate * self.flops_per_token / self.peak
        row = {
            "step": step,
            "loss": loss,
            "lr": float(self.schedule(done)),
            "grad_norm": norm,
            "tokens_per_second": rate and round(rate, 1),
            "mfu": mfu,
            "tokens": step * self.tokens_per_step,
            "time": round(now - self.begun, 3),
            "batch": _checksum(batch),
        }
        self.writer.write(row)
        speed = "-" if rate is None else f"{rate:,.0f}"
        left = "-" if rate is None else f"{(optim.steps - step) * self.tokens_per_step / rate:,.0f}"
        validation = "-" if math.isnan(self.validation) else f"{self.validation:.4f}"
        self.progress.show(
            f"step {step}/{optim.steps}  loss {loss:.4f}  val {validation}  lr {row['lr']:.2e}  "
            f"|g| {norm:.2f}  {speed} tokens/s  MFU {'-' if mfu is None else f'{mfu:.1%}'}  {left} s left"
        )
        return None

    def _spike(self, spike: Spike, batch: dict[str, np.ndarray]) -> int | None:
        """Records the spike and stops the run, or gives the step to go back to."""
        run, watch, step = self.experiment.run, self.watch, spike.step
        watch.in_a_row += run.on_spike == "skip"
        stops = watch.too_often(run.on_spike)
        row = {"event": run.on_spike, "spike": {"step": step} | spike.values()}
        if run.on_spike == "skip" and not stops:
            watch.skipped += 1
            self.progress.say(f"{spike}: its update is left out.")
            self.writer.write({"step": step} | row | {"batch": _checksum(batch)})
            return None
        if run.on_spike == "rewind" and not stops:
            back = self.checkpoints.back_from(step, run.save_every)
            self.progress.say(f"{spike}: back to step {back}, and on past the {step - back} batches since then.")
            self.writer.back_to(back)
            self.writer.write({"step": back + 1} | row | {"batches": [back + watch.passed, step - 1 + watch.passed]})
            self.watch = watch.back(back, step, self.checkpoints.spikes(back) if back else None)
            return back
        self.checkpoints.wait()
        path = self.directory / f"spike-step-{step}.npz"
        if distributed.first():
            with contextlib.closing(self._batches(step - 1, 0, 1)) as whole:  # the rows of all processes
                np.savez_compressed(path, **next(whole))
        at = "none" if self.checkpoints.latest is None else f"step {self.checkpoints.latest}"
        raise UserError(
            f"{spike}{stops} lower optim.lr {self.experiment.optim.lr}, or look at the batch in {path}; the last "
            f"checkpoint ({at}) stands."
        )

    def _validate(self, step: int, model: LM) -> None:
        self.validation = self.trainer.validation_loss(model, self.windows)
        self.writer.write({"step": step, "validation_loss": self.validation})
        self.progress.say(
            f"step {step}/{self.experiment.optim.steps}  validation loss {self.validation:.4f} nats per token"
        )


def _checksum(batch: dict[str, np.ndarray]) -> str:
    return f"{zlib.crc32(batch['tokens'].tobytes()):08x}"
