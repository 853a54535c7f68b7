# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Labels of stars from the states of a frozen model and from their pixels: a weighted mean of a few Gaussian processes,
with cross-validation.

A head is the prediction of the model: unchanged, with another zero point, with a linear correction, or with a
Gaussian process added; or a Gaussian process alone. Its hyperparameters maximise the likelihood, with the errors of
the labels as noise; outlying labels have less weight. Cross-validation on all stars gives the weights of the heads
and calibrates the errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..inference.states import States
from ..models import SpectraFMConfig
from ..models.configuration_spectrafm import PIXEL_GROUPS
from ..models.correction_spectrafm import (
    SpectraFMCorrection,
    SpectraFMPixels,
    mixed,
)
from ..statistics import MAD_TO_SIGMA, robust_scatter
from .components import Components, fit_pixels
from .kernels import LEAST_NOISE, Head, Kernel


FloatArray = NDArray[np.floating[Any]]
#: Stars whose likelihood finds the hyperparameters; that a Gaussian process goes through; that its variance is made of.
LIKELIHOOD_STARS, MOST_STARS, VARIANCE_STARS = 300, 3000, 500
ITERATIONS, ITERATIONS_AGAIN = 60, 15  # of L-BFGS: from the usual start, and from the optimum for all stars
REWEIGHTED = 2
#: Weights of heads: how sure one is, beforehand, that the one that did best is best, as a share of what the likelihood
#: of as many independent stars would say; how many stars this counts as much as; and the least weight.
SURE, PRIOR_WEIGHT, LEAST_WEIGHT = 0.3, 3.0, 0.02
ENDS = 5  # a fifth of the stars at either end of the range of a label
TINY = 1e-30
WINSORISED = 4.0  # times the robust scatter: limit of residuals in comparisons
PRIOR_STARS = 20.0  # that a factor of 1 for the errors counts as much as
FACTORS = 0.3, 20.0  # of errors, least and greatest
CLIPPED_AT, CLIPPED_VARIANCE = 2.5, 0.9765  # in sigma; mean square of a Gaussian that is clipped there
LEAST_SCALE = 1e-6  # of an input among the stars: what differs by less is the same for all
MARGIN = 1.0  # of the range of each input among the stars: beyond, it counts as at that end


_ON_ANSWERS = {"answers": "both"}
_ON_EVIDENCE = {"answers": "both", "shape": "both", "coefficients": "both"}
_ON_PIXELS = {"pixels": "both"}
#: Without the answer of the model for the label.
NEW_LABEL_HEADS = (
    Head("on the answers", _ON_ANSWERS),
    Head("on answers and coefficients", _ON_EVIDENCE),
    Head("on pixels", _ON_PIXELS),
    Head("on scaled pixels", {"scaled": "both"}),
    Head("on answers and pixels", {"answers": "both", "pixels": "both"}),
    Head("on coefficients and pixels", {"answers": "linear", "coefficients": "both", "pixels": "both"}),
)
ZERO_POINT = Head("another zero point", {}, adds=True)
#: With it.
HEADS = (
    Head("the model as it is", {}, adds=True, constant=False),
    ZERO_POINT,
    Head("a linear correction", {"answers": "linear"}, adds=True),
    Head("a correction on the answers", _ON_ANSWERS, adds=True),
    Head("a correction on answers and coefficients", _ON_EVIDENCE, adds=True),
    Head("a correction on pixels", _ON_PIXELS, adds=True),
    *NEW_LABEL_HEADS,
)


@dataclass(frozen=True)
class Fitted:
    """
    A head with its stars: `tensors` are the buffers of its [`SpectraFMCorrection`], and `settings` its description.
    """

    head: Head
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    parameters: torch.Tensor

    def correction(self, config: SpectraFMConfig) -> SpectraFMCorrection:
        """The module, in double precision."""
        return self.fill(SpectraFMCorrection(config, self.settings).double())

    def fill(self, correction: SpectraFMCorrection) -> SpectraFMCorrection:
        """Put the tensors into a module."""
        for name, tensor in self.tensors.items():
            getattr(correction, name).copy_(tensor)
        return correction

    def predict(
        self, config: SpectraFMConfig, states: States, components: Components | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Values and one-sigma errors, each of shape (stars,), in physical units."""
        return ask(self.correction(config), states, components)


def ask(
    correction: SpectraFMCorrection, states: States, components: Components | None = None
) -> tuple[FloatArray, FloatArray]:
    """Values and one-sigma errors of a correction for stars, each of shape (stars,), in physical units."""
    intervals = torch.arange(states.coefficients.shape[1]) + correction.first
    columns = [states.inputs.index(name) for name in correction.inputs]
    values, errors = (torch.from_numpy(part[:, columns]) for part in (states.values, states.errors))
    answer = torch.zeros(len(states), dtype=torch.float64)
    if correction.adds:
        answer = torch.from_numpy(states.values[:, states.inputs.index(correction.label)])
    evidence = (torch.from_numpy(part) for part in (states.coefficients, states.reliability))
    value, error = correction(values, errors, answer, *evidence, intervals, components)
    return value.double().numpy(), error.double().numpy()


# ------------------------------------------------------------------------------------------------------- the likelihood


def fit_head(
    head: Head,
    config: SpectraFMConfig,
    rung: int,
    label: str,
    states: States,
    target: FloatArray,
    target_error: FloatArray,
    components: Components | None = None,
    pixels: int = -1,
    start: torch.Tensor | None = None,
    iterations: int = ITERATIONS,
) -> Fitted:
    """
    Fit one head to all of some stars.

    Parameters
    ----------
    head : Head
    config : SpectraFMConfig
        Of the frozen model.
    rung : int
        That the stars belong to.
    label : str
    states : States
        Finite.
    target, target_error : array of shape (stars,)
        Label and its error (0 where unknown).
    components : dict of torch.Tensor of shape (stars, components), optional
        What [`SpectraFMPixels`] gives of the stars, for heads on pixels.
    pixels : int
        The number of that among `config.pixel_sets`.
    start : torch.Tensor, optional
        Hyperparameters to start from.
    iterations : int
        0 keeps these.
    """
    if head.adds:
        target = target - states.values[:, states.inputs.index(label)]
    n_stars, n_known = len(target), min(len(target), VARIANCE_STARS)
    settings = {
        "label": label, "new": not head.adds, "rung": rung, "inputs": list(states.inputs), "groups": list(head.groups),
        "adds": head.adds, "stars": n_stars, "known": n_known, "range": [0.0, 0.0], "weight": 1.0, "beyond": 1.0,
        "pixels": pixels,
    }  # fmt: skip
    module = SpectraFMCorrection(config, settings).double()
    intervals = torch.arange(states.coefficients.shape[1]) + module.first
    values, coefficients, reliability = (
        torch.from_numpy(part) for part in (states.values, states.coefficients, states.reliability)
    )
    features = module.features(values, coefficients, reliability, intervals, components)
    spread = (features.amax(dim=0) - features.amin(dim=0)) * MARGIN
    tensors = {
        "center": features.median(dim=0).values,
        "scale": _scales(features, list(head.groups), module.sizes),
        "low": features.amin(dim=0) - spread,
        "high": features.amax(dim=0) + spread,
        "noise": torch.zeros(5, dtype=torch.float64),
    }
    for name, tensor in tensors.items():
        getattr(module, name).copy_(tensor)
    features = module.standardise(features)
    logs = torch.log(torch.from_numpy(states.errors)).mean(dim=1)
    usual = logs.median()
    doubt = logs - usual
    middle = float(np.median(target)) if head.constant else 0.0
    unit = float(np.sqrt(np.mean((target - middle) ** 2))) or 1.0
    wanted = torch.from_numpy((target - middle) / unit)
    label_variance = torch.from_numpy((target_error / unit) ** 2)
    noise = None
    if head.adds:  # the model predicts its errors
        own_error = float(np.median(states.errors[:, states.inputs.index(label)]))
        noise = float(np.clip((own_error / unit) ** 2, LEAST_NOISE, 1.0))
    kernel = Kernel(head, module.sizes, noise)
    some, prepared = slice(0, LIKELIHOOD_STARS), kernel.prepared(features)
    found, given = kernel.start if start is None else start, label_variance
    for number in range(1 + REWEIGHTED):
        if number:
            label_variance = kernel.reweighted(found, prepared, doubt, given, label_variance, wanted)
        if iterations:
            steps = ITERATIONS_AGAIN if number else iterations
            found = kernel.optimum(found, steps, features[some], doubt[some], label_variance[some], wanted[some])
    matrix = kernel.matrix(found, prepared, doubt, label_variance)
    factor = torch.linalg.cholesky(matrix)
    own = kernel.unpack(found)
    noise_mean = kernel.noise_of(found, features[some], doubt[some], label_variance[some], n_stars)
    identity = torch.eye(n_known, dtype=torch.float64)
    tensors |= {name: own[name] for name in ("linear", "length", "amplitude")}
    tensors |= {
        "constant": torch.tensor(kernel.constant),
        "noise": torch.stack([noise_mean, own["growth"], usual, doubt.min(), doubt.max()]),
        "stars": features,
        "weight": torch.cholesky_solve(wanted[:, None], factor)[:, 0],
        # The first rows of the factor are that of the first stars alone.
        "factor": torch.linalg.solve_triangular(factor[:n_known, :n_known], identity, upper=False),
        "target": torch.tensor([middle, unit, 1.0], dtype=torch.float64),
    }
    return Fitted(head, settings, tensors, found)


def _scales(features: torch.Tensor, groups: Sequence[str], sizes: Sequence[int]) -> torch.Tensor:
    """Answers and continuum in units of their own spread, coefficients in one of all of them."""
    parts = []
    for group, own in zip(groups, features.split(list(sizes), dim=1), strict=True):
        scale = spread = own.std(dim=0)
        if group in PIXEL_GROUPS:  # in units of the first of them
            scale = torch.ones_like(scale)
        elif group == "shape":  # which few stars differ in by much
            scale = MAD_TO_SIGMA * (own - own.median(dim=0).values).abs().median(dim=0).values * own.shape[1] ** 0.5
        elif group == "coefficients":
            scale = (spread**2).sum().sqrt().expand(len(spread))
        parts.append(torch.where(scale > LEAST_SCALE, scale, 1.0))
    return torch.cat(parts) if parts else features.new_zeros(0)


# --------------------------------------------------------------------------------------------------- cross-validation


@dataclass(frozen=True)
class Choice:
    """
    The heads that were chosen for a label.

    Attributes
    ----------
    fitted : list of Fitted
        To all stars, with errors that are calibrated, and their `weight` in the settings; the heaviest first.
    values, errors : array of shape (stars,)
        What they say of each star when that star's fold was left out, calibrated.
    tried : dict of str to float
        Root mean square of the deviations in cross-validation, wild ones winsorised, of each head by its name.
    """

    fitted: list[Fitted]
    values: FloatArray
    errors: FloatArray
    tried: dict[str, float]

    @property
    def weights(self) -> dict[str, float]:
        """How much each head counts, by its name."""
        return {part.head.name: part.settings["weight"] for part in self.fitted if part.settings["weight"]}

    def __str__(self) -> str:
        if len(self.weights) == 1:
            return next(iter(self.weights))
        return ", ".join(f"{weight:.0%} {name}" for name, weight in self.weights.items())

    def predict(
        self, config: SpectraFMConfig, states: States, components: Components | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Values and one-sigma errors, each of shape (stars,), in physical units."""
        values, errors = zip(*(part.predict(config, states, components) for part in self.fitted), strict=True)
        return _mixed(values, errors, [part.settings for part in self.fitted])


def _mixed(values: Any, errors: Any, entries: Sequence[Mapping[str, Any]]) -> tuple[FloatArray, FloatArray]:
    """[`mixed`] of arrays."""
    value, error = mixed(list(map(torch.from_numpy, values)), list(map(torch.from_numpy, errors)), entries)
    return value.numpy(), error.numpy()


def make_folds(groups: Sequence[str], n_folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each spectrum; those of a star are in one."""
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    order = np.random.default_rng([seed, 5]).permutation(len(names))
    return (order % n_folds)[numbers]


def choose_heads(
    config: SpectraFMConfig,
    rung: int,
    label: str,
    states: States,
    target: FloatArray,
    target_error: FloatArray,
    folds: NDArray[np.int64],
    pixels: SpectraFMPixels | None = None,
) -> Choice:
    """
    Compare the heads for a label by cross-validation, and weigh them.

    Parameters
    ----------
    config, rung, label, states, target, target_error
        As in [`fit_head`]; beyond `MOST_STARS`, the first ones count.
    folds : array of int, shape (stars,)
    pixels : SpectraFMPixels, optional
        The last of `config.pixel_sets`; without, no head sees pixels.
    """
    few = slice(0, MOST_STARS)
    states, folds = states[few], folds[few]
    target, target_error = (np.asarray(column, np.float64)[few] for column in (target, target_error))
    components = None if pixels is None else pixels(torch.from_numpy(states.pixels))
    heads = [
        head
        for head in (HEADS if label in states.inputs else NEW_LABEL_HEADS)
        if pixels is not None or not set(head.groups) & set(PIXEL_GROUPS)
    ]
    number = len(config.pixel_sets) - 1

    def fit(head: Head, rows: NDArray[Any] | slice, *start: Any) -> Fitted:
        own = number if set(head.groups) & set(PIXEL_GROUPS) else -1
        given = config, rung, label, states[rows], target[rows], target_error[rows]
        return fit_head(head, *given, _some(components, rows), own, *start)

    whole = {head.name: fit(head, slice(None)) for head in heads}
    # Of many stars, a few more or fewer do not change the hyperparameters.
    again = ITERATIONS_AGAIN if len(target) <= LIKELIHOOD_STARS else 0

    def predict(head: Head, kept: NDArray[Any], left: NDArray[Any]) -> tuple[FloatArray, FloatArray]:
        part = fit(head, kept, whole[head.name].parameters, again)
        return part.predict(config, states[left], _some(components, left))

    values, errors = [], []
    for head in heads:
        value, error = np.empty_like(target), np.empty_like(target)
        for fold in np.unique(folds):
            left = np.flatnonzero(folds == fold)
            value[left], error[left] = predict(head, np.flatnonzero(folds != fold), left)
        values.append(value)
        errors.append(error)
    residuals = np.stack([winsorised(value - target) for value in values])
    weights = weights_of_heads(residuals)
    beyond = weights
    if ZERO_POINT in heads:
        beyond = _weights_beyond(heads, weights, target, predict)
    limits = [float(target.min()), float(target.max())]
    order = [int(i) for i in np.argsort(-weights, kind="stable") if weights[i] > 0 or beyond[i] > 0]
    chosen = [whole[heads[i].name] for i in order]
    for i, part in zip(order, chosen, strict=True):
        part.settings.update(weight=float(weights[i]), beyond=float(beyond[i]), range=limits)
    entries = [part.settings for part in chosen]
    answer, _ = _mixed([values[i] for i in order], [errors[i] for i in order], entries)
    # What the heads differ by is known; the factor concerns the rest.
    share = weights[order, None]
    own = np.sqrt((share * np.stack([errors[i] for i in order]) ** 2).sum(axis=0))
    differ = np.sqrt((share * (np.stack([values[i] for i in order]) - answer) ** 2).sum(axis=0))
    factor = error_factor(answer - target, own, np.hypot(target_error, differ))
    for part in chosen:
        part.tensors["target"][2] = factor
    answer, sigma = _mixed([values[i] for i in order], [errors[i] * factor for i in order], entries)
    sizes = np.sqrt((residuals**2).mean(axis=1))
    return Choice(chosen, answer, sigma, {head.name: float(size) for head, size in zip(heads, sizes, strict=True)})


def _weights_beyond(
    heads: Sequence[Head],
    weights: FloatArray,
    target: FloatArray,
    predict: Callable[[Head, NDArray[Any], NDArray[Any]], tuple[FloatArray, FloatArray]],
) -> FloatArray:
    """
    Weights beyond the range of the labels, where fitted heads may regress to the training stars. If they do so for the
    stars with the lowest and highest labels, left out of the fit, the model with another zero point is used.
    """
    order = np.argsort(target, kind="stable")
    size = max(len(target) // ENDS, 1)
    by_model, by_heads = [], []
    for left in (order[:size], order[-size:]):
        kept = np.setdiff1d(order, left)
        found = {i: predict(heads[i], kept, left)[0] for i in np.flatnonzero(weights).tolist()}
        by_heads.append(sum(weights[i] * value for i, value in found.items()) - target[left])
        by_model.append(predict(ZERO_POINT, kept, left)[0] - target[left])
    model, learnt = (np.mean(np.concatenate(parts) ** 2) for parts in (by_model, by_heads))
    return np.array([float(head is ZERO_POINT) for head in heads]) if model < learnt else weights


def _some(components: Components | None, rows: NDArray[Any] | slice) -> Components | None:
    return None if components is None else {name: part[rows] for name, part in components.items()}


def weights_of_heads(residuals: FloatArray) -> FloatArray:
    """
    Weights, 0 or more and 1 in sum, with which the mean of some heads is best in cross-validation.

    Parameters
    ----------
    residuals : array of shape (heads, stars)
        Predicted - true, with outliers winsorised.
    """
    n_heads, n_stars = residuals.shape
    residuals = residuals / (np.abs(residuals).max() or 1.0)  # in any unit
    squares = np.maximum((residuals**2).mean(axis=1), TINY)
    least = squares.min()
    prior = np.exp(-0.5 * SURE * n_stars * np.log(squares / least))
    prior /= prior.sum()
    # Least squares, with rows for the prior and one for a sum of 1.
    rows = [residuals.T / math.sqrt(least), math.sqrt(PRIOR_WEIGHT) * np.eye(n_heads), np.full((1, n_heads), 1e3)]
    wanted = np.concatenate([np.zeros(n_stars), math.sqrt(PRIOR_WEIGHT) * prior, [1e3]])
    weights, _ = nnls(np.concatenate(rows), wanted)
    weights = np.where(weights < LEAST_WEIGHT * weights.sum(), 0.0, weights)
    return weights / weights.sum()


def winsorised(residual: FloatArray) -> FloatArray:
    """Residuals, none larger than `WINSORISED` times their robust size."""
    limit = WINSORISED * MAD_TO_SIGMA * float(np.median(np.abs(residual)))
    return np.clip(residual, -limit, limit) if limit > 0 else residual


def error_factor(
    residual: FloatArray, error: FloatArray, label_error: FloatArray, prior_stars: float = PRIOR_STARS
) -> float:
    """
    What errors are to be multiplied by for a scatter of error/sigma of 1, drawn to 1 where stars are few, or where the
    errors of their labels hide it. The scatter is between the robust one, which needs many stars, and that of all but
    wild ones.
    """

    unit = float(np.median(error)) or 1.0
    residual, error, label_error = residual / unit, error / unit, label_error / unit

    def excess(factor: float) -> float:
        ratio = residual / np.hypot(error * factor, label_error)
        usual = np.mean(np.clip(ratio, -CLIPPED_AT, CLIPPED_AT) ** 2) / CLIPPED_VARIANCE
        return robust_scatter(ratio) * math.sqrt(usual) - 1.0

    low, high = FACTORS
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    label_share = float(np.sum((error**2 / np.maximum(error**2 + label_error**2, TINY)) ** 2))
    return float(math.sqrt(low * high) ** (label_share / (label_share + prior_stars)))


__all__ = [
    "HEADS",
    "NEW_LABEL_HEADS",
    "Choice",
    "Fitted",
    "Head",
    "Kernel",
    "ask",
    "choose_heads",
    "error_factor",
    "fit_head",
    "fit_pixels",
    "make_folds",
    "weights_of_heads",
]
