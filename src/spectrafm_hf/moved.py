# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Modules of version 0.1.0: whoever imports one is told its name of today."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder


ROOMS = {
    "data": "joining",
    "hub": "cards conversion export",
    "inference": "explain prediction similar survey survey_ray",
    "show": "app app_html workbench",
    "synthesis": "bounds emulation instruments",
    "training": "augmentation baselines collator finetuning metrics optimization preparation throughput",
}
NEW_NAMES = {
    **{module: f"{room}.{module}" for room, modules in ROOMS.items() for module in modules.split()},
    **{f"data.{module}": f"synthesis.{module}" for module in ("calibrated", "synthetic")},
    "plots": "show (spectra, labels, explained, style)",
}


class _Moved(MetaPathFinder):
    """The last finder: it is asked for what no other one has found."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        package, _, module = name.partition(".")
        if package == __package__ and module in NEW_NAMES:
            raise ModuleNotFoundError(f"{name} is called {package}.{NEW_NAMES[module]} now", name=name)


def tell() -> None:
    """Once for a program."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
