# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Stars as any instrument might have recorded them, for training.

For each batch a grid is drawn, and for each star its signal-to-noise ratio, missing pixels and faults. As the
tokens of all grids are the same, a model learns the star and not the instrument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.spatial import cKDTree

from ..data.mixture import Columns, Source
from ..models.basis_spectrafm import LEVELS, MODEL_ERROR, SpectrumBasis, over_level
from ..models.gate_spectrafm import SPEED_OF_LIGHT
from ..models.rungs_spectrafm import Design, half_widths, interval_matrices, means_over_pixels
from ..statistics import robust_scatter
from .bad_pixels import add_noise, add_wild_pixels, draw_snr, missing_pixels, smooth_factors
from .instruments import Instrument
from .synthetic import ALPHA_ELEMENTS, SyntheticStars


Array = NDArray[Any]

CONTINUUM_ERRORS = 0.35  # of spectra over the continuum
FLUXED = 0.25  # of high-resolution spectra are not over the continuum
NEIGHBOURS = 8  # in labels, of which one is mixed with a star
CLEAN_NOISE = 1.0  # at most, in units of the errors, in observed stars without bad pixels or wrong errors


class HighResolutionStars:
    """
    Synthetic stars of the H band on grids, at resolving powers and with faults that are drawn.

    Parameters
    ----------
    basis : SpectrumBasis
    seed : int
        Of the grids.
    n_grids : int
        Number of random grids, in addition to those of APOGEE.
    """

    def __init__(self, basis: SpectrumBasis, seed: int = 0, n_grids: int = 24):
        self.stars = SyntheticStars("apogee-apstar")._stars
        emulator = self.stars.emulator
        self.native = emulator.wavelength.double().numpy()
        self.components = torch.cat([emulator.components, emulator.mean[None]]).double().numpy()
        self.step = float(np.log(self.native[-1] / self.native[0]) / (len(self.native) - 1))
        self.rung = next(rung for rung in basis.rungs if rung.over_continuum)
        generator = np.random.default_rng(seed)
        apogee = Instrument.load("apogee").wavelength
        inside = self.native[(self.native > 15_145.0) & (self.native < 16_955.0)]
        self.grids: list[tuple[Array, float]] = [(apogee, 3.0), (inside, 2.0), (self._release(), 1.0)]
        for _ in range(n_grids):
            self.grids.append((self._random_grid(inside, apogee, generator), 4.0 / n_grids))
        self.shares = np.array([share for _, share in self.grids])
        self.shares /= self.shares.sum()
        self._on_grid: dict[int, tuple[Array, Array, Array]] = {}
        # Spectra as sums of the emulator's components -> level, slope and directions of each interval.
        matrices = interval_matrices(self.rung, self.native)
        self._targets = np.stack([matrix @ self.components[:, pixels].T for pixels, matrix in matrices])

    @staticmethod
    def _release() -> Array:
        """Detectors that begin and end elsewhere than those of the last release."""
        index = np.arange(8575)
        parts = [(322, 3242), (3648, 6048), (6412, 8306)]
        return 10.0 ** (4.179 + 6e-6 * np.concatenate([index[a:b] for a, b in parts]))

    @staticmethod
    def _random_grid(inside: Array, apogee: Array, generator: np.random.Generator) -> Array:
        kind = generator.integers(4)
        if kind == 0:  # linear
            return np.arange(15_150.0, 16_950.0, generator.uniform(0.12, 0.5))
        if kind == 1:  # logarithmic, coarser or finer
            step = 6e-6 * np.log(10) * np.exp(generator.uniform(np.log(0.8), np.log(6.0)))
            return np.exp(np.arange(np.log(15_150.0), np.log(16_950.0), step))
        if kind == 2:  # between the pixels
            return apogee * np.exp(6e-6 * np.log(10) * generator.uniform(0.1, 0.9))
        low = generator.uniform(15_150.0, 16_600.0)  # a window
        return inside[(inside > low) & (inside < low + generator.uniform(150.0, 1_200.0))]

    def targets(self, weights: Array) -> Array:
        """Weights of the components (stars, components + 1) -> true coefficients (stars, intervals, 2 + directions)."""
        raw = np.einsum("nc,tkc->ntk", weights, self._targets)
        level = np.maximum(raw[..., :1], 0.05)
        parts = [np.log(level) / self.rung.level_prior, raw[..., 1:] / level]
        return np.concatenate(parts, axis=-1).astype(np.float32)

    def _grid(self, number: int) -> tuple[Array, Array, Array]:
        """Wavelengths of a grid, the components on it, and their derivatives with respect to ln wavelength."""
        if number not in self._on_grid:
            wavelength = self.grids[number][0]
            half = half_widths(wavelength)
            edges = [(np.log(wavelength + side * half) - np.log(self.native[0])) / self.step for side in (-1, 1)]
            components = means_over_pixels(self.components, 0.0, *edges)
            slopes = np.gradient(components, np.log(wavelength), axis=1)
            # Across a gap there is no slope.
            slopes[:, np.abs(np.gradient(wavelength)) > 4.0 * np.median(np.diff(wavelength))] = 0.0
            self._on_grid[number] = wavelength, components.astype(np.float32), slopes.astype(np.float32)
        return self._on_grid[number]

    def draw_weights(self, n: int, generator: np.random.Generator) -> tuple[Columns, Array]:
        """Labels with their errors, which are none, and the weights of the emulator's components and of its mean."""
        emulator = self.stars.emulator
        labels = self.stars._labels(n, generator)
        table = np.stack([np.asarray(labels[name], np.float64) for name in emulator.config.label_names], axis=1)
        with torch.no_grad():
            features = emulator.standardize(torch.from_numpy(table))
            weights = torch.cat([group(features, emulator.stars.double()) for group in emulator.groups], dim=1)
        alpha = np.mean([labels[name] for name in ALPHA_ELEMENTS], axis=0)
        known = {**labels, "alpha_m": alpha.astype(np.float32)}
        known |= {f"{name}_err": np.zeros(n, np.float32) for name in list(known)}
        return known, np.concatenate([weights.numpy(), np.ones((n, 1))], axis=1)

    def whole(self, n: int, generator: np.random.Generator, snr: float = 200.0) -> Columns:
        """Columns of `n` stars without gaps and faults, on the grid of apStar."""
        known, weights = self.draw_weights(n, generator)
        wavelength, components, _ = self._grid(1)
        flux = weights.astype(np.float32) @ components
        flux += generator.standard_normal(flux.shape, dtype=np.float32) / np.float32(snr)
        columns = {"flux": flux, "flux_error": np.full_like(flux, 1.0 / snr), "mask": np.zeros(flux.shape, bool)}
        return {"wavelength": wavelength, **columns, "normalised": np.ones(n, bool)} | known

    def draw(self, n: int, generator: np.random.Generator) -> Columns:
        """Columns of `n` stars."""
        known, weights = self.draw_weights(n, generator)
        wavelength, *tables = self._grid(int(generator.choice(len(self.grids), p=self.shares)))
        components, slopes = map(torch.from_numpy, tables)
        velocity = generator.normal(0.0, np.where(generator.random(n) < 0.1, 3.0, 0.4)) / SPEED_OF_LIGHT
        amount = torch.from_numpy(weights.astype(np.float32))
        moved = torch.from_numpy((weights * velocity[:, None]).astype(np.float32))
        flux = (amount @ components).addmm_(moved, slopes).numpy()
        fluxed = generator.random() < FLUXED
        wrong = generator.random(n) < (1.0 if fluxed else CONTINUUM_ERRORS)
        amplitude = np.exp(generator.uniform(np.log(1e-3), np.log(2e-2), n)) * wrong
        flux *= smooth_factors(wavelength, amplitude, 8, generator)
        if fluxed:
            flux *= smooth_factors(wavelength, np.full(n, 0.15), 2, generator)
            flux *= np.exp(generator.normal(0.0, 2.0, (n, 1))).astype(np.float32)
        snr = draw_snr(n, generator)
        noisy, error = add_noise(flux, snr, generator)
        add_wild_pixels(noisy, error, generator)
        columns: Columns = {
            "wavelength": wavelength,
            "flux": noisy,
            "flux_error": error,
            "mask": missing_pixels(wavelength, n, generator),
            "normalised": np.full(n, not fluxed),
        }
        return columns | known


Modes = tuple[torch.Tensor, torch.Tensor]


def interval_modes(design: Design) -> Modes:
    """Eigenvalues (intervals, K) and eigenvectors (intervals, K, K) of the least squares of each interval."""
    gram = torch.stack([rows @ rows.T for rows in design.rows]).double()
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0.0).float(), vectors.float()


def _rotated(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(T, K, M), (stars, T, M) -> (stars, T, K)."""
    return (matrix @ values.permute(1, 2, 0)).permute(2, 0, 1).contiguous()


def least_squares(
    modes: Modes, true: torch.Tensor, variance: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What comes out of pixels whose noise is the same in all of an interval, without the pixels.

    Parameters
    ----------
    modes : see [`interval_modes`]
    true : torch.FloatTensor of shape (stars, intervals, K)
        Level less one, slope and directions.
    variance : torch.FloatTensor of shape (stars, intervals)
        Of the relative noise of a pixel.
    noise : torch.FloatTensor of shape (stars, intervals, K)
        From a standard normal distribution; zeros for none.

    Returns
    -------
    coefficients, covariance : see [`over_level`]
    level : torch.FloatTensor of shape (stars, intervals, 1)
        That they are over.
    """
    values, vectors = modes
    gain = values / (values + variance[..., None])
    found = gain * _rotated(vectors.transpose(1, 2), true) + torch.sqrt(gain * (1.0 - gain)) * noise
    found, covariance = _rotated(vectors, found), _rotated(vectors**2, 1.0 - gain)
    level = (1.0 + found[..., :1]).clamp(*LEVELS)
    return *over_level(found, covariance, level), level


class EvenNoiseStars:
    """
    Synthetic stars of the H band whose noise is the same in all pixels of an interval: their tokens are drawn without
    their pixels, ten times as fast as [`HighResolutionStars`].

    With the least squares of an interval diagonal, prior and noise of each of its modes are numbers, and what comes out
    of the pixels can be drawn at once. Whole intervals may be missing.

    Parameters
    ----------
    stars : HighResolutionStars
        Whose labels, grids of APOGEE and coefficients these are.
    """

    def __init__(self, stars: HighResolutionStars, basis: SpectrumBasis):
        self.stars = stars
        self.modes = []
        for wavelength, _ in stars.grids[:3]:
            design = basis.design(wavelength)
            self.modes.append((design.intervals, interval_modes(design)))

    def draw(self, n: int, generator: np.random.Generator) -> Columns:
        """Inputs of the model, as [`evidence_inputs`] makes them, with labels."""
        known, weights = self.stars.draw_weights(n, generator)
        target = self.stars.targets(weights)
        intervals, modes = self.modes[int(generator.choice(3, p=(0.6, 0.25, 0.15)))]
        own = intervals - self.stars.rung.first_interval
        snr = draw_snr(n, generator)
        # Some intervals are noisier than others.
        shape = np.exp(
            0.15 * generator.standard_normal((n, 1, 3)) @ legendre.legvander(np.linspace(-1, 1, len(own)), 3)[:, 1:].T
        )
        variance = torch.from_numpy((0.97 * shape[:, 0] / snr[:, None]).astype(np.float32)) ** 2 + MODEL_ERROR**2
        true = torch.from_numpy(np.ascontiguousarray(target[:, own]))
        wanted = true.clone()
        level_prior = self.stars.rung.level_prior
        wanted[..., 0] = torch.exp(level_prior * wanted[..., 0])  # the level itself; the rest is relative to it
        wanted[..., 1:] *= wanted[..., :1]
        wanted[..., 0] -= 1.0  # its prior is around 1
        noise = torch.from_numpy(generator.standard_normal(true.shape, dtype=np.float32))
        coefficients, covariance, level = least_squares(modes, wanted, variance, noise)
        covariance[..., 0] /= covariance[..., 0] + level_prior**2
        reliability = (1.0 - covariance).clamp(0.0, 1.0)
        coefficients[..., 0] = reliability[..., 0] * torch.log(level[..., 0]) / level_prior
        seen = np.ones(true.shape[:2], bool)
        for star in np.flatnonzero(generator.random(n) < 0.3):
            first = generator.integers(len(own))
            last = first + generator.integers(1, max(len(own) - 1, 2))
            missing = slice(first, last) if generator.random() < 0.5 else np.r_[0:first, last : len(own)]
            if not np.all(np.isin(np.arange(len(own)), np.arange(len(own))[missing])):
                seen[star, missing] = False
        coefficients[~torch.from_numpy(seen)] = 0.0
        reliability[~torch.from_numpy(seen)] = 0.0
        return known | {
            "coefficients": coefficients.numpy(),
            "reliability": reliability.numpy(),
            "interval_ids": np.broadcast_to(intervals, seen.shape),
            "seen": seen,
        }


def nearest_in_labels(columns: Mapping[str, Array], labels: Sequence[str]) -> Array:
    """(stars, `NEIGHBOURS`), numbers of the stars next to each in the labels, of which the first ones count more."""
    place = []
    for name, weight in zip(labels, (3.0, 2.0, 1.5, *[1.0] * len(labels)), strict=False):
        values = np.asarray(columns[name], float)
        known = values[np.isfinite(values)]
        place.append(weight * np.nan_to_num((values - np.median(known)) / robust_scatter(known)).clip(-6.0, 6.0))
    table = np.stack(place, axis=1)
    return cKDTree(table).query(table, NEIGHBOURS + 1)[1][:, 1:]


class MixedStars:
    """
    Observed stars, of which some are the sum of a star and less of another one with nearly the same labels: no two of
    these are the same, so that they are not learnt by heart so soon.

    Parameters
    ----------
    columns : mapping of arrays
        Of observed stars that share their wavelengths: `wavelength`, `flux`, `flux_error`, `mask`, labels and their
        errors in `<label>_err`.
    labels : sequence of str
    share : float
        Of the stars that are mixed.
    """

    def __init__(self, columns: Mapping[str, Array], labels: Sequence[str], share: float):
        self.columns, self.labels, self.share = dict(columns), list(labels), share
        bad = np.asarray(columns["mask"], bool) | ~np.isfinite(columns["flux"]) | ~(columns["flux_error"] > 0)
        level = np.sum(np.where(bad, 0.0, columns["flux"]), axis=1) / np.maximum((~bad).sum(axis=1), 1)
        for name in ("flux", "flux_error"):  # of stars of any brightness
            self.columns[name] = (columns[name] / level[:, None]).astype(np.float32)
        self.columns["mask"] = bad
        self.neighbours = nearest_in_labels(columns, labels)

    def draw(self, n: int, generator: np.random.Generator) -> Columns:
        """Columns of `n` stars."""
        first = generator.integers(len(self.neighbours), size=n)
        second = self.neighbours[first, generator.integers(NEIGHBOURS, size=n)]
        part = generator.uniform(0.0, 0.5, n) * (generator.random(n) < self.share)
        drawn = {name: values[first] for name, values in self.columns.items()}
        other = {name: self.columns[name][second] for name in ("flux", "flux_error", "mask", *self.labels)}
        mixed, wide = part > 0, part[:, None].astype(np.float32)
        drawn["mask"] = drawn["mask"] | (other["mask"] & mixed[:, None])
        drawn["flux"] = (1.0 - wide) * drawn["flux"] + wide * other["flux"]
        drawn["flux_error"] = np.hypot((1.0 - wide) * drawn["flux_error"], wide * other["flux_error"])
        for name in self.labels:
            drawn[name] = np.where(mixed, (1.0 - part) * drawn[name] + part * other[name], drawn[name])
        return drawn


class SpoiltStars:
    """
    Observed stars, with more noise, fewer pixels, on other grids and with faults that are drawn.

    Parameters
    ----------
    source : Source
        Of stars that share smooth, well-sampled spectra, such as those of Gaia XP.
    clean : float
        Share of batches that stay as they are but for a little noise.
    """

    def __init__(self, source: Source, basis: SpectrumBasis, clean: float = 0.4):
        self.source, self.basis, self.clean = source, basis, clean

    def draw(self, n: int, generator: np.random.Generator) -> Columns:
        """Columns of `n` stars."""
        stars = self.source.draw(n, generator)
        wavelength = np.asarray(stars["wavelength"][0], np.float64)
        flux, error = (np.asarray(stars[name], np.float32) for name in ("flux", "flux_error"))
        mask = np.asarray(stars["mask"], bool) | ~np.isfinite(flux) | ~(error > 0)
        flux, error = np.where(mask, 0.0, flux), np.where(mask, 1.0, error)
        clean = generator.random() < self.clean
        # As much noise again, or several times as much in some.
        factor = generator.uniform(0.0, CLEAN_NOISE if clean else 2.0, (n, 1))
        if not clean:
            factor = np.where(generator.random((n, 1)) < 0.2, generator.uniform(1.0, 6.0, (n, 1)), factor)
        more: Array = (factor * (generator.random((n, 1)) < 0.9)).astype(np.float32)
        flux = flux + more * error * generator.standard_normal(flux.shape, dtype=np.float32)
        error = error * np.sqrt(1.0 + more**2)
        if not clean:
            if generator.random() < 0.4:
                wavelength, flux, error, mask = self._other_grid(wavelength, flux, error, mask, generator)
            mask = mask | missing_pixels(wavelength, n, generator)
            flux, error = flux.copy(), error.copy()
            add_wild_pixels(flux, error, generator)
        kept = {
            name: value for name, value in stars.items() if name not in ("wavelength", "flux", "flux_error", "mask")
        }
        return kept | {
            "wavelength": wavelength,
            "flux": flux.astype(np.float32),
            "flux_error": error.astype(np.float32),
            "mask": mask,
            "normalised": np.zeros(n, bool),
        }

    @staticmethod
    def _other_grid(
        wavelength: Array, flux: Array, error: Array, mask: Array, generator: np.random.Generator
    ) -> tuple[Array, Array, Array, Array]:
        """Means over two or three pixels, or a spline on a linear or logarithmic grid."""
        kind = generator.integers(3)
        if kind == 0:
            times = int(generator.integers(2, 4))
            first = int(generator.integers(times))
            n_new = (len(wavelength) - first) // times
            chosen = slice(first, first + n_new * times)

            def means(values):
                return values[..., chosen].reshape(*values.shape[:-1], n_new, times)

            weight = np.where(means(mask), 0.0, 1.0 / means(error) ** 2)
            bad = (weight == 0).any(axis=-1)
            total = np.where(bad, 1.0, weight.sum(axis=-1))
            # The noise of neighbours goes together: their mean is hardly better than each.
            return means(wavelength).mean(axis=-1), means(flux).mean(axis=-1), np.sqrt(times / total), bad
        low, high = wavelength[0] + 1.0, wavelength[-1] - 1.0
        if kind == 1:
            new = np.arange(low, high, generator.uniform(6.0, 30.0))
        else:
            new = np.exp(np.arange(np.log(low), np.log(high), generator.uniform(0.001, 0.004)))
        nearest = np.clip(np.searchsorted(wavelength, new), 1, len(wavelength) - 1)
        bad = mask[:, nearest] | mask[:, nearest - 1]
        return new, CubicSpline(wavelength, flux, axis=1)(new), error[:, nearest], bad


def evidence_inputs(
    basis: SpectrumBasis,
    columns: Mapping[str, Array],
    label_names: Sequence[str],
    label_ids: Sequence[int],
    star_labels: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """
    Columns of stars that share their wavelengths -> what [`SpectraFMForPrediction`] takes in training.

    Stars of [`EvenNoiseStars`] have their tokens already.

    Parameters
    ----------
    basis : SpectrumBasis
    columns : mapping of arrays
    label_names, label_ids : sequences of str and int
        Requested labels, and the rows of the vocabulary.
    star_labels : sequence of str
        Those of the star model of the model.
    """
    if "coefficients" in columns:
        tokens = {name: columns[name] for name in ("coefficients", "reliability")}
        intervals, seen = columns["interval_ids"][0], columns["seen"]
    else:
        wavelength = np.asarray(columns["wavelength"], np.float64)
        wavelength = wavelength if wavelength.ndim == 1 else wavelength[0]
        flux, error = (np.asarray(columns[name], np.float32) for name in ("flux", "flux_error"))
        good = ~np.asarray(columns["mask"], bool) & np.isfinite(flux) & (error > 0) & np.isfinite(error)
        weight = np.where(good, np.where(good, error, 1.0) ** -2.0, 0.0)
        found = basis.evidence(
            wavelength,
            np.where(good, flux, 0.0),
            weight,
            columns.get("resolving_power"),
            normalised=columns.get("normalised"),
        )
        tokens = {"coefficients": found.coefficients, "reliability": found.reliability}
        intervals, seen = found.intervals, found.seen
    n_stars = len(seen)

    def column(name):
        values = columns.get(name)
        return np.full(n_stars, np.nan, np.float32) if values is None else np.asarray(values, np.float32)

    inputs = {
        "coefficients": torch.from_numpy(tokens["coefficients"]),
        "reliability": torch.from_numpy(tokens["reliability"]),
        "interval_ids": torch.tensor(np.asarray(intervals)).expand(n_stars, -1),
        "attention_mask": torch.from_numpy(seen),
        "request_ids": torch.tensor(list(label_ids)).expand(n_stars, -1),
        "labels": torch.from_numpy(np.stack([column(name) for name in label_names], axis=1)),
        "label_errors": torch.from_numpy(np.stack([column(f"{name}_err") for name in label_names], axis=1)),
    }
    if star_labels:
        inputs["star_targets"] = torch.from_numpy(np.stack([column(name) for name in star_labels], axis=1))
    return inputs
