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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .gate_spectrafm import SPEED_OF_LIGHT


FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))  # in sigma, of a Gaussian
TAPS = 6  # edges that the cumulative flux is interpolated through
CLIPPED_AT = 6.0  # sigma, from what the directions can say
ROUNDS = 3  # of clipping
KEPT = 8  # grids whose designs are kept
FLOOR = 0.01  # of the flux: a deviation that models of stars have anyway, and that no pixel is clipped for
MODEL_ERROR = 5e-4  # of the flux: what the directions leave out, and no error is smaller than
MIN_LEVEL = 0.02  # of the level of the star: a fainter interval is compared with this
NEAR_ONE = 0.15  # of ln level: so is the flux over the continuum of any star, averaged over many lines
# A spectrum that looks like no star: chi^2 per degree of freedom, share of the pixels. Then other velocities are tried,
# in km/s, one of which has to go along better with the mean of stars by this correlation; with lines that are narrow.
STRANGE_MISFIT, STRANGE_CLIPPED = 1.3, 0.01
SHIFT_LIMIT, SHIFT_STEP, SHIFT_GAIN, LEAST_POWER = 150.0, 5.0, 0.15, 5_000.0
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

    def smoothed(self, resolving_power: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and directions at a lower resolving power; its own where None, or where it is no lower."""
        if resolving_power is None or resolving_power * NATIVE_TOLERANCE >= self.resolving_power:
            return self.mean, self.directions
        sigma = np.sqrt(resolving_power**-2.0 - self.resolving_power**-2.0) / FWHM / self.step
        reach = int(np.ceil(4.0 * sigma))
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        mean = np.convolve(np.pad(self.mean, reach, mode="edge"), kernel, mode="valid")
        wide = np.pad(self.directions, ((0, 0), (0, 0), (reach, reach)), mode="edge")
        size = wide.shape[-1] + len(kernel) - 1
        product = np.fft.rfft(wide, size) * np.fft.rfft(kernel, size)
        return mean, np.fft.irfft(product, size)[..., 2 * reach : 2 * reach + self.directions.shape[-1]]


@dataclass
class Design:
    """What the pixels of one grid are compared with, for each interval that it has pixels in."""

    rung: Rung
    intervals: np.ndarray  # numbers of the intervals
    pixels: list[slice]  # of the grid
    rows: list[torch.Tensor]  # (2 + coefficients, pixels): mean, mean * x, directions times their prior
    products: list[torch.Tensor]  # (pixels, pairs): products of pairs of rows
    pairs: torch.Tensor  # (2 + coefficients, 2 + coefficients): which pair each is


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
    information : float array of shape (B, T, K, K)
        Inverse covariance of these that the pixels alone give.
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
    information: np.ndarray
    pull: np.ndarray
    level: np.ndarray
    unit: np.ndarray


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

    # -------------------------------------------------------------------------------------------------------- files

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file of safetensors holds; directions in half precision, as their errors are far below any noise."""
        found = {}
        for number, rung in enumerate(self.rungs):
            for field in fields(rung):
                value = np.asarray(getattr(rung, field.name))
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

    def rung_for(self, wavelength: np.ndarray, resolving_power: float | None = None) -> Rung | None:
        """
        The rung that a spectrum belongs to: of those that share wavelengths with it, the finest one that its resolving
        power reaches. Where that is unknown, it is taken for 2.5 pixels in a FWHM.

        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, increasing.
        resolving_power : float, optional

        Returns
        -------
        Rung, or None where no rung shares wavelengths with the spectrum
        """
        if resolving_power is None:
            resolving_power = float(np.median(wavelength / (2.0 * half_widths(wavelength)))) / 2.5
        shared = []
        for rung in self.rungs:
            low, high = rung.range
            if np.any((wavelength > low) & (wavelength < high)):
                shared.append(rung)
        reached = [rung for rung in shared if resolving_power >= rung.lowest_resolving_power]
        if reached:
            return max(reached, key=lambda rung: rung.lowest_resolving_power)
        return min(shared, key=lambda rung: rung.lowest_resolving_power, default=None)

    def design(self, wavelength: np.ndarray, resolving_power: float | None = None) -> Design:
        """
        What the pixels of a grid are compared with; kept for the last grids that were asked for.

        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, vacuum, rest frame, increasing.
        resolving_power : float, optional
            Of the spectrum, its pixels not included. Default: that of the rung.

        Raises
        ------
        ValueError
            If no rung shares wavelengths with the grid.
        """
        wavelength = np.asarray(wavelength, np.float64)
        key = (wavelength.tobytes(), resolving_power)
        kept = self._designs.get(key)
        if kept is None:
            rung = self.rung_for(wavelength, resolving_power)
            if rung is None:
                ranges = ", ".join("{:.0f}-{:.0f}".format(*rung.range) for rung in self.rungs)
                raise ValueError(
                    f"wavelength: expected some of {ranges} Angstrom, got {wavelength[0]:.1f}-{wavelength[-1]:.1f}"
                )
            kept = _design(rung, wavelength, resolving_power)
            if len(self._designs) >= KEPT:
                self._designs = dict(list(self._designs.items())[-KEPT // 2 :])  # threads may share it
            self._designs[key] = kept
        return kept

    def evidence(
        self,
        wavelength: np.ndarray,
        flux: np.ndarray,
        inverse_variance: np.ndarray,
        resolving_power: float | None = None,
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
        resolving_power : float, optional
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
        n_stars, n_intervals = len(flux), len(design.intervals)
        shape = (n_stars, n_intervals, self.n_coefficients)
        mean, variance = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        level = np.ones((n_stars, n_intervals), np.float32)
        seen = np.zeros((n_stars, n_intervals), bool)
        misfit = np.full((n_stars, n_intervals), np.nan, np.float32)
        clipped = np.zeros(flux.shape, bool)
        first, begin, units = np.zeros_like(level), np.zeros_like(level), np.ones_like(level)
        estimate, pull = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        information = np.zeros((*shape, shape[-1]), np.float32)
        # In units of its own size: squares of fluxes in erg/s/cm2/A do not fit into single precision.
        size = _size(flux, inverse_variance)
        all_values = torch.from_numpy((flux / size).astype(np.float32))
        all_weights = torch.from_numpy((inverse_variance * size**2).astype(np.float32))
        for i, pixels in enumerate(design.pixels):
            weight, row = all_weights[:, pixels], design.rows[i][0]
            norm = (weight @ (row * row)).numpy()
            seen[:, i] = norm > 0
            first[:, i] = ((weight * all_values[:, pixels]) @ row).numpy() / np.where(norm > 0, norm, 1.0)
        scale = _level_of_star(first, seen)
        level_counts = np.ones(n_stars, bool)
        if design.rung.over_continuum:
            near = np.abs(np.log(scale * size[:, 0])) < NEAR_ONE
            stated = np.broadcast_to(np.asarray(np.nan if normalised is None else normalised, float), n_stars)
            level_counts = np.where(np.isnan(stated), near, stated > 0)
            scale = np.where(level_counts, 1.0 / size[:, 0], scale).astype(np.float32)
        for i, pixels in enumerate(design.pixels):
            start = np.maximum(first[:, i], MIN_LEVEL * scale)
            factor = torch.from_numpy(start)[:, None]
            values, weight = all_values[:, pixels] / factor, all_weights[:, pixels] * factor**2
            weight = weight / (1.0 + MODEL_ERROR**2 * weight)
            found, covariance, gram = _solve(design, i, values, weight)
            deviation = _deviation(design, i, values, weight, found)
            for _ in range(ROUNDS if clip else 0):
                worst = deviation.amax(dim=1)
                stars = torch.nonzero(worst > CLIPPED_AT**2)[:, 0]
                if not len(stars):
                    break
                # Of several, those that are not much nearer to the fit than the worst, which may have bent it.
                bad = deviation[stars] > (0.1 * worst[stars, None]).clamp(min=CLIPPED_AT**2)
                weight[stars] = weight[stars].masked_fill(bad, 0.0)
                clipped[stars.numpy(), pixels] |= bad.numpy()
                found[stars], covariance[stars], gram[stars] = _solve(design, i, values[stars], weight[stars])
                deviation[stars] = _deviation(design, i, values[stars], weight[stars], found[stars])
            found_level = found[:, :1].clamp(0.2, 5.0)
            mean[:, i], variance[:, i] = over_level(found, covariance, found_level)
            level[:, i] = start * found_level[:, 0].numpy()
            count = torch.count_nonzero(weight, dim=1)
            free = count - self.n_coefficients
            chi2 = ((values - found @ design.rows[i]).square_() * weight).sum(dim=1) / free.clamp(min=1)
            misfit[:, i] = torch.where(free > 0, chi2, torch.nan).numpy()
            seen[:, i] &= count.numpy() > 0
            # The same in units of the level that the spectra are compared with.
            unit = np.where(level_counts, start / scale, 1.0 / found_level[:, 0].numpy())[:, None].astype(np.float32)
            begin[:, i], units[:, i] = start, unit[:, 0]
            estimate[:, i] = found.numpy() * unit
            information[:, i] = gram.numpy() / unit[..., None] ** 2
            found[:, 0] -= 1.0
            pull[:, i] = found.numpy() / unit
        # The level was free; here it gets its prior, around that of the star.
        variance[..., 0] /= variance[..., 0] + design.rung.level_prior**2
        reliability = np.clip(1.0 - variance, 0.0, 1.0)
        mean[..., 0] = reliability[..., 0] * np.log(level / scale[:, None]) / design.rung.level_prior
        # Without its continuum, the level of a narrow interval says nothing.
        mean[~level_counts, :, :2], reliability[~level_counts, :, :2] = 0.0, 0.0
        mean[~seen], reliability[~seen], information[~seen], pull[~seen] = 0.0, 0.0, 0.0, 0.0
        scale, begin = scale * size[:, 0], begin * size
        return Evidence(
            design.intervals, mean, reliability, seen, misfit, clipped, scale, estimate, information, pull, begin, units
        )

    @staticmethod
    def strange(evidence: Evidence, clipped: np.ndarray) -> np.ndarray:
        """(stars,): where the directions leave more than errors explain, or many pixels are left out."""
        misfit = np.where(np.isfinite(evidence.misfit), evidence.misfit, 1.0)
        return (np.median(misfit, axis=1) > STRANGE_MISFIT) | (clipped > STRANGE_CLIPPED)

    def tells_velocity(self, wavelength: np.ndarray, resolving_power: float | None = None) -> bool:
        """Whether lines are narrow enough on this grid to say where rest is."""
        rung = self.rung_for(wavelength, resolving_power)
        power = min(resolving_power or np.inf, rung.resolving_power if rung else 0.0)
        return power >= LEAST_POWER

    def shifts(
        self,
        wavelength: np.ndarray,
        flux: np.ndarray,
        inverse_variance: np.ndarray,
        resolving_power: float | None = None,
    ) -> np.ndarray:
        """
        The velocity in km/s, of steps of `SHIFT_STEP`, at which spectra go along best with the mean of stars; 0 where
        none is much better than rest. Arguments as in [`SpectrumBasis.evidence`]; returns (stars,).
        """
        design = self.design(wavelength, resolving_power)
        mean, _ = design.rung.smoothed(resolving_power)
        grid, position = design.rung.start + design.rung.step * np.arange(len(mean)), np.log(wavelength)
        velocities = np.arange(-SHIFT_LIMIT, SHIFT_LIMIT + SHIFT_STEP, SHIFT_STEP)
        together, stars, templates = (0.0, 0.0, 0.0)
        for pixels in design.pixels:
            weight = inverse_variance[:, pixels]
            total = np.maximum(weight.sum(axis=1, keepdims=True), 1e-30)
            moved = position[pixels] - np.log1p(velocities / SPEED_OF_LIGHT)[:, None]
            template = np.interp(moved, grid, mean)
            template = template - template.mean(axis=1, keepdims=True)
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
    Posterior means and variances (stars, K) with a prior of 1, divided by the level of each star (stars, 1), with a
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


def _design(rung: Rung, wavelength: np.ndarray, resolving_power: float | None) -> Design:
    mean, directions = rung.smoothed(resolving_power)
    position = np.log(wavelength)
    half = half_widths(wavelength)
    low = (np.log(wavelength - half) - rung.start) / rung.step
    high = (np.log(wavelength + half) - rung.start) / rung.step
    usable = (low > -0.5) & (high < len(mean) - 0.5)
    number = np.floor((position - rung.edge) / rung.width).astype(int)
    intervals, pixels, rows, products = [], [], [], []
    for interval in range(rung.n_intervals):
        begin = int(rung.offset[interval])
        # Pixels so wide that they reach beyond what is known around the interval are left out.
        within = (low > begin - 0.5) & (high < begin + directions.shape[-1] - 0.5)
        inside = np.flatnonzero((number == interval) & usable & within)
        if not inside.size:
            continue
        part = slice(int(inside[0]), int(inside[-1]) + 1)
        window = np.concatenate([mean[None, begin : begin + directions.shape[-1]], directions[interval]])
        found = means_over_pixels(window, begin, low[part], high[part])
        x = 2.0 * (position[part] - rung.edge - interval * rung.width) / rung.width - 1.0
        table = np.concatenate([found[:1], found[:1] * x * rung.slope_prior, found[1:] * rung.prior[interval][:, None]])
        i, j = np.triu_indices(len(table))
        intervals.append(rung.first_interval + interval)
        pixels.append(part)
        rows.append(torch.from_numpy(table.astype(np.float32)))
        products.append(torch.from_numpy((table[i] * table[j]).T.astype(np.float32).copy()))
    size = 2 + directions.shape[1]
    pairs = np.zeros((size, size), int)
    upper = np.triu_indices(size)
    pairs[upper] = np.arange(len(upper[0]))
    pairs.T[upper] = pairs[upper]
    return Design(rung, np.array(intervals, np.int64), pixels, rows, products, torch.from_numpy(pairs))


def _solve(design: Design, i: int, values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    (stars, pixels) twice -> posterior means and variances, (stars, 2 + coefficients) each, in units of the prior; and
    the inverse covariance without the prior.
    """
    rows = design.rows[i]
    information = (weight @ design.products[i])[:, design.pairs]
    gram = information.clone()
    gram.diagonal(dim1=1, dim2=2).add_(1.0)
    # The prior of the level is around 1, where it was first put.
    right = (weight * values) @ rows.T
    right[:, 0] += 1.0
    # Scaled to a diagonal of one, single precision suffices: the directions are nearly independent of each other.
    scale = torch.rsqrt(gram.diagonal(dim1=1, dim2=2))
    gram.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():  # rounding, of directions that a few pixels cannot tell apart
        again = gram[failed > 0].double()
        again.diagonal(dim1=1, dim2=2).add_(1e-5)
        factor[failed > 0] = torch.linalg.cholesky(again).float()
    inverse = torch.cholesky_inverse(factor)
    mean = (inverse @ (right * scale)[..., None])[..., 0] * scale
    return mean, inverse.diagonal(dim1=1, dim2=2) * scale**2, information


def _deviation(design: Design, i: int, values: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """(stars, pixels): squared distance from the fit, in units of the error and of what models do not say."""
    fit = mean @ design.rows[i]
    misfit = (values - fit).square_().mul_(weight)
    return misfit.div_(fit.square_().mul_(weight).mul_(FLOOR**2).add_(1.0))


def _size(flux: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(stars, pixels) twice -> (stars, 1): mean absolute flux of the pixels that count, 1 without any."""
    counts = weight > 0
    total = np.abs(flux, where=counts, out=np.zeros(flux.shape)).sum(axis=1, keepdims=True)
    size = total / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.where(size > 0, size, 1.0)


def _level_of_star(level: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(stars, intervals) -> (stars,): the median level of what was seen, or the highest where that is not positive."""
    found = np.ones(len(level), np.float32)
    for star, counts in enumerate(seen):
        if counts.any():
            middle, highest = np.median(level[star, counts]), level[star, counts].max()
            found[star] = middle if middle > 0 else max(highest, 0.0) or 1.0
    return found


__all__ = [
    "MODEL_ERROR",
    "Evidence",
    "Rung",
    "SpectrumBasis",
    "half_widths",
    "interval_matrices",
    "means_over_pixels",
    "over_level",
]
