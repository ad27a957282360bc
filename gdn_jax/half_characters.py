"""Lone surrogates: JSON and a command line can spell half a character, which no text in UTF-8 can hold."""

from typing import Any

from gdn_jax.errors import UserError


def half_character(value: Any) -> str | None:
    """A lone surrogate in a text, or anywhere in a value of JSON, keys included; None where there is none."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError as error:
                return part[error.start]
        elif isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list):
            parts += part
    return None


def check_whole(value: Any, where: str, way: str) -> None:
    """A UserError, which begins with `where` and ends with `way` out, for a value with half a character."""
    if (half := half_character(value)) is not None:
        raise UserError(f"{where} holds {half!a}, half a character (a lone surrogate), which no text may hold; {way}.")
