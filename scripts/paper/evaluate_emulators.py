# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""An emulator against a grid of synthesised spectra, by temperature and range.

    python scripts/paper/evaluate_emulators.py GRID --held-out 80 --output emulators.md

GRID is what `scripts/synthesize_grid.py` writes, or an .npz file; its last N stars are used. The emulator is averaged
over the pixels of the grid. `emulator-optical` was fitted to another grid. Its errors on held-out stars of that one, at
R = 2,000 and 20,000, and its derivatives against the synthesis, are in its card.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report_files import add_output, print_and_write

from spectrafm_hf.models.rungs_spectrafm import half_widths
from spectrafm_hf.synthesis.emulation import Grid, read_grid
from spectrafm_hf.synthesis.synthetic import load_emulator


Array = NDArray[Any]
TEFF = (0.0, 3_500.0, 4_000.0, 4_500.0, 5_000.0, 6_000.0, 9_000.0)  # K
RANGES = (3_310.0, 4_000.0, 5_000.0, 6_000.0, 7_000.0, 8_500.0, 10_290.0)  # Angstrom


def emulated(name: str, grid: Grid) -> tuple[Array, Array]:
    """Flux over the continuum (stars, pixels) of those stars of a grid that an emulator covers, and which these are."""
    emulator = load_emulator(name).eval()
    config = emulator.config
    known = dict(zip(grid.label_names, grid.labels.T, strict=True))
    # Labels that the grid does not have are those of the Sun, lithium as usual.
    missing = {label: np.zeros(len(grid)) for label in config.label_names if label not in known}
    if "li_fe" in missing:
        missing["li_fe"] = np.clip(-1.5 - known["fe_h"], config.label_minimum[config.label_names.index("li_fe")], None)
    labels = {label: (known | missing)[label] for label in config.label_names}
    covered = emulator.covers(np.stack([labels[label] for label in config.label_names], axis=1))
    own = {label: values[covered] for label, values in labels.items()}
    wavelength, flux = emulator.synthesize(normalized=True, **own)
    return on_pixels(np.asarray(wavelength), np.asarray(flux), grid.wavelength), covered


def on_pixels(wavelength: Array, flux: Array, grid: Array) -> Array:
    """Means of spectra (stars, pixels) over the pixels of another grid; the same where it is the same."""
    if len(wavelength) == len(grid) and np.allclose(wavelength, grid, rtol=1e-6):
        return flux
    total = np.concatenate([np.zeros((len(flux), 1)), np.cumsum(flux * 2.0 * half_widths(wavelength), axis=1)], axis=1)
    edges = np.append(wavelength - half_widths(wavelength), wavelength[-1] + half_widths(wavelength)[-1])
    half = half_widths(grid)
    low, high = grid - half, grid + half
    means = [(np.interp(high, edges, row) - np.interp(low, edges, row)) / (high - low) for row in total]
    outside = (low < edges[0]) | (high > edges[-1])
    return np.where(outside, np.nan, np.array(means))


def table_of(name: str, found: Array, grid: Grid) -> list[str]:
    """Lines: median rms in percent of the continuum, by range and temperature."""
    teff = grid.labels[:, grid.label_names.index("teff")]
    lines = []
    for low, high in [*pairwise(RANGES), (RANGES[0], RANGES[-1])]:
        inside = (grid.wavelength > low) & (grid.wavelength < high) & np.isfinite(found).all(axis=0)
        rms = 100.0 * np.sqrt(np.mean((found[:, inside] - grid.flux[:, inside]) ** 2, axis=1))
        cells = []
        for cool, hot in [*pairwise(TEFF), (4_500.0, 9_000.0)]:
            own = (teff > cool) & (teff <= hot)
            cells.append(f"{np.median(rms[own]):.2f} ({own.sum()})" if own.any() else "")
        lines.append(f"| {name} | {low:.0f}-{high:.0f} | " + " | ".join(cells) + " |")
    return lines


def report(name: str, grid: Grid) -> str:
    step = np.median(np.diff(grid.wavelength))
    heads = [f"{cool:.0f}-{hot:.0f} K" for cool, hot in [*pairwise(TEFF), (4_500.0, 9_000.0)]]
    lines = [
        f"Median rms of emulated against synthesised flux over the continuum, percent, in pixels of {step:.2g} "
        "Angstrom, and the number of stars.",
        "",
        "| emulator | Angstrom | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 2) + "|",
    ]
    found, covered = emulated(name, grid)
    return "\n".join([*lines, *table_of(name, found, grid[covered]), ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate_emulators.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("grid", type=Path, help="a folder of shards or an .npz file")
    parser.add_argument("--emulator", default="emulator-optical", help="a bundled one, or a folder")
    parser.add_argument("--held-out", type=int, default=80, metavar="N", help="the last stars of the grid")
    add_output(parser)
    arguments = parser.parse_args(argv)
    grid = read_grid(arguments.grid)
    if not 0 < arguments.held_out <= len(grid):
        parser.error(f"--held-out: expected 1 to {len(grid)}, got {arguments.held_out}")
    return print_and_write(
        report(arguments.emulator, grid[slice(len(grid) - arguments.held_out, None)]), arguments.output
    )


if __name__ == "__main__":
    sys.exit(main())
