"""Table 3: language modelling and zero-shot reasoning, 1.3B parameters after 100B tokens of FineWeb-Edu.

    gdn table table3 --scale tiny            all rows, from the runs there are
    python -m experiments.table3 --scale tiny --task_data DIR --limit 20     runs what is missing first
    gdn eval table3/gated-deltanet/tiny --tasks table3 --task_data DIR       the ten columns of one run
    gdn run table3/gated-deltanet/tiny       2-block model on ten English novels, two minutes on a CPU
    gdn run table3/gated-deltanet/desk       38M parameters on Python's standard library, minutes on one GPU
    gdn run table3/gated-deltanet/400m       15B tokens, the ablations' size: 33 GPU-hours at 400 TFLOP/s
    gdn run table3/gated-deltanet/1.3b       100B tokens, the published numbers: 570 GPU-hours

Expect, in the paper, perplexity Gated DeltaNet < Mamba2 < DeltaNet < Transformer++ and H1 below them all.
tiny and desk check the machinery and the trend; they read bytes, so no number of theirs compares with the
paper's. The novels are the same text everywhere; the standard library is that of the Python that runs. 400m and 1.3b
need FineWeb-Edu and the Llama-2 tokenizer (`gdn data prepare`).

The columns are lm-evaluation-harness's tasks, zero-shot; `--tasks` takes its other tasks too, with their own number of
worked examples or `--fewshot` N, which is recorded. Without DIR their data comes from the hub. Wiki ppl depends on
how many tokens are read at once, which the paper does not say: the training length here, at least 2,048.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from experiments.suites import Asked, Column, Row, Suite
from experiments.variants import MODELS, model_config, scales_of
from gdn_jax.config import Data, Experiment, Optim, Run

if TYPE_CHECKING:
    from gdn_jax.evaluate.answering import Answers
    from gdn_jax.runs import OpenRun

WINDOW = 4096
BATCH = 128  # x 4096 tokens = 0.5M tokens a step, the paper's batch


def _novels() -> Data:
    return Data(source="english-novels", tokenizer="byte", seq_len=256, validation=0.05)


def _python() -> Data:
    return Data(source="python-stdlib", tokenizer="byte", seq_len=1024, validation=0.01)


def _fineweb_edu() -> Data:
    return Data(source="fineweb-edu", tokenizer="data/llama-2.model", seq_len=WINDOW, validation=0.001)


def _paper_recipe(tokens: float) -> Optim:
    """AdamW with Optim's defaults: lr 4e-4, 1% warm-up, cosine to a tenth, weight decay 0.1, clip 1."""
    return Optim(steps=round(tokens / (BATCH * WINDOW)), batch_size=BATCH, lr=4e-4)


RECIPES = {
    "tiny": (Optim(steps=200, batch_size=8, lr=3e-3, warmup=0.05, precision="fp32"), _novels(), Run()),
    "desk": (Optim(steps=1000, batch_size=32, lr=1e-3, warmup=0.05), _python(), Run()),
    "400m": (_paper_recipe(15e9), _fineweb_edu(), Run(micro_batches=8, remat="full")),
    "400m-matched": (_paper_recipe(15e9), _fineweb_edu(), Run(micro_batches=8, remat="full")),
    "1.3b": (_paper_recipe(100e9), _fineweb_edu(), Run(micro_batches=16, remat="products")),
}
# A step of 1.3b on 80 GB (LOG.md): layers are written out where every recurrence has a kernel, and what kernels gave
# is kept. Not of Mamba's scan, whose states are 1.2 GB a layer: that kernel runs again. Gradients summed over
# micro-batches take 4.7 GiB more: measured for gated-deltanet and its H1; for gated-deltanet-fla that makes 70.5 GiB,
# not run.
KERNELS_KEPT = (
    "gated-deltanet", "gated-deltanet-fla", "gated-deltanet-h1", "gated-deltanet-h2", "deltanet", "hgrn2", "mamba2",
    "retnet", "transformer",
)  # fmt: skip
WRITTEN_OUT = ("mamba", "samba")
DEEP_MAMBA = ("mamba-nomlp", "mamba-fla")  # 48 scans: not run


def _at_1_3b(name: str, run: Run) -> Run:
    if name in KERNELS_KEPT:
        return replace(run, remat="products+kernels", scan_layers=False)
    if name in WRITTEN_OUT:
        return replace(run, scan_layers=False)
    return replace(run, remat="full") if name in DEEP_MAMBA else run


def _experiment(name: str, scale: str) -> Experiment:
    optim, data, run = RECIPES[scale]
    run = _at_1_3b(name, run) if scale == "1.3b" else run
    return Experiment(id=f"table3/{name}/{scale}", model=model_config(name, scale), optim=optim, data=data, run=run)


EXPERIMENTS = tuple(_experiment(name, scale) for name in MODELS for scale in scales_of(name))


# --- the columns ---


def measure(task: str, answers: "Answers", run: "OpenRun", asked: Asked) -> Row:
    """A task of lm-evaluation-harness, any one: its metrics as the harness gives them."""
    from gdn_jax.evaluate.harness import SEEDS, VERSION, evaluate_task

    found = evaluate_task(answers, task, data=asked.data("table3"), limit=asked.limit, fewshot=asked.fewshot)
    return {
        "metrics": found["metrics"],
        "n": found["n"],
        "of": found["of"],
        "protocol": {
            "harness": f"lm-eval {VERSION}",
            "version": found["version"],
            "fewshot": found["fewshot"],
            "seeds": SEEDS,
        },
        "stand_in": "",
    }


# The full splits as local files, in the columns that the stock tasks read: rows of mosaicml/llm-foundry's files, and
# the 62 pages of wikitext-2-raw's test split. A file of other bytes is of rows of one's own, whatever it holds.
FILES = {
    "wikitext": "18d7e94b01563599a122337fa68fa9fe2be7200ab41420548f0edf74adb401e0",
    "lambada_openai": "9acdcb12e8c2ef4eb3d0958b547a8c7076488df2d6ff460377881ab3841f3d97",
    "piqa": "f5f15c0ff115640fa877f453e177194e3e110549fd54aaea581fc4ef91ec9d69",
    "winogrande": "75529b1c24ab7c85919ffb5cb784d431a4bc7d2f3da13e23d3a406bec2431c76",
    "arc_easy": "7922d1830d0cd222913e25f29b8db69e52971ff4978f7836050a7d1d2060f53a",
    "arc_challenge": "2ec4149dc9d0e38f44ea4d59dd5b3cf316d8f6a92c5713c6234c3137241f143b",
    "boolq": "4f6f6df1c6445e7248df91c300dd02ea031759b56a6476f297f3179fb77a38dd",
}


def _column(title: str, task: str, metric: str, rows: int) -> Column:
    perplexity, files = metric.endswith("perplexity"), (FILES[task],) if task in FILES else ()
    return Column(title, task, metric, range(rows, rows + 1), 1.0 if perplexity else 100.0, perplexity, files)


COLUMNS = {
    "wiki_ppl": _column("Wiki ppl", "wikitext", "word_perplexity", 62),
    "lambada_ppl": _column("LMB ppl", "lambada_openai", "perplexity", 5153),
    "lambada_acc": _column("LMB acc", "lambada_openai", "acc", 5153),
    "piqa": _column("PIQA", "piqa", "acc", 1838),
    "hellaswag_acc_norm": _column("Hella", "hellaswag", "acc_norm", 10042),
    "winogrande": _column("Wino", "winogrande", "acc", 1267),
    "arc_easy": _column("ARC-e", "arc_easy", "acc", 2376),
    "arc_challenge_acc_norm": _column("ARC-c", "arc_challenge", "acc_norm", 1172),
    "siqa": _column("SIQA", "social_iqa", "acc", 1954),
    "boolq": _column("BoolQ", "boolq", "acc", 3270),
}
ACCURACIES = tuple(key for key in COLUMNS if not key.endswith("ppl"))
SUITE = Suite("table3", COLUMNS, measure, averaged=ACCURACIES, max_length={})

if __name__ == "__main__":
    from experiments.commands.table import main

    main("table3")
