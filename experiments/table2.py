"""Table 2: single needles in a haystack (S-NIAH-1, 2, 3 of RULER) at 1K to 8K tokens, zero-shot accuracy at 1.3B.

    gdn run table2/gated-deltanet/tiny --limit 5       trains table3/gated-deltanet/tiny where it is missing; a minute
    gdn run table2/gated-deltanet/1.3b --haystack PaulGrahamEssays.json     500 prompts a cell, minutes on one GPU
    gdn table table2 --scale tiny

A passkey in repeated noise, a number in essays, a UUID in essays. The essays may not be copied: RULER's own script
fetches them, and `--haystack` names the file; without it the novels in the package stand in. The cells say so, and of
any text that does not begin as RULER's file does.
Lengths are counted by the run's tokenizer, so a byte model's 1K is a text a quarter as long. Expect, in the paper,
DeltaNet best at passkeys, Mamba2 falling from 4K on, Gated DeltaNet best where essays must be forgotten.
"""

import random
from typing import TYPE_CHECKING

from experiments.suites import Asked, Column, Row, Suite

if TYPE_CHECKING:
    from gdn_jax.evaluate.answering import Answers
    from gdn_jax.runs import OpenRun

SAMPLES = 500
LENGTHS = {"niah_single_1": (1024, 2048, 4096, 8192), "niah_single_2": (1024, 2048, 4096, 8192),
           "niah_single_3": (1024, 2048, 4096)}  # fmt: skip


def measure(task: str, answers: "Answers", run: "OpenRun", asked: Asked) -> Row:
    """Accuracy at each length, in per cent."""
    from gdn_jax.evaluate import needles

    tokenizer, count = answers.tokenizer, min(SAMPLES, asked.limit or SAMPLES)
    text = needles.novels() if asked.haystack is None else needles.essays(asked.haystack)  # refused before any task
    haystack = None if needles.TASKS[task].haystack == "noise" else text
    rng = random.Random(needles.SEED)  # one for all lengths, as the harness draws them: a limit changes the later ones
    found = {}
    for length in LENGTHS[task]:
        samples = needles.make_samples(
            task, lambda text: len(tokenizer.encode(text)), length, haystack=haystack, samples=count, seed=rng
        )
        found[length] = needles.evaluate(samples, answers.ask)
    first = found[LENGTHS[task][0]]
    made_with = {} if haystack is None else {"haystack_sha256": haystack.sha256} | haystack.made_with()
    return {
        "metrics": {str(length): one["accuracy"] for length, one in found.items()},
        "n": count,
        "of": SAMPLES,
        "protocol": {"haystack": first["haystack"], "steps": [one["step"] for one in found.values()]}
        | made_with
        | {"wonderwords": needles.words_version()},
        "stand_in": f"haystack {first['haystack']} in place of the essays" if first["stand_in"] else "",
    }


SUITE = Suite(
    "table2",
    {
        f"{task}_{length}": Column(f"S{task[-1]} {length // 1024}K", task, str(length), range(SAMPLES, SAMPLES + 1))
        for task, lengths in LENGTHS.items()
        for length in lengths
    },
    measure,
)

if __name__ == "__main__":
    from experiments.commands.table import main

    main("table2")
