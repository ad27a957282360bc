"""Training, top to bottom: prepare or resume, one jitted step, a loop that never waits for its own metrics.

    runs/<id>/<hash8>/   config.json  env.json  metrics.jsonl  checkpoints/<step>  result.json  loss.png

`train` goes on from the newest checkpoint by itself, and the resumed run repeats the uninterrupted one exactly: the
checkpoint holds parameters and optimizer state, and batch number n is a function of the seed and n alone.
"""

import contextlib
import dataclasses
import fcntl
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.live import Live

from gdn_jax import data, prepare, sharding, tokenizer
from gdn_jax.checkpoint import Checkpoints, check_same, read_config
from gdn_jax.config import DeltaNetConfig, Experiment, GatedDeltaNetConfig, to_dict
from gdn_jax.errors import UserError
from gdn_jax.files import write_json
from gdn_jax.flops import train_flops_per_token
from gdn_jax.layers import compute_for
from gdn_jax.loss import next_token_loss
from gdn_jax.metrics import Writer, check_sinks, environment, peak_flops
from gdn_jax.model import LM, init_model
from gdn_jax.optim import optimizer, schedule
from pallas_kernels import gated_delta_rule, linear_attention, selective_scan


def _delta_rule(experiment: Experiment, mixer: GatedDeltaNetConfig | DeltaNetConfig):
    dtype = compute_for(experiment).dtype
    return gated_delta_rule.resolve(
        experiment.run.impl, key_dim=mixer.key_dim, value_dim=mixer.value_dim, chunk=experiment.run.chunk, dtype=dtype
    )


# mixer -> its op and how impl resolves
OPS = {
    "gated_deltanet": ("gated_delta_rule", lambda run: _delta_rule(run, run.model.gated_deltanet)),
    "deltanet": ("gated_delta_rule", lambda run: _delta_rule(run, run.model.deltanet)),
    "mamba": ("selective_scan", lambda run: selective_scan.resolve(run.run.impl)),
    **dict.fromkeys(
        ("retnet", "hgrn2", "mamba2"), ("linear_attention", lambda run: linear_attention.resolve(run.run.impl))
    ),
}


class Interrupted(Exception):
    """Asked to stop by a signal; everything up to `step` is saved."""

    def __init__(self, step: int, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, which is saved")
        self.step, self.signal = step, number


def run_directory(experiment: Experiment) -> Path:
    """run.dir, or runs/<id>/<hash8> below the current directory."""
    return Path(experiment.run.dir or Path("runs") / experiment.id / experiment.hash8)


def chosen_impls(experiment: Experiment) -> dict[str, dict[str, str]]:
    """{op: {"impl", "refused"}} for the ops of the pattern, or a UserError when run.impl cannot run here."""
    run, found = experiment.run, {}
    for mixer in dict.fromkeys(experiment.model.pattern):
        if mixer in OPS:
            op, resolve = OPS[mixer]
            try:
                found[op] = resolve(experiment)._asdict()
            except NotImplementedError as error:
                reason = str(error).rpartition("cannot run: ")[2].partition(";")[0].rstrip(".")
                raise UserError(
                    f"run.impl is {run.impl!r}, which cannot run {op} here ({reason}); use 'auto'."
                ) from None
    return found


def prepared_data(experiment: Experiment, progress: Callable[[str], None] | None = None) -> data.Prepared:
    """The experiment's prepared data; Python's standard library prepares itself, other sources are asked for."""
    group = experiment.data
    directory = prepare.default_directory(group, experiment.run.data_root)
    if group.source == "python-stdlib" and not (directory / "manifest.json").exists():
        prepare.prepare(group.source, directory, group.tokenizer, validation=group.validation, progress=progress)
    if not any((directory / name).exists() for name in ("manifest.json", "plan.json")):
        raise UserError(
            f"data.source {group.source!r} is not prepared in {directory}; run: gdn data prepare "
            f"{group.source if Path(group.source).exists() else 'SOURCE'} --out {directory} --tokenizer "
            f"{group.tokenizer} --validation {group.validation}."
        )
    tokens = tokenizer.load(group.tokenizer)
    prepared = data.open_prepared(directory, tokenizer_hash=tokens.hash8)
    if prepared.vocab > experiment.model.vocab:
        raise UserError(
            f"model.vocab is {experiment.model.vocab}; it must be at least {prepared.vocab}, the tokens of "
            f"data.tokenizer {group.tokenizer!r}."
        )
    if not math.isclose(prepared.manifest["validation"], group.validation):
        raise UserError(
            f"data.validation is {group.validation} but {directory} was prepared with "
            f"{prepared.manifest['validation']}; use that, or prepare into another run.data_root."
        )
    return prepared


def make_train_step(experiment: Experiment, transform: optax.GradientTransformation) -> Callable:
    """(model, optimizer state, batch [B, T+1]) -> (model, optimizer state, {loss, grad_norm}); pure."""
    compute = compute_for(experiment)
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


@dataclasses.dataclass
class Trainer:
    """An experiment compiled for a mesh: how to begin, to step, to measure."""

    experiment: Experiment
    mesh: jax.sharding.Mesh

    def __post_init__(self):
        experiment, mesh = self.experiment, self.mesh
        rows = experiment.optim.batch_size // experiment.run.micro_batches
        if rows % mesh.size:
            raise UserError(
                f"optim.batch_size is {experiment.optim.batch_size}; over run.micro_batches "
                f"{experiment.run.micro_batches} it must be a multiple of the {mesh.size} devices."
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
        self.step = jax.jit(
            make_train_step(experiment, transform),
            in_shardings=(*self.shardings, rows),
            out_shardings=(*self.shardings, everywhere),
            donate_argnums=(0, 1),
        )
        compute = compute_for(experiment)
        self.batch_loss = jax.jit(
            lambda model, batch: next_token_loss(model, batch, compute),
            in_shardings=(self.shardings[0], rows),
            out_shardings=everywhere,
        )

    def validation_loss(self, model: LM, prepared: data.Prepared) -> float:
        """Mean nats per token over the first run.eval_windows held-out windows."""
        group, run = self.experiment.data, self.experiment.run
        batches = data.validation_batches(
            prepared,
            seq_len=group.seq_len,
            batch_size=self.experiment.optim.batch_size // run.micro_batches,
            windows=run.eval_windows,
            with_segments=group.reset_at_documents,
        )
        total = count = 0.0
        for batch in batches:
            rows = float(batch["weights"].sum())
            total += rows * float(self.batch_loss(model, sharding.place_batch(self.mesh, batch)))
            count += rows
        return total / count


def train(experiment: Experiment) -> Path:
    """Trains, or goes on, to the last step and returns the run's directory.

    Raises UserError for what the user can mend (a loss that is not finite included: its step and batch are saved) and
    Interrupted when SIGINT or SIGTERM asked to stop, after saving.
    """
    directory = run_directory(experiment)
    impls = chosen_impls(experiment)
    check_sinks(experiment.run)
    trainer = Trainer(experiment, sharding.make_mesh(experiment.run.fsdp))
    prepared = prepared_data(experiment)
    data.check_length(prepared, experiment.data.seq_len, experiment.optim.batch_size)
    with _own(directory, experiment):
        if experiment.run.compile_cache:
            jax.config.update("jax_compilation_cache_dir", str(Path(experiment.run.compile_cache).resolve()))
        checkpoints = Checkpoints(directory / "checkpoints", experiment, writes=True)
        with jax.set_mesh(trainer.mesh), _Line() as line, _stop_signals() as stop, contextlib.closing(checkpoints):
            start = checkpoints.latest or 0
            if start >= experiment.optim.steps:
                checkpoints.check(start)
                line.say(f"{experiment.id}: all {start} steps are done, in {directory}")
                return directory
            if start:
                model, opt_state = checkpoints.load(start, *trainer.abstract)
            else:
                model, opt_state = trainer.begin(experiment.run.seed)
            write_json(directory / "config.json", to_dict(experiment))
            env = environment() | {"impl": impls}
            write_json(directory / "env.json", env)
            writer = Writer(directory, experiment, start)
            with contextlib.closing(writer):
                line.say(f"{experiment.id}: step {start} of {experiment.optim.steps}, in {directory}")
                writer.write({"step": start, "event": "start"} | env)
                loop = _Loop(trainer, prepared, checkpoints, writer, line, directory)
                loop.run(model, opt_state, start, stop)
    return directory


class _Loop:
    """The steps. Step n is dispatched before the metrics of step n - 1 are fetched."""

    def __init__(self, trainer, prepared, checkpoints, writer, line, directory):
        self.trainer, self.prepared, self.checkpoints = trainer, prepared, checkpoints
        self.writer, self.line, self.directory = writer, line, directory
        self.experiment = experiment = trainer.experiment
        self.schedule = schedule(experiment.optim)
        self.tokens_per_step = experiment.optim.batch_size * experiment.data.seq_len
        self.flops_per_token = train_flops_per_token(experiment.model, experiment.data.seq_len)
        self.peak = peak_flops()
        self.begun = self.since = time.monotonic()
        self.since_step = 0
        self.validation = math.nan

    def run(self, model, opt_state, start: int, stop: list[int]) -> None:
        run, optim, group = self.experiment.run, self.experiment.optim, self.experiment.data
        batches = data.train_batches(
            self.prepared,
            seq_len=group.seq_len,
            batch_size=optim.batch_size,
            seed=run.seed,
            start_step=start,
            with_segments=group.reset_at_documents,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with contextlib.closing(batches):
            self.since_step, pending, profiling = start, None, False
            for step in range(start, optim.steps):
                batch = next(batches)
                if step == run.profile_at:
                    jax.profiler.start_trace(str(self.directory / "profile"))
                    profiling = True
                placed = sharding.place_batch(self.trainer.mesh, batch)
                model, opt_state, metrics = self.trainer.step(model, opt_state, placed)
                if pending is not None:
                    self._log(*pending)
                pending = (step + 1, metrics, batch)
                last, stopping = step + 1 == optim.steps, bool(stop)
                if profiling and (step + 1 - run.profile_at >= run.profile_steps or last or stopping):
                    jax.block_until_ready(metrics)
                    jax.profiler.stop_trace()
                    profiling = False
                evaluate = last or (step + 1) % run.eval_every == 0
                if evaluate or stopping or (step + 1) % run.save_every == 0:
                    self._log(*pending)  # a state is measured or saved only once its loss is known to be finite
                    pending = None
                    if evaluate:
                        self._validate(step + 1, model)
                    if last or stopping or (step + 1) % run.save_every == 0:
                        self.checkpoints.save(step + 1, model, opt_state)
                    self.since, self.since_step = time.monotonic(), step + 1
                if stopping and not last:
                    self.checkpoints.wait()
                    raise Interrupted(step + 1, stop[0])

    def _log(self, step: int, metrics: dict[str, jax.Array], batch: dict[str, np.ndarray]) -> None:
        run, optim = self.experiment.run, self.experiment.optim
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            path = self.directory / f"nonfinite-step-{step}.npz"
            np.savez_compressed(path, **batch)
            saved = self.checkpoints.latest
            raise UserError(
                f"At step {step} the loss is {loss} and the gradient norm {norm}; lower optim.lr {optim.lr}, or look "
                f"at the batch in {path} and the last checkpoint ({'none' if saved is None else f'step {saved}'})."
            )
        if step % run.log_every and step not in (1, optim.steps):
            return
        now = time.monotonic()
        rate = (step - self.since_step) * self.tokens_per_step / max(now - self.since, 1e-9)
        self.since, self.since_step = now, step
        mfu = None if self.peak is None else rate * self.flops_per_token / self.peak
        row = {
            "step": step,
            "loss": loss,
            "lr": float(self.schedule(step - 1)),
            "grad_norm": norm,
            "tokens_per_second": round(rate, 1),
            "mfu": mfu,
            "tokens": step * self.tokens_per_step,
            "time": round(now - self.begun, 3),
            "batch": f"{zlib.crc32(batch['tokens'].tobytes()):08x}",
        }
        self.writer.write(row)
        left = (optim.steps - step) * self.tokens_per_step / max(rate, 1e-9)
        validation = "-" if math.isnan(self.validation) else f"{self.validation:.4f}"
        self.line.show(
            f"step {step}/{optim.steps}  loss {loss:.4f}  val {validation}  lr {row['lr']:.2e}  "
            f"|g| {norm:.2f}  {rate:,.0f} tokens/s  MFU {'-' if mfu is None else f'{mfu:.1%}'}  {left:,.0f} s left"
        )

    def _validate(self, step: int, model: LM) -> None:
        self.validation = self.trainer.validation_loss(model, self.prepared)
        self.writer.write({"step": step, "validation_loss": self.validation})
        self.line.say(
            f"step {step}/{self.experiment.optim.steps}  validation loss {self.validation:.4f} nats per token"
        )


class _Line:
    """One live line on a terminal, plain lines elsewhere."""

    def __init__(self):
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def show(self, text: str) -> None:
        self.live.update(text) if self.live else self.say(text)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)


@contextlib.contextmanager
def _own(directory: Path, experiment: Experiment) -> Iterator[None]:
    """The run's directory, made or checked, held by this process alone."""
    config = directory / "config.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in directory.iterdir()}
        if names and not names & {"config.json", "lock"}:
            raise _no_run(directory)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"The run's directory {directory} cannot be written ({error.strerror}); choose another run.dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is training in {directory}; wait for it, or choose another run.dir."
            ) from None
        if config.exists():
            check_same(read_config(directory), experiment, directory)
        elif {path.name for path in directory.iterdir()} - {"lock", "config.json.new"}:
            raise _no_run(directory)
        else:
            write_json(config, to_dict(experiment))
        yield


def _no_run(directory: Path) -> UserError:
    return UserError(f"{directory} holds files but no run; choose another run.dir, or an empty one.")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT add to: the loop stops after its step. A second SIGINT stops at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may handle signals
        return

    def ask(number, _frame):
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
