# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Pixels and line spread functions: how a spectrum on one grid is seen on another."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve1d
from scipy.sparse import csr_array
from scipy.special import ndtr


Array = NDArray[Any]


FWHM = math.sqrt(8 * math.log(2))  # in sigma, of a Gaussian


REACH = 5.0  # sigma, where a line spread function is cut off


SUBPIXELS = 4  # parts of a pixel of the emulator in which the spectrum counts as constant


FAINT = 0.05  # of the median flux: below it the background, not the star, sets the error


def gaussian_noise(generator: np.random.Generator, shape: tuple[int, ...], correlation: float) -> Array:
    """Noise of unit variance, smoothed along the last axis with a Gaussian of `correlation` pixels; float32."""
    if not correlation:
        return generator.standard_normal(shape, dtype=np.float32)
    reach = math.ceil(4 * correlation)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / correlation) ** 2)
    kernel = (kernel / np.linalg.norm(kernel)).astype(np.float32)
    wide = generator.standard_normal((*shape[:-1], shape[-1] + 2 * reach), dtype=np.float32)
    return convolve1d(wide, kernel)[..., reach:-reach]


def pixel_edges(wavelength: Array) -> Array:
    """Edges of pixels, shape (pixels + 1,), half-way between their middles; extrapolated by a parabola at the ends."""
    middles = (wavelength[1:] + wavelength[:-1]) / 2
    first, last = (3 * m[0] - 3 * m[1] + m[2] for m in (middles, middles[::-1]))
    return np.concatenate([[first], middles, [last]])


def subdivision_matrix(edges: Array, parts: int) -> csr_array:
    """
    Means over equal parts of each pixel, from means over the pixels, as a matrix; flux is conserved in each pixel.

    The cumulative flux is interpolated with polynomials through six edges, so that no steps and no smoothing come in.

    Parameters
    ----------
    edges : array, shape (pixels + 1,), at least 5 pixels

    Returns
    -------
    scipy.sparse.csr_array, shape (parts * pixels, pixels)
    """
    n = len(edges) - 1
    first = np.clip(np.arange(n) - 2, 0, n - 5)  # of the five pixels around each
    # In units of the width of the pixel, from its lower edge: powers of wavelengths would lose digits.
    nodes = (edges[first[:, None] + np.arange(6)] - edges[:-1, None]) / np.diff(edges)[:, None]
    x = np.linspace(0, 1, parts + 1)
    basis = np.ones((n, parts + 1, 6))  # of Lagrange: 1 at its own node, 0 at the others
    for i, j in itertools.permutations(range(6), 2):
        basis[..., i] *= (x - nodes[:, j, None]) / (nodes[:, i] - nodes[:, j])[:, None]
    # The flux of a pixel is part of the cumulative flux at all nodes above it.
    above = np.flip(np.cumsum(np.flip(basis, -1), -1), -1)[..., 1:]
    weights = np.diff(above, axis=1) * np.diff(nodes, axis=1)[:, None] * parts
    columns = np.broadcast_to((first[:, None] + np.arange(5))[:, None], weights.shape)
    rows = np.broadcast_to(np.arange(n * parts).reshape(n, parts, 1), weights.shape)
    return csr_array((weights.ravel(), (rows.ravel(), columns.ravel())), shape=(n * parts, n))


def resampling_matrix(edges: Array, new_edges: Array, sigma: Array) -> csr_array:
    """
    Means of a spectrum over new pixels after smoothing with a Gaussian, as a matrix.

    The spectrum counts as constant within each of its pixels, and the integrals are exact: flux is conserved, and a
    grid resampled onto itself with `sigma` = 0 stays as it is. At the ends of the spectrum the Gaussian is cut off.

    Parameters
    ----------
    edges : array, shape (pixels + 1,)
        Edges of the pixels of the spectrum, increasing.
    new_edges : array, shape (new pixels, 2)
        Lower and upper edge of each new pixel.
    sigma : array, shape (new pixels,)
        Of the Gaussian, in the unit of the edges.

    Returns
    -------
    scipy.sparse.csr_array, shape (new pixels, pixels)
        Each row sums to 1.
    """
    low, high = (new_edges + REACH * np.outer(sigma, [-1, 1])).T
    first = np.clip(np.searchsorted(edges, low, side="right") - 1, 0, len(edges) - 2)
    stop = np.clip(np.searchsorted(edges, high, side="left"), first + 1, len(edges) - 1)
    counts = stop - first
    rows = np.repeat(np.arange(len(counts)), counts)
    columns = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[rows]
    width = np.maximum(sigma, 1e-12)[rows]

    def integral(distance):  # of the cumulative distribution of the Gaussian
        x = distance / width
        return distance * ndtr(x) + width * np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)

    lower, upper = new_edges[rows].T
    left, right = edges[columns], edges[columns + 1]
    weights = integral(upper - left) - integral(lower - left) - integral(upper - right) + integral(lower - right)
    weights /= upper - lower
    weights[np.abs(weights) < 1e-9] = 0.0
    matrix = csr_array((weights, (rows, columns)), shape=(len(counts), len(edges) - 1))
    matrix.eliminate_zeros()
    matrix.data /= np.repeat(matrix.sum(axis=1), np.diff(matrix.indptr))
    return matrix


@dataclass(frozen=True)
class Distribution:
    """Numbers drawn star by star: `value` is interpolated at a uniform number in `probability`."""

    probability: tuple[float, ...]
    value: tuple[float, ...]
    logarithmic: bool = False

    def draw(self, generator: np.random.Generator, n: int) -> Array:
        value = np.log(self.value) if self.logarithmic else self.value
        drawn = np.interp(generator.random(n), self.probability, value)
        return np.exp(drawn) if self.logarithmic else drawn


@dataclass(frozen=True)
class LineSpread:
    """FWHM of a Gaussian line spread function, by wavelength between `start` and `stop`; both in Angstrom."""

    wavelength: tuple[float, ...]
    fwhm: tuple[float, ...]
    power: float | None = None
    start: float = 0.0
    stop: float = math.inf

    def __call__(self, wavelength: Array) -> Array:
        if self.power is None:
            return np.interp(wavelength, self.wavelength, self.fwhm)
        return self.fwhm[0] * (wavelength / self.wavelength[0]) ** self.power


@dataclass(frozen=True)
class Noise:
    """
    Signal-to-noise ratio, error by wavelength and flux, correlation.

    The error of a pixel is `error_shape` (linear in wavelength, and in the logarithm of S/N) times the flux to the
    power `flux_power` (0.5 where photons are counted), scaled so that the median of flux / error is the S/N drawn.
    `correlation` is that of the noise along the pixels, see [`gaussian_noise`].
    """

    snr: Distribution
    error_wavelength: tuple[float, ...] = (1.0,)
    error_snr: tuple[float, ...] = (1.0,)
    error_shape: tuple[tuple[float, ...], ...] = ((1.0,),)
    flux_power: float = 0.5
    correlation: float = 0.0

    def errors(self, wavelength: Array, flux: Array, snr: Array) -> Array:
        """One sigma for noiseless `flux` (stars, pixels), float32."""
        shapes = np.stack([np.interp(wavelength, self.error_wavelength, row) for row in self.error_shape])
        if len(shapes) > 1:
            # Linear interpolation as a product: one weight for each row of the table.
            rows = np.eye(len(shapes))
            weights = np.stack([np.interp(np.log(snr), np.log(self.error_snr), row) for row in rows], axis=1)
            shapes = weights @ shapes
        level = np.median(flux, axis=1, keepdims=True)
        error = np.maximum(flux, FAINT * level) ** np.float32(self.flux_power) * shapes.astype(np.float32)
        return error * (np.median(flux / error, axis=1) / snr).astype(np.float32)[:, None]
