"""Parses the command line into typed options with tyro; a mistake becomes one sentence."""

import contextlib
import copy
import dataclasses
import io
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from gdn_jax.config import MIXER_FIELDS, OWN_CONFIGS, OWN_FIELD, Data, Model, Optim, Run, mixer_config
from gdn_jax.errors import UserError, nearest

Switch = tyro.conf.FlagCreatePairsOff[bool]
FromRun = typing.Annotated[str, tyro.conf.arg(name="from")]  # of a field from_: the word alone is Python's own


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The experiment's fields; the defaults are those of the ID."""

    model: tyro.conf.FlagConversionOff[Model]
    optim: tyro.conf.FlagConversionOff[Optim]
    data: tyro.conf.FlagConversionOff[Data]
    run: tyro.conf.FlagConversionOff[Run]


def parse(default: Any, words: list[str], prog: str, shown: str = "") -> Any:
    """`default` with the options in `words`; a mistake is a UserError that names the option.

    shown   the ID that nobody named and whose values help shows
    """
    note = f"The values below are those of {shown}; name an ID to see its own." if shown else ""
    try:
        return _tyro(default, words, prog, note)
    except SystemExit as stop:
        if not stop.code:
            raise
    # tyro explains itself in boxes of many lines only: find the option that is wrong on its own.
    hints = _hints(default)
    for option in _split(words):
        value = option[0].partition("=")[2]
        name, values = _name(option), ([value] if value else option[1:])
        if not option[0].startswith("--"):
            raise UserError(f"{' '.join(option)!r} is not expected here; options are written --name value.")
        if name not in hints:
            known = f"`{prog} --help` lists all"
            raise UserError(f"There is no option --{name}{nearest(f'--{name}', [f'--{h}' for h in hints])}; {known}.")
        try:
            _tyro(default, option, prog)
        except UserError:
            continue  # a rule that other options may fulfil: these words are options
        except SystemExit:
            if hints[name] is bool and values in (["True"], ["False"]):  # a Switch; other bools take these words
                raise UserError(f"--{name} takes no value; write --{name} alone, or leave it out.") from None
            given = repr(" ".join(values)) if values else "given without a value"
            raise UserError(f"--{name} is {given}; it must be {_rule(hints[name])}.") from None
    raise UserError(f"The options {' '.join(words)!r} do not go together; `{prog} --help` explains each.")


def with_mixers(model: Model, words: list[str]) -> Model:
    """`model` with placeholders for the mixer configurations that `words` set and it lacks, not checked yet.

    What `parse` then makes of it is checked like every model.
    """
    draft, given = copy.copy(model), [_name(option) for option in _split(words)]
    if "model.pattern" in given and not any(mixer in words for mixer in OWN_CONFIGS):
        object.__setattr__(draft, OWN_FIELD, None)  # of a mixer that the new pattern does not have
    fields = {field: mixer for mixer, field in MIXER_FIELDS.items() if field != OWN_FIELD or mixer in words}
    for field, mixer in fields.items():
        prefix = f"model.{field}."
        mine = [name.removeprefix(prefix) for name in given if name.startswith(prefix)]
        if not mine or getattr(model, field) is not None:
            continue
        kind = mixer_config(mixer)
        needed = [one.name for one in dataclasses.fields(kind) if one.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in mine]:
            raise UserError(
                f"--{prefix}{mine[0]} begins the configuration of a mixer that this model lacks; give "
                f"{' and '.join(f'--{prefix}{name}' for name in missing)} too."
            )
        hints, blank = typing.get_type_hints(kind), object.__new__(kind)
        for one in dataclasses.fields(kind):
            object.__setattr__(blank, one.name, _some_value(hints[one.name]) if one.name in needed else one.default)
        object.__setattr__(draft, field, blank)
    return draft


def _some_value(hint: Any) -> Any:
    """A placeholder value of a type."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Literal else (typing.get_origin(hint) or hint)()


def _name(option: list[str]) -> str:
    """`--optim.batch-size=4` -> `optim.batch_size`."""
    return option[0].removeprefix("--").partition("=")[0].replace("-", "_")


def _tyro(default: Any, words: list[str], prog: str, note: str = "") -> Any:
    with contextlib.redirect_stderr(io.StringIO()):  # the sentences are ours
        return tyro.cli(
            type(default),
            default=default,
            args=words,
            prog=prog,
            description=f"{type(default).__doc__} {note}".strip(),
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands,),
        )


def _split(words: list[str]) -> list[list[str]]:
    """["--a", "1", "--b"] -> [["--a", "1"], ["--b"]]."""
    out: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not out:
            out.append([word])
        else:
            out[-1].append(word)
    return out


def _hints(options: Any, prefix: str = "") -> dict[str, Any]:
    """Name of every option -> its type."""
    out = {}
    for name, hint in typing.get_type_hints(type(options)).items():
        value = getattr(options, name)
        out |= (
            _hints(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name.rstrip("_"): hint}
        )
    return out


def _rule(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return f"{_rule(args[0])} or None"
    if origin is tuple:
        return "one word or more"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "one word"}[hint]
