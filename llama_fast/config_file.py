"""One TOML file as one dataclass: what it may hold is what the dataclass declares, and a wrong key is an error with the nearest name."""

import difflib
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """What is wrong with a configuration, for its author: the key, what was expected, what came."""


def read_config(path: str | Path, kind: type[T], settings: Sequence[str] = ()) -> T:
    """Reads a TOML file as a dataclass of `kind`.

    Tables are dataclasses, arrays of tables are tuples of them. A field without a default must be there.

    Args:
        settings: changes as they are typed: `table.key=value`, the value in TOML; a word without quotes is a string.

    Raises:
        ConfigError: an unknown key, a missing one, a value of another type, or what the dataclass itself refuses.
        OSError: the file cannot be read.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: it must be a configuration in TOML") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder, and must be a configuration in TOML") from None
    for setting in settings:
        _apply(table, setting)
    try:
        built: T = _build(kind, table, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return built


def _apply(table: dict[str, Any], setting: str) -> None:
    """Sets what `a.b=c` says; a number in the path is a place in an array, from 0."""
    path, equals, text = setting.partition("=")
    *parents, last = path.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"{setting!r} sets nothing: write table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    where: Any = table
    for name in parents:
        where = _step_into(where, name, setting)
    if isinstance(where, list):
        raise ConfigError(f"{setting!r} sets a whole table of an array: name a key of it, as in {path}.key=value")
    where[last] = value


def _step_into(where: Any, name: str, setting: str) -> Any:
    if isinstance(where, list):
        if not name.isdecimal() or int(name) >= len(where):
            raise ConfigError(f"{setting!r}: {name!r} is no place in an array of {len(where)}, counted from 0")
        return where[int(name)]
    inner = where.setdefault(name, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{setting!r}: {name!r} is no table")
    return inner


def _build(kind: Any, table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table, and is {table!r}")
    prefix = f"{where}." if where else ""
    known = {field.name: field for field in fields(kind)}
    for key in table:
        if key not in known:
            raise ConfigError(f"there is no {prefix}{key}" + nearest(key, known))
    missing = [
        name for name, field in known.items()
        if name not in table and field.default is MISSING and field.default_factory is MISSING
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing")
    types_of = get_type_hints(kind)
    values = {key: _value(types_of[key], value, f"{prefix}{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """What to write instead of an unknown name, as the end of a sentence."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`, and nothing is guessed: a string is no number, and true is no 1."""
    if is_dataclass(kind):
        return _build(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return _value(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(
                f"{where} must be one of {', '.join(map(str, arguments))}, and is {value!r}"
                + (nearest(value, arguments) if isinstance(value, str) else "")
            )
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be an array, and is {value!r}")
        return tuple(_value(arguments[0], each, f"{where}.{i}") for i, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table, and is {value!r}")
        return value
    return _plain(kind, value, where)


_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", Path: "a path"}


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and type(value) is str:
        return Path(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} must be {_WORDS[kind]}, and is {value!r}")
    return value
