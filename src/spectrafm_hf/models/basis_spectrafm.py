# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
A spectrum on any grid -> coefficients in fixed intervals of ln wavelength.

In each interval a stellar spectrum is a mean plus a few directions in which stars differ. Generalised least squares,
with the inverse variances of the pixels and a prior, gives their coefficients. It accounts for sampling, missing pixels
and their widths before any trained weight, so a star has the same coefficients on every grid, except for unobserved
parts.

A model of an interval is `level * (mean + slope * x * mean + sum of coefficient * direction)`, with x from -1 to 1.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch

from .rungs_spectrafm import (
    MODEL_ERROR,
    NATIVE_TOLERANCE,
    Design,
    Rung,
    degraded,
    design_of_rung,
    first_levels,
    fit_interval,
    guessed_power,
    level_of_star,
    mean_flux,
    moved_means,
    one_power,
)


STARS_AT_ONCE = 256  # their matrices of an interval fit into a cache
KEPT = 8  # grids whose designs are kept
LEVELS = (0.2, 5.0)  # limits of the level of an interval over its first estimate
MIN_LEVEL = 0.02  # of the level of the star: lower limit of that of an interval
NEAR_ONE = 0.15  # of ln level: normalised spectra of all stars are within this of 1, averaged over many lines
# Velocities (km/s) are tried for a spectrum unlike stars, by chi^2 per degree of freedom or the fraction of clipped
# pixels. One must raise the correlation with the mean of stars by this much, at this resolving power or a higher one.
STRANGE_MISFIT, STRANGE_CLIPPED = 1.3, 0.01
SHIFT_LIMIT, SHIFT_STEP, SHIFT_GAIN, LEAST_POWER = 150.0, 5.0, 0.15, 5_000.0
#: Types in a file; others are kept as they are.
STORED = {name: np.float16 for name in ("directions", "kind_factors")} | {
    name: np.float32 for name in ("kind_shares", "kind_center", "kind_directions", "kind_means")
}


@dataclass
class Evidence:
    """
    Evidence of spectra by interval. B stars, T intervals, K coefficients, level and slope among them.

    Attributes
    ----------
    intervals : int array of shape (T,)
    coefficients : float array of shape (B, T, K)
        Posterior means in units of the prior: ln of the level over that of the star, slope, directions.
    reliability : float array of shape (B, T, K)
        1 - posterior variance / prior variance: 0 = no information, 1 = known exactly.
    seen : bool array of shape (B, T)
        Intervals with usable pixels.
    misfit : float array of shape (B, T)
        chi^2 per degree of freedom of the residuals from the directions, without clipped pixels; NaN without errors.
    clipped : bool array of shape (B, pixels)
    scale : float array of shape (B,)
        The level of the star: 1 where spectra are normalised.
    estimate : float array of shape (B, T, K)
        Most likely level, slope and directions in units of the prior, for flux over the continuum; otherwise also over
        the level of the interval.
    whole_information : float array of shape (B, intervals of the rung, K, K)
        Inverse covariance of these from the pixels alone, for all intervals of the rung: zeros without pixels.
    place : int array of shape (T,)
        Places of `intervals` among those of the rung.
    pull : float array of shape (B, T, K)
        Derivative of the likelihood of the pixels at `estimate`, which is not its peak because of the prior.
    level : float array of shape (B, T)
        Center of the prior of the level, in the unit of the flux.
    unit : float array of shape (B, T)
        Factor from the least squares in units of `level` to `estimate`.
    """

    intervals: np.ndarray
    coefficients: np.ndarray
    reliability: np.ndarray
    seen: np.ndarray
    misfit: np.ndarray
    clipped: np.ndarray
    scale: np.ndarray
    estimate: np.ndarray
    whole_information: np.ndarray
    place: np.ndarray
    pull: np.ndarray
    level: np.ndarray
    unit: np.ndarray

    @property
    def information(self) -> np.ndarray:
        """That of `intervals`, (B, T, K, K)."""
        whole = self.whole_information
        # One interval after the other in memory.
        return whole if whole.shape[1] == len(self.place) else whole.swapaxes(0, 1)[self.place].swapaxes(0, 1)


class SpectrumBasis:
    """
    Rungs of intervals, from narrow ones for high resolving powers to wide ones for low.

    Parameters
    ----------
    rungs : sequence of Rung
        With distinct numbers of intervals.
    """

    def __init__(self, rungs: Sequence[Rung]):
        self.rungs = list(rungs)
        sizes = {rung.prior.shape[1] for rung in self.rungs}
        if len(sizes) != 1:
            raise ValueError(f"rungs: expected as many coefficients in each, got {sorted(sizes)}")
        self.n_directions = sizes.pop()
        self.n_intervals = max(rung.first_interval + rung.n_intervals for rung in self.rungs)
        self._designs: dict[Any, Design] = {}

    @property
    def n_coefficients(self) -> int:
        """Of an interval: level, slope and directions."""
        return 2 + self.n_directions

    @property
    def interval_edges(self) -> np.ndarray:
        """(intervals, 2), Angstrom."""
        edges = np.zeros((self.n_intervals, 2))
        for rung in self.rungs:
            low = rung.edge + rung.width * np.arange(rung.n_intervals)
            edges[rung.first_interval :][: rung.n_intervals] = np.exp(np.stack([low, low + rung.width], axis=1))
        return edges

    def __reduce__(self):
        """Without the cached designs, so that `datasets.map` has the same fingerprint for a used tokenizer."""
        return type(self), (self.rungs,)

    # -------------------------------------------------------------------------------------------------------- files

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a safetensors file; most are in half precision, whose errors are far below any noise."""
        found = {}
        for number, rung in enumerate(self.rungs):
            for field in fields(rung):
                value = np.asarray(getattr(rung, field.name))
                if not value.size:
                    continue
                found[f"{number}.{field.name}"] = value.astype(STORED.get(field.name, value.dtype), order="C")
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "SpectrumBasis":
        """The inverse of [`SpectrumBasis.arrays`]."""
        numbers = sorted({int(name.partition(".")[0]) for name in arrays})
        rungs = []
        for number in numbers:
            values: dict[str, Any] = {}
            for field in fields(Rung):
                name = f"{number}.{field.name}"
                if name not in arrays and field.default is not MISSING:
                    continue  # the file of an earlier version
                if name not in arrays:
                    raise ValueError(f"basis: expected the array {name!r}, got {sorted(arrays)}")
                value, kind = np.asarray(arrays[name]), np.int64 if field.name == "offset" else np.float64
                values[field.name] = value.item() if value.ndim == 0 else value.astype(kind)
            rungs.append(Rung(**values))
        return cls(rungs)

    # ------------------------------------------------------------------------------------------------------ designs

    def rung_for(self, wavelength: np.ndarray, resolving_power: float | np.ndarray | None = None) -> Rung | None:
        """
        The rung of a spectrum: of those that share wavelengths with it, the finest one that its resolving power
        reaches. An unknown resolving power is assumed to be 2.5 pixels in a FWHM.

        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, increasing.
        resolving_power : float, or array of shape (pixels,), optional

        Returns
        -------
        Rung, or None where no rung shares wavelengths with the spectrum
        """
        power = guessed_power(wavelength) if resolving_power is None else one_power(resolving_power)
        shared = [rung for rung in self.rungs if rung.covers(wavelength)]
        reached = [rung for rung in shared if power >= rung.lowest_resolving_power]
        if reached:
            return max(reached, key=lambda rung: rung.lowest_resolving_power)
        return min(shared, key=lambda rung: rung.lowest_resolving_power, default=None)

    def design(self, wavelength: np.ndarray, resolving_power: float | np.ndarray | None = None) -> Design:
        """
        The design of a grid; cached for the last grids.

        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, vacuum, rest frame, increasing.
        resolving_power : float, or array of shape (pixels,), optional
            Of the spectrum, its pixels not included. Default: that of the rung, or see [`Rung`].

        Raises
        ------
        ValueError
            If no rung shares wavelengths with the grid.
        """
        wavelength = np.asarray(wavelength, np.float64)
        power = resolving_power.tobytes() if isinstance(resolving_power, np.ndarray) else resolving_power
        key = (wavelength.tobytes(), power)
        kept = self._designs.get(key)
        if kept is None:
            rung = self.rung_for(wavelength, resolving_power)
            if rung is not None:
                if resolving_power is None and rung.guesses_power:
                    resolving_power = guessed_power(wavelength)
                kept = design_of_rung(rung, wavelength, resolving_power)
            if kept is None or not len(kept.intervals):
                ranges = ", ".join("{:.0f}-{:.0f}".format(*rung.range) for rung in self.rungs)
                raise ValueError(
                    f"wavelength: expected some of {ranges} Angstrom, got {wavelength[0]:.1f}-{wavelength[-1]:.1f}"
                    + (" in pixels wider than an interval" if kept else "")
                )
            if len(self._designs) >= KEPT:
                self._designs = dict(list(self._designs.items())[-KEPT // 2 :])  # threads may share the old one
            self._designs[key] = kept
        return kept

    def brought_down(
        self, wavelength: np.ndarray, flux: np.ndarray, inverse_variance: np.ndarray, resolving_power: float | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None]:
        """
        Spectra (stars, pixels), smoothed to the resolving power of the rung on a new grid (see [`degraded`]) if theirs
        is higher and the rung requires it; and the resolving power.
        """
        rung = self.rung_for(wavelength, resolving_power)
        if rung is None or not rung.guesses_power:
            return wavelength, flux, inverse_variance, resolving_power
        power = guessed_power(wavelength) if resolving_power is None else resolving_power
        if power <= rung.resolving_power * NATIVE_TOLERANCE:
            return wavelength, flux, inverse_variance, resolving_power
        if rung.least_inside:  # so that the new grid is read by the same rung
            low, high = np.searchsorted(wavelength, rung.range)
            wavelength, flux, inverse_variance = wavelength[low:high], flux[:, low:high], inverse_variance[:, low:high]
        return *degraded(wavelength, flux, inverse_variance, power, rung.resolving_power), rung.resolving_power

    def brought_further(
        self, wavelength: np.ndarray, flux: np.ndarray, inverse_variance: np.ndarray, resolving_power: float | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None] | None:
        """
        Smoothed spectra, at the resolving power of the observed training stars, the only one at which the difference
        between observed and synthetic stars is known; None if nothing has to be done.
        """
        rung = self.rung_for(wavelength, resolving_power)
        if rung is None or not rung.observed_power or resolving_power != rung.resolving_power:
            return None
        found = degraded(wavelength, flux, inverse_variance, rung.resolving_power, rung.observed_power)
        return *found, rung.observed_power

    def evidence(
        self,
        wavelength: np.ndarray,
        flux: np.ndarray,
        inverse_variance: np.ndarray,
        resolving_power: float | np.ndarray | None = None,
        normalised: float | np.ndarray | None = None,
        clip: bool = True,
    ) -> Evidence:
        """
        Coefficients of spectra that share their wavelengths.

        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, vacuum, rest frame, increasing.
        flux : array of shape (stars, pixels)
            Finite.
        inverse_variance : array of shape (stars, pixels)
            0 for unused pixels.
        resolving_power : float, or array of shape (pixels,), optional
            See [`SpectrumBasis.design`].
        normalised : bool, or array of shape (stars,), optional
            Whether the flux is divided by the continuum: then its level is compared with 1, otherwise with that of the
            star. Default, and where it is NaN: if the level of the star is near 1. Not used in rungs of low resolving
            powers.
        clip : bool
            Whether to leave out pixels with a flux that no star of the basis has.

        Raises
        ------
        ValueError
            If no rung shares wavelengths with the spectra.
        """
        design = self.design(wavelength, resolving_power)
        if design.blind.any():
            inverse_variance = np.where(design.blind, 0.0, inverse_variance)
        n_stars, n_intervals, size = len(flux), len(design.intervals), self.n_coefficients
        shape = (n_stars, n_intervals, size)
        found, variance = torch.empty(shape), torch.empty(shape)
        chi2, count = torch.empty(shape[:2]), torch.empty(shape[:2])
        clipped = torch.zeros(flux.shape, dtype=torch.bool)
        # Interval after interval, as it is made, and as it is used; with room for those without pixels.
        place = design.intervals - design.rung.first_interval
        information = torch.empty(design.rung.n_intervals, n_stars, size, size)
        information[np.setdiff1d(np.arange(design.rung.n_intervals), place)] = 0.0
        all_values, all_weights, unit_of_flux = _in_own_unit(flux, inverse_variance)
        whole = bool((all_weights > 0).all())
        first, seen = first_levels(design, all_values, all_weights)
        level_counts, scale = self._scale(design.rung, first, seen, unit_of_flux[:, 0], normalised)
        begin = torch.maximum(first, MIN_LEVEL * scale[:, None])
        over_scale = begin / scale[:, None]
        one = torch.ones(())
        parts = [slice(start, start + STARS_AT_ONCE) for start in range(0, n_stars, STARS_AT_ONCE)]
        for (i, pixels), stars in itertools.product(enumerate(design.pixels), parts):
            start = begin[stars, i, None]
            values = all_values[stars, pixels] / start
            weight = all_weights[stars, pixels] * start**2
            weight /= torch.add(one, weight, alpha=design.rung.model_error**2)
            marked = clipped[stars, pixels] if clip else None
            found[stars, i], variance[stars, i], gram, chi2[stars, i], changed = fit_interval(
                design, i, values, weight, marked
            )
            counts = torch.count_nonzero(weight, dim=1) if changed or not whole else weight.shape[1]
            count[stars, i] = counts
            # In units of the level that the spectra are compared with.
            unit = torch.where(level_counts[stars], over_scale[stars, i], 1.0 / found[stars, i, 0].clamp(*LEVELS))
            torch.mul(gram, unit[:, None, None] ** -2, out=information[place[i], stars])
        found_level = found[..., 0].clamp(*LEVELS)
        mean, variance = over_level(found, variance, found_level[..., None])
        level = begin * found_level
        free = count - size
        misfit = torch.where(free > 0, chi2 / free.clamp(min=1), torch.nan)
        seen &= count > 0
        units = torch.where(level_counts[:, None], over_scale, 1.0 / found_level)
        estimate = found * units[..., None]
        found[..., 0] -= 1.0
        pull = found / units[..., None]
        mean, reliability = _with_prior_of_level(design.rung, mean, variance, level / scale[:, None], level_counts)
        if (nothing := ~seen).any():
            mean[nothing], reliability[nothing], pull[nothing] = 0.0, 0.0, 0.0
            stars, intervals = torch.nonzero(nothing, as_tuple=True)
            information[torch.from_numpy(place)[intervals], stars] = 0.0
        return Evidence(
            intervals=design.intervals,
            coefficients=mean.numpy(),
            reliability=reliability.numpy(),
            seen=seen.numpy(),
            misfit=misfit.numpy(),
            clipped=clipped.numpy(),
            scale=scale.numpy() * unit_of_flux[:, 0],
            estimate=estimate.numpy(),
            whole_information=information.transpose(0, 1).numpy(),
            place=place,
            pull=pull.numpy(),
            level=begin.numpy() * unit_of_flux,
            unit=units.numpy(),
        )

    @staticmethod
    def _scale(
        rung: Rung, level: torch.Tensor, seen: torch.Tensor, unit: np.ndarray, normalised: float | np.ndarray | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        From the levels of the intervals (stars, intervals) and the unit of flux (stars,): whether the level of each
        star says something, and what it is compared with.
        """
        scale = level_of_star(level.numpy(), seen.numpy())
        level_counts = np.full(len(scale), rung.counts_level)
        if rung.over_continuum:
            near = np.abs(np.log(scale * unit)) < NEAR_ONE
            stated = np.broadcast_to(np.asarray(np.nan if normalised is None else normalised, float), len(scale))
            level_counts = np.where(np.isnan(stated), near, stated > 0)
            scale = np.where(level_counts, 1.0 / unit, scale).astype(np.float32)
        return torch.from_numpy(level_counts), torch.from_numpy(scale)

    @staticmethod
    def strange(evidence: Evidence, clipped: np.ndarray) -> np.ndarray:
        """(stars,): whether residuals from the directions exceed the errors, or many pixels are left out."""
        misfit = np.where(np.isfinite(evidence.misfit), evidence.misfit, 1.0)
        return (np.median(misfit, axis=1) > STRANGE_MISFIT) | (clipped > STRANGE_CLIPPED)

    def tells_velocity(self, wavelength: np.ndarray, resolving_power: float | np.ndarray | None = None) -> bool:
        """Whether lines are narrow enough on this grid to measure a velocity."""
        rung = self.rung_for(wavelength, resolving_power)
        stated = np.inf if resolving_power is None else one_power(resolving_power)
        power = min(stated, rung.resolving_power if rung else 0.0)
        return power >= LEAST_POWER

    def shifts(
        self,
        wavelength: np.ndarray,
        flux: np.ndarray,
        inverse_variance: np.ndarray,
        resolving_power: float | np.ndarray | None = None,
    ) -> np.ndarray:
        """
        Velocity in km/s, in steps of `SHIFT_STEP`, with the best correlation with the mean of stars; 0 if none is much
        better than rest. Arguments as in [`SpectrumBasis.evidence`]; returns (stars,).
        """
        design = self.design(wavelength, resolving_power)
        velocities = np.arange(-SHIFT_LIMIT, SHIFT_LIMIT + SHIFT_STEP, SHIFT_STEP)
        if design.templates is None:
            design.templates = moved_means(design, np.log(wavelength), velocities, resolving_power)
        together, stars, templates = (0.0, 0.0, 0.0)
        for pixels, template in zip(design.pixels, design.templates, strict=True):
            weight = inverse_variance[:, pixels]
            total = np.maximum(weight.sum(axis=1, keepdims=True), 1e-30)
            level = (weight * flux[:, pixels]).sum(axis=1, keepdims=True) / total
            lines = flux[:, pixels] / np.where(level > 0, level, 1.0) - 1.0
            # The same weight for pixels of all intervals, and none for unobserved ones.
            weight = weight * level**2
            together = together + (weight * lines) @ template.T
            stars = stars + (weight * lines**2).sum(axis=1, keepdims=True)
            templates = templates + weight @ (template**2).T
        found = together / np.sqrt(np.maximum(stars * templates, 1e-30))
        best = found.max(axis=1)
        return np.where(best > found[:, len(velocities) // 2] + SHIFT_GAIN, velocities[found.argmax(axis=1)], 0.0)


# --------------------------------------------------------------------------------------------------------- the algebra


def over_level(mean, variance, level):
    """
    Posterior means and variances (..., K) with a prior of 1, divided by the level of each star (..., 1), with a prior
    of 1 again, because the shape of a faint interval is poorly known. The first is the level itself, and only divided.
    """
    mean, variance = mean / level, variance / level**2
    again = 1.0 / (1.0 / variance[..., 1:] - level**2 + 1.0)
    mean[..., 1:] *= again / variance[..., 1:]
    variance[..., 1:] = again
    return mean, variance


def _in_own_unit(flux: np.ndarray, inverse_variance: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """
    (stars, pixels) twice -> the same, float32, in a unit (stars, 1) of each star: squares of fluxes in erg/s/cm2/A do
    not fit into single precision.
    """
    unit = mean_flux(flux, inverse_variance)
    values = (flux / unit).astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        weights = (inverse_variance * unit.astype(inverse_variance.dtype) ** 2).astype(np.float32, copy=False)
    # Errors far below the last digit of a flux count as zero: float32 cannot hold their inverse squares.
    return torch.from_numpy(values), torch.from_numpy(weights).clamp_(max=1e16), unit


def _with_prior_of_level(
    rung: Rung, mean: torch.Tensor, variance: torch.Tensor, level: torch.Tensor, level_counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Coefficients and their reliability. The level, over that of the star (stars, intervals), was free; here it gets its
    prior. Without its continuum, (stars,), the level of a narrow interval has no information.
    """
    variance[..., 0] /= variance[..., 0] + rung.level_prior**2
    reliability = (1.0 - variance).clamp_(0.0, 1.0)
    mean[..., 0] = reliability[..., 0] * torch.log(level) / rung.level_prior
    for values in (mean, reliability):
        values[~level_counts, :, :2] = 0.0
    return mean, reliability


__all__ = ["MODEL_ERROR", "Evidence", "SpectrumBasis", "over_level"]
