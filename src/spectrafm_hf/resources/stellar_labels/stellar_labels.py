# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""The figures of `spectrafm_hf.training.metrics` for one stellar label, as a metric of the library `evaluate`."""

import datasets
import evaluate
import numpy as np

from spectrafm_hf.training.metrics import label_metrics


DESCRIPTION = """
How far predicted stellar labels are from known ones, in the units of the label: bias (median of the differences),
robust scatter (1.4826 times their median absolute deviation) and RMSE. With errors also the robust scatter of
difference over error, which is 1 for errors of the right size.
"""

INPUTS = """
Args:
    predictions: the label of each star, as predicted.
    references: the label of each star, as known; NaN where it is not, which leaves the star out.
    errors, reference_errors: their one-sigma errors (configuration `with_errors` only); an unknown reference error,
        NaN, counts as 0.
Returns:
    n: number of stars with a known label.
    bias, robust_scatter, rmse: in the units of the label.
    robust_z: robust scatter of difference over error (configuration `with_errors` only).
Example:
    >>> metric = evaluate.load("stellar_labels")
    >>> metric.compute(predictions=[4500.0, 5020.0, 3990.0], references=[4480.0, 5010.0, 4000.0])["bias"]
    10.0
"""

CITATION = """
@article{koblischke2024spectrafm,
  title = {SpectraFM: Tuning into Stellar Foundation Models},
  author = {Koblischke, Nolan and Bovy, Jo},
  journal = {arXiv e-prints},
  year = {2024},
  eprint = {2411.04750}
}
"""


class StellarLabels(evaluate.Metric):
    def _info(self):
        if self.config_name not in ("default", "with_errors"):
            raise ValueError(f"config_name: expected none or 'with_errors', got {self.config_name!r}")
        names = ["predictions", "references"]
        if self.config_name == "with_errors":
            names += ["errors", "reference_errors"]
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Value("float64") for name in names}),
        )

    def _compute(self, predictions, references, errors=None, reference_errors=None):
        sigma = np.ones(len(predictions)) if errors is None else errors
        figures = label_metrics(predictions, sigma, references, reference_errors)
        if errors is None:
            del figures["robust_z"]
        return figures
