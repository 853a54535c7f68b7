# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Synthetic stars at high resolution in a narrow window, pixel by pixel, as instruments at random would see them.

Models and stars differ: here each line of each star has an error of its own, so that no single line is trusted. The
cores of the triplet of Ca II, which models without a chromosphere do not have right, are trusted least.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..data.mixture import Columns
from ..models.gate_spectrafm import SPEED_OF_LIGHT
from ..models.rungs_spectrafm import FWHM, Rung, half_widths, means_over_pixels
from .bad_pixels import add_noise, add_wild_pixels, draw_snr, missing_pixels, smooth_factors
from .instruments import Instrument
from .survey_grid import SurveyGrid


Array = NDArray[Any]
#: Errors of the strengths of lines, relative, and the width in pixels of the grid that they are alike in: single lines,
#: and neighbouring ones. Student's t, as some lines are wrong altogether: residuals of two observed dwarfs at their
#: published labels are 1.5 % of the continuum (1.4826 MAD), 2.4 % rms.
#: Below `COOL` K, where the emulator is worse, they grow by their size for each `COOLER` K.
COOL, COOLER, MOST = 4_500.0, 750.0, 2.0
STRENGTHS, DEGREES_OF_FREEDOM = ((0.2, 3), (0.08, 30)), 4
#: Cores of the triplet of Ca II (Angstrom, vacuum), how wide they are, the relative error of their depth, and how
#: often and how much they are filled in by chromospheres.
CORES, CORE_WIDTH, CORE_ERROR, ACTIVE, FILLED = (8_500.36, 8_544.44, 8_664.52), 1.2, 0.2, 0.15, 0.6
POWER_ERROR, SCATTERED = 0.08, 0.02  # of a stated resolving power; of the continuum, light that is added
VELOCITY, MOVED, FAR = 1.5, 0.15, 6.0  # km/s; share of the stars that are further from rest, and how far
ROTATION, ROTATING, SLOW = 60.0, 0.3, 5.0  # km/s at most, of a share of the stars, and of the others
SAMPLING = (2.0, 7.5)  # pixels in a FWHM
NARROWEST = 0.012  # ln of the last over the first wavelength of a grid
ROUNDING = 1e-7
N_GRIDS, OF_GAIA = 24, 0.5  # grids at random, and the share of the batches that have that of Gaia RVS


class WindowStars:
    """
    Spectra of stars on grids, at resolving powers and with faults that are drawn.

    Parameters
    ----------
    rung : Rung
    grid : SurveyGrid
        That of the rung.
    flux : array of shape (stars, pixels)
        On this grid over the continuum, without a line spread function.
    known : Columns
        Labels of the stars and their errors.
    seed : int
        Of the grids.
    """

    def __init__(self, rung: Rung, grid: SurveyGrid, flux: Array, known: Columns, seed: int = 0):
        self.rung, self.grid, self.known = rung, grid, known
        self.size = 1.0 + np.clip((COOL - known["teff"]) / COOLER, 0.0, MOST).astype(np.float32)[:, None]
        self.log_flux = np.log(np.maximum(flux, 1e-3)).astype(np.float16)
        low, high = np.array(rung.range) * (1.0003, 0.9997)
        position = np.log(grid.wavelength)
        self.cores = np.zeros(len(position), np.float32)
        for core in CORES:
            self.cores += np.exp(-0.5 * ((grid.wavelength - core) / CORE_WIDTH) ** 2).astype(np.float32)
        generator = np.random.default_rng(seed)
        whole = np.exp(np.arange(np.log(low), np.log(high), 1.0 / rung.resolving_power / 3.0))
        self.grids = [(whole, rung.resolving_power), (Instrument.load("gaia-rvs").wavelength, rung.resolving_power)]
        self.grids += [self._random_grid(low, high, generator) for _ in range(N_GRIDS)]
        self._resampling: dict[int, csr_array] = {}

    def _random_grid(self, low: float, high: float, generator: np.random.Generator) -> tuple[Array, float]:
        """Wavelengths, evenly spaced or in their logarithm, and a resolving power."""
        limits = np.log((self.rung.lowest_resolving_power, self.rung.resolving_power))
        power = float(np.exp(generator.uniform(*limits)))
        width = np.exp(generator.uniform(np.log(NARROWEST), np.log(np.log(high / low))))
        first = np.exp(generator.uniform(np.log(low), np.log(high) - width))
        step = 1.0 / power / generator.uniform(*SAMPLING)
        if generator.random() < 0.5:
            return first * np.exp(np.arange(0.0, width, step)), power
        return np.arange(first, first * np.exp(width), first * step), power

    def _sampled(self, number: int, flux: Array) -> Array:
        """Spectra (stars, pixels) on a grid."""
        if number not in self._resampling:
            wavelength = self.grids[number][0]
            half = half_widths(wavelength)
            low, high = ((np.log(wavelength + side * half) - self.grid.start) / self.grid.step for side in (-1, 1))
            table = means_over_pixels(np.eye(self.grid.size), 0.0, low, high).T.astype(np.float32)
            table[np.abs(table) < ROUNDING] = 0.0
            self._resampling[number] = csr_array(table)
        return np.ascontiguousarray((self._resampling[number] @ flux.T).T)

    def strengths(self, stars: Array, generator: np.random.Generator) -> Array:
        """(stars, pixels): factors of ln of the flux over the continuum."""
        n, size = len(stars), self.grid.size
        found = np.ones((n, size), np.float32)
        for error, width in STRENGTHS:
            amount = self.size[stars] * error * np.exp(0.3 * generator.standard_normal((n, 1), dtype=np.float32))
            drawn = amount * generator.standard_t(DEGREES_OF_FREEDOM, (n, -(-size // width) + 1)).astype(np.float32)
            start = int(generator.integers(width))
            found += np.repeat(drawn, width, axis=1)[:, start : start + size]
        core = CORE_ERROR * generator.standard_normal((n, 1))
        active = generator.random((n, 1)) < ACTIVE
        core -= np.where(active, generator.uniform(0.0, FILLED, (n, 1)), 0.0)
        return np.clip(found + core.astype(np.float32) * self.cores, 0.1, 2.5)

    def seen(self, stars: Array, power: float, generator: np.random.Generator) -> Array:
        """Spectra (stars, pixels) on the grid of the rung, moved, with widths and strengths of their lines drawn."""
        n = len(stars)
        flux = np.exp(self.log_flux[stars].astype(np.float32) * self.strengths(stars, generator))
        velocity = generator.standard_normal(n) * np.where(generator.random(n) < MOVED, FAR, VELOCITY)
        width = 1.0 / FWHM / power / (1.0 + POWER_ERROR * np.clip(generator.standard_normal(n), -2.0, 2.0))
        rotation = np.where(generator.random(n) < ROTATING, ROTATION * generator.random(n), SLOW) / SPEED_OF_LIGHT
        sigma = np.sqrt(width**2 + 0.2 * rotation**2) / self.grid.step
        wave = 2.0 * np.pi * scipy.fft.rfftfreq(self.grid.size)
        moved = velocity / SPEED_OF_LIGHT / self.grid.step
        transfer = np.exp(-0.5 * np.outer(sigma, wave) ** 2 - 1j * np.outer(moved, wave)).astype(np.complex64)
        flux = scipy.fft.irfft(scipy.fft.rfft(flux, axis=1) * transfer, self.grid.size, axis=1)
        light = SCATTERED * generator.standard_normal((n, 1)).astype(np.float32)
        return (flux + light) / (1.0 + light)

    def draw(
        self, n: int, generator: np.random.Generator, snr: float | None = None, number: int | None = None
    ) -> Columns:
        """
        Columns of `n` stars; on request with a signal-to-noise ratio that is the same for all, and on a grid of a
        number (0: all of the range; 1: that of Gaia RVS) without missing and wild pixels.
        """
        stars = generator.integers(len(self.log_flux), size=n)
        clean = number is not None
        if number is None:
            number = 1 if generator.random() < OF_GAIA else int(generator.integers(len(self.grids)))
        wavelength, power = self.grids[number]
        flux = self._sampled(number, self.seen(stars, power, generator))
        flux *= smooth_factors(wavelength, np.exp(generator.uniform(np.log(1e-3), np.log(1e-2), n)), 10, generator)
        flux *= smooth_factors(wavelength, np.full(n, 0.03), 2, generator)
        flux, error = add_noise(flux, draw_snr(n, generator) if snr is None else np.full(n, snr, np.float32), generator)
        mask = np.zeros(flux.shape, bool)
        if not clean:
            add_wild_pixels(flux, error, generator)
            mask = missing_pixels(wavelength, n, generator)
        columns: Columns = {"wavelength": wavelength, "flux": flux, "flux_error": error, "mask": mask}
        known = {name: values[stars] for name, values in self.known.items()}
        return columns | known | {"resolving_power": power}  # type: ignore[return-value]
