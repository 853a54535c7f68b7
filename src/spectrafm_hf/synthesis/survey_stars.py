# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Synthetic stars of the optical, as what spectrographs of a survey would record of them.

Instruments are drawn on top of the coefficients that synthetic and observed stars have in the intervals of a rung.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ..data.mixture import Columns
from ..models.basis_spectrafm import MODEL_ERROR
from ..models.gate_spectrafm import SPEED_OF_LIGHT
from ..models.rungs_spectrafm import FWHM, Design, Rung
from ..statistics import MAD_TO_SIGMA
from .bad_pixels import draw_snr
from .instruments import extinction_curve
from .random_instruments import interval_modes, least_squares, nearest_in_labels
from .survey_grid import (
    DERIVATIVE_UNITS,
    SurveyGrid,
    as_seen,
    coefficients_of,
    coefficients_of_spectra,
    fit_matrices,
    likely_labels,
)


__all__ = [
    "Faults",
    "Mismatch",
    "SurveyGrid",
    "SurveyStars",
    "as_seen",
    "coefficients_of",
    "coefficients_of_spectra",
    "fit_matrices",
    "likely_labels",
    "strange_spectra",
]

Array = NDArray[Any]
OUTLYING = 4.0  # of the scatter
LAST_KNOWN = 6  # intervals, that those beyond are taken to be like
POWER_ERROR = 0.12  # by which a stated resolving power is off
#: Weak bands of the air and the ranges between its strong ones, which the rung ignores: first and last wavelength
#: (Angstrom, vacuum) and mean depth. Lines of the sky, from where it has them everywhere, and how wide all these are.
AIR_BANDS = (
    (5_880.0, 6_000.0, 0.02),
    (6_278.0, 6_325.0, 0.05),
    (6_465.0, 6_605.0, 0.02),
    (6_970.0, 7_075.0, 0.03),
    (7_355.0, 7_588.0, 0.004),
    (7_722.0, 8_110.0, 0.008),
    (8_380.0, 8_925.0, 0.004),
    (9_870.0, 10_290.0, 0.015),
)
SKY_LINES = (5_891.6, 5_897.6, 6_302.0, 6_365.5, 4_359.6, 5_462.3)
SKY_FROM, KERNEL_POWER = 7_200.0, 1_500.0
WAVE = 0.004  # of the flux: curvature of a continuum or a flux calibration within an interval
BALMER = np.array([6564.6, 4862.7, 4341.7, 4102.9, 3971.2, 3890.2, 3836.5, 3799.0, 3771.7])  # Angstrom
MIXED_LABELS = ("teff", "logg", "fe_h")  # of observed stars, those that count most first
REDDEST, R_V = 1.2, 3.1  # E(B-V) in magnitudes of dust before a star, at most
RISE = 0.02  # of the flux, from the middle of an interval to its end: a flux calibration
SCATTERED = 0.015  # of the continuum: light that is added to all pixels, or taken off


class Mismatch:
    """
    How observed stars differ from synthetic ones of their labels, in coefficients of a rung.

    The mean difference is a smooth function of the labels; the remainder varies from star to star in some
    directions. Of intervals in which no star was observed it is only known that they differ as much as the last ones
    in which some were.

    Parameters
    ----------
    labels : mapping
        `teff`, `logg` and `fe_h` of observed stars.
    difference : array of shape (stars, intervals, coefficients)
        Observed less synthetic, in units of the prior.
    known : bool array of the same shape
    directions : int
        In which the remainder is drawn.
    """

    def __init__(self, labels: Mapping[str, Array], difference: Array, known: Array, directions: int = 60):
        n, *shape = difference.shape
        features = self.features(labels)
        difference, known = difference.reshape(n, -1), known.reshape(n, -1)
        penalty = 2.0 * np.diag(np.arange(features.shape[1]) > 0)
        self.trend = np.zeros((features.shape[1], difference.shape[1]))
        left = np.zeros_like(difference)
        fitted = known.sum(axis=0) > 10 * features.shape[1]
        for i in np.flatnonzero(fitted):
            x, y = features[known[:, i]], difference[known[:, i], i]
            good = np.ones(len(y), bool)
            for _ in range(3):
                self.trend[:, i] = np.linalg.solve(x[good].T @ x[good] + penalty, x[good].T @ y[good])
                rest = y - x @ self.trend[:, i]
                scatter = MAD_TO_SIGMA * np.median(np.abs(rest)) + 1e-6
                good = np.abs(rest) < OUTLYING * scatter
            left[known[:, i], i] = np.clip(rest, -OUTLYING * scatter, OUTLYING * scatter)
        _, size, vectors = np.linalg.svd(left / np.sqrt(n), full_matrices=False)
        self.spread = (size[:directions, None] * vectors[:directions]).astype(np.float32)
        total = np.sqrt(np.mean(np.where(known, difference, 0.0) ** 2, axis=0)).reshape(shape)
        some = fitted.reshape(shape).any(axis=1)
        last = np.flatnonzero(some)[-LAST_KNOWN:]
        self.white = np.where(some[:, None], 0.0, total[last].mean(axis=0)).astype(np.float32)

    @staticmethod
    def features(labels: Mapping[str, Array]) -> Array:
        """Polynomials of second order, (stars, 10)."""
        teff, logg, fe_h = (np.asarray(labels[name], float) for name in ("teff", "logg", "fe_h"))
        x = np.stack([np.clip((teff - 5200.0) / 1000.0, -2.0, 2.5), logg - 3.3, fe_h + 0.3])
        i, j = np.triu_indices(len(x))
        return np.concatenate([np.ones((1, x.shape[1])), x, x[i] * x[j]]).T

    def mean(self, labels: Mapping[str, Array]) -> Array:
        """The mean difference for stars of these labels, (stars, intervals, coefficients), over the level."""
        return (self.features(labels) @ self.trend).reshape(-1, *self.white.shape).astype(np.float32)

    def added_to(self, coefficients: Array, labels: Mapping[str, Array]) -> Array:
        """[`coefficients_of`] synthetic stars, with the mean difference of observed ones added."""
        mean = self.mean(labels)
        changed = coefficients.copy()
        level = coefficients[:, 0, :, :1].astype(np.float32)
        changed[:, 0, :, 2:] = coefficients[:, 0, :, 2:].astype(np.float32) + level * mean[..., 2:]
        return changed

    def drawn(self, n: int, generator: np.random.Generator) -> Array:
        """What varies from star to star, (stars, intervals, coefficients)."""
        size = np.exp(0.3 * generator.standard_normal((n, 1))).astype(np.float32)
        drawn = generator.standard_normal((n, len(self.spread)), dtype=np.float32) * size
        white = self.white * generator.standard_normal((n, *self.white.shape), dtype=np.float32)
        return (drawn @ self.spread).reshape(white.shape) + size[..., None] * white


class Faults:
    """
    What spectrographs and the air make of spectra, in coefficients of a rung over their level: absorption by the air
    that was not removed, or removed too strongly; residuals of the sky; waves and steps of a continuum or a flux
    calibration; light that is added to all pixels.

    Parameters
    ----------
    rung : Rung
    wavelength : array of shape (pixels,)
        Angstrom, of the grid of the rung's emulator.
    resolving_power : float
    """

    def __init__(self, rung: Rung, wavelength: Array, resolving_power: float):
        matrices = fit_matrices(rung, wavelength, resolving_power)
        mean, directions = rung.smoothed(resolving_power)
        self.shape = (rung.n_intervals, 2 + rung.directions.shape[1])

        def coefficients(spectra: Array) -> Array:
            found = np.zeros((len(spectra), *self.shape), np.float32)
            for interval, (pixels, matrix) in enumerate(matrices):
                found[:, interval] = spectra[:, pixels] @ matrix.T
            return found

        position = np.log(wavelength)
        centres, depth, sky = [], [], []
        for low, high, size in (*AIR_BANDS, *((line - 1.0, line + 1.0, 0.0) for line in SKY_LINES)):
            # Several lines each, as wide as the line spread function or wider.
            own = np.arange(np.log(low), np.log(high), 1.0 / min(resolving_power, KERNEL_POWER))
            centres += own.tolist()
            depth += [size] * len(own)
            sky += [4.0 if size == 0 else float(low > SKY_FROM)] * len(own)
        sigma = 1.0 / min(resolving_power, KERNEL_POWER) / FWHM
        kernels = np.exp(-0.5 * ((position - np.array(centres)[:, None]) / sigma) ** 2)
        self.lines = coefficients(kernels * mean).reshape(len(centres), -1)
        self.depth, self.sky = np.array(depth, np.float32), np.array(sky, np.float32)
        number = np.floor((position - rung.edge) / rung.width)
        x = 2.0 * (position - rung.edge - number * rung.width) / rung.width - 1.0
        waves = coefficients(mean * legendre.legvander(x, 3)[:, 2:].T)
        self.waves = waves.transpose(1, 0, 2) * np.array([1.0, 0.6], np.float32)[:, None]
        self.flat = coefficients(np.ones((1, len(position))))[0]
        # What a flux that rises by 1 from the middle of an interval to its end makes of each coefficient.
        self.tilt = np.zeros((rung.n_intervals, self.shape[1], self.shape[1]), np.float32)
        for interval, (pixels, matrix) in enumerate(matrices):
            own = directions[interval][:, pixels - int(rung.offset[interval])] * rung.prior[interval][:, None]
            rows = np.concatenate([[mean[pixels], mean[pixels] * x[pixels] * rung.slope_prior], own])
            self.tilt[interval] = (rows * x[pixels]) @ matrix.T
        middle = np.exp(rung.edge + rung.width * (np.arange(rung.n_intervals) + np.array([[0.0], [0.5], [1.0]])))
        curve = extinction_curve(middle.ravel()).reshape(middle.shape)
        self.dust = -0.5 * 0.4 * np.log(10.0) * R_V * (curve[2] - curve[0])

    def tilted(self, raw: Array, generator: np.random.Generator) -> Array:
        """
        What is added to coefficients (stars, intervals, coefficients) by dust, too much or too little of it taken out,
        and by a flux calibration: lines at the ends of an interval count differently in a flux that rises.
        """
        normal, n = generator.standard_normal, len(raw)
        excess = np.where(generator.random((n, 1)) < 0.5, generator.uniform(-0.3, REDDEST, (n, 1)), 0.0)
        slope = excess * self.dust + RISE * (normal((n, 1)) + normal((n, self.shape[0])))
        return slope[..., None].astype(np.float32) * np.einsum("ntk,tkj->ntj", raw, self.tilt)

    def drawn(self, n: int, generator: np.random.Generator) -> Array:
        """What is added to the coefficients over their level, (stars, intervals, coefficients)."""
        normal = generator.standard_normal
        # The air: as it is, taken out badly, or taken out.
        kind = generator.random((n, 1))
        factor = np.where(kind < 0.5, 1.0, np.where(kind < 0.7, 0.2 * normal((n, 1)), 0.0))
        amount = np.exp(0.6 * normal((n, 1)))
        lines = -factor * amount * self.depth * 0.5 * generator.gamma(2.0, size=(n, len(self.depth)))
        size = np.exp(generator.normal(np.log(0.005), 1.0, (n, 1))) * (generator.random((n, 1)) < 0.5)
        lines = np.maximum(lines, -0.9) + size * self.sky * normal(lines.shape)
        total = (lines.astype(np.float32) @ self.lines).reshape(n, *self.shape)
        wave = np.exp(generator.normal(np.log(WAVE), 0.9, (n, 1, 1)))
        stepped = generator.integers(10 * self.shape[0], size=n)[:, None] // 10 == np.arange(self.shape[0])
        stepped &= generator.random((n, 1)) < 0.2
        drawn = normal((n, self.shape[0], 2)) * np.where(stepped[..., None], 8.0, 1.0) * wave
        total += np.einsum("ntw,twk->ntk", drawn.astype(np.float32), self.waves)
        return total


def strange_spectra(wavelength: Array, n: int, generator: np.random.Generator, hydrogen: Array = BALMER) -> Array:
    """
    Spectra (n, pixels) over their continuum that are unlike the training stars: no or weak lines and waves of a
    calibration, wide lines of hydrogen as of white dwarfs and hot stars, emission lines, a forest of anything. The
    lines of hydrogen are in Angstrom, vacuum, the strongest first.
    """
    position = np.log(wavelength)
    found = np.ones((n, len(wavelength)))

    def shapes(centres: Array, widths: Array) -> Array:
        """(lines, pixels), Gaussian and Lorentzian by halves."""
        x = (position - np.log(centres)[:, None]) / widths[:, None]
        return 0.5 * np.exp(-0.5 * x**2) + 0.5 / (1.0 + x**2)

    for spectrum, kind in zip(found, generator.integers(4, size=n), strict=True):
        if kind in (0, 1):
            for _ in range(generator.integers(1, 4)):
                period = np.exp(generator.uniform(np.log(0.004), np.log(0.6)))
                size = np.exp(generator.normal(np.log(0.03), 1.0))
                wave = np.sin(2.0 * np.pi * position / period + generator.uniform(0.0, 2.0 * np.pi))
                spectrum *= 1.0 + min(size, 0.4) * wave
        if kind == 1:
            width = np.exp(generator.uniform(np.log(5e-4), np.log(1.5e-2)))
            depth = generator.uniform(0.05, 0.9) * generator.uniform(0.6, 1.0) ** np.arange(len(hydrogen))
            spectrum *= 1.0 - depth @ shapes(hydrogen, np.full(len(hydrogen), width))
        elif kind == 2:
            centres = generator.uniform(wavelength[0], wavelength[-1], generator.integers(2, 15))
            widths = np.exp(generator.uniform(np.log(3e-4), np.log(2e-2))) * np.ones(len(centres))
            spectrum += np.exp(generator.normal(np.log(0.3), 1.0, len(centres))) @ shapes(centres, widths)
        elif kind == 3:
            pixels = np.exp(generator.uniform(np.log(3e-4), np.log(1e-2))) / np.median(np.diff(position))
            forest = gaussian_filter1d(generator.standard_normal(len(position)), pixels)
            spectrum += generator.uniform(0.03, 0.25) * forest / forest.std()
    return found.clip(0.02, None).astype(np.float32)


class SurveyStars:
    """
    Tokens of stars as spectrographs would record them, drawn without their pixels: noise is the same in all pixels of
    an interval.

    Parameters
    ----------
    rung : Rung
    coefficients : array of shape (stars, 3, intervals, coefficients)
        See [`coefficients_of`].
    known : Columns
        Labels of the stars and their errors.
    designs : sequence of Design
        Of the grids of the rung that spectra may have.
    powers : sequence of float
        Resolving power of each design.
    seen : bool array of shape (stars, intervals), optional
        Intervals in which the star is known.
    mismatch : Mismatch, optional
        What of it varies from star to star is added.
    faults : Faults, optional
        Added as well.
    mixed : float
        Share of the stars that are the sum of a star and less of one of those with nearly the same labels, so that a
        few observed ones are not learnt by heart so soon.
    """

    def __init__(
        self,
        rung: Rung,
        coefficients: Array,
        known: Columns,
        designs: Sequence[Design],
        powers: Sequence[float],
        seen: Array | None = None,
        mismatch: Mismatch | None = None,
        faults: Faults | None = None,
        mixed: float = 0.0,
    ):
        self.neighbours = nearest_in_labels(known, MIXED_LABELS) if mixed else None
        self.mixed = mixed
        self.rung, self.coefficients, self.labels = rung, coefficients, known
        self.seen = np.ones(coefficients.shape[::2][:2], bool) if seen is None else seen
        self.mismatch, self.faults = mismatch, faults
        self.modes = []
        often = self.seen.mean(axis=0) > 0.5
        for design in designs:
            tells = np.array([bool(rows.any()) for rows in design.rows])  # of others, all pixels are in ignored bands
            own = design.intervals[tells] - rung.first_interval
            values, vectors = (part[torch.from_numpy(tells)] for part in interval_modes(design))
            self.modes.append((own, (values, vectors)))
        known_in = [bool(often[own].any()) for own, _ in self.modes]  # of others, a batch would teach nothing
        self.modes = [modes for modes, kept in zip(self.modes, known_in, strict=True) if kept]
        self.powers = [power for power, kept in zip(powers, known_in, strict=True) if kept]

    def truth(self, coefficients: Array, power: float, generator: np.random.Generator) -> Array:
        """
        Coefficients (stars, 3, intervals, K), as of [`coefficients_of`], over their level, of stars that are moved and
        blurred a little, (stars, intervals, K).
        """
        n = len(coefficients)
        velocity = generator.standard_normal(n) * np.where(generator.random(n) < 0.2, 20.0, 4.0)
        moved = -velocity / SPEED_OF_LIGHT
        # A resolving power is stated for all of a spectrum, and changes along it.
        wrong = POWER_ERROR * generator.standard_normal((n, 1)) + 0.5 * POWER_ERROR * (
            generator.standard_normal((n, 1)) * np.linspace(-1.7, 1.7, self.rung.n_intervals)
        )
        width = (1.0 + np.clip(wrong, -0.25, 0.4)) / power / FWHM
        rotation = np.where(generator.random(n) < 0.3, 80.0 * generator.random(n), 5.0) / SPEED_OF_LIGHT
        variance = width**2 - (1.0 / power / FWHM) ** 2 + 0.2 * rotation[:, None] ** 2
        orders = [np.ones_like(variance), np.broadcast_to(moved[:, None], variance.shape)]
        change = np.stack([*orders, 0.5 * (moved[:, None] ** 2 + variance)], axis=1).astype(np.float32)
        change *= np.array(DERIVATIVE_UNITS, np.float32)[:, None]
        raw = np.einsum("not,notk->ntk", change, coefficients.astype(np.float32))
        if self.faults is not None:
            light = SCATTERED * generator.standard_normal((n, 1, 1)).astype(np.float32)
            raw += light * (self.faults.flat - raw)
            raw += self.faults.tilted(raw, generator)
        raw[..., 1:] /= np.maximum(raw[..., :1], 0.02)
        raw[..., 0] = 0.0
        return raw

    def draw(self, n: int, generator: np.random.Generator, snr: float | None = None, whole: bool = False) -> Columns:
        """
        Inputs of the model, as [`evidence_inputs`] makes them, with labels; with a signal-to-noise ratio that is
        the same for all, and with all known intervals, on request.
        """
        raw, known, complete = self._chosen(generator.integers(len(self.coefficients), size=n), generator)
        number = int(generator.integers(len(self.modes)))
        own, modes = self.modes[number]
        wanted = self.truth(raw, self.powers[number], generator)
        for source in (self.mismatch, self.faults):
            if source is not None:
                wanted += source.drawn(n, generator)
        wanted[..., 0] = 0.0
        wanted[..., 1] += generator.standard_normal(wanted.shape[:2]) * 0.2 / self.rung.slope_prior
        true = torch.from_numpy(np.ascontiguousarray(wanted[:, own]))
        drawn_snr = draw_snr(n, generator) if snr is None else np.full(n, snr, np.float32)
        trend = generator.standard_normal((n, 1, 3)) * (0.6, 0.3, 0.2)
        shape = np.exp(trend @ legendre.legvander(np.linspace(-1, 1, self.rung.n_intervals), 3)[own, 1:].T)
        variance = torch.from_numpy((shape[:, 0] / drawn_snr[:, None]).astype(np.float32)) ** 2 + MODEL_ERROR**2
        noise = torch.from_numpy(generator.standard_normal(true.shape, dtype=np.float32))
        coefficients, covariance, _ = least_squares(modes, true, variance, noise)
        reliability = (1.0 - covariance).clamp(0.0, 1.0)
        seen = complete[:, own]
        if not whole:
            seen = seen & self._seen(n, own, generator)
        hidden = ~torch.from_numpy(seen)
        coefficients[hidden], reliability[hidden] = 0.0, 0.0
        coefficients[..., :2], reliability[..., :2] = 0.0, 0.0
        return known | {
            "coefficients": coefficients.numpy(),
            "reliability": reliability.numpy(),
            "interval_ids": np.broadcast_to(own + self.rung.first_interval, seen.shape),
            "seen": seen,
        }

    def _chosen(self, stars: Array, generator: np.random.Generator) -> tuple[Array, Columns, Array]:
        """Coefficients, labels and known intervals of stars (n,), of which some are mixed."""
        raw, complete = self.coefficients[stars], self.seen[stars]
        known = {name: values[stars] for name, values in self.labels.items()}
        if self.neighbours is not None:
            n = len(stars)
            other = self.neighbours[stars, generator.integers(self.neighbours.shape[1], size=n)]
            part = (generator.uniform(0.0, 0.5, n) * (generator.random(n) < self.mixed)).astype(np.float32)
            wide = part[:, None, None, None]
            raw = (1.0 - wide) * raw + wide * self.coefficients[other]
            complete = complete & (self.seen[other] | (part == 0)[:, None])
            for name in MIXED_LABELS:
                known[name] = (1.0 - part) * known[name] + part * self.labels[name][other]
        return raw, known, complete

    @staticmethod
    def _seen(n: int, own: Array, generator: np.random.Generator) -> Array:
        """(stars, intervals): all, a range, or all but a range."""
        seen = np.ones((n, len(own)), bool)
        for star in np.flatnonzero(generator.random(n) < 0.6):
            width = int(np.exp(generator.uniform(np.log(2), np.log(len(own) + 1))))
            first = int(generator.integers(-width // 2, len(own) - 1))
            inside = np.zeros(len(own), bool)
            inside[max(first, 0) : max(first + width, 2)] = True
            seen[star] = inside if generator.random() < 0.65 or inside.mean() > 0.6 else ~inside
        return seen
