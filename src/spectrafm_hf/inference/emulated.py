# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Spectra with errors from labels, by the emulators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from ..data.schema import OVER_CONTINUUM, SURFACE
from ..models import SpectrumEmulator, default_vmicro
from ..models.modeling_emulator import REFERENCE_TEFF, Coefficients, CovarianceGroup
from ..models.rungs_spectrafm import NATIVE_TOLERANCE
from ..synthesis.instruments import Instrument
from ..synthesis.labels import usual_abundances
from ..synthesis.line_spread import FWHM, pixel_edges, resampling_matrix
from ..synthesis.synthetic import ALPHA_ELEMENTS, load_emulator


Array = NDArray[Any]


AS_GIVEN = "as given"


@dataclass
class Spectra:
    """
    Spectra of some stars on one grid.

    Attributes
    ----------
    wavelength : array of shape (pixels,)
        Angstrom, vacuum, rest frame.
    flux, error : array of shape (stars, pixels)
        One sigma, in the same unit.
    resolving_power : float, optional
        Wavelength / FWHM; None for that of the instrument, or of the file.
    unit : str
    """

    wavelength: Array
    flux: Array
    error: Array
    resolving_power: float | None
    unit: str

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """In the schema of this project."""
        return [
            {
                "object_id": name,
                "survey": "spectrafm",
                "wavelength": self.wavelength,
                "flux": flux,
                "flux_error": error,
                "mask": np.isnan(flux),
                "rest_frame": True,
                "resolving_power": np.nan if self.resolving_power is None else self.resolving_power,
            }
            for name, flux, error in zip(names, self.flux, self.error, strict=True)
        ]


#: The first one that covers the requested range is used.
EMULATORS = ("emulator-hband", "emulator-optical")


NEIGHBOURS = 24  # stars of the grid from which the error of another star is estimated


#: Ratio of the errors of an emulator on other stars to its leave-one-out errors. Measured on held-out stars of the grid
#: of the optical emulator of 0.1.0; the same for odd and even ones.
ERROR_FACTORS = {"emulator-optical": 0.7}


VMICRO_SCATTER = 0.18


LN_NOISE = (-16.0, -3.0)  # search range of the ln of the noise variance


PIXELS_AT_ONCE = 4_000_000


class EmulatedSpectra:
    """
    Spectra of an emulator on one grid, with their errors.

    Parameters
    ----------
    emulator : str or SpectrumEmulator
    wavelength : array of shape (pixels,), or Instrument
        Angstrom, vacuum, increasing: centres of contiguous pixels; or the grid and line spread function of an
        instrument.
    resolving_power : float, optional
        Wavelength / FWHM, the pixels not included; by default that of the emulator.
    normalised : bool
        Divide by the continuum.

    Raises
    ------
    ValueError
        For wavelengths outside of the emulator, or a resolution that is finer than its own.
    """

    def __init__(
        self,
        emulator: str | SpectrumEmulator,
        wavelength: ArrayLike | Instrument,
        resolving_power: float | None = None,
        *,
        normalised: bool = True,
    ):
        self.emulator = _loaded(emulator) if isinstance(emulator, str) else emulator.eval()
        config = self.emulator.config
        if not normalised and not config.fluxed:
            raise ValueError("normalised: expected True in the H band, whose emulator has no continuum")
        self.name = emulator if isinstance(emulator, str) else ""
        self.normalised = normalised
        native = self.emulator.wavelength.double().numpy()
        known_power = config.resolving_power or None
        if isinstance(wavelength, Instrument):
            self.wavelength, self.resolving_power = wavelength.wavelength, None
            matrix = wavelength.response(native, known_power)
        else:
            self.wavelength, self.resolving_power = np.asarray(wavelength, np.float64), resolving_power or known_power
            matrix = _resampling(native, known_power, self.wavelength, self.resolving_power)
        used = np.flatnonzero(np.diff(csr_array(matrix).tocsc().indptr))
        self.range = float(native[used[0]]), float(native[used[-1]])
        self.matrix = csr_array(matrix[:, used[0] : used[-1] + 1])
        self._errors: Array | None = None

    def __call__(self, labels: Mapping[str, ArrayLike], errors: Array | None = None) -> Spectra:
        """
        Parameters
        ----------
        labels : mapping of str to array of shape (stars,)
            Labels of the emulator; missing ones are filled in, see [`SpectrumEmulator.synthesize`].
        errors : array of shape (directions, stars, labels), optional
            Errors of the labels, in the order of the emulator: independent directions of one sigma each,
            such as the columns of a Cholesky factor of a covariance.

        Raises
        ------
        ValueError
            For labels outside of the range of the emulator.
        """
        table = self.emulator.label_table(labels)
        self.emulator.check(table)
        size = max(1, PIXELS_AT_ONCE // self.emulator.pixels(self.range).stop)
        parts = [slice(start, start + size) for start in range(0, len(table), size)]
        found = [self._spectra(table[part]) for part in parts]
        flux, continuum = (np.concatenate(each) for each in zip(*found, strict=True))
        variance = (continuum * self._own_error(table)) ** 2
        if errors is not None:
            low, high = self.emulator._range()
            for direction in errors:
                if not direction.any():
                    continue
                for part in parts:
                    upper, lower = ((table[part] + sign * direction[part]).clip(low, high) for sign in (1.0, -1.0))
                    variance[part] += 0.25 * (self._spectra(upper)[0] - self._spectra(lower)[0]) ** 2
        unit = OVER_CONTINUUM if self.normalised else SURFACE
        return Spectra(self.wavelength, flux, np.sqrt(variance), self.resolving_power, unit)

    @torch.no_grad()
    def _spectra(self, table: Array) -> tuple[Array, Array]:
        """Flux on the grid, and the continuum there, 1 for flux over it; (stars, pixels) each."""
        flux, continuum = self.emulator.positive(torch.from_numpy(table), self.range)
        if self.normalised or continuum is None:
            found = self._seen(flux.numpy())
            return found, np.ones_like(found)
        return self._seen((flux * continuum).numpy()), self._seen(continuum.numpy())

    def _seen(self, spectra: Array) -> Array:
        return (self.matrix @ np.asarray(spectra, np.float32).T).T

    def _own_error(self, table: Array) -> Array:
        """That of the emulator, over the continuum, (stars, pixels)."""
        features = self.emulator.standardize(torch.from_numpy(table))[:, :3]
        distance = torch.cdist(features, self.emulator.stars[:, :3].double())
        nearest = distance.topk(min(NEIGHBOURS, distance.shape[1]), largest=False).indices.numpy()
        if self._errors is None:
            self._errors = np.full((distance.shape[1], len(self.wavelength)), np.nan, np.float32)
        missing = np.unique(nearest)
        missing = missing[np.isnan(self._errors[missing, 0])]
        if len(missing):
            wrong = left_out(self.emulator, missing, self.range, normalised=self.normalised)
            self._errors[missing] = self._seen(wrong) ** 2
        known = np.nan_to_num(self._errors)
        share = csr_array(
            (np.full(nearest.size, 1.0 / nearest.shape[1], np.float32), nearest.ravel(),
             np.arange(len(nearest) + 1) * nearest.shape[1]),
            shape=(len(nearest), len(known)),
        )  # fmt: skip
        return ERROR_FACTORS.get(self.name, 1.0) * np.sqrt(share @ known)


@lru_cache(maxsize=4)
def _loaded(name: str) -> SpectrumEmulator:
    """Cached, because the leave-one-out errors of its stars take seconds to compute."""
    return load_emulator(name).eval()


def _resampling(native: Array, known_power: float | None, wavelength: Array, power: float | None) -> csr_array:
    """Means over pixels of a spectrum after a Gaussian that takes it from one resolving power to the other."""
    if wavelength.ndim != 1 or len(wavelength) < 3 or not np.all(np.diff(wavelength) > 0):
        raise ValueError("wavelength: expected at least three increasing numbers, got another array")
    edges, own = pixel_edges(native), pixel_edges(wavelength)
    if own[0] < edges[0] or own[-1] > edges[-1]:
        raise ValueError(
            f"wavelength: expected {native[0]:,.1f} to {native[-1]:,.1f} Angstrom with whole pixels, got "
            f"{wavelength[0]:,.1f} to {wavelength[-1]:,.1f}"
        )
    pixels = np.interp(wavelength, native, np.diff(edges))
    # Without a line spread function, a resolution element is two pixels.
    highest = known_power or float(np.min(wavelength / pixels)) / 2.0
    if power is not None and not 0 < power <= highest * NATIVE_TOLERANCE:
        raise ValueError(
            f"resolving_power: expected at most {highest:,.0f}, the resolving power of the emulator, got {power:g}"
        )
    smoothed = 0.0 if power is None else (wavelength / power / FWHM) ** 2
    smoother = 0.0 if known_power is None else (wavelength / known_power / FWHM) ** 2
    sigma = np.sqrt(np.maximum(smoothed - smoother, 0.0)) * np.ones_like(wavelength)
    return resampling_matrix(edges, np.stack([own[:-1], own[1:]], axis=1), sigma).astype(np.float32)


@torch.no_grad()
def left_out(
    emulator: SpectrumEmulator, stars: Array, wavelength_range: tuple[float, float], *, normalised: bool = True
) -> Array:
    """
    Leave-one-out residuals of an emulator for stars of its grid, over the continuum.

    Parameters
    ----------
    emulator : SpectrumEmulator
    stars : int array of shape (n,)
        Indices in its grid.
    wavelength_range : (float, float)
        Angstrom, vacuum.
    normalised : bool
        Whether the flux is divided by the continuum.

    Returns
    -------
    array of shape (n, pixels)
    """
    pixels, config = emulator.pixels(wavelength_range), emulator.config
    features = (emulator.stars[stars].double() * emulator.scale.double()) + emulator.center.double()
    labels = torch.cat((REFERENCE_TEFF / features[:, :1], features[:, 1:]), dim=1)
    if config.interval_pixels:
        found = _of_intervals(emulator, stars, pixels, continuum=False)
        of_continuum = None if normalised else _of_intervals(emulator, stars, pixels, continuum=True)
    else:
        ((_, wrong),) = _wrong_components(emulator, False)
        parts = (wrong[stars] @ emulator.components).split(config.num_pixels, dim=1)
        found, of_continuum = parts[0][:, pixels], None if normalised else parts[1][:, pixels]
    if of_continuum is not None:
        found = found + of_continuum * emulator(labels, wavelength_range)[0]
    return found.numpy()


def _of_intervals(emulator: SpectrumEmulator, stars: Array, pixels: slice, *, continuum: bool) -> torch.Tensor:
    """(stars, pixels): each star from the regime with the largest weight."""
    size = emulator.config.interval_pixels
    intervals = slice(pixels.start // size, -(-pixels.stop // size))
    inside = slice(pixels.start - intervals.start * size, pixels.stop - intervals.start * size)
    basis = emulator.continuum_basis[intervals] if continuum else emulator.basis[intervals]
    table = basis if continuum else basis * emulator.basis_steps[intervals]
    main = emulator.shares(_teff(emulator)).argmax(dim=1)[stars]
    found = torch.zeros(len(stars), pixels.stop - pixels.start)
    for number, (first, wrong) in enumerate(_wrong_components(emulator, continuum)):
        regimes = emulator.continuum_regimes if continuum else emulator.regimes
        own = cast(Coefficients, regimes[number])
        components = own.components[:, intervals] * own.steps[:, intervals]
        mine = torch.nonzero(main == number)[:, 0]
        for part in mine.split(64):
            coefficients = (wrong[stars[part.numpy()] - first] @ components.flatten(1)).unflatten(
                1, components.shape[1:]
            )
            found[part] = (coefficients.transpose(0, 1) @ table).transpose(0, 1).flatten(1)[:, inside]
    return found


def _teff(emulator: SpectrumEmulator) -> torch.Tensor:
    return REFERENCE_TEFF / (emulator.stars[:, 0].double() * emulator.scale[0] + emulator.center[0])


@lru_cache(maxsize=8)
@torch.no_grad()
def _wrong_components(emulator: SpectrumEmulator, continuum: bool) -> list[tuple[int, torch.Tensor]]:
    """The number of the first star, and weights of components (stars, components), of each regime."""
    stars = emulator.stars.double()
    if not emulator.config.interval_pixels:
        parts = [(0, emulator.groups, stars)]
    else:
        regimes = emulator.continuum_regimes if continuum else emulator.regimes
        parts = [
            (first, cast(Coefficients, regime).groups, stars[first:last])
            for regime, (first, last) in zip(regimes, emulator.config.regime_stars, strict=True)
        ]
    return [
        (first, torch.cat([_without_one(cast(CovarianceGroup, group), own) for group in groups], dim=1).float())
        for first, groups, own in parts
    ]


def _without_one(group: CovarianceGroup, stars: torch.Tensor) -> torch.Tensor:
    """Leave-one-out residuals of the Gaussian processes, (stars, components), float64."""
    covariance, weight = group.covariance(stars, stars), group.weight.double()
    values, vectors = torch.linalg.eigh(covariance)
    noise = _noise(values.clamp(min=0.0), vectors.T @ weight, vectors)
    inverse = (vectors**2 / (values.clamp(min=0.0) + noise)).sum(dim=1)
    return weight / inverse[:, None]


def _noise(values: torch.Tensor, weight: torch.Tensor, vectors: torch.Tensor) -> float:
    """
    Variance of the noise in the fit of the processes, which is not saved: the zero of the derivative of the likelihood.
    Takes eigenvalues and eigenvectors of the covariance, and the weights in their basis.
    """
    low, high = LN_NOISE
    for _ in range(30):
        middle = 0.5 * (low + high)
        total = values + np.exp(middle)
        spread = (vectors @ (total[:, None] * weight)).std(dim=0)
        fit = ((weight / spread) ** 2).sum(dim=0) @ (spread / spread.sum())
        low, high = (middle, high) if fit < (1.0 / total).sum() else (low, middle)
    return float(np.exp(low))


def with_usual_labels(
    emulator: SpectrumEmulator, known: Mapping[str, ArrayLike], errors: Mapping[str, ArrayLike]
) -> tuple[dict[str, Array], Array]:
    """
    All labels of an emulator, with errors, for stars with only some known labels.

    Unknown abundances are those of typical stars with this [Fe/H] and [alpha/Fe], with their scatter.

    Parameters
    ----------
    emulator : SpectrumEmulator
    known, errors : mapping of str to array of shape (stars,)
        `teff`, `logg`, `fe_h` at least; `alpha_m` stands for the mean of `ALPHA_ELEMENTS`.

    Returns
    -------
    labels : dict of str to array of shape (stars,)
    directions : array of shape (directions, stars, labels of the emulator)
        See [`EmulatedSpectra`].
    """
    names, stated = list(emulator.config.label_names), {name: np.asarray(v, float) for name, v in known.items()}
    n_stars = len(stated["teff"])
    alpha = stated.get("alpha_m")
    if alpha is None:
        own = [stated[name] for name in ALPHA_ELEMENTS if name in stated]
        alpha = np.mean(own, axis=0) if own else np.zeros(n_stars)
    usual, scatter, by_alpha = usual_abundances(stated["logg"], stated["fe_h"], alpha, names)
    labels = {name: stated.get(name, usual.get(name, np.zeros(n_stars))) for name in names if name != "vmicro"}
    vmicro = default_vmicro(stated["teff"], stated["logg"])
    labels["vmicro"] = stated.get("vmicro", vmicro)
    directions = []
    for column, name in enumerate(names):
        direction = np.zeros((n_stars, len(names)))
        if name in stated:
            direction[:, column] = errors.get(name, 0.0)
        else:
            direction[:, column] = VMICRO_SCATTER * vmicro if name == "vmicro" else scatter.get(name, 0.0)
        directions.append(direction)
    if "alpha_m" in stated:
        direction = np.zeros((n_stars, len(names)))
        for name, slope in by_alpha.items():
            if name not in stated:
                direction[:, names.index(name)] = slope * np.asarray(errors.get("alpha_m", 0.0))
        directions.append(direction)
    low, high = emulator._range()
    for column, name in enumerate(names):
        if name not in stated:
            labels[name] = np.clip(labels[name], low[column] + 1e-6, high[column] - 1e-6)
    return labels, np.stack(directions)


def emulator_for(wavelength: ArrayLike | Instrument) -> str:
    """
    The bundled emulator that covers wavelengths (Angstrom, vacuum).

    Raises
    ------
    ValueError
        If there is none.
    """
    if isinstance(wavelength, Instrument) and wavelength.emulator:
        return wavelength.emulator
    values = np.asarray(wavelength.wavelength if isinstance(wavelength, Instrument) else wavelength, np.float64)
    ranges = {name: _loaded(name).wavelength[[0, -1]].tolist() for name in EMULATORS}
    for name, (low, high) in ranges.items():
        if low <= values.min() and values.max() <= high:
            return name
    words = " or ".join(f"{low:,.0f} to {high:,.0f}" for low, high in ranges.values())
    raise ValueError(f"wavelength: expected {words} Angstrom, got {values.min():,.1f} to {values.max():,.1f}")
