# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
A spectrum on any grid -> coefficients in fixed intervals of ln wavelength.

The axis of ln wavelength is cut once and for all into intervals. In each, spectra of stars are a mean and a few
directions: those in which stellar labels move the flux, and in which stars differ. Generalised least squares, with the
inverse variances of the pixels and a prior, turns the pixels of an interval into coefficients of these directions. How
a spectrum is sampled, where its table begins, which pixels are missing and how wide they are, is dealt with there,
before any weight is learnt: the same star gives the same coefficients, less what was not seen.

A model of an interval is `level * (mean + slope * x * mean + sum of coefficient * direction)`, with x from -1 to 1.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from .gate_spectrafm import SPEED_OF_LIGHT
from .products_spectrafm import product


FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))  # in sigma, of a Gaussian
TAPS = 6  # edges that the cumulative flux is interpolated through
CLIPPED_AT = 6.0  # sigma, from what the directions can say
ROUNDS = 3  # of clipping
PIXELS = 2.5  # in a FWHM, where the resolving power is unknown
STARS_AT_ONCE = 256  # whose matrices of an interval a cache holds
SMALL = 16  # rows of a matrix
KEPT = 8  # grids whose designs are kept
FLOOR = 0.01  # of the flux: a deviation that models of stars have anyway, and that no pixel is clipped for
MODEL_ERROR = 5e-4  # of the flux: what the directions leave out, and no error is smaller than
LEVELS = (0.2, 5.0)  # of an interval over what it was taken for: beyond, it counts as these
MIN_LEVEL = 0.02  # of the level of the star: a fainter interval is compared with this
NEAR_ONE = 0.15  # of ln level: so is the flux over the continuum of any star, averaged over many lines
# A spectrum that looks like no star: chi^2 per degree of freedom, share of the pixels. Then other velocities are tried,
# in km/s, one of which has to go along better with the mean of stars by this correlation; with lines that are narrow.
STRANGE_MISFIT, STRANGE_CLIPPED = 1.3, 0.01
SHIFT_LIMIT, SHIFT_STEP, SHIFT_GAIN, LEAST_POWER = 150.0, 5.0, 0.15, 5_000.0
WIDEST_STEP = 2.5  # of the usual distance of pixels: a wider one is a gap
NATIVE_TOLERANCE = 1.03  # resolving powers that differ by less count as the same


@dataclass
class Rung:
    """
    Intervals of one width and what stars look like in them, for spectra of some range of resolving powers.

    Attributes
    ----------
    first_interval : int
        Number of its first interval among those of all rungs.
    edge, width : float
        ln of the lower edge (Angstrom) of the first interval, and the width of each.
    start, step : float
        ln of the middle of the first pixel of its own grid, which is even in ln wavelength.
    resolving_power : float
        Wavelength / FWHM of its own grid; spectra of a lower one are compared with what it is smoothed to.
    lowest_resolving_power : float
        Spectra of a lower one belong to another rung.
    mean : array of shape (pixels,)
    offset : array of shape (intervals,)
        Own pixel at which the directions of each interval begin; they go on for some pixels beyond it on both sides.
    directions : array of shape (intervals, coefficients, pixels of an interval)
    prior : array of shape (intervals, coefficients)
        Standard deviation of the coefficients among stars.
    level_prior, slope_prior : float
        Standard deviation of ln level and of slope among stars.
    over_continuum : bool
        Whether spectra of this rung may be over the continuum, so that their level says something.
    counts_level : bool
        Whether levels and slopes say something of a star at all: not where flux calibrations are worth little.
    guesses_power : bool
        Whether an unknown resolving power is taken for `PIXELS` in a FWHM, rather than for that of the rung, and
        spectra of a higher one than that of the rung are to be brought down to it.
    blind : array of shape (bands, 2)
        First and last wavelength in Angstrom of bands that nothing is taken from: those of the air.
    """

    first_interval: int
    edge: float
    width: float
    start: float
    step: float
    resolving_power: float
    lowest_resolving_power: float
    mean: np.ndarray
    offset: np.ndarray
    directions: np.ndarray
    prior: np.ndarray
    level_prior: float = 1.0
    slope_prior: float = 0.3
    over_continuum: bool = False
    counts_level: bool = True
    guesses_power: bool = False
    blind: Any = ()

    @property
    def n_intervals(self) -> int:
        return len(self.offset)

    def has(self, intervals: np.ndarray) -> bool:
        """Whether any of these are its own."""
        last = self.first_interval + self.n_intervals
        return bool(((intervals >= self.first_interval) & (intervals < last)).any())

    @property
    def range(self) -> tuple[float, float]:
        """Angstrom that its own grid covers."""
        return float(np.exp(self.start)), float(np.exp(self.start + self.step * (len(self.mean) - 1)))

    def power_of(self, wavelength: np.ndarray, resolving_power: float | None = None) -> float:
        """Wavelength / FWHM in which pixels at these wavelengths are read: as stated, as guessed, or its highest."""
        if resolving_power is None and self.guesses_power:
            resolving_power = _guess(wavelength)
        return self.resolving_power if resolving_power is None else min(resolving_power, self.resolving_power)

    def smoothed(self, resolving_power: float | None, interval: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """
        Mean and directions, of all intervals or of one, at a lower resolving power; its own where None, or where it is
        no lower.
        """
        directions = self.directions if interval is None else self.directions[interval : interval + 1]
        if resolving_power is None or resolving_power * NATIVE_TOLERANCE >= self.resolving_power:
            return self.mean, directions
        sigma = np.sqrt(resolving_power**-2.0 - self.resolving_power**-2.0) / FWHM / self.step
        reach = int(np.ceil(4.0 * sigma))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        mean = np.convolve(np.pad(self.mean, reach, mode="edge"), kernel, mode="valid")
        wide = np.pad(directions, ((0, 0), (0, 0), (reach, reach)), mode="edge")
        size = wide.shape[-1] + len(kernel) - 1
        product = np.fft.rfft(wide, size) * np.fft.rfft(kernel, size)
        return mean, np.fft.irfft(product, size)[..., 2 * reach : 2 * reach + directions.shape[-1]]


@dataclass
class Design:
    """What the pixels of one grid are compared with, for each interval that it has pixels in."""

    rung: Rung
    intervals: np.ndarray  # numbers of the intervals
    pixels: list[slice]  # of the grid
    rows: list[torch.Tensor]  # (2 + coefficients, pixels): mean, mean * x, directions times their prior
    products: list[torch.Tensor]  # (pairs, pixels): products of pairs of rows
    pairs: torch.Tensor  # (2 + coefficients, 2 + coefficients): which pair each is
    prior_of_pairs: torch.Tensor  # (pairs,): 1 of those of a row with itself
    blind: np.ndarray  # (pixels of the grid,), bool: those in bands that nothing is taken from
    templates: list[np.ndarray] | None = None  # (velocities, pixels): the mean, moved, once it was asked for


@dataclass
class Evidence:
    """
    What spectra say, interval by interval. B stars, T intervals, K coefficients, level and slope among them.

    Attributes
    ----------
    intervals : int array of shape (T,)
    coefficients : float array of shape (B, T, K)
        Posterior means in units of the prior: ln of the level over that of the star, slope, directions.
    reliability : float array of shape (B, T, K)
        1 - posterior variance / prior variance: 0 = nothing was seen, 1 = known exactly.
    seen : bool array of shape (B, T)
        Intervals with pixels that count.
    misfit : float array of shape (B, T)
        chi^2 per degree of freedom of what the directions cannot say, without clipped pixels; NaN without errors.
    clipped : bool array of shape (B, pixels)
    scale : float array of shape (B,)
        The level of the star: 1 where spectra are normalised.
    estimate : float array of shape (B, T, K)
        Level, slope and directions as they add up to the spectrum, in units of the prior, where flux is over the
        continuum; elsewhere over the level of the interval.
    whole_information : float array of shape (B, intervals of the rung, K, K)
        Inverse covariance of these that the pixels alone give, of all intervals of the rung: zeros without pixels.
    place : int array of shape (T,)
        Which intervals of the rung `intervals` are.
    pull : float array of shape (B, T, K)
        Derivative of the likelihood of the pixels at `estimate`, which the prior keeps from its peak.
    level : float array of shape (B, T)
        What the prior of the level lies around, in the unit of the flux.
    unit : float array of shape (B, T)
        By which `estimate` is over the least squares in units of `level`.
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
        With intervals that do not share numbers.
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
        """Without what is kept of grids: a tokenizer that has been used is the same to `datasets.map`."""
        return type(self), (self.rungs,)

    # -------------------------------------------------------------------------------------------------------- files

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file of safetensors holds; directions in half precision, as their errors are far below any noise."""
        found = {}
        for number, rung in enumerate(self.rungs):
            for field in fields(rung):
                value = np.asarray(getattr(rung, field.name))
                if not value.size:
                    continue
                kind = np.float16 if field.name == "directions" else None
                found[f"{number}.{field.name}"] = value.astype(kind or value.dtype, order="C")
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
                value = np.asarray(arrays[name])
                if value.ndim == 0:
                    values[field.name] = value.item()
                else:
                    values[field.name] = value.astype(np.int64 if field.name == "offset" else np.float64)
            rungs.append(Rung(**values))
        return cls(rungs)

    # ------------------------------------------------------------------------------------------------------ designs

    def rung_for(self, wavelength: np.ndarray, resolving_power: float | np.ndarray | None = None) -> Rung | None:
        """
        The rung that a spectrum belongs to: of those that share wavelengths with it, the finest one that its resolving
        power reaches. Where that is unknown, it is taken for 2.5 pixels in a FWHM.

        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, increasing.
        resolving_power : float, or array of shape (pixels,), optional

        Returns
        -------
        Rung, or None where no rung shares wavelengths with the spectrum
        """
        power = _guess(wavelength) if resolving_power is None else float(np.median(resolving_power))
        shared = []
        for rung in self.rungs:
            low, high = rung.range
            if np.any((wavelength > low) & (wavelength < high)):
                shared.append(rung)
        reached = [rung for rung in shared if power >= rung.lowest_resolving_power]
        if reached:
            return max(reached, key=lambda rung: rung.lowest_resolving_power)
        return min(shared, key=lambda rung: rung.lowest_resolving_power, default=None)

    def design(self, wavelength: np.ndarray, resolving_power: float | np.ndarray | None = None) -> Design:
        """
        What the pixels of a grid are compared with; kept for the last grids that were asked for.

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
                    resolving_power = _guess(wavelength)
                kept = design_of_rung(rung, wavelength, resolving_power)
            if kept is None or not len(kept.intervals):
                ranges = ", ".join("{:.0f}-{:.0f}".format(*rung.range) for rung in self.rungs)
                raise ValueError(
                    f"wavelength: expected some of {ranges} Angstrom, got {wavelength[0]:.1f}-{wavelength[-1]:.1f}"
                    + (" in pixels wider than an interval" if kept else "")
                )
            if len(self._designs) >= KEPT:
                self._designs = dict(list(self._designs.items())[-KEPT // 2 :])  # threads may share it
            self._designs[key] = kept
        return kept

    def brought_down(
        self, wavelength: np.ndarray, flux: np.ndarray, inverse_variance: np.ndarray, resolving_power: float | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None]:
        """
        The same spectra (stars, pixels), or, where their resolving power is higher than that of a rung which wants it,
        smoothed spectra on a grid of their own, see [`degraded`]; and the resolving power.
        """
        rung = self.rung_for(wavelength, resolving_power)
        if rung is None or not rung.guesses_power:
            return wavelength, flux, inverse_variance, resolving_power
        power = _guess(wavelength) if resolving_power is None else resolving_power
        if power <= rung.resolving_power * NATIVE_TOLERANCE:
            return wavelength, flux, inverse_variance, resolving_power
        return *degraded(wavelength, flux, inverse_variance, power, rung.resolving_power), rung.resolving_power

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
            0 where a pixel does not count.
        resolving_power : float, or array of shape (pixels,), optional
            See [`SpectrumBasis.design`].
        normalised : bool, or array of shape (stars,), optional
            Whether the flux is over the continuum: then its level is compared with 1, and else with that of the star.
            Default, and where it is NaN: where the level of the star is near 1. In rungs of low resolving powers it
            plays no part.
        clip : bool
            Whether to leave out pixels that no star of the basis could have.

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
        first, seen = _first_levels(design, all_values, all_weights)
        level_counts, scale = self._scale(design.rung, first, seen, unit_of_flux[:, 0], normalised)
        begin = torch.maximum(first, MIN_LEVEL * scale[:, None])
        over_scale = begin / scale[:, None]
        one = torch.ones(())
        parts = [slice(start, start + STARS_AT_ONCE) for start in range(0, n_stars, STARS_AT_ONCE)]
        for (i, pixels), stars in itertools.product(enumerate(design.pixels), parts):
            start = begin[stars, i, None]
            values = all_values[stars, pixels] / start
            weight = all_weights[stars, pixels] * start**2
            weight /= torch.add(one, weight, alpha=MODEL_ERROR**2)
            marked = clipped[stars, pixels] if clip else None
            found[stars, i], variance[stars, i], gram, chi2[stars, i], changed = _fit(design, i, values, weight, marked)
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
        scale = _level_of_star(level.numpy(), seen.numpy())
        level_counts = np.full(len(scale), rung.counts_level)
        if rung.over_continuum:
            near = np.abs(np.log(scale * unit)) < NEAR_ONE
            stated = np.broadcast_to(np.asarray(np.nan if normalised is None else normalised, float), len(scale))
            level_counts = np.where(np.isnan(stated), near, stated > 0)
            scale = np.where(level_counts, 1.0 / unit, scale).astype(np.float32)
        return torch.from_numpy(level_counts), torch.from_numpy(scale)

    @staticmethod
    def strange(evidence: Evidence, clipped: np.ndarray) -> np.ndarray:
        """(stars,): where the directions leave more than errors explain, or many pixels are left out."""
        misfit = np.where(np.isfinite(evidence.misfit), evidence.misfit, 1.0)
        return (np.median(misfit, axis=1) > STRANGE_MISFIT) | (clipped > STRANGE_CLIPPED)

    def tells_velocity(self, wavelength: np.ndarray, resolving_power: float | np.ndarray | None = None) -> bool:
        """Whether lines are narrow enough on this grid to say where rest is."""
        rung = self.rung_for(wavelength, resolving_power)
        stated = np.inf if resolving_power is None else float(np.median(resolving_power))
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
        The velocity in km/s, of steps of `SHIFT_STEP`, at which spectra go along best with the mean of stars; 0 where
        none is much better than rest. Arguments as in [`SpectrumBasis.evidence`]; returns (stars,).
        """
        design = self.design(wavelength, resolving_power)
        velocities = np.arange(-SHIFT_LIMIT, SHIFT_LIMIT + SHIFT_STEP, SHIFT_STEP)
        if design.templates is None:
            design.templates = _templates(design, np.log(wavelength), velocities, resolving_power)
        together, stars, templates = (0.0, 0.0, 0.0)
        for pixels, template in zip(design.pixels, design.templates, strict=True):
            weight = inverse_variance[:, pixels]
            total = np.maximum(weight.sum(axis=1, keepdims=True), 1e-30)
            level = (weight * flux[:, pixels]).sum(axis=1, keepdims=True) / total
            lines = flux[:, pixels] / np.where(level > 0, level, 1.0) - 1.0
            # The same weight for pixels of all intervals, and none for what was not seen.
            weight = weight * level**2
            together = together + (weight * lines) @ template.T
            stars = stars + (weight * lines**2).sum(axis=1, keepdims=True)
            templates = templates + weight @ (template**2).T
        found = together / np.sqrt(np.maximum(stars * templates, 1e-30))
        best = found.max(axis=1)
        return np.where(best > found[:, len(velocities) // 2] + SHIFT_GAIN, velocities[found.argmax(axis=1)], 0.0)


# --------------------------------------------------------------------------------------------------------- the algebra


def _templates(
    design: Design, position: np.ndarray, velocities: np.ndarray, resolving_power: float | np.ndarray | None
) -> list[np.ndarray]:
    """The mean of stars at each velocity, of each interval less its own mean, (velocities, pixels of the interval)."""
    mean, _ = design.rung.smoothed(None if resolving_power is None else float(np.median(resolving_power)))
    grid = design.rung.start + design.rung.step * np.arange(len(mean))
    found = []
    for pixels in design.pixels:
        template = np.interp(position[pixels] - np.log1p(velocities / SPEED_OF_LIGHT)[:, None], grid, mean)
        found.append(template - template.mean(axis=1, keepdims=True))
    return found


def _guess(wavelength: np.ndarray) -> float:
    """The resolving power of spectra with `PIXELS` in a FWHM."""
    return float(np.median(wavelength / (2.0 * half_widths(wavelength)))) / PIXELS


def half_widths(wavelength: np.ndarray) -> np.ndarray:
    """Half of the width of each pixel, from the distance to its neighbours; of some pixels that are absent, nothing."""
    if len(wavelength) < 2:
        return 0.5 * 1e-4 * wavelength
    distance = np.diff(wavelength)
    distance = np.where(distance > 0, distance, np.inf)  # of two pixels at one wavelength, each is as wide as others
    near = np.minimum(np.append(distance, np.inf), np.insert(distance, 0, np.inf))
    padded = np.pad(near, 4, constant_values=np.inf)
    # Beside absent pixels the distance is wider than the pixel; the least of some neighbours is not.
    found = np.min(np.lib.stride_tricks.sliding_window_view(padded, 9), axis=1)
    return 0.5 * np.where(np.isfinite(found), found, 1e-4 * wavelength)


def degraded(
    wavelength: np.ndarray, flux: np.ndarray, inverse_variance: np.ndarray, power: float, lower_power: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Spectra (stars, pixels) of a resolving power as they would be at a lower one, on a grid with `PIXELS` pixels in a
    FWHM. Pixels without weight are left out of the means; each new one counts as much as the old ones in it did, as
    smoothing takes nothing from what is wider than it.

    Returns
    -------
    wavelength, flux, inverse_variance
    """
    position = np.log(wavelength)
    step = 1.0 / (lower_power * PIXELS)
    # New pixels where there are old ones, none across gaps.
    number = np.unique(np.floor((position - position[0]) / step).astype(int))
    new = position[0] + (number + 0.5) * step
    # Of the line spread function, and of the new pixels, which are means.
    sigma = np.sqrt((lower_power**-2.0 - power**-2.0) / FWHM**2 + step**2 / 12.0)
    low, high = (np.searchsorted(position, new + side * 4.0 * sigma) for side in (-1, 1))
    rows = np.repeat(np.arange(len(new)), high - low)
    columns = np.concatenate([np.arange(i, j) for i, j in zip(low, high, strict=True)])
    near = np.exp(-0.5 * ((position[columns] - new[rows]) / sigma) ** 2) * half_widths(wavelength)[columns]
    smoothing = csr_matrix((near, (rows, columns)), shape=(len(new), len(position)))
    inside = np.searchsorted(number, np.floor((position - position[0]) / step).astype(int))
    adding = csr_matrix((np.ones(len(position)), (inside, np.arange(len(position)))), shape=smoothing.shape)
    counts = inverse_variance > 0
    share = (smoothing @ counts.T.astype(float)).T / np.asarray(smoothing.sum(axis=1))[:, 0].clip(min=1e-30)
    smooth = (smoothing @ np.where(counts, flux, 0.0).T).T / np.maximum((smoothing @ counts.T.astype(float)).T, 1e-30)
    weight = np.where(share > 0.5, (adding @ inverse_variance.T).T, 0.0)
    return np.exp(new), np.where(weight > 0, smooth, 0.0), weight


def interpolated(wavelength: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """
    Values (stars, pixels) on another grid, (stars, points), linearly; NaN outside, in gaps, where a neighbour is NaN.
    """
    if len(wavelength) == len(grid) and np.allclose(wavelength, grid, rtol=1e-9, atol=0.0):
        return values
    if len(wavelength) < 2:
        return np.full((len(values), len(grid)), np.nan, values.dtype)
    right = np.searchsorted(wavelength, grid).clip(1, len(wavelength) - 1)
    distance = wavelength[right] - wavelength[right - 1]
    share = (grid - wavelength[right - 1]) / np.where(distance > 0, distance, 1.0)
    inside = (share >= 0.0) & (share <= 1.0) & (distance < WIDEST_STEP * np.median(np.diff(wavelength)))
    # Where a point is that of a pixel, its neighbour does not count.
    found = np.where(
        share == 0.0, values[:, right - 1], (1.0 - share) * values[:, right - 1] + share * values[:, right]
    )
    found = np.where(share == 1.0, values[:, right], found)
    return np.where(inside, found, np.nan).astype(values.dtype, copy=False)


def means_over_pixels(values: np.ndarray, first: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """
    Means between `low` and `high`, in own pixels, of functions (..., own pixels) that are means over their pixels, of
    which the first is number `first`. The cumulative function is interpolated through `TAPS` edges.
    """
    total = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)

    def cumulative(edge):
        position = edge - first + 0.5  # in edges
        left = np.clip(np.floor(position).astype(int) - TAPS // 2 + 1, 0, total.shape[-1] - TAPS)
        nodes = np.arange(TAPS)
        x = (position - left)[:, None]
        weights = np.ones((len(edge), TAPS))
        for i in nodes:
            for j in nodes[nodes != i]:
                weights[:, i] *= (x[:, 0] - j) / (i - j)
        found = np.zeros((*total.shape[:-1], len(edge)))
        for i in nodes:
            found += total[..., left + i] * weights[:, i]
        return found

    return (cumulative(high) - cumulative(low)) / (high - low)


def over_level(mean, variance, level):
    """
    Posterior means and variances (..., K) with a prior of 1, divided by the level of each star (..., 1), with a
    prior of 1 again: of an interval that is fainter than it was taken for, little is known of its shape. The first is
    the level itself, and only divided.
    """
    mean, variance = mean / level, variance / level**2
    again = 1.0 / (1.0 / variance[..., 1:] - level**2 + 1.0)
    mean[..., 1:] *= again / variance[..., 1:]
    variance[..., 1:] = again
    return mean, variance


def interval_matrices(rung: Rung, wavelength: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    For each interval the pixels of a spectrum on the grid of the rung's emulator, and the matrix that makes
    coefficients of them, in units of the prior: level, slope, directions. Intervals without pixels have no matrix rows.
    """
    position = np.log(wavelength)
    found = []
    for interval in range(rung.n_intervals):
        low = rung.edge + interval * rung.width
        begin = int(rung.offset[interval])
        window = np.arange(begin, min(begin + rung.directions.shape[-1], len(position)))
        pixels = window[(position[window] >= low) & (position[window] < low + rung.width)]
        unit = np.concatenate([[1.0, rung.slope_prior], rung.prior[interval]])
        if len(pixels) < 4:
            found.append((pixels, np.zeros((len(unit), len(pixels)))))
            continue
        x = 2.0 * (position[pixels] - low) / rung.width - 1.0
        mean = rung.mean[pixels]
        rows = np.concatenate([[mean, mean * x], rung.directions[interval][:, pixels - begin]])
        found.append((pixels, np.linalg.pinv(rows.T, rcond=1e-6) / unit[:, None]))
    return found


def design_of_rung(rung: Rung, wavelength: np.ndarray, resolving_power: float | np.ndarray | None) -> Design:
    """[`SpectrumBasis.design`] of a rung, whatever the grid."""
    by_pixel, one = (resolving_power, None) if isinstance(resolving_power, np.ndarray) else (None, resolving_power)
    mean, directions = rung.smoothed(one)
    position = np.log(wavelength)
    half = half_widths(wavelength)
    low = (np.log(np.maximum(wavelength - half, 1.0)) - rung.start) / rung.step  # a lone pixel may be as wide as that
    high = (np.log(wavelength + half) - rung.start) / rung.step
    usable = (low > -0.5) & (high < len(mean) - 0.5)
    number = np.floor((position - rung.edge) / rung.width).astype(int)
    blind = np.zeros(len(wavelength), bool)
    for first, last in rung.blind:
        blind |= (wavelength > first) & (wavelength < last)
    intervals, pixels, rows, products = [], [], [], []
    for interval in range(rung.n_intervals):
        begin = int(rung.offset[interval])
        # Pixels so wide that they reach beyond what is known around the interval are left out.
        within = (low > begin - 0.5) & (high < begin + directions.shape[-1] - 0.5)
        inside = np.flatnonzero((number == interval) & usable & within)
        if not inside.size:
            continue
        part = slice(int(inside[0]), int(inside[-1]) + 1)
        own = directions[interval]
        if by_pixel is not None:
            mean, (own,) = rung.smoothed(float(np.median(by_pixel[part])), interval)
        window = np.concatenate([mean[None, begin : begin + directions.shape[-1]], own])
        found = means_over_pixels(window, begin, low[part], high[part])
        x = 2.0 * (position[part] - rung.edge - interval * rung.width) / rung.width - 1.0
        table = np.concatenate([found[:1], found[:1] * x * rung.slope_prior, found[1:] * rung.prior[interval][:, None]])
        table[:, blind[part]] = 0.0
        i, j = np.triu_indices(len(table))
        intervals.append(rung.first_interval + interval)
        pixels.append(part)
        rows.append(torch.from_numpy(table.astype(np.float32)))
        products.append(torch.from_numpy((table[i] * table[j]).astype(np.float32)))
    size = 2 + directions.shape[1]
    pairs = np.zeros((size, size), int)
    upper = np.triu_indices(size)
    pairs[upper] = np.arange(len(upper[0]))
    pairs.T[upper] = pairs[upper]
    prior = torch.from_numpy(np.equal(*upper).astype(np.float32))
    return Design(rung, np.array(intervals, np.int64), pixels, rows, products, torch.from_numpy(pairs), prior, blind)


def _fit(
    design: Design, i: int, values: torch.Tensor, weight: torch.Tensor, clipped: torch.Tensor | None
) -> tuple[Any, ...]:
    """
    (stars, pixels) twice -> what [`_solve`] finds, chi^2, and whether a weight has changed. With `clipped`, of the same
    shape, pixels that no star could have are marked there, and get no weight.
    """
    found = _solve(design, i, values, weight)
    squared, fit = _squared(design, i, values, weight, found[0])
    chi2 = squared.sum(dim=1)
    if clipped is None:
        return *found, chi2, False
    # No deviation is larger than without what models do not say.
    (stars,) = torch.nonzero(squared.amax(dim=1) > CLIPPED_AT**2, as_tuple=True)
    squared, fit, changed = squared[stars], fit[stars], False
    for _ in range(ROUNDS):
        deviation = squared / (weight[stars] * fit.square()).mul_(FLOOR**2).add_(1.0)
        worst = deviation.amax(dim=1) if len(stars) else deviation.new_empty(0)
        wild = worst > CLIPPED_AT**2
        if not wild.any():
            break
        stars, deviation, worst, changed = stars[wild], deviation[wild], worst[wild], True
        # Of several, those that are not much nearer to the fit than the worst, which may have bent it.
        bad = deviation > (0.1 * worst[:, None]).clamp(min=CLIPPED_AT**2)
        weight[stars] = weight[stars].masked_fill(bad, 0.0)
        clipped[stars] |= bad
        again = _solve(design, i, values[stars], weight[stars])
        for tensor, new in zip(found, again, strict=True):
            tensor[stars] = new
        squared, fit = _squared(design, i, values[stars], weight[stars], again[0])
        chi2[stars] = squared.sum(dim=1)
    return *found, chi2, changed


def _solve(design: Design, i: int, values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    (stars, pixels) twice -> posterior means and variances, (stars, 2 + coefficients) each, in units of the prior; and
    the inverse covariance without the prior.
    """
    rows = design.rows[i]
    # The prior, of one, comes with the product; the information is without it.
    both = product(weight, design.products[i], design.prior_of_pairs).index_select(1, design.pairs.flatten())
    both = both.unflatten(1, design.pairs.shape)
    # The prior of the level is around 1, where it was first put.
    right = (weight * values) @ rows.T
    right[:, 0] += 1.0
    # The directions are nearly independent of each other: single precision suffices.
    inverse, failed = inverse_factor(both)
    if failed.any():  # rounding, of directions that a few pixels cannot tell apart
        gram = both[failed].double()
        gram.diagonal(dim1=1, dim2=2).mul_(1.0 + 1e-5)
        inverse[failed] = torch.linalg.inv(torch.linalg.cholesky(gram)).float()
    mean = ((right[:, None] @ inverse.mT) @ inverse)[:, 0]
    both.diagonal(dim1=1, dim2=2).sub_(1.0)
    return mean, (inverse * inverse).sum(dim=1), both


def inverse_factor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Inverses of the lower Cholesky factors of matrices (stars, K, K), whose inverse is `factor^T factor`; and of which
    there is none, (stars,). By halves, which are products of matrices: LAPACK is slow with those that are small.
    """
    size = matrix.shape[-1]
    if size <= SMALL:
        lower, info = torch.linalg.cholesky_ex(matrix)
        unit = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(lower, unit, upper=False), info > 0
    half = size // 2
    upper, failed = inverse_factor(matrix[:, :half, :half])
    below = matrix[:, half:, :half] @ upper.mT
    lower, failed_too = inverse_factor(matrix[:, half:, half:] - below @ below.mT)
    found = torch.empty_like(matrix)
    found[:, :half, :half], found[:, half:, half:] = upper, lower
    found[:, :half, half:] = 0.0
    found[:, half:, :half] = -lower @ (below @ upper)
    return found, failed | failed_too


def _squared(
    design: Design, i: int, values: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stars, pixels) each: squared distance from the fit, in units of the error; and the fit."""
    fit = mean @ design.rows[i]
    return (values - fit).square_().mul_(weight), fit


def _in_own_unit(flux: np.ndarray, inverse_variance: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """
    (stars, pixels) twice -> the same, float32, in a unit (stars, 1) of each star: squares of fluxes in erg/s/cm2/A do
    not fit into single precision.
    """
    unit = _size(flux, inverse_variance)
    values = (flux / unit).astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        weights = (inverse_variance * unit.astype(inverse_variance.dtype) ** 2).astype(np.float32, copy=False)
    # Errors far below the last digit of a flux are as good as none, and float32 does not hold their inverse squares.
    return torch.from_numpy(values), torch.from_numpy(weights).clamp_(max=1e16), unit


def _first_levels(design: Design, values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels by the mean alone, and which intervals have pixels that count, (stars, intervals) each."""
    shape = (len(values), len(design.pixels))
    first, seen = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for i, pixels in enumerate(design.pixels):
        weight, row = weights[:, pixels], design.rows[i][0]
        norm = weight @ (row * row)
        seen[:, i] = norm > 0
        first[:, i] = ((weight * values[:, pixels]) @ row) / torch.where(norm > 0, norm, 1.0)
    return first, seen


def _with_prior_of_level(
    rung: Rung, mean: torch.Tensor, variance: torch.Tensor, level: torch.Tensor, level_counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Coefficients and their reliability. The level, over that of the star (stars, intervals), was free; here it gets its
    prior. Without its continuum, (stars,), the level of a narrow interval says nothing.
    """
    variance[..., 0] /= variance[..., 0] + rung.level_prior**2
    reliability = (1.0 - variance).clamp_(0.0, 1.0)
    mean[..., 0] = reliability[..., 0] * torch.log(level) / rung.level_prior
    for values in (mean, reliability):
        values[~level_counts, :, :2] = 0.0
    return mean, reliability


def _size(flux: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(stars, pixels) twice -> (stars, 1): mean absolute flux of the pixels that count, 1 without any."""
    counts = weight > 0
    sizes = np.abs(flux)
    if not counts.all():
        sizes *= counts
    size = sizes.sum(axis=1, keepdims=True) / np.maximum(np.count_nonzero(counts, axis=1, keepdims=True), 1)
    return np.where(size > 0, size, 1.0).astype(flux.dtype)


def _level_of_star(level: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(stars, intervals) -> (stars,): the median level of what was seen, or the highest where that is not positive."""
    ordered = np.sort(np.where(seen, level, np.inf), axis=1)
    count = np.maximum(seen.sum(axis=1), 1)
    stars = np.arange(len(level))
    middle = 0.5 * (ordered[stars, (count - 1) // 2] + ordered[stars, count // 2])
    highest = ordered[stars, count - 1]
    found = np.where(middle > 0, middle, np.where(highest > 0, highest, 1.0))
    return np.where(np.isfinite(found), found, 1.0).astype(np.float32)


__all__ = [
    "MODEL_ERROR",
    "Evidence",
    "Rung",
    "SpectrumBasis",
    "design_of_rung",
    "half_widths",
    "inverse_factor",
    "interpolated",
    "interval_matrices",
    "means_over_pixels",
    "over_level",
]
