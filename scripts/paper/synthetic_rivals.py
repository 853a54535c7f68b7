# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Two other methods, trained on the same kind of synthetic stars: for `evaluate_observed.py`.

A multilayer perceptron on pixels and their principal components, and one on the tokens of the model. Both are trained
on synthetic stars on the grid of the observed ones, at their resolving power, with noise and with the residuals of
training stars of MILES, as in the training of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from observed_samples import LABELS
from scipy.ndimage import gaussian_filter1d

from spectrafm_hf.models.basis_spectrafm import SpectrumBasis
from spectrafm_hf.models.rungs_spectrafm import FWHM, half_widths, means_over_pixels
from spectrafm_hf.synthesis.bases import AIR, survey_grid
from spectrafm_hf.synthesis.survey_observed import LikeObserved
from spectrafm_hf.training.baseline import Spectra
from spectrafm_hf.training.baselines import MLPBaseline


Array = NDArray[Any]
SNR = (20.0, 200.0)
SMOOTH = 0.02  # of ln wavelength, over which the level of a spectrum is taken
TEFF = (3_800.0, 7_200.0)
SETTINGS: dict[str, Any] = {"transform": "raw", "epochs": 40, "widths": (256, 256), "dropout": 0.1, "weight_decay": 0.1}


def synthetic_stars(like: LikeObserved, wavelength: Array, power: float, n: int, seed: int) -> tuple[Array, ...]:
    """Flux and error (stars, pixels), and labels (stars, 3), on a grid and at a resolving power."""
    generator, grid = np.random.default_rng(seed), survey_grid()
    labels = grid.labels(2 * n, generator)
    chosen = np.flatnonzero((labels["teff"] > TEFF[0]) & (labels["teff"] < TEFF[1]))[:n]
    labels = {name: values[chosen] for name, values in labels.items()}
    spectra = grid.spectra(labels) + like.on_own_grid(labels, generator)
    sigma = np.sqrt(max(power**-2.0 - grid.resolving_power**-2.0, 0.0)) / FWHM / grid.step
    half = half_widths(wavelength)
    edges = [(np.log(wavelength + side * half) - grid.start) / grid.step for side in (-1, 1)]
    flux = means_over_pixels(gaussian_filter1d(spectra, max(sigma, 0.05), axis=1, mode="nearest"), 0.0, *edges)
    error = np.maximum(flux, 0.02) / np.exp(generator.uniform(np.log(SNR[0]), np.log(SNR[1]), (len(flux), 1)))
    flux = flux + error * generator.standard_normal(flux.shape)
    return flux.astype(np.float32), error.astype(np.float32), np.stack([labels[name] for name in LABELS], axis=1)


def over_level(wavelength: Array, flux: Array, usable: Array) -> Array:
    """Flux (stars, pixels) over its mean in the neighbourhood; 1 in bands of the air and where nothing is usable."""
    usable = usable & ~np.any([(wavelength > low) & (wavelength < high) for low, high in AIR], axis=0)
    width = SMOOTH / np.median(np.diff(np.log(wavelength)))
    level, weight = (
        gaussian_filter1d(values.astype(float), width, axis=1, mode="constant")
        for values in (np.where(usable, flux, 0.0), usable)
    )
    level = np.where(weight > 1e-3, level / np.maximum(weight, 1e-3), 1.0)
    return np.where(usable & (level > 0), flux / np.where(level > 0, level, 1.0), 1.0).clip(-1.0, 3.0)


def tokens(basis: SpectrumBasis, wavelength: Array, flux: Array, weight: Array, power: float) -> Array:
    """(stars, intervals * coefficients)."""
    found = basis.evidence(wavelength, flux, weight, power)
    return found.coefficients.reshape(len(flux), -1)


def answers_of_rivals(
    basis: SpectrumBasis, like: LikeObserved, rows: Sequence[Mapping[str, Any]], n: int, seed: int = 0
) -> dict[str, Array]:
    """By name of the method, labels (stars, 3) of observed stars that share their wavelengths."""
    wavelength, power = np.asarray(rows[0]["wavelength"], float), float(rows[0]["resolving_power"])
    inside = (wavelength > like.rung.range[0] * 1.001) & (wavelength < like.rung.range[1] * 0.999)
    wavelength = wavelength[inside]
    usable = np.stack([~np.asarray(row["mask"])[inside] & np.isfinite(row["flux"])[inside] for row in rows])
    flux = np.stack([np.where(np.isfinite(row["flux"]), row["flux"], 0.0)[inside] for row in rows])
    stated = np.stack([np.asarray(row["flux_error"])[inside] for row in rows])
    error = np.where(stated > 0, stated, np.maximum(np.abs(flux), 0.02 * np.median(flux, axis=1, keepdims=True)) / 100)
    made, made_error, labels = synthetic_stars(like, wavelength, power, n, seed)
    everything = np.ones(made.shape, bool)
    weights = np.where(usable, error, np.inf) ** -2.0, made_error.astype(float) ** -2.0
    inputs = {
        "PCA + MLP on synthetic stars": tuple(
            over_level(wavelength, *part) for part in ((made, everything), (flux, usable))
        ),
        "MLP on tokens of synthetic stars": (
            tokens(basis, wavelength, made, weights[1], power),
            tokens(basis, wavelength, flux, weights[0], power),
        ),
    }
    found = {}
    for name, (train, asked) in inputs.items():
        nothing = np.zeros_like(train)
        stars = Spectra(train, nothing, labels, np.zeros_like(labels), np.zeros((len(labels), 0)))
        network = MLPBaseline(**SETTINGS, seed=seed).fit(stars)
        found[name] = network.raw_predict(asked, np.zeros_like(asked))[0]
    return found
