# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Augmentation of one spectrum: velocity, line spread, binning and noise of another telescope, night or reduction.

A spectrum is (wavelength, flux, flux_error, mask), arrays of shape (pixels,), wavelengths increasing. Detectors are
processed separately. The flux of masked pixels is first interpolated from their neighbours; they remain masked. Errors
are propagated pixel by pixel, without the correlation between neighbours after smoothing. Errors of NaN in all pixels
are unknown and are not changed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve1d

from ..models.gate_spectrafm import SPEED_OF_LIGHT


# A step this many times wider than the usual one separates two detectors.
DETECTOR_GAP = 20.0
Array = NDArray[np.float32]
Spectrum = tuple[Array, Array, Array, NDArray[np.bool_]]


def shift(spectrum: Spectrum, velocity: float) -> Spectrum:
    """
    Shift a spectrum by a radial `velocity` in km/s (positive: receding), on the same wavelengths; pixels from outside a
    detector are masked.

    Cubic interpolation through four pixels: linear interpolation would make spectral lines shallower by up to a tenth
    with pixels as wide as those of APOGEE.
    """
    return _by_detector(lambda part: _shift(part, velocity), spectrum)


def _shift(spectrum: Spectrum, velocity: float) -> Spectrum:
    wavelength, flux, error, mask = spectrum
    if len(wavelength) < 4:
        return wavelength, flux, error, np.ones_like(mask)
    exact = wavelength.astype(np.float64)
    source = exact / (1.0 + velocity / SPEED_OF_LIGHT)
    position = np.interp(source, exact, np.arange(len(exact)))
    first = np.clip(position.astype(int) - 1, 0, len(exact) - 4)
    t = position - first
    weights = [
        -(t - 1) * (t - 2) * (t - 3) / 6,
        t * (t - 2) * (t - 3) / 2,
        -t * (t - 1) * (t - 3) / 2,
        t * (t - 1) * (t - 2) / 6,
    ]
    moved = sum(weight * flux[first + i] for i, weight in enumerate(weights))
    # Errors are interpolated, not reduced by averaging: a shift does not improve the S/N.
    moved_error = np.interp(position, np.arange(len(exact)), error)
    left, right = np.floor(position).astype(int), np.ceil(position).astype(int)
    beyond = (source < exact[0]) | (source > exact[-1])
    return wavelength, moved.astype(flux.dtype), moved_error.astype(error.dtype), mask[left] | mask[right] | beyond


def smooth(spectrum: Spectrum, width: float) -> Spectrum:
    """Convolve a spectrum with a Gaussian of a sigma of `width` pixels."""
    reach = int(np.ceil(4.0 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-6)) ** 2)
    kernel /= kernel.sum()

    def convolve(part: Spectrum) -> Spectrum:
        wavelength, flux, error, mask = part
        smoothed = convolve1d(flux.astype(np.float64), kernel, mode="nearest").astype(flux.dtype)
        variance = convolve1d(error.astype(np.float64) ** 2, kernel**2, mode="nearest")
        return wavelength, smoothed, np.sqrt(variance).astype(error.dtype), mask

    return _by_detector(convolve, spectrum)


def rebin(spectrum: Spectrum, factor: int) -> Spectrum:
    """
    Average good pixels in groups of `factor` neighbours; remaining pixels at the end of a detector are dropped.
    """

    def average(part: Spectrum) -> Spectrum:
        n_pixels = len(part[0]) // factor

        def groups(column: Any) -> Any:
            return column[: n_pixels * factor].reshape(n_pixels, factor)

        wavelength, flux, error, good = (*map(groups, part[:3]), ~groups(part[3]))
        count = np.maximum(good.sum(axis=1), 1)
        mean = np.sum(flux, axis=1, where=good) / count
        mean_error = np.sqrt(np.sum(error.astype(np.float64) ** 2, axis=1, where=good)) / count
        center = wavelength.astype(np.float64).mean(axis=1).astype(wavelength.dtype)
        return center, mean.astype(flux.dtype), mean_error.astype(error.dtype), ~good.any(axis=1)

    return _by_detector(average, spectrum)


def degrade(spectrum: Spectrum, snr: float, noise: Array) -> Spectrum:
    """
    Add noise so that the median S/N of the good pixels is `snr`; a spectrum with a lower S/N is not changed.

    All errors are multiplied by one factor. A spectrum without errors is treated as noise-free and gets the same noise
    in all pixels.

    Parameters
    ----------
    noise : array of shape (pixels,)
        Noise of unit variance.
    """
    wavelength, flux, error, mask = spectrum
    good = ~mask & np.isfinite(flux)
    known = good & (error > 0) & np.isfinite(error)
    if not known.any():
        level = float(np.abs(np.median(flux[good]))) if good.any() else 0.0
        added = total = np.full_like(flux, level / snr)
    else:
        factor = max(float(np.median(flux[known] / error[known])) / snr, 1.0)
        added, total = np.nan_to_num(error) * np.float32(np.sqrt(factor**2 - 1.0)), error * np.float32(factor)
    return wavelength, flux + added * noise, total, mask


def _detector_starts(wavelength: Array) -> NDArray[np.intp]:
    """First pixels of all detectors but the first."""
    step = np.diff(wavelength)
    return np.flatnonzero(step > DETECTOR_GAP * np.median(step)) + 1 if len(step) else np.array([], np.intp)


def _by_detector(function: Callable[[Spectrum], Spectrum], spectrum: Spectrum) -> Spectrum:
    wavelength, flux, error, mask = spectrum
    unknown = not np.isfinite(error).any()
    bad = mask | ~np.isfinite(flux) | (~np.isfinite(error) & (not unknown))
    if bad.all():
        bad = np.ones_like(bad)
        flux, error = np.zeros_like(flux), np.zeros_like(error)
    elif bad.any():
        pixel, good = np.arange(len(flux)), np.flatnonzero(~bad)
        flux, error = (np.interp(pixel, good, column[good]).astype(column.dtype) for column in (flux, error))
    starts = _detector_starts(wavelength)
    parts = zip(*(np.split(column, starts) for column in (wavelength, flux, error, bad)), strict=True)
    columns = zip(*(function(part) for part in parts), strict=True)
    wavelength, flux, error, mask = (np.concatenate(column) for column in columns)
    return wavelength, flux, error, mask
