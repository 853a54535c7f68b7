# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The model of a recipe: a new one of the published architecture, or a checkpoint, extended and partly frozen."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..checkpoints import load_checkpoint
from ..inference.prediction import rung_of_pixels
from ..inference.training_range import TrainingRange
from ..models import SpectraFMConfig, SpectraFMForPrediction, SpectraFMTokenizer
from ..statistics import MAD_TO_SIGMA
from .recipe import Recipe


def robust_center_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and robust standard deviation along the first axis, ignoring NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN in all rows stays NaN
        center = np.nanmedian(values, axis=0)
        return center, MAD_TO_SIGMA * np.nanmedian(np.abs(values - center), axis=0)


def prepare_model(
    recipe: Recipe, samples: Sequence[Mapping[str, Any]]
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer, TrainingRange]:
    """
    A new model of the published architecture and its tokenizer, with a standardisation measured on training stars.

    New models on evidence are made by `scripts/pretrain.py`, which also measures their directions and completion.

    Parameters
    ----------
    recipe : Recipe
    samples : sequence of mappings
        Columns of stars in the project's schema, one mapping for each instrument. The stars of a sample share one
        wavelength grid, and samples do not overlap in wavelength.

    Returns
    -------
    model, tokenizer
    training_range : TrainingRange
        Range of the labels, and of the wavelengths of each sample.

    Raises
    ------
    ValueError
        If the recipe defines a model on evidence, a label or scalar is in no sample, the spectra of a sample do not
        share a wavelength grid, or two samples overlap.
    """
    if (kind := recipe.model.get("token_embedding", "value")) != "value":
        raise ValueError(f"model: expected token_embedding 'value', or a checkpoint to start from, got {kind!r}")
    columns = _label_columns(recipe, samples)
    names = list(columns)
    label_centers, label_scales = zip(*map(robust_center_and_scale, columns.values()), strict=True)
    config = SpectraFMConfig(
        **recipe.model,
        label_names=names,
        label_units=[*recipe.units, *[""] * len(recipe.scalars)],
        label_centers=[float(center) for center in label_centers],
        label_scales=[float(scale) for scale in label_scales],
    )
    grids = sorted(map(_standardisation, samples), key=lambda grid: grid[0][0])
    for (left, *_), (right, *_) in itertools.pairwise(grids):
        if left[-1] >= right[0]:
            raise ValueError(
                "wavelength: expected instruments that do not overlap (the standardisation is one table), "
                f"got {left[-1]:g} and {right[0]:g} Angstrom"
            )
    wavelength, center, scale = (np.concatenate(parts).tolist() for parts in zip(*grids, strict=True))
    tokenizer = SpectraFMTokenizer(
        label_names=names,
        requests=recipe.labels,
        **recipe.tokenizer,
        standardize_wavelength=wavelength,
        standardize_center=center,
        standardize_scale=scale,
    )
    training_range = TrainingRange({name: _limits(column) for name, column in columns.items()}, **_instruments(samples))
    return SpectraFMForPrediction(config), tokenizer, training_range


def prepare_checkpoint(
    recipe: Recipe, samples: Sequence[Mapping[str, Any]]
) -> tuple[SpectraFMForPrediction, SpectraFMTokenizer, TrainingRange | None]:
    """
    The checkpoint of the recipe and its tokenizer, extended by new labels of the recipe.

    The centre and scale of a new label are measured on the data.

    Parameters
    ----------
    recipe : Recipe
    samples : sequence of mappings
        As in [`prepare_model`]; for a model on evidence, the spectra may have different grids.

    Returns
    -------
    model, tokenizer
    training_range : TrainingRange or None
        Range of the checkpoint, if it has one, extended to the labels of the samples. The wavelength range is that of
        the samples only, as training may degrade predictions at other wavelengths.

    Raises
    ------
    ValueError
        If there is no such checkpoint, a label is in no sample, or the recipe changes the architecture or has scalars
        for a checkpoint on evidence.
    """
    model, tokenizer = load_checkpoint(str(recipe.checkpoint))
    if recipe.scalars and tokenizer.basis is not None:
        raise ValueError(
            f"scalars: expected none with a checkpoint on evidence, whose network reads only spectra, got "
            f"{recipe.scalars} with {recipe.checkpoint}; `spectrafm finetune --scalars {' '.join(recipe.scalars)}` "
            "learns labels from spectra and scalars"
        )
    for field, settings, known in (
        ("model", recipe.model, ("dropout",)),
        ("tokenizer", recipe.tokenizer, ("requests",)),
    ):
        if set(settings) - set(known):
            raise ValueError(f"{field}: expected only {known} with a checkpoint, got {list(settings)}")
    if "dropout" in recipe.model:
        model.config.dropout = recipe.model["dropout"]
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = model.config.dropout
    training_range = TrainingRange.load(str(model.name_or_path))
    columns = _label_columns(recipe, samples)
    units = dict(zip(recipe.labels, recipe.units, strict=True))
    for name, column in columns.items():
        if name not in tokenizer.label_names:
            center, scale = robust_center_and_scale(column)
            model.add_label(name, units.get(name, ""), float(center), float(scale))
            tokenizer.add_label(name)
    if "requests" in recipe.tokenizer:
        tokenizer.requests = list(recipe.tokenizer["requests"])
    elif tokenizer.requests is not None:
        tokenizer.requests = list(dict.fromkeys([*tokenizer.requests, *recipe.labels]))
    if training_range is not None:
        limits = {name: _limits(column) for name, column in columns.items()}
        for name, (low, high) in training_range.labels.items():
            limits[name] = (min(low, limits[name][0]), max(high, limits[name][1])) if name in limits else (low, high)
        training_range = TrainingRange(limits, **_instruments(samples))
    return model, tokenizer, training_range


def rung_of(tokenizer: SpectraFMTokenizer, samples: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the rung for the spectra of all samples; None if there are several, or without a basis."""
    if tokenizer.basis is None:
        return None
    found = set()
    for sample in samples:
        power = np.ravel(sample.get("resolving_power", [np.nan]))[0]
        rung = rung_of_pixels(tokenizer.basis, sample["wavelength"][0], power)
        if rung is not None:
            found.add([each.first_interval for each in tokenizer.basis.rungs].index(rung.first_interval))
    return found.pop() if len(found) == 1 else None


def freeze(model: SpectraFMForPrediction, names: Sequence[str]) -> None:
    """
    Freeze parts of a model: `decoder`, `encoder.layers.1`, `embeddings`, `readout` or any other module.

    Raises
    ------
    ValueError
        If there is no such module, or no weights are left to train.
    """
    modules = {name.removeprefix("model."): module for name, module in model.named_modules() if name}
    for name in names:
        if name.removeprefix("model.") not in modules:
            parts = [part for part in modules if part.count(".") == 0 or part.split(".")[-2] == "layers"]
            raise ValueError(f"freeze: expected modules of the model, such as {parts}, got {name!r}")
        modules[name.removeprefix("model.")].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: expected some weights left to train, got {list(names)}")


def _instruments(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Range and spacing of the wavelengths of each sample; a pair if all samples have the same."""
    found = {}
    for sample in samples:
        spectra = zip(sample["wavelength"][:1000], sample["mask"][:1000], strict=True)
        grids = [np.sort(np.asarray(grid, dtype=np.float64)[~np.asarray(mask)]) for grid, mask in spectra]
        grids = [grid for grid in grids if len(grid) > 1]
        # Without gaps. Masks may leave only the narrowest or the widest pixels of a spectrum.
        steps = [step[step < 2 * np.median(step)] for step in map(np.diff, grids)]
        found[_limits(np.concatenate(grids))] = _limits(np.concatenate(steps))
    one = len(found) == 1
    names = {"wavelength": tuple(found), "wavelength_step": tuple(found.values())}
    return {name: limits[0] if one else limits for name, limits in names.items()}


def _limits(values: np.ndarray) -> tuple[float, float]:
    return float(np.nanmin(values)), float(np.nanmax(values))


def _label_columns(recipe: Recipe, samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Values of the labels and scalars of the recipe, over all samples."""
    if both := [name for name in recipe.scalars if name in recipe.labels]:
        raise ValueError(f"scalars: expected columns that are not also labels of the recipe, got {both}")
    columns = {}
    for field, names in (("labels", recipe.labels), ("scalars", recipe.scalars)):
        for name in names:
            parts = [np.asarray(sample[name], dtype=np.float64) for sample in samples if name in sample]
            if not parts:
                known = sorted({name for sample in samples for name in sample})
                raise ValueError(f"{field}: expected columns of the data ({known}), got {name!r}")
            columns[name] = np.concatenate(parts)
    return columns


def _standardisation(sample: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wavelengths, and median and robust scatter of the flux, (pixels,) each, for the stars of one instrument."""
    wavelength, flux, mask = (np.asarray(sample[name]) for name in ("wavelength", "flux", "mask"))
    if wavelength.dtype == object or np.any(wavelength != wavelength[0]):
        raise ValueError(
            "wavelength: expected one grid for all stars of an instrument (the standardisation is a table on it)"
        )
    center, scale = robust_center_and_scale(np.where(mask, np.nan, flux).astype(np.float64))
    known = np.isfinite(center) & (scale > 0)
    if not known.any():
        raise ValueError("mask: expected good pixels in some of the stars, got none")
    grid = wavelength[0].astype(np.float64)
    return grid, *(np.interp(grid, grid[known], values[known]) for values in (center, scale))
