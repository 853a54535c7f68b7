# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics during training, and the factors that calibrate errors."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from transformers import (
    EvalPrediction,
)

from ..models import SpectraFMConfig
from .metrics import label_metrics


def make_compute_metrics(config: SpectraFMConfig, label_names: Sequence[str]):
    """
    `compute_metrics` for the Trainer, in physical units: for each label bias, robust scatter (1.4826 MAD), RMSE and
    the robust scatter of error/sigma, for stars with a true `teff` of 3,500-6,500 K. `residual` selects the best step,
    whatever its sigmas, which are calibrated after training: the mean absolute residual in units of the scale of the
    label, geometric mean over the labels.

    It raises a ValueError if the first two outputs are not `mean` and `log_variance`, because of `ignore_keys` of
    `trainer.predict` or `evaluate`: arrays of another shape, or numbers too large for a standardised label, such as
    temperatures in K.
    """
    columns = [config.label_names.index(name) for name in label_names]
    center = np.array(config.label_centers)[columns]
    scale = np.array(config.label_scales)[columns]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        outputs: Any = prediction.predictions
        truth: Any = prediction.label_ids
        labels, label_errors = truth
        shapes = [np.shape(output) for output in outputs[:2]]
        # Values in physical units have the same shapes. Only temperatures reveal them: no training predicts half of the
        # stars at 1,000 scales of a label.
        if shapes != [labels.shape] * 2 or any(np.median(np.abs(output), axis=0).max() > 1e3 for output in outputs[:2]):
            raise ValueError(
                "predictions: expected mean and log_variance, in standardised units, as the first two outputs, got "
                f"arrays of shape {shapes}, the first star's {outputs[0][:1]}; ignore_keys must not hold these two"
            )
        mean, log_variance = outputs[:2]
        values, errors = mean * scale + center, np.exp(0.5 * log_variance) * scale
        stars = np.ones(len(labels), dtype=bool)
        if "teff" in label_names:
            teff = labels[:, list(label_names).index("teff")]
            within = (teff > 3500) & (teff < 6500)
            # If no star is in this range, all are used.
            stars = within if within.any() else stars
        residuals = np.abs(values - labels)[stars] / scale
        known = np.isfinite(residuals).any(axis=0)
        residual = np.exp(np.mean(np.log(np.nanmean(residuals[:, known], axis=0)))) if known.any() else np.nan
        return {"residual": float(residual)} | {
            f"{name}_{figure}": value
            for i, name in enumerate(label_names)
            for figure, value in label_metrics(
                values[stars, i], errors[stars, i], labels[stars, i], label_errors[stars, i]
            ).items()
            if figure != "n"
        }

    return compute_metrics


def calibrate_errors(
    config: SpectraFMConfig, label_names: Sequence[str], mean, log_variance, truth, rung: int | None = None
):
    """
    Set `label_error_factors`, or `rung_error_factors` of one rung, so that on validation stars the robust scatter of
    error/sigma is 1 for each learnt label.

    Noise added in training makes the errors too large, overfitting makes them too small.

    Parameters
    ----------
    mean, log_variance : array of shape (stars, labels)
        Predictions with the current factors of the config.
    truth : pair of arrays of that shape
        Labels and their errors.
    rung : int, optional
        The rung of the stars, for a model on evidence.
    """
    if rung is None:
        known = config.label_error_factors or [1.0] * len(config.label_names)
        factors = dict(zip(config.label_names, known, strict=True))
    else:
        by_rung = [dict(each) for each in config.rung_error_factors] or [{} for _ in config.rung_intervals]
        factors = by_rung[rung]
    before = np.array([factors.setdefault(name, 1.0) for name in label_names])
    # Iterate, as the errors of the labels are part of sigma and do not scale with the factor.
    for _ in range(10):
        steps = np.array([factors[name] for name in label_names]) / before
        rescaled = EvalPrediction(cast(Any, (mean, log_variance + 2.0 * np.log(steps))), truth)
        metrics = make_compute_metrics(config, label_names)(rescaled)
        for name in label_names:
            found = metrics[f"{name}_robust_z"]
            # Calibration needs at least two stars with a known label.
            factors[name] *= found if np.isfinite(found) and found > 0 else 1.0
    if rung is None:
        config.label_error_factors = [round(factors[name], 4) for name in config.label_names]
    else:
        by_rung[rung] = {name: round(factor, 4) for name, factor in factors.items()}
        config.rung_error_factors = by_rung
