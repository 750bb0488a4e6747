"""Strict JSON: one canonical form for hashing, and typed reading that names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from discreet.errors import ConfigError


def canonical_json(value: object) -> str:
    """The one text of a JSON value: sorted keys, no spaces, ASCII, exact floats.

    Raises:
        ConfigError: it holds NaN, infinity, or something that is not JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"record not writable as JSON ({error}): pass finite numbers, strings, lists and objects only."
        ) from None


def parse_json(text: str, *, where: str) -> object:
    """Parse JSON strictly: duplicate keys, NaN and infinities are refused.

    Raises:
        ConfigError: names ``where`` and what is wrong.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({error}); restore the file from a copy.") from None


def json_number(value: float) -> float | str:
    """A number as a JSON value: infinity, which has none, is the word that `Fields` reads back."""
    return "inf" if math.isinf(value) else value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("duplicate key")
    return record


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """One JSON object, read field by field. Every failure names the object and the field.

    Args:
        record: what was parsed.
        where: what it is, for messages: "plan.json", "ledger line 3".
        names: exactly the fields that it must have.
    """

    def __init__(self, record: object, *, where: str, names: Iterable[str]) -> None:
        if not isinstance(record, Mapping):
            raise ConfigError(
                f"{where}: must be a JSON object, not {type(record).__name__}; restore the file from a copy."
            )
        self._record, self._where = record, where
        expected = set(names)
        for name in sorted(expected - set(record)):
            raise ConfigError(f"{where}: field {name!r} is missing; restore the file or write it again.")
        for name in sorted(set(record) - expected):
            raise ConfigError(f"{where}: field {name!r} is unknown; the fields are {', '.join(sorted(expected))}.")

    def integer(self, name: str) -> int:
        """An integer; booleans and floats are refused."""
        return self._typed(name, "an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))

    def number(self, name: str) -> float:
        """A finite number, as float."""
        return float(self._typed(name, "a number", _is_number))

    def number_or_inf(self, name: str) -> float:
        """A finite number, or the string "inf"."""
        return math.inf if self._record[name] == "inf" else self.number(name)

    def text(self, name: str) -> str:
        """A string."""
        return self._typed(name, "a string", lambda value: isinstance(value, str))

    def flag(self, name: str) -> bool:
        """true or false."""
        return self._typed(name, "true or false", lambda value: isinstance(value, bool))

    def items(self, name: str) -> list[object]:
        """A list."""
        return self._typed(name, "a list", lambda value: isinstance(value, list))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        return tuple(self._typed(name, "a list of strings", _is_texts))

    def mapping(self, name: str) -> dict[str, object]:
        """An object."""
        return dict(self._typed(name, "an object", lambda value: isinstance(value, Mapping)))

    def scalars(self, name: str) -> dict[str, str | float]:
        """An object whose values are strings and numbers."""
        return self._typed(name, "an object of strings and numbers", _is_scalars)

    def text_mapping(self, name: str) -> dict[str, str]:
        """An object whose values are strings."""
        return self._typed(
            name, "an object of strings", lambda value: isinstance(value, dict) and _is_texts(list(value.values()))
        )

    def _typed(self, name: str, kind: str, accepts: Callable[[object], bool]) -> Any:
        value = self._record[name]
        if not accepts(value):
            raise ConfigError(
                f"{self._where}: field {name!r} is {value!r}, but must be {kind}; restore the file or write it again."
            )
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_scalars(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) or _is_number(item) for item in value.values())
