"""Tasks, texts and requests that several processes answer together: the numbers of one process, bit for bit."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ended, started
from small import experiment

from gdn_jax import checkpoint, distributed, tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate.dealt import of_all, turns
from gdn_jax.evaluate.generation import answers
from gdn_jax.evaluate.scoring import Scorer
from gdn_jax.fingerprint import Identity
from gdn_jax.layers import Compute
from gdn_jax.model import init_model
from gdn_jax.progress import SILENT

ROWS = Path(__file__).parent / "eval_rows"


def alone(port, count, index):
    return {}


def model_of():
    model = replace(experiment(Path()).model, vocab=257)
    return jax.jit(init_model, static_argnums=0)(model, jax.random.key(4))


def found_here():
    """Scores, whole texts and answers, each over several batches, and how many batches of each this process made."""
    rng, made = np.random.default_rng(0), {"scores": 0, "texts": 0, "answers": 0}

    def counted(name):
        def done(found):
            made[name] += 1

        return done

    class Echo:
        identity = "echo"

        def __call__(self, prompts, max_tokens, stops, progress):
            made["answers"] += 1
            return [f"{prompt}!" for prompt in prompts]

    texts = [rng.integers(0, 256, size).astype(np.int32) for size in rng.integers(1, 90, 14)]
    compute = Compute(dtype=jnp.float32, chunk=16)
    scorer = Scorer(model_of(), compute=compute, max_length=32, batch_tokens=64, devices=jax.local_devices()[:1])
    shared = [*texts[:3], *[texts[0]] * 3]  # a context with four continuations
    scores = scorer.score([*texts, *shared], [text[:9] for text in [*texts, *texts[4:10]]], done=counted("scores"))
    rolled = scorer.rolling(texts, prefix=256, done=counted("texts"))
    words = [f"{'a' * size} b" for size in range(9)]
    told = answers(Echo(), tokenizer.load("byte"), words, max_tokens=4, batch_size=2, progress=SILENT)
    return {"scores": scores, "texts": rolled, "answers": told}, made


def test_batches_are_dealt_out_and_all_have_all(tmp_path):
    wanted, by_one = json.loads(json.dumps(found_here()))
    program = (sys.executable, __file__)
    codes, said = ended(
        tmp_path, started(tmp_path, [[tmp_path / f"{index}.json"] for index in (0, 1)], program=program)
    )
    assert codes == [0, 0], said
    parts = [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)]
    assert [found for found, _ in parts] == [wanted] * 2
    for name, count in by_one.items():
        own = [made[name] for _, made in parts]
        assert min(own) > 1 and max(own) < count, (name, own, count)


def test_requests_that_differ_are_refused(tmp_path):
    commands = [[tmp_path / f"{index}.json", f"{index}"] for index in (0, 1)]
    codes, said = ended(tmp_path, started(tmp_path, commands, program=(sys.executable, __file__)))
    assert codes == [1, 1] and said[0] == said[1] and said[0].startswith("Process 1 has requests '")


def test_turns_alone_are_all_of_them():
    assert [mine for mine, _ in zip(turns(), range(5), strict=False)] == [True] * 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shared")
    small = experiment(directory)
    small = replace(
        small, id="imported/small", model=model_of().config, run=replace(small.run, dir="", compile_cache="")
    )
    checkpoint.write(directory / "run", small, model_of(), 0, Identity(None, tokenizer.load("byte").hash8))
    return directory / "run"


def kept(directory):
    rows = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    return {row["key"]: row["answer"] for row in rows if "key" in row}


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        ("--tasks", "table3/arc_easy,table3/wikitext,table4/squad", "--task_data", str(ROWS)),
        ("--text", str(ROWS / "table3" / "piqa.jsonl"), __file__),
    ],
)
def test_a_command_has_the_numbers_of_one_process(run, tmp_path, asked):
    found = []
    for count, launched in ((1, {"launched": alone}), (2, {})):
        directory, here = tmp_path / f"run{count}", tmp_path / str(count)
        shutil.copytree(run, directory)
        here.mkdir()
        command = ["eval", str(directory), *asked, "--json", "--optim.precision", "fp32", "--run.chunk", "32"]
        codes, said = ended(here, started(here, [command] * count, **launched))
        assert codes == [0] * count, said
        assert not any((here / f"{index}.out").read_text() for index in range(1, count))
        rows = json.loads((here / "0.out").read_text())
        numbers = [row.get("metrics", row) for row in rows]
        tasks = directory / "tasks.json"
        saved = [row["metrics"] for row in json.loads(tasks.read_text())] if tasks.exists() else None
        found.append((numbers, saved, kept(directory)))
    assert found[0] == found[1] and len(found[0][2]) > 1


def test_what_one_process_does_says_so(run, tmp_path):
    for asked, sentence in (
        (
            ["--tasks", "table3/piqa", "--requests", "x"],
            "--requests is written by one process; several can answer them.",
        ),
        (["--tasks", "figure2", "--task_data", "x"], "figure2 reads whole documents in pieces, in one process;"),
    ):
        codes, said = ended(tmp_path, started(tmp_path, [["eval", str(run), *asked]] * 2))
        assert codes == [2, 2] and all(line.startswith(sentence) for line in said)


if __name__ == "__main__":
    distributed.start(os.environ)
    if not sys.argv[2:]:
        Path(sys.argv[1]).write_text(json.dumps(found_here()))
        sys.exit()
    try:
        of_all(sys.argv[2], dict)
    except UserError as error:
        sys.exit(str(error))
