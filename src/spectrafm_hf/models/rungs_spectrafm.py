# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Intervals of ln wavelength with the mean and the directions of stars, and their design matrices on any grid.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from .gate_spectrafm import SPEED_OF_LIGHT
from .products_spectrafm import inverse_factor, product


FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))  # in sigma, of a Gaussian
TAPS = 6  # points of the interpolation of the cumulative flux
NARROWEST = 1e-8  # of its wavelength, half of a pixel: closer pixels are not distinct in floating point
PIXELS = 2.5  # in a FWHM, where the resolving power is unknown
WIDEST_STEP = 2.5  # of the usual distance of pixels: a wider one is a gap
NATIVE_TOLERANCE = 1.03  # resolving powers that differ by less count as the same
CLIPPED_AT = 6.0  # sigma, from the fit of the directions
ROUNDS = 3  # of clipping
MODEL_ERROR = 5e-4  # of the flux: residuals of the directions, and a lower limit of errors
FLOOR = 0.01  # of the flux: error of models of stars, for which no pixel is clipped


@dataclass
class Rung:
    """
    Intervals of one width, with the mean and the directions of stars, for a range of resolving powers.

    Attributes
    ----------
    first_interval : int
        Number of its first interval among those of all rungs.
    edge, width : float
        ln of the lower edge (Angstrom) of the first interval, and the width of each.
    start, step : float
        ln of the middle of the first pixel of its own grid, which is even in ln wavelength.
    resolving_power : float
        Wavelength / FWHM of its own grid; it is smoothed for spectra of a lower one.
    lowest_resolving_power : float
        Spectra of a lower one belong to another rung.
    mean : array of shape (pixels,)
    offset : array of shape (intervals,)
        First pixel of the directions of each interval, which extend beyond the interval on both sides.
    directions : array of shape (intervals, coefficients, pixels of an interval)
    prior : array of shape (intervals, coefficients)
        Standard deviation of the coefficients among stars.
    level_prior, slope_prior : float
        Standard deviation of ln level and of slope among stars.
    over_continuum : bool
        Whether spectra of this rung may be divided by the continuum, so that their level has information.
    counts_level : bool
        Whether levels and slopes have information about a star: not where flux calibrations are unreliable.
    guesses_power : bool
        Whether an unknown resolving power is taken for `PIXELS` in a FWHM, rather than for that of the rung, and
        spectra of a higher one than that of the rung are to be brought down to it.
    blind : array of shape (bands, 2)
        First and last wavelength in Angstrom of bands that are not used (telluric).
    observed_power : float
        Resolving power of the observed training stars. Spectra of a higher one than that of the rung are predicted at
        this resolving power; 0 for that of the rung.
    least_inside : float
        Share of the pixels of a spectrum that have to be in its range; with fewer, another rung is taken.
    model_error : float
        Of the flux: what is added to errors in quadrature, as models of stars are not better.
    kind_shares : array of shape (kinds,)
        Weights of a mixture of Gaussians for stars, in the space of some directions of all coefficients. Only used for
        whole spectra; empty: one Gaussian.
    kind_center : array of shape (intervals, coefficients)
    kind_directions : array of shape (intervals, coefficients, amplitudes)
    kind_means : array of shape (kinds, amplitudes)
    kind_factors : array of shape (kinds, amplitudes * (amplitudes + 1) / 2)
        Lower triangles, row by row, of matrices whose product with their transposes is the covariance of a kind.
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
    observed_power: float = 0.0
    least_inside: float = 0.0
    model_error: float = MODEL_ERROR
    kind_shares: Any = ()
    kind_center: Any = ()
    kind_directions: Any = ()
    kind_means: Any = ()
    kind_factors: Any = ()

    @property
    def n_intervals(self) -> int:
        return len(self.offset)

    def kinds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shares (kinds,), means (kinds, amplitudes) and factors (kinds, amplitudes, amplitudes) of the mixture."""
        size = self.kind_means.shape[1]
        factors = np.zeros((len(self.kind_means), size, size))
        factors[:, *np.tril_indices(size)] = self.kind_factors
        return self.kind_shares, self.kind_means, factors

    def has(self, intervals: np.ndarray) -> bool:
        """Whether any of these are its own."""
        last = self.first_interval + self.n_intervals
        return bool(((intervals >= self.first_interval) & (intervals < last)).any())

    @property
    def range(self) -> tuple[float, float]:
        """Angstrom that its own grid covers."""
        return float(np.exp(self.start)), float(np.exp(self.start + self.step * (len(self.mean) - 1)))

    def covers(self, wavelength: np.ndarray) -> bool:
        """Whether any of these wavelengths (Angstrom), and as many as it needs, are in its range."""
        low, high = self.range
        inside = (wavelength > low) & (wavelength < high)
        return bool(inside.any() and inside.mean() >= self.least_inside)

    def power_of(self, wavelength: np.ndarray, resolving_power: float | None = None) -> float:
        """Wavelength / FWHM at which pixels at these wavelengths are read: as stated, as guessed, or its highest."""
        if resolving_power is None and self.guesses_power:
            resolving_power = guessed_power(wavelength)
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
    """Model of the pixels of one grid, for each interval with pixels."""

    rung: Rung
    intervals: np.ndarray  # numbers of the intervals
    pixels: list[slice]  # of the grid
    rows: list[torch.Tensor]  # (2 + coefficients, pixels): mean, mean * x, directions times their prior
    products: list[torch.Tensor]  # (pairs, pixels): products of pairs of rows
    pairs: torch.Tensor  # (2 + coefficients, 2 + coefficients): which pair each is
    prior_of_pairs: torch.Tensor  # (pairs,): 1 of those of a row with itself
    blind: np.ndarray  # (pixels of the grid,), bool: those in unused bands
    templates: list[np.ndarray] | None = None  # (velocities, pixels): the shifted mean, computed on first use


# ---------------------------------------------------------------------------------------------------------- grids


def one_power(resolving_power: float | np.ndarray) -> float:
    """The resolving power of a spectrum, from that or from those of its pixels."""
    return float(np.median(resolving_power))


def guessed_power(wavelength: np.ndarray) -> float:
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
    return np.maximum(0.5 * np.where(np.isfinite(found), found, 1e-4 * wavelength), NARROWEST * wavelength)


def degraded(
    wavelength: np.ndarray, flux: np.ndarray, inverse_variance: np.ndarray, power: float, lower_power: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Smooth spectra (stars, pixels) to a lower resolving power, on a grid with `PIXELS` pixels in a FWHM. Pixels without
    weight are left out of the means; the weight of a new pixel is the sum of those of the old ones in it.

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


# -------------------------------------------------------------------------------------------------------- designs


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
        # Pixels that reach beyond the margin around the interval are left out.
        within = (low > begin - 0.5) & (high < begin + directions.shape[-1] - 0.5)
        inside = np.flatnonzero((number == interval) & usable & within)
        if not inside.size:
            continue
        part = slice(int(inside[0]), int(inside[-1]) + 1)
        own = directions[interval]
        if by_pixel is not None:
            mean, (own,) = rung.smoothed(one_power(by_pixel[part]), interval)
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


# -------------------------------------------------------------------------------------------------- least squares


def first_levels(design: Design, values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels by the mean alone, and which intervals have pixels that count, (stars, intervals) each."""
    shape = (len(values), len(design.pixels))
    first, seen = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for i, pixels in enumerate(design.pixels):
        weight, row = weights[:, pixels], design.rows[i][0]
        norm = weight @ (row * row)
        seen[:, i] = norm > 0
        first[:, i] = ((weight * values[:, pixels]) @ row) / torch.where(norm > 0, norm, 1.0)
    return first, seen


def fit_interval(
    design: Design, i: int, values: torch.Tensor, weight: torch.Tensor, clipped: torch.Tensor | None
) -> tuple[Any, ...]:
    """
    (stars, pixels) twice -> result of [`_solve`], chi^2, and whether a weight has changed. Pixels with a flux that no
    star has are marked in `clipped`, of the same shape, and get no weight.
    """
    found = _solve(design, i, values, weight)
    squared, fit = _squared(design, i, values, weight, found[0])
    chi2 = squared.sum(dim=1)
    if clipped is None:
        return *found, chi2, False
    # No deviation is larger than without the model error.
    (stars,) = torch.nonzero(squared.amax(dim=1) > CLIPPED_AT**2, as_tuple=True)
    squared, fit, changed = squared[stars], fit[stars], False
    for _ in range(ROUNDS):
        deviation = squared / (weight[stars] * fit.square()).mul_(FLOOR**2).add_(1.0)
        worst = deviation.amax(dim=1) if len(stars) else deviation.new_empty(0)
        wild = worst > CLIPPED_AT**2
        if not wild.any():
            break
        stars, deviation, worst, changed = stars[wild], deviation[wild], worst[wild], True
        # Only clip pixels nearly as far from the fit as the worst one, which may have biased it.
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
    if failed.any():  # rounding, of directions that are degenerate on a few pixels
        gram = both[failed].double()
        gram.diagonal(dim1=1, dim2=2).mul_(1.0 + 1e-5)
        inverse[failed] = torch.linalg.inv(torch.linalg.cholesky(gram)).float()
    mean = ((right[:, None] @ inverse.mT) @ inverse)[:, 0]
    both.diagonal(dim1=1, dim2=2).sub_(1.0)
    return mean, (inverse * inverse).sum(dim=1), both


def _squared(
    design: Design, i: int, values: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stars, pixels) each: squared distance from the fit, in units of the error; and the fit."""
    fit = mean @ design.rows[i]
    return (values - fit).square_().mul_(weight), fit


def moved_means(
    design: Design, position: np.ndarray, velocities: np.ndarray, resolving_power: float | np.ndarray | None
) -> list[np.ndarray]:
    """The mean of stars at each velocity, of each interval less its own mean, (velocities, pixels of the interval)."""
    mean, _ = design.rung.smoothed(None if resolving_power is None else one_power(resolving_power))
    grid = design.rung.start + design.rung.step * np.arange(len(mean))
    found = []
    for pixels in design.pixels:
        template = np.interp(position[pixels] - np.log1p(velocities / SPEED_OF_LIGHT)[:, None], grid, mean)
        found.append(template - template.mean(axis=1, keepdims=True))
    return found


def mean_flux(flux: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(stars, pixels) twice -> (stars, 1): mean absolute flux of the pixels that count, 1 without any."""
    counts = weight > 0
    sizes = np.abs(flux)
    if not counts.all():
        sizes *= counts
    size = sizes.sum(axis=1, keepdims=True) / np.maximum(np.count_nonzero(counts, axis=1, keepdims=True), 1)
    return np.where(size > 0, size, 1.0).astype(flux.dtype)


def level_of_star(level: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(stars, intervals) -> (stars,): the median level of observed intervals, or the highest if it is not positive."""
    ordered = np.sort(np.where(seen, level, np.inf), axis=1)
    count = np.maximum(seen.sum(axis=1), 1)
    stars = np.arange(len(level))
    middle = 0.5 * (ordered[stars, (count - 1) // 2] + ordered[stars, count // 2])
    highest = ordered[stars, count - 1]
    found = np.where(middle > 0, middle, np.where(highest > 0, highest, 1.0))
    return np.where(np.isfinite(found), found, 1.0).astype(np.float32)
