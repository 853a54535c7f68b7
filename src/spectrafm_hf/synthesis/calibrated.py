# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Synthetic stars with the labels of a catalogue and the residuals of observed stars.

Synthetic spectra differ from observed ones of the same labels in two ways. By a mean, which changes slowly with the
labels: errors of the line lists, the atmospheres and the flux calibration. And from star to star, by much more than the
noise of a pixel, in patterns that all stars share: a network trained without those patterns mistakes them for changes
of labels. Both can be measured on a hundred stars, and hardly differ between metal-rich and metal-poor stars.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.modeling_emulator import default_vmicro
from .instruments import K_BAND, Instrument, extinction_curve
from .labels import usual_abundances
from .synthetic import ALPHA_ELEMENTS, SyntheticStars, without_flux


Array = NDArray[Any]

#: Scatter of the labels of a synthetic star around those of the star in the catalogue (K, dex, mag).
JITTER = {"teff": 60.0, "logg": 0.1, "fe_h": 0.05, "a_v": 0.3}
ELEMENT_JITTER = {"alpha": 0.05, "c_fe": 0.12, "n_fe": 0.12, "al_fe": 0.12, "mn_fe": 0.05, "ni_fe": 0.05}
#: A label this far outside the range of the emulator is moved to its edge; beyond, the star is left out.
TOLERANCE = {"teff": 60.0, "logg": 0.2, "fe_h": 0.25}
FAINT = 0.02  # of the median flux; below, a logarithm would be all noise
#: Angstrom: the TiO band with its head at 7054, and the ranges on either side. Synthetic spectra have it stronger or
#: weaker than real ones, which is the largest difference between the two and no linear function of any label.
TIO_BAND, TIO_BESIDE = (7050.0, 7250.0), ((6950.0, 7030.0), (7400.0, 7500.0))


class CalibratedStars(SyntheticStars):
    """
    Synthetic stars with the labels and the extinction of the stars of a catalogue.

    Parameters
    ----------
    instrument, emulator, seed
        See [`SyntheticStars`].
    catalogue : mapping of str to array of shape (stars,)
        `teff`, `logg` and `fe_h`; `alpha_m`, by default its mean at that [Fe/H]; `ak_targ`, by default no extinction.
        Stars with an unknown one, or outside the emulator's range, are left out. [`extended_catalogue`] makes a large
        one from a small one.
    observed : mapping of str to array, optional
        Columns of observed stars in the project's schema, with the same labels: [`calibrate`] is called with them.
    flatness : float
        Power by which stars of rare [Fe/H] come more often: 0 as in the catalogue, 1 equally often in bins of 0.1 dex.
    inflation : float
        Factor by which residuals are drawn larger than they were measured: other kinds of stars have others.
    by_depth : bool
        Make mean difference and residuals of a pixel as much larger or smaller as what lines absorb there. Where single
        lines are resolved, they are differences of line strengths, and metal-poor stars have smaller ones.
    tilt : float
        Scatter of Legendre polynomials of degree 1 to 3 over the calibrated pixels, in ln flux.
    """

    def __init__(
        self,
        instrument: Any,
        catalogue: Mapping[str, Array],
        observed: Mapping[str, Any] | None = None,
        *,
        flatness: float = 1.0,
        inflation: float = 1.0,
        by_depth: bool = False,
        tilt: float = 0.03,
        emulator: Any = None,
        seed: int = 0,
    ):
        super().__init__(instrument, emulator, seed)
        self.inflation, self.tilt = inflation, tilt
        self.by_depth = by_depth
        self._dusty = "ak_targ" in catalogue
        self.catalogue = _labels(catalogue)
        known = np.asarray(np.isfinite(self.catalogue).all(axis=1))
        self.catalogue = self.catalogue[known]
        self.catalogue = self.catalogue[self._table(self.catalogue)[2]]
        if not len(self.catalogue):
            raise ValueError(f"catalogue: expected stars that the emulator covers, got none of {len(known)}")
        bins = np.floor(self.catalogue[:, CATALOGUE.index("fe_h")] / 0.1).astype(int)
        _, place, count = np.unique(bins, return_inverse=True, return_counts=True)
        weight = np.maximum(count, 20.0)[place] ** -flatness
        self._cumulative = np.cumsum(weight) / weight.sum()
        self.coefficients: Array | None = None
        if observed is not None:
            self.calibrate(observed)

    def _table(self, stars: Array, generator: np.random.Generator | None = None) -> tuple[Array, Array, Array]:
        """
        (stars, catalogue) -> the emulator's labels, with scatter if there is a generator; the same moved into its
        range; and which it covers.
        """
        draw = np.zeros if generator is None else generator.standard_normal
        n = len(stars)
        teff, logg, fe_h, alpha, _ = (stars[:, i] + JITTER.get(name, 0.0) * draw(n) for i, name in enumerate(CATALOGUE))
        labels = {"teff": teff, "logg": logg, "fe_h": fe_h, "vmicro": default_vmicro(teff, logg)}
        labels |= {name: alpha + ELEMENT_JITTER["alpha"] * draw(n) for name in ALPHA_ELEMENTS}
        labels |= {name: width * draw(n) for name, width in ELEMENT_JITTER.items() if name != "alpha"}
        emulator = self._stars.emulator
        others = [name for name in emulator.config.label_names if name not in labels]
        usual, scatter, _ = usual_abundances(logg, fe_h, alpha, others)
        labels |= {"li_fe": -1.5 - fe_h} | {name: usual[name] + scatter[name] * draw(n) for name in usual}
        low, high = (np.array(limits) for limits in zip(*self._stars.ranges.values(), strict=True))
        table = np.stack([labels[name] for name in emulator.config.label_names], axis=1)
        inside = np.clip(table, low + 1e-4 * (high - low), high - 1e-4 * (high - low))
        moved = dict(zip(emulator.config.label_names, np.abs(inside - table).T, strict=True))
        near = np.all([moved[name] < limit for name, limit in TOLERANCE.items()], axis=0)
        return table.astype(np.float32), inside.astype(np.float32), near & emulator.covers(inside)

    def _features(self, stars: Array, table: Array) -> Array:
        """What the mean difference between observed and synthetic spectra is linear in, (stars, features)."""
        teff, logg, _, _, ak_targ = stars.T
        dust = ak_targ / A_K - 1 if self._dusty else 0 * ak_targ
        wavelength = self._stars.native
        if self.by_depth or not wavelength[0] < TIO_BESIDE[0][0] < TIO_BESIDE[1][1] < wavelength[-1]:
            return np.stack([np.ones(len(stars)), (teff - 4800) / 800, (logg - 2.5) / 1.3, dust], axis=1)
        _, flux = self._synthesize(table)

        def mean(band):
            return flux[:, (wavelength > band[0]) & (wavelength < band[1])].mean(axis=1)

        tio = np.log(mean(TIO_BAND) / (0.5 * (mean(TIO_BESIDE[0]) + mean(TIO_BESIDE[1]))))
        return np.stack([np.ones(len(stars)), (tio - 0.015) / 0.03, dust], axis=1)

    def _synthesize(self, table: Array) -> tuple[Array, Array]:
        return self._stars._synthesize(dict(zip(self._stars.emulator.config.label_names, table.T, strict=True)))

    def calibrate(self, observed: Mapping[str, Any], ridge: float = 3.0):
        """
        Measure how observed spectra differ from synthetic ones of the same labels.

        Parameters
        ----------
        observed : mapping of str to array
            Columns in the project's schema on the grid of the instrument; pixels that are masked in half of the stars
            are not calibrated.
        ridge : float
            In units of stars: with this number of stars a trend with a label is halved.

        Raises
        ------
        ValueError
            If there are fewer than ten stars, or another grid.
        """
        stars = _labels(observed)
        wavelength, flux, mask = (np.asarray(observed[name]) for name in ("wavelength", "flux", "mask"))
        own = self._stars.instrument.wavelength
        if wavelength.shape[1:] != own.shape or not np.allclose(wavelength, own, rtol=1e-6):
            name = self._stars.instrument.name
            raise ValueError(f"wavelength: expected the {own.size} pixels of {name} in each star")
        known = np.isfinite(stars).all(axis=1)
        _, table, covered = self._table(np.nan_to_num(stars))
        good = known & covered
        if good.sum() < 10:
            raise ValueError(f"observed: expected at least ten stars that the emulator covers, got {good.sum()}")
        stars, flux, mask = stars[good], flux[good].astype(float), mask[good]
        pixels = mask.mean(axis=0) < 0.5
        still = dataclasses.replace(self._stars.instrument, tilt=None)
        made = self._synthesize(table[good])
        clean = self._observe(still, *made, stars[:, -1] / A_K, None, np.random.default_rng(0))["clean"]

        def logarithm(values):
            level = np.nanmedian(np.where(mask[:, pixels], np.nan, values[:, pixels]), axis=1, keepdims=True)
            return np.log(np.maximum(values[:, pixels] / level, FAINT))

        difference = np.where(mask[:, pixels], 0.0, logarithm(flux) - logarithm(clean))
        # Level and dust are not part of the residuals: the level is divided out, dust is drawn.
        basis = np.stack([np.ones(pixels.sum()), extinction_curve(own[pixels])], axis=1)
        difference -= difference @ basis @ np.linalg.pinv(basis)
        features = self._features(stars, table[good])
        penalty = np.diag([1e-3, *[ridge] * (features.shape[1] - 1)])
        for _ in range(2):  # the second time without outliers
            coefficients = np.linalg.solve(features.T @ features + penalty, features.T @ difference)
            residual = difference - features @ coefficients
            size = np.abs(residual).mean(axis=1)
            keep = size < 4 * np.median(size)
            features, difference = features[keep], difference[keep]
        residual = difference - features @ coefficients
        self.coefficients = np.zeros((features.shape[1], own.size))
        self.residuals = np.zeros((len(residual), own.size))
        self.coefficients[:, pixels] = coefficients
        self.residuals[:, pixels] = residual
        if self.by_depth:
            self.depth = self._depth(table[good]).mean(axis=0)
        self._stars.instrument = still  # the measured residuals replace its tilt
        position = np.interp(own, own[pixels][[0, -1]], [-1, 1])
        self.smooth = np.where(pixels, np.polynomial.legendre.legvander(position, 3)[:, 1:].T, 0.0)

    def _factors(self, stars: Array, generator: np.random.Generator) -> Array | None:
        """Ratio of observed to synthetic flux, (stars, pixels)."""
        if self.coefficients is None:
            return None
        # A rotation between two residuals is a new one of the same size. A Gaussian with their covariance would not
        # do: the distribution has wide wings.
        n = len(stars)
        one, other = self.residuals[generator.integers(len(self.residuals), size=(2, n))]
        angle = 2 * np.pi * generator.random((n, 1))
        turned = np.cos(angle) * one + np.sin(angle) * other
        table = self._table(stars)[1]
        difference = self._features(stars, table) @ self.coefficients + self.inflation * turned
        if self.by_depth:
            difference *= np.minimum(self._depth(table) / self.depth, 1.5)
        tilt = self.tilt * generator.standard_normal((n, 3)) @ self.smooth
        return np.exp(difference + tilt).astype(np.float32)

    def _depth(self, table: Array) -> Array:
        """Depth of the lines, 1 - flux / continuum, (stars, pixels); at least 0.003."""
        stars = self._stars
        labels = dict(zip(stars.emulator.config.label_names, table.T, strict=True))
        wavelength, flux = stars.emulator.synthesize(normalized=True, wavelength_range=stars.wavelength_range, **labels)
        matrix = stars.instrument.response(wavelength, stars.resolving_power)
        return np.maximum(1 - (matrix @ flux.T).T, 0.003)

    def _observe(self, instrument: Instrument, wavelength: Array, flux: Array, a_v: Array, factors, generator):
        return instrument.apply(wavelength, flux, generator, self._stars.resolving_power, a_v, factors)

    def _draw_labels(self, n: int, generator: np.random.Generator) -> tuple[Array, Array, Array]:
        """Stars of the catalogue, (n, catalogue); the emulator's labels, with scatter, and moved into its range."""
        rows = np.searchsorted(self._cumulative, generator.random(n)).clip(max=len(self.catalogue) - 1)
        stars = self.catalogue[rows]
        labelled, table, covered = self._table(stars, generator)
        if not covered.all():  # scatter has led out of the range
            labelled[~covered], table[~covered], _ = self._table(stars[~covered])
        return stars, labelled, table

    def draw(self, n: int, generator: np.random.Generator) -> dict[str, Array]:
        """Columns of `n` stars. `flux_error` is that of the instrument, without the scatter from star to star."""
        stars, labelled, table = self._draw_labels(n, generator)
        wavelength, flux = self._synthesize(table)
        while (failed := without_flux(flux)).any():
            stars[failed], labelled[failed], table[failed] = self._draw_labels(int(failed.sum()), generator)
            flux[failed] = self._synthesize(table[failed])[1]
        a_v = stars[:, -1] / A_K + self._dusty * JITTER["a_v"] * generator.standard_normal(n)
        factors = self._factors(stars, generator)
        columns = self._observe(self._stars.instrument, wavelength, flux, a_v, factors, generator)
        if factors is not None:
            # The residuals hold the noise of the stars they were measured on.
            columns["flux"] = columns["clean"] + np.float32(0.5) * (columns["flux"] - columns["clean"])
        labels = dict(zip(self._stars.emulator.config.label_names, labelled.T.copy(), strict=True))
        return self._stars.labelled(columns, labels)


def mean_alpha(fe_h: Array) -> Array:
    """Mean `alpha_m` of stars of this [Fe/H]: that of the train split of the Gaia XP stars, in APOGEE DR17."""
    return np.interp(fe_h, (-2.3, -1.5, -0.9, -0.5, -0.1, 0.1), (0.29, 0.22, 0.16, 0.105, 0.025, 0.0))


def extended_catalogue(
    catalogue: Mapping[str, Array], n: int, *, lowest: float = -2.5, scatter: float = 1.0, seed: int = 0
) -> dict[str, Array]:
    """
    `n` stars around those of a small catalogue, of any [Fe/H] from `lowest` to the highest there.

    Teff and log g are those of a star of the catalogue, with a scatter of 250 K and 0.35 dex times `scatter`; giants
    move with [Fe/H] as the giant branch does. `alpha_m` follows its mean trend with [Fe/H].
    """
    generator = np.random.default_rng(seed)
    stars = _labels(catalogue)
    stars = stars[np.isfinite(stars).all(axis=1)]
    teff, logg, old, alpha, ak_targ = stars[generator.integers(len(stars), size=n)].T
    fe_h = generator.uniform(lowest, stars[:, 2].max(), n)
    # The slope of `spectrafm_hf.synthesis.labels`.
    teff = teff + np.where(logg < 3.6, (117 * logg - 495) * (fe_h - old), 0.0)
    columns = {
        "teff": teff + 250 * scatter * generator.standard_normal(n),
        "logg": logg + 0.35 * scatter * generator.standard_normal(n),
        "fe_h": fe_h,
        "alpha_m": alpha + mean_alpha(fe_h) - mean_alpha(old) + 0.06 * scatter * generator.standard_normal(n),
    }
    return columns | ({"ak_targ": ak_targ} if "ak_targ" in catalogue else {})


def _labels(columns: Mapping[str, Array]) -> Array:
    """(stars, labels of CATALOGUE), with the defaults of those that may be left out."""
    teff, logg, fe_h = (np.asarray(columns[name], float) for name in CATALOGUE[:3])
    alpha = np.asarray(columns["alpha_m"], float) if "alpha_m" in columns else mean_alpha(fe_h)
    ak_targ = np.asarray(columns["ak_targ"], float) if "ak_targ" in columns else np.zeros_like(fe_h)
    return np.stack([teff, logg, fe_h, alpha, ak_targ], axis=1)


CATALOGUE = ("teff", "logg", "fe_h", "alpha_m", "ak_targ")
A_K = float(extinction_curve(np.array([K_BAND]))[0])  # A(K) / A(V)
