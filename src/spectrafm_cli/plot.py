# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""`spectrafm plot`: one spectrum."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import reading, reading_options
from .report import file_name


def add(verbs: Any) -> None:
    plot = verbs.add_parser(
        "plot",
        parents=[reading()],
        help="plot a spectrum with errors, masked pixels and line names",
        description="Plot the first spectrum of INPUT, or the one with a given identifier.",
    )
    plot.add_argument("--output", type=Path, metavar="PNG", help="default: NAME_OF_STAR.png")
    plot.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="Angstrom, vacuum, rest frame")
    plot.add_argument("--object-id", metavar="ID", help="identifier of the spectrum")
    plot.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from spectrafm_hf.data.readers import find_files, read_spectra
    from spectrafm_hf.show.spectra import flux_label, plot_spectrum

    rows = read_spectra(find_files(arguments.input, arguments.split), **reading_options(arguments))
    wanted = arguments.object_id
    row = next((row for row in rows if wanted in (None, str(row["object_id"]))), None)
    if row is None:
        raise ValueError(f"INPUT: expected a spectrum{f' of {wanted}' if wanted else ''}, got none")
    picture = arguments.output or Path(f"{file_name(row['object_id'])}.png")
    label = flux_label(row["file"], arguments.format)
    plot_spectrum(picture, row, wavelength_range=arguments.range and tuple(arguments.range), flux_label=label)
    print(f"written: {picture}")
