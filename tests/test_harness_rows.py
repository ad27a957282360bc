"""Tasks of lm-evaluation-harness on rows of one's own: what is kept, what is asked, what is refused and how."""

import inspect
import json
import math
import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import lm_eval
import numpy as np
import pytest
from eval_text import Script

from gdn_jax import tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate import harness
from gdn_jax.evaluate.generation import answers
from gdn_jax.evaluate.harness import evaluate_task

TABLE3 = Path(__file__).parent / "eval_rows" / "table3"
BYTES = tokenizer.load("byte")
PIQA = {"goal": "To open a jar", "sol1": "turn the lid", "sol2": "turn the glass", "label": 0}
SUMS = [{"question": "2 + 2?", "answer": "It is 4. #### 4"}, {"question": "2 + 3?", "answer": "It is 5. #### 5"}]
GPQA = [
    {"Question": f"question {i}", "Correct Answer": f"right {i}", "Incorrect Answer 1": "one",
     "Incorrect Answer 2": "two", "Incorrect Answer 3": "three", "Extra": None if i else "x"}
    for i in range(6)
]  # fmt: skip


class Told:
    """Answers of no model: a log-likelihood for any pair, a function of the prompt for a continuation."""

    tokenizer, max_length = BYTES, 4096

    def __init__(self, continuation=str, log_likelihood=-1.0):
        self.script, self.pairs, self._log_likelihood = Script(continuation), [], log_likelihood
        self.ask = partial(answers, self.script, BYTES)

    def loglikelihood(self, pairs):
        self.pairs += pairs
        return [(self._log_likelihood, False)] * len(pairs)

    def rolling(self, texts):
        return [self._log_likelihood] * len(texts)


def write(folder, task, *rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_metrics_of_named_filters_are_kept(tmp_path):
    """The task finds a number in two ways: after "The answer is", and as the last one of the text."""
    data = write(tmp_path, "gsm8k_cot", *SUMS)
    found = evaluate_task(Told(lambda prompt: "The answer is 4. Or is it 5?"), "gsm8k_cot", data=data)
    assert found["metrics"] == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.5}
    right = {"2 + 2?": "The answer is 4.", "2 + 3?": "5 it is"}
    found = evaluate_task(Told(lambda prompt: right[prompt.split("Q: ")[-1][:6]]), "gsm8k_cot", data=data)
    assert found["metrics"] == {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 1.0}


def test_worked_examples_are_counted_and_can_be_left_out(tmp_path):
    data, told = write(tmp_path, "gsm8k_cot", *SUMS), Told()
    assert evaluate_task(told, "gsm8k_cot", data=data)["fewshot"] == 8
    assert [prompt.count("Q: ") for prompt in told.script.asked] == [9, 9]
    told = Told()
    assert evaluate_task(told, "gsm8k_cot", data=data, fewshot=0)["fewshot"] == 0
    assert sorted(told.script.asked) == ["Q: 2 + 2?\nA:", "Q: 2 + 3?\nA:"]
    assert evaluate_task(Told(), "piqa", data=TABLE3)["fewshot"] == 0
    write(tmp_path, "gsm8k", *SUMS)
    assert evaluate_task(Told(), "gsm8k", data=data, fewshot=0)["n"] == 2
    with pytest.raises(UserError, match=r"gsm8k begins with 5 worked examples of a split that .* --fewshot 0"):
        evaluate_task(Told(), "gsm8k", data=data)
    with pytest.raises(UserError, match="piqa begins with 2 worked examples of a split"):
        evaluate_task(Told(), "piqa", data=TABLE3, fewshot=2)


def test_what_a_task_draws_is_the_same_each_time(tmp_path):
    defaults = inspect.signature(lm_eval.simple_evaluate).parameters
    named = {"random": "random_seed", "numpy": "numpy_random_seed", "fewshot": "fewshot_random_seed"}
    assert {name: defaults[option].default for name, option in named.items()} == harness.SEEDS
    data, found = write(tmp_path, "gpqa_main_zeroshot", *GPQA), []
    for seed in (5, 6):
        random.seed(seed)
        np.random.seed(seed)
        expected = random.Random(seed).random(), np.random.RandomState(seed).rand()
        told = Told()
        numbers = evaluate_task(told, "gpqa_main_zeroshot", data=data)
        found.append((numbers, told.pairs))
        assert (random.random(), np.random.rand()) == expected, "the process goes on with its own numbers"
    assert found[0] == found[1] and found[0][0]["n"] == 6


@pytest.mark.parametrize(
    ("task", "rows", "sentence"),
    [
        ("piqa", [PIQA, PIQA | {"goal": None}], r"\(nothing in goal, line 2\): UndefinedError 'goal' is"),
        ("piqa", [PIQA, {name: PIQA[name] for name in ("sol1", "sol2", "label")}], r"\(nothing in goal, line 2\)"),
        ("piqa", [PIQA, PIQA | {"sol2": None}], r"\(nothing in sol2, line 2\)"),
        ("piqa", [PIQA, PIQA | {"label": None}], "task piqa reads the column 'label', which not every row has; add it"),
        ("piqa", [PIQA, PIQA | {"label": 2}], r"piqa.jsonl, document 2: the target 2 is none of the 2 choices; mend"),
        ("piqa", [PIQA | {"label": -1}], r"document 1: the target -1 is none of the 2 choices"),
        ("piqa", [PIQA | {"label": "1"}], r"document 1: the target '1' is none of the 2 choices"),
        ("piqa", [PIQA, PIQA | {"goal": 7}], "Task piqa does not fit .*piqa.jsonl: ArrowTypeError"),
        ("piqa", [PIQA, PIQA | {"goal": "\ud83d"}], r"piqa.jsonl, line 2: goal holds '.ud83d', half a character"),
        ("piqa", [PIQA | {"\ud83d": 1}], "piqa.jsonl, line 1: the name of a column holds '.ud83d', half a character"),
        ("arc_easy", [{"question": "q", "answerKey": "A", "choices": {"text": ["a", "\udc00"], "label": ["A", "B"]}}],
         "arc_easy.jsonl, line 1: choices holds '.udc00', half a character"),
        ("arc_easy", [{"question": "q", "answerKey": "A"}], "UndefinedError 'choices' is undefined; mend the rows."),
        ("arc_easy", [{"question": "q", "answerKey": "A", "choices": {"text": ["a", None], "label": ["A", "B"]}}],
         r"\(nothing in choices, line 1\)"),
        ("lambada_openai", [{"text": None}], "lambada_openai.jsonl has no column that every row fills"),
        ("lambada_openai", [], "lambada_openai.jsonl holds no rows; make it again."),
        ("lambada_openai", [{"text": "a b"}], r"has a number beyond all bounds \(math range error\): the model"),
        ("swde", [{"text": "t", "key": "k", "value": "v"}], "Task swde of lm-eval takes no rows but its own; remove"),
        ("niah_single_1", [{"input": "x"}], "Task niah_single_1 of lm-eval takes no rows but its own"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_a_task(tmp_path, task, rows, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate_task(Told(log_likelihood=-800.0), task, data=write(tmp_path, task, *rows))


def test_a_damaged_file(tmp_path):
    (tmp_path / "winogrande.jsonl").write_text('{"sentence": "a _ b", "option1"')
    with pytest.raises(UserError, match=r"winogrande.jsonl is damaged after line 1"):
        evaluate_task(Told(), "winogrande", data=tmp_path)


@pytest.mark.skipif(find_spec("jieba") is not None, reason="the library that must be missing is installed")
def test_a_library_that_a_task_needs(tmp_path):
    data = write(tmp_path, "longbench_qasper", {"context": "c", "question": "q", "answers": ["x"]})
    with pytest.raises(UserError, match=r"longbench_qasper needs a library that is not installed \(.*jieba"):
        evaluate_task(Told(), "longbench_qasper", data=data)


def test_a_fault_of_the_model_is_no_fault_of_the_rows():
    class Broken(Told):
        def loglikelihood(self, pairs):
            raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        evaluate_task(Broken(), "piqa", data=TABLE3)


@pytest.mark.parametrize("name", ["my data, v2", "run[1]", "a #b", "a: b", 'q"x'])
def test_folders_of_any_name(tmp_path, name):
    told = Told()
    assert evaluate_task(told, "piqa", data=write(tmp_path / name, "piqa", PIQA))["n"] == 1
    assert told.pairs == [(f"Question: {PIQA['goal']}\nAnswer:", f" {PIQA[sol]}") for sol in ("sol1", "sol2")]


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    """A reader of JSON that guesses types makes 2020-01-01 00:00:00 of it."""
    told = Told()
    evaluate_task(told, "piqa", data=write(tmp_path, "piqa", PIQA | {"goal": "2020-01-01"}))
    assert told.pairs[0][0] == "Question: 2020-01-01\nAnswer:"


@pytest.mark.parametrize("name", ["mmlu", "ai2_arc"])
def test_a_group_is_refused_before_it_is_asked(name):
    told = Told()
    with pytest.raises(UserError, match=f"{name} is a group of tasks; name its tasks one by one."):
        evaluate_task(told, name, data=TABLE3)
    assert told.pairs == []


def test_the_perplexity_of_rows_that_fit(tmp_path):
    data = write(tmp_path, "lambada_openai", {"text": "the lamp was lit", "more": None})
    assert evaluate_task(Told(), "lambada_openai", data=data)["metrics"]["perplexity"] == pytest.approx(math.e)
