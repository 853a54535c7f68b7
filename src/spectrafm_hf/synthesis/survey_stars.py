# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Synthetic stars of the optical, as what spectrographs of a survey would record of them.

The emulator gives spectra without a line spread function. Here they are brought to the grid of a rung of the basis, and
to the coefficients of its intervals, once for all; instruments are drawn on top of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ..data.mixture import Columns
from ..models import SpectrumEmulator, default_vmicro
from ..models.basis_spectrafm import FWHM, MODEL_ERROR, PIXELS, Design, Rung, half_widths, means_over_pixels
from ..models.gate_spectrafm import SPEED_OF_LIGHT
from ..statistics import MAD_TO_SIGMA
from .labels import draw_optical_labels
from .random_instruments import interval_modes, least_squares
from .spoiling import draw_snr
from .synthetic import ALPHA_ELEMENTS, load_emulator


Array = NDArray[Any]
AT_ONCE = 250  # spectra in memory
OUTLYING = 4.0  # of the scatter
BLUR_LEVELS = 8  # widths of a line spread function that changes along a spectrum, between which flux is interpolated
LAST_KNOWN = 6  # intervals, that those beyond are taken to be like
POWER_ERROR = 0.12  # by which a stated resolving power is off
#: Weak bands of the air and what lies between its strong ones, which the rung is blind to: first and last wavelength
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
SCATTERED = 0.015  # of the continuum: light that is added to all pixels, or taken off


class SurveyGrid:
    """
    The grid of a rung over the optical: so many pixels of the emulator in one, at a resolving power.

    Parameters
    ----------
    emulator : str or SpectrumEmulator
    pixels : int
        Of the emulator in one of this grid.
    resolving_power : float
        Wavelength / FWHM of a Gaussian line spread function; infinite for none.
    """

    def __init__(self, emulator: str | SpectrumEmulator, pixels: int, resolving_power: float):
        self.emulator = load_emulator(emulator).eval()
        self.pixels, self.resolving_power = pixels, resolving_power
        native = self.emulator.wavelength.double().numpy()
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
                flux = self.emulator(torch.from_numpy(table[start : start + AT_ONCE]))[0].numpy()
            if np.isfinite(self.resolving_power):
                sigma = 1.0 / self.resolving_power / FWHM / self.native_step
                flux = gaussian_filter1d(flux, sigma, axis=1, mode="nearest")
            yield flux[:, : self.size * self.pixels].reshape(len(flux), self.size, self.pixels).mean(axis=2)

    @staticmethod
    def known(labels: dict[str, Array]) -> Columns:
        """Columns of labels and their errors, which are none."""
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
    spectrum of a lower resolving power: what least squares finds with hardly any noise. Level, slope and directions,
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


class Mismatch:
    """
    How observed stars differ from synthetic ones of their labels, in coefficients of a rung.

    The mean difference is a smooth function of the labels; what is left of it varies from star to star in some
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
        In which what is left is drawn.
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

    def added_to(self, coefficients: Array, labels: Mapping[str, Array]) -> Array:
        """[`coefficients_of`] synthetic stars, with the mean difference of observed ones added."""
        n, _, intervals, size = coefficients.shape
        mean = (self.features(labels) @ self.trend).reshape(n, intervals, size).astype(np.float32)
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
    that nobody took out, or too much of it; what is left of the sky; waves and steps of a continuum or a flux
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
        mean, _ = rung.smoothed(resolving_power)
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


def strange_spectra(wavelength: Array, n: int, generator: np.random.Generator) -> Array:
    """
    Spectra (n, pixels) over their continuum of what is no star of the training: none or hardly any lines and waves of a
    calibration, wide lines of hydrogen as of white dwarfs and hot stars, emission lines, a forest of anything.
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
            depth = generator.uniform(0.05, 0.9) * generator.uniform(0.6, 1.0) ** np.arange(len(BALMER))
            spectrum *= 1.0 - depth @ shapes(BALMER, np.full(len(BALMER), width))
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
    ):
        self.rung, self.coefficients, self.labels, self.powers = rung, coefficients, known, list(powers)
        self.seen = np.ones(coefficients.shape[::2][:2], bool) if seen is None else seen
        self.mismatch, self.faults = mismatch, faults
        self.modes = []
        for design in designs:
            tells = np.array([bool(rows.any()) for rows in design.rows])  # of others, all pixels lie in blind bands
            values, vectors = (part[torch.from_numpy(tells)] for part in interval_modes(design))
            self.modes.append((design.intervals[tells] - rung.first_interval, (values, vectors)))

    def truth(self, stars: Array, power: float, generator: np.random.Generator) -> Array:
        """Coefficients over their level of stars that are moved and blurred a little, (stars, intervals, K)."""
        n = len(stars)
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
        raw = np.einsum("not,notk->ntk", change, self.coefficients[stars].astype(np.float32))
        if self.faults is not None:
            light = SCATTERED * generator.standard_normal((n, 1, 1)).astype(np.float32)
            raw += light * (self.faults.flat - raw)
        raw[..., 1:] /= np.maximum(raw[..., :1], 0.02)
        raw[..., 0] = 0.0
        return raw

    def draw(self, n: int, generator: np.random.Generator, snr: float | None = None, whole: bool = False) -> Columns:
        """
        Inputs of the model, as [`evidence_inputs`] makes them, labels beside them; with a signal-to-noise ratio that is
        the same for all, and with all intervals that are known, where this is asked for.
        """
        stars = generator.integers(len(self.coefficients), size=n)
        number = int(generator.integers(len(self.modes)))
        own, modes = self.modes[number]
        wanted = self.truth(stars, self.powers[number], generator)
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
        seen = self.seen[stars][:, own]
        if not whole:
            seen = seen & self._seen(n, own, generator)
        hidden = ~torch.from_numpy(seen)
        coefficients[hidden], reliability[hidden] = 0.0, 0.0
        coefficients[..., :2], reliability[..., :2] = 0.0, 0.0
        known = {name: values[stars] for name, values in self.labels.items()}
        return known | {
            "coefficients": coefficients.numpy(),
            "reliability": reliability.numpy(),
            "interval_ids": np.broadcast_to(own + self.rung.first_interval, seen.shape),
            "seen": seen,
        }

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
