# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Instruments: simulated observations of the spectrum of a star.

An instrument is a small YAML file: wavelength grid, line spread function, noise, masks, extinction, normalisation.
Some come with the package, see [`instrument_names`]; their files, `apogee`, `gaia-xp` and `miles` first of all, are the
reference of the format.

In the order of `Instrument.apply`: interstellar extinction, line spread function and resampling (one sparse matrix,
which conserves flux), a smooth tilt, errors, noise, normalisation.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from astropy import units
from dust_extinction.parameter_averages import G23
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ..files import RESOURCES
from .instrument_files import InstrumentReader
from .line_spread import (
    FAINT,
    FWHM,
    SUBPIXELS,
    Distribution,
    LineSpread,
    Noise,
    gaussian_noise,
    pixel_edges,
    resampling_matrix,
    subdivision_matrix,
)


Array = NDArray[Any]

INSTRUMENTS = RESOURCES / "instruments"
K_BAND = 21_590.0  # Angstrom, 2MASS Ks, where `ak_targ` is measured


def instrument_names() -> list[str]:
    """Names of the instruments that come with the package."""
    return sorted(path.stem for path in INSTRUMENTS.glob("*.yaml"))


# ------------------------------------------------------------------------------------------------- parts of the physics


def extinction_curve(wavelength: Array) -> Array:
    """
    A(wavelength) / A(V) of Gordon et al. 2023 for R(V) = 3.1, in the shape of `wavelength` (Angstrom, vacuum).

    Raises
    ------
    ValueError
        For wavelengths outside 912 Angstrom - 32 micron, where the curve is not known.
    """
    if wavelength.ndim == 2 and np.all(wavelength == wavelength[0]):
        wavelength = wavelength[:1]
    return G23(Rv=3.1)(wavelength.astype(np.float64) * units.Angstrom)


# ------------------------------------------------------------------------------------------------------- the instrument


@dataclass(frozen=True, eq=False)
class Instrument:
    """
    Simulated observations of one instrument.

    Attributes
    ----------
    name, description : str
    emulator : str
        The bundled emulator that its spectra are made with.
    detectors : tuple of array
        Wavelengths of the pixels of each detector, Angstrom in vacuum, increasing.
    line_spread : tuple of LineSpread
        Where two overlap, the spectra seen through them are blended linearly.
    noise : Noise
    masks : tuple of (low, high)
        Angstrom in vacuum; pixels in between are masked in every spectrum.
    extinction : Distribution, optional
        A(V) [mag]; the curve is that of [`extinction_curve`].
    tilt : (amplitude, degree), optional
        Flux is multiplied by the exponential of Legendre polynomials of degree 1 to `degree` over the whole range,
        their factors drawn from a normal distribution of standard deviation `amplitude`.
    normalisation : {"none", "median", "continuum"}
        Leave flux and error as they are, divide them by the median of the noisy flux over all pixels, or use the flux
        over the continuum.
    settings : mapping
        Content of the file.
    """

    name: str
    detectors: tuple[Array, ...]
    line_spread: tuple[LineSpread, ...]
    noise: Noise
    emulator: str = ""
    description: str = ""
    masks: tuple[tuple[float, float], ...] = ()
    extinction: Distribution | None = None
    tilt: tuple[float, int] | None = None
    normalisation: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _responses: dict[Any, csr_array] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Instrument:
        """
        Read an instrument that comes with the package, or a YAML file.

        Raises
        ------
        ValueError
            If there is none of that name, or for wrong content, naming file, field, expectation and value.
        """
        bundled = os.fspath(name_or_path) in instrument_names()
        path = INSTRUMENTS / f"{name_or_path}.yaml" if bundled else Path(name_or_path)
        if not path.is_file():
            raise ValueError(f"instrument: expected one of {instrument_names()} or a YAML file, got {str(path)!r}")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from error
        return cls.from_settings(settings, path.name)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], source: str = "instrument") -> Instrument:
        """The same from the content of such a file; `source` opens the messages of errors."""
        reader = InstrumentReader(source)
        instrument = cls(**reader.fields(settings))
        if not np.allclose(total := np.sum(instrument._shares(), axis=0), 1):
            where = instrument.wavelength[int(np.argmax(~np.isclose(total, 1)))]
            reader.fail(
                "line_spread", "ranges that cover all wavelengths, overlapping two by two", f"none at {where:.0f}"
            )
        return instrument

    @property
    def wavelength(self) -> Array:
        """Angstrom in vacuum, shape (pixels,)."""
        return np.concatenate(self.detectors)

    @property
    def mask(self) -> Array:
        """True = bad, shape (pixels,)."""
        wavelength = self.wavelength
        return np.any([(low <= wavelength) & (wavelength <= high) for low, high in self.masks or [(0, 0)]], axis=0)

    def response(self, wavelength: Array, resolving_power: float | None = None) -> csr_array:
        """
        The matrix that a spectrum is multiplied with: line spread function and resampling.

        The line spread function of the instrument holds the pixels too; what the spectrum has been smoothed with
        already and what both samplings smooth it with is subtracted, in quadrature.

        Parameters
        ----------
        wavelength : array, shape (pixels of the spectrum,)
            Angstrom in vacuum.
        resolving_power : float, optional
            Wavelength / FWHM of the spectrum; None for means over its pixels of a spectrum that is not smoothed.

        Returns
        -------
        scipy.sparse.csr_array, shape (pixels, pixels of the spectrum)

        Raises
        ------
        ValueError
            If the spectrum does not cover the instrument's range, or is smoother than the instrument.
        """
        key = (wavelength.tobytes(), resolving_power)
        if key not in self._responses:
            self._responses[key] = self._response(wavelength, resolving_power)
        return self._responses[key]

    def _response(self, wavelength: Array, resolving_power: float | None) -> csr_array:
        edges = pixel_edges(wavelength)
        own_edges = np.concatenate([np.stack([e[:-1], e[1:]], axis=1) for e in map(pixel_edges, self.detectors)])
        own = self.wavelength
        fine = subdivision_matrix(edges, SUBPIXELS)
        fine_edges = np.append(
            (edges[:-1, None] + np.diff(edges)[:, None] * np.arange(SUBPIXELS) / SUBPIXELS), edges[-1]
        )
        if own_edges[0, 0] < edges[0] - 1e-3 or own_edges[-1, 1] > edges[-1] + 1e-3:
            raise ValueError(
                f"wavelength: expected a spectrum that covers {own[0]:.1f}-{own[-1]:.1f} Angstrom for {self.name!r}, "
                f"got {wavelength[0]:.1f}-{wavelength[-1]:.1f}"
            )
        # Variances, Angstrom^2. Subdivision takes the smoothing by the pixels of the spectrum out again; its parts
        # smooth twice, as means over them and because the spectrum counts as constant in each.
        pixels = np.interp(own, wavelength, np.diff(edges)) ** 2 / 12
        own_pixels = np.ptp(own_edges, axis=1) ** 2 / 12 + 2 * pixels / SUBPIXELS**2
        native = pixels if resolving_power is None else (own / resolving_power / FWHM) ** 2
        parts = []
        for spread, share in zip(self.line_spread, self._shares(), strict=True):
            wanted = (spread(own) / FWHM) ** 2
            sharper = (wanted < 0.999 * native) & (share > 0)
            if sharper.any():
                i = int(np.argmax(sharper))
                raise ValueError(
                    f"line_spread: expected a FWHM of at least {FWHM * math.sqrt(native[i]):.3g} Angstrom at "
                    f"{own[i]:.0f} Angstrom, that of the spectra it is made from, "
                    f"got {FWHM * math.sqrt(wanted[i]):.3g} in {self.name!r}"
                )
            sigma = np.sqrt(np.maximum(wanted - (native - pixels) - own_pixels, 0.0))
            parts.append(csr_array(resampling_matrix(fine_edges, own_edges, sigma) * share[:, None]))
        matrix = csr_array(sum(parts[1:], parts[0]) @ fine)
        matrix.data[np.abs(matrix.data) < 1e-6] = 0.0  # rounding, of edges that coincide
        matrix.eliminate_zeros()
        matrix.data /= np.repeat(matrix.sum(axis=1), np.diff(matrix.indptr))
        return matrix.astype(np.float32)

    def _shares(self) -> list[Array]:
        """How much each part of the line spread function counts, each of shape (pixels,); together 1."""
        own = self.wavelength
        shares = [((part.start <= own) & (own < part.stop)).astype(np.float64) for part in self.line_spread]
        for i, (part, following) in enumerate(itertools.pairwise(self.line_spread)):
            if part.stop > following.start:
                ramp = np.clip((own - following.start) / (part.stop - following.start), 0, 1)
                shares[i] *= 1 - ramp
                shares[i + 1] *= ramp
        return shares

    def reached_fwhm(self, wavelength: Array, resolving_power: float | None = None) -> Array:
        """FWHM [Angstrom] that spectra end up with, shape (pixels,), from second moments of `response`."""
        matrix, own = self.response(wavelength, resolving_power).tocoo(), self.wavelength
        distance = wavelength[matrix.col] - own[matrix.row]
        first, second = (np.bincount(matrix.row, matrix.data * distance**power) for power in (1, 2))
        widths = np.interp(own, wavelength, np.diff(pixel_edges(wavelength)))
        native = widths**2 / 12 if resolving_power is None else (own / resolving_power / FWHM) ** 2
        return FWHM * np.sqrt(np.maximum(second - first**2, 0.0) + native)

    def apply(
        self,
        wavelength: Array,
        flux: Array,
        generator: np.random.Generator,
        resolving_power: float | None = None,
        a_v: Array | None = None,
        factors: Array | None = None,
    ) -> dict[str, Array]:
        """
        Observe some stars.

        Parameters
        ----------
        wavelength : array, shape (pixels of the spectra,)
            Angstrom in vacuum.
        flux : array, shape (stars, pixels of the spectra)
        generator : numpy.random.Generator
        resolving_power : float, optional
            See [`Instrument.response`].
        a_v : array, shape (stars,), optional
            Their extinction A(V) [mag], instead of one that is drawn.
        factors : array, shape (stars, own pixels), optional
            Factors of the noiseless flux.

        Returns
        -------
        dict
            `flux`, `flux_error`, `clean` (the flux without noise), `mask`: (stars, pixels), the first three float32;
            `wavelength` (pixels,) float32; `snr` (stars,) float32, the median of clean flux / error over all pixels;
            with extinction `ak_targ` (stars,) float32, that in K.

        Raises
        ------
        ValueError
            As `response` does, or if a flux is not finite or its median not positive.
        """
        n_stars = len(flux)
        matrix = self.response(np.asarray(wavelength, np.float64), resolving_power)
        columns: dict[str, Array] = {}
        if self.extinction and a_v is None:
            a_v = self.extinction.draw(generator, n_stars)
        if a_v is not None:
            flux = flux * 10 ** (-0.4 * np.outer(a_v, extinction_curve(wavelength))).astype(np.float32)
            columns["ak_targ"] = (a_v * extinction_curve(np.array([K_BAND]))).astype(np.float32)
        clean = self._observe(matrix, np.asarray(flux, np.float32))
        own = self.wavelength
        if self.tilt:
            amplitude, degree = self.tilt
            x = np.interp(own, own[[0, -1]], [-1, 1])
            drawn = amplitude * generator.standard_normal((n_stars, degree))
            clean *= np.exp(drawn @ legendre.legvander(x, degree)[:, 1:].T).astype(np.float32)
        if factors is not None:
            clean *= factors
        level = np.median(clean, axis=1)
        if not np.all(good := (level > 0) & np.isfinite(clean.sum(axis=1))):
            i = int(np.argmin(good))
            raise ValueError(
                f"flux: expected finite numbers of a positive median, got a median of {level[i]} in star {i}"
            )
        snr = self.noise.snr.draw(generator, n_stars)
        error = self.noise.errors(own, clean, snr)
        noisy = clean + error * gaussian_noise(generator, clean.shape, self.noise.correlation)
        if self.normalisation == "median":
            scale = np.median(noisy, axis=1, keepdims=True)
            noisy, error, clean = noisy / scale, error / scale, clean / scale
        columns |= {"wavelength": own.astype(np.float32), "flux": noisy, "flux_error": error, "clean": clean}
        return columns | {"mask": np.tile(self.mask, (n_stars, 1)), "snr": snr.astype(np.float32)}

    @staticmethod
    def _observe(matrix: csr_array, flux: Array) -> Array:
        if matrix.nnz == matrix.shape[0] and np.all(matrix.data == 1):  # the emulator has these very pixels
            return flux[:, matrix.indices]
        return np.ascontiguousarray((matrix @ flux.T).T)


def measure_noise(
    flux: Array, flux_error: Array, wavelength: Array, snrs: Sequence[float], tolerance: float = 0.1
) -> dict[str, Any]:
    """
    The `noise` of an instrument file, measured on observed spectra (`yaml.safe_dump` writes it).

    Parameters
    ----------
    flux, flux_error : array, shape (stars, pixels)
    wavelength : array, shape (pixels,)
        Angstrom in vacuum.
    snrs : sequence of float
        S/N at which the shape of the error is measured, each on the stars within 25 % of it.
    tolerance : float
        Wavelengths are added to the table until interpolation is nowhere off by more than this fraction.

    Returns
    -------
    dict
        `snr` and `error_shape`; the correlation of the noise cannot be measured on one spectrum of each star.
    """
    snr = np.median(flux / flux_error, axis=1)
    level = np.median(flux, axis=1, keepdims=True)
    shape = flux_error * snr[:, None] / np.sqrt(np.maximum(flux, FAINT * level) * level)
    medians = np.stack([np.median(shape[(0.8 * at < snr) & (snr < 1.25 * at)], axis=0) for at in snrs])
    nodes = [0, len(wavelength) - 1]
    while True:
        table = [np.interp(wavelength, wavelength[nodes], row[nodes]) for row in medians]
        off = np.abs(np.log(table / medians)).max(axis=0)
        if off.max() <= tolerance:
            break
        nodes = sorted([*nodes, int(np.argmax(off))])
    levels = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
    return {
        "snr": {
            "quantiles": dict(zip(levels, np.quantile(snr, levels).astype(np.float64).round(1).tolist(), strict=True))
        },
        "error_shape": {
            "wavelength": wavelength[nodes].tolist(),
            "snr": list(map(float, snrs)),
            "values": medians[:, nodes].astype(np.float64).round(2).tolist(),
        },
    }
