# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Modules of version 0.1.0: importing one by its old name works, with a warning that says where its content is now."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


#: Old name -> modules of today, in which its names are looked up in this order.
MOVED = {
    "app": ("show.app",),
    "app_html": ("show.app_html",),
    "augmentation": ("training.augmentation",),
    "baselines": ("training.baselines",),
    "cards": ("hub.cards",),
    "collator": ("training.collator",),
    "conversion": ("hub.conversion",),
    "data.calibrated": ("synthesis.calibrated",),
    "data.synthetic": ("synthesis.synthetic", "synthesis.synthetic_data_sets"),
    "emulation": ("synthesis.emulation",),
    "explain": ("inference.explain", "data.lines"),
    "export": ("hub.export",),
    "finetuning": ("training.finetuning", "data.joining"),
    "instruments": ("synthesis.instruments", "synthesis.line_spread", "synthesis.instrument_files"),
    "metrics": ("training.metrics", "statistics"),
    "optimization": ("training.optimization",),
    "plots": ("show.spectra", "show.labels", "show.explained", "show.style"),
    "prediction": ("inference.prediction", "data.schema"),
    "preparation": ("training.preparation",),
    "similar": ("inference.similar",),
    "survey": ("inference.survey",),
    "survey_ray": ("inference.survey_ray",),
    "throughput": ("training.throughput",),
}


class _Moved(MetaPathFinder, Loader):
    """The last finder: it is asked for what no other one has found."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and module in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        package, _, old = module.__name__.partition(".")
        homes = [f"{package}.{new}" for new in MOVED[old]]
        warnings.warn(f"{module.__name__} is called {' and '.join(homes)} now", FutureWarning, stacklevel=2)

        def get(name: str) -> Any:
            for home in homes:
                found = importlib.import_module(home)
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(
                f"module {module.__name__!r} has no attribute {name!r}; it is {' and '.join(homes)} now"
            )

        module.__getattr__ = get  # type: ignore[method-assign]


def redirect() -> None:
    """Once for a program."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
