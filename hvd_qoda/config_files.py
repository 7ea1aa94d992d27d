"""Reads configuration files of any origin, JSON or YAML, into plain values: quickly, or with a `ConfigError`.

Of YAML it reads what JSON can say, too (the core schema of YAML 1.2): `off`, `yes` and `2026-01-01` are words. Anchors,
aliases and tags are refused, because small files with them can stand for values without bounds.
"""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from hvd_qoda.errors import ConfigError

__all__ = ["read_json", "read_yaml", "shortened", "shown"]

_MOST_BYTES = 2**20
_MOST_DIGITS = 40
_DEEPEST = 50
_LONGEST_MESSAGE = 900


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        ConfigError: if it cannot be read, or is not JSON, or has a key twice, is nested deeper than 50 levels, or has a
            number of more than 40 digits.
    """
    text = _text(path)
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition, parse_int=_whole_number)
        _check_depth(value)
    except _WrongError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply, more than {_DEEPEST} levels") from None
    except json.JSONDecodeError as error:
        raise ConfigError(shortened(f"{path} is not JSON: {error}")) from None
    return value


def read_yaml(path: str | Path) -> Any:
    """The value in a YAML file.

    Raises:
        ConfigError: as for `read_json`, and for anchors, aliases and tags.
    """
    text = _text(path)
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_CoreLoader)  # a safe loader
    except _WrongError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(shortened(f"{path} is not YAML: {' '.join(str(error).split())}")) from None
    return value


def shown(value: Any) -> str:
    """A value for a message, in at most a line: long words, lists and numbers are cut."""
    return _SHORT.repr(value)


def shortened(message: str) -> str:
    """A message of at most 900 characters."""
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}..."


class _WrongError(Exception):
    """Something in a file that is not read; the caller names the file."""


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 8
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write numbers of more than 4300 digits.
        return repr(x) if x.bit_length() <= 200 else f"<whole number of {x.bit_length()} bits>"


_SHORT = _Short()


def _text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path}: a configuration file has at most {_MOST_BYTES} bytes")
        return content.decode("utf-8-sig")
    # ValueError: a name that no file can have.
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise ConfigError(shortened(f"cannot read the configuration {shown(path)}: {error}")) from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _WrongError(f"the key {shown(key)} stands twice in one block")
        values[key] = value
    return values


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _WrongError(f"a number of {len(text)} digits, {text[:20]}...: at most {_MOST_DIGITS} are read")
    return int(text)


def _check_depth(value: Any) -> None:
    """Without recursion, so that it can look at anything."""
    level = [value]
    for _ in range(_DEEPEST):
        inside = (
            part.values() if isinstance(part, Mapping) else part for part in level if isinstance(part, (dict, list))
        )
        level = [part for parts in inside for part in parts]
        if not level:
            return
    raise _WrongError(f"is nested too deeply, more than {_DEEPEST} levels")


def _check_events(text: str) -> None:
    """Look at a YAML file's parts one by one, before any value is made of them."""
    depth = 0
    events: Iterator[Any] = yaml.parse(text, Loader=_PARSER)
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _WrongError(f"line {event.start_mark.line + 1}: anchors (&) and aliases (*) are not read")
        if getattr(event, "tag", None) is not None:
            raise _WrongError(f"line {event.start_mark.line + 1}: the tag {shown(event.tag)} is not read; leave it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise _WrongError(f"is nested too deeply, more than {_DEEPEST} levels")


# The parser in C takes a time proportional to the file's length; the one in Python, where there is no other, does not.
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _CoreLoader(_PARSER):
    """Scalars as the core schema of YAML 1.2 has them, and no key twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        pairs = [
            (self.construct_object(key, deep=True), self.construct_object(value, deep=deep))
            for key, value in node.value
        ]
        for key, _ in pairs:
            if not isinstance(key, str):
                raise _WrongError(f"line {node.start_mark.line + 1}: {shown(key)}: keys are words")
        return _without_repetition(pairs)

    def construct_whole_number(self, node: Any) -> int:
        return _whole_number(self.construct_scalar(node))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _CoreLoader.construct_whole_number)
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
