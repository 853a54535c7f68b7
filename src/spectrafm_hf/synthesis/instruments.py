# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Instruments: what turns the spectrum of a star into what a survey would have recorded of it.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml
from astropy import units
from dust_extinction.parameter_averages import G23
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.ndimage import convolve1d
from scipy.sparse import csr_array
from scipy.special import ndtr

from ..files import RESOURCES
from ..models.gate_spectrafm import air_to_vacuum


Array = NDArray[Any]

INSTRUMENTS = RESOURCES / "instruments"
FWHM = math.sqrt(8 * math.log(2))  # in sigma, of a Gaussian
REACH = 5.0  # sigma, where a line spread function is cut off
SUBPIXELS = 4  # parts of a pixel of the emulator in which the spectrum counts as constant
FAINT = 0.05  # of the median flux: below it the background, not the star, sets the error
K_BAND = 21_590.0  # Angstrom, 2MASS Ks, where `ak_targ` is measured

FIELDS = {
    "name",
    "description",
    "emulator",
    "wavelength",
    "line_spread",
    "noise",
    "masks",
    "extinction",
    "tilt",
    "normalisation",
}
NORMALISATIONS = ("none", "median", "continuum")


def instrument_names() -> list[str]:
    """Names of the instruments that come with the package."""
    return sorted(path.stem for path in INSTRUMENTS.glob("*.yaml"))


# ------------------------------------------------------------------------------------------------- parts of the physics


def gaussian_noise(generator: np.random.Generator, shape: tuple[int, ...], correlation: float) -> Array:
    """Noise of unit variance, smoothed along the last axis with a Gaussian of `correlation` pixels; float32."""
    if not correlation:
        return generator.standard_normal(shape, dtype=np.float32)
    reach = math.ceil(4 * correlation)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / correlation) ** 2)
    kernel = (kernel / np.linalg.norm(kernel)).astype(np.float32)
    wide = generator.standard_normal((*shape[:-1], shape[-1] + 2 * reach), dtype=np.float32)
    return convolve1d(wide, kernel)[..., reach:-reach]


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
    # In units of the width of the pixel, from its lower edge: else powers of wavelengths would cost digits.
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


# ------------------------------------------------------------------------------------------------------- the instrument


@dataclass(frozen=True, eq=False)
class Instrument:
    """
    What a survey records of a star.

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
        Leave flux and error as they are, divide them by the median of the noisy flux over all pixels, or ask the
        emulator for flux over continuum.
    settings : mapping
        What the file says.
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
            If there is none of that name, or naming file, field, expectation and value of what is wrong in it.
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
        return _Reader(source).instrument(settings)

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
            What the noiseless flux is multiplied with.

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


# ------------------------------------------------------------------------------------------------------ reading a file


class _Reader:
    """Checks and turns the settings of a file into an instrument; an error names file, field, expectation and value."""

    def __init__(self, source: str):
        self.source = source

    def fail(self, where: str, expected: str, value: Any) -> NoReturn:
        raise ValueError(f"{self.source}: {where}: expected {expected}, got {repr(value)[:200]}")

    def mapping(self, where: str, value: Any, allowed: Iterable[str], required: Iterable[str] = ()) -> dict[str, Any]:
        allowed = sorted(allowed)
        if not isinstance(value, Mapping):
            self.fail(where, f"fields out of {allowed}", value)
        for name in value:
            if name not in allowed:
                self.fail(where, f"fields out of {allowed}", name)
        for name in required:
            if name not in value:
                self.fail(where, f"a field {name!r}", sorted(value))
        return dict(value)

    def number(self, where: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`; YAML takes 6e-6, without a point, for a text."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and low <= number <= high):
            limits = "" if math.isinf(low) and math.isinf(high) else f" from {low:g} to {high:g}"
            self.fail(where, f"a number{limits}", value)
        return number

    def integer(self, where: str, value: Any, low: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fail(where, f"a whole number of at least {low}", value)
        return value

    def numbers(
        self, where: str, value: Any, low: float = -math.inf, increasing: bool = False, size: int = 0
    ) -> list[float]:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value or (size and len(value) != size):
            self.fail(where, f"a list of {size or 'some'} numbers", value)
        result = [self.number(f"{where}[{i}]", item, low) for i, item in enumerate(value)]
        if increasing and any(a >= b for a, b in itertools.pairwise(result)):
            self.fail(where, "increasing numbers", value)
        return result

    def instrument(self, settings: Any) -> Instrument:
        settings = self.mapping("file", settings, FIELDS, ("name", "wavelength", "line_spread", "noise"))
        for name in ("name", "description", "emulator"):
            if not isinstance(settings.get(name, ""), str):
                self.fail(name, "a text", settings[name])
        if (normalisation := settings.get("normalisation", "none")) not in NORMALISATIONS:
            self.fail("normalisation", f"one of {NORMALISATIONS}", normalisation)
        instrument = Instrument(
            name=settings["name"],
            description=" ".join(settings.get("description", "").split()),
            emulator=settings.get("emulator", ""),
            detectors=self.detectors(settings["wavelength"]),
            line_spread=self.line_spread(settings["line_spread"]),
            noise=self.noise(settings["noise"]),
            masks=self.masks(settings.get("masks") or []),
            extinction=self.distribution("extinction", settings["extinction"]) if settings.get("extinction") else None,
            tilt=self.tilt(settings["tilt"]) if settings.get("tilt") else None,
            normalisation=normalisation,
            settings=settings,
        )
        if not np.allclose(total := np.sum(instrument._shares(), axis=0), 1):
            where = instrument.wavelength[int(np.argmax(~np.isclose(total, 1)))]
            self.fail(
                "line_spread", "ranges that cover all wavelengths, overlapping two by two", f"none at {where:.0f}"
            )
        return instrument

    def detectors(self, value: Any) -> tuple[Array, ...]:
        value = self.mapping("wavelength", value, ("medium", "detectors"), ("detectors",))
        if (medium := value.get("medium", "vacuum")) not in ("vacuum", "air"):
            self.fail("wavelength.medium", "'vacuum' or 'air'", medium)
        if not isinstance(value["detectors"], list) or not value["detectors"]:
            self.fail("wavelength.detectors", "a list", value["detectors"])
        grids = [self.grid(f"wavelength.detectors[{i}]", item) for i, item in enumerate(value["detectors"])]
        for i, (one, following) in enumerate(itertools.pairwise(grids)):
            if following[0] <= one[-1]:
                self.fail(f"wavelength.detectors[{i + 1}]", f"a start above {one[-1]:.3f}", float(following[0]))
        return tuple(air_to_vacuum(grid) if medium == "air" else grid for grid in grids)

    def grid(self, where: str, value: Any) -> Array:
        """Linear: `start`, `step`; logarithmic: `log10_start`, `log10_step`; both with pixels `first` to `last`."""
        if isinstance(value, Mapping) and "values" in value:
            value = self.mapping(where, value, ("values",))
            grid = np.array(self.numbers(f"{where}.values", value["values"], increasing=True))
        else:
            prefix = "log10_" if isinstance(value, Mapping) and "log10_start" in value else ""
            start, step = f"{prefix}start", f"{prefix}step"
            value = self.mapping(where, value, (start, step, "first", "last"), (start, step, "last"))
            first = self.integer(f"{where}.first", value.get("first", 0), 0)
            last = self.integer(f"{where}.last", value["last"], first + 1)
            numbers = self.number(f"{where}.{start}", value[start]) + self.number(
                f"{where}.{step}", value[step], 0
            ) * np.arange(first, last + 1)
            grid = 10**numbers if prefix else numbers
        if len(grid) < 4 or not (grid[0] >= 912 and grid[-1] <= 320_000 and np.all(np.diff(grid) > 0)):
            self.fail(
                where,
                "at least 4 increasing wavelengths from 912 to 320,000 Angstrom",
                [float(grid[0]), "...", float(grid[-1])],
            )
        return grid

    def line_spread(self, value: Any) -> tuple[LineSpread, ...]:
        if not isinstance(value, list):
            return (self.spread("line_spread", value),)
        parts = [self.spread(f"line_spread[{i}]", item) for i, item in enumerate(value)]
        for i, (one, following) in enumerate(itertools.pairwise(parts)):
            if not (one.start < following.start and one.stop < following.stop):
                self.fail(
                    f"line_spread[{i + 1}].range", "ranges in increasing order", [following.start, following.stop]
                )
        return tuple(parts)

    def spread(self, where: str, value: Any) -> LineSpread:
        """`resolving_power`, or `fwhm` or `sigma`: a number, a number `at` a wavelength to a `power`, or a table."""
        value = self.mapping(where, value, ("resolving_power", "fwhm", "sigma", "at", "power", "wavelength", "range"))
        kinds = [name for name in ("resolving_power", "fwhm", "sigma") if name in value]
        if len(kinds) != 1:
            self.fail(where, "one of resolving_power, fwhm, sigma", kinds)
        (kind,) = kinds
        limits = self.numbers(f"{where}.range", value["range"], 0, True, 2) if "range" in value else [0.0, math.inf]
        if "wavelength" in value:
            nodes = self.numbers(f"{where}.wavelength", value["wavelength"], 1, True)
            widths = self.numbers(f"{where}.{kind}", value[kind], 1e-9, size=len(nodes))
            if kind == "resolving_power":
                widths = [node / power for node, power in zip(nodes, widths, strict=True)]
            power = None
        else:
            widths = [self.number(f"{where}.{kind}", value[kind], 1e-9)]
            nodes = [self.number(f"{where}.at", value.get("at", 5000.0), 1)]
            power = self.number(f"{where}.power", value.get("power", 0.0))
            if kind == "resolving_power":
                widths, power = [nodes[0] / widths[0]], 1.0
        factor = FWHM if kind == "sigma" else 1.0
        return LineSpread(tuple(nodes), tuple(factor * width for width in widths), power, *limits)

    def noise(self, value: Any) -> Noise:
        value = self.mapping("noise", value, ("snr", "error_shape", "flux_power", "correlation"), ("snr",))
        snr = self.distribution("noise.snr", value["snr"], 1e-3)
        power = self.number("noise.flux_power", value.get("flux_power", 0.5), 0, 1)
        correlation = self.number("noise.correlation", value.get("correlation", 0.0), 0, 1000)
        if "error_shape" not in value:
            return Noise(snr, flux_power=power, correlation=correlation)
        where = "noise.error_shape"
        shape = self.mapping(where, value["error_shape"], ("wavelength", "snr", "values"), ("wavelength", "values"))
        nodes = self.numbers(f"{where}.wavelength", shape["wavelength"], 1, True)
        snrs = self.numbers(f"{where}.snr", shape.get("snr", [1.0]), 1e-3, True)
        rows = shape["values"]
        if not isinstance(rows, list) or len(rows) != len(snrs):
            self.fail(f"{where}.values", f"a list for each of the {len(snrs)} values of snr", rows)
        table = [self.numbers(f"{where}.values[{i}]", row, 1e-9, size=len(nodes)) for i, row in enumerate(rows)]
        return Noise(snr, tuple(nodes), tuple(snrs), tuple(map(tuple, table)), power, correlation)

    def distribution(self, where: str, value: Any, low: float = 0.0) -> Distribution:
        """A number, `{uniform: [a, b]}`, `{log_uniform: [a, b]}` or `{quantiles: {probability: value}}`."""
        if not isinstance(value, Mapping):
            return Distribution((0.0,), (self.number(where, value, low),))
        value = self.mapping(where, value, ("uniform", "log_uniform", "quantiles"))
        if len(value) != 1:
            self.fail(where, "one of uniform, log_uniform, quantiles", sorted(value))
        ((kind, content),) = value.items()
        if kind != "quantiles":
            lowest = max(low, 1e-9) if kind == "log_uniform" else low
            limits = self.numbers(f"{where}.{kind}", content, lowest, True, 2)
            return Distribution((0.0, 1.0), tuple(limits), kind == "log_uniform")
        if not isinstance(content, Mapping):
            self.fail(f"{where}.quantiles", "probability: value", content)
        nodes = self.numbers(f"{where}.quantiles", list(content), 0, True)
        if nodes[0] != 0 or nodes[-1] != 1:
            self.fail(f"{where}.quantiles", "probabilities from 0 to 1", nodes)
        values = self.numbers(f"{where}.quantiles", list(content.values()), low)
        if sorted(values) != values:
            self.fail(f"{where}.quantiles", "values that do not decrease", values)
        return Distribution(tuple(nodes), tuple(values))

    def masks(self, value: Any) -> tuple[tuple[float, float], ...]:
        if not isinstance(value, list):
            self.fail("masks", "a list of [low, high] in Angstrom", value)
        ranges = [self.numbers(f"masks[{i}]", item, 0, True, 2) for i, item in enumerate(value)]
        return tuple((low, high) for low, high in ranges)

    def tilt(self, value: Any) -> tuple[float, int]:
        value = self.mapping("tilt", value, ("amplitude", "degree"), ("amplitude", "degree"))
        return self.number("tilt.amplitude", value["amplitude"], 0, 1), self.integer("tilt.degree", value["degree"], 1)


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
        `snr` and `error_shape`; the correlation of the noise cannot be told from one spectrum of each star.
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
