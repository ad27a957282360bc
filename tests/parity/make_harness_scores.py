"""Log-likelihoods by lm-evaluation-harness's own class for Hugging Face models: what test_parity.py compares with.

    python -m venv /tmp/hf
    /tmp/hf/bin/pip install torch==2.13.0 transformers==5.24.0 accelerate lm-eval==0.4.13 tokenizers
    /tmp/hf/bin/python tests/parity/make_harness_scores.py

writes tests/parity/harness_scores.json: the parameters are those of fla_transformer.npz, run as transformers' Llama.
The tokenizer has one token for each of 63 characters, and the end of a document.
"""

import json
import string
from pathlib import Path

import lm_eval
import numpy as np
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

HERE = Path(__file__).parent
LETTERS = string.ascii_letters + string.digits + " "
MAX_LENGTH = 24
PAIRS = [
    ("the lamp", " was lit"), ("a context that is longer than what fits", " and goes on"), ("ends in spaces  ", "then"),
    ("", "alone"), ("one", "x"), ("The same", " words"), ("The same", " letters"),
]  # fmt: skip
TEXTS = ["She looked at the lamp", "A text of more than one block of tokens is read in blocks side by side", "x"]


def make_tokenizer():
    vocabulary = {"</s>": 0} | {letter: index + 1 for index, letter in enumerate(LETTERS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(["</s>"])
    return made


def make_model():
    with np.load(HERE / "fla_transformer.npz") as file:
        kept = dict(file)
    config = json.loads(str(kept["config"]))
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "rms_norm_eps": config.get("norm_eps", 1e-6), "tie_word_embeddings": True, "attn_implementation": "eager",
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    names = {"embeddings": "embed_tokens", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {"attn": "self_attn"}
    state = {key.removeprefix("state/"): torch.tensor(x) for key, x in kept.items() if key.startswith("state/")}
    renamed = {".".join(names.get(part, part) for part in key.split(".")): value for key, value in state.items()}
    model.load_state_dict(renamed, strict=True)
    with torch.no_grad():
        gap = (model.eval()(torch.tensor(kept["tokens"]).long()).logits - torch.tensor(kept["logits"])).abs().max()
    assert gap < 1e-4, gap
    return model


def main():
    made = make_tokenizer()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")
    harness = HFLM(
        pretrained=make_model(), tokenizer=fast, backend="causal", batch_size=2, max_length=MAX_LENGTH,
        add_bos_token=False, device="cpu",
    )  # fmt: skip

    def ask(kind, arguments):
        requests = [
            Instance(request_type=kind, doc={}, arguments=one, idx=i, metadata=("toy", i, 1))
            for i, one in enumerate(arguments)
        ]
        return getattr(harness, kind)(requests)

    found = {
        "made": {"lm_eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "tokenizer": json.loads(made.to_str()),
        "max_length": MAX_LENGTH,
        "loglikelihood": [
            {"pair": pair, "log_likelihood": score, "greedy": bool(greedy)}
            for pair, (score, greedy) in zip(PAIRS, ask("loglikelihood", PAIRS), strict=True)
        ],
        "rolling": [
            {"text": text, "log_likelihood": score}
            for text, score in zip(TEXTS, ask("loglikelihood_rolling", [(text,) for text in TEXTS]), strict=True)
        ],
    }
    (HERE / "harness_scores.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["loglikelihood"] + found["rolling"], indent=1))


main()
