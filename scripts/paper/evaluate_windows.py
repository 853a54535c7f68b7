# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
r"""Labels of observed stars in the narrow windows of Gaia RVS and GALAH, against what is published of them.

    python scripts/paper/evaluate_windows.py --files FOLDER [FOLDER ...] --output windows.md

Spectra of Gaia RVS as the archive has them, by the names of their files, and echelle spectra of the stars of
`observed_samples.py`, cut to the windows, brought down to the resolving power of each survey and given errors of 1 %.
The spectra of Gaia RVS are in https://github.com/isabelangelo/gaiaspec (folder `data`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluate_observed import answers
from observed_samples import Published, published_files
from report_files import add_output, print_and_write

from spectrafm_hf import load_checkpoint
from spectrafm_hf.models.rungs_spectrafm import degraded, guessed_power
from spectrafm_hf.synthesis.survey_spectra import RANGES, SURVEYS, within


#: Beside those of echelle spectra: stars of Gaia RVS, Teff, log g and [Fe/H].
OF_RVS = (
    Published("Kepler-93", "Kepler-93", (5669.0, 4.47, -0.18), "Ballard et al. 2014, ApJ 790, 12", {}),
    Published("Kepler-409", "Kepler-409", (5460.0, 4.50, 0.08), "Marcy et al. 2014, ApJS 210, 20", {}),
    Published("KOI-001", "TrES-2", (5850.0, 4.43, -0.15), "Sozzetti et al. 2007, ApJ 664, 1190", {}),
)
WINDOWS = {"Gaia RVS": (RANGES["rvs"], SURVEYS["gaia-rvs"]), "GALAH": (RANGES["galah"], SURVEYS["galah"])}
MARGIN = 20.0  # Angstrom beyond a window, for its smoothing
LEAST_POWER, LONGEST, LEAST_PIXELS = 15_000.0, 14_000.0, 500
SNR, FAINTEST = 100.0, 0.05  # of the median


def cut(row: dict[str, Any], ranges: Any, power: float) -> dict[str, Any] | None:
    """An echelle spectrum as a survey would see it; None where it has not its wavelengths or its resolving power."""
    wavelength, flux = np.asarray(row["wavelength"], float), np.asarray(row["flux"], float)
    good = np.isfinite(wavelength) & np.isfinite(flux) & ~np.asarray(row["mask"], bool)
    own = float(row.get("resolving_power") or np.nan)
    own = guessed_power(wavelength[good]) if np.isnan(own) else own
    near = within(wavelength, [(low - MARGIN, high + MARGIN) for low, high in ranges])
    if own < LEAST_POWER or wavelength[good].max() > LONGEST or near.sum() < LEAST_PIXELS:
        return None
    power = min(power, 0.95 * own)
    weight = good[near].astype(float)[None]
    grid, (seen,), (counts,) = degraded(wavelength[near], np.where(good, flux, 0.0)[None, near], weight, own, power)
    inside = within(grid, ranges) & (counts > 0)
    if not inside.any():
        return None
    grid, seen = grid[inside], seen[inside]
    error = np.maximum(seen, FAINTEST * np.median(seen)) / SNR
    columns = {"wavelength": grid, "flux": seen.astype(np.float32), "flux_error": error.astype(np.float32)}
    return columns | {"object_id": row["object_id"], "mask": ~(seen > 0), "resolving_power": power}


def samples(folders: Sequence[Path]) -> Iterator[tuple[str, Published, dict[str, Any]]]:
    """Windows, stars and rows."""
    for known, row in zip(*published_files(folders, OF_RVS), strict=True):
        yield "Gaia RVS, observed", known, row
    for known, row in zip(*published_files(folders), strict=True):
        for name, (ranges, power) in WINDOWS.items():
            if (seen := cut(row, ranges, power)) is not None:
                yield f"{name}, cut from {row.get('survey') or Path(str(row['file'])).stem}", known, seen


def report(model_name: str, folders: Sequence[Path]) -> str:
    model, tokenizer = load_checkpoint(model_name)
    lines = [
        f"Answers of {model_name} in narrow windows; z: distance from the published labels in units of the errors.",
        "",
        "| spectrum | star | published (Teff, log g, [Fe/H]) | answered | z | flags |",
        "|---|---|---|---|---|---|",
    ]
    for name, known, row in samples(folders):
        (found,), (errors,), (flags,) = answers(model, tokenizer, [row])
        predicted = "; ".join(f"{v:.{d}f} ± {e:.{d}f}" for v, e, d in zip(found, errors, (0, 2, 2), strict=True))
        z = "; ".join(f"{x:+.1f}" for x in (found - np.array(known.labels)) / errors)
        stated = "{:.0f}; {:.2f}; {:.2f}".format(*known.labels)
        lines.append(f"| {name} | {known.star} | {stated} | {predicted} | {z} | {flags} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate_windows.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="spectrafm-base", help="a bundled checkpoint, or a folder")
    parser.add_argument("--files", type=Path, nargs="+", required=True, metavar="DIR", help="files of the stars")
    add_output(parser)
    arguments = parser.parse_args(argv)
    return print_and_write(report(arguments.model, arguments.files), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
