# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Synthetic stars of the optical, as what spectrographs of a survey would record of them.

The emulator gives spectra without a line spread function. Here they are brought to the grid of a rung of the basis, and
to the coefficients of its intervals, once for all; instruments are drawn on top of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ..metrics import MAD_TO_SIGMA
from ..models import SpectrumEmulator, default_vmicro
from ..models.basis_spectrafm import FWHM, MODEL_ERROR, Design, Rung, interval_matrices
from ..models.gate_spectrafm import SPEED_OF_LIGHT
from ..synthesis.labels import draw_optical_labels
from .mixture import Columns
from .random_instruments import draw_snr, interval_modes, least_squares
from .synthetic import ALPHA_ELEMENTS, load_emulator


Array = NDArray[Any]
AT_ONCE = 250  # spectra in memory
OUTLYING = 4.0  # of the scatter


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
_SECOND = np.array([2.0, -27.0, 270.0, -490.0, 270.0, -27.0, 2.0]) / 180.0


def coefficients_of(grid: SurveyGrid, rung: Rung, labels: dict[str, Array]) -> Array:
    """
    Level, slope and directions of stars in each interval, before anything is divided by the level, and how they change
    with a shift and with a blur: (stars, 3, intervals, 2 + directions), in half precision.
    """
    matrices = interval_matrices(rung, grid.wavelength)
    parts = []
    for flux in grid.in_parts(labels):
        wide = np.pad(flux, ((0, 0), (3, 3)), mode="edge")
        found = np.zeros((len(flux), 3, rung.n_intervals, 2 + rung.directions.shape[1]), np.float16)
        for order, weights in enumerate((None, _FIRST, _SECOND)):
            changed = flux
            if weights is not None:
                moved = (weight * wide[:, i : i + flux.shape[1]] for i, weight in enumerate(weights) if weight)
                changed = sum(moved) / (grid.step**order * DERIVATIVE_UNITS[order])
            for interval, (pixels, matrix) in enumerate(matrices):
                found[:, order, interval] = changed[:, pixels] @ matrix.T
        parts.append(found)
    return np.concatenate(parts)


def shrunk(design: Design, coefficients: Array, variance: float) -> Array:
    """
    What least squares would find of stars (stars, intervals of the design, K), whose coefficients over their level
    these are, from pixels without noise that count as much as this relative variance.
    """
    true = torch.from_numpy(np.ascontiguousarray(coefficients, np.float32))
    true[..., 0] = 0.0
    evenly = torch.full(true.shape[:2], variance + MODEL_ERROR**2)
    found, *_ = least_squares(interval_modes(design), true, evenly, torch.zeros(()))
    found[..., :2] = 0.0
    return found.numpy()


class Mismatch:
    """
    How observed stars differ from synthetic ones of their labels, in coefficients of a rung.

    The mean difference is a smooth function of the labels; what is left of it varies from star to star in some
    directions.

    Parameters
    ----------
    labels : mapping
        `teff`, `logg` and `fe_h` of observed stars.
    difference : array of shape (stars, coefficients of all intervals)
        Observed less synthetic, in units of the prior.
    known : bool array of the same shape
    directions : int
        In which what is left is drawn.
    """

    def __init__(self, labels: Mapping[str, Array], difference: Array, known: Array, directions: int = 60):
        features = self.features(labels)
        penalty = 2.0 * np.diag(np.arange(features.shape[1]) > 0)
        self.trend = np.zeros((features.shape[1], difference.shape[1]))
        left = np.zeros_like(difference)
        for i in np.flatnonzero(known.sum(axis=0) > 10 * features.shape[1]):
            x, y = features[known[:, i]], difference[known[:, i], i]
            good = np.ones(len(y), bool)
            for _ in range(3):
                self.trend[:, i] = np.linalg.solve(x[good].T @ x[good] + penalty, x[good].T @ y[good])
                rest = y - x @ self.trend[:, i]
                scatter = MAD_TO_SIGMA * np.median(np.abs(rest)) + 1e-6
                good = np.abs(rest) < OUTLYING * scatter
            left[known[:, i], i] = np.clip(rest, -OUTLYING * scatter, OUTLYING * scatter)
        _, size, vectors = np.linalg.svd(left / np.sqrt(len(left)), full_matrices=False)
        self.spread = (size[:directions, None] * vectors[:directions]).astype(np.float32)

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
    spread : array of shape (directions, intervals * coefficients), optional
        Coefficients that are added, times numbers from a normal distribution. See [`Mismatch`].
    observed : bool
        Whether the stars are moved and blurred already, as they are what was observed.
    """

    def __init__(
        self,
        rung: Rung,
        coefficients: Array,
        known: Columns,
        designs: Sequence[Design],
        powers: Sequence[float],
        seen: Array | None = None,
        spread: Array | None = None,
        observed: bool = False,
    ):
        self.observed = observed
        self.rung, self.coefficients, self.labels, self.powers = rung, coefficients, known, list(powers)
        self.seen = np.ones(coefficients.shape[::2][:2], bool) if seen is None else seen
        self.spread = spread
        self.modes = [(design.intervals - rung.first_interval, interval_modes(design)) for design in designs]

    def truth(self, stars: Array, power: float, generator: np.random.Generator) -> Array:
        """Coefficients over their level of stars that are moved and blurred a little, (stars, intervals, K)."""
        if self.observed:
            raw = self.coefficients[stars, 0].astype(np.float32)
            raw[..., 0] = 0.0
            return raw
        n = len(stars)
        velocity = generator.standard_normal(n) * np.where(generator.random(n) < 0.2, 20.0, 4.0)
        moved = -velocity / SPEED_OF_LIGHT
        width = (1.0 + np.clip(0.08 * generator.standard_normal(n), -0.2, 0.2)) / power / FWHM
        variance = width**2 - (1.0 / power / FWHM) ** 2
        rotation = np.where(generator.random(n) < 0.3, 80.0 * generator.random(n), 5.0) / SPEED_OF_LIGHT
        variance = variance + 0.2 * rotation**2
        change = np.stack([np.ones(n), moved, 0.5 * (moved**2 + variance)], axis=1) * DERIVATIVE_UNITS
        raw = np.einsum("no,notk->ntk", change.astype(np.float32), self.coefficients[stars].astype(np.float32))
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
        if self.spread is not None:
            # What differs between synthetic and observed stars.
            size = np.exp(0.3 * generator.standard_normal((n, 1))).astype(np.float32)
            drawn = generator.standard_normal((n, len(self.spread)), dtype=np.float32) * size
            wanted += (drawn @ self.spread).reshape(wanted.shape)
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
