"""The public names and signatures of every package, beside the list that was agreed on.

Of a package: `__all__` of it, of its subpackages, of the modules in its `__all__`, and of those its entry points name.

A change that is meant: `nox -s tests -- -k public_api --zs-update`, and the version's minor goes up when a name
that a sibling uses changed.
"""

from __future__ import annotations

import difflib
import enum
import importlib
import inspect
import types
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel
from workspace import ROOT, graph, projects, sibling_imports

SNAPSHOT = ROOT / "tests/repo/public_api.txt"


def public_names() -> set[tuple[str, str]]:
    """(module, name): what is public by the rule above, and whatever else a sibling imports."""
    names: set[tuple[str, str]] = set()
    for package in graph():
        source = ROOT / "packages" / package / "src"
        for path in source.rglob("__init__.py"):
            module = ".".join(path.parent.relative_to(source).parts)
            names |= all_of(module)
        for points in projects()[package].get("entry-points", {}).values():
            for module, colon, name in (value.partition(":") for value in points.values()):
                names |= all_of(module) | ({(module, name)} if colon else set())
        for taken in sibling_imports(package):
            module, name = ".".join(taken.names[:-1]), taken.names[-1]
            names.add((module or name, "" if not module else name))
    return {(module, name) for module, name in names if name and not isinstance(value_of(module, name), ModuleType)}


def all_of(module: str) -> set[tuple[str, str]]:
    found = importlib.import_module(module)
    names = {(module, name) for name in getattr(found, "__all__", ())}
    for _, name in sorted(names):
        if isinstance(inner := getattr(found, name), ModuleType):
            names |= all_of(inner.__name__)
    return names


def value_of(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    return getattr(found, name) if hasattr(found, name) else importlib.import_module(f"{module}.{name}")


class Bare:
    """A text that shows itself without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(value: Any) -> str:
    """As written, but a default that is no plain value is `...`: its repr would be this machine's."""
    if inspect.isclass(value) and (issubclass(value, enum.Enum | BaseModel) or getattr(value, "_is_protocol", False)):
        return ""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = (type(None), bool, int, float, str, tuple, type(inspect.Parameter.empty))
    parameters = [
        parameter.replace(
            annotation=bare(parameter.annotation),
            default=parameter.default if isinstance(parameter.default, plain) else Bare("..."),
        )
        for parameter in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters, return_annotation=bare(found.return_annotation)))


def bare(annotation: Any) -> Any:
    return Bare(annotation) if isinstance(annotation, str) else annotation


def entries(module: str, name: str) -> Iterator[str]:
    """`module:name(signature)`, then the methods and properties that a class defines itself."""
    value = value_of(module, name)
    yield f"{module}:{name}{signature(value) if callable(value) else ''}"
    if inspect.isclass(value) and value.__module__.startswith("zs_"):
        yield from members(f"{module}:{name}", value)


def members(prefix: str, cls: type) -> Iterator[str]:
    if issubclass(cls, BaseModel):
        for key, field in cls.model_fields.items():
            yield f"{prefix}.{key} (key{', required' if field.is_required() else ''})"
    for key, value in sorted(vars(cls).items()):
        if key.startswith("_") or key == "model_config" or issubclass(cls, enum.Enum):
            continue
        if isinstance(value, property):
            yield f"{prefix}.{key} (property)"
        elif isinstance(value, staticmethod | classmethod):
            yield f"{prefix}.{key}{signature(value.__func__)}"
        elif isinstance(value, types.FunctionType | types.MethodDescriptorType):
            yield f"{prefix}.{key}{signature(value)}"
        elif isinstance(value, types.GetSetDescriptorType):  # a property written in C
            yield f"{prefix}.{key} (property)"


def current() -> list[str]:
    return [line for module, name in sorted(public_names()) for line in entries(module, name)]


def test_public_api_is_the_agreed_one(update: bool) -> None:
    found = current()
    assert "zs_comm:ConfigError" in "\n".join(found)
    if update:
        SNAPSHOT.write_text("\n".join(found) + "\n")
    agreed = SNAPSHOT.read_text().splitlines() if SNAPSHOT.exists() else []
    changes = list(difflib.unified_diff(agreed, found, "agreed", "found", lineterm="", n=0))
    if changes:
        pytest.fail("\n".join(["the public API changed; --zs-update accepts it:", *changes]))
