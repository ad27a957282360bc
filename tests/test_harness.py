"""lm-evaluation-harness on runs of ours: closed forms, pairs cut as the harness cuts them, going on, other machines."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from lm_eval.api.model import TemplateLM
from small import experiment, scripted_model

from experiments.commands import evaluation
from gdn_jax import tokenizer
from gdn_jax.errors import UserError
from gdn_jax.evaluate import answering as answering_module
from gdn_jax.evaluate import harness
from gdn_jax.evaluate.answering import Answering, RequestFile, answer_file, encode_pair, read_requests
from gdn_jax.evaluate.harness import HarnessModel, evaluate_task
from gdn_jax.evaluate.scoring import Scorer
from gdn_jax.fingerprint import Identity
from gdn_jax.progress import SILENT
from gdn_jax.runs import OpenRun
from pallas_kernels import dispatch

ROWS = Path(__file__).parent / "eval_rows" / "table3"
BYTES = tokenizer.load("byte")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one option
LOG_VOCAB = math.log(320)


def rows(task):
    return [json.loads(line) for line in (ROWS / f"{task}.jsonl").read_text().splitlines()]


def answering(directory, model, **options):
    run = OpenRun(directory, experiment(directory), model, 24, Identity("0" * 64, BYTES.hash8), BYTES)
    return Answering(run, progress=SILENT, **options)


@pytest.fixture
def uniform(tmp_path):
    return answering(tmp_path, scripted_model({}))


def shortest(choices):
    """What a uniform model takes: the fewest bytes; of equal ones the first."""
    return min(range(len(choices)), key=lambda i: len(choices[i].encode()))


def most_per_character(choices):
    """With lengths divided out: -(n + 1) log V / n, the leading space being scored and not counted."""
    return max(range(len(choices)), key=lambda i: -(len(choices[i].encode()) + 1) / len(choices[i]))


def test_multiple_choice_of_a_uniform_model(uniform):
    choices = [row["choices"]["text"] for row in rows("arc_easy")]
    gold = [row["choices"]["label"].index(row["answerKey"]) for row in rows("arc_easy")]
    found = evaluate_task(uniform, "arc_easy", data=ROWS)
    assert (found["n"], found["of"], found["version"]) == (2, 2, 1.0)
    assert found["metrics"] == {
        "acc": sum(shortest(c) == g for c, g in zip(choices, gold, strict=True)) / 2,
        "acc_norm": sum(most_per_character(c) == g for c, g in zip(choices, gold, strict=True)) / 2,
    }
    both = [[row["sol1"], row["sol2"]] for row in rows("piqa")]
    expected = sum(shortest(c) == row["label"] for c, row in zip(both, rows("piqa"), strict=True)) / 3
    assert evaluate_task(uniform, "piqa", data=ROWS)["metrics"]["acc"] == expected
    assert evaluate_task(uniform, "piqa", data=ROWS, limit=2)["n"] == 2


def test_perplexities_of_a_uniform_model(uniform):
    pages = [row["page"] for row in rows("wikitext")]
    found = evaluate_task(uniform, "wikitext", data=ROWS)["metrics"]
    assert found["byte_perplexity"] == pytest.approx(math.exp(_read(pages) * LOG_VOCAB / _size(pages)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(_read(pages) * LOG_VOCAB / _size(pages) / math.log(2), rel=1e-4)
    last = [" " + row["text"].split(" ")[-1] for row in rows("lambada_openai")]
    found = evaluate_task(uniform, "lambada_openai", data=ROWS)["metrics"]
    assert found["perplexity"] == pytest.approx(math.exp(sum(map(len, last)) * LOG_VOCAB / 3), rel=1e-4)
    assert found["acc"] == 0


def _size(pages):
    return sum(len(page.encode()) for page in pages)


def _read(pages):
    """Bytes of the pages as the harness hands them over, detokenised."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return _size([wikitext_detokenizer({"page": page}) for page in pages])


@pytest.mark.parametrize("task", ["hellaswag", "winogrande", "arc_challenge", "social_iqa", "boolq"])
def test_every_task_of_table_3_runs_on_local_rows(uniform, task):
    found = evaluate_task(uniform, task, data=ROWS)
    assert found["n"] == len(rows(task)) and 0 <= found["metrics"]["acc"] <= 1


class Theirs(TemplateLM):
    """The harness's own division of a pair, with a tokenizer of ours."""

    loglikelihood_rolling, generate_until, _loglikelihood_tokens = None, None, None

    def __init__(self, words=BYTES):
        self._words = words

    @property
    def eot_token_id(self):
        return self._words.eos

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self._words.encode(string).tolist()


def test_pairs_are_divided_as_the_harness_divides_them():
    cases = [("a context", " and more"), ("ends in spaces  ", "then"), ("ä", "ö"), ("", "alone"), (" \n", "lines")]
    for context, continuation in cases:
        ours = [part.tolist() for part in encode_pair(BYTES, context, continuation)]
        if context:
            theirs = Theirs()._encode_pair(context, continuation)
        else:
            theirs = [BYTES.eos], Theirs().tok_encode(continuation)
        assert ours == [list(part) or [BYTES.eos] for part in theirs], (context, continuation)


def test_a_continuation_whose_token_merges_with_its_context(tmp_path):
    """Letters of one word, as in a language without spaces: the context is encoded alone, as the harness does it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "merge.json"))
    words = tokenizer.load(str(tmp_path / "merge.json"))
    for pair in (("ca", "bc"), ("c", "ab"), ("ab", "c")):
        assert [part.tolist() for part in encode_pair(words, *pair)] == list(
            map(list, Theirs(words)._encode_pair(*pair))
        )
    assert [part.tolist() for part in encode_pair(words, "ca", "bc")] == [[3, 1], [3]]
    with pytest.raises(
        UserError, match=r"The continuation 'b' has no token of its own: .* end of its context, 'a'; begin"
    ):
        encode_pair(words, "a", "b")


def test_greedy_continuations_stop_where_the_task_says(tmp_path):
    model = scripted_model({ord("a"): ord("b"), ord("b"): ord("c"), ord("c"): ord("a")})
    ours = HarnessModel(answering(tmp_path, model))

    class Request:
        task_name, doc_id = "toy", 0

        def __init__(self, prompt, **options):
            self.args = prompt, options

    requests = [Request("a", until=["a"], max_gen_toks=5), Request("b", max_gen_toks=4), Request("a", until="c")]
    assert ours.generate_until(requests) == ["bc", "cabc", "b"]
    cold = [Request("a", until=[], do_sample=False, temperature=1.0, **{name: 3}) for name in LENGTHS]
    assert ours.generate_until(cold) == ["bca"] * 4, "a temperature of what is not sampled is none"
    for options in ({"do_sample": True}, {"temperature": 0.5}, {"num_beams": 4}):
        with pytest.raises(UserError, match="Task toy asks for sampling or beams"):
            ours.generate_until([Request("a", **options)])


def test_an_evaluation_that_is_killed_goes_on_with_the_uninterrupted_numbers(tmp_path, monkeypatch):
    model = scripted_model({1: 2})
    whole = evaluate_task(answering(tmp_path, model, keep=tmp_path / "other.jsonl"), "arc_easy", data=ROWS)
    keep, asked, score = tmp_path / "answers.jsonl", [], Scorer.score

    def breaks(self, contexts, continuations, *, done, **options):
        asked.append(len(contexts))

        def done_once(found):
            done(found)
            raise KeyboardInterrupt

        return score(self, contexts, continuations, done=done_once if len(asked) == 1 else done, **options)

    monkeypatch.setattr(Scorer, "score", breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluate_task(answering(tmp_path, model, batch_tokens=64), "arc_easy", data=ROWS)
    kept = keep.read_text().count('"key"')
    assert 0 < kept < 8
    assert evaluate_task(answering(tmp_path, model, batch_tokens=64), "arc_easy", data=ROWS) == whole
    assert asked == [8, 8 - kept]


def test_requests_are_answered_on_another_machine(tmp_path, monkeypatch):
    model, path = scripted_model({ord("t"): ord("h")}), tmp_path / "requests.jsonl"
    expected = evaluate_task(answering(tmp_path, model, keep=tmp_path / "x"), "arc_easy", data=ROWS)
    pages = evaluate_task(answering(tmp_path, model, keep=tmp_path / "x"), "wikitext", data=ROWS)
    file = RequestFile(path, BYTES, max_length=2048)
    evaluate_task(file, "arc_easy", data=ROWS)
    evaluate_task(file, "wikitext", data=ROWS)
    file.ask(["what", "what", "a long prompt"], max_tokens=3, stops=["x"], max_length=9)
    assert file.write() == 8 + 2 + 2 and read_requests(path)[0] == {"max_length": 2048, "tokenizer": BYTES.hash8}
    there = answering(tmp_path, model)
    assert answer_file(there, path) == 12 and len(there.kept) == 12
    with pytest.raises(UserError, match="was written for max_length 2048, not 64; write it again for this run"):
        answer_file(answering(tmp_path, model, max_length=64), path)
    lines = path.read_text().splitlines(keepends=True)
    for bad in ({"texts": ["a", "b"]}, {"kind": [], "texts": []}, {"kind": "rolling", "texts": "a"}, {"kind": "rolling",
                "texts": ["a", "b"]}, {"kind": "ask", "texts": ["a"], "max_tokens": 3}, 7):  # fmt: skip
        (tmp_path / "bad.jsonl").write_text("".join([*lines[:2], json.dumps(bad) + "\n"]))
        with pytest.raises(UserError, match=r"bad.jsonl, line 3: is no request; write the file again with: gdn eval"):
            answer_file(there, tmp_path / "bad.jsonl")
    monkeypatch.setattr(answering_module, "Scorer", None)  # nothing is scored any more
    here = answering(tmp_path, model)
    assert evaluate_task(here, "arc_easy", data=ROWS) == expected
    assert evaluate_task(here, "wikitext", data=ROWS) == pages
    asked = here.ask(["what", "a long prompt"], max_tokens=3, stops=["x"], max_length=9)
    assert [(one.tokens, one.of_tokens) for one in asked] == [(4, 4), (6, 13)] and asked[0].text[0] == "h"


def test_answers_are_those_of_the_parameters(tmp_path):
    first = answering(tmp_path, scripted_model({1: 2})).loglikelihood([("a", "b")])
    other = answering(tmp_path, jax.tree.map(lambda x: x + 0.1, scripted_model({1: 2})))
    assert other.loglikelihood([("a", "b")]) != first and len(other.kept) == 2
    assert answering(tmp_path, scripted_model({1: 2}), max_length=32).loglikelihood([("a", "b")]) == first


@pytest.mark.parametrize(
    ("task", "options", "sentence"),
    [
        ("arc_eazy", {"data": ROWS}, r"There is no task 'arc_eazy' \(did you mean 'arc_easy'\?\) in lm-eval 0.4.13"),
        ("arc_easy", {"data": ROWS / "none"}, "none is no folder; give one that holds"),
    ],
)
def test_wrong_questions(uniform, task, options, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate_task(uniform, task, **options)


def test_data_that_is_missing_is_asked_for(uniform, tmp_path, monkeypatch):
    """At once where the hub does not answer: the library by itself tries again for half a minute."""
    import datasets
    import huggingface_hub

    asked = []
    load = datasets.load_dataset
    offline = lambda: (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append(offline()) or load(*args, **more))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    harness._hub_answers.cache_clear()
    before = offline()
    with pytest.raises(UserError, match=r"The data of task mnli cannot be had here .* put it into .*/mnli.jsonl, rows"):
        evaluate_task(uniform, "mnli", data=tmp_path)
    with pytest.raises(UserError, match=r"The data of task swde cannot be had here \([^;]*\); fill the cache"):
        evaluate_task(uniform, "swde", data=tmp_path)  # takes no file
    harness._hub_answers.cache_clear()
    assert asked == [(True, True)] * 2 and offline() == before


def test_a_length_of_its_own(tmp_path):
    short = replace(experiment(tmp_path).data, seq_len=4096)
    run = answering(tmp_path, scripted_model({})).run
    assert answering(tmp_path, scripted_model({})).max_length == 2048
    long = replace(run, experiment=replace(run.experiment, data=short))
    assert Answering(long, progress=SILENT).max_length == 4096


def test_devices_that_share_rows_give_the_same_answers(tmp_path, monkeypatch):
    """`gdn eval --tasks --run.context` comes here."""
    run, split, ask = answering(tmp_path, scripted_model({1: 2})).run, [], dispatch.splits_tokens
    monkeypatch.setattr("gdn_jax.runs.open_run", lambda directory: run)
    monkeypatch.setattr(dispatch, "splits_tokens", lambda tokens: split.append(ask(tokens)) or split[-1])
    encoded = [encode_pair(BYTES, *pair) for pair in (("context", " ending"), ("", "b" * 70))]
    found = {}
    for context in (1, 4):
        opened = evaluation.opened(experiment(tmp_path, context=context), None)
        found[context] = opened._scorer.score(*zip(*encoded, strict=True), progress=SILENT)
        assert any(split) == (context == 4)
    for one, other in zip(found[1], found[4], strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-6) and one.greedy == other.greedy
