# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of a package that are imported where they are first asked for: torch alone takes seconds."""

import importlib
from collections.abc import Callable, Mapping, Sequence
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
