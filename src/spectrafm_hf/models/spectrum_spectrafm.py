# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
What evidence says of whole spectra: the fit beside the labels, and the flux of what was not seen, with its error.

A spectrum of a rung is linear in the coefficients of its intervals. What its pixels say of them is Gaussian; so is what
is known of stars: in the H band, the star model around the labels that fit best, and elsewhere the principal components
of [`SpectraFMCompletion`]. Both together give all coefficients, seen or not, and these give flux on any grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .basis_spectrafm import MODEL_ERROR, NATIVE_TOLERANCE, Design, Rung, SpectrumBasis, design_of_rung
from .refinement_spectrafm import FIRST_LEVEL, FREE_LEVEL, LEAST_LEVEL, NUISANCE_SIGMA, Refined


STEPS = 4  # of Gauss-Newton, where flux is not linear in the coefficients
STARS_AT_ONCE = 64
#: What models of stars leave of a coefficient, in units of its prior: with the star model, and without. The
#: second was found on validation stars of Gaia XP; the first is a guess that held-out stars of the H band agree with.
UNEXPLAINED = {"star_model": 0.03, "components": 0.03}
#: Of the variance that is stated: that of Gaia XP is of noise that goes along from pixel to pixel, and there is next to
#: none of it beyond the coefficients. Found on validation stars, with a hole.
LEAST_NOISE = 0.05
LARGEST_EXCESS = 0.5  # of the same, that a spectrum may show of itself
FREE_SCALE = 3.0  # of ln of the level of a star
SLOPE_OVER_LEVEL = 5.0
ROUNDS, WELL_KNOWN = 2, 4.0
DRIFT = 0.05  # of ln of the level from interval to interval, where fluxes are not calibrated
# A part of the residual that is no noise: so many sigma, of the mean of so many pixels.
STRANGE_SIGMA, STRANGE_PIXELS = 6.0, (1, 3, 9, 27)


@dataclass
class WholeSpectra:
    """
    What is known of all intervals of a rung. B stars, T intervals, K coefficients.

    Attributes
    ----------
    rung : Rung
    mean, fit : array of shape (B, T, K)
        Of the rows of a [`Design`], over `level`: most likely flux; and what a star of the model alone would have.
    covariance : array of shape (B, T, K, K)
        Of `mean` - truth.
    level : array of shape (B, T)
        In the unit of the flux.
    parameters : array of shape (B,)
        That the spectrum has fitted, as their number counts in chi^2.
    """

    rung: Rung
    mean: np.ndarray
    fit: np.ndarray
    covariance: np.ndarray
    level: np.ndarray
    parameters: np.ndarray

    def at(self, wavelength: np.ndarray, resolving_power: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """
        Flux and its error at wavelengths.

        Parameters
        ----------
        wavelength : array of shape (pixels,)
            Angstrom, vacuum, rest frame, increasing: means over pixels that reach half-way to the next.
        resolving_power : float, optional
            Wavelength / FWHM; by default that of the rung, the highest there is.

        Returns
        -------
        flux, error : array of shape (B, pixels)
            In the unit of the spectra. NaN at single pixels that are too wide for an interval.

        Raises
        ------
        ValueError
            For wavelengths outside of the rung, or a resolving power that is too high.
        """
        design, flux = self._flux(self.mean, wavelength, resolving_power)
        error = np.full(flux.shape, np.nan)
        for interval, pixels, rows in zip(design.intervals, design.pixels, design.rows, strict=True):
            own, table = interval - self.rung.first_interval, rows.numpy()
            covariance = self.covariance[:, own].astype(np.float32)
            variance = ((table.T @ covariance) * table.T).sum(axis=2)
            error[:, pixels] = self.level[:, own, None] * np.sqrt(np.maximum(variance, 0.0))
        return flux, np.hypot(error, MODEL_ERROR * flux)

    def fitted(self, wavelength: np.ndarray, resolving_power: float | None = None) -> np.ndarray:
        """Flux of a star of the model alone, as in [`at`]."""
        return self._flux(self.fit, wavelength, resolving_power)[1]

    def _flux(self, values: np.ndarray, wavelength: np.ndarray, power: float | None) -> tuple[Design, np.ndarray]:
        wavelength = np.asarray(wavelength, np.float64)
        low, high = self.rung.range
        if wavelength.ndim != 1 or not wavelength.size or not np.all(np.diff(wavelength) > 0):
            raise ValueError(f"wavelength: expected increasing numbers, got shape {wavelength.shape}")
        if not (wavelength[0] >= low and wavelength[-1] <= high):
            raise ValueError(
                f"wavelength: expected {low:,.1f} to {high:,.1f} Angstrom, got {wavelength[0]:,.1f} to "
                f"{wavelength[-1]:,.1f}"
            )
        highest = self.rung.resolving_power
        if power is not None and not 0 < power <= highest * NATIVE_TOLERANCE:
            raise ValueError(f"resolving_power: expected at most {highest:g}, got {power:g}")
        design = design_of_rung(self.rung, wavelength, power)
        flux = np.full((len(values), len(wavelength)), np.nan)
        for interval, pixels, rows in zip(design.intervals, design.pixels, design.rows, strict=True):
            own = interval - self.rung.first_interval
            flux[:, pixels] = self.level[:, own, None] * (values[:, own] @ rows.double().numpy())
        return design, flux


@dataclass(repr=False)
class BestFit:
    """
    A spectrum, and the star that fits it best.

    Attributes
    ----------
    wavelength, flux, error : array of shape (pixels,)
        The data as they were compared; the error is NaN where a pixel does not count, the flux where there is none.
    model : array of shape (pixels,)
        NaN outside of what the model knows.
    chi2 : float
        Of the pixels that count.
    degrees_of_freedom : float
        Their number, less that of what was fitted.
    no_noise : list of (low, high, sigma)
        Angstrom, and the largest deviation there, its sign that of data - model: where the residual is no noise,
        strongest first.
    """

    wavelength: np.ndarray
    flux: np.ndarray
    error: np.ndarray
    model: np.ndarray
    chi2: float
    degrees_of_freedom: float
    no_noise: list[tuple[float, float, float]]

    def __repr__(self) -> str:
        return f"BestFit(chi2={self.chi2:.1f}, degrees_of_freedom={self.degrees_of_freedom:.1f})"

    @property
    def residual(self) -> np.ndarray:
        """(pixels,), in units of the error; NaN where a pixel does not count."""
        return (self.flux - self.model) / self.error


def whole_spectra(model: Any, basis: SpectrumBasis, grids: Sequence[Any], *, errors: bool = True) -> list[WholeSpectra]:
    """
    Whole spectra from what was seen of them.

    Parameters
    ----------
    model : SpectraFMForPrediction
        On evidence.
    basis : SpectrumBasis
        Of its tokenizer.
    grids : sequence of EvidenceOnGrid
        Of the tokenizer (`return_grids=True`).
    errors : bool
        False saves half of the time, for what `fitted` needs alone.

    Returns
    -------
    list of WholeSpectra, one for each grid
    """
    found = []
    for grid in grids:
        intervals = grid.evidence.intervals
        number, rung = next((i, each) for i, each in enumerate(basis.rungs) if each.has(intervals))
        parts = [
            _of_stars(model, number, rung, grid.evidence, slice(start, start + STARS_AT_ONCE), errors)
            for start in range(0, len(grid.stars), STARS_AT_ONCE)
        ]
        joined = {
            each.name: np.concatenate([getattr(part, each.name) for part in parts])
            for each in fields(WholeSpectra)
            if each.name != "rung"
        }
        found.append(WholeSpectra(rung, **joined))
    return found


def best_fits(model: Any, basis: SpectrumBasis, grids: Sequence[Any]) -> list[BestFit]:
    """The [`BestFit`] of each spectrum; arguments as in [`whole_spectra`]."""
    fits: dict[int, BestFit] = {}
    for grid, known in zip(grids, whole_spectra(model, basis, grids, errors=False), strict=True):
        low, high = known.rung.range
        inside = (grid.wavelength >= low) & (grid.wavelength <= high)
        star = np.full(grid.flux.shape, np.nan)
        star[:, inside] = known.fitted(grid.wavelength[inside], grid.resolving_power)
        counts = (grid.inverse_variance > 0) & ~grid.evidence.clipped & np.isfinite(star)
        with np.errstate(divide="ignore"):
            sigma = np.where(counts, 1.0 / np.sqrt(grid.inverse_variance), np.nan)
        for i, number in enumerate(grid.stars):
            residual = (grid.flux[i] - star[i]) / sigma[i]
            fits[int(number)] = BestFit(
                wavelength=grid.wavelength,
                flux=np.where(grid.inverse_variance[i] > 0, grid.flux[i], np.nan),
                error=sigma[i],
                model=star[i],
                chi2=float(np.nansum(residual**2)),
                degrees_of_freedom=float(max(counts[i].sum() - known.parameters[i], 1.0)),
                no_noise=not_noise(grid.wavelength, residual),
            )
    return [fits[number] for number in sorted(fits)]


def not_noise(wavelength: np.ndarray, residual: np.ndarray) -> list[tuple[float, float, float]]:
    """
    Where a residual in units of its error, (pixels,), is larger than noise is, by itself or in the mean of some
    neighbours: see [`BestFit`]. NaN where a pixel does not count.
    """
    counts = np.isfinite(residual)
    position, values = wavelength[counts], residual[counts]
    largest = np.zeros(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    for width in STRANGE_PIXELS:
        if width > len(values):
            continue
        means = (total[width:] - total[:-width]) / np.sqrt(width)
        for start in np.flatnonzero(np.abs(means) > STRANGE_SIGMA):
            part = slice(start, start + width)
            largest[part] = np.where(np.abs(means[start]) > np.abs(largest[part]), means[start], largest[part])
    edges = np.flatnonzero(np.diff(np.concatenate([[0.0], np.sign(largest), [0.0]])))
    parts = [(i, j) for i, j in zip(edges, edges[1:], strict=False) if largest[i] != 0]
    found = [(position[i], position[j - 1], largest[i:j][np.argmax(np.abs(largest[i:j]))]) for i, j in parts]
    return sorted(((float(low), float(high), float(most)) for low, high, most in found), key=lambda one: -abs(one[2]))


@dataclass
class _Stars:
    """
    A linear model of stars: coefficients are `start + directions a`, with a Gaussian prior of a around `prior_mean`;
    and what differs from it, by interval. T intervals, K coefficients, A parameters; float64.
    """

    start: torch.Tensor  # B, T, K
    directions: torch.Tensor  # B, T, K, A
    precision: torch.Tensor  # A, A
    prior_mean: torch.Tensor  # B, A
    own: torch.Tensor  # B, T, K, K: covariance of what else stars differ in, in units of that of a coefficient
    continuum: torch.Tensor  # B, T, K, K: covariance of level and slope, in units of that of the level
    level: torch.Tensor  # B: standard deviation of the level


@torch.no_grad()
def _of_stars(model: Any, number: int, rung: Rung, evidence: Any, stars: slice, errors: bool) -> WholeSpectra:
    own = evidence.intervals - rung.first_interval
    shape = (len(evidence.estimate[stars]), rung.n_intervals, evidence.estimate.shape[2])
    estimate, pull = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    information = torch.zeros(*shape, shape[2], dtype=torch.float64)
    estimate[:, own] = torch.from_numpy(evidence.estimate[stars]).double()
    pull[:, own] = torch.from_numpy(evidence.pull[stars]).double()
    information[:, own] = torch.from_numpy(np.ascontiguousarray(evidence.information[stars])).double()
    misfit = torch.from_numpy(evidence.misfit[stars]).double().nanmedian(dim=1).values
    factor = torch.nan_to_num(misfit, nan=1.0).clamp(min=1.0)[:, None, None]
    right = ((information @ estimate[..., None])[..., 0] + pull) / factor
    information = information / factor[..., None]
    level = _levels(rung, evidence, stars, own)
    in_star_model = rung.first_interval == model.config.star_intervals[0] and bool(model.config.star_labels)
    refined = _refined(model, evidence, stars) if in_star_model else None
    fitted = torch.zeros(shape[0], dtype=torch.bool) if refined is None else refined.converged.cpu()
    found: list[torch.Tensor] = [torch.zeros(shape), torch.zeros(shape), torch.zeros(information.shape)]
    found = [part.double() for part in (*found, torch.zeros(shape[0]))]
    for by_star_model in (False, True):
        chosen = torch.nonzero(fitted == by_star_model)[:, 0]
        if not len(chosen):
            continue
        known = information[chosen], right[chosen]
        if by_star_model and refined is not None:
            level_known = torch.from_numpy((evidence.reliability[stars][..., 0] > 0).any(axis=1))[chosen]
            parts = _posterior(_by_star_model(model, rung, refined, level_known, chosen), *known, level_known, errors)
        else:
            parts = _by_components(model, number, rung, evidence, stars, chosen, *known, errors)
        for whole, part in zip(found, parts, strict=True):
            if part is not None:
                whole[chosen] = part
    smooth = torch.nan_to_num(misfit, nan=1.0).clamp(LEAST_NOISE, 1.0)
    found[2] *= smooth[:, None, None, None]
    mean, fit, covariance, parameters = (part.numpy() for part in found)
    return WholeSpectra(rung, mean, fit, covariance, level, parameters)


def _levels(rung: Rung, evidence: Any, stars: slice, own: np.ndarray) -> np.ndarray:
    """Of all intervals of the rung, (B, T): those that were not seen lie between those that were."""
    level = evidence.level[stars] / evidence.unit[stars]
    seen = evidence.seen[stars] & (level > 0)
    found = np.ones((len(level), rung.n_intervals))
    for star, good in enumerate(seen):
        if good.any():
            found[star] = np.exp(np.interp(np.arange(rung.n_intervals), own[good], np.log(level[star, good])))
    return found


def _refined(model: Any, evidence: Any, stars: slice) -> Refined | None:
    """The fit of the star model, begun where the network says."""
    inputs = {
        name: torch.from_numpy(np.ascontiguousarray(getattr(evidence, name)[stars])).to(model.device)
        for name in ("coefficients", "reliability", "estimate", "information", "pull", "misfit")
    }
    n_stars = len(inputs["coefficients"])
    inputs["interval_ids"] = torch.from_numpy(evidence.intervals).to(model.device).expand(n_stars, -1)
    inputs["attention_mask"] = torch.from_numpy(evidence.seen[stars]).to(model.device)
    ids = torch.tensor([model.config.label_ids(["teff"])], device=model.device).expand(n_stars, -1)
    return model(**inputs, request_ids=ids).refined


def _by_star_model(model: Any, rung: Rung, refined: Refined, level_known: torch.Tensor, chosen) -> _Stars:
    star = model.refinement.star_model
    device = star.center.device
    labels = star.standardise(refined.labels[chosen])
    n_labels, intervals = labels.shape[1], torch.arange(rung.n_intervals, device=device) + rung.first_interval
    processes = star.processes(labels)
    spectrum, by_velocity, by_width = star.coefficients(processes.weights, intervals)
    velocity = refined.velocity[chosen, None, None]
    wider = velocity / star.velocity_of_width**2
    by_velocity = by_velocity + wider * by_width
    jacobian = star.jacobian(processes.slopes(), intervals, by_velocity + wider * by_width, by_width)
    start = (spectrum + velocity * by_velocity).double().cpu()
    prior = torch.block_diag(star.precision, torch.diag(torch.tensor(NUISANCE_SIGMA, device=device) ** -2.0))
    mean = torch.cat((star.population - labels, -velocity[..., 0], torch.zeros_like(velocity[..., 0])), dim=1)
    assert mean.shape[1] == n_labels + 2
    size = start.shape[2]
    # Level and slope: small over the continuum, and free where there is none.
    slope = torch.zeros(size, size, dtype=torch.float64)
    slope[1, 1] = SLOPE_OVER_LEVEL**2
    continuum = start[..., :, None] * start[..., None, :] + slope
    own = torch.diag(torch.tensor([0.0, 0.0] + [1.0] * (size - 2), dtype=torch.float64))
    return _Stars(
        start=start,
        directions=jacobian.permute(1, 0, 3, 2).double().cpu(),
        precision=prior.double().cpu(),
        prior_mean=mean.double().cpu(),
        own=own.expand(*start.shape, size),
        continuum=continuum,
        level=torch.where(level_known, FIRST_LEVEL, FREE_LEVEL).double(),
    )


def _by_components(model, number, rung, evidence, stars, chosen, information, right, errors) -> list[torch.Tensor]:
    """Gauss-Newton steps: flux is `level * (1, slope, directions)` of coefficients, with ln of the level among them."""
    completion, rows = model.model.rungs[number].completion, chosen.numpy()
    given = evidence.coefficients[stars][rows], evidence.reliability[stars][rows], evidence.intervals
    found, _ = completion.amplitudes(*(torch.from_numpy(part).to(model.device) for part in given))
    amplitudes = found.double().cpu()
    center = completion.center.double().cpu()
    components = (completion.components.double() / completion.metric.double()[..., None]).cpu()
    precision = torch.diag(completion.spread.double().cpu() ** -2.0)
    if rung.counts_level:
        # What the level of the star is taken for depends on what was seen of it.
        scale = torch.zeros_like(components[..., :1])
        scale[:, 0] = 1.0 / rung.level_prior
        components = torch.cat((components, scale), dim=2)
        precision = torch.block_diag(precision, torch.tensor([[FREE_SCALE**-2.0]], dtype=torch.float64))
        amplitudes = torch.nn.functional.pad(amplitudes, (0, 1))
    size = center.shape[1]
    n_stars = len(chosen)
    parts: list[torch.Tensor] = []
    for step in range(STEPS):
        found = center + (components @ amplitudes.T).permute(2, 0, 1)
        level = torch.exp((rung.level_prior * found[..., 0]).clamp(-5.0, 5.0))
        level = level if rung.counts_level else torch.ones_like(level)
        slope = found[..., 1] if rung.counts_level else torch.zeros_like(level)
        flux = level[..., None] * torch.cat(
            (torch.ones_like(level)[..., None], slope[..., None], found[..., 2:]), dim=2
        )
        change = torch.diag_embed(level[..., None].expand(-1, -1, size)).contiguous()
        change[..., :, 0] = rung.level_prior * flux if rung.counts_level else 0.0
        if not rung.counts_level:
            change[..., :, 1] = 0.0
        directions = change @ components
        start = flux - (directions @ amplitudes[:, None, :, None])[..., 0]
        continuum = torch.zeros(n_stars, *change.shape[1:], dtype=torch.float64)
        if not rung.counts_level:
            continuum = _drift(rung, evidence, stars, chosen, flux)
        nothing, one = torch.zeros_like(amplitudes), torch.ones(n_stars, dtype=torch.float64)
        linear = _Stars(start, directions, precision, nothing, change @ change.mT, continuum, one)
        *parts, amplitudes, _, _ = _solve(
            linear, information, right, UNEXPLAINED["components"], whole=errors and step == STEPS - 1
        )
    return parts


def _drift(rung: Rung, evidence, stars, chosen, flux: torch.Tensor) -> torch.Tensor:
    """Variance of level and slope of intervals whose level is taken from the nearest that were seen, (B, T, K, K)."""
    own = evidence.intervals - rung.first_interval
    distance = np.full((len(chosen), rung.n_intervals), float(rung.n_intervals))
    for row, seen in enumerate(evidence.seen[stars][chosen.numpy()]):
        if seen.any():
            distance[row] = np.abs(np.arange(rung.n_intervals)[:, None] - own[seen]).min(axis=1)
    error = torch.from_numpy(DRIFT * np.sqrt(1.0 + distance))[..., None, None]
    slope = torch.zeros(flux.shape[2], flux.shape[2], dtype=torch.float64)
    slope[1, 1] = 1.0
    return error**2 * flux[..., :, None] * flux[..., None, :] + slope


def _posterior(linear: _Stars, information, right, level_known, errors: bool):
    """[`_solve`], after what a spectrum itself shows of its continuum, and of what the model of stars leaves of it."""
    unexplained: Any = UNEXPLAINED["star_model"]
    known = information.diagonal(dim1=2, dim2=3)[..., 2:]
    counts, seen = known > WELL_KNOWN, information.flatten(2).any(dim=2)
    variance = torch.where(counts, 1.0 / known.clamp(min=1e-6), 0.0)
    for _ in range(ROUNDS):
        _, fit, _, _, _, beyond, weighted = _solve(linear, information, right, unexplained, whole=False)
        left = (right - (information @ fit[..., None])[..., 0])[..., 2:]
        squared = torch.where(counts, (left * variance) ** 2, 0.0)
        excess = (squared - variance).sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp(min=1)
        unexplained = (UNEXPLAINED["star_model"] ** 2 + excess.clamp(0.0, LARGEST_EXCESS**2)).sqrt()
        unexplained = unexplained[:, None, None, None]
        size = linear.level[:, None] ** 2
        level = size * (linear.start * beyond).sum(dim=2)
        told = torch.einsum("btk,btkl,btl->bt", linear.start, weighted, linear.start)
        second = torch.where(seen, level**2 + size * (1.0 - size * told), 0.0).sum(dim=1)
        new = (second / seen.sum(dim=1).clamp(min=1)).sqrt().clamp(min=LEAST_LEVEL)
        linear.level = torch.where(level_known, new, linear.level)
    return _solve(linear, information, right, unexplained, whole=errors)[:4]


def _solve(linear: _Stars, information, right, unexplained, *, whole: bool = True):
    """
    Posterior mean and fit (B, T, K), covariance (B, T, K, K), number of parameters (B,), amplitudes (B, A); what the
    pixels say beyond the star (B, T, K), and how much they say of the coefficients, (B, T, K, K). Not `whole`: mean
    and covariance stay None.
    """
    continuum = linear.level[:, None, None, None] ** 2 * linear.continuum
    differs = unexplained**2 * linear.own + continuum
    unit = torch.eye(differs.shape[-1], dtype=differs.dtype)
    inner = torch.linalg.inv(unit + information @ differs)  # (1 + L T)^-1
    weighted = inner @ information  # what the pixels say of the model of stars
    left = right - (information @ linear.start[..., None])[..., 0]
    pulled = (inner @ left[..., None])[..., 0]
    fisher = (linear.directions.mT @ (weighted @ linear.directions)).sum(dim=1)
    vector = torch.einsum("btka,btk->ba", linear.directions, pulled) + linear.prior_mean @ linear.precision
    inverse = torch.linalg.inv(fisher + linear.precision)
    amplitudes = (inverse @ vector[..., None])[..., 0]
    star = linear.start + (linear.directions @ amplitudes[:, None, :, None])[..., 0]
    beyond = (inner @ (right - (information @ star[..., None])[..., 0])[..., None])[..., 0]
    fit = star + (continuum @ beyond[..., None])[..., 0]
    parameters = (inverse * fisher.mT).sum(dim=(1, 2)) + (weighted * continuum.mT).sum(dim=(1, 2, 3))
    if not whole:
        return None, fit, None, parameters, amplitudes, beyond, weighted
    mean = star + (differs @ beyond[..., None])[..., 0]
    directions = inner.mT @ linear.directions
    covariance = differs @ inner + directions @ inverse[:, None] @ directions.mT
    return mean, fit, covariance, parameters, amplitudes, beyond, weighted


__all__ = ["BestFit", "WholeSpectra", "best_fits", "not_noise", "whole_spectra"]
