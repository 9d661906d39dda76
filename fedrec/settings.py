"""Reading settings: TOML into checked values, and what is wrong with them in one sentence."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedrec.errors import ConfigError, nearest

T = TypeVar("T", bound=BaseModel)


def read_toml(path: Path, missing: str | None = None) -> dict[str, Any]:
    """Return a TOML document.

    Args:
        path: the file.
        missing: the sentence for a file that is not there.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}.") from error
    except (OSError, UnicodeDecodeError) as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            raise ConfigError(missing) from error
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"Cannot read '{path}': {reason}.") from error


def parsed(kind: type[T], document: Mapping[str, Any], where: str) -> T:
    """Return checked settings; `where` names the document in errors.

    Raises:
        ConfigError: with the first problem, in one sentence.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise ConfigError(explain(error, where, kind)) from error


def explain(error: ValidationError, where: str, settings: type[BaseModel]) -> str:
    """Return the first problem of a document in one sentence; `where` names the document, `settings` its model."""
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    fields, path = _fields_at(problem["loc"], settings)
    dotted = ".".join(path)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        return f"Unknown key '{dotted}' in {where}{nearest(key, fields)}. Known here: {', '.join(fields)}."
    if problem["type"] == "missing":
        return f"'{dotted}' is missing in {where}."
    if not dotted:
        return f"{where}: {problem['msg'].removeprefix('Value error, ')}."
    return f"'{dotted}' in {where}: {problem['msg']} (got {str(problem['input'])[:80]!r})."


def _fields_at(location: tuple[int | str, ...], settings: type[BaseModel]) -> tuple[list[str], list[str]]:
    """Return the keys known where the error lies, and its path as the user wrote it (without union tags)."""
    path: list[str] = []
    members: tuple[Any, ...] = ()
    for part in location:
        tagged = [m for m in members if (m.model_fields.get("kind") or m.model_fields["mode"]).default == part]
        members = ()
        if tagged:
            settings = tagged[0]
            continue
        path.append(str(part))
        field = settings.model_fields.get(str(part))
        if field is None:
            continue
        options = [m for m in get_args(field.annotation) or (field.annotation,) if _is_settings(m)]
        if len(options) == 1:
            settings = options[0]
        members = tuple(options) if len(options) > 1 else ()
    return list(settings.model_fields), path


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
