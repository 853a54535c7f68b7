# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
r"""Find which of several sets of labels fits an observed optical spectrum best, without the network.

    python scripts/checks/compare_labels.py sdss-dr10-lite-spec-3128-54776-0008.fits --miles miles \
        --labels 5704 4.05 -0.64 --labels 5083 2.92 -1.41

Synthetic spectra of `emulator-optical` with these Teff, log g and [Fe/H] and typical abundances, plus the mean residual
of the training stars of MILES, are compared by chi^2 per pixel in windows, each with a polynomial continuum. Errors are
at least 1 % of the flux, the accuracy of the models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray

from spectrafm_hf import load_checkpoint
from spectrafm_hf.data.readers import read_spectra
from spectrafm_hf.models.basis_spectrafm import degraded
from spectrafm_hf.synthesis.bases import survey_grid
from spectrafm_hf.synthesis.survey_grid import as_seen, in_pixels, likely_labels
from spectrafm_hf.synthesis.survey_observed import LABELS, LikeObserved


Array = NDArray[Any]
POWER, HIGHEST = 1_900.0, 5_000.0  # of a file that states none; higher ones are smoothed to `POWER`
EDGES = np.arange(3_900.0, 6_850.0, 250.0)  # Angstrom, of the windows
DEGREE, LEAST_ERROR, LEAST_PIXELS = 3, 0.01, 30


def models_of(labels: Array, wavelength: Array, power: float, like: LikeObserved) -> Array:
    """Spectra over their continuum (sets of labels, pixels), corrected for the residuals of observed stars."""
    grid = survey_grid()
    known, covered = likely_labels(grid, dict(zip(LABELS, labels.T, strict=True)))
    if not covered.all():
        raise ValueError(f"--labels: expected stars that the emulator covers, got {labels[~covered][0].tolist()}")
    seen = as_seen(grid, known, wavelength, np.full(len(wavelength), power))
    own = np.exp(like.rung.start + like.rung.step * np.arange(len(like.rung.mean)))
    added = in_pixels(like.rung, like.mismatch.mean(known))
    return seen + np.stack([np.interp(wavelength, own, row) for row in added])


def chi2(wavelength: Array, flux: Array, error: Array, model: Array) -> Array:
    """chi^2 per pixel in each window, NaN for windows with too few pixels."""
    found = np.full(len(EDGES) - 1, np.nan)
    for i, (low, high) in enumerate(zip(EDGES[:-1], EDGES[1:], strict=True)):
        own = (wavelength > low) & (wavelength < high)
        if own.sum() < LEAST_PIXELS:
            continue
        sigma = np.hypot(error[own], LEAST_ERROR * np.abs(flux[own]))
        table = legendre.legvander(np.linspace(-1.0, 1.0, own.sum()), DEGREE) * (model[own] / sigma)[:, None]
        factors = np.linalg.lstsq(table, flux[own] / sigma)[0]
        found[i] = np.mean((flux[own] / sigma - table @ factors) ** 2)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_labels.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--miles", type=Path, required=True, metavar="DIR", help="made by `spectrafm data miles`")
    parser.add_argument(
        "--labels", type=float, nargs=3, action="append", required=True, metavar=("TEFF", "LOGG", "FE_H")
    )
    parser.add_argument("--radial-velocity", type=float, metavar="KM/S", help="if the file states none")
    arguments = parser.parse_args(argv)
    reading = {} if arguments.radial_velocity is None else {"radial_velocity": arguments.radial_velocity}
    row = next(iter(read_spectra([arguments.file], **reading)))
    wavelength, flux, error = (np.asarray(row[name], float) for name in ("wavelength", "flux", "flux_error"))
    good = ~np.asarray(row["mask"], bool) & np.isfinite(flux) & (np.isfinite(error) | np.isnan(error).all())
    error = np.where(np.isfinite(error), error, 0.0)
    power = row.get("resolving_power")
    power = float(power) if power is not None and np.isfinite(power) else POWER
    wavelength, flux, error = wavelength[good], flux[good], error[good]
    if power > HIGHEST:
        weight = 1.0 / np.maximum(error, 1e-3 * np.median(flux)) ** 2
        wavelength, (flux,), (weight,) = degraded(wavelength, flux[None], weight[None], power, POWER)
        power, error = POWER, np.where(weight > 0, weight.clip(1e-30) ** -0.5, np.inf)
    basis = load_checkpoint("spectrafm-base")[1].basis
    assert basis is not None
    models = models_of(np.array(arguments.labels), wavelength, power, LikeObserved(basis, arguments.miles))
    print("| Teff, log g, [Fe/H] | mean chi^2 per pixel | in windows of 250 Angstrom from 3,900 on |")
    print("|---|---|---|")
    for (teff, logg, fe_h), model in zip(arguments.labels, models, strict=True):
        found = chi2(wavelength, flux, error, model)
        parts = " ".join("-" if np.isnan(part) else f"{part:.2f}" for part in found)
        print(f"| {teff:.0f}; {logg:.2f}; {fe_h:.2f} | {np.nanmean(found):.2f} | {parts} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
