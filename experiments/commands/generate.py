"""`gdn generate`: a run's last checkpoint continues prompts, live on the terminal or as JSON."""

import json
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.commands import Stopped, named, say_if_changed
from experiments.options import Switch
from gdn_jax.errors import UserError
from gdn_jax.progress import Progress

if TYPE_CHECKING:
    from gdn_jax.generate import Completion

BETWEEN = "\n---\n"  # what parts two completions
# A model may write anything; on a terminal its control characters must not act.
CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue prompts with the last checkpoint of a run: an ID or the run's directory."""

    prompt: tuple[str, ...] = ()  # one or more; --prompt=-x for one that begins with a dash; none: begin a document
    prompt_file: str = ""  # a file with one prompt a line, after those of --prompt
    max_tokens: int = 256  # added to each prompt; EOS ends one earlier
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens; None: all
    top_p: float = 1.0  # draw from the fewest tokens that together have this probability
    seed: int = 0  # a prompt's text depends on it and on the prompt, not on the other prompts
    samples: int = 1  # texts for each prompt, with the seeds seed, seed + 1, ...
    batch_size: int | None = None  # texts that grow together, the next taking a finished one's place; None: at most 64
    stop: tuple[str, ...] = ()  # strings that end a text, themselves left out
    step: int | None = None  # which checkpoint; None: the newest
    precision: Literal["run", "bf16", "fp32"] = "run"  # of activations; run: as it was trained
    impl: Literal["auto", "chunked", "reference", "triton", "triton_interpret"] = "auto"  # for reading the prompt
    json: Switch = False  # print an array of objects instead of text


def generate_text(name: str, options: GenerateOptions) -> None:
    from gdn_jax.generate import MAX_SEED
    from gdn_jax.sampling import Sampling

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.samples < 1:
        raise UserError(f"samples is {options.samples}; it must be positive.")
    if not 0 <= options.seed <= MAX_SEED - options.samples:
        raise UserError(f"seed is {options.seed}; it must be in [0, 2^31 - samples].")
    texts = [*options.prompt, *_lines(options.prompt_file)] or [""]
    prompts = [text for text in texts for _ in range(options.samples)]
    seeds = [options.seed + i for _ in texts for i in range(options.samples)]
    progress = Progress(live=options.json)  # on a terminal the text itself is shown as it comes
    growing = _stream(name, options, sampling, prompts, seeds, progress)
    with progress:
        if options.json:
            _print_json(growing, options.max_tokens, progress)
        else:
            _print_text(growing, prompts)


def _stream(name, options: GenerateOptions, sampling, prompts: list[str], seeds: list[int], progress):
    """The growing completions of `gdn_jax.generate.stream` for a run's checkpoint."""
    import dataclasses

    from gdn_jax.generate import stream
    from gdn_jax.implementations import check_impl
    from gdn_jax.layers import compute_for
    from gdn_jax.runs import keep_compiled, open_run, run_directory

    experiment = named(name)
    say_if_changed(experiment)
    run = dataclasses.replace(experiment.run, impl=options.impl)
    optim = experiment.optim
    if options.precision != "run":
        optim = dataclasses.replace(optim, precision=options.precision)
    experiment = dataclasses.replace(experiment, run=run, optim=optim)
    check_impl(experiment)
    keep_compiled(run)
    opened = open_run(run_directory(experiment), step=options.step)
    return stream(
        opened.model, opened.tokenizer, prompts, max_tokens=options.max_tokens, sampling=sampling, seeds=seeds,
        stops=options.stop, compute=compute_for(experiment), batch_size=options.batch_size, progress=progress,
    )  # fmt: skip


def _print_text(growing: Iterable[list["Completion"]], prompts: list[str]) -> None:
    """Prompt and continuation of each text in order; the first unfinished one is shown as it grows."""
    plain = (lambda text: text.translate(CONTROL)) if sys.stdout.isatty() else str
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets "?", not an error
    current, shown, begun = 0, 0, False
    try:
        for completions in growing:
            while current < len(completions):
                if not begun:
                    print(BETWEEN * (current > 0) + plain(prompts[current]), end="")
                    begun = True
                text = completions[current].text
                print(plain(text[shown:]), end="", flush=True)
                shown = len(text)
                if not completions[current].finish:
                    break
                current, shown, begun = current + 1, 0, False
    finally:
        if begun or current:
            print(flush=True)


def _print_json(growing: Iterable[list["Completion"]], max_tokens: int, progress: "Progress") -> None:
    """All completions as one array; when stopped, those begun so far, and the exit code says so."""
    completions: list[Completion] = []
    interrupted = False
    try:
        for completions in growing:
            longest = max(len(completion.token_ids) for completion in completions)
            progress.show(f"Generated {longest:,} of at most {max_tokens:,} tokens.")
    except KeyboardInterrupt:
        interrupted = True
    rows = [
        {
            "prompt": completion.prompt,
            "text": completion.text,
            "finish": completion.finish or "interrupted",
            "tokens": len(completion.token_ids),
            "token_ids": completion.token_ids,
            "seed": completion.seed,
        }
        for completion in completions
    ]
    print(json.dumps(rows, indent=1, ensure_ascii=False))
    if interrupted:
        raise Stopped("Stopped; the texts are as far as they came.", 128 + signal.SIGINT)


def _lines(path: str) -> list[str]:
    if not path:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"prompt_file {path} cannot be read ({error.strerror}); give the path of a text file."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_file {path} is not UTF-8 (byte {error.start}); save it in UTF-8.") from None
    if not lines:
        raise UserError(f"prompt_file {path} is empty; write one prompt a line.")
    return lines
