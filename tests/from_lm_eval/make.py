"""Writes what lm-eval 0.4.13 gives beside this file; the tests compare with it and need no lm-eval.

pip install 'lm-eval[ruler,longbench]==0.4.13' && python tests/from_lm_eval/make.py
"""

import ast
import hashlib
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import lm_eval
from lm_eval.tasks.ruler import prepare_niah as theirs

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from eval_text import KEYS, count_tokens, haystack_words, metric_cases  # noqa: E402

SEED, LENGTHS, SAMPLES = 7, (1024, 2048, 4096), 8
KINDS = {
    "niah_single_1": ("repeat", "numbers"),
    "niah_single_2": ("essay", "numbers"),
    "niah_single_3": ("essay", "uuids"),
}


def template() -> str:
    """niah_utils.TEMPLATE; the module itself needs transformers."""
    source = (Path(lm_eval.__file__).parent / "tasks/ruler/niah_utils.py").read_text()
    found = [n for n in ast.parse(source).body if isinstance(n, ast.Assign) and n.targets[0].id == "TEMPLATE"]
    return ast.literal_eval(found[0].value)


def needles() -> list[dict]:
    theirs.WORDS = KEYS
    theirs.cached_sent_tokenize = lambda text: re.split(r"(?<=[.!?])\s+", text)  # Punkt's data is not everywhere
    rows = []
    for task, (haystack, value) in KINDS.items():
        random.seed(SEED)
        for length in LENGTHS:
            for sample in theirs.generate_samples(
                theirs.get_haystack("repeat") if haystack == "repeat" else haystack_words(),
                max_seq_length=length, template=template(), type_haystack=haystack, type_needle_k="words",
                type_needle_v=value, num_samples=SAMPLES,
                TOKENIZER=lambda text: SimpleNamespace(input_ids=range(count_tokens(text))),
            ):  # fmt: skip
                digest = hashlib.sha256(sample["input"].encode()).hexdigest()
                (answer,) = sample["outputs"]
                rows.append({
                    "task": task, "max_length": length, "index": sample["index"], "value": answer,
                    "answer_prefix": sample["gen_prefix"], "length": sample["length"], "sha256": digest,
                })  # fmt: skip
    return rows


def scores() -> list[list[float]]:
    from lm_eval.tasks.longbench import metrics

    rows = []
    for prediction, truth, classes in metric_cases():
        doc = {"answers": [truth], "all_classes": classes}
        rows.append([
            metrics.get_qa_f1_score(doc, [prediction])["qa_f1_score"],
            metrics.get_rouge_score(doc, [prediction])["rouge_score"],
            metrics.get_classification_score(doc, [prediction])["classification_score"],
            metrics.get_code_sim_score(doc, [prediction])["code_sim_score"],
        ])  # fmt: skip
    return rows


def prompts() -> list[list[str]]:
    """[task, template, most tokens of an answer] of every English task that the paper has."""
    from gdn_jax.evaluate.longbench import TASKS

    rows = []
    for task in TASKS:
        text = (Path(lm_eval.__file__).parent / f"tasks/longbench/{task}.yaml").read_text()
        line = re.search(r"^doc_to_text: (.*)$", text, re.MULTILINE)[1]
        template = json.loads(line).replace("{{", "{").replace("}}", "}")
        rows.append([task, template, int(re.search(r"max_gen_toks: (\d+)", text)[1])])
    return rows


def write(name: str, rows: list) -> None:
    lines = ",\n".join(json.dumps(row) for row in rows)
    (HERE / name).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write("needles.json", needles())
    write("longbench.json", scores())
    write("longbench_prompts.json", prompts())
