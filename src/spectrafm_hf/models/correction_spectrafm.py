# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
A label learnt from labelled stars in closed form: a Gaussian process on the outputs of a frozen model.

It predicts a new label, or corrects the prediction of a known one. Its inputs are groups of features: the predictions
of the model, the shape of the continuum (level and slope of each interval), the coefficients of all intervals,
principal components of the pixels (for features that the model has not learnt), and scalars such as a parallax, with
their errors. Its covariance function has a constant, and a linear and a local part for each group. It is not trained
by gradients through the network: `heads.fit_head` computes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .configuration_spectrafm import PIXEL_GROUPS, SCALAR_GROUPS, SpectraFMConfig
from .evidence_spectrafm import InFullPrecision


PIXEL_SOFTENING = 0.1  # of the median flux: asinh is linear below it
FARTHEST = 10.0  # of the spread of a pixel: larger deviations are clipped
FILLINGS = 15  # iterations that fill holes from the components


def covariance(
    a: torch.Tensor,
    b: torch.Tensor,
    constant: torch.Tensor | float,
    linear: torch.Tensor,
    length: torch.Tensor,
    amplitude: Sequence[torch.Tensor] | torch.Tensor,
    sizes: Sequence[int],
) -> torch.Tensor:
    """
    Covariance between stars, (A, F) and (B, F) -> (A, B).

    Parameters
    ----------
    a, b : torch.Tensor of shape (stars, features)
        Standardised features, group after group.
    constant : number
        Variance of the constant.
    linear, length : torch.Tensor of shape (features,)
        Variance of the slopes, and length over which the local part changes.
    amplitude : of shape (groups,)
        Variance of the local part of each group.
    sizes : sequence of int
        Features of each group.
    """
    found = constant + (a * linear) @ b.T
    start = 0
    for size, variance in zip(sizes, amplitude, strict=True):
        own = slice(start, start + size)
        first, second = a[:, own] / length[own], b[:, own] / length[own]
        squares = (first**2).sum(dim=1)[:, None] + (second**2).sum(dim=1) - 2.0 * first @ second.T
        found = found + variance * torch.exp(-0.5 * squares.clamp(min=0.0))
        start += size
    return found


def own_variance(
    a: torch.Tensor,
    constant: torch.Tensor | float,
    linear: torch.Tensor,
    amplitude: Sequence[torch.Tensor] | torch.Tensor,
) -> torch.Tensor:
    """The diagonal of the covariance of stars with themselves: (A, F) -> (A,)."""
    local = sum(amplitude) if len(amplitude) else 0.0
    return constant + local + (a**2) @ linear


def variance_of_inputs(
    unknown: torch.Tensor,
    linear: torch.Tensor,
    length: torch.Tensor,
    amplitude: Sequence[torch.Tensor] | torch.Tensor,
    sizes: Sequence[int],
) -> torch.Tensor:
    """
    Prior variance of the label of a star due to the errors of its inputs: (A, F) -> (A,).

    Parameters
    ----------
    unknown : torch.Tensor of shape (stars, features)
        Posterior variance of each input, standardised; 0 for inputs without errors.
    linear, length, amplitude, sizes
        As in [`covariance`].
    """
    found, start = unknown @ linear, 0
    for size, variance in zip(sizes, amplitude, strict=True):
        own = slice(start, start + size)
        if bool(unknown[:, own].any()):
            same = (1.0 + 2.0 * unknown[:, own] / length[own] ** 2).rsqrt().prod(dim=1)
            found = found + variance * (1.0 - same)
        start += size
    return found


class SpectraFMPixels(InFullPrecision):
    """
    Fluxes on one grid, from a tokenizer with `pixel_wavelength` -> principal components of the labelled stars: of asinh
    of the flux, and of the same with each pixel in units of its spread, clipped and weighted by its noise.

    Holes are filled from the components of the other pixels, so that the result is close to that of the complete
    spectrum.

    Parameters
    ----------
    first, pixels, components : int
        Index of the first column of the grid among those of all grids, number of columns, number of components.
    """

    middle: torch.Tensor
    spread: torch.Tensor
    directions: torch.Tensor
    scaled_directions: torch.Tensor
    size: torch.Tensor

    def __init__(self, first: int, pixels: int, components: int):
        super().__init__()
        self.own = slice(first, first + pixels)
        self.register_buffer("middle", torch.zeros(pixels))
        self.register_buffer("spread", torch.ones(pixels))
        self.register_buffer("directions", torch.zeros(pixels, components))
        self.register_buffer("scaled_directions", torch.zeros(pixels, components))
        self.register_buffer("size", torch.ones(2))  # of the first component of each among the stars

    def reset(self, ones: Sequence[str] = ("spread", "size")) -> None:
        super().reset(ones)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, pixels of all grids), over the median of the spectrum, NaN where unknown -> two of (B, components)."""
        dtype = torch.float32 if pixels.device.type == "mps" else torch.float64
        middle, spread, directions, scaled, size = (
            part.to(dtype) for part in (self.middle, self.spread, self.directions, self.scaled_directions, self.size)
        )
        flux = torch.asinh(pixels[:, self.own].to(dtype) / PIXEL_SOFTENING) - middle
        flux = filled(flux, directions)
        return {
            "pixels": flux @ directions / size[0],
            "scaled": (flux / spread).clamp(-FARTHEST, FARTHEST) @ scaled / size[1],
        }


def filled(flux: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Deviations from the mean (B, pixels), NaN for holes -> the same, holes filled from orthonormal directions."""
    unknown = flux.isnan()
    flux = torch.where(unknown, 0.0, flux)
    (rows,) = torch.nonzero(unknown.any(dim=1), as_tuple=True)
    if len(rows):
        holes, some = unknown[rows], flux[rows]
        for _ in range(FILLINGS):
            some = torch.where(holes, (some @ directions) @ directions.T, some)
        flux = flux.index_copy(0, rows, some)
    return flux


class SpectraFMCorrection(InFullPrecision):
    """
    One label for the spectra of one rung, or one of several processes whose weighted mean is the prediction.

    Parameters
    ----------
    config : SpectraFMConfig
    settings : mapping
        An entry of `config.corrections`: the `label`, the `rung`, the labels whose predictions are `inputs`, the
        `groups` of features, whether it `adds` to the prediction of the model, the number of `stars`, and of those used
        for the variance (`known`); the `range` of the label among them; its `weight` among the processes of the label,
        and that `beyond` the range; the index of its `pixels` in `config.pixel_sets`, -1 for none. With scalars: the
        names of its inputs, `scalars`, and `blind`, its weight for stars without one of them and the factor of its
        errors there.
    """

    center: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    linear: torch.Tensor
    length: torch.Tensor
    amplitude: torch.Tensor
    constant: torch.Tensor
    noise: torch.Tensor
    stars: torch.Tensor
    weight: torch.Tensor
    factor: torch.Tensor
    target: torch.Tensor
    population: torch.Tensor

    def __init__(self, config: SpectraFMConfig, settings: Mapping[str, Any]):
        super().__init__()
        self.label, self.adds = settings["label"], bool(settings["adds"])
        self.inputs, self.groups = list(settings["inputs"]), list(settings["groups"])
        self.pixels = int(settings["pixels"])
        self.scalars = list(settings.get("scalars", ()))
        self.first, last = config.rung_intervals[settings["rung"]]
        self.shape = (last - self.first, config.num_coefficients)
        each = {"answers": len(self.inputs), "shape": 2 * self.shape[0], "coefficients": self.shape[0] * self.shape[1]}
        if self.pixels >= 0:
            each |= dict.fromkeys(PIXEL_GROUPS, config.pixel_sets[self.pixels][2])
        each |= {"scalars": len(self.scalars), "known": len(self.inputs) + len(self.scalars)}
        self.sizes = [each[group] for group in self.groups]
        n_features, stars, known = sum(self.sizes), settings["stars"], settings["known"]
        for name, value in (("center", 0.0), ("scale", 1.0), ("low", 0.0), ("high", 0.0), ("linear", 0.0)):
            self.register_buffer(name, torch.full((n_features,), value))
        self.register_buffer("length", torch.ones(n_features))
        self.register_buffer("amplitude", torch.zeros(len(self.groups)))
        self.register_buffer("constant", torch.zeros(()))
        # Variance of the noise, its growth with the errors of the predictions, and their usual ln with its limits.
        self.register_buffer("noise", torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
        self.register_buffer("stars", torch.zeros(stars, n_features))
        self.register_buffer("weight", torch.zeros(stars))
        self.register_buffer("factor", torch.zeros(known, known))  # inverse of the Cholesky factor
        # Of the label: its median, its unit, and the factor of the errors.
        self.register_buffer("target", torch.tensor([0.0, 1.0, 1.0]))
        if self.scalars:
            # Of each among the labelled stars: median, spread, usual error, and the lowest and highest valid value.
            self.register_buffer("population", torch.zeros(len(self.scalars), 5))

    def features(
        self,
        values: torch.Tensor,
        coefficients: torch.Tensor,
        reliability: torch.Tensor,
        intervals: torch.Tensor,
        components: Mapping[str, torch.Tensor] | None = None,
        scalars: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        (B, inputs) predictions in physical units, (B, T, K) twice, (T,) indices of intervals of the rung, the output of
        [`SpectraFMPixels`], (B, scalars) from `estimated` -> (B, features), not standardised yet.
        """
        parts = dict(components or {})
        if {"answers", "known"} & set(self.groups):
            # Spectra change with the logarithm of the temperature.
            logs = torch.tensor([name == "teff" for name in self.inputs], device=values.device)
            parts["answers"] = torch.where(logs, torch.log(values.clamp(min=1.0)), values)
        if "shape" in self.groups or "coefficients" in self.groups:
            known = torch.zeros(len(values), *self.shape, dtype=values.dtype, device=values.device)
            seen = reliability.to(values.dtype).clamp(min=0.0)
            known[:, intervals - self.first] = coefficients.to(values.dtype) * seen.sqrt()
            parts["shape"], parts["coefficients"] = known[:, :, :2].flatten(1), known.flatten(1)
        if scalars is not None:
            parts["scalars"] = scalars
            parts["known"] = torch.cat([parts.get("answers", values[:, :0]), scalars], dim=1)
        found = [parts[group] for group in self.groups]
        return torch.cat(found, dim=1) if found else values[:, :0]

    def estimated(self, scalars: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Posterior of the scalars, with the labelled stars as the prior: the larger the error of a scalar, the nearer its
        estimate is to the mean of these stars. A scalar that is not finite, or far from all of theirs, is unknown; an
        unknown error is replaced by their usual one.

        Parameters
        ----------
        scalars : torch.Tensor of shape (B, scalars, 2)
            Values and one-sigma errors.

        Returns
        -------
        estimate, variance : torch.Tensor of shape (B, scalars)
            In units of their spread.
        known : torch.BoolTensor of shape (B, scalars)
        """
        middle, spread, usual, low, high = self.population.to(scalars.dtype).T
        value, error = scalars.unbind(-1)
        known = (value >= low) & (value <= high)  # not so for NaN
        error = torch.where(error.isfinite() & (error >= 0), error, usual)
        share = torch.where(known, spread**2 / (spread**2 + error**2), 0.0)
        return share * (torch.where(known, value, middle) - middle) / spread, 1.0 - share, known

    def unknown(self, variance: torch.Tensor) -> torch.Tensor:
        """Variances of `estimated` (B, scalars) -> of all features (B, features), standardised."""
        parts, number = [], len(self.scalars)
        for group, size in zip(self.groups, self.sizes, strict=True):
            before = size - number if group in SCALAR_GROUPS else size
            parts += [variance.new_zeros(len(variance), before), variance[:, : size - before]]
        return torch.cat(parts, dim=1) / self.scale.to(variance.dtype) ** 2

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """Inputs, clipped to their range among the labelled stars."""
        dtype = features.dtype
        inside = features.maximum(self.low.to(dtype)).minimum(self.high.to(dtype))
        return (inside - self.center.to(dtype)) / self.scale.to(dtype)

    def doubt(self, errors: torch.Tensor) -> torch.Tensor:
        """Errors of predictions (B, inputs) -> their mean ln minus the usual one, within the limits of the stars."""
        _, _, center, low, high = self.noise.to(errors.dtype)
        return (torch.log(errors).mean(dim=1) - center).clamp(low, high)

    def posterior(
        self, standardised: torch.Tensor, doubt: torch.Tensor, unknown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (B, features), (B,), and the output of `unknown` -> correction (or prediction), and its one-sigma error, (B,) in
        physical units.
        """
        dtype = standardised.dtype
        constant, linear, length, amplitude, stars, factor = (
            part.to(dtype)
            for part in (self.constant, self.linear, self.length, self.amplitude, self.stars, self.factor)
        )
        between = covariance(standardised, stars, constant, linear, length, amplitude, self.sizes)
        mean = between @ self.weight.to(dtype)
        left = own_variance(standardised, constant, linear, amplitude)
        left = left - ((between[:, : len(factor)] @ factor.T) ** 2).sum(dim=1)
        variance, growth, *_ = self.noise.to(dtype)
        left = left.clamp(min=0.0) + variance * torch.exp(growth * doubt)
        if unknown is not None:
            left = left + variance_of_inputs(unknown, linear, length, amplitude, self.sizes)
        middle, unit, error_factor = self.target.to(dtype)
        return middle + unit * mean, unit * error_factor * left.sqrt()

    @torch.no_grad()
    def forward(
        self,
        values: torch.Tensor,
        errors: torch.Tensor,
        answer: torch.Tensor,
        coefficients: torch.Tensor,
        reliability: torch.Tensor,
        intervals: torch.Tensor,
        components: Mapping[str, torch.Tensor] | None = None,
        scalars: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Parameters
        ----------
        values, errors : torch.FloatTensor of shape (B, inputs)
            Predictions of the model in physical units.
        answer : torch.FloatTensor of shape (B,)
            Prediction for the label itself; used if the correction adds to it.
        coefficients, reliability : torch.FloatTensor of shape (B, T, num_coefficients)
        intervals : torch.LongTensor of shape (T,)
            All intervals of this rung.
        components : dict of torch.Tensor of shape (B, components), optional
            Output of [`SpectraFMPixels`], for processes on pixels.
        scalars : torch.Tensor of shape (B, scalars, 2), optional
            Values and errors of `self.scalars`, NaN where unknown.

        Returns
        -------
        value, error : torch.FloatTensor of shape (B,)
            In physical units; NaN where an input is NaN.
        """
        with torch.autocast(values.device.type, enabled=False):
            dtype = torch.float32 if values.device.type == "mps" else torch.float64
            wide = values.to(dtype)
            known = wide.isfinite().all(dim=1)
            wide = torch.where(known[:, None], wide, self.neutral(dtype))
            estimate = unknown = None
            if self.scalars and scalars is not None:
                estimate, variance, _ = self.estimated(scalars.to(dtype))
                unknown = self.unknown(variance)
            features = self.features(wide, coefficients, reliability, intervals, components, estimate)
            found, error = self.posterior(self.standardise(features), self.doubt(errors.to(dtype)), unknown)
            if self.adds:
                found = found + answer.to(dtype)
        return torch.where(known, found, torch.nan).float(), torch.where(known, error, torch.nan).float()

    def neutral(self, dtype: torch.dtype) -> torch.Tensor:
        """Finite placeholders for missing predictions."""
        return torch.ones(len(self.inputs), dtype=dtype, device=self.center.device)


def mixed(
    values: Sequence[torch.Tensor],
    errors: Sequence[torch.Tensor],
    entries: Sequence[Mapping[str, Any]],
    blind: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted mean of some processes, and its error, larger where they disagree: (B,) each.

    Parameters
    ----------
    values, errors : sequence of torch.Tensor of shape (B,)
        Output of each process.
    entries : sequence of mapping
        Their settings: `weight`, and `beyond`, the weight for stars outside the `range` of the labelled ones, where a
        process may be biased towards these. The process with the largest `beyond` decides how far a star is outside:
        fully, if its prediction is outside the range by its error or more.
    blind : torch.BoolTensor of shape (B,), optional
        Stars with an unknown scalar, for which the weights `blind` are used.
    """
    value, error = torch.stack(list(values)), torch.stack(list(errors))
    weight, beyond = (
        torch.tensor([float(each[key]) for each in entries], dtype=value.dtype, device=value.device)[:, None]
        for key in ("weight", "beyond")
    )
    goes_beyond = bool((beyond != weight).any())
    if blind is not None and bool(blind.any()):
        pairs = [each.get("blind", (each["weight"], 1.0)) for each in entries]
        other, factor = torch.tensor(pairs, dtype=value.dtype, device=value.device).T[..., None]
        weight, error = torch.where(blind, other, weight), torch.where(blind, factor * error, error)
    if goes_beyond:
        low, high = entries[0]["range"]
        first = int(beyond.argmax())
        outside = torch.maximum(low - value[first], value[first] - high) / error[first]
        share = outside.nan_to_num(0.0).clamp(0.0, 1.0)
        weight = (1.0 - share) * weight + share * beyond
    mean = (weight * value).sum(dim=0)
    return mean, (weight * (error**2 + (value - mean) ** 2)).sum(dim=0).sqrt()


__all__ = [
    "SpectraFMCorrection",
    "SpectraFMPixels",
    "covariance",
    "filled",
    "mixed",
    "own_variance",
    "variance_of_inputs",
]
