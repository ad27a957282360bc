"""`gdn data prepare` and `gdn data verify`."""

from dataclasses import dataclass
from pathlib import Path

from experiments.commands import print_facts
from experiments.options import Switch
from gdn_jax.config import Data, Run


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Tokenise text: a file or folder of text, .jsonl or .parquet, a built-in source, or 'hf:owner/name'.

    Prints the directory it made, which --data.source takes.
    """

    out: str = ""  # directory to write; empty: data/<source>-<tokenizer hash>
    tokenizer: str = "byte"  # or the path of a SentencePiece .model or tokenizers .json file
    validation: float = Data.validation  # fraction of documents held out, or of the only one
    workers: int | None = None  # processes; None: one per core, one alone for small sources
    text_column: str = "text"  # of .jsonl and .parquet rows


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check every hash of a prepared directory and print its fingerprint."""

    json: Switch = False  # print one flat object


def prepare_data(source: str, options: PrepareOptions) -> None:
    from gdn_jax.prepare import default_directory, prepare

    data = Data(source=source, tokenizer=options.tokenizer, validation=options.validation)
    out = Path(options.out) if options.out else default_directory(data, Run().data_root)
    prepare(
        source, out, options.tokenizer,
        validation=options.validation, text_column=options.text_column, workers=options.workers,
    )  # fmt: skip
    print(out)


def verify_data(directory: str, options: VerifyOptions) -> None:
    from gdn_jax.data import open_prepared

    prepared = open_prepared(directory, tokenizer_hash=None, verify=True)
    facts = {"directory": directory, "source": prepared.manifest["source"]}
    facts["fingerprint"] = prepared.fingerprint
    facts |= {f"tokenizer_{key}": value for key, value in prepared.manifest["tokenizer"].items()}
    for split, counts in prepared.manifest["splits"].items():
        facts |= {f"{split}_{key}": counts[key] for key in ("tokens", "documents", "bytes", "words")}
    print_facts(facts, options.json)
    if not options.json:
        print("Every file is whole.")
