# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm formats`: what can be read."""

from __future__ import annotations

import argparse
from typing import Any

from .report import print_table


def add(verbs: Any) -> None:
    formats = verbs.add_parser("formats", help="list supported file formats")
    formats.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.readers import formats

    columns = ("name", "wavelength_medium", "rest_frame", "resolving_power")
    header = ["format", "wavelengths in", "rest frame", "resolving power"]
    print_table(header, [[getattr(format, name) for name in columns] for format in formats()], left=True)
    for format in formats():
        print(f"\n{format.name}: {format.note}")
        print(f"  flux in {format.flux_unit}; normalised by: {format.normalisation}")
