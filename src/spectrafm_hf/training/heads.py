# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Labels of stars from the states of a frozen model, from their pixels and from scalars: Gaussian processes.

A head is the prediction of the model: unchanged, with another zero point, with a linear correction, or with a
Gaussian process added; or a Gaussian process alone. Its hyperparameters maximise the likelihood, with the errors of
the labels as noise; outlying labels have less weight. `choices` weighs the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..inference.states import States
from ..models import SpectraFMConfig
from ..models.configuration_spectrafm import PIXEL_GROUPS
from ..models.correction_spectrafm import SpectraFMCorrection
from ..statistics import MAD_TO_SIGMA
from .components import Components
from .kernels import LEAST_NOISE, Head, Kernel


FloatArray = NDArray[np.floating[Any]]
#: Maximum number of stars for the hyperparameters, for the mean of a Gaussian process, and for its variance.
LIKELIHOOD_STARS, MOST_STARS, VARIANCE_STARS = 300, 3000, 500
ITERATIONS, ITERATIONS_AGAIN = 60, 15  # of L-BFGS: from the usual start, and from the optimum for all stars
REWEIGHTED = 2
LEAST_SCALE = 1e-6  # of an input among the stars: one with a smaller spread is constant
LEAST_SPREAD = 0.1  # of the variance of a scalar, where its errors would explain all of it
MARGIN = 1.0  # of the range of each input among the stars: values further outside are clipped


_ON_ANSWERS = {"answers": "both"}
_ON_EVIDENCE = {"answers": "both", "shape": "both", "coefficients": "both"}
_ON_PIXELS = {"pixels": "both"}
#: Heads that do not use the prediction of the model for the label.
NEW_LABEL_HEADS = (
    Head("on the answers", _ON_ANSWERS),
    Head("on answers and coefficients", _ON_EVIDENCE),
    Head("on pixels", _ON_PIXELS),
    Head("on scaled pixels", {"scaled": "both"}),
    Head("on answers and pixels", {"answers": "both", "pixels": "both"}),
    Head("on coefficients and pixels", {"answers": "linear", "coefficients": "both", "pixels": "both"}),
)
ZERO_POINT = Head("another zero point", {}, adds=True)
#: All heads for a label that the model predicts.
HEADS = (
    Head("the model as it is", {}, adds=True, constant=False),
    ZERO_POINT,
    Head("a linear correction", {"answers": "linear"}, adds=True),
    Head("a correction on the answers", _ON_ANSWERS, adds=True),
    Head("a correction on answers and coefficients", _ON_EVIDENCE, adds=True),
    Head("a correction on pixels", _ON_PIXELS, adds=True),
    *NEW_LABEL_HEADS,
)
#: Additional heads with scalars.
SCALAR_HEADS = (
    Head("a correction on answers and scalars", {"known": "both"}, adds=True),
    Head("a correction on pixels and scalars", {"pixels": "both", "scalars": "both"}, adds=True),
    Head("on answers and scalars", {"known": "both"}),
    Head("on answers, pixels and scalars", {"answers": "both", "pixels": "both", "scalars": "both"}),
    Head("on coefficients, pixels and scalars", {"coefficients": "both", "pixels": "both", "scalars": "both"}),
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
    scalars = scalars_of(states, correction.scalars)
    value, error = correction(values, errors, answer, *evidence, intervals, components, scalars)
    return value.double().numpy(), error.double().numpy()


def scalars_of(states: States, names: Sequence[str]) -> torch.Tensor | None:
    """Values and errors of some scalars, (stars, scalars, 2); None for none."""
    if not names or states.scalars is None:
        return None
    return torch.from_numpy(states.scalars[:, [states.scalar_names.index(name) for name in names]]).double()


def _population(scalars: torch.Tensor) -> torch.Tensor:
    """
    (stars, scalars, 2) -> (scalars, 5), `population` of a [`SpectraFMCorrection`]: median, spread, usual error, and the
    lowest and highest valid value.
    """
    rows = []
    for column in scalars.transpose(0, 1).numpy():
        value, error = column[np.isfinite(column[:, 0])].T
        known = error[np.isfinite(error) & (error >= 0)]
        usual = float(np.median(known)) if len(known) else 0.0
        error = np.where(np.isfinite(error) & (error >= 0), error, usual)
        variance = float(np.var(value))
        # Intrinsic spread: the variance minus that of the errors.
        spread = np.sqrt(max(variance - float(np.mean(error**2)), LEAST_SPREAD * variance)) or 1.0
        margin = MARGIN * (value.max() - value.min())
        rows.append([np.median(value), spread, usual, value.min() - margin, value.max() + margin])
    return torch.tensor(np.array(rows))


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
    scalars: Sequence[str] = (),
) -> Fitted:
    """
    Fit one head to stars with a label.

    Parameters
    ----------
    head : Head
    config : SpectraFMConfig
        Of the frozen model.
    rung : int
        The rung of the stars.
    label : str
    states : States
        Finite.
    target, target_error : array of shape (stars,)
        Label and its error (0 where unknown).
    components : dict of torch.Tensor of shape (stars, components), optional
        Output of [`SpectraFMPixels`] for the stars, for heads on pixels.
    pixels : int
        Its index in `config.pixel_sets`.
    start : torch.Tensor, optional
        Initial hyperparameters.
    iterations : int
        0 keeps the initial hyperparameters.
    scalars : sequence of str
        The scalars of the states that are inputs, for heads on scalars.
    """
    if head.adds:
        target = target - states.values[:, states.inputs.index(label)]
    n_stars, n_known = len(target), min(len(target), VARIANCE_STARS)
    settings = {
        "label": label, "new": not head.adds, "rung": rung, "inputs": list(states.inputs), "groups": list(head.groups),
        "adds": head.adds, "stars": n_stars, "known": n_known, "range": [0.0, 0.0], "weight": 1.0, "beyond": 1.0,
        "pixels": pixels, **({"scalars": list(scalars)} if scalars else {}),
    }  # fmt: skip
    module = SpectraFMCorrection(config, settings).double()
    intervals = torch.arange(states.coefficients.shape[1]) + module.first
    values, coefficients, reliability = (
        torch.from_numpy(part) for part in (states.values, states.coefficients, states.reliability)
    )
    tensors, estimate, unknown = {}, None, None
    if (own_scalars := scalars_of(states, scalars)) is not None:
        tensors["population"] = _population(own_scalars)
        module.population.copy_(tensors["population"])
        estimate, variance, _ = module.estimated(own_scalars)
    features = module.features(values, coefficients, reliability, intervals, components, estimate)
    spread = (features.amax(dim=0) - features.amin(dim=0)) * MARGIN
    tensors |= {
        "center": features.median(dim=0).values,
        "scale": _scales(features, list(head.groups), module.sizes),
        "low": features.amin(dim=0) - spread,
        "high": features.amax(dim=0) + spread,
        "noise": torch.zeros(5, dtype=torch.float64),
    }
    for name, tensor in tensors.items():
        getattr(module, name).copy_(tensor)
    features = module.standardise(features)
    if estimate is not None and bool(variance.any()):
        unknown = module.unknown(variance)
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
    kernel = Kernel(head, module.sizes, noise, unknown)
    some, prepared = slice(0, LIKELIHOOD_STARS), kernel.prepared(features)
    found, stated = kernel.start if start is None else start, label_variance
    for number in range(1 + REWEIGHTED):
        if number:
            label_variance = kernel.reweighted(found, prepared, doubt, stated, label_variance, wanted)
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
        # The first rows of the factor are the factor of the first stars.
        "factor": torch.linalg.solve_triangular(factor[:n_known, :n_known], identity, upper=False),
        "target": torch.tensor([middle, unit, 1.0], dtype=torch.float64),
    }
    return Fitted(head, settings, tensors, found)


def _scales(features: torch.Tensor, groups: Sequence[str], sizes: Sequence[int]) -> torch.Tensor:
    """Scale of each feature: its own spread; for all coefficients their joint spread; 1 for components of pixels."""
    parts = []
    for group, own in zip(groups, features.split(list(sizes), dim=1), strict=True):
        scale = spread = own.std(dim=0)
        if group in PIXEL_GROUPS:  # already in units of the first component
            scale = torch.ones_like(scale)
        elif group == "shape":  # robust: a few stars are outliers
            scale = MAD_TO_SIGMA * (own - own.median(dim=0).values).abs().median(dim=0).values * own.shape[1] ** 0.5
        elif group == "coefficients":
            scale = (spread**2).sum().sqrt().expand(len(spread))
        parts.append(torch.where(scale > LEAST_SCALE, scale, 1.0))
    return torch.cat(parts) if parts else features.new_zeros(0)


__all__ = ["HEADS", "NEW_LABEL_HEADS", "SCALAR_HEADS", "Fitted", "Head", "Kernel", "ask", "fit_head"]
