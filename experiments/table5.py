"""Table 5: 14 English tasks of LongBench at 1.3B, zero-shot.

    gdn run table5/gated-deltanet/tiny --task_data DIR --limit 5      trains table3/gated-deltanet/tiny where missing
    gdn run table5/gated-deltanet/1.3b --task_data DIR                3,350 prompts of up to 16K tokens
    gdn table table5 --scale tiny

DIR holds <task>.jsonl or .jsonl.gz for each task, there or in DIR/table5 (Xnhyacinth/LongBench; a missing file's
message says how to make it). Prompts are cut in the middle, at 1.3b to 16,384 tokens for every model, elsewhere to the
training length or 2,048 tokens; the paper does not give its cut, and --max_length gives another one, which marks the
numbers. Both scores are kept, of the whole answer and of its first line: base models run on. The column shows the one
that LongBench reports. The Transformer gets no length extension; the authors called its low score an oversight, not a
protocol. Expect, in the paper, hybrids > Gated DeltaNet > Mamba > Transformer++.
"""

from typing import TYPE_CHECKING

from experiments.suites import Asked, Column, Row, Suite

if TYPE_CHECKING:
    from gdn_jax.evaluate.answering import Answers
    from gdn_jax.runs import OpenRun

TITLES = {
    "narrativeqa": "NQA", "qasper": "QQA", "multifieldqa_en": "MFQ", "hotpotqa": "HQA", "2wikimqa": "2WM",
    "musique": "Mus", "gov_report": "GvR", "qmsum": "QMS", "multi_news": "MNs", "trec": "TRC", "triviaqa": "TQA",
    "samsum": "SSM", "lcc": "LCC", "repobench-p": "RBP",
}  # fmt: skip
ROWS = {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}  # 200 of every other task
# No local file is known to hold them: whatever its length, a number says "own rows" until the sha256 of its file stands
# in Column.files.
TRUNCATION = "middle"


def measure(task: str, answers: "Answers", run: "OpenRun", asked: Asked) -> Row:
    """LongBench's score, and those of the whole answer and of its first line, in per cent."""
    from gdn_jax.evaluate import longbench

    rows = longbench.rows_of(task, asked.local("table5"))
    max_length = asked.max_length or SUITE.own_length(run.experiment)
    found = longbench.evaluate(task, asked.first(rows), answers.ask, max_length=max_length, truncation=TRUNCATION)
    return {
        "metrics": {name: found[name] for name in ("score", "raw", "first_line")},
        "n": found["rows"],
        "of": len(rows),
        "protocol": {name: found[name] for name in ("max_length", "truncation", "cut")},
        "stand_in": "",
    }


def _rows(task: str) -> range:
    count = ROWS.get(task, 200)
    return range(count, count + 1)


SUITE = Suite(
    "table5",
    {task: Column(title, task, "score", _rows(task)) for task, title in TITLES.items()},
    measure,
    averaged=tuple(TITLES),
    max_length={"1.3b": 16_384},
)

if __name__ == "__main__":
    from experiments.commands.table import main

    main("table5")
