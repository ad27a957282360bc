"""Table 4: recall from real documents cut to 2K tokens, six cloze tasks of "Just read twice" at 1.3B.

    gdn run table4/gated-deltanet/tiny --task_data DIR --limit 20     trains table3/gated-deltanet/tiny where missing
    gdn run table4/gated-deltanet/1.3b --task_data DIR                about 12,000 prompts, minutes on one GPU
    gdn table table4 --scale tiny

DIR holds swde.jsonl, squad.jsonl, fda.jsonl, triviaqa.jsonl, nq.jsonl and drop.jsonl (or .jsonl.gz), there or in
DIR/table4: the hub's hazyresearch/based-* sets; a missing file's message says how to make it. Greedy, 48 tokens up to a
line feed, right where an answer occurs in the continuation. The share of wrong continuations that loop is kept beside
it: the paper blames most errors on repetition. Expect, in the paper, hybrids > Transformer++ > Gated DeltaNet > Mamba2.
"""

from typing import TYPE_CHECKING

from experiments.suites import Asked, Column, Row, Suite

if TYPE_CHECKING:
    from gdn_jax.evaluate.answering import Answers
    from gdn_jax.runs import OpenRun

TITLES = {"swde": "SWDE", "squad": "SQD", "fda": "FDA", "triviaqa": "TQA", "nq": "NQ", "drop": "DROP"}
# Rows of the published sets, as far as the hub says: it rounds to three digits, and names no count of fda, nq and drop,
# which have more than a thousand. No local file is known to hold them: whatever its length, a number says "own rows"
# until the sha256 of its file stands in Column.files.
ROWS = {"squad": range(2984, 2985), "swde": range(1105, 1115), "triviaqa": range(1685, 1695)}
PUBLISHED = range(1000, 100_000)


def measure(task: str, answers: "Answers", run: "OpenRun", asked: Asked) -> Row:
    """Per cent of continuations that contain an answer; of the wrong ones, per cent that loop."""
    from gdn_jax.evaluate import recall

    rows = recall.rows_of(task, asked.local("table4"))
    found = recall.evaluate(task, asked.first(rows), answers.tokenizer, answers.ask)
    return {
        "metrics": {name: found[name] for name in ("contains", "looping")},
        "n": len(asked.first(rows)),
        "of": len(rows),
        "protocol": {name: found[name] for name in ("context_length", "cut", "left_out")},
        "stand_in": "",
    }


SUITE = Suite(
    "table4",
    {task: Column(title, task, "contains", ROWS.get(task, PUBLISHED)) for task, title in TITLES.items()},
    measure,
    averaged=tuple(TITLES),
)

if __name__ == "__main__":
    from experiments.commands.table import main

    main("table4")
