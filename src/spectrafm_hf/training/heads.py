# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Labels of some stars from what a frozen model says of them: which of a few Gaussian processes, and how good it is.

A head is the answer of the model as it is, with another zero point, with a linear correction, or with a Gaussian
process on top, which has more and more inputs. Its few hyperparameters are those of the greatest likelihood, with the
errors of the labels as noise. Heads are compared by cross-validation on all stars, and errors calibrated on what it
finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..inference.states import States
from ..models import SpectraFMConfig
from ..models.correction_spectrafm import SpectraFMCorrection, covariance
from ..statistics import MAD_TO_SIGMA, robust_scatter


FloatArray = NDArray[np.floating[Any]]
#: Stars whose likelihood finds the hyperparameters; that a Gaussian process goes through; that its variance is made of.
LIKELIHOOD_STARS, MOST_STARS, VARIANCE_STARS = 300, 3000, 500
ITERATIONS, ITERATIONS_AGAIN = 60, 15  # of L-BFGS: from the usual start, and from the optimum for all stars
CONSTANT = 10.0  # variance of the unknown zero point, in units of the variance of the label
LEAST_NOISE = 1e-4  # of the variance of the label
#: A head with more inputs has to be better by this many standard errors of the difference.
PARSIMONY = 0.5
WINSORISED = 4.0  # times the robust scatter: what is further off counts as that far, in comparisons
PRIOR_STARS = 20.0  # that a factor of 1 for the errors counts as much as
LEAST_SCALE = 1e-6  # of an input among the stars: what differs by less is the same for all
MARGIN = 1.0  # of the range of each input among the stars: beyond, it counts as at that end


@dataclass(frozen=True)
class Head:
    """
    One way to a label.

    Attributes
    ----------
    name : str
        In words.
    groups : dict of str to str
        Inputs of the Gaussian process (of `CORRECTION_GROUPS`), and its parts: `"linear"` or `"both"`.
    adds : bool
        Whether it is added to the answer of the model for the label.
    constant : bool
        Whether the zero point is free.
    """

    name: str
    groups: Mapping[str, str]
    adds: bool = False
    constant: bool = True


_INPUTS = (
    ("a Gaussian process on the answers", {"answers": "both"}),
    ("a Gaussian process on answers and continuum", {"answers": "both", "shape": "both"}),
    ("a Gaussian process on answers and coefficients", {"answers": "both", "shape": "both", "coefficients": "both"}),
)
#: From the simplest on. The first four go on from an answer of the model.
HEADS = (
    Head("the model as it is", {}, adds=True, constant=False),
    Head("another zero point", {}, adds=True),
    Head("a linear correction", {"answers": "linear"}, adds=True),
    *(Head(f"the answer and {name}", groups, adds=True) for name, groups in _INPUTS),
)
NEW_LABEL_HEADS = (
    Head("a line in the answers", {"answers": "linear"}),
    *(Head(name, groups) for name, groups in _INPUTS),
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

    def predict(self, config: SpectraFMConfig, states: States) -> tuple[FloatArray, FloatArray]:
        """Values and one-sigma errors, each of shape (stars,), in physical units."""
        return ask(self.correction(config), states)


def ask(correction: SpectraFMCorrection, states: States) -> tuple[FloatArray, FloatArray]:
    """Values and one-sigma errors of a correction for stars, each of shape (stars,), in physical units."""
    intervals = torch.arange(states.coefficients.shape[1]) + correction.first
    columns = [states.inputs.index(name) for name in correction.inputs]
    values, errors = (torch.from_numpy(part[:, columns]) for part in (states.values, states.errors))
    answer = torch.zeros(len(states), dtype=torch.float64)
    if correction.adds:
        answer = torch.from_numpy(states.values[:, states.inputs.index(correction.label)])
    evidence = (torch.from_numpy(part) for part in (states.coefficients, states.reliability))
    value, error = correction(values, errors, answer, *evidence, intervals)
    return value.double().numpy(), error.double().numpy()


# ------------------------------------------------------------------------------------------------------- the likelihood


class Kernel:
    """Hyperparameters of a head as one vector of logarithms, with their priors and what they stand for."""

    def __init__(self, head: Head, sizes: Sequence[int]):
        self.sizes, self.constant = list(sizes), CONSTANT if head.constant else 0.0
        # Each answer counts by itself, the other inputs all alike.
        self.groups = [
            (size, size if group == "answers" else 1, kind)
            for (group, kind), size in zip(head.groups.items(), sizes, strict=True)
        ]
        # Start, middle and width of the prior: of the noise and its growth, then group after group.
        rows = [(math.log(0.1), math.log(0.1), 2.0), (1.0, 1.0, 1.0)]
        for _, number, kind in self.groups:
            rows += [(-0.7, -1.0, 2.0)] * number
            if kind == "both":
                rows += [(-0.7, -1.0, 2.0)] + [(0.9 if number > 1 else 0.4, 0.7, 1.0)] * number
        self.start, self.middle, self.width = torch.tensor(rows, dtype=torch.float64).T.contiguous()

    def unpack(self, parameters: torch.Tensor) -> dict[str, Any]:
        """Noise, its growth, and linear, length (features,) and amplitude (groups,) for [`covariance`]."""
        numbers = parameters.exp()
        linear, length, amplitude, place = [numbers[:0]], [numbers[:0]], [numbers[:0]], 2
        for size, number, kind in self.groups:
            linear.append(numbers[place : place + number].expand(size))
            place += number
            if kind == "both":
                amplitude.append(numbers[place : place + 1])
                length.append(numbers[place + 1 : place + 1 + number].expand(size))
                place += 1 + number
            else:
                amplitude.append(torch.zeros(1, dtype=numbers.dtype))
                length.append(torch.ones(size, dtype=numbers.dtype))
        joined = {"linear": torch.cat(linear), "length": torch.cat(length), "amplitude": torch.cat(amplitude)}
        return {"noise": numbers[0] + LEAST_NOISE, "growth": parameters[1], **joined}

    def matrix(self, parameters, features, doubt, label_variance) -> torch.Tensor:
        """Covariance of the labels of stars, with noise and label errors, (N, N)."""
        own = self.unpack(parameters)
        matrix = covariance(
            features, features, self.constant, own["linear"], own["length"], own["amplitude"], self.sizes
        )
        return matrix + torch.diag(own["noise"] * torch.exp(own["growth"] * doubt) + label_variance)

    def optimum(self, start, iterations, features, doubt, label_variance, target) -> torch.Tensor:
        """Hyperparameters of the greatest posterior probability, from `start` on."""
        parameters = start.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-4
        )

        def closure():
            optimizer.zero_grad()
            factor, failed = torch.linalg.cholesky_ex(self.matrix(parameters, features, doubt, label_variance))
            if failed:
                return torch.tensor(math.inf)
            solved = torch.cholesky_solve(target[:, None], factor)[:, 0]
            loss = 0.5 * target @ solved + factor.diagonal().log().sum()
            loss = loss + 0.5 * (((parameters - self.middle) / self.width) ** 2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = parameters.detach()
        return found if bool(found.isfinite().all()) else start


def fit_head(
    head: Head,
    config: SpectraFMConfig,
    rung: int,
    label: str,
    states: States,
    target: FloatArray,
    target_error: FloatArray,
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
        "adds": head.adds, "stars": n_stars, "known": n_known, "range": [0.0, 0.0],
    }  # fmt: skip
    module = SpectraFMCorrection(config, settings).double()
    intervals = torch.arange(states.coefficients.shape[1]) + module.first
    values, coefficients, reliability = (
        torch.from_numpy(part) for part in (states.values, states.coefficients, states.reliability)
    )
    features = module.features(values, coefficients, reliability, intervals)
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
    kernel = Kernel(head, module.sizes)
    some = slice(0, LIKELIHOOD_STARS)
    found = kernel.start if start is None else start
    if iterations:
        found = kernel.optimum(found, iterations, features[some], doubt[some], label_variance[some], wanted[some])
    matrix = kernel.matrix(found, features, doubt, label_variance)
    factor = torch.linalg.cholesky(matrix)
    own = kernel.unpack(found)
    identity = torch.eye(n_known, dtype=torch.float64)
    tensors |= {name: own[name] for name in ("linear", "length", "amplitude")}
    tensors |= {
        "constant": torch.tensor(kernel.constant),
        "noise": torch.stack([own["noise"], own["growth"], usual, doubt.min(), doubt.max()]),
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
        if group == "shape":  # which few stars differ in by much
            scale = MAD_TO_SIGMA * (own - own.median(dim=0).values).abs().median(dim=0).values * own.shape[1] ** 0.5
        elif group == "coefficients":
            scale = (spread**2).sum().sqrt().expand(len(spread))
        parts.append(torch.where(scale > LEAST_SCALE, scale, 1.0))
    return torch.cat(parts) if parts else features.new_zeros(0)


# --------------------------------------------------------------------------------------------------- cross-validation


@dataclass(frozen=True)
class Choice:
    """
    The head that was chosen for a label.

    Attributes
    ----------
    fitted : Fitted
        To all stars, with errors that are calibrated.
    values, errors : array of shape (stars,)
        What it says of each star when that star's fold was left out, calibrated.
    tried : dict of str to float
        Root mean square of the deviations in cross-validation, wild ones winsorised, of each head by its name.
    """

    fitted: Fitted
    values: FloatArray
    errors: FloatArray
    tried: dict[str, float]


def make_folds(groups: Sequence[str], n_folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each spectrum; those of a star are in one."""
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    order = np.random.default_rng([seed, 5]).permutation(len(names))
    return (order % n_folds)[numbers]


def choose_head(
    config: SpectraFMConfig,
    rung: int,
    label: str,
    states: States,
    target: FloatArray,
    target_error: FloatArray,
    folds: NDArray[np.int64],
) -> Choice:
    """
    Compare the heads for a label by cross-validation, and fit the simplest of the best.

    Parameters
    ----------
    config, rung, label, states, target, target_error
        As in [`fit_head`]; beyond `MOST_STARS`, the first ones count.
    folds : array of int, shape (stars,)
    """
    few = slice(0, MOST_STARS)
    states, target, target_error, folds = states[few], target[few], target_error[few], folds[few]
    heads = HEADS if label in states.inputs else NEW_LABEL_HEADS
    found = []
    for head in heads:
        whole = fit_head(head, config, rung, label, states, target, target_error)
        values, errors = np.empty_like(target), np.empty_like(target)
        for fold in np.unique(folds):
            kept, left = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            # Of many stars, a few more or fewer do not change the hyperparameters.
            again = ITERATIONS_AGAIN if len(target) <= LIKELIHOOD_STARS else 0
            part = fit_head(
                head, config, rung, label, states[kept], target[kept], target_error[kept], whole.parameters, again
            )
            values[left], errors[left] = part.predict(config, states[left])
        found.append((whole, values, errors))
    squares = [winsorised(values - target) ** 2 for _, values, _ in found]
    best = int(np.argmin([square.mean() for square in squares]))
    n_stars = len(target)
    chosen = best
    for number in range(best):
        difference = squares[number] - squares[best]
        if difference.mean() <= PARSIMONY * difference.std() / math.sqrt(n_stars):
            chosen = number
            break
    whole, values, errors = found[chosen]
    factor = error_factor(values - target, errors, target_error)
    whole.tensors["target"][2] = factor
    tried = {head.name: float(np.sqrt(square.mean())) for head, square in zip(heads, squares, strict=True)}
    return Choice(whole, values, errors * factor, tried)


def winsorised(residual: FloatArray) -> FloatArray:
    """Residuals, none larger than `WINSORISED` times their robust size."""
    limit = WINSORISED * MAD_TO_SIGMA * float(np.median(np.abs(residual)))
    return np.clip(residual, -limit, limit) if limit > 0 else residual


def error_factor(
    residual: FloatArray, error: FloatArray, label_error: FloatArray, prior_stars: float = PRIOR_STARS
) -> float:
    """
    What errors are to be multiplied by for a robust scatter of error/sigma of 1, drawn to 1 where stars are few, or
    where the errors of their labels hide it.
    """

    def excess(factor: float) -> float:
        return robust_scatter(residual / np.hypot(error * factor, label_error)) - 1.0

    low, high = 0.05, 20.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    told = float(np.sum((error**2 / np.maximum(error**2 + label_error**2, 1e-30)) ** 2))
    return float(math.sqrt(low * high) ** (told / (told + prior_stars)))


__all__ = [
    "HEADS",
    "NEW_LABEL_HEADS",
    "Choice",
    "Fitted",
    "Head",
    "Kernel",
    "ask",
    "choose_head",
    "error_factor",
    "fit_head",
    "make_folds",
]
