# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
How well stellar labels can be known at best: the Cramer-Rao bound of spectra that an emulator makes.

The spectrum of a star is a known function of its labels, plus Gaussian noise of known size. The covariance of any
unbiased estimate is then at least the inverse of the Fisher matrix J W J^T + P. J holds the derivatives of the pixels
with respect to the labels, W the inverse variances of the pixels, P those of the priors.

All labels of the emulator are free. So are the effects of the instrument that no column states: extinction, tilt, and
the level of the flux unless it is divided by the continuum.

Noise counts as independent from pixel to pixel. For an instrument with correlated noise (`gaia-xp`), the bound is that
of independent noise of the same errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from ..models import SpectrumEmulator
from ..statistics import MAD_TO_SIGMA
from .binned import emulator_for
from .instruments import Instrument, extinction_curve
from .labels import LABEL_NAMES, draw_labels, draw_optical_labels
from .synthetic import ALPHA_ELEMENTS, without_flux


Array = NDArray[Any]

#: One sigma of the weak priors, in the units of the labels; `OTHER_PRIOR` for all labels that are not named.
PRIORS: dict[str, float] = {"teff": 10_000.0, "logg": 5.0}
OTHER_PRIOR = 3.0
#: Parameters other than labels: A(V) in magnitudes, and the natural logarithm of the level of the flux.
EXTINCTION_PRIOR, LEVEL_PRIOR = 10.0, 10.0
#: First part of the seed of held-out stars, after the seed itself: no stream and no file of synthetic stars has it.
HELD_OUT = 17
CHUNK = 64  # stars whose derivatives are computed at once
DRAWN = 500  # held-out stars drawn at once, before those out of range are left out


def cramer_rao(jacobian: ArrayLike, ivar: ArrayLike, prior: ArrayLike) -> Array:
    """
    Least covariance of labels that are estimated from pixels with independent Gaussian noise.

    Parameters
    ----------
    jacobian : array, shape (..., labels, pixels)
        Derivative of each pixel with respect to each label.
    ivar : array, shape (..., pixels)
        Inverse variance of the noise; 0 = the pixel is not used.
    prior : array, shape (labels,)
        One sigma of a Gaussian prior of each label, in its unit. Weak ones keep the matrix invertible.

    Returns
    -------
    array, shape (..., labels, labels), float64
        The square roots of its diagonal are the bounds of the labels.

    Raises
    ------
    ValueError
        If the shapes do not fit, a derivative is not finite, or an inverse variance or a prior is not possible.
    """
    jacobian, ivar, prior = (np.asarray(values, np.float64) for values in (jacobian, ivar, prior))
    n_labels, n_pixels = jacobian.shape[-2:]
    if ivar.shape[-1] != n_pixels:
        raise ValueError(f"ivar: expected {n_pixels} pixels as in jacobian, got shape {ivar.shape}")
    if prior.shape != (n_labels,) or not np.all(np.isfinite(prior) & (prior > 0)):
        raise ValueError(f"prior: expected {n_labels} positive numbers, got {prior.tolist()}")
    if not np.isfinite(jacobian).all():
        raise ValueError("jacobian: expected finite numbers, got others")
    if not np.all(np.isfinite(ivar) & (ivar >= 0)):
        raise ValueError("ivar: expected finite numbers of at least 0, got others")
    weighted = jacobian * np.sqrt(ivar)[..., None, :]
    fisher = weighted @ np.swapaxes(weighted, -1, -2) + np.diag(prior**-2)
    # Labels have different units: with a diagonal of 1 the inverse does not lose digits to that.
    scale = 1 / np.sqrt(np.diagonal(fisher, axis1=-2, axis2=-1))
    scales = scale[..., :, None] * scale[..., None, :]
    covariance: Array = np.linalg.inv(fisher * scales) * scales
    return covariance


def label_weights(names: Sequence[str], label: str) -> Array:
    """
    Factors of the parameters `names` whose sum is `label`, shape (parameters,): `alpha_m` is a mean of elements.

    Raises
    ------
    ValueError
        If the parameters do not determine that label.
    """
    parts = ALPHA_ELEMENTS if label == "alpha_m" else (label,)
    if missing := [part for part in parts if part not in names]:
        raise ValueError(f"label: expected one that follows from {list(names)}, got {label!r} without {missing}")
    return np.array([(name in parts) / len(parts) for name in names])


def label_bound(covariance: Array, names: Sequence[str], label: str) -> Array:
    """Bound of one label, shape (...), from covariances of the parameters `names`, shape (..., parameters, ...)."""
    weights = label_weights(names, label)
    bound: Array = np.sqrt(np.einsum("i,...ij,j->...", weights, covariance, weights))
    return bound


def expected_scatter(sigma: ArrayLike) -> float:
    """
    1.4826 times the median of the absolute residual where the residual of each star is Gaussian with its own sigma.

    That is what the scatter of a table would be if every star were at its bound; NaN for no stars.
    """
    sigma = np.asarray(sigma, np.float64)
    if not sigma.size:
        return math.nan
    low, high = 0.0, 2 * float(sigma.max())
    for _ in range(60):  # bisection of the median
        middle = (low + high) / 2
        below = float(np.mean(erf(middle / (math.sqrt(2) * sigma)))) < 0.5
        low, high = (middle, high) if below else (low, middle)
    return MAD_TO_SIGMA * (low + high) / 2


# --------------------------------------------------------------------------------------------------------------- stars


def held_out_labels(
    emulator: SpectrumEmulator,
    n: int,
    seed: int,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    part: int = 0,
) -> Array:
    """
    Labels of synthetic stars that are held out from every training, for any seed.

    Parameters
    ----------
    emulator : SpectrumEmulator
    n : int
    seed : int
    ranges : mapping of label to (lowest, highest), optional
        Stars beyond are left out. The others are distributed as synthetic training stars are.
    part : int
        Another part of the same seed holds other stars.

    Returns
    -------
    array, shape (n, labels), float64
        In the order of `emulator.config.label_names`.

    Raises
    ------
    ValueError
        For a negative seed, no stars, an unknown label, or ranges with almost no stars.
    """
    for field, number, least in (("seed", seed, 0), ("part", part, 0), ("stars", n, 1)):
        if number < least:
            raise ValueError(f"{field}: expected at least {least}, got {number}")
    config = emulator.config
    limits = zip(config.label_minimum, config.label_maximum, strict=True)
    full = dict(zip(config.label_names, limits, strict=True))
    for name, (low, high) in (ranges or {}).items():
        if name not in full:
            raise ValueError(f"ranges: expected labels out of {list(full)}, got {name!r}")
        if not low < high:
            raise ValueError(f"ranges: expected the lower limit of {name} first, got {low:g} to {high:g}")
    generator = np.random.default_rng([seed, HELD_OUT, part])
    kept, drawn = np.empty((0, len(full))), 0
    optical = set(full) > set(LABEL_NAMES)
    while len(kept) < n:
        if drawn > 100 * (n + 100):
            raise ValueError(f"ranges: expected some that hold stars of the emulator, got {dict(ranges or {})}")
        stars = draw_optical_labels(DRAWN, generator) if optical else draw_labels(DRAWN, generator, full)
        drawn += DRAWN
        table = np.stack([stars[name] for name in full], axis=1)
        for name, (low, high) in (ranges or {}).items():
            column = table[:, list(full).index(name)]
            table = table[(column >= low) & (column <= high)]
        table = table[emulator.covers(table)]
        kept = np.concatenate([kept, table[~without_flux(emulate(emulator, table)[0])]])
    return kept[:n]


def emulate(
    emulator: SpectrumEmulator,
    table: Array,
    *,
    derivatives: bool = False,
    normalized: bool = True,
    wavelength_range: tuple[float, float] | None = None,
) -> tuple[Array, Array | None]:
    """
    Spectra and, on request, their derivatives with respect to all labels.

    Parameters
    ----------
    table : array, shape (stars, labels)
        In the order of `emulator.config.label_names`.
    derivatives : bool
        They are exact (automatic differentiation): there is no step size to choose.
    normalized : bool
        Divide by the continuum; always the case for an emulator without a continuum.
    wavelength_range : (float, float), optional
        Angstrom, vacuum: only these pixels.

    Returns
    -------
    flux : array, shape (stars, pixels), float32
    derivative : array, shape (stars, labels, pixels), float32, or None
    """

    def spectrum(labels: torch.Tensor) -> torch.Tensor:
        flux, continuum = emulator(labels, wavelength_range)
        return flux if normalized or continuum is None else flux * continuum

    pixels = emulator.pixels(wavelength_range)
    fluxes, slopes = [np.empty((0, pixels.stop - pixels.start), np.float32)], []
    for start in range(0, len(table), CHUNK):
        labels = torch.as_tensor(table[start : start + CHUNK], dtype=torch.float64)
        with torch.no_grad():
            fluxes.append(spectrum(labels).float().numpy())
        if derivatives:
            directions = [one.expand_as(labels) for one in torch.eye(labels.shape[1], dtype=torch.float64)]
            parts = [torch.autograd.functional.jvp(spectrum, labels, direction)[1] for direction in directions]
            slopes.append(torch.stack(parts, dim=1).float().numpy())
    return np.concatenate(fluxes), np.concatenate(slopes) if slopes else None


@dataclass(frozen=True)
class Observed:
    """
    What an instrument records of some stars before noise, and the derivatives by the unknown parameters.

    Attributes
    ----------
    names : tuple of str
        Parameters: the labels of the emulator, then `a_v`, `tilt_1` ... and `level`, as the instrument has them.
    prior : array, shape (parameters,)
        One sigma.
    flux : array, shape (stars, pixels), float32
    jacobian : array, shape (stars, parameters, pixels), float32; None without `derivatives`
    """

    names: tuple[str, ...]
    prior: Array
    flux: Array
    jacobian: Array | None


def observe(
    instrument: Instrument,
    emulator: SpectrumEmulator,
    table: Array,
    generator: np.random.Generator,
    *,
    derivatives: bool = True,
    priors: Mapping[str, float] | None = None,
) -> Observed:
    """
    Observe stars without noise.

    Parameters
    ----------
    instrument : Instrument
        Extinction and tilt of each star are drawn, and count as unknown: the prior of the tilt is its distribution,
        that of A(V) is weak. The flux is not divided by its median, whose only effect, that the level is
        unknown, is the parameter `level`.
    emulator : SpectrumEmulator
    table : array, shape (stars, labels)
    generator : numpy.random.Generator
    derivatives : bool
    priors : mapping of label to one sigma, optional
        Instead of `PRIORS` and `OTHER_PRIOR`.

    Raises
    ------
    ValueError
        As `Instrument.response` does, or for an unknown label.
    """
    labels = list(emulator.config.label_names)
    if unknown := [name for name in priors or {} if name not in labels]:
        raise ValueError(f"prior: expected labels out of {labels}, got {unknown[0]!r}")
    sigmas = {**dict.fromkeys(labels, OTHER_PRIOR), **PRIORS, **(priors or {})}
    emulator, wavelength_range = emulator_for(emulator, instrument)
    wavelength = emulator.wavelength[emulator.pixels(wavelength_range)].double().numpy()
    matrix = instrument.response(wavelength, emulator.config.resolving_power or None)
    continuum = instrument.normalisation == "continuum"
    flux, slopes = emulate(
        emulator, table, derivatives=derivatives, normalized=continuum, wavelength_range=wavelength_range
    )

    def pixels(spectra: Array) -> Array:
        product = matrix @ spectra.reshape(-1, spectra.shape[-1]).T
        return np.ascontiguousarray(product.T).reshape(*spectra.shape[:-1], -1)

    own, n_stars = instrument.wavelength, len(table)
    unknown_parts: dict[str, tuple[float, Array]] = {}
    if instrument.extinction:
        curve = extinction_curve(wavelength)
        a_v = instrument.extinction.draw(generator, n_stars)
        dimmed = (10 ** (-0.4 * np.outer(a_v, curve))).astype(np.float32)
        flux = flux * dimmed
        if slopes is not None:
            slopes = slopes * dimmed[:, None]
            unknown_parts["a_v"] = (EXTINCTION_PRIOR, pixels(flux * (-0.4 * math.log(10) * curve).astype(np.float32)))
    clean = pixels(flux)
    jacobian = None if slopes is None else pixels(slopes)
    if instrument.tilt:
        amplitude, degree = instrument.tilt
        polynomials = legendre.legvander(np.interp(own, own[[0, -1]], [-1, 1]), degree)[:, 1:].T
        tilted = np.exp(amplitude * generator.standard_normal((n_stars, degree)) @ polynomials).astype(np.float32)
        clean = clean * tilted
        if jacobian is not None:
            jacobian = jacobian * tilted[:, None]
            unknown_parts = {name: (sigma, slope * tilted) for name, (sigma, slope) in unknown_parts.items()}
            if amplitude:
                for i, polynomial in enumerate(polynomials, start=1):
                    unknown_parts[f"tilt_{i}"] = (amplitude, clean * polynomial.astype(np.float32))
    if jacobian is not None and not continuum:
        unknown_parts["level"] = (LEVEL_PRIOR, clean)
    if jacobian is not None:
        jacobian = np.concatenate([jacobian, *(slope[:, None] for _, slope in unknown_parts.values())], axis=1)
    prior = [sigmas[name] for name in labels] + [sigma for sigma, _ in unknown_parts.values()]
    return Observed((*labels, *unknown_parts), np.array(prior), clean, jacobian)


def pixel_errors(instrument: Instrument, flux: Array, snr: ArrayLike, *, white: bool = False) -> Array:
    """
    One sigma of each pixel, shape (stars, pixels), float32, so that the median of flux / error is `snr`.

    Parameters
    ----------
    flux : array, shape (stars, pixels)
        Without noise.
    snr : float or array of shape (stars,)
    white : bool
        The same error in all pixels of a star, instead of the shape that the instrument has.
    """
    snrs = np.broadcast_to(np.asarray(snr, np.float64), (len(flux),))
    if not np.all(np.isfinite(snrs) & (snrs > 0)):
        raise ValueError(f"snr: expected positive numbers, got {snrs[~(np.isfinite(snrs) & (snrs > 0))][0]}")
    if not white:
        return instrument.noise.errors(instrument.wavelength, flux, snrs)
    errors = np.median(flux, axis=1) / snrs
    return np.repeat(errors[:, None], flux.shape[1], axis=1).astype(np.float32)
