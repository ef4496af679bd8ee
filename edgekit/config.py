"""YAML files into checked dataclasses; whatever is wrong is told with file, line and the nearest known name."""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from edgekit.errors import InputError, IntegrityError, nearest

T = TypeVar("T")
Kind = Literal["recipe", "target"]
Location = tuple[str | int, ...]

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_PACKAGE = Path(__file__).parent


def folder(kind: Kind) -> Path:
    """Return the folder of the shipped files: inside the package when installed, else the checkout's own."""
    installed = _PACKAGE / f"{kind}s"
    return installed if installed.is_dir() else _PACKAGE.parent / f"{kind}s"


def shipped(kind: Kind) -> list[str]:
    """Return the names of the shipped recipes or targets, sorted."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


def shipped_file(name: str, kind: Kind) -> Path:
    """Return the YAML file of a shipped recipe or target.

    Raises:
        InputError: Nothing of that name.
    """
    if name not in (known := shipped(kind)):
        raise InputError(f"unknown {kind} '{name}'; {nearest(name, known)}", remedy=f"see: edgekit {kind}s")
    return folder(kind) / f"{name}.yaml"


def load_named(name_or_path: str | Path, *, kind: Kind, into: type[T], overrides: Sequence[str] = ()) -> T:
    """Return the shipped file of that name, or the file at that path, as a checked `into`.

    Raises:
        InputError: Nothing of that name, or a broken file.
    """
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else shipped_file(text, kind)
    return load(path, into, overrides)


def load(path: Path, into: type[T], overrides: Sequence[str] = ()) -> T:
    """Return a YAML file as a checked `into`, with dotted overrides put in first.

    Raises:
        InputError: A missing file, broken YAML, a duplicate or unknown key, a wrong type or value; the first one found.
    """
    return _with(overrides, _parse(path), path, into)


def changed(value: T, overrides: Sequence[str]) -> T:
    """Return settings that came from no file with dotted overrides put in, checked as `load` checks them.

    Raises:
        InputError: An unknown key, a wrong type or value; the first one found.
    """
    tree = YAML(typ="rt").load(json.dumps(_adapter(type(value)).dump_python(value, mode="json")))
    return _with(overrides, tree, Path("defaults"), type(value))


def _with(overrides: Sequence[str], tree: CommentedMap, path: Path, into: type[T]) -> T:
    for override in overrides:
        _override(tree, override)
    try:
        return _adapter(into).validate_json(_plain_json(path, tree))
    except ValidationError as error:
        raise InputError(_explain(path, tree, into, error.errors(), overrides)) from error


def checked(value: object, into: type[T], path: Path) -> T:
    """Return a value that was read from JSON as a checked `into`.

    Raises:
        IntegrityError: It does not follow the schema; it was written by edgekit, so the file at `path` was changed.
    """
    try:
        return _adapter(into).validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{path}: '{key}': {first['msg']}", remedy="restore the file, or make it again") from error


def record(path: Path, into: type[T], *, kind: str, version: int, called: str, again: str) -> T:
    """Return the record that edgekit wrote to a JSON file.

    Args:
        path: The file.
        into: The record's type.
        kind: What the file's `kind` has to be.
        version: What its `schema_version` has to be.
        called: The record, for the messages: "a baseline record".
        again: The remedy.

    Raises:
        InputError: It cannot be read, or is of another kind or another version of edgekit.
        IntegrityError: It is damaged.
    """
    try:
        raw = dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}", remedy="allow access to it, or remove it"
        ) from error
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{path}: is not {called}: {error}", remedy=again) from error
    if (given := raw.pop("kind", None)) != kind:
        raise InputError(f"{path}: is not {called} (its kind is {given!r})", remedy=again)
    if (found := raw.pop("schema_version", None)) != version:
        raise InputError(
            f"{path}: was written by another version of edgekit (schema {found}, not {version})", remedy=again
        )
    return checked(raw, into, path)


def json_schema(kind: type[T]) -> dict[str, object]:
    """Return the JSON Schema of a recipe or target, for editors."""
    return _adapter(kind).json_schema()


def options(texts: Sequence[str]) -> dict[str, bool | int | str]:
    """Return options of a network that the command line gives as NAME=VALUE, with YAML values.

    Raises:
        InputError: No name, or a value that is neither a truth value, a whole number nor text.
    """
    tree = CommentedMap()
    for text in texts:
        _override(tree, text, flag="--option")
    for name, value in tree.items():
        if not isinstance(value, bool | int | str):
            raise InputError(f"--option {name}={value!r}: expected true, false, a whole number or text")
    return dict(tree)


def _adapter(into: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(into)


def _parse(path: Path) -> CommentedMap:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error
    try:
        tree = YAML(typ="rt").load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else str(error.problem)
        raise InputError(f"{path}:{line}: key '{key}' stands here a second time", remedy="remove one") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: broken YAML: {error.problem}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, CommentedMap):
        raise InputError(f"{path}:1: expected settings as 'key: value' lines")
    return tree


def _plain_json(path: Path, tree: CommentedMap) -> str:
    """Return the tree as JSON; what is not finite becomes text, so that no number is ever infinite or nan."""
    try:
        return json.dumps(json.loads(json.dumps(tree, default=str), parse_constant=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: holds what a settings file cannot: {error}") from error


def _override(tree: CommentedMap, text: str, flag: str = "--set") -> None:
    """Put `a.b=value` into the tree; the value is YAML."""
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        example = "training.steps=100" if flag == "--set" else "activation=hardswish"
        raise InputError(f"{flag} {text}: expected NAME=VALUE", remedy=f"for example {flag} {example}")
    at: CommentedMap = tree
    *parents, last = name.split(".")
    for depth, parent in enumerate(parents, start=1):
        known = at.get(parent)
        if known is not None and not isinstance(known, CommentedMap):
            raise InputError(
                f"{flag} {text}: '{'.'.join(parents[:depth])}' is {repr(known)[:80]}, which holds no settings",
                remedy="mend it, or set it as a whole",
            )
        # A copy, for YAML's aliases are one object in all their places.
        at[parent] = copy.copy(known) if isinstance(known, CommentedMap) else CommentedMap()
        at = at[parent]
    try:
        at[last] = YAML(typ="rt").load(StringIO(value))
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{flag} {text}: the value is not YAML", remedy="quote it if it is text") from error


def _explain(
    path: Path, tree: CommentedMap, into: type[T], errors: Sequence[ErrorDetails], overrides: Sequence[str]
) -> str:
    """Return one line on the first unknown key or else the first error: place, what is wrong, found and meant."""
    error = next((e for e in errors if e["type"] in _UNKNOWN), errors[0])
    location = _location(tree, error)
    dotted = ".".join(str(part) for part in location)
    set_here = [o for o in overrides if _overlap(o.partition("=")[0], dotted)]
    where = f"--set {set_here[-1]}" if set_here else f"{path}:{_line(tree, location)}"
    found = repr(error["input"])[:80]
    match error["type"]:
        case kind if kind in _UNKNOWN:
            known = _fields(into, location[:-1])
            return f"{where}: unknown key '{dotted}'; {nearest(str(location[-1]), known)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{where}: key '{dotted}' is missing; add it"
        case "tuple_type" | "list_type" if isinstance(error["input"], str | int | float):
            return f"{where}: '{dotted}' is {found}; expected a list: write '[{error['input']}]'"
        case _:
            told = (e["msg"].removeprefix("Value error, ") for e in errors if _location(tree, e) == location)
            same = dict.fromkeys(text.removeprefix("Input should be ") for text in told)
            expected = "expected " if error["msg"].startswith("Input should be") else ""
            return f"{where}: '{dotted}' is {found}; {expected}{' or '.join(same)}"


def _location(tree: CommentedMap, error: ErrorDetails) -> Location:
    """Return where an error is, without pydantic's names of alternatives; a key of the file may be called like one."""
    location, at = list[str | int](), tree
    for part in error["loc"]:
        if (there := isinstance(at, CommentedMap) and part in at) or not _is_union_tag(part):
            location.append(part)
        at = at[part] if there else at
    return tuple(location)


def _overlap(one: str, other: str) -> bool:
    """Return whether one of two dotted names is the other or lies inside it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "bool", "constrained-int"))


def _line(tree: CommentedMap, location: Location) -> int:
    """Return the line of a key or item, or of the nearest thing around it that has one; from 1."""
    line, at = 1, tree
    for name in location:
        part = _own_key(at, name) if isinstance(at, CommentedMap) else name
        known = (isinstance(at, CommentedMap) and part in at) or (
            isinstance(at, CommentedSeq) and isinstance(part, int) and part < len(at)
        )
        if not known:
            break
        # What an override put in has no lines.
        marks = at.lc.data.get(part) if at.lc.data else None
        line = marks[0] + 1 if marks else line
        at = at[part]
    return line


def _own_key(at: CommentedMap, name: str | int) -> object:
    """Return the key of a mapping that JSON calls by this name: YAML has numbers and nothing as keys, too."""
    spelled = {key if isinstance(key, str) else json.dumps(key): key for key in at}
    return spelled.get(str(name), name)


def _fields(into: type[T], location: Location) -> list[str]:
    """Return the names that are known at a place of the schema."""
    kind: object = into
    for part in location:
        kind = _dataclass(typing.get_type_hints(kind)[str(part)]) if isinstance(kind, type) else kind
    return (
        [f.name for f in dataclasses.fields(kind)] if isinstance(kind, type) and dataclasses.is_dataclass(kind) else []
    )


def _dataclass(hint: object) -> object:
    candidates: Iterator[object] = iter((hint, *get_args(hint)))
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), hint)
