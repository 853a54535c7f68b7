# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
From a first estimate of a star to the most likely one: Gauss-Newton steps with a model of stars.

A network learns slowly how much each line says about each label, and never as well as the model that its training
spectra were made with says it at once. So the network finds where to begin, and a few steps of least squares go from
there: labels -> coefficients of all intervals, compared with what the spectrum says, weighed by its errors.

What a spectrum has beside its labels is part of the fit: a residual velocity, a line spread function that is a little
wider than stated, levels and slopes of the continuum, whose sizes are found for each spectrum. Where stars differ from
the model by more than the errors of their flux, the errors of the labels grow with it.
"""

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import nn

from .configuration_spectrafm import FIRST_LABEL_ID, SpectraFMConfig
from .evidence_spectrafm import InFullPrecision
from .modeling_emulator import REFERENCE_TEFF, CovarianceGroup


# Steps of all stars at once, derivatives of the first of these only, as the others are small; and how often those go on
# that have not found their end.
STEPS, DERIVATIVES, ROUNDS = 4, 2, 3
LARGEST_STEP = 1.5  # in standard deviations of the labels among the stars of the model
CONVERGED = 0.5  # sigma: a last step that is larger has not found its end
# Relative errors of the level of an interval, and of its slope: at first, at least, and where the level is unknown.
FIRST_LEVEL, LEAST_LEVEL, FREE_LEVEL = 3e-3, 1e-5, 0.5
# Of the velocity in km/s and of the width of the line spread function, in the steps of the star model.
NUISANCE_SIGMA = (10.0, 2.0)
# Where a star differs from the model, lines that are wrong are wrong together: the variance of labels grows by so much
# more than that of the flux. Found on 336 observed windows of APOGEE DR12 and three whole spectra, whose labels of the
# survey would otherwise be off by 1.7 to 6 sigma.
COHERENT = 10.0
LARGE = 16.0  # of the mean square of deviations: what is larger counts as that much
PARTS = 3  # of the intervals, that are asked whether they agree
BEYOND = 0.1  # of the range of each label: how far a fit may leave it


class SpectraFMStarModel(nn.Module):
    """
    Labels -> coefficients of the intervals, with derivatives: an emulator of spectra, in the basis of the tokens.

    The weights of spectral components are Gaussian processes over the labels, as in [`SpectrumEmulator`]; coefficients
    are linear in them. Nothing of it is trained. `bases.fill_star_model` computes it.
    """

    center: torch.Tensor
    scale: torch.Tensor
    stars: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    population: torch.Tensor
    precision: torch.Tensor
    components: torch.Tensor
    velocity_of_width: torch.Tensor
    spread: torch.Tensor

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        n_labels, n_components = len(config.star_labels), sum(config.star_components)
        first, last = config.star_intervals
        self.first = first
        self.register_buffer("center", torch.zeros(n_labels))
        self.register_buffer("scale", torch.ones(n_labels))
        self.register_buffer("stars", torch.zeros(config.num_stars, n_labels))
        self.register_buffer("low", torch.zeros(n_labels))
        self.register_buffer("high", torch.zeros(n_labels))
        # Of the labels of stars: mean and inverse covariance, standardised.
        self.register_buffer("population", torch.zeros(n_labels))
        self.register_buffer("precision", torch.eye(n_labels))
        # Spectrum, its change with velocity and with the width of lines; the last component is the mean spectrum.
        # A velocity makes lines wider as well, in second order: in that unit, the square of it over this one's.
        self.register_buffer("velocity_of_width", torch.ones(()))
        shape = (3, last - first, config.num_coefficients, n_components + 1)
        self.register_buffer("components", torch.zeros(shape))
        # Of the coefficients among stars, in flux: the unit in which they are given.
        self.register_buffer("spread", torch.ones(shape[1:3]))
        self.groups = nn.ModuleList(
            CovarianceGroup(n_labels, config.num_stars, size) for size in config.star_components
        )

    def standardise(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, labels) in physical units -> standardised; lines change with 5040 K / Teff, the first label."""
        features = torch.cat((REFERENCE_TEFF / labels[:, :1].double(), labels[:, 1:].double()), dim=1)
        return ((features - self.center.double()) / self.scale.double()).float()

    def limits(self) -> torch.Tensor:
        """Lowest and highest of the labels of its stars, (2, labels), standardised."""
        return self.standardise(torch.stack((self.low, self.high))).sort(dim=0).values

    def physical(self, standardised: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised labels (B, labels) -> in physical units, and the derivatives of each with respect to its own."""
        features = standardised * self.scale + self.center
        inverse = REFERENCE_TEFF / features[:, :1]
        slope = torch.cat((-inverse / features[:, :1], torch.ones_like(features[:, 1:])), dim=1) * self.scale
        return torch.cat((inverse, features[:, 1:]), dim=1), slope

    def weights(self, labels: torch.Tensor) -> torch.Tensor:
        """Standardised labels (B, labels) -> weights of the components (B, components), the mean spectrum included."""
        labels, stars = labels.double(), self.stars.double()
        weights = torch.cat([group(labels, stars) for group in self.groups], dim=1).float()
        return nn.functional.pad(weights, (0, 1), value=1.0)

    def slopes(self, labels: torch.Tensor) -> torch.Tensor:
        """Derivatives of the weights but the last, (B, labels, components)."""
        found = []
        for part in self.groups:
            group = cast(CovarianceGroup, part)
            linear, quadratic, local = group.log_amplitude.exp()
            trend_scale, lengths = (2.0 * group.log_scale).exp(), group.log_length.exp()
            trend = (labels * trend_scale) @ self.stars.T
            a, b = labels / lengths, self.stars / lengths
            distance = (a**2).sum(dim=1)[:, None] + (b**2).sum(dim=1) - 2.0 * a @ b.T
            near = local * torch.exp(-0.5 * distance.clamp(min=0.0))
            by_star = (self.stars[:, :, None] * group.weight[:, None, :]).flatten(1)
            shape = (len(labels), labels.shape[1], -1)
            far = ((linear + 2.0 * quadratic * (trend + 1.0)) @ by_star).view(shape) * trend_scale[:, None]
            close = (near @ by_star).view(shape) - labels[:, :, None] * (near @ group.weight)[:, None]
            found.append(far + close / lengths[:, None] ** 2)
        return torch.cat(found, dim=2)

    def jacobian(
        self, labels: torch.Tensor, intervals: torch.Tensor, by_velocity: torch.Tensor, by_width: torch.Tensor
    ) -> torch.Tensor:
        """Derivatives of coefficients with respect to labels, velocity and width: (B, T, num_coefficients, P + 2)."""
        chosen = self.components[0, intervals - self.first, :, :-1]
        found = self.slopes(labels) @ chosen.flatten(0, 1).T
        found = torch.cat((found, by_velocity.flatten(1)[:, None], by_width.flatten(1)[:, None]), dim=1)
        return found.transpose(1, 2).reshape(len(labels), *chosen.shape[:2], -1)

    def coefficients(self, weights: torch.Tensor, intervals: torch.Tensor) -> torch.Tensor:
        """(B, components + 1), numbers of intervals (T,) -> (3, B, T, num_coefficients): spectrum and its changes."""
        chosen = self.components[:, intervals - self.first]
        return torch.einsum("stkc,bc->sbtk", chosen, weights)


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
    What the fit found. B stars, P labels of the star model.

    Attributes
    ----------
    labels : torch.FloatTensor of shape (B, P)
        In physical units.
    covariance : torch.FloatTensor of shape (B, P, P)
    velocity, velocity_error : torch.FloatTensor of shape (B,)
        km/s that the lines are away from rest.
    mismatch : torch.FloatTensor of shape (B,)
        What differs from the model by more than the errors of the flux, over what there is of lines: 0 to about 1.
    error_factor : torch.FloatTensor of shape (B,)
        By which the errors of the labels are larger than those of the flux alone would have them, as the star differs
        from the model or the errors are too small; at least 1.
    disagreement : torch.FloatTensor of shape (B,)
        chi^2 of the labels that thirds of the spectrum would have by themselves, less what is expected, in standard
        deviations.
    converged : torch.BoolTensor of shape (B,)
    slope : torch.FloatTensor of shape (B, P, T, K)
        Derivative of the labels with respect to `pull` of the evidence, where that is asked for.
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


class SpectraFMRefinement(InFullPrecision):
    """Gauss-Newton steps from a first estimate of the labels, see the top of this file."""

    def __init__(self, config: SpectraFMConfig):
        super().__init__()
        self.star_model = SpectraFMStarModel(config).requires_grad_(False)

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
            Standardised labels to begin with.
        estimate, information, pull : see [`Evidence`]
            (B, T, K), (B, T, K, K), (B, T, K), of intervals of the star model alone.
        intervals : torch.LongTensor of shape (T,)
        level_known : torch.BoolTensor of shape (B,)
            Whether flux is over the continuum.
        misfit : torch.FloatTensor of shape (B, T), optional
            chi^2 per degree of freedom of what is beyond the coefficients, NaN where unknown: where the stated errors
            are too small for it, they count as larger.

        Labels have a derivative with respect to `pull`, where that requires one: not of each step, but of the end,
        where the likelihood has its peak. Nothing else has.
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
            information = information / error_factor[:, None, None, None] ** 2
            pull = pull / error_factor[:, None, None] ** 2
        low, high = self.star_model.limits()
        begin = nn.functional.pad(start.float().clamp(low, high), (0, 2))
        refined, end = self._fit(begin, estimate, information, pull, intervals, level_known, wanted)
        for _ in range(ROUNDS - 1):
            again = torch.nonzero(~refined.converged)[:, 0]
            if not len(again):
                break
            found, end[again] = self._fit(
                end[again], estimate[again], information[again], pull[again], intervals, level_known[again], wanted
            )
            for field in fields(found):
                if field.name != "slope" or wanted:
                    getattr(refined, field.name)[again] = getattr(found, field.name)
        refined.error_factor *= error_factor
        if refined.slope is not None:
            refined.slope /= error_factor[:, None, None, None] ** 2
        return refined

    def _fit(self, found, estimate, information, pull, intervals, level_known, wanted) -> tuple[Refined, torch.Tensor]:
        """`STEPS` steps from labels, velocity and width (B, P + 2); and where they lead."""
        star = self.star_model
        n_labels = found.shape[1] - 2
        low, high = star.limits()
        margin = BEYOND * (high - low)
        sigma = torch.tensor(NUISANCE_SIGMA, device=found.device)
        prior = torch.block_diag(star.precision, torch.diag(sigma**-2.0))
        center = torch.cat((star.population, torch.zeros_like(sigma)))
        first = torch.where(level_known, FIRST_LEVEL, FREE_LEVEL)
        level, slope = first**2, (5.0 * first) ** 2
        own = factor = size = level
        for number in range(STEPS):
            weights = star.weights(found[:, :n_labels])
            spectrum, by_velocity, by_width = star.coefficients(weights, intervals)
            velocity, width = found[:, -2, None, None], found[:, -1, None, None]
            wider = velocity / star.velocity_of_width**2
            by_velocity = by_velocity + wider * by_width
            model = spectrum + velocity * by_velocity + width * by_width
            by_velocity = by_velocity + wider * by_width
            if number < DERIVATIVES:
                jacobian = star.jacobian(found[:, :n_labels], intervals, by_velocity, by_width)  # B, T, K, P + 2
                informed = information @ jacobian
            residual = pull - _times(information, model - estimate)
            continuum = _Continuum(information, residual, model, level, slope)
            level, slope = continuum.sizes(level, slope, level_known)
            residual = continuum.removed_from(residual)
            weighted = continuum.removed_from_columns(informed, jacobian)
            own = continuum.diagonal(information)
            factor = 1.0 + COHERENT * (_error_factor(own, residual) - 1.0)
            flat = jacobian.flatten(1, 2)
            fisher = flat.transpose(1, 2) @ weighted.flatten(1, 2) / factor[:, None, None] + prior
            right = (residual.flatten(1)[:, None] @ flat)[:, 0] / factor[:, None] - (found - center) @ prior
            # With a diagonal of one: the labels differ by orders of magnitude in what is known of them.
            scale = torch.rsqrt(fisher.diagonal(dim1=1, dim2=2))
            inverse = torch.linalg.inv((fisher * scale[:, :, None] * scale[:, None, :]).double())
            inverse = (inverse * scale[:, :, None] * scale[:, None, :]).float()
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
            disagreement=_disagreement(
                jacobian, weighted / factor[:, None, None, None], residual / factor[:, None, None], inverse, prior
            ),
            converged=(size < CONVERGED) & found.isfinite().all(dim=1),
        )
        if wanted:
            by_pull = continuum.removed_from_rows(jacobian) / factor[:, None, None, None]
            refined.slope = torch.einsum("bpq,btkq->bptk", inverse[:, :n_labels] * change[:, :, None], by_pull)
        return refined, found


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _error_factor(information: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """
    By how much the coefficients differ from the model more than by their errors, as a factor of variances, at least 1,
    (B,): what pixels say of each is given, (B, T, K), and what is left.
    """
    # Level and slope belong to the continuum.
    own, left = information[..., 2:].flatten(1), residual[..., 2:].flatten(1)
    counts = own > 1e-6
    number = counts.sum(dim=1).clamp(min=1)
    squared = torch.where(counts, left**2 / own.clamp(min=1e-6), 0.0)
    found = squared.sum(dim=1) / number
    for _ in range(4):  # a few wild ones do not count for all
        found = squared.minimum(LARGE * found[:, None]).sum(dim=1) / number
    return torch.where(found > 1.0 + 3.0 * (2.0 / number).sqrt(), found, 1.0)


def _mismatch(information, residual, model, spread) -> torch.Tensor:
    """See [`Refined`]; (B, T, K) thrice, and the spread of coefficients among stars (T, K)."""
    own = information[..., 2:].clamp(min=1e-6)
    size = torch.where(own > 1e-6, spread[:, 2:] ** 2, 0.0)
    beyond = ((residual[..., 2:] / own) ** 2 - 1.0 / own) * size
    lines = model[..., 2:] ** 2 * size
    return (beyond.sum(dim=(1, 2)).clamp(min=0.0) / lines.sum(dim=(1, 2)).clamp(min=1e-12)).sqrt()


def _disagreement(jacobian, weighted, residual, covariance, prior) -> torch.Tensor:
    """See [`Refined`]: what each part of the intervals adds, against the fit to all."""
    total = torch.zeros_like(residual[:, 0, 0])
    expected = torch.zeros_like(total)
    for part in torch.arange(jacobian.shape[1]).tensor_split(PARTS):
        flat = jacobian[:, part].flatten(1, 2)
        fisher = flat.transpose(1, 2) @ weighted[:, part].flatten(1, 2)
        pulled = (residual[:, part].flatten(1)[:, None] @ flat).transpose(1, 2)
        scale = torch.rsqrt((fisher + prior).diagonal(dim1=1, dim2=2))
        both = torch.cat((pulled, fisher - fisher @ covariance @ fisher), dim=2) * scale[:, :, None]
        solved = torch.linalg.solve((fisher + prior) * scale[:, :, None] * scale[:, None, :], both)
        total = total + (pulled[..., 0] * scale * solved[..., 0]).sum(dim=1)
        expected = expected + (solved[..., 1:] * scale[:, :, None]).diagonal(dim1=1, dim2=2).sum(dim=1)
    return (total - expected) / (2.0 * expected).clamp(min=1.0).sqrt()


class _Continuum:
    """Level and slope of each interval, of variances (B,) around those of the model, to be marginalised."""

    def __init__(self, information, residual, model, level, slope):
        self.variances = torch.stack((level, slope), dim=1)[:, None]  # B, 1, 2
        sizes = self.variances.sqrt()
        along_slope = torch.zeros_like(model)
        along_slope[..., 1] = 1.0
        directions = torch.stack((model, along_slope), dim=3) * sizes[:, :, None]
        self.directions = directions
        self.along = information @ directions  # B, T, K, 2
        # The posterior covariance in units of the prior, of two by two.
        a, b, d = (
            (directions[..., i] * self.along[..., j]).sum(dim=-1) + (1.0 if i == j else 0.0)
            for i, j in ((0, 0), (0, 1), (1, 1))
        )
        determinant = a * d - b * b
        self.inner = torch.stack((d, -b, -b, a), dim=-1).unflatten(-1, (2, 2)) / determinant[..., None, None]
        self.found = _times(self.inner, (directions * residual[..., None]).sum(dim=2))
        self.weighted = self.along @ self.inner

    def removed_from(self, residual: torch.Tensor) -> torch.Tensor:
        return residual - (self.along * self.found[:, :, None]).sum(dim=-1)

    def removed_from_columns(self, informed: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Information times columns (B, T, K, P), less what the continuum explains."""
        return informed - self.weighted @ (self.along.transpose(2, 3) @ columns)

    def removed_from_rows(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns (B, T, K, P), so that with a residual they give what they do with [`removed_from`] it."""
        return columns - self.directions @ (self.inner @ (self.along.transpose(2, 3) @ columns))

    def diagonal(self, information: torch.Tensor) -> torch.Tensor:
        return information.diagonal(dim1=2, dim2=3) - (self.weighted * self.along).sum(dim=-1)

    def sizes(self, level, slope, level_known):
        """Variances as they turn out to be, of stars whose level is known; others keep theirs."""
        second = (self.found**2 + self.inner.diagonal(dim1=2, dim2=3)).mean(dim=1)  # 1 where as large as the prior
        new = (second * self.variances[:, 0]).clamp(min=LEAST_LEVEL**2)
        return torch.where(level_known, new[:, 0], level), torch.where(level_known, new[:, 1], slope)


__all__ = ["Refined", "SpectraFMRefinement", "SpectraFMStarModel", "combinations"]
