# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What instruments do to spectra: noise, missing and wild pixels, wrong errors and continua."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray


Array = NDArray[Any]


#: Of stars: pixels masked at random, one detector or one window alone, a gap, lines of the sky, nothing missing.
MISSING = {"pixels": 0.2, "part": 0.2, "gap": 0.15, "lines": 0.1}


WILD = 0.15  # of stars have wild pixels


WRONG_ERRORS = 0.3  # of stars have errors that are wrong by a factor


ERROR_SPREAD = 0.15  # of ln of that factor


SNR = (10.0, 500.0)


def missing_pixels(wavelength: Array, n_stars: int, generator: np.random.Generator) -> Array:
    """(stars, pixels), True where a pixel is missing: see `MISSING`."""
    n_pixels = len(wavelength)
    mask = np.zeros((n_stars, n_pixels), bool)
    kind = generator.random(n_stars)
    edges = np.cumsum(list(MISSING.values()))
    pixels, part, gap, lines = (
        np.flatnonzero((kind >= low) & (kind < high)) for low, high in itertools.pairwise([0.0, *edges])
    )
    share = 0.4 * generator.random((len(pixels), 1)) ** 2
    mask[pixels] = generator.random((len(pixels), n_pixels), dtype=np.float32) < share
    position = np.log(wavelength)
    low, high = position[0], position[-1]
    for star in part:
        width = (high - low) * generator.uniform(0.15, 0.8)
        first = generator.uniform(low, high - width)
        mask[star] = (position < first) | (position > first + width)
    for star in gap:
        width = (high - low) * generator.uniform(0.01, 0.3)
        first = generator.uniform(low - width / 2, high - width / 2)
        mask[star] = (position > first) & (position < first + width)
    for star in lines:
        for first in generator.integers(n_pixels, size=generator.poisson(0.01 * n_pixels) + 1):
            mask[star, first : first + generator.integers(1, 12)] = True
    # At least 5 % of the pixels stay.
    mask[mask.mean(axis=1) > 0.95] = False
    return mask


def draw_snr(n: int, generator: np.random.Generator) -> Array:
    """Signal-to-noise ratios (stars,), even in their logarithm; float32."""
    low, high = np.log(SNR)
    return np.exp(generator.uniform(float(low), float(high), n)).astype(np.float32)


def add_noise(flux: Array, snr: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Noisy flux and its errors, (stars, pixels) each: photon noise and background in random shares; float32."""
    level = np.median(np.abs(flux), axis=1, keepdims=True)
    relative = np.maximum(flux / level, 0.02)
    background = generator.random((len(flux), 1)).astype(np.float32)
    error = np.sqrt(background + (1.0 - background) * relative).astype(np.float32) * (level / snr[:, None])
    noise = generator.standard_normal(flux.shape, dtype=np.float32)
    return (flux + error * noise).astype(np.float32), error.astype(np.float32)


def add_wild_pixels(flux: Array, error: Array, generator: np.random.Generator) -> None:
    """Wild pixels and wrong errors, in place, in some of the stars."""
    n_stars, n_pixels = flux.shape
    for star in np.flatnonzero(generator.random(n_stars) < WILD):
        n_wild = 1 + generator.poisson(0.002 * n_pixels)
        where = generator.integers(n_pixels, size=n_wild)
        flux[star, where] += error[star, where] * generator.normal(0.0, 10.0 ** generator.uniform(0.8, 2.5), n_wild)
    wrong = np.flatnonzero(generator.random(n_stars) < WRONG_ERRORS)
    error[wrong] *= np.exp(ERROR_SPREAD * generator.standard_normal((len(wrong), 1))).astype(np.float32)


def smooth_factors(wavelength: Array, amplitude: Array, degree: int, generator: np.random.Generator) -> Array:
    """(stars, pixels): exponentials of polynomials in ln wavelength whose factors have these standard deviations."""
    position = np.log(wavelength)
    x = np.interp(position, position[[0, -1]], [-1.0, 1.0])
    drawn = generator.standard_normal((len(amplitude), degree)) * amplitude[:, None]
    return np.exp(drawn @ legendre.legvander(x, degree)[:, 1:].T).astype(np.float32)
