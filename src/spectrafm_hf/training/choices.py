# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""
Selection of heads for a label: cross-validation on all stars determines their weights, calibrates the errors and
selects scalars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..inference.states import States
from ..models import SpectraFMConfig
from ..models.configuration_spectrafm import PIXEL_GROUPS
from ..models.correction_spectrafm import SpectraFMPixels, mixed
from .components import Components
from .heads import (
    HEADS,
    ITERATIONS_AGAIN,
    LIKELIHOOD_STARS,
    MOST_STARS,
    NEW_LABEL_HEADS,
    SCALAR_HEADS,
    ZERO_POINT,
    Fitted,
    Head,
    fit_head,
    scalars_of,
)
from .weights import error_factor, weights_of_heads, winsorised


FloatArray = NDArray[np.floating[Any]]
ENDS = 5  # a fifth of the stars at either end of the range of a label
SURE = 2.0  # standard errors by which a loss is smaller, for scalars and for heads beyond the range
LEAST_KNOWN = 20  # stars with a known value of a scalar


@dataclass(frozen=True)
class Choice:
    """
    The selected heads of a label.

    Attributes
    ----------
    fitted : list of Fitted
        Fitted to all stars, with calibrated errors, and their `weight` in the settings; sorted by weight, descending.
    values, errors : array of shape (stars,)
        Calibrated predictions for each star from a fit without the star's fold.
    tried : dict of str to float
        RMSE of each head in cross-validation, with outliers winsorised, by name.
    scalars : list of str
        Scalars that improve the prediction and are used as inputs.
    note : str
        Results of cross-validation for scalars; empty without scalars.
    """

    fitted: list[Fitted]
    values: FloatArray
    errors: FloatArray
    tried: dict[str, float]
    scalars: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def weights(self) -> dict[str, float]:
        """Non-zero weights by the name of the head."""
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
        blind = None
        if own := next((part for part in self.fitted if part.settings.get("scalars")), None):
            scalars = scalars_of(states, own.settings["scalars"])
            assert scalars is not None  # the head was fitted to them
            blind = ~own.correction(config).estimated(scalars)[2].all(dim=1).numpy()
        return _mixed(values, errors, [part.settings for part in self.fitted], blind)


def _mixed(
    values: Any, errors: Any, entries: Sequence[Mapping[str, Any]], blind: NDArray[np.bool_] | None = None
) -> tuple[FloatArray, FloatArray]:
    """[`mixed`] for NumPy arrays."""
    unknown = None if blind is None else torch.from_numpy(blind)
    value, error = mixed(list(map(torch.from_numpy, values)), list(map(torch.from_numpy, errors)), entries, unknown)
    return value.numpy(), error.numpy()


def make_folds(groups: Sequence[str], n_folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each spectrum; all spectra of a star are in the same fold."""
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
    Compare the heads for a label by cross-validation, and weight them. A scalar of the states is an input if the loss
    without it is larger by `SURE` standard errors.

    Parameters
    ----------
    config, rung, label, states, target, target_error
        As in [`fit_head`]; only the first `MOST_STARS` stars are used.
    folds : array of int, shape (stars,)
    pixels : SpectraFMPixels, optional
        The last of `config.pixel_sets`; without it, no head uses pixels.
    """
    comparison = _Comparison(config, rung, label, states, target, target_error, folds, pixels)
    plain = [comparison.cross_validated(head) for head in comparison.heads()]
    choice = comparison.choice(plain)
    return _with_scalars(comparison, plain, choice) if states.scalar_names else choice


@dataclass(frozen=True)
class _Compared:
    """A head fitted to all stars, and its predictions for each star from a fit without the star's fold, (stars,)."""

    part: Fitted
    value: FloatArray
    error: FloatArray


class _Comparison:
    """The arguments of `choose_heads`."""

    def __init__(self, config, rung, label, states, target, target_error, folds, pixels):
        few = slice(0, MOST_STARS)
        self.config, self.rung, self.label = config, rung, label
        self.states, self.folds = states[few], folds[few]
        self.target, self.target_error = (np.asarray(column, np.float64)[few] for column in (target, target_error))
        self.components = None if pixels is None else pixels(torch.from_numpy(self.states.pixels))
        # With many stars, leaving out a fold hardly changes the hyperparameters.
        self.again = ITERATIONS_AGAIN if len(self.target) <= LIKELIHOOD_STARS else 0

    def heads(self, scalars: bool = False) -> list[Head]:
        """Heads for the label, or heads with scalars."""
        known = self.label in self.states.inputs
        if scalars:
            heads: Sequence[Head] = [head for head in SCALAR_HEADS if known or not head.adds]
        else:
            heads = HEADS if known else NEW_LABEL_HEADS
        return [head for head in heads if self.components is not None or not set(head.groups) & set(PIXEL_GROUPS)]

    def fit(self, head: Head, rows: NDArray[Any] | slice, scalars: Sequence[str], **start: Any) -> Fitted:
        number = len(self.config.pixel_sets) - 1 if set(head.groups) & set(PIXEL_GROUPS) else -1
        stars = self.states[rows], self.target[rows], self.target_error[rows], self._components(rows)
        return fit_head(head, self.config, self.rung, self.label, *stars, number, scalars=scalars, **start)

    def _components(self, rows: NDArray[Any] | slice) -> Components | None:
        return None if self.components is None else {name: part[rows] for name, part in self.components.items()}

    def without(self, part: Fitted, kept: NDArray[Any], left: NDArray[Any]) -> tuple[FloatArray, FloatArray]:
        """Predictions for the stars `left` of a head that is fitted to the stars `kept`."""
        scalars = part.settings.get("scalars", ())
        found = self.fit(part.head, kept, scalars, start=part.parameters, iterations=self.again)
        return found.predict(self.config, self.states[left], self._components(left))

    def cross_validated(self, head: Head, scalars: Sequence[str] = ()) -> _Compared:
        whole = self.fit(head, slice(None), scalars)
        value, error = np.empty_like(self.target), np.empty_like(self.target)
        for fold in np.unique(self.folds):
            left = np.flatnonzero(self.folds == fold)
            value[left], error[left] = self.without(whole, np.flatnonzero(self.folds != fold), left)
        return _Compared(whole, value, error)

    def residuals(self, compared: Sequence[_Compared]) -> FloatArray:
        """Winsorised residuals of each head, (heads, stars)."""
        return np.stack([winsorised(each.value - self.target) for each in compared])

    def blind(self, scalars: Sequence[str]) -> NDArray[np.bool_]:
        """Stars with an unknown scalar."""
        found = scalars_of(self.states, scalars)
        return np.zeros(len(self.target), bool) if found is None else ~found[..., 0].isfinite().all(dim=1).numpy()

    def choice(
        self, compared: Sequence[_Compared], scalars: Sequence[str] = (), blind_choice: Choice | None = None
    ) -> Choice:
        """
        The weighted mean of some heads, with calibrated errors. With scalars, `blind_choice` is the choice for stars
        with an unknown scalar.
        """
        residuals, blind = self.residuals(compared), self.blind(scalars)
        weights = weights_of_heads(residuals[:, ~blind])
        heads = [each.part.head for each in compared]
        beyond = self._weights_beyond(compared, weights) if ZERO_POINT in heads else weights
        without = np.zeros(len(heads))
        if blind_choice is not None:
            without = np.array([blind_choice.weights.get(head.name, 0.0) for head in heads])
        limits = [float(self.target.min()), float(self.target.max())]
        order = [int(i) for i in np.argsort(-weights, kind="stable") if max(weights[i], beyond[i], without[i]) > 0]
        chosen = []
        for i in order:
            part = compared[i].part
            own = {"weight": float(weights[i]), "beyond": float(beyond[i]), "range": limits}
            chosen.append(replace(part, settings={**part.settings, **own}, tensors=dict(part.tensors)))
        entries = [part.settings for part in chosen]
        values, errors = ([getattr(compared[i], name) for i in order] for name in ("value", "error"))
        answer, _ = _mixed(values, errors, entries)
        # The factor does not scale the differences between heads, which are known.
        share, seen = weights[order, None], ~blind
        own_error = np.sqrt((share * np.stack(errors) ** 2).sum(axis=0))
        differ = np.sqrt((share * (np.stack(values) - answer) ** 2).sum(axis=0))
        label_error = np.hypot(self.target_error, differ)
        factor = error_factor((answer - self.target)[seen], own_error[seen], label_error[seen])
        for i, part in zip(order, chosen, strict=True):
            part.tensors["target"] = torch.cat([part.tensors["target"][:2], torch.tensor([factor]).double()])
            if blind_choice is not None:
                ratio = float(blind_choice.fitted[0].tensors["target"][2]) / factor
                part.settings["blind"] = [float(without[i]), ratio]
        answer, sigma = _mixed(values, [error * factor for error in errors], entries, blind if scalars else None)
        sizes = np.sqrt((residuals[:, ~blind] ** 2).mean(axis=1))
        tried = {head.name: float(size) for head, size in zip(heads, sizes, strict=True)}
        return Choice(chosen, answer, sigma, tried, list(scalars))

    def _weights_beyond(self, compared: Sequence[_Compared], weights: FloatArray) -> FloatArray:
        """
        Weights beyond the range of the labels, where fitted heads regress to the training stars. The model with a new
        zero point is used there, unless the heads are clearly better for the stars with the lowest and highest labels,
        with these stars left out of the fit.
        """
        order = np.argsort(self.target, kind="stable")
        size = max(len(self.target) // ENDS, 1)
        zero_point = next(each.part for each in compared if each.part.head is ZERO_POINT)
        by_model, by_heads = [], []
        for left in (order[:size], order[-size:]):
            kept = np.setdiff1d(order, left)
            found = {i: self.without(compared[i].part, kept, left)[0] for i in np.flatnonzero(weights).tolist()}
            by_heads.append(sum(weights[i] * value for i, value in found.items()) - self.target[left])
            by_model.append(self.without(zero_point, kept, left)[0] - self.target[left])
        model, learnt = (np.concatenate(parts) ** 2 for parts in (by_model, by_heads))
        if _is_better(learnt, model):
            return weights
        return np.array([float(each.part.head is ZERO_POINT) for each in compared])


# ------------------------------------------------------------------------------------------------------------- scalars


@dataclass(frozen=True)
class _Tried:
    """Heads with some scalars, and the squared residuals of the mean of all heads, (stars,)."""

    scalars: list[str]
    heads: list[_Compared]
    loss: FloatArray


def _with_scalars(comparison: _Comparison, plain: Sequence[_Compared], choice: Choice) -> Choice:
    """The choice with useful scalars: backward elimination of those that do not reduce the loss significantly."""
    states = comparison.states
    known = dict(zip(states.scalar_names, np.isfinite(states.scalars[..., 0]).sum(axis=0), strict=True))
    rare = [name for name, number in known.items() if number < LEAST_KNOWN]
    plain_residuals = comparison.residuals(plain)
    plain_residual = weights_of_heads(plain_residuals) @ plain_residuals

    def tried(names: list[str]) -> _Tried:
        heads = [comparison.cross_validated(head, names) for head in comparison.heads(scalars=True)]
        residuals, blind = comparison.residuals([*plain, *heads]), comparison.blind(names)
        weights = weights_of_heads(residuals[:, ~blind])
        return _Tried(names, heads, np.where(blind, plain_residual, weights @ residuals) ** 2)

    best = _Tried([], [], plain_residual**2)
    left = [name for name in known if name not in rare]
    full = tried(left) if left else best
    while full.scalars:
        subsets = [[other for other in full.scalars if other != name] for name in full.scalars]
        fewer = [tried(names) if names else best for names in subsets]
        least = min(fewer, key=lambda each: float(each.loss.mean()))
        if _is_better(full.loss, least.loss):
            break
        full = least
    rmse, before = (float(np.sqrt(each.mean())) for each in (full.loss, best.loss))
    dropped = [name for name in left if name not in full.scalars]
    notes = [f"{', '.join(full.scalars)} used: RMSE {rmse:.4g}, {before:.4g} without"] if full.scalars else []
    notes += [f"{', '.join(dropped)} not used: no improvement"] if dropped else []
    notes += [f"{', '.join(rare)} known for fewer than {LEAST_KNOWN} spectra"] if rare else []
    if full.scalars:
        choice = comparison.choice([*plain, *full.heads], full.scalars, choice)
    return replace(choice, note="; ".join(notes))


def _is_better(loss: FloatArray, other: FloatArray) -> bool:
    """Whether the mean loss is significantly smaller."""
    gain = other - loss
    return bool(gain.mean() > SURE * gain.std(ddof=1) / np.sqrt(len(gain)))


__all__ = ["Choice", "choose_heads", "make_folds"]
