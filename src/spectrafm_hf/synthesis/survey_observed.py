# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""How observed stars of MILES differ from synthetic ones of their labels, in coefficients of a rung and in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter

from ..data.mixture import Columns
from ..models.basis_spectrafm import SpectrumBasis
from ..models.rungs_spectrafm import Rung, degraded
from .bases import survey_grid
from .survey_grid import SurveyGrid, as_seen, in_pixels, likely_labels
from .survey_stars import Mismatch


Array = NDArray[Any]
LABELS = ("teff", "logg", "fe_h")
#: Of MILES: likely errors of its labels, FWHM in Angstrom, and likely signal-to-noise ratio, as it states no errors.
LABEL_ERRORS, FWHM, SNR = (80.0, 0.15, 0.08), 2.5, 100.0
LEVEL_PIXELS = 101  # that the level of the flux is taken from
HOTTEST = 8_000.0  # K: the synthetic stars go no further
#: Training label of hotter stars and of spectra without stellar lines: outside the range, so that they are flagged.
#: Their errors: relative ones of hot stars, and those of others.
BEYOND, HOT_ERROR, BEYOND_ERROR = 12_000.0, 0.03, 500.0
LOWEST_OBSERVED = 1500.0  # resolving power of observed spectra at their ends
MEASURED_AT = 1_800.0  # resolving power at which pixels are compared


def observed_stars(folder: Path, split: str, hottest: float = HOTTEST) -> Columns:
    """Columns of the stars of MILES whose labels are known; hot ones count as `BEYOND` at most."""
    rows = datasets.load_dataset(str(folder), split=split).with_format("numpy")[:]
    kept = np.isfinite([rows[name] for name in LABELS]).all(axis=0) & (rows["teff"] < hottest)
    wavelength = np.asarray(rows["wavelength"][0], float)
    columns = {name: np.stack(list(rows[name][kept])) for name in ("flux", "mask", *LABELS)}
    columns["mask"] |= ~np.isfinite(columns["flux"])
    flux = np.where(columns["mask"], 0.0, columns["flux"])
    level = median_filter(np.abs(flux), (1, LEVEL_PIXELS))
    error = np.maximum(level, 0.01 * np.median(level, axis=1, keepdims=True)) / SNR
    columns |= {f"{name}_err": np.full(kept.sum(), e, np.float32) for name, e in zip(LABELS, LABEL_ERRORS, strict=True)}
    columns["teff_err"] = np.where(columns["teff"] > HOTTEST, HOT_ERROR * columns["teff"], columns["teff_err"])
    columns["teff"] = np.minimum(columns["teff"], BEYOND)
    return columns | {
        "flux": flux.astype(np.float32),
        "flux_error": error.astype(np.float32),
        "wavelength": wavelength,
        "resolving_power": wavelength / FWHM,
    }


def tokens_of(basis: SpectrumBasis, rung: Rung, stars: Columns, power: float | None) -> tuple[Array, Array]:
    """Coefficients and reliability of stars in all intervals of a rung, as they are or at a lower resolving power."""
    weight = np.where(stars["mask"], 0.0, stars["flux_error"].astype(float) ** -2.0)
    wavelength, flux, own = (stars[name] for name in ("wavelength", "flux", "resolving_power"))
    if power is not None:
        wavelength, flux, weight = degraded(wavelength, flux, weight, float(np.median(own)), power)
    found = basis.evidence(wavelength, flux, weight, own if power is None else power)
    tokens = [np.zeros((len(weight), rung.n_intervals, basis.n_coefficients), np.float32) for _ in range(2)]
    for table, values in zip(tokens, (found.coefficients, found.reliability), strict=True):
        table[:, found.intervals - rung.first_interval] = values
    return tokens[0], tokens[1]


class Measured:
    """
    Difference between observed stars and the emulator at their labels, as tokens.

    Parameters
    ----------
    basis : SpectrumBasis
    rung : Rung
    grid : SurveyGrid
        That of the rung.
    observed : Columns
        See [`observed_stars`].
    """

    def __init__(self, basis: SpectrumBasis, rung: Rung, grid: SurveyGrid, observed: Columns):
        self.basis, self.rung, self.observed = basis, rung, observed
        self.labels, self.covered = likely_labels(grid, observed)
        seen_so = as_seen(grid, self.labels, observed["wavelength"], observed["resolving_power"])
        error = np.maximum(seen_so, 0.01 * np.median(seen_so, axis=1, keepdims=True)) / SNR
        self.models = observed | {"flux": seen_so, "flux_error": error, "mask": np.zeros(seen_so.shape, bool)}

    def at(self, power: float) -> tuple[Mismatch, Array, Array]:
        """At a resolving power: the difference; coefficients and reliability of the observed stars."""
        lower = power if power < LOWEST_OBSERVED else None
        found, reliability = tokens_of(self.basis, self.rung, self.observed, lower)
        expected, _ = tokens_of(self.basis, self.rung, self.models, lower)
        known = (reliability > 0.02)[self.covered]
        known[..., :2] = False
        difference = np.where(known, found[self.covered] - expected, 0.0)
        return Mismatch(self.labels, difference, known), found, reliability


class LikeObserved:
    """
    How observed stars of MILES differ from synthetic ones: what the emulator's flux over the continuum is short of.

    Parameters
    ----------
    basis : SpectrumBasis
    folder : Path
        Of MILES.
    """

    def __init__(self, basis: SpectrumBasis, folder: Path):
        self.rung = next(rung for rung in basis.rungs if rung.guesses_power)
        measured = Measured(basis, self.rung, survey_grid(), observed_stars(folder, "train"))
        self.mismatch = measured.at(MEASURED_AT)[0]

    def on_own_grid(self, labels: Mapping[str, Array], generator: np.random.Generator) -> Array:
        """(stars, pixels) of the grid of the rung."""
        difference = self.mismatch.mean(labels) + self.mismatch.drawn(len(labels["teff"]), generator)
        return in_pixels(self.rung, difference)

    def added(self, wavelength: Array, labels: Mapping[str, Array], generator: np.random.Generator) -> Array:
        """(stars, pixels) of any other grid."""
        own = np.exp(self.rung.start + self.rung.step * np.arange(len(self.rung.mean)))
        return np.stack([np.interp(wavelength, own, row) for row in self.on_own_grid(labels, generator)])
