# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""Figures of merit of predicted stellar labels, in the units of the labels.

All but `rmse` are robust: the labels of a survey have outliers (binaries, bad fits), and a few of them can dominate the
RMSE.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..files import RESOURCES
from ..statistics import robust_scatter


FIGURES = ("robust_scatter", "bias", "rmse", "robust_z")
#: These figures are also a metric of the library `evaluate`: `evaluate.load(EVALUATE_METRIC)`, or, with errors of the
#: predictions and of the true values, `evaluate.load(EVALUATE_METRIC, "with_errors")`.
EVALUATE_METRIC = str(RESOURCES / "stellar_labels")


def label_metrics(
    values: ArrayLike, errors: ArrayLike, labels: ArrayLike, label_errors: ArrayLike | None = None
) -> dict[str, float | int]:
    """Figures of merit of one label.

    Parameters
    ----------
    values, errors : array, shape (stars,)
        Predictions and their one-sigma errors.
    labels, label_errors : array, shape (stars,)
        True values and their one-sigma errors. Stars with a label of NaN are left out; an error of NaN (or
        `label_errors=None`) is replaced by 0.

    Returns
    -------
    dict
        ``n``; ``bias``, median of predicted - true; ``robust_scatter``, 1.4826 times the median absolute deviation of
        predicted - true about that median; ``rmse``; ``robust_z``, the robust scatter of
        (predicted - true) / sqrt(errors^2 + label_errors^2), 1 = well calibrated. NaN without stars.

    Raises
    ------
    ValueError
        If the shapes differ, or a prediction for a star with a label is not finite or has no positive error.
    """
    labels = np.asarray(labels, dtype=np.float64)
    if label_errors is None:
        label_errors = np.zeros_like(labels)
    arrays = {"values": values, "errors": errors, "labels": labels, "label_errors": label_errors}
    columns = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
    for name, column in columns.items():
        if column.ndim != 1 or column.shape != labels.shape:
            raise ValueError(f"{name}: expected shape (stars,), here {labels.shape} as in labels, got {column.shape}")
    known = np.isfinite(labels)
    predicted, sigma, truth, truth_sigma = (column[known] for column in columns.values())
    # A failed prediction is reported, not left out of the table.
    for name, wrong in (("values", ~np.isfinite(predicted)), ("errors", ~(np.isfinite(sigma) & (sigma > 0)))):
        if wrong.any():
            expectation = "finite numbers" if name == "values" else "positive numbers"
            raise ValueError(
                f"{name}: expected {expectation}, got {columns[name][known][wrong][0]} in {wrong.sum()} stars"
            )
    if not known.any():
        return {"n": 0, **dict.fromkeys(FIGURES, float("nan"))}
    residual = predicted - truth
    total_sigma = np.hypot(sigma, np.where(np.isfinite(truth_sigma), truth_sigma, 0.0))
    return {
        "n": int(known.sum()),
        "robust_scatter": robust_scatter(residual),
        "bias": float(np.median(residual)),
        "rmse": float(np.sqrt(np.mean(residual**2))),
        "robust_z": robust_scatter(residual / total_sigma),
    }


def table_metrics(
    values: Mapping[str, ArrayLike],
    errors: Mapping[str, ArrayLike],
    labels: Mapping[str, ArrayLike],
    label_errors: Mapping[str, ArrayLike],
    selection: ArrayLike | None = None,
) -> dict[str, dict[str, float | int]]:
    """`label_metrics` of each label in `values`, over the stars that `selection` keeps.

    Parameters
    ----------
    values, errors, labels, label_errors : mapping of label name to array, shape (stars,)
        The table has the labels of `values`; the other mappings may have more.
    selection : array of bool, shape (stars,), optional
        Default: all stars.

    Raises
    ------
    ValueError
        As `label_metrics`; also if a mapping lacks a label or `selection` is not a mask over the stars.
    """
    for field, mapping in (("errors", errors), ("labels", labels), ("label_errors", label_errors)):
        missing = [name for name in values if name not in mapping]
        if missing:
            raise ValueError(f"{field}: expected the labels {list(values)}, got none for {missing}")
    table = {}
    for name in values:
        columns = [np.asarray(mapping[name]) for mapping in (values, errors, labels, label_errors)]
        if selection is not None:
            mask = np.asarray(selection)
            if mask.dtype != bool or any(mask.shape != column.shape for column in columns):
                shapes = [column.shape for column in columns]
                raise ValueError(
                    f"selection: expected bool of the shapes {shapes} of {name}, got {mask.dtype} {mask.shape}"
                )
            columns = [column[mask] for column in columns]
        table[name] = label_metrics(*columns)
    return table


def format_table(results: Mapping[str, Mapping[str, Mapping[str, Any]]], units: Mapping[str, str] | None = None) -> str:
    """One Markdown table: a row for each model, a column for each label.

    The format of a cell is ``robust_scatter (bias, rmse, robust_z)``; the header has label, unit and number of stars.

    Parameters
    ----------
    results : mapping of model name to the output of `table_metrics`
    units : mapping of label name to unit, optional
    """
    labels = list(dict.fromkeys(name for table in results.values() for name in table))

    def header(label: str) -> str:
        counts = sorted({table[label]["n"] for table in results.values() if label in table})
        unit = (units or {}).get(label, "")
        return f"{label}{f' [{unit}]' if unit else ''}, n = {' / '.join(f'{n:,}' for n in counts)}"

    def cell(label: str, table: Mapping[str, Mapping[str, Any]]) -> str:
        if label not in table:
            return ""
        figures = table[label]
        # A scatter above 10 is that of a temperature: one decimal is enough.
        digits = 1 if abs(figures["robust_scatter"]) >= 10 else 4
        scatter, bias, rmse = (f"{figures[key]:.{digits}f}" for key in ("robust_scatter", "bias", "rmse"))
        return f"{scatter} ({bias if bias.startswith('-') else '+' + bias}, {rmse}, {figures['robust_z']:.2f})"

    rows: list[Sequence[str]] = [["model", *map(header, labels)]]
    rows += [[model, *(cell(label, table) for label in labels)] for model, table in results.items()]
    widths: NDArray[np.int_] = np.array([[len(text) for text in row] for row in rows]).max(axis=0)
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
