# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The directions of a [`SpectrumBasis`]: how stars differ, and how labels, velocity and resolution move their flux."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter1d

from ..models.basis_spectrafm import SpectrumBasis
from ..models.evidence_spectrafm import SpectraFMCompletion
from ..models.gate_spectrafm import SPEED_OF_LIGHT
from ..models.refinement_spectrafm import SpectraFMStarModel
from ..models.rungs_spectrafm import FWHM, Rung, interval_matrices
from .survey_grid import SurveyGrid
from .synthetic import SyntheticStars


Array = NDArray[Any]

#: Coefficients of an interval in addition to level and slope. Information that tokens lose:
#: `scripts/paper/token_information.py`.
DIRECTIONS = 30
#: Own pixels that the directions go on beyond their interval, for spectra of a lower resolving power.
MARGIN = 24
#: Width of the prior in units of the spread of the coefficients of the stars that it was measured on.
WIDER = 1.5
#: Steps of the labels for a derivative; differences of this size are kept by the directions.
STEPS = {"teff": 50.0, "logg": 0.1, "vmicro": 0.1}
STEP = 0.05  # dex, of abundances
DERIVATIVES = 3.0  # how much more a derivative counts than the difference of two stars
VELOCITY = 3.0  # km/s that a spectrum may be off the rest frame
BLUR = 0.1  # by which a resolving power may be wrong
WIDER_LINES = 0.02  # by which it is in the unit of the star model
OUTLYING = 4.0  # coefficients of stars beyond, in units of their prior, count as this
WHITENING = 0.6  # the power of the spread of an amplitude that it is divided by
LEAST_NOISE_SCALE = 0.1  # of the spread of ln(1 - reliability) of an interval
POPULATION = 1.5  # how much wider than among synthetic stars the labels of a star may be spread

#: Where the emulator of the optical is accurate. It has no positive flux for some giants below 3,400 K.
XP_LABELS = {"teff": (3500.0, 7000.0)}
#: Gaia XP: intervals that hold about ten resolution elements, on a grid twice as fine as that of the archive's samples.
XP = {"edge": float(np.log(3345.0)), "width": 0.14, "n_intervals": 8, "step": 0.0025}
#: Surveys of the optical at medium resolution: about sixty resolution elements at R = 2,000.
SURVEY = {"edge": float(np.log(3302.0)), "width": 0.03, "n_intervals": 38}
SURVEY_PIXELS, SURVEY_POWER, LEAST_SURVEY_POWER = 3, 5_000.0, 400.0
SURVEY_VELOCITY, SURVEY_MARGIN = 12.0, 100
OBSERVED_POWER = 2_200.0  # of MILES
#: High resolution around the triplet of Ca II (Gaia RVS, RAVE): about sixty resolution elements. Nearly all pixels of a
#: spectrum have to be there: others are read as optical spectra are, and so are those of a resolving power below.
WINDOW = {"edge": float(np.log(8402.0)), "width": 0.0051, "n_intervals": 9}
WINDOW_RANGE, WINDOW_POWER, LEAST_WINDOW_POWER = (8_380.0, 8_818.0), 11_500.0, 5_200.0
WINDOW_INSIDE, WINDOW_ERROR, WINDOW_VELOCITY, WINDOW_MARGIN = 0.9, 0.01, 6.0, 40
#: Bands of O2 and H2O, and the brightest line of the sky, a little wider than they are for stars that move.
AIR = ((5572.0, 5586.0), (6862.0, 6970.0), (7155.0, 7355.0), (7588.0, 7722.0), (8110.0, 8380.0), (8925.0, 9870.0))
#: APOGEE: about a hundred resolution elements.
HBAND = {"edge": float(np.log(15100.0)), "width": 0.0048, "n_intervals": 25}


def make_rung(
    spectra: Array,
    variations: Sequence[tuple[Array, Array, float]],
    *,
    first_interval: int,
    edge: float,
    width: float,
    n_intervals: int,
    start: float,
    step: float,
    resolving_power: float,
    lowest_resolving_power: float,
    over_continuum: bool = False,
    counts_level: bool = True,
    guesses_power: bool = False,
    blind: Sequence[tuple[float, float]] = (),
    observed_power: float = 0.0,
    n_directions: int = DIRECTIONS,
    margin: int = MARGIN,
) -> Rung:
    """
    Intervals of one width.

    Parameters
    ----------
    spectra : array of shape (stars, pixels)
        Noiseless or nearly so, means over pixels that are even in ln wavelength.
    variations : sequence of (array, array, float)
        Pairs of spectra, (stars, pixels) each, whose difference times the number the directions should also describe.
    first_interval, edge, width, start, step, resolving_power, lowest_resolving_power : see [`Rung`]
    over_continuum, counts_level, guesses_power, blind, observed_power : see [`Rung`]
    n_intervals, n_directions : int
    margin : int
        Own pixels that the directions go on beyond their interval.

    Returns
    -------
    Rung
        Intervals without pixels of their own have directions of zero.
    """
    n_pixels = spectra.shape[1]
    position = start + step * np.arange(n_pixels)
    mean = spectra.mean(axis=0)
    size = int(np.ceil(width / step)) + 1 + 2 * margin
    offset = np.zeros(n_intervals, np.int64)
    directions = np.zeros((n_intervals, n_directions, size))
    prior = np.full((n_intervals, n_directions), 1e-6)
    levels, slopes = [], []
    for interval in range(n_intervals):
        low = edge + interval * width
        inside = np.flatnonzero((position >= low) & (position < low + width))
        if inside.size < 3:
            continue
        begin = int(np.clip(inside[0] - margin, 0, max(n_pixels - size, 0)))
        offset[interval] = begin
        window = slice(begin, min(begin + size, n_pixels))
        own = slice(int(inside[0]) - begin, int(inside[-1]) + 1 - begin)
        x = 2.0 * (position[window] - low) / width - 1.0
        trend = np.stack([mean[window], mean[window] * x])

        stars = _shapes(spectra, window, own, trend)
        part = spectra[:, inside] @ np.linalg.pinv(trend[:, own])
        levels.append(np.std(np.log(np.maximum(part[:, 0], 1e-3))))
        slopes.append(np.std(part[:, 1] / np.maximum(part[:, 0], 1e-3)))
        moved = [
            DERIVATIVES * factor * (_shapes(plus, window, own, trend) - _shapes(minus, window, own, trend))
            for plus, minus, factor in variations
        ]
        table = np.concatenate([*moved, stars])
        values, vectors = np.linalg.eigh(table[:, own].T @ table[:, own])
        chosen = np.argsort(values)[::-1][: min(n_directions, inside.size - 2)]
        chosen = chosen[values[chosen] > 1e-12 * values.max()]
        inner = vectors[:, chosen].T
        weights = table[:, own] @ inner.T
        # Beyond the interval: what goes along with the coefficients.
        wide = np.linalg.lstsq(weights, table, rcond=None)[0]
        wide[:, own] = inner
        directions[interval, : len(chosen), : wide.shape[1]] = wide
        spread = np.sqrt(np.mean((stars[:, own] @ inner.T) ** 2, axis=0))
        prior[interval, : len(chosen)] = np.maximum(WIDER * spread, 1e-5)
    return Rung(
        first_interval=first_interval,
        edge=edge,
        width=width,
        start=start,
        step=step,
        resolving_power=resolving_power,
        lowest_resolving_power=lowest_resolving_power,
        mean=mean,
        offset=offset,
        directions=directions,
        prior=prior,
        level_prior=float(WIDER * np.median(levels)),
        slope_prior=float(WIDER * np.median(slopes)),
        over_continuum=over_continuum,
        counts_level=counts_level,
        guesses_power=guesses_power,
        blind=np.array(blind),
        observed_power=observed_power,
    )


def _shapes(flux: Array, window: slice, own: slice, trend: Array) -> Array:
    """What is left of spectra in a window over their level and slope in the interval."""
    part = flux[:, window]
    part = part / (part[:, own] @ trend[0, own] / (trend[0, own] @ trend[0, own]))[:, None]
    factors = np.linalg.lstsq(trend[:, own].T, part[:, own].T, rcond=None)[0]
    return part - factors.T @ trend


def label_variations(stars: SyntheticStars, labels: Mapping[str, Array]) -> list[tuple[Array, Array, float]]:
    """Spectra of the emulator on both sides of `labels`, for each of its labels; stars at the edge are left there."""
    source = stars._stars
    pairs = []
    for name, (low, high) in source.ranges.items():
        step = STEPS.get(name, STEP)
        sides = []
        for sign in (1.0, -1.0):
            moved = {**labels, name: np.clip(labels[name] + sign * step, low, high).astype(np.float32)}
            inside = source.emulator.covers(np.stack([np.asarray(moved[n], float) for n in source.ranges], axis=1))
            moved[name] = np.where(inside, moved[name], labels[name])
            sides.append(source._synthesize(moved)[1].astype(np.float64))
        pairs.append((sides[0], sides[1], 0.5))
    return pairs


def shift_and_blur(
    spectra: Array, step: float, resolving_power: float, blur: float = BLUR, velocity: float = VELOCITY
) -> list[tuple[Array, Array, float]]:
    """Spectra moved by a small velocity in km/s, and blurred a little."""
    pixels = velocity / SPEED_OF_LIGHT / step
    slope = np.gradient(spectra, axis=1) * pixels
    sigma = np.sqrt((1.0 - blur) ** -2.0 - 1.0) / resolving_power / FWHM / step
    blurred = gaussian_filter1d(spectra, sigma, axis=1, mode="nearest")
    return [(spectra + slope, spectra - slope, 0.5), (blurred, spectra, 1.0)]


def hband_rung(first_interval: int, n_stars: int = 300, seed: int = 77, **settings: Any) -> Rung:
    """Intervals of the H band at APOGEE's resolving power, from the bundled emulator; settings as in `make_rung`."""
    stars = SyntheticStars("apogee-apstar", seed=seed)
    labels = stars._stars._labels(n_stars, np.random.default_rng(seed))
    wavelength, flux = stars._stars._synthesize(labels)
    flux = flux.astype(np.float64)
    start, step = float(np.log(wavelength[0])), float(np.log(wavelength[-1] / wavelength[0]) / (len(wavelength) - 1))
    power = float(stars._stars.resolving_power or 22_500.0)
    variations = label_variations(stars, labels) + shift_and_blur(flux, step, power)
    return make_rung(
        flux,
        variations,
        first_interval=first_interval,
        start=start,
        step=step,
        resolving_power=power,
        lowest_resolving_power=3_000.0,
        over_continuum=True,
        **{**HBAND, **settings},  # type: ignore[arg-type]
    )


def survey_grid() -> SurveyGrid:
    """The grid of [`survey_rung`], with the emulator of its stars."""
    return SurveyGrid("emulator-optical", SURVEY_PIXELS, SURVEY_POWER)


def survey_rung(first_interval: int, n_stars: int = 300, seed: int = 77, **settings: Any) -> Rung:
    """Intervals of the optical at medium resolution, from the bundled emulator; settings as in `make_rung`."""
    settings = SURVEY | {"blind": AIR, "observed_power": OBSERVED_POWER, "margin": SURVEY_MARGIN} | settings
    lowest = LEAST_SURVEY_POWER
    return _rung_of(survey_grid(), first_interval, lowest, SURVEY_VELOCITY, n_stars, seed, **settings)


def window_grid() -> SurveyGrid:
    """The grid of [`window_rung`], with the emulator of its stars."""
    return SurveyGrid("emulator-optical", 1, WINDOW_POWER, WINDOW_RANGE)


def window_rung(first_interval: int, n_stars: int = 300, seed: int = 79, **settings: Any) -> Rung:
    """Intervals of high resolution around the triplet of Ca II; settings as in `make_rung`."""
    settings = WINDOW | {"margin": WINDOW_MARGIN} | settings
    rung = _rung_of(window_grid(), first_interval, LEAST_WINDOW_POWER, WINDOW_VELOCITY, n_stars, seed, **settings)
    rung.least_inside, rung.model_error = WINDOW_INSIDE, WINDOW_ERROR
    return rung


def _rung_of(
    grid: SurveyGrid, first_interval: int, lowest: float, velocity: float, n_stars: int, seed: int, **settings: Any
) -> Rung:
    """Intervals of a grid of the optical, from `n_stars` of its emulator; settings as in `make_rung`."""
    labels = grid.labels(n_stars, np.random.default_rng(seed))
    config = grid.emulator.config
    variations = []
    for name, low, high in zip(config.label_names, config.label_minimum, config.label_maximum, strict=True):
        step = STEPS.get(name, STEP)
        sides = [grid.spectra({**labels, name: np.clip(labels[name] + sign * step, low, high)}) for sign in (1.0, -1.0)]
        variations.append((sides[0], sides[1], 0.5))
    flux = grid.spectra(labels).astype(np.float64)
    variations += shift_and_blur(flux, grid.step, grid.resolving_power, velocity=velocity)
    return make_rung(
        flux,
        variations,
        first_interval=first_interval,
        start=grid.start,
        step=grid.step,
        resolving_power=grid.resolving_power,
        lowest_resolving_power=lowest,
        counts_level=False,
        guesses_power=True,
        **settings,
    )


def fill_star_model(star_model: SpectraFMStarModel, rung: Rung, stars: SyntheticStars, n_stars: int = 20_000) -> None:
    """
    Compute the star model of a rung from the emulator of synthetic stars, over whose grid the rung was made.

    Parameters
    ----------
    star_model : SpectraFMStarModel
        Of a configuration with the labels, components and stars of the emulator.
    rung : Rung
    stars : SyntheticStars
    n_stars : int
        Stars that are drawn for mean and covariance of their labels.
    """
    emulator = stars._stars.emulator
    wavelength = emulator.wavelength.double().numpy()
    step = float(np.log(wavelength[-1] / wavelength[0]) / (len(wavelength) - 1))
    spectra = torch.cat([emulator.components, emulator.mean[None]]).double().numpy()
    position = step * np.arange(len(wavelength))
    moved = -CubicSpline(position, spectra, axis=1)(position, 1)  # differences of pixels are too flat
    moved /= SPEED_OF_LIGHT
    wider = shift_and_blur(spectra, step, rung.resolving_power, WIDER_LINES)[1][0]
    changes = np.stack([spectra, moved, wider - spectra])
    components = np.stack([changes[..., pixels] @ matrix.T for pixels, matrix in interval_matrices(rung, wavelength)])
    labels = stars._stars._labels(n_stars, np.random.default_rng(0))
    table = np.stack([np.asarray(labels[name], np.float64) for name in emulator.config.label_names], axis=1)
    config = emulator.config
    with torch.no_grad():
        sigma = np.sqrt((1.0 - WIDER_LINES) ** -2.0 - 1.0) / rung.resolving_power / FWHM
        star_model.velocity_of_width.fill_(sigma * SPEED_OF_LIGHT)
        star_model.spread.copy_(torch.from_numpy(np.pad(rung.prior, ((0, 0), (2, 0)), constant_values=1.0)))
        star_model.center.copy_(emulator.center)
        star_model.scale.copy_(emulator.scale)
        star_model.stars.copy_(emulator.stars)
        star_model.low.copy_(torch.tensor(list(config.label_minimum)))
        star_model.high.copy_(torch.tensor(list(config.label_maximum)))
        standardised = emulator.standardize(torch.from_numpy(table)).numpy()
        star_model.population.copy_(torch.from_numpy(standardised.mean(axis=0)))
        covariance = POPULATION**2 * np.cov(standardised.T)
        star_model.precision.copy_(torch.from_numpy(np.linalg.inv(covariance)))
        # intervals, changes, components, coefficients
        star_model.components.copy_(torch.from_numpy(components.transpose(1, 0, 3, 2)))
        star_model.groups.load_state_dict(emulator.groups.state_dict())


def fill_pixels(completion: SpectraFMCompletion, basis: SpectrumBasis, wavelength: Array) -> None:
    """What coefficients add to the flux at `wavelength` (pixels,), for a completion that is to see it as flux."""
    design = basis.design(np.asarray(wavelength, float))
    table = torch.zeros_like(completion.pixels)
    for interval, pixels, rows in zip(design.intervals, design.pixels, design.rows, strict=True):
        table[interval - completion.first, :, pixels] = rows
    with torch.no_grad():
        completion.pixels.copy_(table)
        completion.level_prior.fill_(design.rung.level_prior)


def fill_completion(completion: SpectraFMCompletion, coefficients: Array, reliability: Array) -> None:
    """
    Compute the principal components of stars over all intervals of a rung, those of their flux where the network sees
    that (after [`fill_pixels`]), and how all is scaled.

    Parameters
    ----------
    completion : SpectraFMCompletion
    coefficients, reliability : arrays of shape (stars, intervals, coefficients)
        Evidence of complete spectra of stars with little noise.
    """
    shape = coefficients.shape[1:]
    known = reliability.reshape(len(reliability), -1).astype(np.float64)
    found = np.clip(coefficients.reshape(len(known), -1) / np.maximum(known, 0.02), -8.0, 8.0)
    center = np.median(found, axis=0)
    metric = np.sqrt(np.maximum(known.mean(axis=0), 1e-3))
    deviation = np.clip((found - center) * metric, -OUTLYING, OUTLYING)
    size = len(completion.spread)
    values, vectors = np.linalg.eigh(deviation.T @ deviation / len(deviation))
    values, vectors = values[::-1][:size], vectors[:, ::-1][:, :size]
    with torch.no_grad():
        completion.center.copy_(torch.from_numpy(center.reshape(shape)))
        completion.metric.copy_(torch.from_numpy(metric.reshape(shape)))
        completion.components.copy_(torch.from_numpy(vectors.reshape(*shape, size).copy()))
        completion.spread.copy_(torch.from_numpy(np.sqrt(np.maximum(values, 1e-4))))
        intervals = completion.first + torch.arange(shape[0])
        chunks = list(zip(_chunks(coefficients), _chunks(reliability), strict=True))
        if completion.num_pixels:
            completed = [completion.compressed_flux(completion.amplitudes(*pair, intervals)[0]) for pair in chunks]
            flux = torch.cat(completed).double()
            completion.flux_center.copy_(flux.mean(dim=0))
            directions = torch.linalg.eigh(torch.cov(flux.T)).eigenvectors.flip(1)
            completion.flux_components.copy_(directions[:, : completion.flux_components.shape[1]])
        parts = [completion.summary(*pair, intervals) for pair in chunks]
        features, unknown = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        completion.noise_middle.copy_(unknown.mean(dim=0))
        completion.noise_scale.copy_(unknown.std(dim=0).clamp(min=LEAST_NOISE_SCALE))
        amplitudes = features.numpy()
        middle = np.median(amplitudes, axis=0)
        spread = 1.4826 * np.median(np.abs(amplitudes - middle), axis=0)
        # Neither as they are, nor all of one size: what differs little among stars is mostly noise.
        scale = spread[0] ** (1.0 - WHITENING) * np.maximum(spread, 1e-3 * spread[0]) ** WHITENING
        completion.middle.copy_(torch.from_numpy(middle))
        completion.scale.copy_(torch.from_numpy(scale))


def _chunks(values: Array) -> list[torch.Tensor]:
    return list(torch.from_numpy(np.ascontiguousarray(values)).split(1000))


def on_even_grid(wavelength: Array, flux: Array, start: float, step: float, n_pixels: int) -> Array:
    """Smooth spectra (stars, pixels) at wavelengths that are even in their logarithm, constant beyond their ends."""
    wanted = np.exp(start + step * np.arange(n_pixels)).clip(wavelength[0], wavelength[-1])
    return CubicSpline(wavelength, flux, axis=1)(wanted)


def xp_rung(first_interval: int, observed: Mapping[str, Array], n_stars: int = 300, seed: int = 78) -> Rung:
    """
    Intervals of Gaia XP, from observed stars and from the derivatives of the bundled emulator by the labels.

    Parameters
    ----------
    observed : mapping
        `wavelength` (stars, pixels) and `flux` of observed training stars, in the schema of `gaia-xp`.
    """
    edge, width, step = XP["edge"], XP["width"], XP["step"]
    start = edge + 0.5 * step
    n_pixels = int(XP["n_intervals"] * width / step)
    wavelength = np.asarray(observed["wavelength"][0], float)
    synthetic = SyntheticStars("gaia-xp", seed=seed, label_ranges=XP_LABELS)
    source = synthetic._stars
    matrix = source.instrument.response(source.native, source.resolving_power)
    labels = source._labels(n_stars, np.random.default_rng(seed))

    def seen(flux):
        found = (matrix @ flux.T).T
        return on_even_grid(wavelength, found / np.median(found, axis=1, keepdims=True), start, step, n_pixels)

    variations = [(seen(a), seen(b), factor) for a, b, factor in label_variations(synthetic, labels)]
    flux = on_even_grid(wavelength, np.asarray(observed["flux"], float), start, step, n_pixels)
    return make_rung(
        flux,
        variations,
        first_interval=first_interval,
        start=start,
        step=step,
        resolving_power=90.0,
        lowest_resolving_power=0.0,
        edge=edge,
        width=width,
        n_intervals=int(XP["n_intervals"]),
    )


def make_basis(observed_xp: Mapping[str, Array]) -> SpectrumBasis:
    """The rungs of this version: Gaia XP and the H band."""
    coarse = xp_rung(0, observed_xp)
    return SpectrumBasis([coarse, hband_rung(coarse.n_intervals)])
