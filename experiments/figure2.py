"""Figure 2: perplexity of long documents up to 20K tokens, far beyond the training length, on six corpora at 1.3B.

    gdn run figure2/gated-deltanet/tiny --task_data DIR --limit 2     trains table3/gated-deltanet/tiny where missing
    gdn run figure2/gated-deltanet/1.3b --task_data DIR               all documents, minutes on one GPU
    gdn figure figure2 --scale tiny

DIR holds gov_report.jsonl, qmsum.jsonl, narrativeqa.jsonl, qasper.jsonl, codeparrot.jsonl and pg19.jsonl (or
.jsonl.gz), there or in DIR/figure2, rows with a column "text": those that are there are read. The mean over a
document's first 4K, 8K, 12K, 16K and 20K tokens; documents that are shorter are joined. The paper gives no protocol and
no numbers, only curves. Expect, in the paper, Gated DeltaNet lowest and flat among recurrent models, hybrids below it,
Mamba rising.
"""

from typing import TYPE_CHECKING

from experiments.suites import Asked, Column, Row, Suite
from gdn_jax.errors import UserError

if TYPE_CHECKING:
    from gdn_jax.evaluate.answering import Answers
    from gdn_jax.runs import OpenRun

CORPORA = {
    "gov_report": "GovReport", "qmsum": "QMSum", "narrativeqa": "NarrativeQA", "qasper": "Qasper",
    "codeparrot": "CodeParrot", "pg19": "PG19",
}  # fmt: skip
DATASETS = {
    "gov_report": "ccdv/govreport-summarization", "qmsum": "pszemraj/qmsum-cleaned",
    "narrativeqa": "deepmind/narrativeqa", "qasper": "allenai/qasper",
    "codeparrot": "codeparrot/codeparrot-clean-valid", "pg19": "emozilla/pg19",
}  # fmt: skip
LENGTHS = (4096, 8192, 12288, 16384, 20480)
# Documents of the test split (of codeparrot all; narrativeqa's stories, qmsum's meetings). The paper does not say how
# many it read; fewer are no such set but rows of one's own, and so is every local file until its sha256 stands in
# Column.files: none is known to hold the set.
LEAST = {
    "gov_report": 973, "qmsum": 35, "narrativeqa": 355, "qasper": 416, "codeparrot": 61_000, "pg19": 100,
}  # fmt: skip


def measure(task: str, answers: "Answers", run: "OpenRun", asked: Asked) -> Row:
    """Perplexity per token of the first L tokens, and of each bucket of 2,048."""
    from gdn_jax.evaluate.length import length_extrapolation
    from gdn_jax.evaluate.rows import TEXT, Source, load_rows
    from gdn_jax.layers import compute_for

    if task not in CORPORA:
        raise UserError(f"There is no corpus {task!r}; there are {', '.join(CORPORA)}.")
    folder = asked.local("figure2")
    rows = load_rows(folder, task, {"text": TEXT}, Source(DATASETS[task], "test"))
    found = length_extrapolation(
        run.model, (answers.tokenizer.encode(row["text"]) for row in rows), eos=answers.tokenizer.eos,
        lengths=LENGTHS, limit=asked.limit, compute=compute_for(run.experiment),
    )  # fmt: skip
    return {
        "metrics": {str(one["stop"]): one["perplexity"] for one in found["lengths"]}
        | {f"bucket_{one['start']}": one["perplexity"] for one in found["buckets"]},
        "n": found["documents"] + found["left_out"],
        "of": len(rows),
        "protocol": {name: found[name] for name in ("sequences", "joined", "left_out", "bucket")},
        "stand_in": "",
    }


SUITE = Suite(
    "figure2",
    {
        f"{corpus}_{length}": Column(
            f"{title} {length // 1024}K", corpus, str(length), range(LEAST[corpus], 1 << 62), lower=True
        )
        for corpus, title in CORPORA.items()
        for length in LENGTHS
    },
    measure,
)
