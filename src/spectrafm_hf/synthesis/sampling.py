"""From the fine steps of a synthesis to the pixels of the project's emulators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter1d

from .synthesizer import Spectrum


#: Pixels of APOGEE's combined spectra, Angstrom in vacuum: log10(wavelength) = 4.179 + 6e-6 i.
APSTAR_WAVELENGTH = 10.0 ** (4.179 + 6e-6 * np.arange(8575))
APSTAR_RESOLUTION = 22_500.0

#: Edges of the bins of the optical grid, Angstrom in vacuum: 2,800 of 2.5 A.
OPTICAL_EDGES = 3305.0 + 2.5 * np.arange(2801)

#: Edges of the bins of the library at R = 20,000, Angstrom in vacuum: 2e-5 wide in ln(wavelength), 3,301 to 10,300 A.
R20000_EDGES = 3301.0 * np.exp(2e-5 * np.arange(int(np.log(10300 / 3301) / 2e-5) + 1))

_FINE = 1e-6  # in log10(wavelength): a twentieth of the resolution element
_PER_FWHM = 2 * np.sqrt(2 * np.log(2))


def smooth(
    wavelength: NDArray[np.floating],
    flux: NDArray[np.floating],
    new_wavelength: NDArray[np.floating],
    resolution: float,
) -> NDArray[np.floating]:
    """Flux at new wavelengths after a Gaussian of constant resolution.

    Parameters
    ----------
    wavelength, flux : array, shape (n,)
        Sampled much finer than the resolution, increasing.
    new_wavelength : array, shape (m,)
        Within `wavelength`; nearer to its ends than two resolution elements the last value counts as going on.
    resolution : float
        Wavelength over FWHM.

    Returns
    -------
    array, shape (m,)
    """
    log_wavelength = np.log10(wavelength)
    grid = np.arange(log_wavelength[0], log_wavelength[-1], _FINE)
    sigma = 1 / (resolution * np.log(10) * _PER_FWHM * _FINE)
    smoothed = gaussian_filter1d(np.interp(grid, log_wavelength, flux), sigma, mode="nearest")
    return np.interp(np.log10(new_wavelength), grid, smoothed)


def bin_means(
    wavelength: NDArray[np.floating], flux: NDArray[np.floating], edges: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Means over bins, shape (m,), of a finely sampled spectrum; `edges` has shape (m + 1,) and is within its range."""
    area = np.concatenate([[0.0], np.cumsum((flux[1:] + flux[:-1]) / 2 * np.diff(wavelength))])
    return np.diff(np.interp(edges, wavelength, area)) / np.diff(edges)


def native(spectrum: Spectrum) -> Spectrum:
    """The spectrum as it is."""
    return spectrum


def apstar(spectrum: Spectrum) -> Spectrum:
    """The spectrum at R = 22,500 on the pixels of APOGEE's combined spectra, 15,101 to 16,999 Angstrom."""
    wavelength, flux, continuum = spectrum
    return Spectrum(
        APSTAR_WAVELENGTH,
        smooth(wavelength, flux, APSTAR_WAVELENGTH, APSTAR_RESOLUTION),
        np.interp(APSTAR_WAVELENGTH, wavelength, continuum),
    )


def bins(spectrum: Spectrum) -> Spectrum:
    """Means over 2,800 bins of 2.5 Angstrom, 3,305 to 10,305 Angstrom; flux is mean flux over mean continuum."""
    wavelength, flux, continuum = spectrum
    mean_continuum = bin_means(wavelength, continuum, OPTICAL_EDGES)
    mean_flux = bin_means(wavelength, flux * continuum, OPTICAL_EDGES)
    middles = (OPTICAL_EDGES[1:] + OPTICAL_EDGES[:-1]) / 2
    return Spectrum(middles, mean_flux / mean_continuum, mean_continuum)


def r20000(spectrum: Spectrum) -> Spectrum:
    """Means over bins of 2e-5 in ln(wavelength), 3,301 to 10,300 Angstrom, without a line spread function.

    The bins are narrow against the steps of the synthesis, so a cubic spline is integrated. The continuum is smooth; it
    is rounded to 13 bits (1.2e-4 at most), which takes almost no space in a file, and flux times continuum is exact.
    """
    wavelength, flux, continuum = spectrum
    log_edges = np.log(R20000_EDGES)
    area = CubicSpline(np.log(wavelength), flux * continuum).antiderivative()
    middles = np.exp((log_edges[1:] + log_edges[:-1]) / 2)
    mantissa, exponent = np.frexp(np.interp(middles, wavelength, continuum))
    smooth_continuum = np.ldexp(np.round(mantissa * 2**13) / 2**13, exponent)
    return Spectrum(middles, np.diff(area(log_edges)) / np.diff(log_edges) / smooth_continuum, smooth_continuum)


#: How a grid samples its spectra, by name.
SAMPLINGS: dict[str, Callable[[Spectrum], Spectrum]] = {
    "native": native,
    "apstar": apstar,
    "bins": bins,
    "r20000": r20000,
}
