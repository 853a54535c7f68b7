# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Refine a first estimate of labels to the most likely ones, by Gauss-Newton steps with a model of stars.

A network learns the dependence of lines on labels slowly, and less well than the model that made its training spectra.
So the network predicts a starting point, and a few steps of least squares follow: the coefficients of all intervals, as
a function of labels, are fitted to those of the spectrum, weighted by its errors.

The fit has nuisance parameters: a residual velocity, a slightly wider line spread function, and levels and slopes of
the continuum, whose variances are found for each spectrum. If a star differs from the model by more than the errors of
its flux, the errors of the labels are increased.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from .configuration_spectrafm import FIRST_LABEL_ID, SpectraFMConfig
from .evidence_spectrafm import InFullPrecision
from .products_spectrafm import inverse_factor
from .star_model_spectrafm import SpectraFMStarModel, Sums


# Steps of all stars together, number of these with new derivatives (later steps are small), and how often unconverged
# stars continue.
STEPS, DERIVATIVES, ROUNDS = 4, 2, 3
LARGEST_STEP = 1.5  # in standard deviations of the labels among the stars of the model
# sigma: after a larger last step the fit continues, or, at the end, has failed.
SETTLED, CONVERGED = 0.3, 0.5
# Relative errors of the level of an interval, and of its slope: at first, at least, and where the level is unknown.
FIRST_LEVEL, LEAST_LEVEL, FREE_LEVEL = 3e-3, 1e-5, 0.5
# Of the velocity in km/s and of the width of the line spread function, in the steps of the star model.
NUISANCE_SIGMA = (10.0, 2.0)
# Errors of the star model are correlated between lines, so the variance of labels grows by this factor more than that
# of the flux. Calibrated on 336 observed windows of APOGEE DR12 and three whole spectra, whose labels of the survey
# would otherwise differ by 1.7 to 6 sigma.
COHERENT = 10.0
LARGE = 16.0  # of the mean square of deviations: an upper limit
PARTS = 3  # groups of intervals, whose agreement is tested
BEYOND = 0.1  # of the range of each label: how far a fit may exceed it


def combinations(config: SpectraFMConfig) -> torch.Tensor:
    """
    (rows of the vocabulary, star labels): each label as a sum of those of the star model; rows of zeros do not follow
    from them.
    """
    known = list(config.star_labels)
    table = torch.zeros(FIRST_LABEL_ID + len(config.label_names), len(known))
    for row, name in enumerate(config.label_names, start=FIRST_LABEL_ID):
        parts = (config.star_combinations or {}).get(name, [name] if name in known else [])
        for part in parts:
            table[row, known.index(part)] = 1.0 / len(parts)
    return table


@dataclass
class Refined:
    """
    Result of the fit. B stars, P labels of the star model.

    Attributes
    ----------
    labels : torch.FloatTensor of shape (B, P)
        In physical units.
    covariance : torch.FloatTensor of shape (B, P, P)
    velocity, velocity_error : torch.FloatTensor of shape (B,)
        Residual velocity of the lines, km/s.
    mismatch : torch.FloatTensor of shape (B,)
        Residuals beyond the errors of the flux, relative to the strength of the lines: 0 to about 1.
    error_factor : torch.FloatTensor of shape (B,)
        Factor of the errors of the labels because the star differs from the model or the flux errors are too small; at
        least 1.
    disagreement : torch.FloatTensor of shape (B,)
        chi^2 of the labels from each third of the spectrum minus its expectation, in standard deviations.
    converged : torch.BoolTensor of shape (B,)
    slope : torch.FloatTensor of shape (B, P, T, K)
        Derivative of the labels with respect to `pull` of the evidence, on request.
    """

    labels: torch.Tensor
    covariance: torch.Tensor
    velocity: torch.Tensor
    velocity_error: torch.Tensor
    mismatch: torch.Tensor
    error_factor: torch.Tensor
    disagreement: torch.Tensor
    converged: torch.Tensor
    slope: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Refined":
        """The same on another device."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})


class SpectraFMRefinement(InFullPrecision):
    """Gauss-Newton steps from a first estimate of the labels, see the top of this file."""

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        self.star_model = SpectraFMStarModel(config)

    def forward(
        self,
        start: torch.Tensor,
        estimate: torch.Tensor,
        information: torch.Tensor,
        pull: torch.Tensor,
        intervals: torch.Tensor,
        level_known: torch.Tensor,
        misfit: torch.Tensor | None = None,
    ) -> Refined:
        """
        Parameters
        ----------
        start : torch.FloatTensor of shape (B, P)
            Standardised labels of the starting point.
        estimate, information, pull : see [`Evidence`]
            (B, T, K), (B, T, K, K), (B, T, K), of intervals of the star model alone.
        intervals : torch.LongTensor of shape (T,)
        level_known : torch.BoolTensor of shape (B,)
            Whether the flux is divided by the continuum.
        misfit : torch.FloatTensor of shape (B, T), optional
            chi^2 per degree of freedom of the residuals from the coefficients, NaN where unknown: stated errors that
            are too small for it are increased.

        If `pull` requires a gradient, labels have one, computed at the peak of the likelihood, not through the steps.
        Other outputs have none.
        """
        wanted = torch.is_grad_enabled() and pull.requires_grad
        with torch.no_grad():
            refined = self._refine(start, estimate, information, pull, intervals, level_known, misfit, wanted)
        if refined.slope is not None:
            refined.labels = refined.labels + torch.einsum("bptk,btk->bp", refined.slope, pull - pull.detach())
        return refined

    def _refine(self, start, estimate, information, pull, intervals, level_known, misfit, wanted) -> Refined:
        """`forward`, and where `wanted` the slope as well."""
        error_factor = torch.ones_like(start[:, 0])
        if misfit is not None:
            error_factor = torch.nan_to_num(misfit.nanmedian(dim=1).values, nan=1.0).clamp(min=1.0).sqrt()
        pixels = _Pixels.read(information, estimate, pull, error_factor**-2.0, level_known)
        low, high = self.star_model.limits()
        begin = nn.functional.pad(start.float().clamp(low, high), (0, 2))
        shared = intervals, self.star_model.sums(), self.star_model.rows(intervals)
        refined, end, size = self._fit(begin, pixels, *shared, wanted)
        for _ in range(ROUNDS - 1):
            again = torch.nonzero(~(size < SETTLED))[:, 0]  # a size may be NaN
            if not len(again):
                break
            found, last, step = self._fit(end[again], pixels.of(again), *shared, wanted)
            (nearer,) = torch.nonzero((step < size[again]) | size[again].isnan(), as_tuple=True)  # not to and fro
            again = again[nearer]
            end[again], size[again] = last[nearer], step[nearer]
            for field in fields(found):
                if field.name != "slope" or wanted:
                    getattr(refined, field.name)[again] = getattr(found, field.name)[nearer]
        refined.error_factor *= error_factor
        return refined

    def _fit(
        self, found, pixels: "_Pixels", intervals, sums: Sums, rows, wanted
    ) -> tuple[Refined, torch.Tensor, torch.Tensor]:
        """`STEPS` steps from labels, velocity and width (B, P + 2); the result, and the size of the last step."""
        star = self.star_model
        n_labels = found.shape[1] - 2
        low, high = star.limits()
        margin = BEYOND * (high - low)
        sigma = torch.tensor(NUISANCE_SIGMA, device=found.device)
        prior = torch.block_diag(star.precision, torch.diag(sigma**-2.0))
        center = torch.cat((star.population, torch.zeros_like(sigma)))
        first = torch.where(pixels.level_known, FIRST_LEVEL, FREE_LEVEL)
        level, slope = first**2, (5.0 * first) ** 2
        factor = size = level
        for number in range(STEPS):
            processes = star.processes(found[:, :n_labels], sums)
            spectrum, by_velocity, by_width = star.coefficients(processes.weights, intervals, rows)
            velocity, width = (found[:, column, None, None] for column in (-2, -1))
            wider = velocity / star.velocity_of_width**2
            # A velocity makes lines wider, the more the larger it is.
            model = torch.addcmul(spectrum, velocity, by_velocity).addcmul_(width + wider * velocity, by_width)
            if number < DERIVATIVES:
                moved = torch.addcmul(by_velocity, 2.0 * wider, by_width)
                jacobian = star.jacobian(processes.slopes(), intervals, moved, by_width, rows)
                informations, with_slope = pixels.between(jacobian)
            seen = pixels.seen(model.transpose(0, 1), jacobian)
            continuum = _Continuum(pixels, seen, level, slope)
            level, slope = continuum.sizes(pixels.level_known)
            residual, own = continuum.left(pixels, seen)
            factor = 1.0 + COHERENT * (_error_factor(own, residual) - 1.0)
            explained, pulls = continuum.of_parameters(seen, with_slope)
            fishers, pulls = (informations - explained) / factor[:, None, None], pulls / factor[:, None]
            right = pulls.sum(dim=0) - (found - center) @ prior
            inverse = _inverse(fishers.sum(dim=0) + prior)
            step = (inverse @ right[..., None])[..., 0]
            before, found = found, found + step.clamp(-LARGEST_STEP, LARGEST_STEP)
            found[:, :n_labels] = found[:, :n_labels].clamp(low - margin, high + margin)
            size = ((found - before) ** 2 / inverse.diagonal(dim1=1, dim2=2)).amax(dim=1).sqrt()
        labels, change = star.physical(found[:, :n_labels])
        covariance = inverse[:, :n_labels, :n_labels] * change[:, :, None] * change[:, None, :]
        refined = Refined(
            labels=labels,
            covariance=covariance,
            velocity=found[:, -2],
            velocity_error=inverse[:, -2, -2].sqrt(),
            mismatch=_mismatch(own, residual, model, star.spread[intervals - star.first]),
            error_factor=factor.sqrt(),
            disagreement=_disagreement(fishers, pulls, inverse, prior),
            converged=(size < CONVERGED) & found.isfinite().all(dim=1),
        )
        if wanted:
            weight = pixels.precision / factor
            by_pull = continuum.removed_from_rows(jacobian, model, seen, with_slope) * weight[:, None, None]
            refined.slope = torch.einsum("bpq,tbqk->bptk", inverse[:, :n_labels] * change[:, :, None], by_pull)
        return refined, found, size


@dataclass
class _Seen:
    """
    What the pixels say of a model (T, B, K), and of its derivatives (T, B, P, K): the information times the model, and
    what is left of `right` of the pixels without it, (T, K, B) each; and the products of both with the derivatives,
    (T, B, P), and with the model, (T, B).
    """

    model: torch.Tensor
    left: torch.Tensor
    model_by_rows: torch.Tensor
    left_by_rows: torch.Tensor
    model_by_model: torch.Tensor
    left_by_model: torch.Tensor


@dataclass
class _Pixels:
    """
    What the pixels say of B stars, T intervals: the information (T, B, K, K), which is in units of `precision` (B,),
    and what it would say of coefficients of zero, (T, B, K). And for one coefficient after the other, with all stars
    next to each other, (T, K, B): the diagonal of the information, and its column of the slope.
    """

    information: torch.Tensor
    right: torch.Tensor
    diagonal: torch.Tensor
    slope: torch.Tensor
    precision: torch.Tensor
    level_known: torch.Tensor

    @classmethod
    def read(cls, information, estimate, pull, precision, level_known) -> "_Pixels":
        """From what [`Evidence`] has."""
        information = information.transpose(0, 1).contiguous()
        right = _times(estimate.transpose(0, 1), information).add_(pull.transpose(0, 1)).mul_(precision[:, None])
        diagonal, slope = information.diagonal(dim1=2, dim2=3), information[..., 1]
        diagonal, slope = ((precision * part.transpose(1, 2)).contiguous() for part in (diagonal, slope))
        return cls(information, right, diagonal, slope, precision, level_known)

    def of(self, stars: torch.Tensor) -> "_Pixels":
        information, right = self.information[:, stars], self.right[:, stars]
        diagonal, slope = self.diagonal[..., stars], self.slope[..., stars]
        return _Pixels(information, right, diagonal, slope, self.precision[stars], self.level_known[stars])

    def between(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Of rows (T, B, n, K): what the information between each two is, summed over the intervals of each part, (PARTS,
        B, n, n); and that between each and the slope of its interval, (T, B, n).
        """
        n_intervals, n_stars, n_rows, _ = rows.shape
        total = rows.new_zeros((PARTS, n_stars, n_rows, n_rows))
        slope = rows.new_empty(rows.shape[:3])
        # Interval by interval, as much as a cache holds.
        for part, intervals in zip(total, torch.arange(n_intervals).tensor_split(PARTS), strict=True):
            for interval in intervals.tolist():
                informed = torch.bmm(rows[interval], self.information[interval])
                part.baddbmm_(informed, rows[interval].mT)
                slope[interval] = informed[..., 1]
        precision = self.precision[:, None]
        return total.mul_(precision[..., None]), slope.mul_(precision)

    def seen(self, model: torch.Tensor, rows: torch.Tensor) -> _Seen:
        """Of a model (T, B, K) and its derivatives (T, B, n, K)."""
        seen = _times(model, self.information).mul_(self.precision[:, None])
        # What is left first, and then its product with rows: large numbers are nearly equal.
        both = seen, self.right - seen
        # One vector at a time, and one coefficient after the other of all stars: what takes the least time.
        by_rows = (_times(part, rows.mT) for part in both)
        of_stars, model = [part.transpose(1, 2).contiguous() for part in both], model.transpose(1, 2)
        return _Seen(*of_stars, *by_rows, *((part * model).sum(dim=1) for part in of_stars))


def _times(vectors: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Vectors (..., K) times matrices (..., K, n), from the side on which such products are faster."""
    return (vectors[..., None, :] @ matrices)[..., 0, :]


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Of positive matrices (B, n, n); NaN where rounding has made one that is not."""
    # With a diagonal of one: the labels differ by orders of magnitude in what is known of them.
    scale = torch.rsqrt(matrix.diagonal(dim1=1, dim2=2))
    factor, failed = inverse_factor((matrix * scale[:, :, None] * scale[:, None, :]).double())
    factor = factor.masked_fill(failed[:, None, None], torch.nan) * scale[:, None, :]
    return (factor.mT @ factor).float()


def _error_factor(information: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """
    By how much the coefficients differ from the model more than by their errors, as a factor of variances, at least 1,
    (B,): what pixels say of each is given, (T, K, B), and what is left.
    """
    # Level and slope belong to the continuum.
    own, left = (part[:, 2:].flatten(0, 1) for part in (information, residual))
    counts = own > 1e-6
    number = counts.sum(dim=0).clamp(min=1)
    squared = torch.where(counts, left**2 / own.clamp(min=1e-6), 0.0)
    found = squared.sum(dim=0) / number
    for _ in range(4):  # a few wild ones do not count for all
        found = squared.minimum(LARGE * found).sum(dim=0) / number
    return torch.where(found > 1.0 + 3.0 * (2.0 / number).sqrt(), found, 1.0)


def _mismatch(information, residual, model, spread) -> torch.Tensor:
    """See [`Refined`]; (T, K, B) twice, the model (B, T, K), and the spread of coefficients among stars (T, K)."""
    own = information[:, 2:].clamp(min=1e-6)
    size = (spread[:, 2:, None] ** 2) * (own > 1e-6)
    beyond = ((residual[:, 2:] / own) ** 2 - 1.0 / own) * size
    lines = model.permute(1, 2, 0)[:, 2:] ** 2 * size
    return (beyond.sum(dim=(0, 1)).clamp(min=0.0) / lines.sum(dim=(0, 1)).clamp(min=1e-12)).sqrt()


def _disagreement(fishers, pulls, covariance, prior) -> torch.Tensor:
    """
    See [`Refined`]: what each part of the intervals adds, against the fit to all; (PARTS, B, P, P), (PARTS, B, P).
    """
    inverse = _inverse((fishers + prior).flatten(0, 1)).unflatten(0, fishers.shape[:2])
    total = (pulls * (inverse @ pulls[..., None])[..., 0]).sum(dim=(0, 2))
    expected = (inverse * (fishers - fishers @ covariance @ fishers)).sum(dim=(0, 2, 3))
    return (total - expected) / (2.0 * expected).clamp(min=1.0).sqrt()


class _Continuum:
    """
    Level and slope of each interval, of variances (B,) around those of the model, to be marginalised, given what the
    pixels say of the model.
    """

    def __init__(self, pixels: _Pixels, seen: _Seen, level: torch.Tensor, slope: torch.Tensor):
        self.variances = level, slope
        self.by_level, self.by_slope = level.sqrt(), slope.sqrt()  # B
        a = 1.0 + level * seen.model_by_model
        b = self.by_slope * self.by_level * seen.model[:, 1]
        d = 1.0 + slope * pixels.slope[:, 1]
        # The posterior covariance in units of the prior, of two by two, (T, B) each.
        scale = 1.0 / (a * d - b * b)
        self.inner = d * scale, -b * scale, a * scale
        self.found = self._inside(self.by_level * seen.left_by_model, self.by_slope * seen.left[:, 1], *self.inner)

    @staticmethod
    def _inside(level, slope, d, b, a) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior covariance times a vector of two."""
        return d * level + b * slope, b * level + a * slope

    def left(self, pixels: _Pixels, seen: _Seen) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left without model and continuum, and of the diagonal of the information, (T, K, B) each."""
        level, slope = (self.by_level * self.found[0])[:, None], (self.by_slope * self.found[1])[:, None]
        residual = torch.addcmul(seen.left, level, seen.model, value=-1.0).addcmul_(slope, pixels.slope, value=-1.0)
        d, b, a = (part[:, None] for part in self.inner)
        level, slope = self.by_level**2 * d, self.by_slope**2 * a
        along = (level * seen.model).addcmul_(2.0 * self.by_level * self.by_slope * b, pixels.slope)
        own = torch.addcmul(pixels.diagonal, along, seen.model, value=-1.0)
        return residual, own.addcmul_(slope * pixels.slope, pixels.slope, value=-1.0)

    def of_parameters(self, seen: _Seen, with_slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Of the information on parameters, what the continuum explains, (PARTS, B, P, P); and what they are pulled by
        without it, (PARTS, B, P). What is between their derivatives and the slopes is given, (T, B, P).
        """
        along = torch.stack((self.by_level[:, None] * seen.model_by_rows, self.by_slope[:, None] * with_slope))
        inside = torch.stack(self._inside(*along, *(part[..., None] for part in self.inner)))
        pulled = seen.left_by_rows - (along * torch.stack(self.found)[..., None]).sum(dim=0)
        explained = []
        for one, other in zip(*(pair.tensor_split(PARTS, dim=1) for pair in (along, inside)), strict=True):
            one, other = (pair.flatten(0, 1).transpose(0, 1) for pair in (one, other))  # B, 2 T, P
            explained.append(one.mT @ other)
        return torch.stack(explained), torch.stack([part.sum(dim=0) for part in pulled.tensor_split(PARTS)])

    def removed_from_rows(self, rows: torch.Tensor, model: torch.Tensor, seen: _Seen, with_slope) -> torch.Tensor:
        """
        Derivatives (T, B, P, K) of the model (B, T, K), so that with what the pixels say they give what they are pulled
        by.
        """
        by_level, by_slope = self.by_level[:, None], self.by_slope[:, None]
        inner = (part[..., None] for part in self.inner)
        level, slope = self._inside(by_level * seen.model_by_rows, by_slope * with_slope, *inner)
        found = rows - (by_level * level)[..., None] * model.transpose(0, 1)[:, :, None]
        found[..., 1] -= by_slope * slope
        return found

    def sizes(self, level_known: torch.Tensor) -> list[torch.Tensor]:
        """Variances as they turn out to be, of stars whose level is known; others keep theirs."""
        sizes = []
        for found, spread, variance in zip(self.found, self.inner[::2], self.variances, strict=True):
            second = (found**2 + spread).mean(dim=0)  # 1 where as large as the prior
            sizes.append(torch.where(level_known, (second * variance).clamp(min=LEAST_LEVEL**2), variance))
        return sizes


__all__ = ["Refined", "SpectraFMRefinement", "SpectraFMStarModel", "combinations"]
