# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""States of a frozen model on evidence: the inputs of heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..models import SpectraFMForPrediction, SpectraFMTokenizer
from ..models.flags_spectrafm import QUALITY
from .prediction import batches_of, schema_tokenizer, tokenize_rows


FloatArray = NDArray[np.floating[Any]]
MOST_PIXELS = 16_384


@dataclass(frozen=True)
class States:
    """
    States of the frozen model for stars whose spectra belong to one rung.

    Attributes
    ----------
    inputs : list of str
        Labels that it predicts.
    values, errors : array of shape (stars, inputs)
        In physical units.
    coefficients, reliability : array of shape (stars, intervals, coefficients)
        For all intervals of the rung; 0 without pixels.
    pixels : array of shape (stars, pixels)
        Fluxes over their medians, NaN where unknown.
    wavelength : array of shape (pixels,)
        Angstrom, vacuum, rest frame.
    scalar_names : list of str
        Known scalars of the stars, such as parallaxes.
    scalars : array of shape (stars, scalars, 2)
        These and their errors, NaN where unknown.
    """

    inputs: list[str]
    values: FloatArray
    errors: FloatArray
    coefficients: FloatArray
    reliability: FloatArray
    pixels: FloatArray
    wavelength: FloatArray
    scalar_names: list[str] = field(default_factory=list)
    scalars: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: NDArray[Any] | slice) -> States:
        parts = (self.values, self.errors, self.coefficients, self.reliability, self.pixels)
        values, errors, coefficients, reliability, pixels = (part[rows] for part in parts)
        scalars = None if self.scalars is None else self.scalars[rows]
        names = self.scalar_names
        return States(self.inputs, values, errors, coefficients, reliability, pixels, self.wavelength, names, scalars)


def frozen_states(
    model: SpectraFMForPrediction, tokenizer: SpectraFMTokenizer, stars: Dataset
) -> tuple[int, States, NDArray[np.int64], dict[int, str]]:
    """
    States of a model, without its corrections, for stars of the most frequent rung.

    Parameters
    ----------
    model : SpectraFMForPrediction
        On evidence. Its corrections are dropped.
    tokenizer : SpectraFMTokenizer
    stars : Dataset
        Rows of the schema.

    Returns
    -------
    rung : int
        The rung of most spectra.
    states : States
        States of the stars that can be used.
    rows : array of int
        Indices of these stars.
    causes : dict of int to str
        Why the others cannot be used.

    Raises
    ------
    ValueError
        If none can be used.
    """
    model.drop_corrections()
    config, names = model.config, list(model.config.label_names)
    tokenizer = schema_tokenizer(tokenizer)
    grid = _grid_of(tokenizer, stars)
    tokenizer.pixel_wavelength, tokenizer.scalar_names = [grid], None
    pixels = np.full((len(stars), len(grid)), np.nan, np.float32)
    n_stars, shape = len(stars), (config.num_intervals, config.num_coefficients)
    values, errors = (np.full((n_stars, len(names)), np.nan) for _ in range(2))
    evidence = np.zeros((2, n_stars, *shape), np.float32)
    rungs = np.full(n_stars, -1)
    reasons = [""] * n_stars
    start = 0
    rows = cast(Any, tqdm(cast(Any, stars), desc="spectra", delay=2, leave=False, disable=None))
    for batch in batches_of(rows, tokenizer):
        causes = [""] * len(batch)
        for inputs, members in tokenize_rows(tokenizer, batch, names, causes):
            tokens = {name: value for name, value in inputs.items() if name not in QUALITY}
            with torch.inference_mode():
                output = model(**tokens)
            own, intervals = start + members, inputs["interval_ids"][0].numpy()
            values[own], errors[own] = output.predictions.double().numpy(), output.prediction_errors.double().numpy()
            seen = inputs["attention_mask"][..., None]
            for part, name in zip(evidence, ("coefficients", "reliability"), strict=True):
                part[own[:, None], intervals] = (inputs[name] * seen).numpy()
            pixels[own] = inputs["pixels"].numpy()
            seen = output.rung_seen.numpy()
            rungs[own] = np.where(seen.any(axis=1), seen.argmax(axis=1), -1)
        reasons[start : start + len(batch)] = causes
        start += len(batch)
    if not (rungs >= 0).any():
        raise ValueError(f"spectra: expected some that the checkpoint can predict, got none; first: {reasons[0]}")
    rung = int(np.bincount(rungs[rungs >= 0]).argmax())
    first, last = config.rung_intervals[rung]
    # The labels that it predicts; the few stars without them are left out.
    known = np.isfinite(values) & np.isfinite(errors) & (errors > 0)
    answered = [i for i in range(len(names)) if known[rungs == rung, i].mean() > 0.5]
    usable = (rungs == rung) & known[:, answered].all(axis=1)
    unusable: dict[int, str] = {}
    for i in np.flatnonzero(~usable).tolist():
        other = "belongs to another range or resolving power than most spectra: fine-tune on those separately"
        unusable[i] = reasons[i] or (other if rungs[i] not in (-1, rung) else "no prediction of the checkpoint")
    kept = np.flatnonzero(usable)
    wide = evidence[:, kept, first:last].astype(np.float64)
    labels = [names[i] for i in answered]
    said = values[kept][:, answered], errors[kept][:, answered], wide[0], wide[1]
    states = States(labels, *said, pixels[kept], grid)
    return rung, states, kept, unusable


def _grid_of(tokenizer: SpectraFMTokenizer, stars: Dataset) -> FloatArray:
    """
    Wavelengths of the spectrum with most pixels, as the common grid of spectra with different grids; thinned out if
    there are very many.
    """
    sizes = np.array([len(row) for row in stars.with_format(None)["wavelength"]])
    row = stars[int(sizes.argmax())]
    wavelength = np.unique(np.asarray(row["wavelength"], np.float64))
    wavelength = wavelength[wavelength > 0]
    power = row.get("resolving_power")
    power = None if power is None or not np.isfinite(power) else float(power)
    nothing = np.zeros((1, len(wavelength)))
    if len(wavelength) and tokenizer.basis is not None:
        spectra = tokenizer.basis.brought_down(wavelength, nothing, nothing + 1.0, power)
        wavelength, *_ = tokenizer.basis.brought_further(*spectra) or spectra
    return wavelength[:: -(-len(wavelength) // MOST_PIXELS) or 1]
