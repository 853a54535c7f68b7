# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Whole spectra from evidence: the best fit, and the flux of pixels that were not observed, with its error.

A spectrum of a rung is linear in the coefficients of its intervals. The likelihood of its pixels is Gaussian, and so is
the prior: in the H band the star model around the best-fit labels, elsewhere the principal components of
[`SpectraFMCompletion`]. The posterior has all coefficients, and these give flux on any grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .basis_spectrafm import SpectrumBasis
from .likelihood_spectrafm import Kinds, Likelihood, Stars, times
from .refinement_spectrafm import FIRST_LEVEL, FREE_LEVEL, LEAST_LEVEL, NUISANCE_SIGMA, Refined
from .rungs_spectrafm import NATIVE_TOLERANCE, Design, Rung, design_of_rung


#: Gauss-Newton steps, where flux is not linear in the coefficients; the kind of a star is chosen before the second.
STEPS, KINDS_STEP = 5, 2
STARS_AT_ONCE, MATRICES_AT_ONCE = 64, 8  # stars per batch of the network; those whose matrices fit into a cache
#: Misfit of a coefficient in units of its prior, by the model of stars. Those of components and of kinds of stars were
#: found on validation stars of Gaia XP; the first is a guess that agrees with held-out stars of the H band.
UNEXPLAINED = {"star_model": 0.03, "components": 0.03, "kinds": 0.015}
LEAST_NOISE = 0.05  # of the stated variance: noise of Gaia XP is correlated; found on validation stars, with a hole
LARGEST_EXCESS = 0.5  # of the misfit, found from a spectrum
FREE_SCALE, SLOPE_OVER_LEVEL = 3.0, 5.0  # of ln of the level of a star; of slopes, over the continuum
ROUNDS, WELL_KNOWN = 2, 4.0
DRIFT = 0.05  # of ln of the level from interval to interval, where fluxes are not calibrated
# Significant residuals: least deviation of a mean, and of how many pixels.
STRANGE_SIGMA, STRANGE_PIXELS = 6.0, (1, 3, 9, 27)


@dataclass
class WholeSpectra:
    """
    The posterior of all intervals of a rung. B stars, T intervals, K coefficients.

    Attributes
    ----------
    rung : Rung
    mean, fit : array of shape (B, T, K)
        Coefficients of the rows of a [`Design`], over `level`: most likely flux, and flux of the star model alone.
    covariance : array of shape (B, T, K, K)
        Of `mean` - truth.
    level : array of shape (B, T)
        In the unit of the flux.
    parameters : array of shape (B,)
        Effective number of fitted parameters, for chi^2.
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
            In the unit of the spectra. NaN in telluric bands, and at pixels that are too wide for an interval.

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
        return flux, np.hypot(error, self.rung.model_error * flux)

    def fitted(
        self, wavelength: np.ndarray, resolving_power: float | None = None, design: Design | None = None
    ) -> np.ndarray:
        """Flux of the star model alone, as in [`at`]; `design` is that of these wavelengths, if known."""
        return self._flux(self.fit, wavelength, resolving_power, design)[1]

    def _flux(
        self, values: np.ndarray, wavelength: np.ndarray, power: float | None, design: Design | None = None
    ) -> tuple[Design, np.ndarray]:
        wavelength = np.asarray(wavelength, np.float64)
        low, high = self.rung.range
        if wavelength.ndim != 1 or not wavelength.size or not np.all(np.diff(wavelength) > 0):
            raise ValueError(f"wavelength: expected increasing numbers, got shape {wavelength.shape}")
        if not (wavelength[0] >= low and wavelength[-1] <= high):
            found = f"{wavelength[0]:,.1f} to {wavelength[-1]:,.1f}"
            raise ValueError(f"wavelength: expected {low:,.1f} to {high:,.1f} Angstrom, got {found}")
        highest = self.rung.resolving_power
        if power is not None and not 0 < power <= highest * NATIVE_TOLERANCE:
            raise ValueError(f"resolving_power: expected at most {highest:g}, got {power:g}")
        if design is None or design.rung is not self.rung:
            design = design_of_rung(self.rung, wavelength, power)
        flux = np.full((len(values), len(wavelength)), np.nan)
        for interval, pixels, rows in zip(design.intervals, design.pixels, design.rows, strict=True):
            own = interval - self.rung.first_interval
            flux[:, pixels] = self.level[:, own, None] * (values[:, own] @ rows.double().numpy())
        flux[:, design.blind] = np.nan
        return design, flux


@dataclass(repr=False)
class BestFit:
    """
    A spectrum and its best-fit star.

    Attributes
    ----------
    wavelength, flux, error : array of shape (pixels,)
        The data; the error is NaN for unused pixels, the flux for missing ones.
    model : array of shape (pixels,)
        NaN outside of the range of the model, and in telluric bands.
    chi2 : float
        chi^2 of the used pixels.
    degrees_of_freedom : float
        Number of pixels less fitted parameters.
    no_noise : list of (low, high, sigma)
        Ranges (Angstrom) with significant residuals, and their largest deviation, data - model; strongest first.
    resolving_power : float
        Wavelength / FWHM of the model.
    """

    wavelength: np.ndarray
    flux: np.ndarray
    error: np.ndarray
    model: np.ndarray
    chi2: float
    degrees_of_freedom: float
    no_noise: list[tuple[float, float, float]]
    resolving_power: float = np.nan

    def __repr__(self) -> str:
        return f"BestFit(chi2={self.chi2:.1f}, degrees_of_freedom={self.degrees_of_freedom:.1f})"

    @property
    def residual(self) -> np.ndarray:
        """(pixels,), in units of the error; NaN for unused pixels."""
        return (self.flux - self.model) / self.error


def whole_spectra(model: Any, basis: SpectrumBasis, grids: Sequence[Any], *, errors: bool = True) -> list[WholeSpectra]:
    """
    The posterior of whole spectra.

    Parameters
    ----------
    model : SpectraFMForPrediction
        On evidence.
    basis : SpectrumBasis
        Of its tokenizer.
    grids : sequence of EvidenceOnGrid
        Of the tokenizer (`return_grids=True`).
    errors : bool
        False takes half the time, and leaves `mean` and `covariance` zero.

    Returns
    -------
    list of WholeSpectra, one for each grid
    """
    found = []
    for grid in grids:
        number, rung = grid.rung_of(basis)
        parts = [
            _of_stars(model, number, rung, grid.evidence, slice(start, start + STARS_AT_ONCE), errors)
            for start in range(0, len(grid.stars), STARS_AT_ONCE)
        ]
        found.append(parts[0] if len(parts) == 1 else _joined(rung, parts))
    return found


def _joined(rung: Rung, parts: list[WholeSpectra]) -> WholeSpectra:
    columns = zip(*([getattr(part, each.name) for each in fields(WholeSpectra)[1:]] for part in parts), strict=True)
    return WholeSpectra(rung, *map(np.concatenate, columns))


def best_fits(model: Any, basis: SpectrumBasis, grids: Sequence[Any]) -> list[BestFit]:
    """The [`BestFit`] of each spectrum; arguments as in [`whole_spectra`]."""
    fits: dict[int, BestFit] = {}
    for grid, known in zip(grids, whole_spectra(model, basis, grids, errors=False), strict=True):
        low, high = known.rung.range
        inside = (grid.wavelength >= low) & (grid.wavelength <= high)
        star = np.full(grid.flux.shape, np.nan)
        design = basis.design(grid.wavelength, grid.resolving_power) if inside.all() else None
        power = known.rung.power_of(grid.wavelength, grid.resolving_power)
        star[:, inside] = known.fitted(grid.wavelength[inside], power, design)
        counts = (grid.inverse_variance > 0) & ~grid.evidence.clipped & np.isfinite(star)
        sigma = 1.0 / np.sqrt(np.where(counts, grid.inverse_variance, np.nan))
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
                resolving_power=power,
            )
    return [fits[number] for number in sorted(fits)]


def not_noise(wavelength: np.ndarray, residual: np.ndarray) -> list[tuple[float, float, float]]:
    """Ranges with significant residuals in units of their error, (pixels,), see [`BestFit`]; NaN is not used."""
    counts = np.isfinite(residual)
    position, values = wavelength[counts], residual[counts]
    largest = np.zeros(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    for width in STRANGE_PIXELS:
        if width > len(values):
            continue
        means = (total[width:] - total[:-width]) / np.sqrt(width)
        if max(means.max(), -means.min()) <= STRANGE_SIGMA:  # true for most, and faster
            continue
        for start in np.flatnonzero(np.abs(means) > STRANGE_SIGMA):
            part = slice(start, start + width)
            largest[part] = np.where(np.abs(means[start]) > np.abs(largest[part]), means[start], largest[part])
    edges = np.flatnonzero(np.diff(np.concatenate([[0.0], np.sign(largest), [0.0]])))
    parts = [(i, j) for i, j in zip(edges, edges[1:], strict=False) if largest[i] != 0]
    found = [(position[i], position[j - 1], largest[i:j][np.argmax(np.abs(largest[i:j]))]) for i, j in parts]
    return sorted(((float(low), float(high), float(most)) for low, high, most in found), key=lambda one: -abs(one[2]))


@torch.no_grad()
def _of_stars(model: Any, number: int, rung: Rung, evidence: Any, stars: slice, errors: bool) -> WholeSpectra:
    own = evidence.intervals - rung.first_interval
    shape = (len(evidence.estimate[stars]), rung.n_intervals, evidence.estimate.shape[2])
    in_star_model = rung.first_interval == model.config.star_intervals[0] and bool(model.config.star_labels)
    # The information has no more digits; where flux is not linear, and for errors, what follows needs them.
    dtype = torch.float32 if in_star_model and not errors else torch.float64
    estimate, pull, information = (torch.zeros(size, dtype=dtype) for size in (shape, shape, (*shape, shape[2])))
    for name, whole in (("estimate", estimate), ("pull", pull), ("information", information)):
        whole[:, own] = torch.from_numpy(getattr(evidence, name)[stars]).to(dtype)
    misfit = torch.from_numpy(evidence.misfit[stars]).double().nanmedian(dim=1).values
    factor = torch.nan_to_num(misfit, nan=1.0).clamp(min=1.0)[:, None, None].to(dtype)
    right = (times(information, estimate) + pull) / factor
    information /= factor[..., None]
    level = _levels(rung, evidence, stars, own)
    refined = _refined(model, evidence, stars) if in_star_model else None
    fitted = torch.zeros(shape[0], dtype=torch.bool) if refined is None else refined.converged.cpu()
    found = [torch.zeros(size, dtype=torch.float64) for size in (shape, shape, information.shape, shape[:1])]
    for by_star_model in (False, True):
        chosen = torch.nonzero(fitted == by_star_model)[:, 0]
        if not len(chosen):
            continue
        known = (information, right) if len(chosen) == len(right) else (information[chosen], right[chosen])
        parts: Any
        if by_star_model and refined is not None:
            level_known = torch.from_numpy((evidence.reliability[stars][..., 0] > 0).any(axis=1))[chosen]
            linear = _by_star_model(model, rung, refined, level_known, chosen, dtype)
            some = [slice(start, start + MATRICES_AT_ONCE) for start in range(0, len(chosen), MATRICES_AT_ONCE)]
            of_some = [_posterior(linear.of(i), known[0][i], known[1][i], level_known[i], errors=errors) for i in some]
            parts = [None if part[0] is None else torch.cat(part) for part in zip(*of_some, strict=True)]
        else:
            parts = _by_components(model, number, rung, evidence, stars, chosen, *known, errors)
        for whole, part in zip(found, parts, strict=True):
            if part is not None:
                whole[chosen] = part.double()
    if errors:
        found[2] *= torch.nan_to_num(misfit, nan=1.0).clamp(LEAST_NOISE, 1.0)[:, None, None, None]
    mean, fit, covariance, parameters = (part.numpy() for part in found)
    return WholeSpectra(rung, mean, fit, covariance, level, parameters)


def _levels(rung: Rung, evidence: Any, stars: slice, own: np.ndarray) -> np.ndarray:
    """Of all intervals of the rung, (B, T), interpolated where there are no pixels."""
    level = evidence.level[stars] / evidence.unit[stars]
    seen = evidence.seen[stars] & (level > 0)
    found = np.ones((len(level), rung.n_intervals))
    for star, good in enumerate(seen):
        if good.any():
            found[star] = np.exp(np.interp(np.arange(rung.n_intervals), own[good], np.log(level[star, good])))
    return found


def _refined(model: Any, evidence: Any, stars: slice) -> Refined | None:
    """The fit of the star model, started at the prediction of the network."""
    inputs = {
        name: torch.from_numpy(getattr(evidence, name)[stars]).to(model.device)
        for name in ("coefficients", "reliability", "estimate", "information", "pull", "misfit")
    }
    n_stars = len(inputs["coefficients"])
    inputs["interval_ids"] = torch.from_numpy(evidence.intervals).to(model.device).expand(n_stars, -1)
    inputs["attention_mask"] = torch.from_numpy(evidence.seen[stars]).to(model.device)
    ids = torch.tensor([model.config.label_ids(["teff"])], device=model.device).expand(n_stars, -1)
    return model(**inputs, request_ids=ids).refined


def _by_star_model(model: Any, rung: Rung, refined: Refined, level_known: torch.Tensor, chosen, dtype) -> Stars:
    star = model.refinement.star_model
    device = star.center.device
    labels = star.standardise(refined.labels[chosen])
    intervals = torch.arange(rung.n_intervals, device=device) + rung.first_interval
    processes = star.processes(labels)
    spectrum, by_velocity, by_width = star.coefficients(processes.weights, intervals)
    velocity = refined.velocity[chosen, None, None]
    wider = velocity / star.velocity_of_width**2
    by_velocity = by_velocity + wider * by_width
    jacobian = star.jacobian(processes.slopes(), intervals, by_velocity + wider * by_width, by_width)
    start = (spectrum + velocity * by_velocity).to(dtype).cpu()
    prior = torch.block_diag(star.precision, torch.diag(torch.tensor(NUISANCE_SIGMA, device=device) ** -2.0))
    mean = torch.cat((star.population - labels, -velocity[..., 0], torch.zeros_like(velocity[..., 0])), dim=1)
    size = start.shape[2]
    # Level and slope: small over the continuum, and free where there is none.
    continuum = torch.stack((start, torch.zeros_like(start)), dim=3)
    continuum[..., 1, 1] = SLOPE_OVER_LEVEL
    own = torch.eye(size, dtype=dtype)[:, 2:]
    return Stars(
        start=start,
        directions=jacobian.permute(1, 0, 3, 2).to(dtype).cpu(),
        precision=prior.to(dtype).cpu(),
        prior_mean=mean.to(dtype).cpu(),
        own=own.expand(*start.shape, size - 2),
        continuum=continuum,
        level=torch.where(level_known, FIRST_LEVEL, FREE_LEVEL).to(dtype),
    )


def _by_components(model, number, rung, evidence, stars, chosen, information, right, errors) -> list[torch.Tensor]:
    """Gauss-Newton steps: flux is `level * (1, slope, directions)` of coefficients, with ln of the level among them."""
    rows = chosen.numpy()
    information, right = information.double(), right.double()
    observed = evidence.coefficients[stars][rows], evidence.reliability[stars][rows], evidence.intervals
    completion = model.model.rungs[number].completion
    center, components, kinds, amplitudes = _components(completion, rung, map(torch.from_numpy, observed))
    prior_mean, precision = kinds.prior(kinds.shares[None])  # of all stars
    size, one = center.shape[1], torch.ones(len(chosen), dtype=torch.float64)
    unexplained = UNEXPLAINED["kinds" if len(kinds.shares) > 1 else "components"] * one
    parts: list[torch.Tensor] = []
    for step in range(STEPS):
        found = center + (components @ amplitudes.T).permute(2, 0, 1)
        level = torch.exp((rung.level_prior * found[..., 0]).clamp(-5.0, 5.0))
        level = level if rung.counts_level else torch.ones_like(level)
        slope = found[..., 1] if rung.counts_level else torch.zeros_like(level)
        parts = [torch.ones_like(level)[..., None], slope[..., None], found[..., 2:]]
        flux = level[..., None] * torch.cat(parts, dim=2)
        change = torch.diag_embed(level[..., None].expand(-1, -1, size)).contiguous()
        change[..., :, 0] = rung.level_prior * flux if rung.counts_level else 0.0
        if not rung.counts_level:
            change[..., :, 1] = 0.0
        directions = change @ components
        start = flux - (directions @ amplitudes[:, None, :, None])[..., 0]
        continuum = torch.zeros(*flux.shape, 2, dtype=torch.float64)
        if not rung.counts_level:
            continuum = _drift(rung, evidence, stars, chosen, flux)
        linear = Stars(start, directions, precision, prior_mean, change, continuum, one)
        likelihood = Likelihood(linear, information, right)
        if step == KINDS_STEP and len(kinds.shares) > 1:
            prior_mean, precision = kinds.prior(kinds.shares_of(*likelihood.of_star(unexplained, one)[-2:]))
            linear.prior_mean, linear.precision = prior_mean, precision
        last = errors and step == STEPS - 1
        *parts, amplitudes, _, _ = likelihood.solve(unexplained, one, whole=last)
    return parts


def _components(completion: Any, rung: Rung, observed) -> tuple[torch.Tensor, torch.Tensor, Kinds, torch.Tensor]:
    """Center (T, K) of the coefficients, directions (T, K, A), prior of the amplitudes, and first ones (B, A)."""
    found, _ = completion.amplitudes(*(part.to(completion.center.device) for part in observed))
    amplitudes = found.double().cpu()
    center = completion.center.double().cpu()
    components = (completion.components.double() / completion.metric.double()[..., None]).cpu()
    shares, means, factors = torch.ones(1), torch.zeros(1, amplitudes.shape[1]), completion.spread.cpu().diag()[None]
    if len(rung.kind_shares):
        completed = center + (components @ amplitudes.T).permute(2, 0, 1)
        center, components = torch.from_numpy(rung.kind_center), torch.from_numpy(rung.kind_directions)
        amplitudes = (completed - center).flatten(1) @ torch.linalg.pinv(components.flatten(0, 1)).T
        shares, means, factors = (torch.from_numpy(part) for part in rung.kinds())
    if rung.counts_level:
        # The estimated level of the star depends on its observed intervals.
        scale = torch.zeros_like(components[..., :1])
        scale[:, 0] = 1.0 / rung.level_prior
        components = torch.cat((components, scale), dim=2)
        amplitudes, means = (torch.nn.functional.pad(part, (0, 1)) for part in (amplitudes, means))
        factors = torch.nn.functional.pad(factors, (0, 1, 0, 1))
        factors[:, -1, -1] = FREE_SCALE
    return center, components, Kinds(shares, means, factors), amplitudes


def _drift(rung: Rung, evidence, stars, chosen, flux: torch.Tensor) -> torch.Tensor:
    """Root of the variance of level and slope of intervals, whose level is that of the nearest seen, (B, T, K, 2)."""
    own = evidence.intervals - rung.first_interval
    distance = np.full((len(chosen), rung.n_intervals), float(rung.n_intervals))
    for row, seen in enumerate(evidence.seen[stars][chosen.numpy()]):
        if seen.any():
            distance[row] = np.abs(np.arange(rung.n_intervals)[:, None] - own[seen]).min(axis=1)
    error = torch.from_numpy(DRIFT * np.sqrt(1.0 + distance))[..., None]
    found = torch.stack((error * flux, torch.zeros_like(flux)), dim=3)
    found[..., 1, 1] = 1.0
    return found


def _posterior(linear: Stars, information, right, level_known, *, errors: bool):
    """[`Likelihood.solve`], with the continuum and the misfit of the star model estimated from the spectrum."""
    unexplained, level = torch.full_like(linear.level, UNEXPLAINED["star_model"]), linear.level
    known = information.diagonal(dim1=2, dim2=3)[..., 2:]
    counts, seen = known > WELL_KNOWN, information.flatten(2).any(dim=2)
    variance = torch.where(counts, 1.0 / known.clamp(min=1e-6), 0.0)
    likelihood = Likelihood(linear, information, right)
    for _ in range(ROUNDS):
        _, fit, _, _, _, drifted, doubt = likelihood.solve(unexplained, level, whole=False)
        left = (right - times(information, fit))[..., 2:]
        squared = torch.where(counts, (left * variance) ** 2, 0.0)
        excess = (squared - variance).sum(dim=(1, 2)) / counts.sum(dim=(1, 2)).clamp(min=1)
        unexplained = (UNEXPLAINED["star_model"] ** 2 + excess.clamp(0.0, LARGEST_EXCESS**2)).sqrt()
        second = torch.where(seen, drifted[..., 0] ** 2 + doubt[..., 0], 0.0).sum(dim=1) * level**2
        new = (second / seen.sum(dim=1).clamp(min=1)).sqrt().clamp(min=LEAST_LEVEL)
        level = torch.where(level_known, new, level)
    return likelihood.solve(unexplained, level, whole=errors)[:4]


__all__ = ["BestFit", "WholeSpectra", "best_fits", "not_noise", "whole_spectra"]
