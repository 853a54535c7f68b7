# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Known lines, for pictures and for what a model looks at."""

import csv
from dataclasses import dataclass
from functools import cache

from ..files import RESOURCES


@dataclass(frozen=True)
class Line:
    """A line of `resources/lines.csv`, with its source.

    Attributes
    ----------
    wavelength : float
        Angstrom, vacuum.
    name : str
    rank : int
        1 is marked first in pictures; 4, the lines of the synthesis list, only at a peak.
    paper : bool
        One of the 14 at which the attention of the published model peaks.
    """

    wavelength: float
    name: str
    rank: int
    paper: bool


@cache
def line_list() -> tuple[Line, ...]:
    """All lines, by wavelength."""
    text = (RESOURCES / "lines.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple(Line(float(row["wavelength"]), row["name"], int(row["rank"]), row["paper"] == "yes") for row in rows)
