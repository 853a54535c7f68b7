# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of a package that are imported where they are first asked for: torch alone takes seconds."""

import ast
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def names_of(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """
    The `__getattr__` of a package.

    Parameters
    ----------
    package : str
        Its `__name__`.
    modules : mapping of module to names
        Modules of the package, and the names that are taken from each.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return get


def names_for_types(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """
    The `__getattr__` and `__all__` of a package whose names are imported under `if TYPE_CHECKING`, where they are
    written once, for type checkers and for here.

    Parameters
    ----------
    package, file : str
        Its `__name__` and `__file__`.
    """
    body = ast.parse(Path(file).read_text(encoding="utf-8")).body
    block = next(node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    modules: dict[str, list[str]] = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            modules.setdefault(str(node.module), []).extend(name.name for name in node.names)
    return names_of(package, modules), sorted(name for names in modules.values() for name in names)


class LateModule:
    """A module that is imported when an attribute of it is first used."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(importlib.import_module(self.__name__), name)
        return value
