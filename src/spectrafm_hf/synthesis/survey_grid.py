# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Synthetic stars of the optical on the grid of a rung of the basis, and the coefficients of its intervals.

The emulator gives spectra without a line spread function. Here they are brought to the grid of a rung, and to the
coefficients of its intervals, once for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ..data.mixture import Columns
from ..models import SpectrumEmulator, default_vmicro
from ..models.rungs_spectrafm import FWHM, PIXELS, Rung, half_widths, means_over_pixels
from .labels import draw_optical_labels
from .synthetic import ALPHA_ELEMENTS, load_emulator


Array = NDArray[Any]
AT_ONCE = 250  # spectra in memory
BLUR_LEVELS = 8  # widths of a line spread function that changes along a spectrum, between which flux is interpolated


class SurveyGrid:
    """
    The grid of a rung over the optical: several pixels of the emulator in one, at a resolving power.

    Parameters
    ----------
    emulator : str or SpectrumEmulator
    pixels : int
        Of the emulator in one of this grid.
    resolving_power : float
        Wavelength / FWHM of a Gaussian line spread function; infinite for none.
    wavelength_range : (float, float), optional
        Lowest and highest wavelength (Angstrom, vacuum); by default all of the emulator.
    """

    def __init__(
        self,
        emulator: str | SpectrumEmulator,
        pixels: int,
        resolving_power: float,
        wavelength_range: tuple[float, float] | None = None,
    ):
        self.emulator = load_emulator(emulator).eval()
        self.pixels, self.resolving_power, self.wavelength_range = pixels, resolving_power, wavelength_range
        native = self.emulator.wavelength[self.emulator.pixels(wavelength_range)].double().numpy()
        self.native_step = float(np.log(native[-1] / native[0]) / (len(native) - 1))
        self.size = len(native) // pixels
        self.step = pixels * self.native_step
        self.start = float(np.log(native[0])) + 0.5 * (pixels - 1) * self.native_step

    @property
    def wavelength(self) -> Array:
        return np.exp(self.start + self.step * np.arange(self.size))

    def labels(self, n: int, generator: np.random.Generator) -> dict[str, Array]:
        """Labels of stars that the emulator covers, float64, (n,) each."""
        names = list(self.emulator.config.label_names)
        return draw_optical_labels(
            n, generator, lambda stars: self.emulator.covers(np.stack([stars[name] for name in names], axis=1))
        )

    def spectra(self, labels: dict[str, Array]) -> Array:
        """Spectra over their continuum, (stars, pixels), float32."""
        return np.concatenate(list(self.in_parts(labels)))

    def in_parts(self, labels: dict[str, Array]) -> Iterator[Array]:
        """[`spectra`], some stars at a time."""
        table = np.stack([labels[name] for name in self.emulator.config.label_names], axis=1)
        for start in range(0, len(table), AT_ONCE):
            with torch.no_grad():
                chosen = torch.from_numpy(table[start : start + AT_ONCE])
                flux = self.emulator(chosen, self.wavelength_range)[0].numpy()
            if np.isfinite(self.resolving_power):
                sigma = 1.0 / self.resolving_power / FWHM / self.native_step
                flux = gaussian_filter1d(flux, sigma, axis=1, mode="nearest")
            yield flux[:, : self.size * self.pixels].reshape(len(flux), self.size, self.pixels).mean(axis=2)

    @staticmethod
    def known(labels: dict[str, Array]) -> Columns:
        """Columns of labels and their errors, which are 0."""
        alpha = np.mean([labels[name] for name in ALPHA_ELEMENTS], axis=0)
        found = {name: np.asarray(values, np.float32) for name, values in {**labels, "alpha_m": alpha}.items()}
        return found | {f"{name}_err": np.zeros(len(alpha), np.float32) for name in found}


def likely_labels(grid: SurveyGrid, stars: Mapping[str, Array]) -> tuple[dict[str, Array], NDArray[np.bool_]]:
    """
    All labels of the emulator for stars of which only `teff`, `logg` and `fe_h` are known, as stars of the disc and the
    halo usually have them; and which of the stars (stars,) the emulator covers: the others are left out.
    """
    config = grid.emulator.config
    known = {name: np.asarray(stars[name], float) for name in ("teff", "logg", "fe_h")}
    labels = {name: np.zeros(len(known["teff"])) for name in config.label_names} | known
    for name in ALPHA_ELEMENTS:
        labels[name] = np.clip(-0.4 * known["fe_h"], 0.0, 0.4)
    labels["n_fe"] = np.where(known["logg"] < 3.5, 0.185, 0.0)
    labels["li_fe"] = -1.5 - known["fe_h"]
    labels["vmicro"] = default_vmicro(known["teff"], known["logg"])
    for name, low, high in zip(config.label_names, config.label_minimum, config.label_maximum, strict=True):
        if name not in known:
            labels[name] = labels[name].clip(low + 1e-6, high - 1e-6)
    covered = grid.emulator.covers(np.stack([labels[name] for name in config.label_names], axis=1))
    return {name: values[covered] for name, values in labels.items()}, covered


#: Spectra as they are, and their first and second derivatives by ln wavelength in units that make them about one.
DERIVATIVE_UNITS = (1.0, 1e4, 1e8)
_FIRST = np.array([-1.0, 9.0, -45.0, 0.0, 45.0, -9.0, 1.0]) / 60.0
BLURS = (0.75, 1.3)  # of the variance of the line spread function, between which its derivative is taken
FIT_ERROR = 2e-3  # of the flux of a pixel, of `PIXELS` in a FWHM, that coefficients of synthetic stars are fitted with


def fit_matrices(rung: Rung, wavelength: Array, resolving_power: float) -> list[tuple[Array, Array]]:
    """
    For each interval the pixels of a spectrum on the grid of the rung, and the matrix that makes coefficients of a
    spectrum of a lower resolving power, by least squares with very little noise. Level, slope and directions,
    in units of the prior; not over the level.
    """
    mean, directions = rung.smoothed(resolving_power)
    position = np.log(wavelength)
    variance = FIT_ERROR**2 / (resolving_power * PIXELS * rung.step)
    found = []
    for interval in range(rung.n_intervals):
        low = rung.edge + interval * rung.width
        begin = int(rung.offset[interval])
        window = np.arange(begin, min(begin + directions.shape[-1], len(position)))
        pixels = window[(position[window] >= low) & (position[window] < low + rung.width)]
        x = 2.0 * (position[pixels] - low) / rung.width - 1.0
        unit = np.concatenate([[1.0, rung.slope_prior], rung.prior[interval]])
        trend = np.stack([mean[pixels], mean[pixels] * x])
        rows = np.concatenate([trend, directions[interval][:, pixels - begin]]) * unit[:, None]
        gram = rows @ rows.T
        gram[np.diag_indices(len(gram))] += np.append(1e-9, np.full(len(gram) - 1, variance))
        found.append((pixels, np.linalg.solve(gram, rows) if len(pixels) > 3 else np.zeros_like(rows)))
    return found


def coefficients_of(grid: SurveyGrid, rung: Rung, labels: dict[str, Array], resolving_power: float) -> Array:
    """
    Level, slope and directions of stars in each interval, before anything is divided by the level, and how they change
    with a shift and with a blur, at a resolving power: (stars, 3, intervals, 2 + directions), in half precision.
    """
    return coefficients_of_spectra(grid.in_parts(labels), grid.wavelength, rung, resolving_power)


def coefficients_of_spectra(spectra: Iterable[Array], wavelength: Array, rung: Rung, resolving_power: float) -> Array:
    """[`coefficients_of`] spectra (stars, pixels), in parts, at the wavelengths and resolving power of the rung."""
    matrices = fit_matrices(rung, wavelength, resolving_power)
    own, wanted = (1.0 / power / FWHM for power in (rung.resolving_power, resolving_power))
    parts = []
    for flux in spectra:
        seen, less, more = (
            gaussian_filter1d(flux, np.sqrt(factor * wanted**2 - own**2) / rung.step, axis=1, mode="nearest")
            for factor in (1.0, *BLURS)
        )
        blurred = (more - less) / (0.5 * wanted**2 * (BLURS[1] - BLURS[0]) * DERIVATIVE_UNITS[2])
        wide = np.pad(seen, ((0, 0), (3, 3)), mode="edge")
        moved = sum(weight * wide[:, i : i + seen.shape[1]] for i, weight in enumerate(_FIRST) if weight)
        moved = moved / (rung.step * DERIVATIVE_UNITS[1])
        found = np.zeros((len(flux), 3, rung.n_intervals, 2 + rung.directions.shape[1]), np.float16)
        for order, values in enumerate((seen, moved, blurred)):
            for interval, (pixels, matrix) in enumerate(matrices):
                found[:, order, interval] = values[:, pixels] @ matrix.T
        parts.append(found)
    return np.concatenate(parts)


def as_seen(grid: SurveyGrid, labels: dict[str, Array], wavelength: Array, resolving_power: Array) -> Array:
    """Spectra over their continuum, (stars, pixels), on another grid, with a resolving power of each pixel."""
    half = half_widths(wavelength)
    low, high = ((np.log(wavelength + side * half) - grid.start) / grid.step for side in (-1, 1))
    own = np.interp(grid.wavelength, wavelength, resolving_power)
    sigma = np.sqrt(np.maximum(own**-2.0 - grid.resolving_power**-2.0, 0.0)) / FWHM / grid.step
    levels = np.linspace(max(sigma.min(), 0.05), sigma.max() + 0.1, BLUR_LEVELS)
    position = np.interp(sigma, levels, np.arange(BLUR_LEVELS))
    parts = []
    for flux in grid.in_parts(labels):
        seen = np.zeros_like(flux)
        for number, level in enumerate(levels):
            share = np.clip(1.0 - np.abs(position - number), 0.0, 1.0)
            seen += share.astype(np.float32) * gaussian_filter1d(flux, level, axis=1, mode="nearest")
        parts.append(means_over_pixels(seen.astype(float), 0.0, low, high).astype(np.float32))
    return np.concatenate(parts)


def in_pixels(rung: Rung, coefficients: Array) -> Array:
    """
    Contribution of coefficients over the level (stars, intervals, 2 + directions) to the flux over the continuum, on
    the grid of the rung (stars, pixels). Level and slope are not used.
    """
    position = rung.start + rung.step * np.arange(len(rung.mean))
    found = np.zeros((len(coefficients), len(position)))
    for interval in range(rung.n_intervals):
        low, begin = rung.edge + interval * rung.width, int(rung.offset[interval])
        inside = np.flatnonzero((position >= low) & (position < low + rung.width))
        inside = inside[inside < begin + rung.directions.shape[-1]]
        rows = rung.directions[interval][:, inside - begin] * rung.prior[interval][:, None]
        found[:, inside] = coefficients[:, interval, 2:] @ rows
    return found
